//! Pause and resume through the Rust interface: contents, tags, states, statistics, failures that
//! need no fault injection. On the host device always; on CUDA with `TMS_TEST_CUDA=1`.

mod support;

use std::sync::Arc;
use std::time::Duration;

use support::{check, pattern};
use tms_memcache::device::{self, Platform};
use tms_memcache::{ErrorKind, PauseOptions, Region, ResumeOptions, Saver};

const GRANULE: u64 = 2 << 20;

fn platforms() -> Vec<Arc<dyn Platform>> {
    let mut platforms = vec![device::open("host").unwrap()];
    if std::env::var("TMS_TEST_CUDA").is_ok_and(|value| value == "1") {
        platforms.push(device::open("cuda").unwrap());
    }
    platforms
}

fn savers() -> impl Iterator<Item = Saver> {
    platforms()
        .into_iter()
        .map(|platform| Saver::new(platform).unwrap())
}

fn filled(saver: &Saver, bytes: usize, seed: u64, region: &Region) -> u64 {
    let address = saver.malloc(bytes as u64, None, region).unwrap();
    saver.write(address, &pattern(bytes, seed)).unwrap();
    address
}

#[test]
fn contents_survive_in_every_backup() {
    let folder = tempfile::tempdir().unwrap();
    for saver in savers() {
        for backup in ["pinned", "mmap", "file"] {
            let region = Region::new("w")
                .with_backup(backup)
                .with_directory(folder.path());
            let sizes = [6_912, 2 << 20, (2 << 20) + 1, 9 << 20, 70 << 20];
            let made: Vec<_> = sizes
                .iter()
                .enumerate()
                .map(|(seed, &bytes)| (filled(&saver, bytes, seed as u64, &region), bytes, seed))
                .collect();
            for cycle in 0..3 {
                let outcome = saver.pause(&PauseOptions::tags(["w"]));
                outcome.status.unwrap();
                assert_eq!(
                    outcome.summary.done_count,
                    sizes.len() as u64,
                    "{backup} {cycle}"
                );
                assert_eq!(outcome.summary.shortfall_bytes, 0);
                let stats = saver.stats();
                assert_eq!(stats[0].active_bytes, 0);
                assert_eq!(stats[0].paused_bytes, stats[0].backed_bytes);
                let again = saver.pause(&PauseOptions::all());
                again.status.unwrap();
                assert_eq!(again.summary.done_count, 0);
                assert_eq!(again.summary.unchanged_count, sizes.len() as u64);
                assert!(saver.read(made[0].0, &mut [0; 1]).is_err());
                saver.resume(&ResumeOptions::all()).status.unwrap();
                for &(address, bytes, seed) in &made {
                    check(&saver, address, bytes, seed as u64);
                }
            }
            for (address, _, _) in made {
                saver.free(address).unwrap();
            }
            assert!(saver.stats().is_empty());
            let left = std::fs::read_dir(folder.path()).unwrap().flatten();
            let left = left.filter(|entry| entry.file_name().to_string_lossy().ends_with(".bin"));
            assert_eq!(left.count(), 0, "files of freed allocations");
        }
    }
}

#[test]
fn contents_without_a_backup_do_not_come_back() {
    for saver in savers() {
        let address = filled(&saver, 4 << 20, 7, &Region::new("scratch"));
        saver.pause(&PauseOptions::all()).status.unwrap();
        saver.resume(&ResumeOptions::all()).status.unwrap();
        let mut got = vec![1; 4 << 20];
        saver.read(address, &mut got).unwrap();
        assert!(got.iter().all(|&byte| byte == 0));
        // What has a backup is dropped only on the explicit word.
        let kept = filled(
            &saver,
            4 << 20,
            8,
            &Region::new("kept").with_backup("pinned"),
        );
        saver
            .pause(&PauseOptions::tags(["kept"]).with_backup("none"))
            .status
            .unwrap();
        assert!(saver.backup_pointer(kept, 1).is_none());
        saver.resume(&ResumeOptions::all()).status.unwrap();
        saver.read(kept, &mut got).unwrap();
        assert!(got.iter().all(|&byte| byte == 0));
    }
}

#[test]
fn tags_select() {
    for saver in savers() {
        let a = filled(&saver, 1, 1, &Region::new("a").with_backup("pinned"));
        let b = filled(&saver, 1, 2, &Region::new("b").with_backup("mmap"));
        let c = filled(&saver, 1, 3, &Region::new("c"));
        let outcome = saver.pause(&PauseOptions::tags(["a", "b", "nobody"]));
        outcome.status.unwrap();
        assert_eq!(outcome.summary.done_count, 2);
        assert_eq!(outcome.summary.copied_bytes, 2 * GRANULE);
        check(&saver, c, 1, 3);
        saver.resume(&ResumeOptions::tags(["b"])).status.unwrap();
        check(&saver, b, 1, 2);
        assert!(saver.read(a, &mut [0]).is_err());
        saver.resume(&ResumeOptions::all()).status.unwrap();
        check(&saver, a, 1, 1);
    }
}

#[test]
fn a_retained_backup_keeps_its_place_and_edits_win() {
    for saver in savers() {
        for backup in ["pinned", "mmap"] {
            let region = Region::new("r").with_backup(backup).with_retain(true);
            let address = filled(&saver, 3 << 20, 1, &region);
            assert!(saver.backup_pointer(address, 1).is_none());
            saver.pause(&PauseOptions::all()).status.unwrap();
            let first = saver.backup_pointer(address, 3 << 20).unwrap();
            // SAFETY: the backup is writable for its owner while it exists.
            unsafe { first.as_ptr().add(5).write(0xee) };
            saver.resume(&ResumeOptions::all()).status.unwrap();
            let mut got = [0; 8];
            saver.read(address, &mut got).unwrap();
            assert_eq!(got[5], 0xee);
            assert_eq!(saver.backup_pointer(address, 1), Some(first));
            // SAFETY: as above.
            unsafe { first.as_ptr().add(6).write(0xdd) };
            saver.pause(&PauseOptions::all()).status.unwrap();
            assert_eq!(saver.backup_pointer(address, 1), Some(first));
            saver.resume(&ResumeOptions::all()).status.unwrap();
            saver.read(address, &mut got).unwrap();
            assert_ne!(
                got[6], 0xdd,
                "an edit while active is overwritten by the next pause"
            );
            saver.free(address).unwrap();
            assert!(!saver.is_pinned(first.as_ptr() as usize));
        }
    }
}

#[test]
fn freed_while_paused() {
    for saver in savers() {
        let region = Region::new("f").with_backup("pinned");
        let a = filled(&saver, 5 << 20, 1, &region);
        let b = filled(&saver, 5 << 20, 2, &region);
        saver.pause(&PauseOptions::all()).status.unwrap();
        saver.free(a).unwrap();
        assert_eq!(saver.free(a).unwrap_err().kind(), ErrorKind::NotFound);
        saver.resume(&ResumeOptions::all()).status.unwrap();
        check(&saver, b, 5 << 20, 2);
    }
}

#[test]
fn a_resume_without_memory_leaves_all_paused() {
    let platform: Arc<dyn Platform> = Arc::new(device::host::HostPlatform::new(1, 10 * GRANULE));
    let saver = Saver::new(platform).unwrap();
    let region = Region::new("w").with_backup("pinned");
    let a = filled(&saver, 3 * GRANULE as usize, 1, &region);
    let b = filled(&saver, 3 * GRANULE as usize, 2, &region);
    saver.pause(&PauseOptions::all()).status.unwrap();
    let hog = saver
        .malloc(6 * GRANULE, None, &Region::new("hog"))
        .unwrap();
    let outcome = saver.resume(&ResumeOptions::tags(["w"]).with_wait(Duration::from_millis(30)));
    assert_eq!(
        outcome.status.unwrap_err().kind(),
        ErrorKind::OutOfDeviceMemory
    );
    assert_eq!(
        saver.platform().device(0).unwrap().memory().unwrap().free,
        4 * GRANULE
    );
    // A pause of another tag makes room while the resume waits.
    let op = saver
        .resume_async(&ResumeOptions::tags(["w"]).with_wait(Duration::from_secs(20)))
        .unwrap();
    saver.pause(&PauseOptions::tags(["hog"])).status.unwrap();
    op.wait(None).unwrap().status.unwrap();
    check(&saver, a, 3 * GRANULE as usize, 1);
    check(&saver, b, 3 * GRANULE as usize, 2);
    saver.free(hog).unwrap();
}

#[test]
fn the_margin_is_kept() {
    let platform: Arc<dyn Platform> = Arc::new(device::host::HostPlatform::new(1, 10 * GRANULE));
    let saver = Saver::new(platform).unwrap();
    saver.set_memory_margin(None, 4 * GRANULE).unwrap();
    assert!(saver.set_memory_margin(Some(99), 1).is_err());
    let region = Region::new("m");
    let a = saver.malloc(6 * GRANULE, None, &region).unwrap();
    let refused = saver.malloc(GRANULE, None, &region).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::OutOfDeviceMemory);
    saver.set_memory_margin(Some(0), 0).unwrap();
    saver.malloc(GRANULE, None, &region).unwrap();
    saver.free(a).unwrap();
}

#[test]
fn broken_backups_are_named_and_the_rest_resumes() {
    let folder = tempfile::tempdir().unwrap();
    let saver = Saver::new(device::open("host").unwrap()).unwrap();
    let region = Region::new("d")
        .with_backup("file")
        .with_directory(folder.path());
    let a = filled(&saver, 20 << 20, 1, &region);
    let b = filled(&saver, 20 << 20, 2, &region);
    saver.pause(&PauseOptions::all()).status.unwrap();
    let mut files: Vec<_> = std::fs::read_dir(folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|end| end == "bin"))
        .collect();
    files.sort();
    assert_eq!(files.len(), 2);
    let whole = std::fs::read(&files[0]).unwrap();
    let mut broken = whole.clone();
    broken[11 << 20] ^= 1;
    std::fs::write(&files[0], &broken).unwrap();
    let outcome = saver.resume(&ResumeOptions::all());
    assert_eq!(outcome.status.unwrap_err().kind(), ErrorKind::Partial);
    assert_eq!(outcome.summary.failures.len(), 1);
    assert_eq!(outcome.summary.failures[0].error.kind(), ErrorKind::Corrupt);
    // Files are numbered in the order of addresses.
    assert_eq!(outcome.summary.failures[0].address, a.min(b));
    check(&saver, a.max(b), 20 << 20, if a < b { 2 } else { 1 });
    std::fs::write(&files[0], &whole[..1 << 20]).unwrap();
    let truncated = saver.resume(&ResumeOptions::all());
    assert_eq!(truncated.status.unwrap_err().kind(), ErrorKind::Corrupt);
    std::fs::write(&files[0], &whole).unwrap();
    saver.resume(&ResumeOptions::all()).status.unwrap();
    check(&saver, a, 20 << 20, 1);
    // A folder that is gone fails the pause and loses nothing.
    let gone = Region::new("gone")
        .with_backup("file")
        .with_directory(&folder.path().join("no"));
    let c = filled(&saver, 1, 3, &gone);
    let outcome = saver.pause(&PauseOptions::all());
    assert_eq!(outcome.status.unwrap_err().kind(), ErrorKind::NotFound);
    for (address, bytes, seed) in [(a, 20 << 20, 1), (b, 20 << 20, 2), (c, 1, 3)] {
        check(&saver, address, bytes, seed);
    }
}

#[test]
fn exported_memory_is_not_paused() {
    for saver in savers() {
        let region = Region::new("e").with_backup("pinned").with_exportable(true);
        let a = filled(&saver, 1, 1, &region);
        let plain = filled(&saver, 1, 2, &Region::new("p").with_backup("pinned"));
        assert_eq!(
            saver.export(plain).unwrap_err().kind(),
            ErrorKind::Unsupported
        );
        let (_descriptor, bytes) = saver.export(a).unwrap();
        assert_eq!(bytes, GRANULE);
        let outcome = saver.pause(&PauseOptions::all());
        assert_eq!(outcome.status.unwrap_err().kind(), ErrorKind::Exported);
        check(&saver, plain, 1, 2);
        let outcome = saver.pause(&PauseOptions::all().with_skip_exported(true));
        outcome.status.unwrap();
        assert_eq!(outcome.summary.done_count, 1);
        check(&saver, a, 1, 1);
    }
}

#[test]
fn many_threads() {
    for saver in savers() {
        let threads: Vec<_> = (0..4u64)
            .map(|thread| {
                let saver = saver.clone();
                std::thread::spawn(move || {
                    let tag = format!("t{thread}");
                    let region =
                        Region::new(&tag).with_backup(["pinned", "mmap"][thread as usize % 2]);
                    for round in 0..12u64 {
                        let seed = thread * 100 + round;
                        let bytes = 1 + (seed as usize * 77_777) % (5 << 20);
                        let a = filled(&saver, bytes, seed, &region);
                        let b = filled(&saver, bytes / 2 + 1, seed + 1, &region);
                        saver.pause(&PauseOptions::tags([&*tag])).status.unwrap();
                        if round % 3 == 0 {
                            saver.free(b).unwrap();
                        }
                        saver.resume(&ResumeOptions::tags([&*tag])).status.unwrap();
                        check(&saver, a, bytes, seed);
                        if round % 3 != 0 {
                            check(&saver, b, bytes / 2 + 1, seed + 1);
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
        assert!(saver.stats().is_empty());
    }
}

#[test]
fn close_frees_everything() {
    for saver in savers() {
        let device = saver.platform().device(0).unwrap();
        filled(&saver, 1, 1, &Region::new("x").with_backup("pinned"));
        filled(&saver, 1, 1, &Region::new("y"));
        saver.pause(&PauseOptions::tags(["x"])).status.unwrap();
        saver.close().unwrap();
        assert!(saver.stats().is_empty());
        drop(saver);
        drop(device);
    }
}

#[test]
fn bad_arguments_are_named() {
    let saver = Saver::new(device::open("host").unwrap()).unwrap();
    let error = saver.malloc(0, None, &Region::new("t")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    let error = saver.malloc(u64::MAX, None, &Region::new("t")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    let error = saver.malloc(1, Some(99), &Region::new("t")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    let error = saver
        .malloc(1, None, &Region::new("t").with_backup("tape"))
        .unwrap_err();
    assert!(error.to_string().contains("pinned, mmap, file"), "{error}");
    let outcome = saver.pause(&PauseOptions::all().with_backup("tape"));
    assert_eq!(
        outcome.status.unwrap_err().kind(),
        ErrorKind::InvalidArgument
    );
}

#[test]
fn each_device_gets_its_own_back() {
    for saver in savers() {
        if saver.platform().device_count() < 2 {
            println!("{saver:?}: one device");
            continue;
        }
        for region in [
            Region::new("two").with_backup("pinned"),
            Region::new("two")
                .with_backup("mmap")
                .with_peer_access(true),
        ] {
            let made: Vec<(u64, u64)> = (0..4)
                .map(|seed| {
                    let device = (seed % 2) as u32;
                    let address = saver.malloc(5 << 20, Some(device), &region).unwrap();
                    saver.write(address, &pattern(5 << 20, seed)).unwrap();
                    assert_eq!(saver.query(address).unwrap().device, device);
                    (address, seed)
                })
                .collect();
            for _ in 0..2 {
                let outcome = saver.pause(&PauseOptions::all());
                outcome.status.unwrap();
                assert_eq!(outcome.summary.done_count, 4);
                assert_eq!(saver.stats().len(), 2);
                saver.resume(&ResumeOptions::all()).status.unwrap();
                for &(address, seed) in &made {
                    check(&saver, address, 5 << 20, seed);
                }
            }
            for (address, _) in made {
                saver.free(address).unwrap();
            }
        }
    }
}
