//! Every driver call of a pause and of a resume fails once, with out-of-memory and with a code that
//! nobody knows; then every call from there on fails, and recovers. After each: a status, no byte
//! lost, the same call succeeds when repeated, and nothing is leaked. Needs the software driver
//! with two devices (`TMS_TEST_CUDA=1`, `FAKECUDA_DEVICES=2`).

mod support;

use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use support::{FakeCuda, pattern};
use tms_memcache::allocator::State;
use tms_memcache::device;
use tms_memcache::{Outcome, PauseOptions, Region, ResumeOptions, Saver};

const OUT_OF_MEMORY: i32 = 2;
const UNKNOWN: i32 = 12_345;

/// Faults are the process's, so the tests of this program take turns.
fn alone() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Set {
    saver: Saver,
    made: Vec<Made>,
}

struct Made {
    address: u64,
    contents: Vec<u8>,
    /// Whether a pause keeps the contents.
    kept: bool,
}

impl Set {
    fn new(folder: &Path) -> Set {
        let saver = Saver::new(device::open("cuda").unwrap()).unwrap();
        let mut made = Vec::new();
        let regions = [
            (Region::new("p").with_backup("pinned"), true),
            (
                Region::new("r").with_backup("pinned").with_retain(true),
                true,
            ),
            (Region::new("m").with_backup("mmap"), true),
            (
                Region::new("f").with_backup("file").with_directory(folder),
                true,
            ),
            (Region::new("n"), false),
        ];
        for (index, (region, kept)) in regions.into_iter().enumerate() {
            for device in 0..2 {
                let seed = (index * 2 + device) as u64;
                // Of one block or of two.
                let bytes = (2 << 20) - 5 + index % 2 * 1_000_003;
                made.push(Made {
                    address: support::filled(&saver, device as u32, bytes, seed, &region),
                    contents: pattern(bytes, seed),
                    kept,
                });
            }
        }
        Set { saver, made }
    }

    /// Contents of what is active, looked at without the driver: after a pause that failed all of
    /// it, after a resume what is kept.
    fn check_active(&self, fake: &FakeCuda, all: bool, what: &str) {
        for made in &self.made {
            let address = made.address;
            let state = self.saver.query(address).unwrap().state;
            assert!(
                matches!(state, State::Active | State::Paused),
                "{what}: {address:#x} is left {state:?}"
            );
            if state == State::Active && (made.kept || all) {
                assert!(
                    fake.holds(address, &made.contents),
                    "{what}: bytes lost at {address:#x}"
                );
            }
        }
    }

    fn refill(&self) {
        for made in self.made.iter().filter(|made| !made.kept) {
            self.saver.write(made.address, &made.contents).unwrap();
        }
    }

    fn all_are(&self, state: State) -> bool {
        self.made
            .iter()
            .all(|made| self.saver.query(made.address).unwrap().state == state)
    }

    fn bytes_on(&self, device: u32) -> u64 {
        self.made
            .iter()
            .map(|made| self.saver.query(made.address).unwrap())
            .filter(|info| info.device == device)
            .map(|info| info.bytes)
            .sum()
    }
}

fn check_leaks(fake: &FakeCuda, set: &Set, active: bool, reserved: u64, what: &str) {
    for device in 0..2 {
        let expected = if active { set.bytes_on(device) } else { 0 };
        assert_eq!(
            fake.live_bytes(device as i32),
            expected,
            "{what}: memory of {device}"
        );
        assert_eq!(
            fake.mapped_bytes(device as i32),
            expected,
            "{what}: mappings of {device}"
        );
    }
    assert_eq!(fake.reserved_bytes(), reserved, "{what}: address space");
}

fn failed(outcome: &Outcome) -> String {
    match &outcome.status {
        Ok(()) => "ok".to_string(),
        Err(error) => format!("{error:?}"),
    }
}

/// One round: bring the set to the beginning, break `nth`, run, check, repeat, check.
fn round(
    fake: &FakeCuda,
    set: &Set,
    pausing: bool,
    reserved: u64,
    what: &str,
    inject: impl FnOnce(),
) {
    if !pausing {
        set.saver.pause(&PauseOptions::all()).status.unwrap();
    }
    fake.reset_count();
    inject();
    let run = || match pausing {
        true => set.saver.pause(&PauseOptions::all()),
        false => set.saver.resume(&ResumeOptions::all()),
    };
    let first = run();
    fake.reset_faults();
    let what = format!("{what}: {}", failed(&first));
    set.check_active(fake, pausing, &what);
    if first.status.is_ok() {
        let end = if pausing {
            State::Paused
        } else {
            State::Active
        };
        assert!(set.all_are(end), "{what}: success, but not all done");
    }
    let second = run();
    assert!(
        second.status.is_ok(),
        "{what}; repeated: {}",
        failed(&second)
    );
    if pausing {
        assert!(set.all_are(State::Paused), "{what}");
        check_leaks(fake, set, false, reserved, &what);
        set.saver.resume(&ResumeOptions::all()).status.unwrap();
    }
    assert!(set.all_are(State::Active), "{what}");
    set.check_active(fake, false, &what);
    check_leaks(fake, set, true, reserved, &what);
    set.refill();
}

#[test]
fn every_call_of_pause_and_resume_fails_once() {
    let Some(fake) = FakeCuda::loaded() else {
        println!("needs the software driver: not selected");
        return;
    };
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let before = fake.reserved_bytes();
    let set = Set::new(folder.path());
    let reserved = fake.reserved_bytes();
    // The first cycle creates streams, staging and events; later ones are alike.
    for pausing in [true, false, true, false] {
        round(&fake, &set, pausing, reserved, "warm-up", || {});
    }
    for pausing in [true, false] {
        let verb = if pausing { "pause" } else { "resume" };
        if !pausing {
            set.saver.pause(&PauseOptions::all()).status.unwrap();
        }
        fake.reset_count();
        let counted = match pausing {
            true => set.saver.pause(&PauseOptions::all()),
            false => set.saver.resume(&ResumeOptions::all()),
        };
        counted.status.unwrap();
        let calls = fake.count();
        if pausing {
            set.saver.resume(&ResumeOptions::all()).status.unwrap();
        }
        set.refill();
        println!("{verb}: {calls} driver calls");
        assert!(calls > 50);
        for code in [OUT_OF_MEMORY, UNKNOWN] {
            for nth in 1..=calls {
                let what = format!("{verb}, call {nth} ({}) -> {code}", fake.call_name(nth));
                round(&fake, &set, pausing, reserved, &what, || {
                    fake.fail_any(nth, code, 1)
                });
            }
        }
        // The failure of an undo: everything fails from some call on, then the driver recovers.
        for nth in (1..=calls).step_by(4) {
            for repeat in [2, 5, -1] {
                let what = format!("{verb}, calls from {nth} on, {repeat} of them");
                round(&fake, &set, pausing, reserved, &what, || {
                    fake.fail_any(nth, UNKNOWN, repeat);
                });
            }
        }
    }
    drop(set);
    assert_eq!(fake.reserved_bytes(), before);
    assert_eq!(fake.live_bytes(0) + fake.live_bytes(1), 0);
    assert_eq!(fake.registered_bytes(), 0);
    assert_eq!(fake.live_streams(), 0);
    assert_eq!(fake.live_events(), 0);
}

#[test]
fn every_call_of_malloc_and_free_fails_once() {
    let Some(fake) = FakeCuda::loaded() else {
        println!("needs the software driver: not selected");
        return;
    };
    let _alone = alone();
    let saver = Saver::new(device::open("cuda").unwrap()).unwrap();
    let region = Region::new("t").with_backup("pinned");
    let cycle = || -> Result<(), tms_memcache::Error> {
        let address = saver.malloc(3 << 20, Some(0), &region)?;
        saver.free(address)
    };
    cycle().unwrap();
    let reserved = fake.reserved_bytes();
    fake.reset_count();
    cycle().unwrap();
    let calls = fake.count();
    for code in [OUT_OF_MEMORY, UNKNOWN] {
        for nth in 1..=calls {
            let what = format!("call {nth} ({}) -> {code}", fake.call_name(nth));
            fake.fail_any(nth, code, 1);
            let status = cycle();
            fake.reset_faults();
            if let Err(error) = status {
                assert!(error.code() < 0, "{what}");
            }
            // What could not be given back goes with the next operation.
            saver.pause(&PauseOptions::all()).status.unwrap();
            assert_eq!(fake.live_bytes(0), 0, "{what}");
            assert_eq!(fake.reserved_bytes(), reserved, "{what}");
            cycle().unwrap();
        }
    }
}

#[test]
fn a_lost_device_keeps_host_backups_readable() {
    let Some(fake) = FakeCuda::loaded() else {
        println!("needs the software driver: not selected");
        return;
    };
    let _alone = alone();
    let saver = Saver::new(device::open("cuda").unwrap()).unwrap();
    let region = Region::new("t").with_backup("pinned");
    let address = support::filled(&saver, 0, 3 << 20, 5, &region);
    saver.pause(&PauseOptions::all()).status.unwrap();
    fake.fail_any_effect(1, 700);
    let outcome = saver.resume(&ResumeOptions::all());
    assert_eq!(
        outcome.status.unwrap_err().kind(),
        tms_memcache::ErrorKind::DeviceLost
    );
    let backup = saver.backup_pointer(address, 3 << 20).unwrap();
    // SAFETY: the backup has that length and nobody writes to it.
    let bytes = unsafe { std::slice::from_raw_parts(backup.as_ptr(), 3 << 20) };
    assert!(bytes == pattern(3 << 20, 5));
    fake.reset_faults();
    saver.resume(&ResumeOptions::all()).status.unwrap();
    support::check(&saver, address, 3 << 20, 5);
}

#[test]
fn memory_of_a_copy_that_may_still_run_is_not_given_to_others() {
    let Some(fake) = FakeCuda::loaded() else {
        println!("needs the software driver: not selected");
        return;
    };
    let _alone = alone();
    let saver = Saver::new(device::open("cuda").unwrap()).unwrap();
    let region = Region::new("q").with_backup("pinned").with_retain(true);
    let other = Region::new("b").with_backup("pinned").with_retain(true);
    let a = support::filled(&saver, 0, 3 << 20, 1, &region);
    support::filled(&saver, 0, 3 << 20, 2, &other);
    saver.pause(&PauseOptions::all()).status.unwrap();
    saver.resume(&ResumeOptions::all()).status.unwrap();
    let used = saver.arena_use().used;
    // The copy is queued but does not run, and the device cannot be asked about it.
    fake.hold_streams(1);
    fake.fail("cuStreamSynchronize", 1, UNKNOWN, 1);
    fake.fail("cuCtxSynchronize", 2, UNKNOWN, -1);
    // Everything is copied: a comparison would have to be waited for first.
    let pause = PauseOptions::tags(["q"]).with_copy_all(true);
    assert!(saver.pause(&pause).status.is_err());
    saver.free(a).unwrap();
    let (kept, pending) = (saver.arena_use().used, fake.pending_work());
    fake.reset_faults();
    fake.hold_streams(0);
    assert!(pending > 0);
    assert_eq!(kept, used, "the block is free while a copy writes to it");
    saver.pause(&PauseOptions::all()).status.unwrap();
    assert!(
        saver.arena_use().used < used,
        "given back once the device answers"
    );
}

#[test]
fn an_export_that_failed_does_not_forbid_pauses() {
    let Some(fake) = FakeCuda::loaded() else {
        println!("needs the software driver: not selected");
        return;
    };
    let _alone = alone();
    let saver = Saver::new(device::open("cuda").unwrap()).unwrap();
    let region = Region::new("x").with_exportable(true);
    let address = saver.malloc(1, Some(0), &region).unwrap();
    fake.fail("cuMemExportToShareableHandle", 1, UNKNOWN, 1);
    assert!(saver.export(address).is_err());
    fake.reset_faults();
    saver.pause(&PauseOptions::all()).status.unwrap();
}
