//! Versions, status codes, and the message of the last error.

use std::ffi::{CStr, c_char};

use super::fence;
use super::forward::forward;
use crate::error::ErrorKind;

/// Major version. A change breaks programs.
pub const TMS_VERSION_MAJOR: u32 = 0;
/// Minor version. Additions.
pub const TMS_VERSION_MINOR: u32 = 1;
/// Patch version. Corrections.
pub const TMS_VERSION_PATCH: u32 = 0;
/// Version of the binary interface. Libraries with different numbers do not work together.
pub const TMS_ABI_VERSION: u32 = 1;

/// Success.
pub const TMS_OK: i32 = 0;
/// An argument is out of its range, or two arguments contradict each other.
pub const TMS_ERR_INVALID_ARGUMENT: i32 = -1;
/// A pointer that must not be NULL is NULL.
pub const TMS_ERR_NULL_POINTER: i32 = -2;
/// The address, file or folder is not known.
pub const TMS_ERR_NOT_FOUND: i32 = -3;
/// The device cannot give the physical memory. Nothing changed; the call can be repeated.
pub const TMS_ERR_OUT_OF_DEVICE_MEMORY: i32 = -4;
/// The host cannot give the memory, or a limit set for it was reached. Nothing changed.
pub const TMS_ERR_OUT_OF_HOST_MEMORY: i32 = -5;
/// This device, driver or build cannot do what was asked.
pub const TMS_ERR_UNSUPPORTED: i32 = -6;
/// No driver, no device, or a driver that cannot be used.
pub const TMS_ERR_NO_DEVICE: i32 = -7;
/// A driver call failed; the device may still be used.
pub const TMS_ERR_DEVICE: i32 = -8;
/// The device is lost for this process. Backups in host memory stay readable.
pub const TMS_ERR_DEVICE_LOST: i32 = -9;
/// The object is in use.
pub const TMS_ERR_BUSY: i32 = -10;
/// A deadline passed.
pub const TMS_ERR_TIMEOUT: i32 = -11;
/// Reading or writing a file failed.
pub const TMS_ERR_IO: i32 = -12;
/// A disk is full.
pub const TMS_ERR_NO_SPACE: i32 = -13;
/// A backup does not match its checksum or length.
pub const TMS_ERR_CORRUPT: i32 = -14;
/// The memory is exported, so releasing it would free nothing and leave others with stale memory.
pub const TMS_ERR_EXPORTED: i32 = -15;
/// A stream capture is active and forbids the call.
pub const TMS_ERR_CAPTURE: i32 = -16;
/// The library was used before fork(); the child cannot use it.
pub const TMS_ERR_FORKED: i32 = -17;
/// The process is exiting.
pub const TMS_ERR_SHUTDOWN: i32 = -18;
/// Two copies of the library in one process do not match.
pub const TMS_ERR_ABI: i32 = -19;
/// Part of the selection was done and part was not; the result lists which.
pub const TMS_ERR_PARTIAL: i32 = -20;
/// The operation was cancelled before it changed anything. Reserved: nothing can be cancelled yet.
pub const TMS_ERR_CANCELLED: i32 = -21;
/// A defect of this library.
pub const TMS_ERR_INTERNAL: i32 = -22;

/// The version as text, for example "0.1.0". Static; never NULL. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn tms_version() -> *const c_char {
    concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast()
}

/// The version as a number: major × 65536 + minor × 256 + patch. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn tms_version_number() -> u32 {
    (TMS_VERSION_MAJOR << 16) | (TMS_VERSION_MINOR << 8) | TMS_VERSION_PATCH
}

/// The version of the binary interface of the loaded library. Compare with TMS_ABI_VERSION.
/// Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn tms_abi_version() -> u32 {
    TMS_ABI_VERSION
}

/// A short English phrase for a status code; "unknown status" for codes that do not exist.
/// Static; never NULL. Needs no state. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn tms_status_str(code: i32) -> *const c_char {
    phrase(code).as_ptr()
}

pub(super) fn phrase(code: i32) -> &'static CStr {
    match ErrorKind::from_code(code) {
        Some(kind) => kind.describe(),
        None if code == TMS_OK => c"ok",
        None => c"unknown status",
    }
}

/// The message of the last failed call on the calling thread, with the argument, address or file
/// at fault; "" if no call failed. Successful calls do not change it. Owned by the library, valid
/// until the next failed call on this thread. Never NULL.
#[unsafe(no_mangle)]
pub extern "C" fn tms_last_error_message() -> *const c_char {
    forward!(tms_last_error_message() else |_: &_| fence::last_error());
    fence::last_error()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_constants_are_the_table() {
        let constants = [
            TMS_ERR_INVALID_ARGUMENT,
            TMS_ERR_NULL_POINTER,
            TMS_ERR_NOT_FOUND,
            TMS_ERR_OUT_OF_DEVICE_MEMORY,
            TMS_ERR_OUT_OF_HOST_MEMORY,
            TMS_ERR_UNSUPPORTED,
            TMS_ERR_NO_DEVICE,
            TMS_ERR_DEVICE,
            TMS_ERR_DEVICE_LOST,
            TMS_ERR_BUSY,
            TMS_ERR_TIMEOUT,
            TMS_ERR_IO,
            TMS_ERR_NO_SPACE,
            TMS_ERR_CORRUPT,
            TMS_ERR_EXPORTED,
            TMS_ERR_CAPTURE,
            TMS_ERR_FORKED,
            TMS_ERR_SHUTDOWN,
            TMS_ERR_ABI,
            TMS_ERR_PARTIAL,
            TMS_ERR_CANCELLED,
            TMS_ERR_INTERNAL,
        ];
        let table: Vec<i32> = ErrorKind::ALL.iter().map(|kind| kind.code()).collect();
        assert_eq!(constants.as_slice(), table);
        let version = format!("{TMS_VERSION_MAJOR}.{TMS_VERSION_MINOR}.{TMS_VERSION_PATCH}");
        assert_eq!(version, env!("CARGO_PKG_VERSION"));
    }
}
