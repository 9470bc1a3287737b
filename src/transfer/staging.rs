//! Between device memory and places a device cannot reach (pageable memory, files, stores): several
//! threads fill and empty the slots of a ring while the bus works on others.
//!
//! Each thread has up to two copies under way, so that the bus has the next one when a thread is
//! busy with the last, and takes pieces in order from a common list.

use std::collections::VecDeque;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

pub use super::ring::{Flight, PIECE, Ring, Slot};
use super::streams::Streams;
use super::workers::Batch;
use super::{Control, Engine, Span};
use crate::device::{Address, Device, Direction};
use crate::error::{Error, ErrorKind, Result};

/// Copies that one thread has under way. Measured on an H200: 34 GB/s to and 41 GB/s from the host
/// with one, 52 with two, and no more with three or four.
pub const DEPTH: usize = 2;

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

    /// Whether no piece is left to take.
    fn is_taken(&self) -> bool {
        self.next.load(Ordering::Relaxed) >= self.pieces.len()
    }

    fn start(&self, slot: Slot, piece: Piece, direction: Direction) -> Result<Flight<'_>> {
        let address = self.spans[piece.index].address + piece.offset;
        slot.start(&self.streams[piece.index], address, piece.length, direction)
    }

    /// Has `work` done by as many threads as are of use, and waits for all of them. Each gets its
    /// first slot from here: jobs must not wait for slots. What they leave undone because they lost
    /// their slots is done by this thread. `meanwhile` is told how many threads work, before they are
    /// waited for.
    fn run(
        self: &Arc<Self>,
        engine: &Engine,
        work: impl Fn(&Job, Hand<'_>) -> Result<()> + Send + Sync + 'static,
        meanwhile: impl FnOnce(usize),
    ) -> Result<()> {
        /// Whatever happens, nobody uses the places of the bytes once this is gone.
        struct Joined(Batch);
        impl Drop for Joined {
            fn drop(&mut self) {
                let _ = self.0.wait();
            }
        }
        let joined = Joined(Batch::default());
        let work = Arc::new(work);
        let threads = match self.pieces.len() {
            ..=FEW => 0,
            pieces => engine
                .workers()
                .most()
                .min(pieces)
                .min(self.ring.count().div_ceil(DEPTH)),
        };
        let mut working = 0;
        while working < threads && !self.is_taken() {
            let slot = self.ring.acquire()?;
            let (job, work) = (Arc::clone(self), Arc::clone(&work));
            joined
                .0
                .submit(engine.workers(), move || work(&job, Hand::with(slot)));
            working += 1;
        }
        meanwhile(working);
        joined.0.wait()?;
        work(self, Hand::waiting())
    }
}

/// The slots that one thread has at hand.
struct Hand<'a> {
    spare: Option<Slot>,
    /// Copies under way, the oldest first.
    flights: VecDeque<(Flight<'a>, Piece)>,
    may_wait: bool,
}

impl<'a> Hand<'a> {
    fn with(slot: Slot) -> Hand<'a> {
        Hand {
            spare: Some(slot),
            flights: VecDeque::new(),
            may_wait: false,
        }
    }

    fn waiting() -> Hand<'a> {
        Hand {
            spare: None,
            flights: VecDeque::new(),
            may_wait: true,
        }
    }

    /// A slot for the next piece. `land` ends the oldest copy under way where its slot is needed,
    /// and gives that if it can still be used. `None` if there is no slot to be had without
    /// waiting, and this thread must not wait.
    fn slot(
        &mut self,
        ring: &Arc<Ring>,
        land: impl Fn(Flight<'a>, Piece) -> Result<Option<Slot>>,
    ) -> Result<Option<Slot>> {
        if let Some(slot) = self.spare.take() {
            return Ok(Some(slot));
        }
        if self.flights.len() < DEPTH
            && let Some(slot) = ring.try_acquire()
        {
            return Ok(Some(slot));
        }
        while let Some((flight, piece)) = self.flights.pop_front() {
            if let Some(slot) = land(flight, piece)? {
                return Ok(Some(slot));
            }
        }
        match self.may_wait {
            true => ring.acquire().map(Some),
            false => Ok(None),
        }
    }
}

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
    Arc::new(job).run(
        engine,
        move |job, hand| {
            let result = drain_some(job, hand, &*sink, &failed);
            if result.is_err() {
                failed.store(true, Ordering::Relaxed);
            }
            result
        },
        |_| {},
    )
}

/// One thread's share of [`drain`].
fn drain_some<'a>(
    job: &'a Job,
    mut hand: Hand<'a>,
    sink: &dyn Sink,
    failed: &AtomicBool,
) -> Result<()> {
    let land = |flight: Flight<'a>, piece: Piece| {
        sink.prepare(piece.index, piece.offset, piece.length)?;
        let slot = flight.land()?;
        sink.write(piece.index, piece.offset, slot.bytes(piece.length))?;
        job.control.advance(piece.length as u64);
        Ok(Some(slot))
    };
    while !failed.load(Ordering::Relaxed) && !job.is_taken() {
        job.control.check()?;
        let Some(slot) = hand.slot(&job.ring, land)? else {
            break;
        };
        let Some(piece) = job.take() else {
            break;
        };
        let flight = job.start(slot, piece, Direction::ToHost)?;
        hand.flights.push_back((flight, piece));
    }
    while !failed.load(Ordering::Relaxed)
        && let Some((flight, piece)) = hand.flights.pop_front()
    {
        land(flight, piece)?;
    }
    Ok(())
}

/// Moves the source into every span. One result for each span: a span that failed does not stop
/// the others. `done` hears of each on this thread, in order, soon after it has ended.
pub fn fill(
    engine: &Engine,
    spans: &[Span],
    source: &Arc<dyn Source>,
    control: &Arc<Control>,
    done: &dyn Fn(usize, &Result<()>),
) -> Vec<Result<()>> {
    let job = match Job::new(engine, spans, control) {
        Ok(Some(job)) => Arc::new(job),
        Ok(None) => return Vec::new(),
        Err(error) => {
            let failed = || Err(error.clone());
            (0..spans.len()).for_each(|index| done(index, &failed()));
            return spans.iter().map(|_| failed()).collect();
        }
    };
    let filling = Arc::new(Filling::new(spans.len(), &job.pieces));
    let (source, noted) = (Arc::clone(source), Arc::clone(&filling));
    let mut reported = 0;
    let all = job.run(
        engine,
        move |job, hand| {
            let _leaving = Leaving(&noted);
            fill_some(job, hand, &*source, &noted)
        },
        |threads| reported = filling.report(done, threads),
    );
    filling.end_all(all, reported, done)
}

/// How far the spans of a [`fill`] are.
struct Filling {
    progress: Mutex<Progress>,
    changed: Condvar,
}

struct Progress {
    spans: Vec<Filled>,
    /// Threads that have done their share.
    left: usize,
}

#[derive(Clone, Default)]
struct Filled {
    /// Pieces that have not ended.
    open: usize,
    /// The first error.
    failure: Option<Error>,
}

impl Filled {
    fn result(&self) -> Result<()> {
        self.failure.clone().map_or(Ok(()), Err)
    }
}

impl Filling {
    fn new(count: usize, pieces: &[Piece]) -> Filling {
        let mut spans = vec![Filled::default(); count];
        for piece in pieces {
            spans[piece.index].open += 1;
        }
        Filling {
            progress: Mutex::new(Progress { spans, left: 0 }),
            changed: Condvar::new(),
        }
    }

    fn has_failed(&self, index: usize) -> bool {
        lock(&self.progress).spans[index].failure.is_some()
    }

    fn end(&self, index: usize, result: Result<()>) {
        let mut progress = lock(&self.progress);
        let span = &mut progress.spans[index];
        span.open -= 1;
        if let Err(error) = result {
            span.failure.get_or_insert(error);
        }
        if span.open == 0 {
            self.changed.notify_all();
        }
    }

    /// Tells of spans as they end, in order, until all have or `threads` threads have done what they
    /// could. Returns the first span that was not told of.
    fn report(&self, done: &dyn Fn(usize, &Result<()>), threads: usize) -> usize {
        let mut next = 0;
        let mut progress = lock(&self.progress);
        while let Some(span) = progress.spans.get(next) {
            if span.open == 0 {
                let result = span.result();
                drop(progress);
                done(next, &result);
                next += 1;
                progress = lock(&self.progress);
            } else if progress.left < threads {
                progress = self
                    .changed
                    .wait(progress)
                    .unwrap_or_else(PoisonError::into_inner);
            } else {
                break;
            }
        }
        next
    }

    /// Tells of the rest when nothing is under way any more. What has not ended has failed by `all`.
    fn end_all(
        &self,
        all: Result<()>,
        reported: usize,
        done: &dyn Fn(usize, &Result<()>),
    ) -> Vec<Result<()>> {
        let spans = std::mem::take(&mut lock(&self.progress).spans);
        let mut results = Vec::with_capacity(spans.len());
        for (index, span) in spans.iter().enumerate() {
            let result = match span.open {
                0 => span.result(),
                _ => span.result().and(all.clone()).and(Err(Error::new(
                    ErrorKind::Internal,
                    "a part was not copied",
                ))),
            };
            if index >= reported {
                done(index, &result);
            }
            results.push(result);
        }
        results
    }
}

/// Notes that a thread has done its share, however that ended.
struct Leaving<'a>(&'a Filling);

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        lock(&self.0.progress).left += 1;
        self.0.changed.notify_all();
    }
}

/// One thread's share of [`fill`]. An error concerns all spans that have not ended.
fn fill_some<'a>(
    job: &'a Job,
    mut hand: Hand<'a>,
    source: &dyn Source,
    filling: &Filling,
) -> Result<()> {
    let land = |flight: Flight<'a>, piece: Piece| match flight.land() {
        Ok(slot) => {
            job.control.advance(piece.length as u64);
            filling.end(piece.index, Ok(()));
            Ok(Some(slot))
        }
        Err(error) => {
            filling.end(piece.index, Err(error));
            Ok(None)
        }
    };
    while !job.is_taken() {
        let Some(mut slot) = hand.slot(&job.ring, land)? else {
            break;
        };
        let Some(piece) = job.take() else {
            break;
        };
        if filling.has_failed(piece.index) {
            filling.end(piece.index, Ok(()));
            hand.spare = Some(slot);
            continue;
        }
        let started = job.control.check().and_then(|()| {
            source.read(piece.index, piece.offset, slot.bytes_mut(piece.length))?;
            job.start(slot, piece, Direction::ToDevice)
        });
        match started {
            Ok(flight) => hand.flights.push_back((flight, piece)),
            Err(error) => filling.end(piece.index, Err(error)),
        }
    }
    while let Some((flight, piece)) = hand.flights.pop_front() {
        land(flight, piece)?;
    }
    Ok(())
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
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), place, bytes.len()) };
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
    fill(engine, &[span], &source, &Arc::default(), &|_, _| ())
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

#[cfg(test)]
mod tests;
