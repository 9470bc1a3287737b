//! Backups in files: one per allocation, visible in the chosen folder while the process lives.
//!
//! Every instance of the library names its files by a random id and holds a lock on a lock file of
//! that id. Left-overs of a killed process are removed by the next one that uses the folder, but
//! only where that lock can be taken: a process in another container looks dead and is not.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use xxhash_rust::xxh3::xxh3_64;

use super::{BackupBackend, Discard, LoadItem, LoadObserver, StoreItem, Ticket, own};
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::transfer::staging::{self, PIECE, Sink, Source};
use crate::transfer::{Control, Engine, Span};

const PREFIX: &str = "tms-";
const LOCK_SUFFIX: &str = ".lock";
const FILE_SUFFIX: &str = ".bin";

pub struct FileBackend;

/// What this process has in one folder.
struct Instance {
    id: String,
    /// Open, and locked, for the life of the process: closing it would give the lock away.
    _lock: File,
    next: u64,
}

#[derive(Default)]
struct Instances {
    by_folder: BTreeMap<PathBuf, Instance>,
    /// Files that exist, to be removed at exit.
    files: BTreeSet<PathBuf>,
    /// Lock files, removed last.
    locks: Vec<PathBuf>,
}

static INSTANCES: Mutex<Option<Instances>> = Mutex::new(None);

fn with_instances<R>(work: impl FnOnce(&mut Instances) -> R) -> R {
    let mut guard = INSTANCES.lock().unwrap_or_else(PoisonError::into_inner);
    work(guard.get_or_insert_default())
}

/// Removes the files of this process. Another thread may hold the lock for a moment; one that never
/// gives it back must not keep the process from ending.
pub(super) fn remove_all() {
    for _ in 0..100 {
        if let Ok(mut guard) = INSTANCES.try_lock() {
            let Some(instances) = guard.take() else {
                return;
            };
            for path in instances.files.iter().chain(&instances.locks) {
                // Nobody is left to tell; the next instance removes what stays.
                let _ = fs::remove_file(path);
            }
            // The descriptors stay open, and with them the locks, until the process is gone.
            std::mem::forget(instances);
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}

/// A record lock on the whole file: it belongs to the process, so a forked child does not hold it.
fn try_lock(file: &File) -> io::Result<bool> {
    // SAFETY: `flock` is plain data; zero is a valid value of every field.
    let mut request: libc::flock = unsafe { std::mem::zeroed() };
    request.l_type = libc::F_WRLCK as libc::c_short;
    request.l_whence = libc::SEEK_SET as libc::c_short;
    // SAFETY: a valid descriptor and a valid request.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLK, &request) } == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EACCES | libc::EAGAIN) => Ok(false),
        _ => Err(error),
    }
}

fn random_id() -> Result<String> {
    let mut bytes = [0u8; 8];
    // SAFETY: the buffer is valid for its length.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    if got != bytes.len() as isize {
        return Err(Error::last_os("getrandom"));
    }
    Ok(format!("{:016x}", u64::from_ne_bytes(bytes)))
}

impl Instance {
    fn start(folder: &Path) -> Result<(Instance, PathBuf)> {
        loop {
            let id = random_id()?;
            let path = folder.join(format!("{PREFIX}{id}{LOCK_SUFFIX}"));
            let named = || path.display().to_string();
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&path)
                .map_err(|error| Error::io(named(), error))?;
            // Between creation and lock, a cleaner may have taken the file for a left-over.
            let locked = try_lock(&file).map_err(|error| Error::io(named(), error))?;
            let kept = file.metadata().is_ok_and(|meta| meta.nlink() > 0);
            if locked && kept {
                let instance = Instance {
                    id,
                    _lock: file,
                    next: 0,
                };
                return Ok((instance, path));
            }
        }
    }
}

/// Removes the files of instances whose lock can be taken.
fn clean(folder: &Path, own: &BTreeSet<String>) {
    let Ok(entries) = fs::read_dir(folder) else {
        return;
    };
    let names: Vec<String> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.starts_with(PREFIX))
        .collect();
    for lock_name in names.iter().filter(|name| name.ends_with(LOCK_SUFFIX)) {
        let id = &lock_name[PREFIX.len()..lock_name.len() - LOCK_SUFFIX.len()];
        // Opening and closing our own lock file would give the lock away.
        if own.contains(id) {
            continue;
        }
        let path = folder.join(lock_name);
        let Ok(file) = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&path)
        else {
            continue;
        };
        if !matches!(try_lock(&file), Ok(true)) {
            continue;
        }
        let stem = format!("{PREFIX}{id}-");
        let mut removed = 0;
        for name in &names {
            if name.starts_with(&stem) && name.ends_with(FILE_SUFFIX) {
                removed += usize::from(fs::remove_file(folder.join(name)).is_ok());
            }
        }
        // Last, while still locked, so that no third process works on the same id.
        let _ = fs::remove_file(&path);
        tracing::info!(
            "removed {removed} backup files of an ended process in {}",
            folder.display()
        );
    }
}

/// Begins to work in a folder: removes left-overs of others and takes a lock of our own.
fn start_in(folder: &Path) -> Result<()> {
    /// Held while a folder is cleaned; taken before `INSTANCES`, never by a free.
    static STARTING: Mutex<()> = Mutex::new(());
    let _starting = STARTING.lock().unwrap_or_else(PoisonError::into_inner);
    let (known, own) = with_instances(|instances| {
        let own = instances
            .by_folder
            .values()
            .map(|instance| instance.id.clone())
            .collect();
        (instances.by_folder.contains_key(folder), own)
    });
    if known {
        return Ok(());
    }
    clean(folder, &own);
    let (instance, lock) = Instance::start(folder)?;
    with_instances(|instances| {
        instances.locks.push(lock);
        instances.by_folder.insert(folder.to_path_buf(), instance);
    });
    Ok(())
}

/// One file. Removed with its last reference.
struct FileTicket {
    path: PathBuf,
    file: File,
    bytes: u64,
    /// xxh3 of each [`PIECE`], the last one may be shorter.
    sums: Mutex<Vec<u64>>,
}

impl Ticket for FileTicket {
    fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Drop for FileTicket {
    fn drop(&mut self) {
        // A forked child shares the name but does not own it.
        if crate::process::forked() {
            return;
        }
        // Removing a large file takes long, so not under the lock.
        let ours = with_instances(|instances| instances.files.remove(&self.path));
        if ours && let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!("{}: not removed: {error}", self.path.display());
        }
    }
}

impl FileTicket {
    fn create(folder: &Path, bytes: u64) -> Result<FileTicket> {
        let folder = fs::canonicalize(folder).map_err(|error| {
            Error::io(format_args!("backup folder {}", folder.display()), error)
        })?;
        start_in(&folder)?;
        let path = with_instances(|instances| -> Result<_> {
            let instance = instances
                .by_folder
                .get_mut(&folder)
                .ok_or_else(|| Error::new(ErrorKind::Internal, "the instance is gone"))?;
            let name = format!("{PREFIX}{}-{}{FILE_SUFFIX}", instance.id, instance.next);
            instance.next += 1;
            let path = folder.join(name);
            instances.files.insert(path.clone());
            Ok(path)
        })?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(|error| {
                with_instances(|instances| instances.files.remove(&path));
                Error::io(path.display(), error)
            })?;
        let ticket = FileTicket {
            path,
            file,
            bytes,
            sums: Mutex::new(vec![0; bytes.div_ceil(PIECE as u64) as usize]),
        };
        // Space is claimed before the first byte is copied: a full disk is found out early.
        // SAFETY: a valid descriptor of a file opened for writing.
        let refused = unsafe { libc::posix_fallocate(ticket.file.as_raw_fd(), 0, bytes as i64) };
        match refused {
            0 | libc::EOPNOTSUPP | libc::EINVAL => Ok(ticket),
            code => Err(Error::io(
                format_args!("{}: claiming {bytes} bytes", ticket.path.display()),
                io::Error::from_raw_os_error(code),
            )),
        }
    }

    fn sums(&self) -> MutexGuard<'_, Vec<u64>> {
        self.sums.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The files of one store or load, by span.
struct Files(Vec<Arc<dyn Ticket>>);

impl Sink for Files {
    fn write(&self, index: usize, offset: u64, bytes: &[u8]) -> Result<()> {
        let ticket = own::<FileTicket>(&self.0[index])?;
        ticket.file.write_all_at(bytes, offset).map_err(|error| {
            Error::io(format_args!("{}: writing", ticket.path.display()), error)
        })?;
        let sum = xxh3_64(bytes);
        ticket.sums()[offset as usize / PIECE] = sum;
        Ok(())
    }
}

impl Source for Files {
    fn read(&self, index: usize, offset: u64, bytes: &mut [u8]) -> Result<()> {
        let ticket = own::<FileTicket>(&self.0[index])?;
        let path = ticket.path.display();
        ticket.file.read_exact_at(bytes, offset).map_err(|error| {
            if error.kind() == io::ErrorKind::UnexpectedEof {
                Error::new(
                    ErrorKind::Corrupt,
                    format!("{path}: truncated, it should have {} bytes", ticket.bytes),
                )
            } else {
                Error::io(format_args!("{path}: reading"), error)
            }
        })?;
        let expected = ticket.sums()[offset as usize / PIECE];
        if xxh3_64(bytes) != expected {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!(
                    "{path}: bytes {offset} to {} do not match their checksum",
                    offset + bytes.len() as u64
                ),
            ));
        }
        Ok(())
    }
}

static DEFAULT_FOLDER: Mutex<Option<PathBuf>> = Mutex::new(None);

/// Sets where new files go that name no folder; `None` undoes that.
pub fn set_default_folder(folder: Option<&Path>) {
    let mut guard = DEFAULT_FOLDER
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    *guard = folder.map(Path::to_path_buf);
}

/// What was set, else `TMS_DISK_BACKUP_DIR`, else the system's temporary folder.
fn default_folder() -> PathBuf {
    let set = DEFAULT_FOLDER
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    set.clone().unwrap_or_else(|| {
        std::env::var_os("TMS_DISK_BACKUP_DIR")
            .filter(|value| !value.is_empty())
            .map_or_else(std::env::temp_dir, PathBuf::from)
    })
}

/// Writing beyond the limit for file sizes would end the process by a signal.
fn check_size_limit(items: &[StoreItem]) -> Result<()> {
    let mut limit = libc::rlimit {
        rlim_cur: libc::RLIM_INFINITY,
        rlim_max: libc::RLIM_INFINITY,
    };
    // SAFETY: the out-parameter is a local variable.
    unsafe { libc::getrlimit(libc::RLIMIT_FSIZE, &mut limit) };
    match items.iter().map(|item| item.span.bytes).max() {
        Some(largest) if largest > limit.rlim_cur => Err(Error::new(
            ErrorKind::NoSpace,
            format!(
                "file backup of {largest} bytes: the process may not write files above {} bytes (ulimit -f)",
                limit.rlim_cur
            ),
        )),
        _ => Ok(()),
    }
}

impl BackupBackend for FileBackend {
    fn name(&self) -> &'static str {
        "file"
    }

    fn store(
        &self,
        engine: &Engine,
        items: &[StoreItem],
        control: &Arc<Control>,
    ) -> Result<Vec<Arc<dyn Ticket>>> {
        check_size_limit(items)?;
        let mut tickets: Vec<Arc<dyn Ticket>> = Vec::with_capacity(items.len());
        for item in items {
            tickets.push(match &item.previous {
                Some(previous) => Arc::clone(previous),
                None => {
                    let fallback;
                    let folder = match &item.directory {
                        Some(folder) => &**folder,
                        None => {
                            fallback = default_folder();
                            &fallback
                        }
                    };
                    Arc::new(FileTicket::create(folder, item.span.bytes).context(|| "file backup")?)
                }
            });
        }
        let spans: Vec<Span> = items.iter().map(|item| item.span.clone()).collect();
        let sink: Arc<dyn Sink> = Arc::new(Files(tickets.clone()));
        staging::drain(engine, &spans, &sink, control).context(|| "file backup")?;
        Ok(tickets)
    }

    fn load(
        &self,
        engine: &Engine,
        items: &[LoadItem],
        control: &Arc<Control>,
        observer: &dyn LoadObserver,
    ) -> Vec<Result<()>> {
        let spans: Vec<Span> = items.iter().map(|item| item.span.clone()).collect();
        let files = items.iter().map(|item| Arc::clone(&item.ticket)).collect();
        let source: Arc<dyn Source> = Arc::new(Files(files));
        staging::fill(engine, &spans, &source, control, &|index, result| {
            observer.done(index, result);
        })
    }

    fn discard(&self, ticket: Arc<dyn Ticket>, _why: Discard) {
        drop(ticket);
    }

    fn reuses_place(&self) -> bool {
        true
    }
}
