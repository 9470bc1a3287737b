//! What a region says about allocations made in it, and the calling thread's current region.

use std::cell::RefCell;
use std::ffi::{CStr, CString};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::backup;
use crate::config;
use crate::error::{Error, ErrorKind, Result};

/// Longest tag, bytes, without the terminating NUL.
pub const LONGEST_TAG: usize = 255;

pub const DEFAULT_TAG: &str = "default";

/// How allocations of a region are treated.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Region {
    pub(super) tag: Arc<str>,
    /// Name of a backup backend; `None` drops the contents at a pause.
    pub(super) backup: Option<Arc<str>>,
    /// Keep the backup after a resume. `None`: as the process says at that time.
    pub(super) retain: Option<bool>,
    pub(super) exportable: bool,
    pub(super) peer_access: bool,
    pub(super) directory: Option<Arc<Path>>,
}

impl Default for Region {
    fn default() -> Self {
        Region::new(DEFAULT_TAG)
    }
}

impl Region {
    pub fn new(tag: &str) -> Region {
        Region {
            tag: tag.into(),
            backup: None,
            retain: None,
            exportable: false,
            peer_access: false,
            directory: None,
        }
    }

    /// The backend that keeps the contents while paused; `"none"` for no backup.
    pub fn with_backup(mut self, name: &str) -> Region {
        self.backup = (name != "none").then(|| name.into());
        self
    }

    /// Keep the backup, at the same address, over all cycles.
    pub fn with_retain(mut self, retain: bool) -> Region {
        self.retain = Some(retain);
        self
    }

    /// Make the memory exportable to other processes.
    pub fn with_exportable(mut self, exportable: bool) -> Region {
        self.exportable = exportable;
        self
    }

    /// Give all peer devices access to the memory.
    pub fn with_peer_access(mut self, peer_access: bool) -> Region {
        self.peer_access = peer_access;
        self
    }

    /// The folder of file backups.
    pub fn with_directory(mut self, folder: &Path) -> Region {
        self.directory = Some(folder.into());
        self
    }

    pub fn tag(&self) -> &str {
        &self.tag
    }

    /// The name of the backend, `None` if contents are dropped.
    pub fn backup(&self) -> Option<&str> {
        self.backup.as_deref()
    }

    pub(super) fn check(&self) -> Result<()> {
        check_tag(&self.tag)?;
        if let Some(name) = &self.backup {
            backup::by_name(name)?;
        }
        Ok(())
    }
}

/// A tag is 1 to [`LONGEST_TAG`] bytes of UTF-8 without NUL.
pub fn check_tag(tag: &str) -> Result<()> {
    if tag.is_empty() || tag.len() > LONGEST_TAG || tag.contains('\0') {
        return Err(Error::invalid(
            "tag",
            format_args!("must have 1 to {LONGEST_TAG} bytes, has {}", tag.len()),
        ));
    }
    Ok(())
}

/// The thread's state behind the compatible setters and `tms_region_push`.
#[derive(Clone, Debug)]
struct Current {
    enabled: bool,
    cpu_backup: bool,
    disk_backup: bool,
    /// Kept as C strings too, because the getters hand out pointers to them.
    cpu_backend: CString,
    tag: CString,
    exportable: bool,
    peer_access: bool,
    retain: Option<bool>,
    directory: Option<Arc<Path>>,
}

struct Thread {
    current: Current,
    outer: Vec<Current>,
}

thread_local! {
    static THREAD: RefCell<Option<Box<Thread>>> = const { RefCell::new(None) };
}

/// Whether backups are kept after a resume where the region does not say.
static RETAIN: AtomicU64 = AtomicU64::new(UNSET);
const UNSET: u64 = 2;

/// Allocations made in regions so far, to notice regions that nothing reaches.
static HOOKED: AtomicU64 = AtomicU64::new(0);
static WARNED_UNUSED: AtomicBool = AtomicBool::new(false);
static WARNED_SETTINGS: AtomicBool = AtomicBool::new(false);

fn c_string(text: &str) -> CString {
    // Callers checked for NUL; an empty string is the harmless answer otherwise.
    CString::new(text).unwrap_or_default()
}

impl Current {
    fn from_environment() -> Current {
        let backend = std::env::var("TMS_INIT_CPU_BACKUP_BACKEND").unwrap_or_default();
        let backend = match backend.trim().to_ascii_lowercase().as_str() {
            "mmap" => "mmap",
            "" | "pinned" => "pinned",
            other => {
                tracing::error!(
                    "TMS_INIT_CPU_BACKUP_BACKEND: \"{other}\" is neither pinned nor mmap; using pinned"
                );
                "pinned"
            }
        };
        Current {
            enabled: config::flag_from_environment("TMS_INIT_ENABLE", false),
            cpu_backup: config::flag_from_environment("TMS_INIT_ENABLE_CPU_BACKUP", false),
            disk_backup: config::flag_from_environment("TMS_INIT_ENABLE_DISK_BACKUP", false),
            cpu_backend: c_string(backend),
            tag: c_string(DEFAULT_TAG),
            exportable: false,
            peer_access: false,
            retain: None,
            directory: None,
        }
    }

    fn region(&self) -> Result<Region> {
        if self.cpu_backup && self.disk_backup {
            return Err(Error::new(
                ErrorKind::InvalidArgument,
                "CPU backup and disk backup exclude each other: enable one of them",
            ));
        }
        let tag = self.tag.to_str().unwrap_or(DEFAULT_TAG);
        let mut region = Region::new(tag);
        if self.disk_backup {
            region = region.with_backup("file");
        } else if self.cpu_backup {
            region = region.with_backup(self.cpu_backend.to_str().unwrap_or("pinned"));
        }
        region.exportable = self.exportable;
        region.peer_access = self.peer_access;
        region.retain = self.retain;
        region.directory.clone_from(&self.directory);
        Ok(region)
    }
}

/// Works on the thread's state; the defaults of a new thread if its storage is already gone, which
/// happens when memory is freed by the destructors of a thread that ends.
fn with_thread<R>(work: impl FnOnce(&mut Thread) -> R) -> R {
    let fresh = || {
        Box::new(Thread {
            current: Current::from_environment(),
            outer: Vec::new(),
        })
    };
    let mut work = Some(work);
    let done = THREAD.try_with(|cell| {
        let mut guard = cell.try_borrow_mut().ok()?;
        let thread = guard.get_or_insert_with(fresh);
        work.take().map(|work| work(thread))
    });
    match (done, work) {
        (Ok(Some(result)), _) => result,
        // `work` was not consumed in these cases.
        (_, Some(work)) => work(&mut fresh()),
        (_, None) => unreachable!("the closure either ran and returned, or was kept"),
    }
}

/// Like [`with_thread`], for pointers into the state, which must not come from a stand-in.
fn pointer_in_thread(
    take: impl Fn(&Current) -> *const std::ffi::c_char,
    otherwise: &'static CStr,
) -> *const std::ffi::c_char {
    with_thread(|_| ());
    THREAD
        .try_with(|cell| {
            let guard = cell.try_borrow().ok()?;
            guard.as_ref().map(|thread| take(&thread.current))
        })
        .ok()
        .flatten()
        .unwrap_or(otherwise.as_ptr())
}

/// The thread's region, `None` outside of one.
pub fn current() -> Result<Option<Region>> {
    with_thread(|thread| {
        if thread.current.enabled {
            thread.current.region().map(Some)
        } else {
            Ok(None)
        }
    })
}

/// The thread's settings, in a region or not.
pub fn current_or_default() -> Result<Region> {
    with_thread(|thread| thread.current.region())
}

/// Enters a region (or, with `enabled` false, leaves all) until the matching [`pop`].
pub fn push(region: &Region, enabled: bool) -> Result<()> {
    region.check()?;
    let backend = region.backup.as_deref();
    if let Some(other) = backend
        && !["pinned", "mmap", "file"].contains(&other)
    {
        return Err(Error::invalid(
            "backup",
            "not possible for a thread's region",
        ));
    }
    with_thread(|thread| {
        let outer = thread.current.clone();
        thread.current = Current {
            enabled,
            cpu_backup: matches!(backend, Some("pinned" | "mmap")),
            disk_backup: backend == Some("file"),
            cpu_backend: match backend {
                Some(name @ ("pinned" | "mmap")) => c_string(name),
                _ => outer.cpu_backend.clone(),
            },
            tag: c_string(&region.tag),
            exportable: region.exportable,
            peer_access: region.peer_access,
            retain: region.retain,
            directory: region.directory.clone(),
        };
        thread.outer.push(outer);
    });
    if enabled {
        warn_about_settings();
    }
    Ok(())
}

/// Leaves the region entered last, and restores exactly what was there before.
pub fn pop() -> Result<()> {
    let left = with_thread(|thread| {
        let outer = thread.outer.pop()?;
        Some(std::mem::replace(&mut thread.current, outer).enabled)
    });
    match left {
        None => Err(Error::new(
            ErrorKind::InvalidArgument,
            "no region to leave on this thread",
        )),
        Some(enabled) => {
            if enabled {
                warn_if_unused();
            }
            Ok(())
        }
    }
}

pub fn set_enabled(enabled: bool) {
    let before = with_thread(|thread| std::mem::replace(&mut thread.current.enabled, enabled));
    match (before, enabled) {
        (false, true) => warn_about_settings(),
        (true, false) => warn_if_unused(),
        _ => {}
    }
}

pub fn enabled() -> bool {
    with_thread(|thread| thread.current.enabled)
}

pub fn set_tag(tag: &str) -> Result<()> {
    check_tag(tag)?;
    with_thread(|thread| thread.current.tag = c_string(tag));
    Ok(())
}

/// The thread's tag, valid until the thread sets another.
pub fn tag_pointer() -> *const std::ffi::c_char {
    pointer_in_thread(|current| current.tag.as_ptr(), c"default")
}

pub fn set_cpu_backup(enabled: bool) {
    with_thread(|thread| thread.current.cpu_backup = enabled);
}

pub fn cpu_backup() -> bool {
    with_thread(|thread| thread.current.cpu_backup)
}

pub fn set_disk_backup(enabled: bool) {
    with_thread(|thread| thread.current.disk_backup = enabled);
}

pub fn disk_backup() -> bool {
    with_thread(|thread| thread.current.disk_backup)
}

pub fn set_cpu_backend(name: &str) -> Result<()> {
    if !["pinned", "mmap"].contains(&name) {
        return Err(Error::invalid(
            "cpu backup backend",
            format_args!("\"{name}\" is neither pinned nor mmap"),
        ));
    }
    with_thread(|thread| thread.current.cpu_backend = c_string(name));
    Ok(())
}

/// The thread's host backend, valid until the thread sets another.
pub fn cpu_backend_pointer() -> *const std::ffi::c_char {
    pointer_in_thread(|current| current.cpu_backend.as_ptr(), c"pinned")
}

/// Whether backups stay after a resume, for regions that do not say.
pub fn retain() -> bool {
    match RETAIN.load(Ordering::Relaxed) {
        UNSET => config::flag_from_environment("TMS_RETAIN_CPU_BACKUP", false),
        value => value == 1,
    }
}

pub fn set_retain(retain: bool) {
    RETAIN.store(u64::from(retain), Ordering::Relaxed);
}

pub(super) fn count_allocation() {
    HOOKED.fetch_add(1, Ordering::Relaxed);
}

fn warn_if_unused() {
    if HOOKED.load(Ordering::Relaxed) == 0 && !WARNED_UNUSED.swap(true, Ordering::Relaxed) {
        tracing::warn!(
            "a region closed and nothing was allocated through the library: is the allocator hooked \
             (LD_PRELOAD or CUDAPluggableAllocator), or is the CUDA runtime linked statically?"
        );
    }
}

/// Settings of PyTorch's allocator under which its memory does not pass through the hooks.
fn warn_about_settings() {
    if WARNED_SETTINGS.swap(true, Ordering::Relaxed) {
        return;
    }
    for name in ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"] {
        let Ok(value) = std::env::var(name) else {
            continue;
        };
        let defeats = value.split(',').map(str::trim).find(|setting| {
            let setting = setting.to_ascii_lowercase();
            setting == "expandable_segments:true" || setting == "backend:cudamallocasync"
        });
        if let Some(setting) = defeats {
            tracing::warn!("{name} contains {setting}: such memory cannot be paused; remove it");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nested_regions_restore_exactly() {
        std::thread::spawn(|| {
            set_tag("outer").unwrap();
            set_cpu_backup(true);
            let before = current_or_default().unwrap();
            push(
                &Region::new("inner").with_backup("file").with_retain(true),
                true,
            )
            .unwrap();
            assert!(disk_backup() && !cpu_backup() && enabled());
            push(&Region::new("off"), false).unwrap();
            assert!(current().unwrap().is_none());
            pop().unwrap();
            assert_eq!(current().unwrap().unwrap().tag(), "inner");
            pop().unwrap();
            assert!(!enabled());
            assert_eq!(current_or_default().unwrap(), before);
            assert!(pop().is_err());
        })
        .join()
        .unwrap();
    }

    #[test]
    fn two_backups_exclude_each_other() {
        std::thread::spawn(|| {
            set_enabled(true);
            set_cpu_backup(true);
            set_disk_backup(true);
            assert!(current().is_err());
            set_cpu_backup(false);
            assert_eq!(current().unwrap().unwrap().backup.as_deref(), Some("file"));
        })
        .join()
        .unwrap();
    }

    #[test]
    fn tags_are_checked() {
        assert!(check_tag("").is_err());
        assert!(check_tag(&"x".repeat(256)).is_err());
        assert!(check_tag("with spaces, and ü").is_ok());
    }
}
