//! The names that the Python package torch_memory_saver and its hosts look up, over the default
//! saver and the calling thread's state; and the two functions that allocator hooks are made of.

use std::ffi::{c_char, c_int, c_void};
use std::path::Path;
use std::sync::OnceLock;
use std::time::Duration;

use super::argument::{optional_str, out};
use super::device::ordinal;
use super::fence::{fail, fence, fenced};
use super::forward::forward;
use super::saver::default_saver;
use super::status::{TMS_ERR_NOT_FOUND, TMS_OK};
use crate::allocator::{Outcome, PauseOptions, ResumeOptions, Saver, region};
use crate::device::DeviceKind;
use crate::error::{Error, ErrorKind, Result};

/// How long `tms_resume` waits for memory: its callers often ignore the status.
const DEFAULT_WAIT: Duration = Duration::from_secs(60);

/// Reports an error of a setter that returns nothing.
fn report(result: Result<()>) {
    if let Err(error) = result {
        tracing::error!("{error}");
        fail(&error);
    }
}

/// Sets the tag of allocations that the calling thread makes from now on.
///
/// `tag`: 1 to 255 bytes of UTF-8; NULL or "" means "default". A bad tag is logged and ignored.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tms_set_current_tag(tag: *const c_char) {
    forward!(tms_set_current_tag(tag) else |_: &_| ());
    report(fenced(|| {
        // SAFETY: NULL or a NUL-terminated string by the function's contract.
        let tag = unsafe { optional_str(tag, "tag") }?.unwrap_or_default();
        region::set_tag(if tag.is_empty() {
            region::DEFAULT_TAG
        } else {
            tag
        })
    }));
}

/// The calling thread's tag. Owned by the library, valid until the thread sets another tag or enters
/// or leaves a region. Never NULL.
#[unsafe(no_mangle)]
pub extern "C" fn tms_get_current_tag() -> *const c_char {
    forward!(tms_get_current_tag() else |_: &_| c"default".as_ptr());
    fenced(|| Ok(region::tag_pointer())).unwrap_or(c"default".as_ptr())
}

/// Whether allocations of the calling thread are to be pausable, that is, whether it is in a region.
#[unsafe(no_mangle)]
pub extern "C" fn tms_set_interesting_region(enabled: bool) {
    forward!(tms_set_interesting_region(enabled) else |_: &_| ());
    report(fenced(|| {
        region::set_enabled(enabled);
        Ok(())
    }));
}

/// Whether the calling thread is in a region.
#[unsafe(no_mangle)]
pub extern "C" fn tms_get_interesting_region() -> bool {
    forward!(tms_get_interesting_region() else |_: &_| false);
    fenced(|| Ok(region::enabled())).unwrap_or(false)
}

/// Whether allocations of the calling thread keep their contents in host memory while paused.
#[unsafe(no_mangle)]
pub extern "C" fn tms_set_enable_cpu_backup(enabled: bool) {
    forward!(tms_set_enable_cpu_backup(enabled) else |_: &_| ());
    report(fenced(|| {
        region::set_cpu_backup(enabled);
        Ok(())
    }));
}

/// See tms_set_enable_cpu_backup.
#[unsafe(no_mangle)]
pub extern "C" fn tms_get_enable_cpu_backup() -> bool {
    forward!(tms_get_enable_cpu_backup() else |_: &_| false);
    fenced(|| Ok(region::cpu_backup())).unwrap_or(false)
}

/// Which host memory the calling thread's allocations are kept in: "pinned" or "mmap". Anything
/// else is logged and ignored.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tms_set_cpu_backup_backend(name: *const c_char) {
    forward!(tms_set_cpu_backup_backend(name) else |_: &_| ());
    report(fenced(|| {
        // SAFETY: NULL or a NUL-terminated string by the function's contract.
        let name = unsafe { optional_str(name, "name") }?.unwrap_or("pinned");
        region::set_cpu_backend(name)
    }));
}

/// The calling thread's host backend. Owned by the library, valid until the thread sets another or
/// enters or leaves a region. Never NULL.
#[unsafe(no_mangle)]
pub extern "C" fn tms_get_cpu_backup_backend() -> *const c_char {
    forward!(tms_get_cpu_backup_backend() else |_: &_| c"pinned".as_ptr());
    fenced(|| Ok(region::cpu_backend_pointer())).unwrap_or(c"pinned".as_ptr())
}

/// Whether allocations of the calling thread keep their contents in files while paused. Not
/// together with host memory: an allocation that asks for both is refused with a message.
#[unsafe(no_mangle)]
pub extern "C" fn tms_set_enable_disk_backup(enabled: bool) {
    forward!(tms_set_enable_disk_backup(enabled) else |_: &_| ());
    report(fenced(|| {
        region::set_disk_backup(enabled);
        Ok(())
    }));
}

/// See tms_set_enable_disk_backup.
#[unsafe(no_mangle)]
pub extern "C" fn tms_get_enable_disk_backup() -> bool {
    forward!(tms_get_enable_disk_backup() else |_: &_| false);
    fenced(|| Ok(region::disk_backup())).unwrap_or(false)
}

/// The folder of file backups made from now on, for the process. NULL or "": TMS_DISK_BACKUP_DIR,
/// else the system's temporary folder.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tms_set_disk_backup_dir(folder: *const c_char) {
    forward!(tms_set_disk_backup_dir(folder) else |_: &_| ());
    report(fenced(|| {
        // SAFETY: NULL or a NUL-terminated string by the function's contract.
        let folder = unsafe { optional_str(folder, "folder") }?;
        crate::backup::set_default_folder(folder.filter(|name| !name.is_empty()).map(Path::new));
        Ok(())
    }));
}

/// Sets by one name where allocations of the calling thread keep their contents while paused: "cpu"
/// or "pinned", "mmap", "nvme" or "file", or "none".
///
/// Returns TMS_OK; TMS_ERR_NULL_POINTER; TMS_ERR_INVALID_ARGUMENT, with the known names, for
/// another name, and then nothing changed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tms_set_storage_backend_type(name: *const c_char) -> c_int {
    forward!(tms_set_storage_backend_type(name));
    fence(|| {
        // SAFETY: NULL or a NUL-terminated string by the function's contract.
        let name = unsafe { optional_str(name, "name") }?
            .ok_or_else(|| Error::new(ErrorKind::NullPointer, "name must not be NULL"))?;
        let (cpu, disk) = match name {
            "cpu" | "pinned" | "mmap" => (true, false),
            "nvme" | "file" => (false, true),
            "none" => (false, false),
            _ => {
                return Err(Error::invalid(
                    "name",
                    format_args!("\"{name}\" is none of cpu, pinned, mmap, nvme, file, none"),
                ));
            }
        };
        if cpu {
            region::set_cpu_backend(if name == "mmap" { "mmap" } else { "pinned" })?;
        }
        region::set_cpu_backup(cpu);
        region::set_disk_backup(disk);
        Ok(TMS_OK)
    })
}

/// Where allocations of the calling thread keep their contents: "pinned", "mmap", "file" or "none".
/// Static; never NULL.
#[unsafe(no_mangle)]
pub extern "C" fn tms_get_storage_backend_type() -> *const c_char {
    forward!(tms_get_storage_backend_type() else |_: &_| c"none".as_ptr());
    fenced(|| {
        Ok(match region::current_or_default()?.backup() {
            Some("pinned") => c"pinned",
            Some("mmap") => c"mmap",
            Some("file") => c"file",
            _ => c"none",
        })
    })
    .unwrap_or(c"none")
    .as_ptr()
}

/// Describes a Mooncake cluster as a place for backups. This build has no such backend.
///
/// All strings may be NULL: address of this host, metadata server, master, protocol ("tcp" or
/// "rdma"), device names.
///
/// Returns TMS_ERR_UNSUPPORTED.
#[unsafe(no_mangle)]
pub extern "C" fn tms_set_mooncake_config(
    local_hostname: *const c_char,
    metadata_server: *const c_char,
    master_server_address: *const c_char,
    protocol: *const c_char,
    device_name: *const c_char,
) -> c_int {
    forward!(tms_set_mooncake_config(
        local_hostname,
        metadata_server,
        master_server_address,
        protocol,
        device_name
    ));
    fail(&Error::new(
        ErrorKind::Unsupported,
        "this build has no mooncake backend; use pinned, mmap or file",
    ))
}

/// Whether backups in host memory stay after a resume, at the same address in every cycle, for
/// regions that do not say. For the process; decided when a resume ends.
#[unsafe(no_mangle)]
pub extern "C" fn tms_set_retain_cpu_backup(retain: bool) {
    forward!(tms_set_retain_cpu_backup(retain) else |_: &_| ());
    report(fenced(|| {
        region::set_retain(retain);
        Ok(())
    }));
}

/// See tms_set_retain_cpu_backup. Initially what TMS_RETAIN_CPU_BACKUP says.
#[unsafe(no_mangle)]
pub extern "C" fn tms_get_retain_cpu_backup() -> bool {
    forward!(tms_get_retain_cpu_backup() else |_: &_| false);
    fenced(|| Ok(region::retain())).unwrap_or(false)
}

/// The tag of a compatible call, `None` for all.
///
/// # Safety
/// NULL or a NUL-terminated string.
unsafe fn selection(tag: *const c_char) -> Result<Option<String>> {
    // SAFETY: the caller's promise.
    let tag = unsafe { optional_str(tag, "tag") }?;
    match tag {
        None | Some("") => Ok(None),
        Some(tag) => {
            region::check_tag(tag)?;
            Ok(Some(tag.to_string()))
        }
    }
}

/// What `TMS_ON_ERROR` asks for when a caller may not look at the status.
fn end(verb: &str, outcome: Outcome) -> i32 {
    let Err(error) = outcome.status else {
        return TMS_OK;
    };
    tracing::error!("tms_{verb} failed: {error}");
    let code = fail(&error);
    let wanted = std::env::var("TMS_ON_ERROR").unwrap_or_default();
    match wanted.trim().to_ascii_lowercase().as_str() {
        "abort" => {
            let line =
                format!("tms error: tms_{verb} failed: {error}; aborting as TMS_ON_ERROR says\n");
            // SAFETY: one write of a valid buffer.
            unsafe { libc::write(libc::STDERR_FILENO, line.as_ptr().cast(), line.len()) };
            std::process::abort()
        }
        "" | "return" => code,
        other => {
            tracing::error!("TMS_ON_ERROR: \"{other}\" is neither return nor abort; returning");
            code
        }
    }
}

/// Pauses the allocations of the default saver with a tag. See tms_saver_pause.
///
/// `tag`: NULL or "" selects all. A process that never allocated has nothing to pause: success.
///
/// Returns TMS_OK or the error of tms_saver_pause; a failure is logged, and aborts the process if
/// TMS_ON_ERROR=abort.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tms_pause(tag: *const c_char) -> c_int {
    forward!(tms_pause(tag));
    fence(|| {
        // SAFETY: by the function's contract.
        let tag = unsafe { selection(tag) }?;
        crate::process::check()?;
        let Some(saver) = Saver::existing_default() else {
            return Ok(TMS_OK);
        };
        let options = match tag {
            Some(tag) => PauseOptions::tags([tag]),
            None => PauseOptions::all(),
        };
        Ok(end("pause", saver.pause(&options)))
    })
}

fn resume_wait() -> Duration {
    static WAIT: OnceLock<Duration> = OnceLock::new();
    *WAIT.get_or_init(|| {
        let Ok(text) = std::env::var("TMS_RESUME_WAIT_MS") else {
            return DEFAULT_WAIT;
        };
        text.trim()
            .parse()
            .map(Duration::from_millis)
            .unwrap_or_else(|_| {
                tracing::error!(
                    "TMS_RESUME_WAIT_MS: \"{text}\" is not a number of milliseconds; using {}",
                    DEFAULT_WAIT.as_millis()
                );
                DEFAULT_WAIT
            })
    })
}

/// Resumes the allocations of the default saver with a tag. See tms_saver_resume.
///
/// `tag`: NULL or "" selects all. Waits for device memory as long as TMS_RESUME_WAIT_MS says,
/// 60,000 ms if unset; after that everything stays paused and the call can be repeated.
///
/// Returns TMS_OK or the error of tms_saver_resume; a failure is logged, and aborts the process if
/// TMS_ON_ERROR=abort.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tms_resume(tag: *const c_char) -> c_int {
    forward!(tms_resume(tag));
    fence(|| {
        // SAFETY: by the function's contract.
        let tag = unsafe { selection(tag) }?;
        crate::process::check()?;
        let Some(saver) = Saver::existing_default() else {
            return Ok(TMS_OK);
        };
        let options = match tag {
            Some(tag) => ResumeOptions::tags([tag]),
            None => ResumeOptions::all(),
        };
        Ok(end(
            "resume",
            saver.resume(&options.with_wait(resume_wait())),
        ))
    })
}

/// The default saver if there is one and this is not a forked child of its process.
fn saver_here() -> Option<Saver> {
    (!crate::process::forked())
        .then(Saver::existing_default)
        .flatten()
}

/// Host memory with the backup of `size` bytes at the device address `gpu`, NULL if there is none.
/// See tms_saver_backup_pointer.
#[unsafe(no_mangle)]
pub extern "C" fn tms_get_cpu_backup_pointer(gpu: *const u8, size: u64) -> *mut u8 {
    forward!(tms_get_cpu_backup_pointer(gpu, size) else |_: &_| std::ptr::null_mut());
    fenced(|| {
        Ok(saver_here()
            .and_then(|saver| saver.backup_pointer(gpu as u64, size))
            .map_or(std::ptr::null_mut(), |pointer| pointer.as_ptr()))
    })
    .unwrap_or(std::ptr::null_mut())
}

/// The default saver, unless host memory would silently stand in for a GPU: that is only done where
/// it was asked for, or where neither a CUDA driver nor a CUDA runtime can be loaded.
fn serving_saver() -> Result<Saver> {
    let saver = default_saver()?;
    if saver.platform().kind() == DeviceKind::Host
        && !super::compat::host_device_wanted()
        && cuda_can_be_loaded()
    {
        return Err(Error::new(
            ErrorKind::NoDevice,
            "a CUDA library is installed but no GPU can be used; TMS_DEVICE=host asks for host memory",
        ));
    }
    Ok(saver)
}

fn cuda_can_be_loaded() -> bool {
    static LOADED: OnceLock<bool> = OnceLock::new();
    *LOADED.get_or_init(|| {
        [
            c"libcuda.so.1",
            c"libcuda.so",
            c"libcudart.so.13",
            c"libcudart.so.12",
            c"libcudart.so.11.0",
        ]
        .iter()
        .any(|name| {
            // SAFETY: the name is terminated; the handle is kept, so nothing is unloaded.
            let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_LAZY | libc::RTLD_LOCAL) };
            !handle.is_null()
        })
    })
}

/// For hooks: allocates from the default saver as the calling thread's region, or its defaults, say.
///
/// `pointer` receives the address; not NULL. `bytes`: more than 0. `device`: an ordinal, or −1.
///
/// Returns what tms_saver_malloc returns.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tms_hook_malloc(
    pointer: *mut *mut c_void,
    bytes: usize,
    device: c_int,
) -> c_int {
    forward!(tms_hook_malloc(pointer, bytes, device));
    fence(|| {
        let pointer = out(pointer, "pointer")?;
        let chosen = region::current_or_default()?;
        let address = serving_saver()?.malloc(bytes as u64, ordinal(device)?, &chosen)?;
        // SAFETY: valid for writes by the function's contract.
        unsafe { pointer.write(address as *mut c_void) };
        Ok(TMS_OK)
    })
}

/// For hooks: frees an allocation of the default saver. While `stream` (a CUstream, NULL for the
/// legacy stream) is being captured, the release is put off.
///
/// Returns TMS_OK; TMS_ERR_NOT_FOUND if the pointer is not ours: it belongs to the real runtime;
/// TMS_ERR_FORKED; TMS_ERR_SHUTDOWN.
#[unsafe(no_mangle)]
pub extern "C" fn tms_hook_free(pointer: *mut c_void, stream: *mut c_void) -> c_int {
    forward!(tms_hook_free(pointer, stream));
    // In a forked child nothing is ours, and our locks may be held by threads that are not there.
    if crate::process::forked() {
        return TMS_ERR_NOT_FOUND;
    }
    // Foreign pointers are the common case: no message is made for them.
    let saver = Saver::existing_default();
    let Some(saver) = saver.filter(|saver| saver.owns(pointer as u64)) else {
        return TMS_ERR_NOT_FOUND;
    };
    fence(|| {
        saver.free_on_stream(pointer as u64, Some(stream as u64))?;
        Ok(TMS_OK)
    })
}

/// For hooks: whether a pointer lies in pinned memory of the default saver.
#[unsafe(no_mangle)]
pub extern "C" fn tms_hook_is_pinned(pointer: *const c_void) -> bool {
    forward!(tms_hook_is_pinned(pointer) else |_: &_| false);
    fenced(|| Ok(saver_here().is_some_and(|saver| saver.is_pinned(pointer as usize))))
        .unwrap_or(false)
}

/// For hooks: how many bytes of every device allocations of the default saver leave free.
///
/// Returns TMS_OK, or why no device can be used.
#[unsafe(no_mangle)]
pub extern "C" fn tms_hook_set_memory_margin(bytes: u64) -> c_int {
    forward!(tms_hook_set_memory_margin(bytes));
    fence(|| {
        default_saver()?.set_memory_margin(None, bytes)?;
        Ok(TMS_OK)
    })
}

/// The malloc of PyTorch's CUDAPluggableAllocator. Inside or outside a region, the allocation
/// follows the calling thread's settings.
///
/// `size`: bytes, rounded up to 2 MiB on NVIDIA GPUs. `device`: ordinal. `stream`: not used.
///
/// Returns the device address, or NULL on any failure; then PyTorch empties its cache and tries
/// again, and tms_last_error_message tells why.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tms_torch_malloc(
    size: isize,
    device: c_int,
    stream: *mut c_void,
) -> *mut c_void {
    forward!(tms_torch_malloc(size, device, stream) else |_: &_| std::ptr::null_mut());
    let mut pointer = std::ptr::null_mut();
    let status = match usize::try_from(size) {
        Ok(bytes) if bytes > 0 => {
            // SAFETY: the out-parameter is a local variable.
            unsafe { tms_hook_malloc(&mut pointer, bytes, device) }
        }
        _ => fail(&Error::invalid(
            "size",
            format_args!("is {size}, must be positive"),
        )),
    };
    if status != TMS_OK && ErrorKind::from_code(status) != Some(ErrorKind::OutOfDeviceMemory) {
        // SAFETY: the message is valid until the next failed call of this thread.
        let message = unsafe { std::ffi::CStr::from_ptr(super::fence::last_error()) };
        tracing::error!("tms_torch_malloc: {}", message.to_string_lossy());
    }
    pointer
}

/// The free of PyTorch's CUDAPluggableAllocator. Any thread, in or outside a region, also while the
/// interpreter shuts down.
///
/// `pointer`: from tms_torch_malloc, or NULL. `size`, `device`: not used. `stream`: if it is being
/// captured, the release is put off.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tms_torch_free(
    pointer: *mut c_void,
    size: isize,
    device: c_int,
    stream: *mut c_void,
) {
    forward!(tms_torch_free(pointer, size, device, stream) else |_: &_| ());
    if pointer.is_null() {
        return;
    }
    let status = tms_hook_free(pointer, stream);
    if status == TMS_ERR_NOT_FOUND {
        tracing::error!("tms_torch_free: {pointer:?} is not an allocation of the library");
    }
}
