//! Between device memory and places a device cannot reach (pageable memory, files, stores): several
//! threads fill and empty the slots of a ring while the bus works on others.
//!
//! Each thread has up to two copies under way, so that the bus has the next one when a thread is
//! busy with the last, and takes pieces in order from a common list.

use std::collections::VecDeque;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub use super::ring::{Flight, PIECE, Ring, Slot};
use super::streaming;
use super::streams::Streams;
use super::workers::Batch;
use super::{Control, Engine, Span};
use crate::device::{Address, Device, Direction};
use crate::error::{Error, Result};

/// Copies that one thread has under way.
const DEPTH: usize = 2;

/// As many pieces are moved by the calling thread: others would not be quicker.
const FEW: usize = 2;

/// Where bytes go that leave a device. Called from several threads, in any order.
pub trait Sink: Send + Sync {
    /// Called before the device's copy of these bytes is waited for, to make their place ready.
    fn prepare(&self, _index: usize, _offset: u64, _length: usize) -> Result<()> {
        Ok(())
    }

    /// Takes `bytes` of span `index`, which begin `offset` bytes into it.
    fn write(&self, index: usize, offset: u64, bytes: &[u8]) -> Result<()>;
}

/// Where bytes come from that go to a device. Called from several threads, in any order.
pub trait Source: Send + Sync {
    /// Fills `bytes` with what lies `offset` bytes into span `index`.
    fn read(&self, index: usize, offset: u64, bytes: &mut [u8]) -> Result<()>;
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A part of a span that moves at once.
#[derive(Clone, Copy)]
struct Piece {
    index: usize,
    offset: u64,
    length: usize,
}

/// What the threads of one transfer share.
struct Job {
    spans: Vec<Span>,
    /// Of the device of each span.
    streams: Vec<Arc<Streams>>,
    pieces: Vec<Piece>,
    next: AtomicUsize,
    ring: Arc<Ring>,
    control: Arc<Control>,
}

impl Job {
    fn new(engine: &Engine, spans: &[Span], control: &Arc<Control>) -> Result<Option<Job>> {
        let Some(first) = spans.first() else {
            return Ok(None);
        };
        Ok(Some(Job {
            streams: spans
                .iter()
                .map(|span| engine.streams(&span.device))
                .collect::<Result<_>>()?,
            pieces: pieces(spans),
            next: AtomicUsize::new(0),
            ring: engine.ring(&first.device)?,
            spans: spans.to_vec(),
            control: Arc::clone(control),
        }))
    }

    fn take(&self) -> Option<Piece> {
        let index = self.next.fetch_add(1, Ordering::Relaxed);
        self.pieces.get(index).copied()
    }

    fn start(&self, slot: Slot, piece: Piece, direction: Direction) -> Result<Flight<'_>> {
        let address = self.spans[piece.index].address + piece.offset;
        slot.start(&self.streams[piece.index], address, piece.length, direction)
    }

    /// Has `work` done by as many threads as are of use, and waits for all of them.
    fn run(
        self: &Arc<Self>,
        engine: &Engine,
        work: impl Fn(&Job) -> Result<()> + Send + Sync + 'static,
    ) -> Result<()> {
        if self.pieces.len() <= FEW {
            return work(self);
        }
        /// Whatever happens, nobody uses the places of the bytes once this is gone.
        struct Joined(Batch);
        impl Drop for Joined {
            fn drop(&mut self) {
                let _ = self.0.wait();
            }
        }
        let joined = Joined(Batch::default());
        let work = Arc::new(work);
        let threads = engine
            .workers()
            .most()
            .min(self.pieces.len())
            .min(self.ring.count());
        for _ in 0..threads {
            let (job, work) = (Arc::clone(self), Arc::clone(&work));
            joined.0.submit(engine.workers(), move || work(&job));
        }
        joined.0.wait()
    }
}

/// Copies under way, the oldest first.
type Flights<'a> = VecDeque<(Flight<'a>, Piece)>;

/// Moves every span into the sink. All or nothing: the first failure stops the rest.
pub fn drain(
    engine: &Engine,
    spans: &[Span],
    sink: &Arc<dyn Sink>,
    control: &Arc<Control>,
) -> Result<()> {
    let Some(job) = Job::new(engine, spans, control)? else {
        return Ok(());
    };
    let sink = Arc::clone(sink);
    let failed = AtomicBool::new(false);
    Arc::new(job).run(engine, move |job| {
        let result = drain_some(job, &*sink, &failed);
        if result.is_err() {
            failed.store(true, Ordering::Relaxed);
        }
        result
    })
}

/// One thread's share of [`drain`].
fn drain_some(job: &Job, sink: &dyn Sink, failed: &AtomicBool) -> Result<()> {
    let mut flights = Flights::new();
    let land = |(flight, piece): (Flight<'_>, Piece)| {
        sink.prepare(piece.index, piece.offset, piece.length)?;
        let slot = flight.land()?;
        sink.write(piece.index, piece.offset, slot.bytes(piece.length))?;
        job.control.advance(piece.length as u64);
        Ok::<Slot, Error>(slot)
    };
    while !failed.load(Ordering::Relaxed)
        && let Some(piece) = job.take()
    {
        job.control.check()?;
        let free = match flights.len() {
            DEPTH => None,
            _ => job.ring.try_acquire(),
        };
        let slot = match free {
            Some(slot) => slot,
            None => match flights.pop_front() {
                Some(oldest) => land(oldest)?,
                None => job.ring.acquire()?,
            },
        };
        flights.push_back((job.start(slot, piece, Direction::ToHost)?, piece));
    }
    if failed.load(Ordering::Relaxed) {
        return Ok(());
    }
    flights
        .into_iter()
        .try_for_each(|flight| land(flight).map(drop))
}

/// Moves the source into every span. One result for each span: a span that failed does not stop
/// the others.
pub fn fill(
    engine: &Engine,
    spans: &[Span],
    source: &Arc<dyn Source>,
    control: &Arc<Control>,
) -> Vec<Result<()>> {
    let job = match Job::new(engine, spans, control) {
        Ok(Some(job)) => Arc::new(job),
        Ok(None) => return Vec::new(),
        Err(error) => return spans.iter().map(|_| Err(error.clone())).collect(),
    };
    let failures: Arc<Failures> = Arc::new(spans.iter().map(|_| Mutex::new(None)).collect());
    let (source, noted) = (Arc::clone(source), Arc::clone(&failures));
    let all = job.run(engine, move |job| {
        fill_some(job, &*source, &noted);
        Ok(())
    });
    failures
        .iter()
        .map(|failure| match lock(failure).take() {
            Some(error) => Err(error),
            None => all.clone(),
        })
        .collect()
}

/// The first error of each span.
type Failures = Vec<Mutex<Option<Error>>>;

/// One thread's share of [`fill`].
fn fill_some(job: &Job, source: &dyn Source, failures: &Failures) {
    let mut flights = Flights::new();
    let note = |piece: Piece, error: Error| {
        lock(&failures[piece.index]).get_or_insert(error);
    };
    let land = |(flight, piece): (Flight<'_>, Piece)| match flight.land() {
        Ok(slot) => {
            job.control.advance(piece.length as u64);
            Some(slot)
        }
        Err(error) => {
            note(piece, error);
            None
        }
    };
    while let Some(piece) = job.take() {
        if lock(&failures[piece.index]).is_some() {
            continue;
        }
        let started = job.control.check().and_then(|()| {
            let mut free = match flights.len() {
                DEPTH => None,
                _ => job.ring.try_acquire(),
            };
            while free.is_none()
                && let Some(oldest) = flights.pop_front()
            {
                free = land(oldest);
            }
            let mut slot = match free {
                Some(slot) => slot,
                None => job.ring.acquire()?,
            };
            source.read(piece.index, piece.offset, slot.bytes_mut(piece.length))?;
            job.start(slot, piece, Direction::ToDevice)
        });
        match started {
            Ok(flight) => flights.push_back((flight, piece)),
            Err(error) => note(piece, error),
        }
    }
    for flight in flights {
        land(flight);
    }
}

/// The pieces of all spans, alternating between devices so that their buses work together.
fn pieces(spans: &[Span]) -> Vec<Piece> {
    let mut by_device: Vec<(u32, Vec<Piece>)> = Vec::new();
    for (index, span) in spans.iter().enumerate() {
        let ordinal = span.device.info().ordinal;
        let parts = (0..span.bytes).step_by(PIECE).map(|offset| Piece {
            index,
            offset,
            length: PIECE.min((span.bytes - offset) as usize),
        });
        match by_device.iter_mut().find(|(known, _)| *known == ordinal) {
            Some((_, list)) => list.extend(parts),
            None => by_device.push((ordinal, parts.collect())),
        }
    }
    let longest = by_device.iter().map(|(_, list)| list.len()).max();
    (0..longest.unwrap_or(0))
        .flat_map(|row| {
            by_device
                .iter()
                .filter_map(move |(_, list)| list.get(row).copied())
        })
        .collect()
}

/// Pageable memory of a caller who waits.
struct Memory {
    pointer: NonNull<u8>,
    bytes: usize,
}

// SAFETY: nothing about memory depends on the thread.
unsafe impl Send for Memory {}
// SAFETY: threads use disjoint pieces of it.
unsafe impl Sync for Memory {}

impl Memory {
    fn place(&self, offset: u64, length: usize) -> *mut u8 {
        assert!(offset as usize + length <= self.bytes);
        // SAFETY: inside the memory, as just checked.
        unsafe { self.pointer.as_ptr().add(offset as usize) }
    }
}

impl Sink for Memory {
    fn write(&self, _index: usize, offset: u64, bytes: &[u8]) -> Result<()> {
        let place = self.place(offset, bytes.len());
        // SAFETY: in bounds; pieces do not overlap each other or the staging slot, and the memory
        // is borrowed by the caller of `read_device`, who waits.
        unsafe { streaming::copy(bytes.as_ptr(), place, bytes.len()) };
        Ok(())
    }
}

impl Source for Memory {
    fn read(&self, _index: usize, offset: u64, bytes: &mut [u8]) -> Result<()> {
        let place = self.place(offset, bytes.len());
        // SAFETY: in bounds; the memory and the staging slot do not overlap, and the caller of
        // `write_device` waits.
        unsafe { std::ptr::copy_nonoverlapping(place, bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }
}

/// Copies device memory to the host and waits.
pub(super) fn read_device(
    engine: &Engine,
    device: &Arc<dyn Device>,
    address: Address,
    into: &mut [u8],
) -> Result<()> {
    let sink: Arc<dyn Sink> = Arc::new(Memory {
        pointer: NonNull::from(&mut *into).cast(),
        bytes: into.len(),
    });
    let span = span(device, address, into.len());
    drain(engine, &[span], &sink, &Arc::default())
}

/// Copies host memory to the device and waits.
pub(super) fn write_device(
    engine: &Engine,
    device: &Arc<dyn Device>,
    address: Address,
    from: &[u8],
) -> Result<()> {
    let source: Arc<dyn Source> = Arc::new(Memory {
        // Only read from.
        pointer: NonNull::from(from).cast(),
        bytes: from.len(),
    });
    let span = span(device, address, from.len());
    fill(engine, &[span], &source, &Arc::default())
        .pop()
        .unwrap_or(Ok(()))
}

fn span(device: &Arc<dyn Device>, address: Address, bytes: usize) -> Span {
    Span {
        device: Arc::clone(device),
        address,
        bytes: bytes as u64,
    }
}
