//! Resume in a given order: what is ready when, streams of the host that wait, failures in the middle,
//! frees and cancellation on the way. On the host device always; on CUDA with `TMS_TEST_CUDA=1`, with
//! faults and held streams where that is the software driver (two devices).

mod support;

use std::ffi::c_void;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use support::{FakeCuda, check, filled, pattern};
use tms_memcache::allocator::State;
use tms_memcache::device::{self, Platform, host::HostPlatform};
use tms_memcache::{ErrorKind, OrderedResume, PauseOptions, Region, ResumeOptions, Saver};

const GRANULE: u64 = 2 << 20;
const UNKNOWN: i32 = 12_345;

/// Faults and held streams are the process's, so the tests of this program take turns.
fn alone() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn savers() -> impl Iterator<Item = Saver> {
    let mut platforms: Vec<Arc<dyn Platform>> = vec![Arc::new(HostPlatform::new(2, 1 << 30))];
    if support::cuda_selected() {
        platforms.push(device::open("cuda").unwrap());
    }
    platforms
        .into_iter()
        .map(|platform| Saver::new(platform).unwrap())
}

fn start(saver: &Saver, pointers: &[u64]) -> OrderedResume {
    saver
        .resume_ordered_async(pointers, &ResumeOptions::all())
        .unwrap()
}

fn until(mut done: impl FnMut() -> bool) {
    while !done() {
        std::thread::sleep(Duration::from_micros(200));
    }
}

fn state(saver: &Saver, address: u64) -> State {
    saver.query(address).unwrap().state
}

fn pause(saver: &Saver) {
    saver.pause(&PauseOptions::all()).status.unwrap();
}

#[test]
fn exactly_the_given_allocations_in_every_backup() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    for saver in savers() {
        let backups = ["pinned", "mmap", "none", "file", "pinned", "file"];
        let devices = saver.platform().device_count().min(2);
        let made: Vec<(u64, usize)> = backups
            .iter()
            .enumerate()
            .map(|(seed, backup)| {
                let region = Region::new("o")
                    .with_backup(backup)
                    .with_directory(folder.path());
                let bytes = (3 << 20) + seed * 7_000_001;
                let device = seed as u32 % devices;
                (filled(&saver, device, bytes, seed as u64, &region), bytes)
            })
            .collect();
        for round in 0..3 {
            pause(&saver);
            // Backwards, into the middle, twice, and without the first one.
            let mut pointers: Vec<u64> = made[1..]
                .iter()
                .rev()
                .map(|&(address, bytes)| address + bytes as u64 / 2)
                .collect();
            pointers.push(made[3].0);
            let op = start(&saver, &pointers);
            for &pointer in &pointers {
                op.stream_wait(pointer, 0).unwrap();
            }
            let outcome = op.wait(None).unwrap();
            outcome.status.unwrap();
            assert_eq!(outcome.summary.done_count, 5, "round {round}");
            assert_eq!(outcome.summary.unchanged_count, 0);
            assert_eq!(op.progress().0, op.progress().1);
            for (seed, &(address, bytes)) in made.iter().enumerate().skip(1) {
                assert!(op.is_ready(address).unwrap());
                assert_eq!(state(&saver, address), State::Active);
                if backups[seed] != "none" {
                    check(&saver, address, bytes, seed as u64);
                }
            }
            assert_eq!(state(&saver, made[0].0), State::Paused);
            assert_eq!(
                op.is_ready(made[0].0).unwrap_err().kind(),
                ErrorKind::NotFound
            );
            assert_eq!(
                op.stream_wait(made[0].0, 0).unwrap_err().kind(),
                ErrorKind::NotFound
            );
            // What is active already counts as ready.
            let rest = start(&saver, &[made[1].0, made[0].0, made[5].0]);
            rest.stream_wait(made[1].0, 0).unwrap();
            let outcome = rest.wait(None).unwrap();
            outcome.status.unwrap();
            assert_eq!(outcome.summary.done_count, 1);
            assert_eq!(outcome.summary.unchanged_count, 2);
            check(&saver, made[0].0, made[0].1, 0);
        }
        start(&saver, &[]).wait(None).unwrap().status.unwrap();
    }
}

#[test]
fn bad_arguments_are_named_and_start_nothing() {
    let _alone = alone();
    for saver in savers() {
        let region = Region::new("o").with_backup("pinned");
        let address = filled(&saver, 0, 5 << 20, 1, &region);
        pause(&saver);
        let unknown =
            saver.resume_ordered_async(&[address, address + (6 << 20)], &ResumeOptions::all());
        let error = unknown.err().unwrap();
        assert_eq!(error.kind(), ErrorKind::NotFound);
        assert!(error.to_string().starts_with("pointers[1]"), "{error}");
        let tags = saver.resume_ordered_async(&[address], &ResumeOptions::tags(["o"]));
        assert_eq!(tags.err().unwrap().kind(), ErrorKind::InvalidArgument);
        assert_eq!(state(&saver, address), State::Paused);
    }
}

#[test]
fn broken_files_fail_alone() {
    let _alone = alone();
    for saver in savers() {
        let folder = tempfile::tempdir().unwrap();
        let region = Region::new("f")
            .with_backup("file")
            .with_directory(folder.path());
        let mut made: Vec<u64> = (0..3)
            .map(|seed| filled(&saver, 0, 20 << 20, seed, &region))
            .collect();
        pause(&saver);
        let mut files: Vec<_> = std::fs::read_dir(folder.path())
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.extension().is_some_and(|end| end == "bin"))
            .collect();
        files.sort();
        // Files are numbered in the order of addresses.
        let seeds = made.clone();
        made.sort_unstable();
        let whole = std::fs::read(&files[1]).unwrap();
        let mut broken = whole.clone();
        broken[9 << 20] ^= 4;
        std::fs::write(&files[1], &broken).unwrap();
        let op = start(&saver, &made);
        op.stream_wait(made[0], 0).unwrap();
        assert_eq!(
            op.stream_wait(made[1], 0).unwrap_err().kind(),
            ErrorKind::Corrupt
        );
        op.stream_wait(made[2], 0).unwrap();
        let outcome = op.wait(None).unwrap();
        assert_eq!(outcome.status.unwrap_err().kind(), ErrorKind::Partial);
        assert_eq!(outcome.summary.failures.len(), 1);
        assert_eq!(outcome.summary.failures[0].address, made[1]);
        assert_eq!(op.is_ready(made[1]).unwrap_err().kind(), ErrorKind::Corrupt);
        assert_eq!(state(&saver, made[1]), State::Paused);
        std::fs::write(&files[1], &whole).unwrap();
        start(&saver, &made).wait(None).unwrap().status.unwrap();
        for (seed, &address) in seeds.iter().enumerate() {
            check(&saver, address, 20 << 20, seed as u64);
        }
    }
}

#[test]
fn without_memory_nothing_becomes_ready() {
    let _alone = alone();
    let platform: Arc<dyn Platform> = Arc::new(HostPlatform::new(1, 10 * GRANULE));
    let saver = Saver::new(platform).unwrap();
    let region = Region::new("w").with_backup("pinned");
    let made: Vec<u64> = (0..2)
        .map(|seed| filled(&saver, 0, 3 * GRANULE as usize, seed, &region))
        .collect();
    pause(&saver);
    let hog = saver
        .malloc(6 * GRANULE, None, &Region::new("hog"))
        .unwrap();
    let op = start(&saver, &made);
    for &address in &made {
        let refused = op.stream_wait(address, 0).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::OutOfDeviceMemory);
        assert!(op.is_ready(address).is_err());
    }
    let outcome = op.wait(None).unwrap();
    assert_eq!(
        outcome.status.unwrap_err().kind(),
        ErrorKind::OutOfDeviceMemory
    );
    assert!(
        made.iter()
            .all(|&address| state(&saver, address) == State::Paused)
    );
    // While it waits, others can make room, also through the same thread.
    let options = ResumeOptions::all().with_wait(Duration::from_secs(60));
    let op = saver.resume_ordered_async(&made, &options).unwrap();
    let room = saver.pause_async(&PauseOptions::tags(["hog"])).unwrap();
    room.wait(None).unwrap().status.unwrap();
    op.stream_wait(made[1], 0).unwrap();
    op.wait(None).unwrap().status.unwrap();
    for (seed, &address) in made.iter().enumerate() {
        check(&saver, address, 3 * GRANULE as usize, seed as u64);
    }
    saver.free(hog).unwrap();
}

#[test]
fn an_attempt_leaves_alone_what_changed_since_the_one_before() {
    let _alone = alone();
    let platform: Arc<dyn Platform> = Arc::new(HostPlatform::new(1, 10 * GRANULE));
    let saver = Saver::new(platform).unwrap();
    let region = Region::new("w").with_backup("pinned");
    let fill = |granules: u64, region: &Region| {
        filled(&saver, 0, (granules * GRANULE) as usize, granules, region)
    };
    let first = fill(1, &region);
    let large = fill(4, &region);
    let replaced = fill(5, &region);
    pause(&saver);
    let ready = fill(1, &Region::new("ready").with_backup("pinned"));
    let hog = fill(7, &Region::new("hog"));
    let options = ResumeOptions::all().with_wait(Duration::from_secs(60));
    let op = saver
        .resume_ordered_async(&[large, replaced, ready], &options)
        .unwrap();
    until(|| op.is_ready(ready).unwrap());
    // What it found active is paused, and another allocation comes to where one was, while the
    // operation waits for memory.
    saver.pause(&PauseOptions::tags(["ready"])).status.unwrap();
    saver.free(replaced).unwrap();
    let other = fill(1, &region);
    assert_eq!(other, replaced);
    saver.pause(&PauseOptions::tags(["w"])).status.unwrap();
    saver.pause(&PauseOptions::tags(["hog"])).status.unwrap();
    let outcome = op.wait(None).unwrap();
    outcome.status.unwrap();
    assert_eq!(outcome.summary.done_count, 1);
    assert_eq!(state(&saver, large), State::Active);
    for address in [first, ready, other] {
        assert_eq!(state(&saver, address), State::Paused);
    }
    let gone = op.stream_wait(replaced, 0).unwrap_err();
    assert_eq!(gone.kind(), ErrorKind::NotFound);
    check(&saver, large, 4 * GRANULE as usize, 4);
    saver.free(hog).unwrap();
}

/// A stream of the host, made behind the library's back.
struct HostStream<'a> {
    fake: &'a FakeCuda,
    context: *mut c_void,
    stream: *mut c_void,
}

type Out = *mut *mut c_void;

impl<'a> HostStream<'a> {
    fn new(fake: &'a FakeCuda, device: i32) -> HostStream<'a> {
        let (mut context, mut stream) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: the types are the driver's.
        unsafe {
            let retain: unsafe extern "C" fn(Out, i32) -> i32 =
                fake.entry("cuDevicePrimaryCtxRetain");
            let push: unsafe extern "C" fn(*mut c_void) -> i32 = fake.entry("cuCtxPushCurrent_v2");
            let pop: unsafe extern "C" fn(Out) -> i32 = fake.entry("cuCtxPopCurrent_v2");
            let create: unsafe extern "C" fn(Out, u32) -> i32 = fake.entry("cuStreamCreate");
            let release: unsafe extern "C" fn(i32) -> i32 =
                fake.entry("cuDevicePrimaryCtxRelease_v2");
            assert_eq!(retain(&mut context, device), 0);
            assert_eq!(push(context), 0);
            assert_eq!(create(&mut stream, 1), 0);
            let mut popped = std::ptr::null_mut();
            assert_eq!(pop(&mut popped), 0);
            // The saver keeps the context.
            assert_eq!(release(device), 0);
        }
        HostStream {
            fake,
            context,
            stream,
        }
    }

    fn handle(&self) -> u64 {
        self.stream as u64
    }

    fn inside(&self, work: impl FnOnce() -> i32) {
        // SAFETY: the types are the driver's.
        unsafe {
            let push: unsafe extern "C" fn(*mut c_void) -> i32 =
                self.fake.entry("cuCtxPushCurrent_v2");
            let pop: unsafe extern "C" fn(Out) -> i32 = self.fake.entry("cuCtxPopCurrent_v2");
            assert_eq!(push(self.context), 0);
            assert_eq!(work(), 0);
            let mut popped = std::ptr::null_mut();
            assert_eq!(pop(&mut popped), 0);
        }
    }

    fn copy(&self, to: u64, from: u64, bytes: usize) {
        // SAFETY: the type is the driver's.
        self.inside(|| unsafe {
            let copy: unsafe extern "C" fn(u64, u64, usize, *mut c_void) -> i32 =
                self.fake.entry("cuMemcpyDtoDAsync_v2");
            copy(to, from, bytes, self.stream)
        });
    }

    fn synchronize(&self) {
        // SAFETY: the type is the driver's.
        self.inside(|| unsafe {
            let synchronize: unsafe extern "C" fn(*mut c_void) -> i32 =
                self.fake.entry("cuStreamSynchronize");
            synchronize(self.stream)
        });
    }
}

impl Drop for HostStream<'_> {
    fn drop(&mut self) {
        // SAFETY: the type is the driver's.
        self.inside(|| unsafe {
            let destroy: unsafe extern "C" fn(*mut c_void) -> i32 =
                self.fake.entry("cuStreamDestroy_v2");
            destroy(self.stream)
        });
    }
}

const BYTES: usize = 3 << 20;

/// Three paused allocations on device 0 and one active target for each.
fn layers(saver: &Saver, backup: &str) -> (Vec<u64>, Vec<u64>) {
    let region = Region::new("layers").with_backup(backup);
    let made = (0..3)
        .map(|seed| filled(saver, 0, BYTES, seed, &region))
        .collect();
    saver.pause(&PauseOptions::tags(["layers"])).status.unwrap();
    let targets = (10..13)
        .map(|seed| filled(saver, 0, BYTES, seed, &Region::new("target")))
        .collect();
    (made, targets)
}

#[test]
fn a_stream_of_the_host_waits_without_the_thread() {
    let Some(fake) = FakeCuda::loaded() else {
        println!("needs the software driver: not selected");
        return;
    };
    let _alone = alone();
    let saver = Saver::new(device::open("cuda").unwrap()).unwrap();
    let (made, targets) = layers(&saver, "pinned");
    let stream = HostStream::new(&fake, 0);
    fake.hold_streams(1);
    let op = start(&saver, &made);
    for (&from, &to) in made.iter().zip(&targets) {
        // Returns as soon as the copies are queued; none of them can have run.
        op.stream_wait(from + 5, stream.handle()).unwrap();
        stream.copy(to, from, BYTES);
    }
    assert!(!op.is_done());
    for &address in &made {
        assert!(!op.is_ready(address).unwrap());
        assert_eq!(state(&saver, address), State::Resuming);
    }
    assert_eq!(saver.close().unwrap_err().kind(), ErrorKind::Busy);
    fake.hold_streams(0);
    op.wait(None).unwrap().status.unwrap();
    stream.synchronize();
    for (seed, &target) in targets.iter().enumerate() {
        assert!(fake.holds(target, &pattern(BYTES, seed as u64)));
    }
    drop(stream);
    // Nothing of the saver is kept by an operation that has ended.
    drop(saver);
    assert_eq!(fake.live_streams() + fake.live_events(), 0);
    assert!(op.is_ready(made[0]).unwrap());
}

#[test]
fn order_and_contents_with_late_streams() {
    let Some(fake) = FakeCuda::loaded() else {
        println!("needs the software driver: not selected");
        return;
    };
    let _alone = alone();
    fake.set_late(1);
    let saver = Saver::new(device::open("cuda").unwrap()).unwrap();
    for backup in ["pinned", "mmap"] {
        let (made, targets) = layers(&saver, backup);
        for round in 0..8 {
            if round > 0 {
                saver.pause(&PauseOptions::tags(["layers"])).status.unwrap();
            }
            let order = [
                made[round % 3],
                made[(round + 1) % 3],
                made[(round + 2) % 3],
            ];
            let op = start(&saver, &order);
            let streams: Vec<HostStream> = (0..3).map(|_| HostStream::new(&fake, 0)).collect();
            std::thread::scope(|scope| {
                for ((&from, &to), stream) in made.iter().zip(&targets).zip(&streams) {
                    let (op, stream) = (&op, stream.handle());
                    // The handle is only a number to another thread.
                    scope
                        .spawn(move || op.stream_wait(from, stream).unwrap())
                        .join()
                        .unwrap();
                    streams
                        .iter()
                        .find(|own| own.handle() == stream)
                        .unwrap()
                        .copy(to, from, BYTES);
                }
            });
            while !op.is_done() {
                let ready = order.map(|address| op.is_ready(address).unwrap());
                // Asked one after the other, so later ones may look further than they were.
                let again = order.map(|address| op.is_ready(address).unwrap());
                assert!(
                    again[0] || !ready[1],
                    "{backup}: the second before the first"
                );
                assert!(
                    again[1] || !ready[2],
                    "{backup}: the third before the second"
                );
            }
            op.wait(None).unwrap().status.unwrap();
            for stream in &streams {
                stream.synchronize();
            }
            for (seed, &target) in targets.iter().enumerate() {
                assert!(
                    fake.holds(target, &pattern(BYTES, seed as u64)),
                    "{backup}, round {round}: {seed}"
                );
                saver.write(target, &pattern(BYTES, 99)).unwrap();
            }
        }
        for address in made.into_iter().chain(targets) {
            saver.free(address).unwrap();
        }
    }
    fake.set_late(0);
}

#[test]
fn a_copy_that_fails_in_the_middle() {
    let Some(fake) = FakeCuda::loaded() else {
        println!("needs the software driver: not selected");
        return;
    };
    let _alone = alone();
    let saver = Saver::new(device::open("cuda").unwrap()).unwrap();
    let (made, _) = layers(&saver, "pinned");
    fake.fail("cuMemcpyHtoDAsync_v2", 2, UNKNOWN, 1);
    let op = start(&saver, &made);
    op.stream_wait(made[0], 0).unwrap();
    assert_eq!(
        op.stream_wait(made[1], 0).unwrap_err().kind(),
        ErrorKind::Device
    );
    op.stream_wait(made[2], 0).unwrap();
    let outcome = op.wait(None).unwrap();
    fake.reset_faults();
    assert_eq!(outcome.status.unwrap_err().kind(), ErrorKind::Partial);
    assert_eq!(outcome.summary.done_count, 2);
    assert_eq!(outcome.summary.failures[0].address, made[1]);
    assert_eq!(state(&saver, made[1]), State::Paused);
    check(&saver, made[0], BYTES, 0);
    check(&saver, made[2], BYTES, 2);
    saver.resume(&ResumeOptions::all()).status.unwrap();
    check(&saver, made[1], BYTES, 1);
}

#[test]
fn freed_on_the_way() {
    let Some(fake) = FakeCuda::loaded() else {
        println!("needs the software driver: not selected");
        return;
    };
    let _alone = alone();
    let saver = Saver::new(device::open("cuda").unwrap()).unwrap();
    let scratch = filled(&saver, 0, BYTES, 7, &Region::new("scratch"));
    saver.pause(&PauseOptions::all()).status.unwrap();
    let (made, targets) = layers(&saver, "pinned");
    for target in targets {
        saver.free(target).unwrap();
    }
    let given = [scratch, made[0], made[1], made[2]];
    fake.hold_streams(1);
    let op = start(&saver, &given);
    // Without contents it is ready as soon as everything is mapped.
    until(|| op.is_ready(scratch).unwrap());
    assert_eq!(state(&saver, scratch), State::Active);
    let stats = saver.stats();
    let active: u64 = stats.iter().map(|entry| entry.active_count).sum();
    assert_eq!(active, 1);
    op.stream_wait(made[1], 0).unwrap();
    saver.free(scratch).unwrap();
    saver.free(made[1]).unwrap();
    assert!(saver.query(scratch).is_none() && saver.query(made[1]).is_none());
    assert_eq!(saver.free(scratch).unwrap_err().kind(), ErrorKind::NotFound);
    fake.hold_streams(0);
    op.wait(None).unwrap().status.unwrap();
    check(&saver, made[0], BYTES, 0);
    check(&saver, made[2], BYTES, 2);
    saver.free(made[0]).unwrap();
    saver.free(made[2]).unwrap();
    saver.pause(&PauseOptions::all()).status.unwrap();
    assert_eq!(fake.live_bytes(0), 0);

    // Freed between the call and the turn of the operation.
    let (made, targets) = layers(&saver, "pinned");
    fake.hold_streams(1);
    let busy = saver
        .pause_async(&PauseOptions::tags(["target"]).with_backup("pinned"))
        .unwrap();
    until(|| fake.pending_work() > 0);
    let op = start(&saver, &made);
    saver.free(made[0]).unwrap();
    fake.hold_streams(0);
    busy.wait(None).unwrap().status.unwrap();
    op.wait(None).unwrap().status.unwrap();
    let gone = op.stream_wait(made[0], 0).unwrap_err();
    assert_eq!(gone.kind(), ErrorKind::NotFound);
    check(&saver, made[1], BYTES, 1);
    drop(targets);
}

#[test]
fn cancelled_before_and_on_the_way() {
    let Some(fake) = FakeCuda::loaded() else {
        println!("needs the software driver: not selected");
        return;
    };
    let _alone = alone();
    let saver = Saver::new(device::open("cuda").unwrap()).unwrap();
    let (made, _) = layers(&saver, "pinned");
    fake.hold_streams(1);
    let busy = saver
        .pause_async(&PauseOptions::tags(["target"]).with_backup("pinned"))
        .unwrap();
    until(|| fake.pending_work() > 0);
    let op = start(&saver, &made);
    op.cancel();
    fake.hold_streams(0);
    busy.wait(None).unwrap().status.unwrap();
    let outcome = op.wait(None).unwrap();
    assert_eq!(outcome.status.unwrap_err().kind(), ErrorKind::Cancelled);
    for &address in &made {
        assert_eq!(state(&saver, address), State::Paused);
        assert_eq!(
            op.stream_wait(address, 0).unwrap_err().kind(),
            ErrorKind::Cancelled
        );
    }
    saver.resume(&ResumeOptions::all()).status.unwrap();

    // More than the staging memory holds, so that not all is queued when it is cancelled.
    let region = Region::new("large").with_backup("mmap");
    let large: Vec<u64> = (0..3)
        .map(|seed| filled(&saver, 0, 70 << 20, seed, &region))
        .collect();
    saver.pause(&PauseOptions::tags(["large"])).status.unwrap();
    fake.hold_streams(1);
    let op = start(&saver, &large);
    until(|| fake.pending_work() > 0);
    op.cancel();
    fake.hold_streams(0);
    let outcome = op.wait(None).unwrap();
    let failed: Vec<u64> = outcome
        .summary
        .failures
        .iter()
        .map(|failure| failure.address)
        .collect();
    assert!(
        failed.contains(&large[2]),
        "the last one cannot have been queued"
    );
    for (seed, &address) in large.iter().enumerate() {
        if failed.contains(&address) {
            assert_eq!(state(&saver, address), State::Paused);
            assert!(op.is_ready(address).is_err());
        } else {
            assert!(op.is_ready(address).unwrap());
            check(&saver, address, 70 << 20, seed as u64);
        }
    }
    saver.resume(&ResumeOptions::all()).status.unwrap();
    for (seed, &address) in large.iter().enumerate() {
        check(&saver, address, 70 << 20, seed as u64);
    }
}

#[test]
fn every_call_fails_once() {
    let Some(fake) = FakeCuda::loaded() else {
        println!("needs the software driver: not selected");
        return;
    };
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let saver = Saver::new(device::open("cuda").unwrap()).unwrap();
    let mut made = Vec::new();
    for (seed, backup) in ["pinned", "file", "pinned", "mmap"].into_iter().enumerate() {
        let region = Region::new("o")
            .with_backup(backup)
            .with_directory(folder.path());
        made.push(filled(&saver, seed as u32 % 2, BYTES, seed as u64, &region));
    }
    let contents: Vec<Vec<u8>> = (0..4).map(|seed| pattern(BYTES, seed)).collect();
    let order: Vec<u64> = made.iter().rev().copied().collect();
    let reserved = fake.reserved_bytes();
    let resume = || start(&saver, &order).wait(None).unwrap();
    for _ in 0..2 {
        pause(&saver);
        resume().status.unwrap();
    }
    pause(&saver);
    fake.reset_count();
    resume().status.unwrap();
    let calls = fake.count();
    assert!(calls > 30);
    for code in [2, UNKNOWN] {
        for (nth, repeat) in (1..=calls).flat_map(|nth| [(nth, 1), (nth, 3)]) {
            pause(&saver);
            let what = format!("call {nth} ({}) x{repeat} -> {code}", fake.call_name(nth));
            fake.reset_count();
            fake.fail_any(nth, code, repeat);
            let op = start(&saver, &order);
            let outcome = op.wait(None).unwrap();
            fake.reset_faults();
            for (seed, &address) in made.iter().enumerate() {
                let failed = outcome
                    .summary
                    .failures
                    .iter()
                    .any(|failure| failure.address == address);
                match op.is_ready(address) {
                    Ok(ready) => {
                        assert!(ready && !failed, "{what}: neither ready nor failed");
                        assert_eq!(state(&saver, address), State::Active, "{what}");
                        assert!(fake.holds(address, &contents[seed]), "{what}");
                    }
                    Err(_) => {
                        assert!(outcome.status.is_err(), "{what}");
                        assert_eq!(state(&saver, address), State::Paused, "{what}");
                    }
                }
            }
            let again = resume();
            assert!(again.status.is_ok(), "{what}; repeated: {:?}", again.status);
            for (seed, &address) in made.iter().enumerate() {
                assert!(fake.holds(address, &contents[seed]), "{what}");
            }
            assert_eq!(fake.reserved_bytes(), reserved, "{what}");
            assert_eq!(fake.live_bytes(0) + fake.live_bytes(1), 16 << 20, "{what}");
        }
    }
}
