//! `libtms_preload.so`: the whole library plus the CUDA runtime functions that it stands in for.
//! For `LD_PRELOAD`, and as the native file of the Python package `torch_memory_saver`.
//!
//! A hook decides who serves a call and translates the answer; the saver behind the compatible
//! names does the work. Memory outside regions and foreign pointers belong to the real runtime,
//! whose error codes pass through unchanged. Host memory stands in only if `TMS_DEVICE=host`, or if
//! neither a CUDA driver nor a CUDA runtime can be loaded; where one exists and fails, its error is
//! returned.

#![deny(unsafe_op_in_unsafe_fn)]

mod plain;
mod runtime;

use std::cell::Cell;
use std::ffi::{c_int, c_uint, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};

use tms_memcache::error::{Error, ErrorKind};
use tms_memcache::ffi::compat;
use tms_memcache::process;

use runtime::Runtime;

/// The values of `cudaError_t` that a hook itself returns.
mod code {
    use std::ffi::c_int;

    pub const SUCCESS: c_int = 0;
    pub const INVALID_VALUE: c_int = 1;
    pub const MEMORY_ALLOCATION: c_int = 2;
    pub const INITIALIZATION: c_int = 3;
    pub const RUNTIME_UNLOADING: c_int = 4;
    pub const NO_DEVICE: c_int = 100;
    pub const LIBRARY_NOT_FOUND: c_int = 303;
    pub const NOT_SUPPORTED: c_int = 801;
    pub const STREAM_CAPTURE: c_int = 900;
    pub const UNKNOWN: c_int = 999;
}

/// Set once host memory stands in for a GPU, so that libraries are not searched again each time.
static HOST_STANDS_IN: AtomicBool = AtomicBool::new(false);

thread_local! {
    /// The last error that a hook of this library returned on this thread and nobody asked for.
    static LAST_ERROR: Cell<c_int> = const { Cell::new(code::SUCCESS) };
}

/// Who serves an allocation.
enum Server {
    /// The saver, on this device; `None` where the saver must find out.
    Saver(Option<u32>),
    Runtime(&'static Runtime),
    /// Host memory that cannot be paused.
    Plain,
    /// Nobody: the real runtime failed with this code, and remembers it.
    FailedRuntime(c_int),
    /// Nobody: this code is ours.
    Refused(c_int),
}

/// Allocates device memory. Inside a region of this thread the memory can be paused; otherwise the
/// real runtime allocates it.
///
/// # Safety
/// As the function of the CUDA runtime: `out` is NULL or valid for writing a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cudaMalloc(out: *mut *mut c_void, bytes: usize) -> c_int {
    fence(|| match choose_server(out, bytes) {
        Server::Saver(device) => match compat::hooked_malloc(bytes, device, 0) {
            Ok(pointer) => {
                // SAFETY: `choose_server` sends a NULL `out` elsewhere, and the caller promised
                // that any other may be written.
                unsafe { out.write(pointer) };
                code::SUCCESS
            }
            Err(error) => refuse(error_code(&error)),
        },
        // SAFETY: passed on as promised by the caller.
        Server::Runtime(runtime) => unsafe { runtime.malloc(out, bytes) },
        Server::Plain => {
            if out.is_null() {
                return refuse(code::INVALID_VALUE);
            }
            let pointer = match bytes {
                0 => Some(ptr::null_mut()),
                _ => plain::malloc(bytes),
            };
            let Some(pointer) = pointer else {
                return refuse(code::MEMORY_ALLOCATION);
            };
            // SAFETY: not NULL, and writable as promised by the caller.
            unsafe { out.write(pointer) };
            code::SUCCESS
        }
        Server::FailedRuntime(code) => code,
        Server::Refused(code) => refuse(code),
    })
}

/// Frees memory of [`cudaMalloc`], of `tms_torch_malloc`, or of the real runtime. Works on any
/// thread and outside regions. Once the process exits it does nothing and succeeds.
///
/// # Safety
/// As the function of the CUDA runtime: the memory is not used any more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cudaFree(pointer: *mut c_void) -> c_int {
    fence(|| {
        if !pointer.is_null() {
            match compat::hooked_free(pointer, None) {
                Some(Ok(())) => return code::SUCCESS,
                Some(Err(error)) if error.kind() == ErrorKind::Shutdown => return code::SUCCESS,
                Some(Err(error)) => return refuse(error_code(&error)),
                None => {}
            }
        }
        if process::exiting() || plain::free(pointer) {
            return code::SUCCESS;
        }
        match outside_region() {
            // SAFETY: passed on as promised by the caller.
            Server::Runtime(runtime) => unsafe { runtime.free(pointer) },
            Server::FailedRuntime(code) => code,
            Server::Refused(code) => refuse(code),
            Server::Plain | Server::Saver(_) if pointer.is_null() => code::SUCCESS,
            Server::Plain | Server::Saver(_) => refuse(code::INVALID_VALUE),
        }
    })
}

/// Flags of pinned host memory, host backups of this library included.
///
/// # Safety
/// As the function of the CUDA runtime: `flags` is NULL or valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cudaHostGetFlags(flags: *mut c_uint, pointer: *mut c_void) -> c_int {
    fence(|| {
        let runtime = Runtime::find();
        // SAFETY: passed on as promised by the caller.
        let answer = runtime.and_then(|runtime| unsafe { runtime.host_flags(flags, pointer) });
        if answer == Some(code::SUCCESS) {
            return code::SUCCESS;
        }
        if let (Some(known), false) = (compat::pinned_flags(pointer), flags.is_null()) {
            if let Some(runtime) = runtime {
                runtime.take_last_error();
            }
            // SAFETY: not NULL, and writable as promised by the caller.
            unsafe { flags.write(known) };
            return code::SUCCESS;
        }
        answer.unwrap_or_else(|| refuse(code::INVALID_VALUE))
    })
}

/// Returns and clears the thread's last error, be it of a hook or of the real runtime.
#[unsafe(no_mangle)]
pub extern "C" fn cudaGetLastError() -> c_int {
    fence(|| {
        let real = Runtime::find().map_or(code::SUCCESS, Runtime::take_last_error);
        match LAST_ERROR.replace(code::SUCCESS) {
            code::SUCCESS => real,
            own => own,
        }
    })
}

/// Device memory that region allocations of the default saver leave free, in bytes, on every
/// device. An allocation that would leave less fails as if memory had run out.
#[unsafe(no_mangle)]
pub extern "C" fn set_memory_margin_bytes(bytes: u64) {
    fence(|| {
        compat::set_memory_margin_bytes(bytes);
        code::SUCCESS
    });
}

/// A panic must not cross into C.
fn fence(body: impl FnOnce() -> c_int) -> c_int {
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|_| refuse(code::UNKNOWN))
}

/// Remembers the code for [`cudaGetLastError`] and returns it.
fn refuse(code: c_int) -> c_int {
    LAST_ERROR.set(code);
    code
}

fn choose_server(out: *mut *mut c_void, bytes: usize) -> Server {
    // This copy may not be the one that owns the saver, and watches fork and exit by itself.
    process::watch();
    if out.is_null() || bytes == 0 || !compat::region_enabled() {
        return outside_region();
    }
    if process::forked() {
        return in_forked_child();
    }
    if compat::host_device_wanted() {
        return Server::Saver(None);
    }
    match find_runtime() {
        // Without a driver the runtime itself has the right error.
        Some(runtime) if !runtime::driver_can_be_loaded() => Server::Runtime(runtime),
        Some(runtime) => match runtime.current_device() {
            Some(Ok(device)) => Server::Saver(Some(device)),
            Some(Err(code)) => Server::FailedRuntime(code),
            None => Server::Saver(None),
        },
        None => {
            host_stands_in();
            Server::Saver(None)
        }
    }
}

fn outside_region() -> Server {
    if let Some(runtime) = find_runtime() {
        return Server::Runtime(runtime);
    }
    if process::forked() {
        return in_forked_child();
    }
    if compat::host_device_wanted() || host_stands_in() {
        return Server::Plain;
    }
    Server::Refused(code::LIBRARY_NOT_FOUND)
}

fn in_forked_child() -> Server {
    match find_runtime() {
        Some(runtime) => Server::Runtime(runtime),
        None => Server::Refused(code::INITIALIZATION),
    }
}

fn find_runtime() -> Option<&'static Runtime> {
    Runtime::find().or_else(|| {
        if HOST_STANDS_IN.load(Ordering::Acquire) || compat::host_device_wanted() {
            None
        } else {
            Runtime::load()
        }
    })
}

/// Whether host memory may serve without having been asked for: neither a runtime, which the
/// caller has looked for, nor a driver can be loaded.
fn host_stands_in() -> bool {
    if HOST_STANDS_IN.load(Ordering::Acquire) {
        return true;
    }
    let alone = !runtime::driver_can_be_loaded();
    HOST_STANDS_IN.fetch_or(alone, Ordering::AcqRel);
    alone
}

fn error_code(error: &Error) -> c_int {
    match error.kind() {
        ErrorKind::OutOfDeviceMemory | ErrorKind::OutOfHostMemory => code::MEMORY_ALLOCATION,
        ErrorKind::InvalidArgument | ErrorKind::NullPointer | ErrorKind::NotFound => {
            code::INVALID_VALUE
        }
        ErrorKind::NoDevice => code::NO_DEVICE,
        ErrorKind::Forked => code::INITIALIZATION,
        ErrorKind::Shutdown => code::RUNTIME_UNLOADING,
        ErrorKind::Unsupported => code::NOT_SUPPORTED,
        ErrorKind::Capture => code::STREAM_CAPTURE,
        _ => code::UNKNOWN,
    }
}
