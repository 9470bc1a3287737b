//! What `memcache.h` shares with `tms.h`: versions, status, messages, log. Not the pool itself.

use std::ffi::{c_char, c_void};

use super::log::{tms_log_flush, tms_log_set_callback};
use super::status::{
    TMS_ABI_VERSION, tms_last_error_message, tms_status_str, tms_version, tms_version_number,
};

/// Version of the binary interface. Libraries with different numbers do not work together.
pub const MEMCACHE_ABI_VERSION: u32 = 1;

/// Success.
pub const MEMCACHE_OK: i32 = 0;
/// An argument is out of its range, or two arguments contradict each other.
pub const MEMCACHE_ERR_INVALID_ARGUMENT: i32 = -1;
/// A pointer that must not be NULL is NULL.
pub const MEMCACHE_ERR_NULL_POINTER: i32 = -2;
/// A deadline passed.
pub const MEMCACHE_ERR_TIMEOUT: i32 = -11;
/// Two copies of the library in one process do not match.
pub const MEMCACHE_ERR_ABI: i32 = -19;
/// A defect of this library.
pub const MEMCACHE_ERR_INTERNAL: i32 = -22;

/// Receives log records. `user` is what was registered; `level` is 1 error, 2 warn, 3 info, 4 debug;
/// both strings are valid during the call only. Runs on a thread of the library, one record at a
/// time; it may not call memcache_log_set_callback or memcache_log_flush.
#[allow(non_camel_case_types)]
pub type memcache_log_callback_t = Option<
    unsafe extern "C" fn(
        user: *mut c_void,
        level: i32,
        target: *const c_char,
        message: *const c_char,
    ),
>;

/// The version as text, for example "0.1.0". Static; never NULL. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn memcache_version() -> *const c_char {
    tms_version()
}

/// The version as a number: major × 65536 + minor × 256 + patch. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn memcache_version_number() -> u32 {
    tms_version_number()
}

/// The version of the binary interface of the loaded library. Compare with MEMCACHE_ABI_VERSION.
/// Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn memcache_abi_version() -> u32 {
    TMS_ABI_VERSION
}

/// A short English phrase for a status code; "unknown status" for codes that do not exist.
/// Static; never NULL. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn memcache_status_str(code: i32) -> *const c_char {
    tms_status_str(code)
}

/// The message of the last failed call on the calling thread, "" if none. Owned by the library,
/// valid until the next failed call on this thread. Never NULL.
#[unsafe(no_mangle)]
pub extern "C" fn memcache_last_error_message() -> *const c_char {
    tms_last_error_message()
}

/// Sets or removes the callback for log records of the whole library; the one of tms.h is the same.
///
/// `callback` may be NULL: then, when the function returns, no call is running. `user` is passed
/// through and may be NULL; it must stay valid until the callback is removed. `level` is the
/// highest level to deliver, 1 (error) to 4 (debug). Any thread, but not from the callback.
///
/// Returns MEMCACHE_OK or MEMCACHE_ERR_INVALID_ARGUMENT.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memcache_log_set_callback(
    callback: memcache_log_callback_t,
    user: *mut c_void,
    level: i32,
) -> i32 {
    // SAFETY: the same contract.
    unsafe { tms_log_set_callback(callback, user, level) }
}

/// Waits until all records raised so far were delivered, at most `timeout_ms` milliseconds. Any
/// thread, but not from the callback.
///
/// Returns MEMCACHE_OK or MEMCACHE_ERR_TIMEOUT.
#[unsafe(no_mangle)]
pub extern "C" fn memcache_log_flush(timeout_ms: u32) -> i32 {
    tms_log_flush(timeout_ms)
}
