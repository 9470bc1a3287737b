//! `tms_saver_t`: allocations that can be paused and resumed.

use std::ffi::{c_char, c_void};

use super::argument::{
    Sized32, fill_struct, fill_text, optional_str, optional_struct, out, required, stated_size,
};
use super::device::ordinal;
use super::fence::fence;
use super::forward::forward;
use super::op::tms_op_t;
use super::options::{
    no_flags, pause_options, resume_options, tms_pause_options_t, tms_resume_options_t,
    tms_saver_options_t,
};
use super::region::{from_options, tms_region_options_t};
use super::result::{ResultOut, status_of, tms_result_t};
use super::status::TMS_OK;
use crate::allocator::{Saver, State, region};
use crate::device;
use crate::error::{Error, ErrorKind, Result};
use crate::process;

/// Owns allocations. Made by tms_saver_create, or the default one of the process.
#[allow(non_camel_case_types)]
pub struct tms_saver_t {
    /// `None`: the default saver, whichever it is at the time of the call.
    own: Option<Saver>,
}

impl tms_saver_t {
    pub(super) fn saver(&self) -> Result<Saver> {
        // In a child the locks may be held by threads that do not exist there.
        if process::forked() {
            process::check()?;
        }
        match &self.own {
            Some(saver) => Ok(saver.clone()),
            None => default_saver(),
        }
    }
}

/// The handle of the default saver.
static DEFAULT: tms_saver_t = tms_saver_t { own: None };

/// Bytes and counts of one tag on one device.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct tms_stats_t {
    /// sizeof this struct; of the first entry, it holds for all.
    pub struct_size: u32,
    /// Ordinal of the device.
    pub device: i32,
    /// Allocations with physical memory.
    pub active_count: u64,
    /// Their bytes.
    pub active_bytes: u64,
    /// Allocations without physical memory.
    pub paused_count: u64,
    /// Their bytes.
    pub paused_bytes: u64,
    /// Bytes of complete backups.
    pub backed_bytes: u64,
    /// The tag, NUL-terminated.
    pub tag: [c_char; 256],
    /// Bytes of device memory that freed allocations left within a handle that others still use: for
    /// later allocations of the same region options, or given back by the next pause, or with the
    /// last allocation of the handle. A handle has at most 1 GiB; allocations made since the last
    /// resume, larger ones and exportable ones hold nothing back.
    pub held_bytes: u64,
}

/// The allocation has physical memory and can be used.
pub const TMS_STATE_ACTIVE: i32 = 0;
/// A pause works on it.
pub const TMS_STATE_PAUSING: i32 = 1;
/// It has addresses but no memory.
pub const TMS_STATE_PAUSED: i32 = 2;
/// A resume works on it.
pub const TMS_STATE_RESUMING: i32 = 3;

/// Flag of tms_allocation_info_t: there is a complete backup.
pub const TMS_ALLOCATION_BACKED: u32 = 1;
/// Flag of tms_allocation_info_t: a descriptor was handed out.
pub const TMS_ALLOCATION_EXPORTED: u32 = 2;

/// One allocation. Set struct_size before the call.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct tms_allocation_info_t {
    /// sizeof this struct.
    pub struct_size: u32,
    /// Ordinal of its device.
    pub device: i32,
    /// A TMS_STATE constant.
    pub state: i32,
    /// TMS_ALLOCATION_BACKED, TMS_ALLOCATION_EXPORTED.
    pub flags: u32,
    /// Its first byte.
    pub base: *mut c_void,
    /// Its size, a multiple of the device's granularity, bytes.
    pub bytes: u64,
    /// The size that was asked for, bytes.
    pub requested_bytes: u64,
    /// Its tag, NUL-terminated.
    pub tag: [c_char; 256],
}

// SAFETY: `repr(C)`, plain data, `struct_size` first.
unsafe impl Sized32 for tms_stats_t {}
// SAFETY: `repr(C)`, plain data, `struct_size` first.
unsafe impl Sized32 for tms_allocation_info_t {}

/// The saver of the process, opened on the first call.
pub(super) fn default_saver() -> Result<Saver> {
    Saver::process_default()
}

/// Makes a saver with allocations of its own.
///
/// `options` may be NULL. `saver` receives the handle, to be freed with tms_saver_free; not NULL.
/// Any thread.
///
/// Returns TMS_OK, TMS_ERR_NULL_POINTER, TMS_ERR_INVALID_ARGUMENT, or why no device can be used
/// (TMS_ERR_NO_DEVICE, TMS_ERR_DEVICE).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tms_saver_create(
    options: *const tms_saver_options_t,
    saver: *mut *mut tms_saver_t,
) -> i32 {
    forward!(tms_saver_create(options, saver));
    fence(|| {
        process::check()?;
        let saver = out(saver, "saver")?;
        // SAFETY: valid by the function's contract.
        let options = unsafe { optional_struct(options, "options") }?;
        let wanted = match options {
            None => None,
            Some(options) => {
                no_flags(options.flags)?;
                // SAFETY: as above.
                unsafe { optional_str(options.device, "options.device") }?
            }
        };
        let platform = match wanted {
            Some(name) => device::open(name).map_err(|error| error.context("options"))?,
            None => device::open_from_environment()?,
        };
        let made = Box::new(tms_saver_t {
            own: Some(Saver::new(platform)?),
        });
        // SAFETY: valid for writes by the function's contract.
        unsafe { saver.write(Box::into_raw(made)) };
        Ok(TMS_OK)
    })
}

/// The saver of the process, the one behind the compatible names and the hooks.
///
/// `saver` receives a handle that belongs to the library and is never freed; not NULL. Any thread.
///
/// Returns TMS_OK, TMS_ERR_NULL_POINTER, or why no device can be used.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tms_saver_default(saver: *mut *const tms_saver_t) -> i32 {
    forward!(tms_saver_default(saver));
    fence(|| {
        let saver = out(saver, "saver")?;
        default_saver()?;
        // SAFETY: valid for writes by the function's contract.
        unsafe { saver.write(&DEFAULT) };
        Ok(TMS_OK)
    })
}

/// Frees a saver and every allocation of it. No other call may use the handle any more.
///
/// `saver` may be NULL. The default saver cannot be freed.
///
/// Returns TMS_OK; TMS_ERR_BUSY while an operation of the saver runs (nothing was freed);
/// TMS_ERR_INVALID_ARGUMENT for the default saver; TMS_ERR_FORKED.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tms_saver_free(saver: *mut tms_saver_t) -> i32 {
    forward!(tms_saver_free(saver));
    fence(|| {
        // SAFETY: NULL or a handle of tms_saver_create, by the function's contract.
        let Some(handle) = (unsafe { saver.as_ref() }) else {
            return Ok(TMS_OK);
        };
        let Some(own) = &handle.own else {
            return Err(Error::invalid("saver", "the default saver cannot be freed"));
        };
        own.close()?;
        // SAFETY: made by Box::into_raw, and not used afterwards.
        drop(unsafe { Box::from_raw(saver) });
        Ok(TMS_OK)
    })
}

/// Allocates device memory that can be paused.
///
/// `saver`: not NULL. `bytes`: more than 0; rounded up to the device's granularity (2 MiB on
/// NVIDIA GPUs). `device`: an ordinal, or −1 for the thread's current device. `options`: how to
/// treat the allocation (not TMS_REGION_DISABLED); NULL: as the thread's region says, or its defaults
/// outside of one.
/// `pointer` receives the device address; not NULL; freed with tms_saver_free_memory. New memory
/// is zeroed. Any thread.
///
/// Returns TMS_OK; TMS_ERR_OUT_OF_DEVICE_MEMORY if the memory is not there, or if less would stay free
/// than tms_saver_set_memory_margin asked for; TMS_ERR_OUT_OF_HOST_MEMORY if there are no addresses
/// left; TMS_ERR_NULL_POINTER; TMS_ERR_INVALID_ARGUMENT; TMS_ERR_UNSUPPORTED (export on a device that
/// cannot); TMS_ERR_DEVICE.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tms_saver_malloc(
    saver: *const tms_saver_t,
    bytes: usize,
    device: i32,
    options: *const tms_region_options_t,
    pointer: *mut *mut c_void,
) -> i32 {
    forward!(tms_saver_malloc(saver, bytes, device, options, pointer));
    fence(|| {
        // SAFETY: valid by the function's contract.
        let (handle, options) = unsafe {
            (
                required(saver, "saver")?,
                optional_struct(options, "options")?,
            )
        };
        let pointer = out(pointer, "pointer")?;
        let chosen = match &options {
            // SAFETY: as above.
            Some(options) => match unsafe { from_options(options) }? {
                (chosen, true) => chosen,
                (_, false) => {
                    return Err(Error::invalid(
                        "options.flags",
                        "TMS_REGION_DISABLED is for tms_region_push only",
                    ));
                }
            },
            None => region::current_or_default()?,
        };
        let address = handle
            .saver()?
            .malloc(bytes as u64, ordinal(device)?, &chosen)?;
        // SAFETY: valid for writes by the function's contract.
        unsafe { pointer.write(address as *mut c_void) };
        Ok(TMS_OK)
    })
}

/// Frees an allocation of this saver.
///
/// `pointer` is the address that malloc gave, or NULL. Active memory is freed when all work queued
/// on its device is done; paused memory at once; memory that an operation works on when that
/// operation ends. Any thread.
///
/// Returns TMS_OK, TMS_ERR_NULL_POINTER (saver), TMS_ERR_NOT_FOUND (not an allocation of this
/// saver), TMS_ERR_FORKED, TMS_ERR_SHUTDOWN.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tms_saver_free_memory(
    saver: *const tms_saver_t,
    pointer: *mut c_void,
) -> i32 {
    forward!(tms_saver_free_memory(saver, pointer));
    fence(|| {
        // SAFETY: valid by the function's contract.
        let handle = unsafe { required(saver, "saver") }?;
        if !pointer.is_null() {
            handle.saver()?.free(pointer as u64)?;
        }
        Ok(TMS_OK)
    })
}

/// Pauses a selection: secures every backup, then releases the physical memory. Addresses stay.
///
/// All work queued on the affected devices is waited for first. If a backup fails, nothing was
/// released and all stays active. Pausing what is paused does nothing and is counted. Contents of
/// allocations without a backup do not survive. A tag that no allocation has selects nothing and is no
/// error (a warning in the log): look at done_count and unchanged_count. Pausing during a stream
/// capture is the caller's error, refused where it can be seen. Work of other contexts and processes
/// on the memory is the caller's duty.
///
/// `saver`: not NULL. `options`: NULL selects everything. `result`: may be NULL. Any thread; one
/// pause or resume of a saver runs at a time, malloc and free do not wait for it.
///
/// Returns TMS_OK; TMS_ERR_PARTIAL (some could not be released and stay active, see result); or an
/// error after which everything is as before: TMS_ERR_OUT_OF_HOST_MEMORY, TMS_ERR_IO,
/// TMS_ERR_NO_SPACE, TMS_ERR_NOT_FOUND (a folder), TMS_ERR_EXPORTED, TMS_ERR_CAPTURE,
/// TMS_ERR_DEVICE, TMS_ERR_DEVICE_LOST, TMS_ERR_INVALID_ARGUMENT, TMS_ERR_NULL_POINTER,
/// TMS_ERR_FORKED, TMS_ERR_SHUTDOWN.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tms_saver_pause(
    saver: *const tms_saver_t,
    options: *const tms_pause_options_t,
    result: *mut tms_result_t,
) -> i32 {
    forward!(tms_saver_pause(saver, options, result));
    fence(|| {
        // SAFETY: valid by the function's contract.
        let (handle, options, result) = unsafe {
            (
                required(saver, "saver")?,
                pause_options(options)?,
                ResultOut::new(result)?,
            )
        };
        let outcome = handle.saver()?.pause(&options);
        if let Some(result) = result {
            // SAFETY: as above.
            unsafe { result.write(&outcome) };
        }
        Ok(status_of(&outcome))
    })
}

/// Resumes a selection: creates and maps all memory, then loads the contents. When it returns they
/// are complete for every stream.
///
/// If device memory is short it waits up to options.wait_ms, then everything stays paused and the
/// call can be repeated. An allocation whose backup cannot be loaded stays paused, with its backup.
/// Resuming what is active does nothing and is counted.
///
/// Parameters and threads as for tms_saver_pause.
///
/// Returns TMS_OK; TMS_ERR_PARTIAL; TMS_ERR_OUT_OF_DEVICE_MEMORY (all stays paused); the error of
/// the first allocation if none could be resumed (TMS_ERR_CORRUPT, TMS_ERR_IO, TMS_ERR_DEVICE,
/// TMS_ERR_DEVICE_LOST); TMS_ERR_INVALID_ARGUMENT; TMS_ERR_NULL_POINTER; TMS_ERR_FORKED;
/// TMS_ERR_SHUTDOWN.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tms_saver_resume(
    saver: *const tms_saver_t,
    options: *const tms_resume_options_t,
    result: *mut tms_result_t,
) -> i32 {
    forward!(tms_saver_resume(saver, options, result));
    fence(|| {
        // SAFETY: valid by the function's contract.
        let (handle, options, result) = unsafe {
            (
                required(saver, "saver")?,
                resume_options(options)?,
                ResultOut::new(result)?,
            )
        };
        let outcome = handle.saver()?.resume(&options);
        if let Some(result) = result {
            // SAFETY: as above.
            unsafe { result.write(&outcome) };
        }
        Ok(status_of(&outcome))
    })
}

/// tms_saver_pause on a thread of the library.
///
/// `op` receives the operation, to be freed with tms_op_free; not NULL. Nothing in `options` is
/// kept. Operations of a saver run in the order they were started.
///
/// Returns TMS_OK, TMS_ERR_NULL_POINTER, TMS_ERR_INVALID_ARGUMENT, TMS_ERR_FORKED,
/// TMS_ERR_SHUTDOWN, TMS_ERR_IO (no thread or descriptor).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tms_saver_pause_async(
    saver: *const tms_saver_t,
    options: *const tms_pause_options_t,
    op: *mut *mut tms_op_t,
) -> i32 {
    forward!(tms_saver_pause_async(saver, options, op));
    fence(|| {
        // SAFETY: valid by the function's contract.
        let (handle, options) = unsafe { (required(saver, "saver")?, pause_options(options)?) };
        let op = out(op, "op")?;
        let started = tms_op_t::boxed(handle.saver()?.pause_async(&options)?);
        // SAFETY: valid for writes by the function's contract.
        unsafe { op.write(started) };
        Ok(TMS_OK)
    })
}

/// tms_saver_resume on a thread of the library. While it waits for memory, other operations run.
///
/// Parameters and errors as for tms_saver_pause_async.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tms_saver_resume_async(
    saver: *const tms_saver_t,
    options: *const tms_resume_options_t,
    op: *mut *mut tms_op_t,
) -> i32 {
    forward!(tms_saver_resume_async(saver, options, op));
    fence(|| {
        // SAFETY: valid by the function's contract.
        let (handle, options) = unsafe { (required(saver, "saver")?, resume_options(options)?) };
        let op = out(op, "op")?;
        let started = tms_op_t::boxed(handle.saver()?.resume_async(&options)?);
        // SAFETY: valid for writes by the function's contract.
        unsafe { op.write(started) };
        Ok(TMS_OK)
    })
}

/// Bytes and counts, one entry for each tag and device that has allocations, sorted.
///
/// `entries`: array of `capacity` entries, the first with struct_size set; NULL if capacity is 0.
/// `count` receives how many entries there are, also when fewer fit; not NULL. Any thread.
///
/// Returns TMS_OK, TMS_ERR_NULL_POINTER, TMS_ERR_INVALID_ARGUMENT.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tms_saver_stats(
    saver: *const tms_saver_t,
    entries: *mut tms_stats_t,
    capacity: usize,
    count: *mut usize,
) -> i32 {
    forward!(tms_saver_stats(saver, entries, capacity, count));
    fence(|| {
        // SAFETY: valid by the function's contract.
        let handle = unsafe { required(saver, "saver") }?;
        let count = out(count, "count")?;
        let stats = handle.saver()?.stats();
        if capacity > 0 {
            // SAFETY: as above.
            let stated = unsafe { stated_size(entries, "entries") }?;
            for (index, found) in stats.iter().take(capacity).enumerate() {
                let mut value = tms_stats_t {
                    struct_size: 0,
                    device: found.device as i32,
                    active_count: found.active_count,
                    active_bytes: found.active_bytes,
                    paused_count: found.paused_count,
                    paused_bytes: found.paused_bytes,
                    backed_bytes: found.backed_bytes,
                    tag: [0; 256],
                    held_bytes: found.held_bytes,
                };
                fill_text(&mut value.tag, &found.tag);
                // SAFETY: the array has `capacity` entries of the stated size.
                unsafe {
                    let entry = entries.byte_add(index * stated);
                    entry.cast::<u32>().write(stated as u32);
                    fill_struct(entry, stated, &value);
                }
            }
        }
        // SAFETY: valid for writes by the function's contract.
        unsafe { count.write(stats.len()) };
        Ok(TMS_OK)
    })
}

/// Describes the allocation that contains an address.
///
/// `pointer`: any address inside an allocation of this saver. `info` is filled; not NULL, its
/// struct_size must be set. Any thread.
///
/// Returns TMS_OK, TMS_ERR_NOT_FOUND, TMS_ERR_NULL_POINTER, TMS_ERR_INVALID_ARGUMENT.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tms_saver_query(
    saver: *const tms_saver_t,
    pointer: *const c_void,
    info: *mut tms_allocation_info_t,
) -> i32 {
    forward!(tms_saver_query(saver, pointer, info));
    fence(|| {
        // SAFETY: valid by the function's contract.
        let (handle, stated) = unsafe { (required(saver, "saver")?, stated_size(info, "info")?) };
        let found = handle.saver()?.query(pointer as u64).ok_or_else(|| {
            Error::new(
                ErrorKind::NotFound,
                format!("{pointer:?} is in no allocation of this saver"),
            )
        })?;
        let mut value = tms_allocation_info_t {
            struct_size: 0,
            device: found.device as i32,
            state: match found.state {
                State::Active => TMS_STATE_ACTIVE,
                State::Pausing => TMS_STATE_PAUSING,
                State::Paused => TMS_STATE_PAUSED,
                State::Resuming => TMS_STATE_RESUMING,
            },
            flags: (u32::from(found.backed) * TMS_ALLOCATION_BACKED)
                | (u32::from(found.exported) * TMS_ALLOCATION_EXPORTED),
            base: found.base as *mut c_void,
            bytes: found.bytes,
            requested_bytes: found.requested,
            tag: [0; 256],
        };
        fill_text(&mut value.tag, &found.tag);
        // SAFETY: valid for writes of the stated size by the function's contract.
        unsafe { fill_struct(info, stated, &value) };
        Ok(TMS_OK)
    })
}

/// Host memory with the backup of a range: of a paused allocation, and of an active one whose
/// region retains backups. What is written there is what a resume restores; an edit while the
/// allocation is active is overwritten by the next pause.
///
/// `pointer`, `bytes`: a range inside one allocation. `backup` receives the address; not NULL. The
/// memory belongs to the library and is valid until the allocation is resumed without retention or
/// freed. Any thread.
///
/// Returns TMS_OK; TMS_ERR_NOT_FOUND if there is no such backup in host memory;
/// TMS_ERR_NULL_POINTER.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tms_saver_backup_pointer(
    saver: *const tms_saver_t,
    pointer: *const c_void,
    bytes: usize,
    backup: *mut *mut c_void,
) -> i32 {
    forward!(tms_saver_backup_pointer(saver, pointer, bytes, backup));
    fence(|| {
        // SAFETY: valid by the function's contract.
        let handle = unsafe { required(saver, "saver") }?;
        let backup = out(backup, "backup")?;
        let found = handle
            .saver()?
            .backup_pointer(pointer as u64, bytes as u64)
            .ok_or_else(|| {
                Error::new(
                    ErrorKind::NotFound,
                    format!("no backup in host memory of {bytes} bytes at {pointer:?}"),
                )
            })?;
        // SAFETY: valid for writes by the function's contract.
        unsafe { backup.write(found.as_ptr().cast()) };
        Ok(TMS_OK)
    })
}

/// Sets how much memory of a device malloc leaves free.
///
/// `device`: an ordinal, or −1 for all devices. `bytes`: 0 removes the margin. Any thread.
///
/// Returns TMS_OK, TMS_ERR_NULL_POINTER, TMS_ERR_INVALID_ARGUMENT.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tms_saver_set_memory_margin(
    saver: *const tms_saver_t,
    device: i32,
    bytes: u64,
) -> i32 {
    forward!(tms_saver_set_memory_margin(saver, device, bytes));
    fence(|| {
        // SAFETY: valid by the function's contract.
        let handle = unsafe { required(saver, "saver") }?;
        handle.saver()?.set_memory_margin(ordinal(device)?, bytes)?;
        Ok(TMS_OK)
    })
}

/// A file descriptor of the physical memory of an active allocation of an exportable region, which
/// another process can import. From then on the allocation cannot be paused: the other side would
/// keep the old memory.
///
/// `fd` receives the descriptor, which the caller closes; not NULL. `bytes` receives the size of
/// the memory; may be NULL. Any thread.
///
/// Returns TMS_OK, TMS_ERR_NULL_POINTER, TMS_ERR_NOT_FOUND, TMS_ERR_UNSUPPORTED (not exportable),
/// TMS_ERR_BUSY (not active), TMS_ERR_DEVICE.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tms_saver_export(
    saver: *const tms_saver_t,
    pointer: *const c_void,
    fd: *mut i32,
    bytes: *mut u64,
) -> i32 {
    forward!(tms_saver_export(saver, pointer, fd, bytes));
    fence(|| {
        use std::os::fd::IntoRawFd;
        // SAFETY: valid by the function's contract.
        let handle = unsafe { required(saver, "saver") }?;
        let fd = out(fd, "fd")?;
        let (descriptor, size) = handle.saver()?.export(pointer as u64)?;
        // SAFETY: valid for writes by the function's contract, `bytes` if not NULL.
        unsafe {
            if let Ok(bytes) = out(bytes, "bytes") {
                bytes.write(size);
            }
            fd.write(descriptor.into_raw_fd());
        }
        Ok(TMS_OK)
    })
}
