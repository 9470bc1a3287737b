//! What callers say to a saver, a pause or a resume, as C structs.

use std::ffi::c_char;
use std::time::Duration;

use super::argument::{Sized32, optional_str, optional_struct};
use crate::allocator::{PauseOptions, ResumeOptions, region};
use crate::error::{Error, ErrorKind, Result};

/// How a saver is made. Zero-fill it, then set struct_size.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct tms_saver_options_t {
    /// sizeof this struct.
    pub struct_size: u32,
    /// Must be 0.
    pub flags: u32,
    /// "auto", "cuda" or "host"; NULL: what TMS_DEVICE says.
    pub device: *const c_char,
}

/// What to pause and what to keep. Zero-fill it, then set struct_size.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct tms_pause_options_t {
    /// sizeof this struct.
    pub struct_size: u32,
    /// TMS_PAUSE_SKIP_EXPORTED, TMS_PAUSE_COPY_ALL.
    pub flags: u32,
    /// Tags to pause; with tag_count 0 all allocations are selected and this may be NULL.
    pub tags: *const *const c_char,
    /// Number of tags.
    pub tag_count: usize,
    /// NULL: as each region says. "none": drop the contents, also of regions with a backup. Else
    /// the name of the backup to use for all.
    pub backup: *const c_char,
}

/// Exported allocations stay active instead of making the call fail.
pub const TMS_PAUSE_SKIP_EXPORTED: u32 = 1;
/// Everything is copied. Without this flag, and unless TMS_UNCHANGED_CHECK=0, memory of a region that
/// retains its backup in pinned memory is compared with that backup first, by a 128-bit fingerprint of
/// each 2 MiB, and only what differs is copied. The key of the fingerprints is random and secret to
/// the process; a block that changed is taken for unchanged with a probability of at most 2^-63,
/// whatever its contents. A backup whose address tms_saver_backup_pointer gave out is always copied,
/// and so is everything on devices that cannot compute fingerprints.
pub const TMS_PAUSE_COPY_ALL: u32 = 2;

/// What to resume. Zero-fill it, then set struct_size.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct tms_resume_options_t {
    /// sizeof this struct.
    pub struct_size: u32,
    /// Must be 0.
    pub flags: u32,
    /// Tags to resume; with tag_count 0 all allocations are selected and this may be NULL.
    pub tags: *const *const c_char,
    /// Number of tags.
    pub tag_count: usize,
    /// How long to wait for device memory that somebody else is about to release, milliseconds.
    pub wait_ms: u32,
}

// SAFETY: `repr(C)`, plain data, `struct_size` first.
unsafe impl Sized32 for tms_saver_options_t {}
// SAFETY: `repr(C)`, plain data, `struct_size` first.
unsafe impl Sized32 for tms_pause_options_t {}
// SAFETY: `repr(C)`, plain data, `struct_size` first.
unsafe impl Sized32 for tms_resume_options_t {}

pub(super) fn no_flags(flags: u32) -> Result<()> {
    if flags != 0 {
        return Err(Error::invalid(
            "options.flags",
            format_args!("{flags:#x} has unknown bits"),
        ));
    }
    Ok(())
}

/// The tags of an options struct, `None` for all.
///
/// # Safety
/// `tags` points to `count` NUL-terminated strings.
unsafe fn tags(tags: *const *const c_char, count: usize) -> Result<Option<Vec<String>>> {
    if count == 0 {
        return Ok(None);
    }
    if tags.is_null() {
        return Err(Error::new(
            ErrorKind::NullPointer,
            "options.tags must not be NULL when tag_count is not 0",
        ));
    }
    (0..count)
        .map(|index| {
            let name = format!("options.tags[{index}]");
            // SAFETY: the caller's promise.
            let tag = unsafe { optional_str(*tags.add(index), &name) }?
                .ok_or_else(|| Error::new(ErrorKind::NullPointer, format!("{name} is NULL")))?;
            region::check_tag(tag).map_err(|error| error.context(&name))?;
            Ok(tag.to_string())
        })
        .collect::<Result<Vec<_>>>()
        .map(Some)
}

/// # Safety
/// `options` is NULL or valid, and so are the strings in it.
pub(super) unsafe fn pause_options(options: *const tms_pause_options_t) -> Result<PauseOptions> {
    // SAFETY: the caller's promise.
    let Some(options) = (unsafe { optional_struct(options, "options") })? else {
        return Ok(PauseOptions::all());
    };
    if options.flags & !(TMS_PAUSE_SKIP_EXPORTED | TMS_PAUSE_COPY_ALL) != 0 {
        no_flags(options.flags)?;
    }
    // SAFETY: the caller's promise.
    let (tags, backup) = unsafe {
        (
            tags(options.tags, options.tag_count)?,
            optional_str(options.backup, "options.backup")?,
        )
    };
    let mut made = match tags {
        Some(tags) => PauseOptions::tags(tags),
        None => PauseOptions::all(),
    };
    if let Some(name) = backup {
        made = made.with_backup(name);
    }
    Ok(made
        .with_skip_exported(options.flags & TMS_PAUSE_SKIP_EXPORTED != 0)
        .with_copy_all(options.flags & TMS_PAUSE_COPY_ALL != 0))
}

/// # Safety
/// `options` is NULL or valid, and so are the strings in it.
pub(super) unsafe fn resume_options(options: *const tms_resume_options_t) -> Result<ResumeOptions> {
    // SAFETY: the caller's promise.
    let Some(options) = (unsafe { optional_struct(options, "options") })? else {
        return Ok(ResumeOptions::all());
    };
    no_flags(options.flags)?;
    // SAFETY: the caller's promise.
    let made = match unsafe { tags(options.tags, options.tag_count) }? {
        Some(tags) => ResumeOptions::tags(tags),
        None => ResumeOptions::all(),
    };
    Ok(made.with_wait(Duration::from_millis(u64::from(options.wait_ms))))
}
