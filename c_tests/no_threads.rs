//! A process that may not start threads (a limit of processes, a sandbox): work is done on the
//! caller's thread, and nothing hangs.

mod support;

use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicBool, Ordering};

use tms_memcache::device;
use tms_memcache::{PauseOptions, Region, ResumeOptions, Saver};

static REFUSE: AtomicBool = AtomicBool::new(false);

type Create = unsafe extern "C" fn(*mut c_void, *const c_void, *mut c_void, *mut c_void) -> c_int;

/// Stands before the C library's function in this program.
///
/// # Safety
/// As the function of the C library.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pthread_create(
    thread: *mut c_void,
    attributes: *const c_void,
    start: *mut c_void,
    argument: *mut c_void,
) -> c_int {
    if REFUSE.load(Ordering::SeqCst) {
        return libc::EAGAIN;
    }
    // SAFETY: the next definition of the name is the C library's, of the same type.
    unsafe {
        let real = libc::dlsym(libc::RTLD_NEXT, c"pthread_create".as_ptr());
        std::mem::transmute::<*mut c_void, Create>(real)(thread, attributes, start, argument)
    }
}

#[test]
fn a_pause_without_threads_ends() {
    let Some(_fake) = support::FakeCuda::loaded() else {
        // The host device needs a thread of its own for its streams.
        println!("needs the software driver: not selected");
        return;
    };
    let saver = Saver::new(device::open("cuda").unwrap()).unwrap();
    let made: Vec<u64> = ["pinned", "mmap"]
        .into_iter()
        .map(|backup| {
            let region = Region::new("w").with_backup(backup);
            support::filled(&saver, 0, 9 << 20, 3, &region)
        })
        .collect();
    REFUSE.store(true, Ordering::SeqCst);
    let paused = saver.pause(&PauseOptions::all());
    let resumed = saver.resume(&ResumeOptions::all());
    REFUSE.store(false, Ordering::SeqCst);
    paused.status.unwrap();
    resumed.status.unwrap();
    for address in made {
        support::check(&saver, address, 9 << 20, 3);
    }
}
