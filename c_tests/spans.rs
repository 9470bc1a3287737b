//! Handles that span several allocations: made by a resume, gone with a pause, with holes between.
//! On the host device always; on CUDA with `TMS_TEST_CUDA=1`.

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};

use support::{FakeCuda, check, filled, pattern};
use tms_memcache::device::{self, Platform};
use tms_memcache::{ErrorKind, PauseOptions, Region, ResumeOptions, Saver};

const GRANULE: usize = 2 << 20;

/// Tests that count handles of the driver run one at a time.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn savers() -> Vec<Saver> {
    let mut platforms: Vec<Arc<dyn Platform>> = vec![device::open("host").unwrap()];
    if support::cuda_selected() {
        platforms.push(device::open("cuda").unwrap());
    }
    let saver = |platform| Saver::new(platform).unwrap();
    platforms.into_iter().map(saver).collect()
}

fn cycle(saver: &Saver) {
    saver.pause(&PauseOptions::all()).status.unwrap();
    saver.resume(&ResumeOptions::all()).status.unwrap();
}

fn held_bytes(saver: &Saver) -> u64 {
    saver.stats().iter().map(|stats| stats.held_bytes).sum()
}

#[test]
fn neighbours_share_a_handle_after_a_resume_and_freed_ones_leave_holes() {
    let _alone = alone();
    for saver in savers() {
        let region = Region::new("w").with_backup("pinned");
        let mut made: Vec<(u64, u64)> = (0..8)
            .map(|seed| (filled(&saver, 0, GRANULE, seed, &region), seed))
            .collect();
        for pair in made.windows(2) {
            assert_eq!(pair[1].0, pair[0].0 + GRANULE as u64, "neighbours");
        }
        for _ in 0..2 {
            cycle(&saver);
            for &(address, seed) in &made {
                check(&saver, address, GRANULE, seed);
            }
            assert_eq!(held_bytes(&saver), 0);
        }
        // Two of them go, apart from each other.
        let gone: Vec<u64> = [5, 2].iter().map(|&index| made.remove(index).0).collect();
        for &address in &gone {
            saver.free(address).unwrap();
            assert_eq!(
                saver.read(address, &mut [0]).unwrap_err().kind(),
                ErrorKind::NotFound
            );
        }
        assert_eq!(held_bytes(&saver), 2 * GRANULE as u64);
        // Their memory is for the same class only, and comes zeroed.
        let other = saver
            .malloc(GRANULE as u64, Some(0), &Region::new("w"))
            .unwrap();
        assert!(!gone.contains(&other));
        let reused = saver.malloc(GRANULE as u64, Some(0), &region).unwrap();
        assert!(gone.contains(&reused));
        let mut bytes = vec![1; GRANULE];
        saver.read(reused, &mut bytes).unwrap();
        assert!(bytes.iter().all(|&byte| byte == 0), "what another wrote");
        saver.write(reused, &pattern(GRANULE, 99)).unwrap();
        made.push((reused, 99));
        assert_eq!(held_bytes(&saver), GRANULE as u64);
        // The hole that is left goes with the next pause.
        cycle(&saver);
        assert_eq!(held_bytes(&saver), 0);
        for &(address, seed) in &made {
            check(&saver, address, GRANULE, seed);
        }
        // And a span goes with its last allocation.
        for (address, _) in made {
            saver.free(address).unwrap();
        }
        saver.free(other).unwrap();
        assert!(saver.stats().is_empty());
        assert_eq!(
            saver.overhead(),
            (0, 0),
            "memory or addresses are left over"
        );
    }
}

#[test]
fn one_handle_spans_at_most_a_gibibyte_and_never_an_exportable_allocation() {
    let _alone = alone();
    let Some(fake) = FakeCuda::loaded() else {
        println!("needs the software driver: not selected");
        return;
    };
    let saver = Saver::new(device::open("cuda").unwrap()).unwrap();
    let handles = fake.live_handles(0);
    let count = |tag: &str, sizes: &[u64], exportable: bool| {
        let region = Region::new(tag).with_exportable(exportable);
        let made: Vec<u64> = sizes
            .iter()
            .map(|&bytes| saver.malloc(bytes, Some(0), &region).unwrap())
            .collect();
        assert_eq!(fake.live_handles(0) - handles, sizes.len() as u64, "{tag}");
        cycle(&saver);
        let now = fake.live_handles(0) - handles;
        for address in made {
            saver.free(address).unwrap();
        }
        assert_eq!(fake.live_handles(0), handles, "{tag}");
        now
    };
    let mib = 1 << 20;
    assert_eq!(count("small", &[32 * mib; 16], false), 1);
    assert_eq!(count("large", &[600 * mib; 3], false), 3);
    assert_eq!(count("exact", &[512 * mib, 512 * mib, 2 * mib], false), 2);
    assert_eq!(count("exported", &[32 * mib; 16], true), 16);
    // What was allocated since the last resume has handles of its own, and gives them back.
    let region = Region::new("late");
    let early: Vec<u64> = (0..4)
        .map(|_| saver.malloc(mib, Some(0), &region).unwrap())
        .collect();
    cycle(&saver);
    let bytes = fake.live_bytes(0);
    let late = saver.malloc(32 * mib, Some(0), &region).unwrap();
    assert_eq!(fake.live_bytes(0), bytes + 32 * mib);
    saver.free(late).unwrap();
    assert_eq!(fake.live_bytes(0), bytes);
    for address in early {
        saver.free(address).unwrap();
    }
    assert_eq!(fake.live_bytes(0), 0);
}

#[test]
fn an_allocation_that_cannot_be_loaded_stays_paused_among_active_neighbours() {
    let _alone = alone();
    for saver in savers() {
        let folder = tempfile::tempdir().unwrap();
        let region = Region::new("w")
            .with_backup("file")
            .with_directory(folder.path());
        let made: Vec<u64> = (0..3)
            .map(|seed| filled(&saver, 0, GRANULE, seed, &region))
            .collect();
        saver.pause(&PauseOptions::all()).status.unwrap();
        let spoil = || {
            let mut files: Vec<_> = std::fs::read_dir(folder.path())
                .unwrap()
                .flatten()
                .map(|entry| entry.path())
                .filter(|path| path.extension().is_some_and(|ending| ending == "bin"))
                .collect();
            files.sort();
            let path = &files[1];
            let mut bytes = std::fs::read(path).unwrap();
            let at = bytes.len() / 2;
            bytes[at] ^= 1;
            std::fs::write(path, bytes).unwrap();
        };
        spoil();
        let outcome = saver.resume(&ResumeOptions::all());
        assert_eq!(outcome.status.unwrap_err().kind(), ErrorKind::Partial);
        let failed = outcome.summary.failures[0].address;
        let index = made.iter().position(|&address| address == failed).unwrap();
        for (seed, &address) in made.iter().enumerate() {
            if address != failed {
                check(&saver, address, GRANULE, seed as u64);
            }
        }
        assert!(saver.read(failed, &mut [0]).is_err());
        // The neighbours leave, with the memory it had; it can still come back.
        saver.pause(&PauseOptions::all()).status.unwrap();
        assert_eq!(saver.overhead().0, 0, "memory is left over");
        spoil();
        saver.resume(&ResumeOptions::all()).status.unwrap();
        check(&saver, failed, GRANULE, index as u64);
        for address in made {
            saver.free(address).unwrap();
        }
        assert_eq!(saver.overhead(), (0, 0));
    }
}

#[test]
fn every_call_of_a_free_within_a_span_fails_once() {
    let _alone = alone();
    let Some(fake) = FakeCuda::loaded() else {
        println!("needs the software driver: not selected");
        return;
    };
    let saver = Saver::new(device::open("cuda").unwrap()).unwrap();
    let region = Region::new("w").with_backup("pinned");
    let fill = |count: u64| -> Vec<u64> {
        (0..count)
            .map(|seed| filled(&saver, 0, GRANULE, seed, &region))
            .collect()
    };
    let run = |nth: u64, code: i32| {
        let made = fill(4);
        cycle(&saver);
        fake.reset_count();
        if nth > 0 {
            fake.fail_any(nth, code, 1);
        }
        saver.free(made[1]).unwrap();
        let again = saver.malloc(GRANULE as u64, Some(0), &region);
        saver.free(made[0]).unwrap();
        saver.free(made[3]).unwrap();
        let calls = fake.count();
        fake.reset_faults();
        check(&saver, made[2], GRANULE, 2);
        cycle(&saver);
        check(&saver, made[2], GRANULE, 2);
        saver.free(made[2]).unwrap();
        if let Ok(address) = again {
            saver.free(address).unwrap();
        }
        saver.pause(&PauseOptions::all()).status.unwrap();
        assert_eq!(fake.live_bytes(0), 0, "call {nth} -> {code}");
        assert_eq!(saver.overhead(), (0, 0), "call {nth} -> {code}");
        calls
    };
    run(0, 0);
    let calls = run(0, 0);
    assert!(calls > 10);
    for code in [2, 999] {
        for nth in 1..=calls {
            run(nth, code);
        }
    }
}

#[test]
fn frees_and_mallocs_of_a_class_race_with_its_pauses() {
    let _alone = alone();
    for saver in savers() {
        let region = Region::new("w").with_backup("pinned");
        let kept: Vec<u64> = (0..4)
            .map(|seed| filled(&saver, 0, GRANULE, seed, &region))
            .collect();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !done.load(Ordering::Relaxed) {
                        let made: Vec<u64> = (0..3)
                            .map(|_| saver.malloc(GRANULE as u64, Some(0), &region).unwrap())
                            .collect();
                        std::thread::yield_now();
                        for address in made {
                            saver.free(address).unwrap();
                        }
                    }
                });
            }
            for round in 0..60 {
                let paused = saver.pause(&PauseOptions::all());
                assert!(paused.status.is_ok(), "{round}: {:?}", paused.status);
                let resumed = saver.resume(&ResumeOptions::all());
                assert!(resumed.status.is_ok(), "{round}: {:?}", resumed.status);
            }
            done.store(true, Ordering::Relaxed);
        });
        for (seed, &address) in kept.iter().enumerate() {
            check(&saver, address, GRANULE, seed as u64);
        }
        for address in kept {
            saver.free(address).unwrap();
        }
        assert_eq!(saver.overhead(), (0, 0));
    }
}
