//! Result codes of the CUDA driver: what kind of failure each one is, and its text.
//!
//! Codes stay plain integers, because a newer driver may return one that no list here knows. What
//! the library does about a failure is decided elsewhere.

use std::ffi::{CStr, c_char, c_int};
use std::fmt;
use std::ptr;

use cudarc::driver::sys::CUresult;

use super::driver::DriverTable;
use crate::error::{Error, ErrorKind, Result};
use crate::process;

pub(super) const SUCCESS: c_int = CUresult::CUDA_SUCCESS as c_int;
pub(super) const INVALID_VALUE: c_int = CUresult::CUDA_ERROR_INVALID_VALUE as c_int;
pub(super) const NOT_SUPPORTED: c_int = CUresult::CUDA_ERROR_NOT_SUPPORTED as c_int;
pub(super) const INVALID_CONTEXT: c_int = CUresult::CUDA_ERROR_INVALID_CONTEXT as c_int;
pub(super) const NOT_READY: c_int = CUresult::CUDA_ERROR_NOT_READY as c_int;
pub(super) const CAPTURE_IMPLICIT: c_int = CUresult::CUDA_ERROR_STREAM_CAPTURE_IMPLICIT as c_int;

/// What a code other than success means for the caller.
///
/// Lost are the codes of which CUDA's reference says that the process is left in an inconsistent
/// state, must be relaunched or that the context cannot be used any more, and the two uncorrectable
/// memory errors. 709 is among them: the host reset the device, and with it went all that this
/// library made there.
pub fn kind(code: c_int) -> ErrorKind {
    kind_while(code, process::exiting())
}

fn kind_while(code: c_int, exiting: bool) -> ErrorKind {
    match code {
        2 => ErrorKind::OutOfDeviceMemory,
        // The driver takes itself down while the process exits.
        3 | 4 | 709 if exiting => ErrorKind::Shutdown,
        34 | 100 => ErrorKind::NoDevice,
        101 => ErrorKind::InvalidArgument,
        214 | 220 | 226 | 700 | 702 | 709 | 710 | 714..=719 | 721 | 810 | 911 => {
            ErrorKind::DeviceLost
        }
        801 => ErrorKind::Unsupported,
        900..=908 => ErrorKind::Capture,
        _ => ErrorKind::Device,
    }
}

impl DriverTable {
    /// Success is `Ok`; any other `code` becomes an error about `call`, which names the function
    /// with its sizes and addresses.
    pub fn check(&self, code: c_int, call: fmt::Arguments<'_>) -> Result<()> {
        if code == SUCCESS {
            return Ok(());
        }
        Err(self.error(code, call))
    }

    /// The error that [`Self::check`] makes of a code other than success.
    #[cold]
    pub fn error(&self, code: c_int, call: fmt::Arguments<'_>) -> Error {
        Error::new(kind(code), format!("{call}: {}", self.describe(code)))
    }

    /// "CUDA_ERROR_OUT_OF_MEMORY (code 2: out of memory)", or "code 12345" if the driver has no
    /// name for it.
    pub fn describe(&self, code: c_int) -> String {
        // SAFETY: both functions have this signature.
        let name = self.cuGetErrorName.and_then(|f| unsafe { text(f, code) });
        // SAFETY: as above.
        let explanation = self.cuGetErrorString.and_then(|f| unsafe { text(f, code) });
        match (name, explanation) {
            (Some(name), Some(explanation)) => format!("{name} (code {code}: {explanation})"),
            (Some(name), None) => format!("{name} (code {code})"),
            (None, _) => format!("code {code}"),
        }
    }
}

type TextOf = unsafe extern "C" fn(c_int, *mut *const c_char) -> c_int;

/// # Safety
/// `function` must be one of the driver's two functions that give a static text for a code.
unsafe fn text(function: TextOf, code: c_int) -> Option<String> {
    let mut pointer = ptr::null();
    // SAFETY: by this function's contract; the pointer is written only here.
    let result = unsafe { function(code, &mut pointer) };
    if result != SUCCESS || pointer.is_null() {
        return None;
    }
    // SAFETY: on success the driver gives a string that lives as long as the driver.
    let text = unsafe { CStr::from_ptr(pointer) };
    Some(text.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_of_known_codes() {
        for (code, kind) in [
            (1, ErrorKind::Device),
            (2, ErrorKind::OutOfDeviceMemory),
            (3, ErrorKind::Device),
            (4, ErrorKind::Device),
            (34, ErrorKind::NoDevice),
            (46, ErrorKind::Device),
            (100, ErrorKind::NoDevice),
            (101, ErrorKind::InvalidArgument),
            (201, ErrorKind::Device),
            (214, ErrorKind::DeviceLost),
            (700, ErrorKind::DeviceLost),
            (701, ErrorKind::Device),
            (709, ErrorKind::DeviceLost),
            (713, ErrorKind::Device),
            (714, ErrorKind::DeviceLost),
            (719, ErrorKind::DeviceLost),
            (720, ErrorKind::Device),
            (721, ErrorKind::DeviceLost),
            (801, ErrorKind::Unsupported),
            (899, ErrorKind::Device),
            (900, ErrorKind::Capture),
            (908, ErrorKind::Capture),
            (909, ErrorKind::Device),
            (999, ErrorKind::Device),
        ] {
            assert_eq!(kind_while(code, false), kind, "{code}");
        }
    }

    #[test]
    fn unknown_codes_are_device_failures() {
        for code in [12_345, -1, c_int::MIN, c_int::MAX] {
            assert_eq!(kind_while(code, false), ErrorKind::Device);
        }
    }

    #[test]
    fn a_driver_that_is_gone_at_exit_is_a_shutdown() {
        for code in [3, 4, 709] {
            assert_eq!(kind_while(code, true), ErrorKind::Shutdown);
        }
        assert_eq!(kind_while(700, true), ErrorKind::DeviceLost);
    }
}
