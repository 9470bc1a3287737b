//! What may happen at the same time: frees during an operation, threads that hold a lock which a
//! host callback wants, many threads with late streams. Whether something waits is decided by what
//! can finish while a copy is held back, never by time. Needs the software driver with two devices.

mod support;

use std::ffi::{c_char, c_void};
use std::sync::{Mutex, MutexGuard, PoisonError};

use support::FakeCuda;
use tms_memcache::device;
use tms_memcache::{PauseOptions, Region, ResumeOptions, Saver};

fn alone() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn saver() -> Saver {
    Saver::new(device::open("cuda").unwrap()).unwrap()
}

/// Waits for something that another thread is certain to do.
fn until(mut done: impl FnMut() -> bool) {
    while !done() {
        std::thread::sleep(std::time::Duration::from_micros(200));
    }
}

#[test]
fn malloc_and_free_finish_while_a_copy_of_a_pause_is_held_back() {
    let Some(fake) = FakeCuda::loaded() else {
        println!("needs the software driver: not selected");
        return;
    };
    let _alone = alone();
    let saver = saver();
    let weights = Region::new("w").with_backup("pinned");
    let a = support::filled(&saver, 0, 3 << 20, 1, &weights);
    let b = support::filled(&saver, 0, 3 << 20, 2, &weights);
    let other = support::filled(&saver, 1, 3 << 20, 3, &Region::new("o").with_backup("mmap"));
    let paused = support::filled(
        &saver,
        1,
        3 << 20,
        4,
        &Region::new("z").with_backup("pinned"),
    );
    saver.pause(&PauseOptions::tags(["z"])).status.unwrap();
    fake.hold_streams(1);
    let op = saver.pause_async(&PauseOptions::tags(["w"])).unwrap();
    until(|| fake.pending_work() >= 2);
    // The copy does not move until it is let go below, so each of these would hang here for ever
    // if it waited for a lock that the pause holds.
    saver.free(a).unwrap();
    saver.free(other).unwrap();
    saver.free(paused).unwrap();
    let fresh = saver.malloc(1, Some(1), &Region::new("o")).unwrap();
    saver.free(fresh).unwrap();
    assert!(saver.free(0xdead_0000).is_err());
    assert!(saver.query(b).is_some());
    assert!(!saver.stats().is_empty());
    assert!(!op.is_done());
    fake.hold_streams(0);
    op.wait(None).unwrap().status.unwrap();
    assert!(saver.query(a).is_none());
    saver.resume(&ResumeOptions::all()).status.unwrap();
    support::check(&saver, b, 3 << 20, 2);
    saver.free(b).unwrap();
    assert_eq!(fake.live_bytes(0) + fake.live_bytes(1), 0);
    assert_eq!(fake.reserved_bytes(), 0);
}

/// The lock that a host's callback wants and a freeing thread holds: the shape of the GIL.
static INTERPRETER: Mutex<u32> = Mutex::new(0);

unsafe extern "C" fn callback(_: *mut c_void, _: i32, _: *const c_char, _: *const c_char) {
    *INTERPRETER.lock().unwrap_or_else(PoisonError::into_inner) += 1;
}

#[test]
fn a_free_under_a_lock_that_the_log_callback_wants() {
    let Some(fake) = FakeCuda::loaded() else {
        println!("needs the software driver: not selected");
        return;
    };
    let _alone = alone();
    let saver = saver();
    let region = Region::new("w").with_backup("pinned");
    let a = support::filled(&saver, 0, 3 << 20, 1, &region);
    let b = support::filled(&saver, 0, 3 << 20, 2, &region);
    // SAFETY: the callback is a function of this program and takes any arguments.
    unsafe {
        tms_memcache::ffi::tms_log_set_callback(Some(callback), std::ptr::null_mut(), 4);
    }
    let interpreter = INTERPRETER.lock().unwrap();
    // Both the pause and the free raise records now: an unmap and a release fail.
    fake.fail("cuMemRelease", 1, 12_345, 2);
    let op = saver.pause_async(&PauseOptions::all()).unwrap();
    saver.free(a).unwrap();
    let outcome = op.wait(None).unwrap();
    drop(outcome);
    saver.free(b).unwrap();
    drop(interpreter);
    assert_eq!(tms_memcache::ffi::tms_log_flush(60_000), 0);
    assert!(
        *INTERPRETER.lock().unwrap() > 0,
        "the records were delivered"
    );
    // SAFETY: removes the callback.
    unsafe { tms_memcache::ffi::tms_log_set_callback(None, std::ptr::null_mut(), 4) };
    fake.reset_faults();
    saver.pause(&PauseOptions::all()).status.unwrap();
    assert_eq!(fake.live_bytes(0), 0);
}

#[test]
fn many_threads_with_late_streams() {
    let Some(fake) = FakeCuda::loaded() else {
        println!("needs the software driver: not selected");
        return;
    };
    let _alone = alone();
    fake.set_late(1);
    fake.set_host_unreadable(1);
    let saver = saver();
    let threads: Vec<_> = (0..4u64)
        .map(|thread| {
            let saver = saver.clone();
            std::thread::spawn(move || {
                let tag = format!("t{thread}");
                let backup = ["pinned", "mmap", "file", "pinned"][thread as usize];
                let region = Region::new(&tag)
                    .with_backup(backup)
                    .with_retain(thread == 3);
                for round in 0..10u64 {
                    let seed = thread * 100 + round;
                    let bytes = 1 + (seed as usize * 77_777) % (5 << 20);
                    let a = support::filled(&saver, (round % 2) as u32, bytes, seed, &region);
                    let b = support::filled(&saver, 0, bytes / 2 + 1, seed + 1, &region);
                    let freed = round % 3 == 0;
                    let op = saver.pause_async(&PauseOptions::tags([&*tag])).unwrap();
                    if freed {
                        saver.free(b).unwrap();
                    }
                    op.wait(None).unwrap().status.unwrap();
                    saver.resume(&ResumeOptions::tags([&*tag])).status.unwrap();
                    support::check(&saver, a, bytes, seed);
                    if !freed {
                        support::check(&saver, b, bytes / 2 + 1, seed + 1);
                        saver.free(b).unwrap();
                    }
                    saver.free(a).unwrap();
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
    fake.set_late(0);
    fake.set_host_unreadable(0);
    assert_eq!(fake.live_bytes(0) + fake.live_bytes(1), 0);
}

#[test]
fn a_pause_waits_for_a_peer_that_only_the_host_uses() {
    let Some(fake) = FakeCuda::loaded() else {
        println!("needs the software driver: not selected");
        return;
    };
    let _alone = alone();
    let saver = saver();
    let region = Region::new("x").with_peer_access(true);
    let address = saver.malloc(1 << 20, Some(0), &region).unwrap();
    let (mut context, mut stream) = (std::ptr::null_mut(), std::ptr::null_mut());
    type Out = *mut *mut c_void;
    // SAFETY: the types are the driver's.
    let code = unsafe {
        let retain: unsafe extern "C" fn(Out, i32) -> i32 = fake.entry("cuDevicePrimaryCtxRetain");
        let push: unsafe extern "C" fn(*mut c_void) -> i32 = fake.entry("cuCtxPushCurrent_v2");
        let pop: unsafe extern "C" fn(Out) -> i32 = fake.entry("cuCtxPopCurrent_v2");
        let create: unsafe extern "C" fn(Out, u32) -> i32 = fake.entry("cuStreamCreate");
        let destroy: unsafe extern "C" fn(*mut c_void) -> i32 = fake.entry("cuStreamDestroy_v2");
        let release: unsafe extern "C" fn(i32) -> i32 = fake.entry("cuDevicePrimaryCtxRelease_v2");
        let synchronize: unsafe extern "C" fn(*mut c_void) -> i32 =
            fake.entry("cuStreamSynchronize");
        let fill: unsafe extern "C" fn(u64, u8, usize, *mut c_void) -> i32 =
            fake.entry("cuMemsetD8Async");
        assert_eq!(retain(&mut context, 1), 0);
        assert_eq!(push(context), 0);
        assert_eq!(create(&mut stream, 1), 0);
        fake.hold_streams(1);
        assert_eq!(fill(address, 7, 1 << 20, stream), 0);
        let op = saver.pause_async(&PauseOptions::all()).unwrap();
        // Long enough for a pause that does not wait to take the memory away.
        let early = op.wait(Some(std::time::Duration::from_millis(300)));
        fake.hold_streams(0);
        assert!(early.is_none(), "the pause did not wait");
        let code = synchronize(stream);
        op.wait(None).unwrap().status.unwrap();
        assert_eq!(destroy(stream), 0);
        assert_eq!(pop(&mut context), 0);
        drop((saver, op));
        assert_eq!(release(1), 0);
        code
    };
    assert_eq!(code, 0, "the peer's work was done on the memory");
}
