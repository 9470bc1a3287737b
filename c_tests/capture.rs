//! Stream captures: what stays possible, what is put off, what is refused. Needs the software
//! driver (`TMS_TEST_CUDA=1`), which models the three modes.

mod support;

use std::ffi::{c_int, c_uint, c_void};
use std::sync::{Mutex, MutexGuard, PoisonError};

use support::FakeCuda;
use tms_memcache::device::{self, Piece};
use tms_memcache::{Copier, ErrorKind, PauseOptions, Region, ResumeOptions, Saver, Way};

const GLOBAL: c_int = 0;
const BLOCKING: c_uint = 0;
const NON_BLOCKING: c_uint = 1;

fn alone() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A stream of the host, being captured in global mode.
struct Capture {
    stream: *mut c_void,
}

/// A function of the driver, whose type the caller names.
fn driver<F: Copy>(name: &str) -> F {
    let fake = FakeCuda::loaded().unwrap();
    // SAFETY: every use in this file has the driver's type.
    unsafe { fake.entry(name) }
}

impl Capture {
    fn begin(flags: c_uint) -> Capture {
        let mut context = std::ptr::null_mut::<c_void>();
        let mut stream = std::ptr::null_mut();
        // SAFETY: the types are the driver's.
        unsafe {
            let retain: unsafe extern "C" fn(*mut *mut c_void, c_int) -> c_int =
                driver("cuDevicePrimaryCtxRetain");
            let set: unsafe extern "C" fn(*mut c_void) -> c_int = driver("cuCtxSetCurrent");
            let create: unsafe extern "C" fn(*mut *mut c_void, c_uint) -> c_int =
                driver("cuStreamCreate");
            let begin: unsafe extern "C" fn(*mut c_void, c_int) -> c_int =
                driver("cuStreamBeginCapture_v2");
            assert_eq!(retain(&mut context, 0), 0);
            assert_eq!(set(context), 0);
            assert_eq!(create(&mut stream, flags), 0);
            assert_eq!(begin(stream, GLOBAL), 0);
        }
        Capture { stream }
    }

    /// The code of the end: 0, or 901 if something broke the capture.
    fn end(self) -> c_int {
        let mut graph = std::ptr::null_mut::<c_void>();
        // SAFETY: the types are the driver's.
        unsafe {
            let end: unsafe extern "C" fn(*mut c_void, *mut *mut c_void) -> c_int =
                driver("cuStreamEndCapture");
            let destroy: unsafe extern "C" fn(*mut c_void) -> c_int = driver("cuStreamDestroy_v2");
            let release: unsafe extern "C" fn(c_int) -> c_int =
                driver("cuDevicePrimaryCtxRelease_v2");
            let code = end(self.stream, &mut graph);
            assert_eq!(destroy(self.stream), 0);
            assert_eq!(release(0), 0);
            code
        }
    }
}

#[test]
fn malloc_works_and_free_on_the_captured_stream_is_put_off() {
    let Some(fake) = FakeCuda::loaded() else {
        println!("needs the software driver: not selected");
        return;
    };
    let _alone = alone();
    let saver = Saver::new(device::open("cuda").unwrap()).unwrap();
    let region = Region::new("w").with_backup("pinned");
    let before = support::filled(&saver, 0, 3 << 20, 1, &region);
    for flags in [NON_BLOCKING, BLOCKING] {
        let capture = Capture::begin(flags);
        let during = saver.malloc(1, Some(0), &region).unwrap();
        let live = fake.live_bytes(0);
        saver
            .free_on_stream(during, Some(capture.stream as u64))
            .unwrap();
        assert_eq!(fake.live_bytes(0), live, "released later");
        assert!(saver.query(during).is_none());
        assert_eq!(capture.end(), 0, "the capture is whole");
        saver.pause(&PauseOptions::all()).status.unwrap();
        assert_eq!(fake.live_bytes(0), 0, "the next operation releases it");
        saver.resume(&ResumeOptions::all()).status.unwrap();
        support::check(&saver, before, 3 << 20, 1);
    }
    saver.free(before).unwrap();
}

#[test]
fn a_pause_during_a_capture_is_refused_and_loses_nothing() {
    let Some(_fake) = FakeCuda::loaded() else {
        println!("needs the software driver: not selected");
        return;
    };
    let _alone = alone();
    let saver = Saver::new(device::open("cuda").unwrap()).unwrap();
    let region = Region::new("w").with_backup("pinned");
    let address = support::filled(&saver, 0, 3 << 20, 1, &region);
    for (flags, whole) in [(BLOCKING, true), (NON_BLOCKING, false)] {
        let capture = Capture::begin(flags);
        let outcome = saver.pause(&PauseOptions::all());
        assert_eq!(outcome.status.unwrap_err().kind(), ErrorKind::Capture);
        // A capture on a blocking stream is seen before anything breaks it.
        assert_eq!(capture.end() == 0, whole);
        support::check(&saver, address, 3 << 20, 1);
    }
    saver.pause(&PauseOptions::all()).status.unwrap();
    saver.resume(&ResumeOptions::all()).status.unwrap();
    support::check(&saver, address, 3 << 20, 1);
}

#[test]
fn polling_an_operation_does_not_touch_the_driver() {
    let Some(fake) = FakeCuda::loaded() else {
        println!("needs the software driver: not selected");
        return;
    };
    let _alone = alone();
    let saver = Saver::new(device::open("cuda").unwrap()).unwrap();
    let region = Region::new("w").with_backup("pinned");
    let address = support::filled(&saver, 0, 3 << 20, 1, &region);
    fake.hold_streams(1);
    let op = saver.pause_async(&PauseOptions::all()).unwrap();
    while fake.pending_work() == 0 {
        std::thread::yield_now();
    }
    std::thread::sleep(std::time::Duration::from_millis(20));
    let calls = fake.count();
    for _ in 0..100 {
        assert!(!op.is_done());
        assert_eq!(op.progress().1, 4 << 20);
    }
    assert_eq!(fake.count(), calls);
    fake.hold_streams(0);
    op.wait(None).unwrap().status.unwrap();
    saver.resume(&ResumeOptions::all()).status.unwrap();
    support::check(&saver, address, 3 << 20, 1);
}

#[test]
fn memory_put_off_comes_back_with_the_next_free() {
    let Some(fake) = FakeCuda::loaded() else {
        println!("needs the software driver: not selected");
        return;
    };
    let _alone = alone();
    let saver = Saver::new(device::open("cuda").unwrap()).unwrap();
    let region = Region::new("x");
    let a = saver.malloc(40 << 20, Some(0), &region).unwrap();
    let b = saver.malloc(2 << 20, Some(0), &region).unwrap();
    let capture = Capture::begin(NON_BLOCKING);
    let stream = capture.stream as u64;
    saver.free_on_stream(a, Some(stream)).unwrap();
    assert_eq!(fake.live_bytes(0), 42 << 20);
    assert_eq!(capture.end(), 0);
    saver.free(b).unwrap();
    assert_eq!(fake.live_bytes(0), 0);
}

#[test]
fn copies_of_pinned_memory_are_captured_and_others_refused() {
    let Some(_fake) = FakeCuda::loaded() else {
        println!("needs the software driver: not selected");
        return;
    };
    let _alone = alone();
    let saver = Saver::new(device::open("cuda").unwrap()).unwrap();
    let region = Region::new("c").with_backup("pinned").with_retain(true);
    let bytes = 2 << 20;
    let address = support::filled(&saver, 0, bytes, 1, &region);
    saver.pause(&PauseOptions::all()).status.unwrap();
    saver.resume(&ResumeOptions::all()).status.unwrap();
    // The backup, which is pinned memory that the host may read.
    let pinned = saver.backup_pointer(address, bytes as u64).unwrap();
    let other = saver
        .malloc(bytes as u64, Some(0), &Region::new("o"))
        .unwrap();
    let copier = Copier::new(std::sync::Arc::clone(saver.engine()));
    let pageable = vec![7u8; 4096];
    let capture = Capture::begin(NON_BLOCKING);
    let stream = capture.stream as u64;
    let piece = |source: u64, at: u64| Piece {
        destination: other + at,
        source,
        bytes: 4096,
    };
    let pieces: Vec<Piece> = (0..20)
        .map(|index| piece(pinned.as_ptr() as u64 + index * 9000, index * 8192))
        .collect();
    // SAFETY: both sides live until the graph is gone; it is never launched.
    unsafe {
        copier.copy_on_stream(&pieces, Way::Any, stream).unwrap();
        let error = copier
            .copy_on_stream(&[piece(pageable.as_ptr() as u64, 0)], Way::Any, stream)
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Capture);
        assert!(error.to_string().starts_with("stream: "), "{error}");
    }
    assert_eq!(capture.end(), 0, "the capture is whole");
    // SAFETY: both sides live.
    let ended = unsafe { copier.copy(&pieces, Way::ToDevice) };
    ended.status.unwrap();
    let mut got = vec![0; 4096];
    saver.read(other + 8192, &mut got).unwrap();
    assert!(got == support::pattern(bytes, 1)[9000..9000 + 4096]);
}
