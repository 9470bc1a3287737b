//! The hooks' view of the border, for the preload variant: the exported hook functions with Rust
//! types. They pass calls on to the copy of the library that owns the state, like all others.

use std::ffi::{CStr, c_void};

use super::torch::{
    tms_hook_free, tms_hook_is_pinned, tms_hook_malloc, tms_hook_set_memory_margin,
};
use super::{TMS_ERR_NOT_FOUND, TMS_OK, tms_get_interesting_region, tms_last_error_message};
use crate::error::{Error, ErrorKind, Result};

/// The error of the last call, by its code and the thread's message.
fn error(status: i32) -> Error {
    // SAFETY: never NULL, and valid until the thread's next failed call.
    let message = unsafe { CStr::from_ptr(tms_last_error_message()) };
    Error::new(
        ErrorKind::from_code(status).unwrap_or(ErrorKind::Internal),
        message.to_string_lossy(),
    )
}

/// Whether the calling thread is in a region. Works while the thread ends, too.
pub fn region_enabled() -> bool {
    tms_get_interesting_region()
}

/// Whether hooks are to serve from the host device even where CUDA is installed.
pub fn host_device_wanted() -> bool {
    std::env::var("TMS_DEVICE").is_ok_and(|wanted| wanted.eq_ignore_ascii_case("host"))
}

/// Allocates on `device` (the thread's current one for `None`) for the thread's region.
pub fn hooked_malloc(bytes: usize, device: Option<u32>, _stream: u64) -> Result<*mut c_void> {
    let ordinal = device.map_or(-1, |device| i32::try_from(device).unwrap_or(i32::MAX));
    let mut pointer = std::ptr::null_mut();
    // SAFETY: the out-parameter is a local variable.
    match unsafe { tms_hook_malloc(&mut pointer, bytes, ordinal) } {
        TMS_OK => Ok(pointer),
        status => Err(error(status)),
    }
}

/// Frees; `None` if the pointer is not ours. `stream` is a `CUstream`; `None` is the legacy stream.
pub fn hooked_free(pointer: *mut c_void, stream: Option<u64>) -> Option<Result<()>> {
    let stream = stream.unwrap_or(0) as *mut c_void;
    match tms_hook_free(pointer, stream) {
        TMS_OK => Some(Ok(())),
        TMS_ERR_NOT_FOUND => None,
        status => Some(Err(error(status))),
    }
}

/// The flags `cudaHostGetFlags` would tell (0) if `pointer` lies in pinned memory of the library.
pub fn pinned_flags(pointer: *const c_void) -> Option<u32> {
    tms_hook_is_pinned(pointer).then_some(0)
}

/// Bytes that allocations leave free on every device.
pub fn set_memory_margin_bytes(bytes: u64) {
    let status = tms_hook_set_memory_margin(bytes);
    if status != TMS_OK {
        tracing::error!("the memory margin was not set: {}", error(status));
    }
}
