//! `tms_transfer_engine_t`: what explicit copies are done with; what memory a pointer is; the table
//! of copy methods.

use std::ffi::{c_char, c_void};

use super::argument::{
    Sized32, fill_struct, optional_str, optional_struct, out, required, stated_size,
};
use super::fence::fence;
use super::forward::forward;
use super::options::no_flags;
use super::saver::default_saver;
use super::status::TMS_OK;
use crate::allocator::Saver;
use crate::device::{self, Place, Platform};
use crate::error::{Error, ErrorKind, Result};
use crate::process;
use crate::transfer::copy::Copier;
use crate::transfer::{Engine, EngineOptions};
use std::sync::Arc;

/// Copies bytes. Made by tms_transfer_engine_create; NULL stands for the engine of the process, which
/// the default saver uses too.
#[allow(non_camel_case_types)]
pub struct tms_transfer_engine_t {
    copier: Copier,
}

/// The copier behind a handle, that of the default saver for NULL.
///
/// # Safety
/// `engine` is NULL or a handle of [`tms_transfer_engine_create`].
pub(super) unsafe fn copier(engine: *const tms_transfer_engine_t) -> Result<Copier> {
    // In a child the locks may be held by threads that do not exist there.
    process::check()?;
    // SAFETY: the caller's promise.
    match unsafe { engine.as_ref() } {
        Some(engine) => Ok(engine.copier.clone()),
        None => Ok(Copier::new(Arc::clone(default_saver()?.engine()))),
    }
}

/// How an engine is made. Zero-fill it, then set struct_size.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct tms_transfer_options_t {
    /// sizeof this struct.
    pub struct_size: u32,
    /// Must be 0.
    pub flags: u32,
    /// "auto", "cuda" or "host"; NULL: the devices of the default saver.
    pub device: *const c_char,
    /// Threads that copy to and from pageable memory, at most. 0: as many as are of use; more than
    /// there are cores, or than 16, are never started.
    pub threads: u32,
    /// Number of devices.
    pub device_count: u32,
    /// Ordinals of the devices that copies may use; with device_count 0 all, and this may be NULL.
    pub devices: *const i32,
    /// Pinned memory that bytes pass through on their way to and from pageable memory, bytes, up to
    /// 1 TiB; rounded up to whole slots of 4 MiB, at least two. 0: two slots for each thread. It is
    /// taken when first needed.
    pub staging_bytes: u64,
}

// SAFETY: `repr(C)`, plain data, `struct_size` first.
unsafe impl Sized32 for tms_transfer_options_t {}

const MOST_STAGING: u64 = 1 << 40;

/// Ordinary host memory, or an address that nothing is known of.
pub const TMS_MEMORY_PAGEABLE: i32 = 0;
/// Host memory that the driver allocated or that is registered with it.
pub const TMS_MEMORY_PINNED: i32 = 1;
/// Memory that the driver moves between host and device.
pub const TMS_MEMORY_MANAGED: i32 = 2;
/// Memory of a device.
pub const TMS_MEMORY_DEVICE: i32 = 3;

/// What memory a pointer is. Set struct_size before the call.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct tms_pointer_info_t {
    /// sizeof this struct.
    pub struct_size: u32,
    /// A TMS_MEMORY constant.
    pub kind: i32,
    /// Ordinal of the device, −1 unless kind is TMS_MEMORY_DEVICE.
    pub device: i32,
    /// 0.
    pub reserved: u32,
    /// First byte of the memory around the pointer; for pageable memory the pointer itself.
    pub start: *mut c_void,
    /// Bytes from start; 0 if not known, which is so for pageable memory.
    pub bytes: u64,
}

// SAFETY: `repr(C)`, plain data, `struct_size` first.
unsafe impl Sized32 for tms_pointer_info_t {}

/// The platform an engine works on: that of the default saver wherever it is of the wanted kind, so
/// that the engine knows its memory.
fn platform(wanted: Option<&str>) -> Result<Arc<dyn Platform>> {
    let shared = || Ok(Arc::clone(default_saver()?.platform()));
    let Some(wanted) = wanted else {
        return shared();
    };
    if let Some(saver) = Saver::existing_default() {
        let kind = saver.platform().kind().to_string();
        if wanted.eq_ignore_ascii_case(&kind) || wanted.eq_ignore_ascii_case("auto") {
            return shared();
        }
    }
    device::open(wanted).map_err(|error| error.context("options"))
}

/// # Safety
/// `devices` points to `count` numbers.
unsafe fn devices(
    platform: &dyn Platform,
    devices: *const i32,
    count: u32,
) -> Result<Option<Vec<u32>>> {
    if count == 0 {
        return Ok(None);
    }
    // SAFETY: the caller's promise.
    unsafe { required(devices, "options.devices") }?;
    (0..count as usize)
        .map(|index| {
            // SAFETY: as above.
            let device = unsafe { *devices.add(index) };
            u32::try_from(device)
                .ok()
                .filter(|&device| platform.check_ordinal(device).is_ok())
                .ok_or_else(|| {
                    let name = format!("options.devices[{index}]");
                    Error::invalid(&name, format_args!("there is no device {device}"))
                })
        })
        .collect::<Result<Vec<u32>>>()
        .map(Some)
}

/// Makes an engine with threads, staging memory and a transfer table of its own.
///
/// `options` may be NULL. `engine` receives the handle, to be freed with tms_transfer_engine_free;
/// not NULL. Nothing is allocated on a device, and no thread started, before the first copy. Any
/// thread.
///
/// Returns TMS_OK, TMS_ERR_NULL_POINTER, TMS_ERR_INVALID_ARGUMENT naming the field, or why no device
/// can be used (TMS_ERR_NO_DEVICE, TMS_ERR_DEVICE).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tms_transfer_engine_create(
    options: *const tms_transfer_options_t,
    engine: *mut *mut tms_transfer_engine_t,
) -> i32 {
    forward!(tms_transfer_engine_create(options, engine));
    fence(|| {
        process::check()?;
        let engine = out(engine, "engine")?;
        // SAFETY: valid by the function's contract.
        let options = unsafe { optional_struct(options, "options") }?;
        let mut made = EngineOptions::default();
        let mut wanted = None;
        if let Some(options) = &options {
            no_flags(options.flags)?;
            // SAFETY: as above.
            wanted = unsafe { optional_str(options.device, "options.device") }?;
            if options.staging_bytes > MOST_STAGING {
                return Err(Error::invalid(
                    "options.staging_bytes",
                    format_args!("{} is more than {MOST_STAGING}", options.staging_bytes),
                ));
            }
            made.threads = options.threads;
            made.staging_bytes = options.staging_bytes;
        }
        let platform = platform(wanted)?;
        let limited = match &options {
            // SAFETY: as above.
            Some(options) => unsafe { devices(&*platform, options.devices, options.device_count) }?,
            None => None,
        };
        let mut copier = Copier::new(Arc::new(Engine::with_options(platform, made)?));
        if let Some(limited) = limited {
            copier = copier.with_devices(&limited);
        }
        let handle = Box::new(tms_transfer_engine_t { copier });
        // SAFETY: valid for writes by the function's contract.
        unsafe { engine.write(Box::into_raw(handle)) };
        Ok(TMS_OK)
    })
}

/// Frees an engine: waits for copies on streams that use its memory, then gives that memory back. No
/// other call may use the handle any more.
///
/// `engine` may be NULL.
///
/// Returns TMS_OK; TMS_ERR_BUSY while an operation of the engine runs (nothing was freed);
/// TMS_ERR_FORKED; TMS_ERR_SHUTDOWN.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tms_transfer_engine_free(engine: *mut tms_transfer_engine_t) -> i32 {
    forward!(tms_transfer_engine_free(engine));
    fence(|| {
        // SAFETY: NULL or a handle of tms_transfer_engine_create, by the function's contract.
        let Some(handle) = (unsafe { engine.as_ref() }) else {
            return Ok(TMS_OK);
        };
        process::check()?;
        if handle.copier.engine().is_copying() {
            return Err(Error::new(
                ErrorKind::Busy,
                "a copy of the engine is running or queued",
            ));
        }
        // SAFETY: made by Box::into_raw, and not used afterwards.
        drop(unsafe { Box::from_raw(engine) });
        Ok(TMS_OK)
    })
}

/// What kind of memory a pointer is. One question to the driver; nothing is read at the address.
///
/// `engine`: NULL for the engine of the process. `pointer`: any address, NULL too. `info` is filled;
/// not NULL, its struct_size must be set. Any thread.
///
/// Returns TMS_OK; TMS_ERR_INVALID_ARGUMENT for addresses that are reserved for device memory and
/// have none, such as those of a paused allocation; TMS_ERR_NULL_POINTER; TMS_ERR_DEVICE; or why no
/// device can be used.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tms_pointer_query(
    engine: *const tms_transfer_engine_t,
    pointer: *const c_void,
    info: *mut tms_pointer_info_t,
) -> i32 {
    forward!(tms_pointer_query(engine, pointer, info));
    fence(|| {
        // SAFETY: valid by the function's contract.
        let (stated, copier) = unsafe { (stated_size(info, "info")?, copier(engine)?) };
        let range = copier
            .query(pointer as u64)
            .map_err(|error| match error.kind() {
                ErrorKind::InvalidArgument => Error::invalid(
                    "pointer",
                    format_args!("there is no memory at {pointer:p}: freed, or paused?"),
                ),
                _ => error.context("pointer"),
            })?;
        let (kind, device) = match range.place {
            Place::Pageable => (TMS_MEMORY_PAGEABLE, -1),
            Place::Pinned => (TMS_MEMORY_PINNED, -1),
            Place::Managed => (TMS_MEMORY_MANAGED, -1),
            Place::Device(ordinal) => (TMS_MEMORY_DEVICE, ordinal as i32),
        };
        let value = tms_pointer_info_t {
            struct_size: 0,
            kind,
            device,
            reserved: 0,
            start: range.start as *mut c_void,
            bytes: range.bytes,
        };
        // SAFETY: valid for writes of the stated size by the function's contract.
        unsafe { fill_struct(info, stated, &value) };
        Ok(TMS_OK)
    })
}

fn ordinal(device: i32) -> Result<u32> {
    u32::try_from(device).map_err(|_| {
        Error::invalid(
            "device",
            format_args!("is {device}, must be an ordinal from 0"),
        )
    })
}

/// By which method a device copies pieces of which size, and how fast each was when measured.
///
/// Scattered copies choose for each piece among a kernel that reads a list of pieces ("kernel"), one
/// call of the driver for many ("batch") and one call for each ("plain"). The choice is measured on
/// the device when the first batch needs it, which takes some milliseconds and 16 MiB of device
/// memory for that time, and kept while the engine lives; this function measures if that was not done
/// yet. A single piece is always copied plainly, and so is everything in a stream capture.
///
/// `engine`: NULL for the engine of the process. `device`: an ordinal. `text`: receives lines like
/// `h2d:4096=kernel plain:1.428 batch:3.911 kernel:48.640`, NUL-terminated: direction (h2d, d2h,
/// d2d), the largest piece of the class in bytes (or max), the method chosen, and what was measured in
/// 10⁹ bytes a second. NULL if capacity is 0. `capacity`: bytes of text; if the whole does not fit,
/// nothing is written to it. `needed` receives the bytes of the whole with its end; may be NULL. Any
/// thread.
///
/// Returns TMS_OK; TMS_ERR_INVALID_ARGUMENT (no such device, a capacity that is not 0 and too small,
/// or a wrong TMS_TRANSFER_TABLE); TMS_ERR_NULL_POINTER; why it could not be measured
/// (TMS_ERR_OUT_OF_DEVICE_MEMORY, TMS_ERR_OUT_OF_HOST_MEMORY, TMS_ERR_DEVICE).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tms_transfer_table_get(
    engine: *const tms_transfer_engine_t,
    device: i32,
    text: *mut c_char,
    capacity: usize,
    needed: *mut usize,
) -> i32 {
    forward!(tms_transfer_table_get(
        engine, device, text, capacity, needed
    ));
    fence(|| {
        if capacity > 0 {
            out(text, "text")?;
        }
        // SAFETY: valid by the function's contract.
        let table = unsafe { copier(engine) }?.table(ordinal(device)?)?;
        let whole = table.len() + 1;
        if let Ok(needed) = out(needed, "needed") {
            // SAFETY: not NULL, so valid for writes by the function's contract.
            unsafe { needed.write(whole) };
        }
        if capacity == 0 {
            return Ok(TMS_OK);
        }
        if capacity < whole {
            return Err(Error::invalid(
                "capacity",
                format_args!("{capacity} bytes are too few, the table needs {whole}"),
            ));
        }
        // SAFETY: `text` is valid for `capacity` bytes by the function's contract.
        unsafe {
            std::ptr::copy_nonoverlapping(table.as_ptr().cast(), text, table.len());
            text.add(table.len()).write(0);
        }
        Ok(TMS_OK)
    })
}

/// Chooses methods instead of what was or will be measured. The environment variable
/// TMS_TRANSFER_TABLE does the same for all devices of all engines, with the same text.
///
/// `engine`: NULL for the engine of the process. `device`: an ordinal. `text`: entries like
/// `h2d:4096=kernel`, separated by commas or line ends; what follows an entry after a space is
/// skipped, so that the text of tms_transfer_table_get can be given back. Sizes are 4096, 16384,
/// 65536, 262144, 1048576 and max. What is not named stays as it is. A method that the device does not
/// have is replaced by the next one that it has: kernel, batch, plain. Not NULL. Any thread.
///
/// Returns TMS_OK; TMS_ERR_INVALID_ARGUMENT quoting the entry (nothing was changed);
/// TMS_ERR_NULL_POINTER; or why no device can be used.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tms_transfer_table_set(
    engine: *const tms_transfer_engine_t,
    device: i32,
    text: *const c_char,
) -> i32 {
    forward!(tms_transfer_table_set(engine, device, text));
    fence(|| {
        // SAFETY: valid by the function's contract.
        let text = unsafe { optional_str(text, "text") }?
            .ok_or_else(|| Error::new(ErrorKind::NullPointer, "text must not be NULL"))?;
        // SAFETY: as above.
        unsafe { copier(engine) }?.set_table(ordinal(device)?, text)?;
        Ok(TMS_OK)
    })
}
