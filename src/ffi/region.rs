//! Regions: what the calling thread's allocations are to be.

use std::ffi::c_char;
use std::path::Path;

use super::argument::{Sized32, optional_str, optional_struct};
use super::fence::fence;
use super::forward::forward;
use super::status::TMS_OK;
use crate::allocator::Region;
use crate::allocator::region::{self, DEFAULT_TAG};
use crate::error::{Error, Result};

/// Memory of the region can be exported to other processes (tms_saver_export).
pub const TMS_REGION_EXPORTABLE: u32 = 1;
/// All peer devices get access to memory of the region. Pausing it waits for them too.
pub const TMS_REGION_PEER_ACCESS: u32 = 2;
/// Backups in host memory ("pinned", "mmap") are kept after a resume, at the same address in every
/// cycle. Nothing for "file".
pub const TMS_REGION_RETAIN: u32 = 4;
/// tms_region_push: no region, until the matching pop.
pub const TMS_REGION_DISABLED: u32 = 8;

/// What a region says about allocations made in it. Zero-fill it, then set struct_size.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct tms_region_options_t {
    /// sizeof this struct.
    pub struct_size: u32,
    /// TMS_REGION_EXPORTABLE, TMS_REGION_PEER_ACCESS, TMS_REGION_RETAIN, TMS_REGION_DISABLED.
    pub flags: u32,
    /// By this name allocations are paused and resumed: 1 to 255 bytes of UTF-8. NULL: "default".
    pub tag: *const c_char,
    /// What keeps the contents while paused: "pinned", "mmap", "file", or "none". NULL: "none".
    pub backup: *const c_char,
    /// Folder of "file" backups. NULL: what tms_set_disk_backup_dir or TMS_DISK_BACKUP_DIR says,
    /// else the system's temporary folder. Each backup takes its size on disk until the allocation is
    /// freed; files of killed processes are removed by the next process that uses the folder.
    pub directory: *const c_char,
}

// SAFETY: `repr(C)`, plain data, `struct_size` first.
unsafe impl Sized32 for tms_region_options_t {}

/// The region that options describe, and whether it is one.
///
/// # Safety
/// The strings in `options` are NULL or NUL-terminated.
pub(super) unsafe fn from_options(options: &tms_region_options_t) -> Result<(Region, bool)> {
    let known =
        TMS_REGION_EXPORTABLE | TMS_REGION_PEER_ACCESS | TMS_REGION_RETAIN | TMS_REGION_DISABLED;
    if options.flags & !known != 0 {
        return Err(Error::invalid(
            "options.flags",
            format_args!("{:#x} has unknown bits", options.flags),
        ));
    }
    // SAFETY: the caller's promise.
    let (tag, backup, directory) = unsafe {
        (
            optional_str(options.tag, "options.tag")?,
            optional_str(options.backup, "options.backup")?,
            optional_str(options.directory, "options.directory")?,
        )
    };
    let mut made = Region::new(tag.unwrap_or(DEFAULT_TAG))
        .with_backup(backup.unwrap_or("none"))
        .with_exportable(options.flags & TMS_REGION_EXPORTABLE != 0)
        .with_peer_access(options.flags & TMS_REGION_PEER_ACCESS != 0);
    if options.flags & TMS_REGION_RETAIN != 0 {
        made = made.with_retain(true);
    }
    if let Some(folder) = directory {
        made = made.with_directory(Path::new(folder));
    }
    Ok((made, options.flags & TMS_REGION_DISABLED == 0))
}

/// Enters a region on the calling thread: until the matching tms_region_pop, its allocations (by
/// tms_saver_malloc without options, tms_torch_malloc and the cudaMalloc hook) follow `options`.
/// Regions nest.
///
/// `options`: not NULL; nothing in it is kept.
///
/// Returns TMS_OK, TMS_ERR_NULL_POINTER, or TMS_ERR_INVALID_ARGUMENT naming the field.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tms_region_push(options: *const tms_region_options_t) -> i32 {
    forward!(tms_region_push(options));
    fence(|| {
        // SAFETY: valid by the function's contract.
        let options = unsafe {
            super::argument::required(options, "options")?;
            optional_struct(options, "options")?
        };
        if let Some(options) = options {
            // SAFETY: as above.
            let (made, enabled) = unsafe { from_options(&options) }?;
            region::push(&made, enabled)?;
        }
        Ok(TMS_OK)
    })
}

/// Leaves the region that the calling thread entered last, and restores exactly what was before.
///
/// Returns TMS_OK, or TMS_ERR_INVALID_ARGUMENT if there is none.
#[unsafe(no_mangle)]
pub extern "C" fn tms_region_pop() -> i32 {
    forward!(tms_region_pop());
    fence(|| region::pop().map(|()| TMS_OK))
}
