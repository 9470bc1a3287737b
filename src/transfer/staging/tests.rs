//! Tests of staging, on the host device.

use super::*;
use crate::device::host::HostPlatform;
use crate::device::{CreateOptions, Platform};
use crate::error::ErrorKind;
use crate::transfer::EngineOptions;

/// An engine with a ring of two slots, and device memory.
fn set_up(bytes: u64) -> (Engine, Span) {
    let platform: Arc<dyn Platform> = Arc::new(HostPlatform::new(1, 1 << 30));
    let device = platform.device(0).unwrap();
    let bytes = bytes.next_multiple_of(device.info().granularity);
    let address = device.reserve(bytes).unwrap();
    let physical = device.create(bytes, CreateOptions::default()).unwrap();
    device.map(address, bytes, physical).unwrap();
    device.set_access(address, bytes, &[]).unwrap();
    let options = EngineOptions {
        threads: 2,
        staging_bytes: 1,
    };
    let span = Span {
        device,
        address,
        bytes,
    };
    (Engine::with_options(platform, options).unwrap(), span)
}

fn random(bytes: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    (0..bytes)
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 56) as u8
        })
        .collect()
}

/// All slots are back.
fn is_whole(engine: &Engine, device: &Arc<dyn Device>) -> bool {
    let ring = engine.ring(device).unwrap();
    let slots: Vec<Option<Slot>> = (0..ring.count()).map(|_| ring.try_acquire()).collect();
    slots.iter().all(Option::is_some) && ring.try_acquire().is_none()
}

#[test]
fn any_size_from_several_threads_through_two_slots() {
    const SIZES: [usize; 7] = [0, 1, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 5, 7 * PIECE];
    const PART: usize = 8 * PIECE;
    let (engine, span) = set_up(3 * PART as u64);
    assert_eq!(engine.ring(&span.device).unwrap().count(), 2);
    std::thread::scope(|scope| {
        for thread in 0..3 {
            let (engine, span) = (&engine, &span);
            scope.spawn(move || {
                let address = span.address + (thread * PART) as u64;
                for (seed, bytes) in SIZES.into_iter().enumerate() {
                    let data = random(bytes, (thread * 100 + seed) as u64);
                    engine.write(&span.device, address + 3, &data).unwrap();
                    let mut got = vec![0; bytes];
                    engine.read(&span.device, address + 3, &mut got).unwrap();
                    assert!(got == data, "{bytes} bytes");
                }
            });
        }
    });
    assert!(is_whole(&engine, &span.device));
}

#[test]
fn jobs_that_hold_slots_in_the_queue_are_waited_for() {
    let (engine, span) = set_up(16 * PIECE as u64);
    let ring = engine.ring(&span.device).unwrap();
    let data = random(16 * PIECE, 1);
    // As explicit copies do it: both slots are held by jobs that may be behind others.
    let batch = Batch::default();
    std::thread::scope(|scope| {
        for _ in 0..50 {
            for slot in [ring.acquire().unwrap(), ring.acquire().unwrap()] {
                batch.submit(engine.workers(), move || {
                    drop(slot);
                    Ok(())
                });
            }
            let (engine, span, data) = (&engine, &span, &data);
            scope.spawn(move || {
                engine
                    .write(&span.device, span.address, &data[..4 * PIECE])
                    .unwrap();
            });
        }
    });
    batch.wait().unwrap();
    assert!(is_whole(&engine, &span.device));
}

/// Fails from an offset of span 1 on.
struct Failing(u64);

impl Failing {
    fn check(&self, index: usize, offset: u64) -> Result<()> {
        match index == 1 && offset >= self.0 {
            true => Err(Error::new(ErrorKind::NoSpace, "full")),
            false => Ok(()),
        }
    }
}

impl Sink for Failing {
    fn write(&self, index: usize, offset: u64, _bytes: &[u8]) -> Result<()> {
        self.check(index, offset)
    }
}

impl Source for Failing {
    fn read(&self, index: usize, offset: u64, bytes: &mut [u8]) -> Result<()> {
        bytes.fill(index as u8 + 1);
        self.check(index, offset)
    }
}

fn thirds(span: &Span) -> Vec<Span> {
    let bytes = span.bytes / 3;
    (0..3)
        .map(|third| Span {
            device: Arc::clone(&span.device),
            address: span.address + third * bytes,
            bytes,
        })
        .collect()
}

#[test]
fn the_first_failure_of_a_sink_stops_all() {
    let (engine, span) = set_up(18 * PIECE as u64);
    let control = Arc::new(Control::default());
    let sink: Arc<dyn Sink> = Arc::new(Failing(2 * PIECE as u64));
    let error = drain(&engine, &thirds(&span), &sink, &control).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace);
    let done = control.done.load(Ordering::Relaxed);
    assert!(done < span.bytes, "{done}");
    assert!(is_whole(&engine, &span.device));
}

#[test]
fn a_source_that_fails_for_one_span_fills_the_others() {
    let (engine, span) = set_up(18 * PIECE as u64);
    let control = Arc::new(Control::default());
    let source: Arc<dyn Source> = Arc::new(Failing(2 * PIECE as u64));
    let spans = thirds(&span);
    let told = Mutex::new(Vec::new());
    let results = fill(&engine, &spans, &source, &control, &|index, result| {
        lock(&told).push((index, result.is_ok()));
    });
    assert_eq!(*lock(&told), [(0, true), (1, false), (2, true)]);
    assert!(results[0].is_ok() && results[2].is_ok());
    assert_eq!(results[1].as_ref().unwrap_err().kind(), ErrorKind::NoSpace);
    for (index, span) in spans.iter().enumerate() {
        let mut got = vec![0; span.bytes as usize];
        engine.read(&span.device, span.address, &mut got).unwrap();
        let whole = got.iter().all(|&byte| byte == index as u8 + 1);
        assert_eq!(whole, index != 1);
    }
    assert!(is_whole(&engine, &span.device));
}

#[test]
fn a_cancelled_transfer_says_so() {
    let (engine, span) = set_up(6 * PIECE as u64);
    let control = Arc::new(Control::default());
    control.cancelled.store(true, Ordering::Relaxed);
    let never = Arc::new(Failing(u64::MAX));
    let sink: Arc<dyn Sink> = never.clone();
    let error = drain(&engine, &thirds(&span), &sink, &control).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Cancelled);
    let source: Arc<dyn Source> = never;
    let told = AtomicUsize::new(0);
    let results = fill(&engine, &thirds(&span), &source, &control, &|_, result| {
        assert!(result.is_err());
        told.fetch_add(1, Ordering::Relaxed);
    });
    assert_eq!(told.load(Ordering::Relaxed), 3);
    for result in results {
        assert_eq!(result.unwrap_err().kind(), ErrorKind::Cancelled);
    }
    assert_eq!(control.done.load(Ordering::Relaxed), 0);
    assert!(is_whole(&engine, &span.device));
}
