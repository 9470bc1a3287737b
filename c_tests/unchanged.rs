//! Memory that a retained backup has already is not copied again, and every change is found: of one
//! bit anywhere, after failures of any call, after edits of the backup, with retention switched on and
//! off. On the host device always; on CUDA with `TMS_TEST_CUDA=1`, with faults where that is the
//! software driver (two devices).

mod support;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use support::{FakeCuda, filled, pattern};
use tms_memcache::allocator::{State, region};
use tms_memcache::device::{self, Platform, host::HostPlatform};
use tms_memcache::{Outcome, PauseOptions, Region, ResumeOptions, Saver, Summary};

const BLOCK: u64 = 2 << 20;
const UNKNOWN: i32 = 12_345;

/// Faults and settings are the process's, so the tests of this program take turns.
fn alone() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn savers() -> impl Iterator<Item = Saver> {
    let mut platforms: Vec<Arc<dyn Platform>> = vec![Arc::new(HostPlatform::new(2, 4 << 30))];
    if support::cuda_selected() {
        platforms.push(device::open("cuda").unwrap());
    }
    platforms
        .into_iter()
        .map(|platform| Saver::new(platform).unwrap())
}

fn retaining() -> Region {
    Region::new("w").with_backup("pinned").with_retain(true)
}

fn pause(saver: &Saver) -> Summary {
    let outcome = saver.pause(&PauseOptions::all());
    outcome.status.unwrap();
    outcome.summary
}

fn resume(saver: &Saver) {
    saver.resume(&ResumeOptions::all()).status.unwrap();
}

/// What a pause copied and what it left out, in blocks.
fn blocks(summary: &Summary) -> (u64, u64) {
    assert_eq!(summary.copied_bytes % BLOCK, 0);
    assert_eq!(summary.unchanged_bytes % BLOCK, 0);
    (
        summary.copied_bytes / BLOCK,
        summary.unchanged_bytes / BLOCK,
    )
}

/// Random, and the same in every run.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// An allocation and what must be in it.
struct Mirror {
    address: u64,
    bytes: Vec<u8>,
}

impl Mirror {
    fn new(saver: &Saver, device: u32, bytes: usize, seed: u64, region: &Region) -> Mirror {
        Mirror {
            address: filled(saver, device, bytes, seed, region),
            bytes: pattern(bytes, seed),
        }
    }

    fn flip(&mut self, saver: &Saver, bit: u64) {
        let at = (bit / 8) as usize;
        self.bytes[at] ^= 1 << (bit % 8);
        saver
            .write(self.address + at as u64, &self.bytes[at..=at])
            .unwrap();
    }

    fn check(&self, saver: &Saver) {
        let mut got = vec![0; self.bytes.len()];
        saver.read(self.address, &mut got).unwrap();
        assert!(got == self.bytes, "contents of {:#x} differ", self.address);
    }
}

#[test]
fn one_bit_anywhere_is_found() {
    let _alone = alone();
    for saver in savers() {
        let bytes = 5 * BLOCK as usize - 12_345;
        let mut a = Mirror::new(&saver, 0, bytes, 1, &retaining());
        let b = Mirror::new(&saver, 0, BLOCK as usize, 2, &retaining());
        assert_eq!(blocks(&pause(&saver)), (6, 0));
        resume(&saver);
        let bits = bytes as u64 * 8;
        let mut dice = Dice(0x1234_5678_9abc_def1);
        let mut places = vec![0, 7, bits - 1, bits - 8];
        for border in 1..5 {
            let border = border * BLOCK * 8;
            places.extend([border - 1, border, border + 127]);
        }
        places.extend((0..24).map(|_| dice.below(bits)));
        for bit in places {
            a.flip(&saver, bit);
            assert_eq!(blocks(&pause(&saver)), (1, 5), "bit {bit}");
            resume(&saver);
            a.check(&saver);
            b.check(&saver);
        }
        // Bytes behind those that were asked for belong to the allocation all the same.
        saver
            .write(a.address + bytes as u64 + 12_344, &[1])
            .unwrap();
        assert_eq!(blocks(&pause(&saver)), (1, 5));
        resume(&saver);
        a.check(&saver);
    }
}

#[test]
fn neighbours_gaps_and_several_allocations() {
    let _alone = alone();
    for saver in savers() {
        let devices = saver.platform().device_count().min(2);
        let mut made: Vec<Mirror> = (0..6)
            .map(|seed| {
                let bytes = (seed as usize % 3 * 3 + 1) * BLOCK as usize;
                Mirror::new(&saver, seed as u32 % devices, bytes, seed, &retaining())
            })
            .collect();
        let all: u64 = made.iter().map(|one| one.bytes.len() as u64 / BLOCK).sum();
        assert_eq!(blocks(&pause(&saver)), (all, 0));
        resume(&saver);
        let mut dice = Dice(99);
        for round in 0..12 {
            let mut changed = std::collections::BTreeSet::new();
            for (index, one) in made.iter_mut().enumerate() {
                for _ in 0..dice.below(4) {
                    let bit = dice.below(one.bytes.len() as u64 * 8);
                    if changed.insert((index, bit / 8 / BLOCK)) {
                        one.flip(&saver, bit);
                    }
                }
            }
            let count = changed.len() as u64;
            let options = PauseOptions::all();
            let op = saver.pause_async(&options).unwrap();
            let summary = op.wait(None).unwrap().summary;
            assert_eq!(blocks(&summary), (count, all - count), "round {round}");
            assert_eq!(op.progress(), (all * BLOCK, all * BLOCK));
            resume(&saver);
            for one in &made {
                one.check(&saver);
            }
        }
    }
}

/// More blocks than are decided about at once. Gigabytes, so only where the host is all there is.
#[test]
fn more_than_a_group() {
    if support::cuda_selected() {
        println!("tested without a driver");
        return;
    }
    let _alone = alone();
    let saver = Saver::new(Arc::new(HostPlatform::new(1, 4 << 30))).unwrap();
    let region = retaining();
    let small = saver.malloc(7 * BLOCK, None, &region).unwrap();
    let large = saver.malloc(1_100 * BLOCK, None, &region).unwrap();
    assert_eq!(blocks(&pause(&saver)), (1_107, 0));
    resume(&saver);
    // Across the border of the first group and at that of the second; then behind the first, and the
    // last block of all.
    for changed in [[(504, 2), (1_016, 1)], [(511, 3), (1_099, 1)]] {
        for (at, bytes) in changed {
            let data = vec![3; (bytes - 1) as usize * BLOCK as usize + 1];
            saver.write(large + at * BLOCK + 77, &data).unwrap();
        }
        let count = changed.iter().map(|&(_, bytes)| bytes).sum();
        assert_eq!(blocks(&pause(&saver)), (count, 1_107 - count));
        resume(&saver);
        for (at, bytes) in changed {
            let from = large + at * BLOCK + 77;
            let mut got = [0; 2];
            saver.read(from - 1, &mut got).unwrap();
            assert_eq!(got, [0, 3]);
            saver.read(from + (bytes - 1) * BLOCK, &mut got).unwrap();
            assert_eq!(got, [3, 0]);
        }
    }
    assert_eq!(blocks(&pause(&saver)), (0, 1_107));
    resume(&saver);
    let mut got = [9];
    saver.read(small, &mut got).unwrap();
    assert_eq!(got, [0]);
}

#[test]
fn a_backup_that_was_handed_out_is_always_copied() {
    let _alone = alone();
    for saver in savers() {
        let mut a = Mirror::new(&saver, 0, 3 * BLOCK as usize, 1, &retaining());
        let b = Mirror::new(&saver, 0, 2 * BLOCK as usize, 2, &retaining());
        pause(&saver);
        let backup = saver.backup_pointer(a.address, 1).unwrap();
        // SAFETY: the backup is writable for its owner while it exists.
        unsafe { backup.as_ptr().add(5).write(0xee) };
        a.bytes[5] = 0xee;
        resume(&saver);
        a.check(&saver);
        // Nothing changed on the device, but nobody knows about the backup.
        assert_eq!(blocks(&pause(&saver)), (3, 2));
        resume(&saver);
        // SAFETY: as above. An edit while active is lost, not kept in place of what is active.
        unsafe { backup.as_ptr().add(6).write(!a.bytes[6]) };
        assert_eq!(blocks(&pause(&saver)), (3, 2));
        resume(&saver);
        a.check(&saver);
        b.check(&saver);
    }
}

#[test]
fn switched_off_and_on() {
    let _alone = alone();
    for saver in savers() {
        // Follows the setting of the process.
        let region = Region::new("w").with_backup("pinned");
        let mut a = Mirror::new(&saver, 0, 4 * BLOCK as usize, 1, &region);
        let mut cycle = |expected: (u64, u64), options: PauseOptions, bit: Option<u64>| {
            if let Some(bit) = bit {
                a.flip(&saver, bit);
            }
            let outcome = saver.pause(&options);
            outcome.status.unwrap();
            assert_eq!(blocks(&outcome.summary), expected);
            resume(&saver);
            a.check(&saver);
        };
        let plain = PauseOptions::all;
        region::set_retain(true);
        cycle((4, 0), plain(), None);
        cycle((0, 4), plain(), None);
        region::set_retain(false);
        // The backup goes with this resume, so the next pause has nothing to compare with.
        cycle((4, 0), plain(), Some(12));
        region::set_retain(true);
        cycle((4, 0), plain(), None);
        cycle((1, 3), plain(), Some(34_000_000));
        cycle((4, 0), plain().with_copy_all(true), Some(5));
        // What was copied without a look has no fingerprints.
        cycle((4, 0), plain(), None);
        cycle((0, 4), plain(), None);
        // SAFETY: tests that read the environment take turns in this program.
        unsafe { std::env::set_var("TMS_UNCHANGED_CHECK", "0") };
        cycle((4, 0), plain(), None);
        // SAFETY: as above.
        unsafe { std::env::remove_var("TMS_UNCHANGED_CHECK") };
        cycle((4, 0), plain(), None);
        cycle((0, 4), plain(), None);
        cycle((4, 0), plain().with_backup("mmap"), Some(6));
        cycle((4, 0), plain(), Some(7));
        cycle((0, 4), plain(), None);
        region::set_retain(false);
    }
}

#[test]
fn dropped_contents_are_not_taken_for_kept() {
    let _alone = alone();
    for saver in savers() {
        let a = Mirror::new(&saver, 0, 2 * BLOCK as usize, 1, &retaining());
        pause(&saver);
        resume(&saver);
        saver
            .pause(&PauseOptions::all().with_backup("none"))
            .status
            .unwrap();
        resume(&saver);
        // Zeroes now, which is what must come back.
        assert_eq!(blocks(&pause(&saver)), (2, 0));
        resume(&saver);
        let mut got = vec![1; a.bytes.len()];
        saver.read(a.address, &mut got).unwrap();
        assert!(got.iter().all(|&byte| byte == 0));
        // Freed and allocated anew, likely at the same address, with the same contents.
        pause(&saver);
        saver.free(a.address).unwrap();
        let again = Mirror::new(&saver, 0, 2 * BLOCK as usize, 1, &retaining());
        assert_eq!(blocks(&pause(&saver)), (2, 0));
        resume(&saver);
        again.check(&saver);
    }
}

/// Without room for the lists everything is copied, and the pause succeeds.
#[test]
fn a_limit_that_leaves_no_room_turns_the_check_off() {
    let _alone = alone();
    // SAFETY: tests that read the environment take turns in this program.
    unsafe { std::env::set_var("TMS_PINNED_LIMIT", "8MB") };
    let made: Vec<Saver> = savers().collect();
    // SAFETY: as above.
    unsafe { std::env::remove_var("TMS_PINNED_LIMIT") };
    for saver in made {
        // Without the ring: it takes more than there is.
        let region = retaining();
        let a = saver.malloc(4 * BLOCK, None, &region).unwrap();
        for _ in 0..3 {
            assert_eq!(blocks(&pause(&saver)), (4, 0));
            assert_eq!(saver.query(a).unwrap().state, State::Paused);
            resume(&saver);
        }
        saver.free(a).unwrap();
        // With room it works, in the same saver.
        saver.malloc(2 * BLOCK, None, &region).unwrap();
        assert_eq!(blocks(&pause(&saver)), (2, 0));
        resume(&saver);
        assert_eq!(blocks(&pause(&saver)), (0, 2));
    }
}

#[test]
fn freed_during_a_pause() {
    let Some(fake) = FakeCuda::loaded() else {
        println!("needs the software driver: not selected");
        return;
    };
    let _alone = alone();
    let saver = Saver::new(device::open("cuda").unwrap()).unwrap();
    let a = Mirror::new(&saver, 0, 3 * BLOCK as usize, 1, &retaining());
    let b = Mirror::new(&saver, 0, 3 * BLOCK as usize, 2, &retaining());
    pause(&saver);
    resume(&saver);
    fake.hold_streams(1);
    let op = saver.pause_async(&PauseOptions::all()).unwrap();
    while fake.pending_work() == 0 {
        std::thread::yield_now();
    }
    saver.free(a.address).unwrap();
    fake.hold_streams(0);
    op.wait(None).unwrap().status.unwrap();
    assert!(saver.query(a.address).is_none());
    resume(&saver);
    b.check(&saver);
    assert_eq!(blocks(&pause(&saver)), (0, 3));
    assert_eq!(fake.live_bytes(0), 0);
}

fn described(outcome: &Outcome) -> String {
    match &outcome.status {
        Ok(()) => "ok".to_string(),
        Err(error) => format!("{error:?}"),
    }
}

/// Every driver call of a pause fails, with changes before it, which are undone after it or followed by
/// others: what comes back is what was there last.
#[test]
fn every_call_fails_once() {
    let Some(fake) = FakeCuda::loaded() else {
        println!("needs the software driver: not selected");
        return;
    };
    let _alone = alone();
    let saver = Saver::new(device::open("cuda").unwrap()).unwrap();
    let mut made: Vec<Mirror> = (0..4)
        .map(|seed| {
            let bytes = (1 + seed as usize % 2) * BLOCK as usize;
            Mirror::new(&saver, seed as u32 % 2, bytes, seed, &retaining())
        })
        .collect();
    let cycle = |saver: &Saver| {
        let summary = pause(saver);
        resume(saver);
        summary
    };
    assert_eq!(blocks(&cycle(&saver)), (6, 0));
    assert_eq!(blocks(&cycle(&saver)), (0, 6));
    let mut dice = Dice(4_711);
    let mut change = |made: &mut Vec<Mirror>, count: u64| -> Vec<(usize, u64)> {
        let mut flipped = Vec::new();
        for _ in 0..count {
            let index = dice.below(made.len() as u64) as usize;
            let bit = dice.below(made[index].bytes.len() as u64 * 8);
            made[index].flip(&saver, bit);
            flipped.push((index, bit));
        }
        flipped
    };
    let kept = |made: &[Mirror], what: &str| {
        for one in made {
            let state = saver.query(one.address).unwrap().state;
            assert!(
                state != State::Active || fake.holds(one.address, &one.bytes),
                "{what}: {:#x}",
                one.address
            );
        }
    };
    change(&mut made, 6);
    fake.reset_count();
    pause(&saver);
    let calls = fake.count();
    resume(&saver);
    assert!(calls > 30);
    let mut failures = 0;
    for nth in 1..=calls {
        for (code, repeat, undo) in [(2, 1, false), (UNKNOWN, 1 + nth as i32 % 2 * 3, true)] {
            let changes = change(&mut made, 4);
            let what = format!("call {nth} ({}) x{repeat} -> {code}", fake.call_name(nth));
            fake.reset_count();
            fake.fail_any(nth, code, repeat);
            let outcome = saver.pause(&PauseOptions::all());
            fake.reset_faults();
            let what = format!("{what}: {}", described(&outcome));
            failures += u64::from(outcome.status.is_err());
            kept(&made, &what);
            // Without a resume, where nothing was paused: what was copied must not count.
            resume(&saver);
            kept(&made, &what);
            if undo {
                for (index, bit) in changes {
                    made[index].flip(&saver, bit);
                }
            } else {
                change(&mut made, 1);
            }
            let summary = cycle(&saver);
            assert_eq!(summary.copied_bytes + summary.unchanged_bytes, 6 * BLOCK);
            kept(&made, &what);
            if nth % 4 == 0 {
                assert_eq!(blocks(&cycle(&saver)), (0, 6), "{what}");
            }
        }
    }
    assert!(failures > calls / 2, "faults were noticed");
    drop(made);
    drop(saver);
    assert_eq!(fake.registered_bytes(), 0);
    assert_eq!(fake.live_streams() + fake.live_events(), 0);
}

#[test]
fn late_streams_and_memory_the_host_cannot_read() {
    let Some(fake) = FakeCuda::loaded() else {
        println!("needs the software driver: not selected");
        return;
    };
    let _alone = alone();
    fake.set_late(1);
    fake.set_host_unreadable(1);
    let saver = Saver::new(device::open("cuda").unwrap()).unwrap();
    let mut made: Vec<Mirror> = (0..4)
        .map(|seed| Mirror::new(&saver, seed as u32 % 2, 5 << 20, seed, &retaining()))
        .collect();
    pause(&saver);
    resume(&saver);
    for round in 0..8u64 {
        let one = &mut made[round as usize % 4];
        let bit = round * 4_999_999 % (one.bytes.len() as u64 * 8);
        one.flip(&saver, bit);
        assert_eq!(blocks(&pause(&saver)), (1, 11), "round {round}");
        resume(&saver);
        for one in &made {
            one.check(&saver);
        }
    }
    fake.set_late(0);
    fake.set_host_unreadable(0);
}
