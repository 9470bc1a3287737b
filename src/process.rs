//! The two things a library inside somebody else's process must notice: that it was forked, and
//! that the process began to exit. After either, no driver is called any more.

use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind, Result};

static FORKED: AtomicBool = AtomicBool::new(false);
static EXITING: AtomicBool = AtomicBool::new(false);
static OPERATIONS: AtomicUsize = AtomicUsize::new(0);
static WATCH: Once = Once::new();

/// How long `exit` waits for a running pause or resume to notice and stop.
const EXIT_GRACE: Duration = Duration::from_secs(2);

extern "C" fn in_child() {
    FORKED.store(true, Ordering::Release);
}

extern "C" fn at_exit() {
    EXITING.store(true, Ordering::Release);
    if FORKED.load(Ordering::Acquire) {
        return;
    }
    // Operations look at `exiting` between driver calls; CUDA's own teardown follows this handler.
    let deadline = Instant::now() + EXIT_GRACE;
    while OPERATIONS.load(Ordering::Acquire) > 0 && Instant::now() < deadline {
        std::thread::sleep(Duration::from_micros(200));
    }
    crate::backup::at_exit();
}

/// Starts watching for fork and exit. Called on the first allocation, never at load.
pub fn watch() {
    WATCH.call_once(|| {
        // SAFETY: both functions are `extern "C"`, take nothing, and live as long as the library,
        // which is never unloaded (`-z nodelete`).
        unsafe {
            libc::pthread_atfork(None, None, Some(in_child));
            libc::atexit(at_exit);
        }
    });
}

/// True in a child forked after the first allocation.
pub fn forked() -> bool {
    FORKED.load(Ordering::Acquire)
}

/// True once `exit` has begun.
pub fn exiting() -> bool {
    EXITING.load(Ordering::Acquire)
}

/// An error in a forked child and during exit, nothing otherwise.
pub fn check() -> Result<()> {
    if forked() {
        return Err(Error::new(
            ErrorKind::Forked,
            "the library was used before fork and cannot be used in the child; start a new process",
        ));
    }
    if exiting() {
        return Err(Error::new(ErrorKind::Shutdown, "the process is exiting"));
    }
    Ok(())
}

/// Marks an operation as running, so that `exit` gives it a moment to stop.
pub struct Running(());

impl Running {
    pub fn start() -> Result<Running> {
        watch();
        OPERATIONS.fetch_add(1, Ordering::AcqRel);
        let running = Running(());
        check()?;
        Ok(running)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        OPERATIONS.fetch_sub(1, Ordering::AcqRel);
    }
}
