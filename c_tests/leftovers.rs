//! File backups of processes that ended: removed by the next process that uses the folder, and only
//! then. The other processes are this program again, told by the environment what to do.

mod support;

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use tms_memcache::device;
use tms_memcache::{ErrorKind, PauseOptions, Region, Saver};

const ROLE: &str = "TMS_LEFTOVERS_ROLE";
const FOLDER: &str = "TMS_LEFTOVERS_FOLDER";

fn backups(folder: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|end| end == "bin"))
        .collect();
    found.sort();
    found
}

fn locks(folder: &Path) -> usize {
    std::fs::read_dir(folder)
        .unwrap()
        .filter(|entry| {
            let path = entry.as_ref().unwrap().path();
            path.extension().is_some_and(|end| end == "lock")
        })
        .count()
}

fn paused_in(folder: &Path) -> Saver {
    let saver = Saver::new(device::open("host").unwrap()).unwrap();
    let region = Region::new("w").with_backup("file").with_directory(folder);
    support::filled(&saver, 0, 3 << 20, 1, &region);
    saver.pause(&PauseOptions::all()).status.unwrap();
    saver
}

/// What the other process does: pause into the folder, say so, and wait to be ended.
#[test]
fn the_other_process() {
    let Ok(role) = std::env::var(ROLE) else {
        return;
    };
    let folder = PathBuf::from(std::env::var_os(FOLDER).unwrap());
    if role == "limited" {
        limited(&folder);
        println!("\nready 0");
        return;
    }
    let saver = paused_in(&folder);
    if role == "forks" {
        // SAFETY: the child only waits, and uses nothing of this process.
        let child = unsafe { libc::fork() };
        if child == 0 {
            loop {
                // SAFETY: no arguments.
                unsafe { libc::pause() };
            }
        }
        println!("\nready {child}");
    } else {
        println!("\nready 0");
    }
    if role == "exits" {
        // SAFETY: ends the process with its exit handlers, backups still there.
        unsafe { libc::exit(0) };
    }
    let _ = std::io::stdin().read(&mut [0]);
    drop(saver);
}

/// A process that may only write small files: an error, not the signal that would end it.
fn limited(folder: &Path) {
    let saver = Saver::new(device::open("host").unwrap()).unwrap();
    let region = Region::new("w").with_backup("file").with_directory(folder);
    saver.malloc(3 << 20, None, &region).unwrap();
    let limit = libc::rlimit {
        rlim_cur: 1 << 20,
        rlim_max: 1 << 20,
    };
    // SAFETY: a valid limit for this process, which ends with the test.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_FSIZE, &limit) }, 0);
    let outcome = saver.pause(&PauseOptions::all());
    assert_eq!(outcome.status.unwrap_err().kind(), ErrorKind::NoSpace);
}

/// This program again, in another role.
fn other(role: &str, folder: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["the_other_process", "--exact", "--nocapture"])
        .env(ROLE, role)
        .env(FOLDER, folder);
    command
}

fn start(role: &str, folder: &Path) -> (Child, i32) {
    let mut child = other(role, folder)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let forked = loop {
        let line = lines
            .next()
            .expect("the other process ended early")
            .unwrap();
        if let Some(number) = line.strip_prefix("ready ") {
            break number.parse().unwrap();
        }
    };
    (child, forked)
}

#[test]
fn files_of_a_killed_process_go_with_the_next_use_of_the_folder() {
    let folder = tempfile::tempdir().unwrap();
    let (mut child, _) = start("waits", folder.path());
    let left = backups(folder.path());
    assert_eq!(left.len(), 1);
    {
        use std::os::unix::fs::PermissionsExt;
        let mode = std::fs::metadata(&left[0]).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(
        backups(folder.path()),
        left,
        "nobody cleans before there is a need"
    );
    let saver = paused_in(folder.path());
    let now = backups(folder.path());
    assert_eq!(now.len(), 1);
    assert_ne!(now, left);
    drop(saver);
    assert!(backups(folder.path()).is_empty());
}

#[test]
fn files_of_a_living_process_stay() {
    let folder = tempfile::tempdir().unwrap();
    let (mut child, _) = start("waits", folder.path());
    let theirs = backups(folder.path());
    let saver = paused_in(folder.path());
    assert!(theirs.iter().all(|path| path.exists()));
    assert_eq!(backups(folder.path()).len(), 2);
    drop(saver);
    assert_eq!(backups(folder.path()), theirs);
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_forked_child_does_not_hold_the_lock() {
    let folder = tempfile::tempdir().unwrap();
    let (mut child, grandchild) = start("forks", folder.path());
    let left = backups(folder.path());
    child.kill().unwrap();
    child.wait().unwrap();
    let saver = paused_in(folder.path());
    assert!(left.iter().all(|path| !path.exists()));
    // SAFETY: a process that this test started.
    unsafe { libc::kill(grandchild, libc::SIGKILL) };
    drop(saver);
}

#[test]
fn files_go_at_exit() {
    let folder = tempfile::tempdir().unwrap();
    let (mut child, _) = start("exits", folder.path());
    assert!(child.wait().unwrap().success());
    assert!(backups(folder.path()).is_empty());
    assert_eq!(locks(folder.path()), 0);
}

#[test]
fn a_limit_for_file_sizes_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let output = other("limited", folder.path()).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(backups(folder.path()).is_empty());
}
