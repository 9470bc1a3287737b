//! Between device memory and places a device cannot reach (pageable memory, files, stores): a ring
//! of pinned slots, filled and emptied by several threads while the bus works on the others.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::arena::{Arena, Block};
use super::streams::{Settled, Streams};
use super::workers::Batch;
use super::{Control, Engine, Span};
use crate::device::{Address, Device, Direction};
use crate::error::{Error, ErrorKind, Result, ResultExt};

/// Bytes that move at once: large enough for the full speed of the bus.
pub const PIECE: usize = 8 << 20;

const SLOTS: usize = super::chunk::SLICE / PIECE;

/// Where bytes go that leave a device. Called from several threads, in any order.
pub trait Sink: Send + Sync {
    /// Takes `bytes` of span `index`, which begin `offset` bytes into it.
    fn write(&self, index: usize, offset: u64, bytes: &[u8]) -> Result<()>;
}

/// Where bytes come from that go to a device. Called from several threads, in any order.
pub trait Source: Send + Sync {
    /// Fills `bytes` with what lies `offset` bytes into span `index`.
    fn read(&self, index: usize, offset: u64, bytes: &mut [u8]) -> Result<()>;
}

struct Slots {
    free: Vec<usize>,
    /// Slots that a device may still write to or read from.
    abandoned: Vec<(usize, Arc<dyn Device>)>,
}

/// The slots, shared by all that stage.
pub struct Ring {
    block: Block,
    slots: Mutex<Slots>,
    changed: Condvar,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Ring {
    pub fn new(arena: &Arena, device: &Arc<dyn Device>) -> Result<Ring> {
        // A chunk of its own, which backups neither share nor keep pinned.
        let block = arena.allocate_alone(device, (PIECE * SLOTS) as u64)?;
        block.wait().context(|| "staging memory")?;
        Ok(Ring {
            block,
            slots: Mutex::new(Slots {
                free: (0..SLOTS).collect(),
                abandoned: Vec::new(),
            }),
            changed: Condvar::new(),
        })
    }

    /// Whether no device can be working on a slot that nobody holds.
    pub fn is_settled(&self) -> bool {
        lock(&self.slots)
            .abandoned
            .iter()
            .all(|(_, device)| device.synchronize().is_ok())
    }

    /// Waits for a free slot.
    pub fn acquire(self: &Arc<Self>) -> Result<Slot> {
        let mut slots = lock(&self.slots);
        loop {
            if let Some(index) = slots.free.pop() {
                return Ok(Slot {
                    ring: Arc::clone(self),
                    index,
                });
            }
            if let Some((index, device)) = slots.abandoned.pop() {
                drop(slots);
                let answer = device.synchronize();
                slots = lock(&self.slots);
                match answer {
                    Ok(()) => slots.free.push(index),
                    Err(error) => {
                        slots.abandoned.push((index, device));
                        if slots.abandoned.len() == SLOTS {
                            return Err(error.context("no staging slot is usable"));
                        }
                    }
                }
                continue;
            }
            slots = self
                .changed
                .wait(slots)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// One pinned buffer of [`PIECE`] bytes, free again when dropped.
pub struct Slot {
    ring: Arc<Ring>,
    index: usize,
}

impl Slot {
    fn pointer(&self) -> *mut u8 {
        // SAFETY: the block is `PIECE * SLOTS` bytes long and the index below `SLOTS`.
        unsafe { self.ring.block.pointer().as_ptr().add(self.index * PIECE) }
    }

    pub fn bytes(&self, length: usize) -> &[u8] {
        assert!(length <= PIECE);
        // SAFETY: the slot is ours alone, populated, and no copy runs while it can be borrowed.
        unsafe { std::slice::from_raw_parts(self.pointer(), length) }
    }

    pub fn bytes_mut(&mut self, length: usize) -> &mut [u8] {
        assert!(length <= PIECE);
        // SAFETY: as in `bytes`, and `&mut self` makes the borrow unique.
        unsafe { std::slice::from_raw_parts_mut(self.pointer(), length) }
    }

    /// Copies from the device into the slot and waits.
    pub fn copy_from_device(
        &mut self,
        streams: &Streams,
        address: Address,
        length: usize,
    ) -> Result<()> {
        self.copy(streams, address, length, Direction::ToHost)
    }

    /// Copies from the slot to the device and waits.
    pub fn copy_to_device(
        &mut self,
        streams: &Streams,
        address: Address,
        length: usize,
    ) -> Result<()> {
        self.copy(streams, address, length, Direction::ToDevice)
    }

    fn copy(
        &mut self,
        streams: &Streams,
        address: Address,
        length: usize,
        direction: Direction,
    ) -> Result<()> {
        assert!(length <= PIECE);
        let device = &streams.device;
        let host = self.pointer() as u64;
        let (destination, source) = match direction {
            Direction::ToHost => (host, address),
            Direction::ToDevice | Direction::OnDevice => (address, host),
        };
        let event = streams.event()?;
        let stream = streams.of(direction);
        // SAFETY: the slot is ours and outlives the copy: it is waited for below, or abandoned.
        let queued = unsafe { device.copy(destination, source, length as u64, direction, stream) };
        let waited = queued.and_then(|()| {
            device.event_record(event.event(), stream)?;
            device.event_synchronize(event.event())
        });
        if let Err(error) = waited {
            if let Settled::Unknown(_) = streams.settle(direction) {
                self.abandon(device);
            }
            return Err(error);
        }
        Ok(())
    }

    /// Marks the slot as perhaps still used by the device; it is free again once that is settled.
    fn abandon(&mut self, device: &Arc<dyn Device>) {
        let index = std::mem::replace(&mut self.index, usize::MAX);
        if index != usize::MAX {
            lock(&self.ring.slots)
                .abandoned
                .push((index, Arc::clone(device)));
            self.ring.changed.notify_one();
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if self.index != usize::MAX {
            lock(&self.ring.slots).free.push(self.index);
            self.ring.changed.notify_one();
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
    let batch = Batch::default();
    let mut outcome = Ok(());
    'spans: for (index, offset) in pieces(spans) {
        let span = &spans[index];
        if batch.failed() {
            break 'spans;
        }
        let step = control.check().and_then(|()| {
            let streams = engine.streams(&span.device)?;
            Ok((streams, engine.ring(&span.device)?.acquire()?))
        });
        let (streams, mut slot) = match step {
            Ok(step) => step,
            Err(error) => {
                outcome = Err(error);
                break 'spans;
            }
        };
        let length = PIECE.min((span.bytes - offset) as usize);
        let address = span.address + offset;
        let (sink, control) = (Arc::clone(sink), Arc::clone(control));
        batch.submit(engine.workers(), move || {
            slot.copy_from_device(&streams, address, length)?;
            sink.write(index, offset, slot.bytes(length))?;
            control.advance(length as u64);
            Ok(())
        });
    }
    // The jobs are waited for in any case: they use the sink and the device.
    batch.wait().and(outcome)
}

/// How far the spans of a [`fill`] are.
struct Filling {
    spans: Mutex<Vec<Filled>>,
    changed: Condvar,
}

#[derive(Clone, Default)]
struct Filled {
    /// Pieces that have not ended.
    left: usize,
    failure: Option<Error>,
}

impl Filling {
    fn failed(&self, index: usize) -> bool {
        lock(&self.spans)[index].failure.is_some()
    }

    /// Tells of spans from `next` on that are complete, in their order; waits for all with `all`.
    /// Returns the first that is not.
    fn report(&self, mut next: usize, all: bool, done: &dyn Fn(usize, &Result<()>)) -> usize {
        let mut spans = lock(&self.spans);
        while let Some(span) = spans.get(next) {
            if span.left > 0 {
                if !all {
                    break;
                }
                spans = self
                    .changed
                    .wait(spans)
                    .unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let result = span.failure.clone().map_or(Ok(()), Err);
            drop(spans);
            done(next, &result);
            next += 1;
            spans = lock(&self.spans);
        }
        next
    }
}

/// One piece of a span on its way. Its end is noted when this is dropped.
struct Moving {
    filling: Arc<Filling>,
    index: usize,
    result: Result<()>,
}

impl Drop for Moving {
    fn drop(&mut self) {
        let mut spans = lock(&self.filling.spans);
        let span = &mut spans[self.index];
        span.left -= 1;
        if let Err(error) = std::mem::replace(&mut self.result, Ok(())) {
            span.failure.get_or_insert(error);
        }
        self.filling.changed.notify_all();
    }
}

/// Moves the source into every span. One result for each span: a span that failed does not stop
/// the others. `done` hears of each on this thread, in order, soon after it is complete.
pub fn fill(
    engine: &Engine,
    spans: &[Span],
    source: &Arc<dyn Source>,
    control: &Arc<Control>,
    done: &dyn Fn(usize, &Result<()>),
) -> Vec<Result<()>> {
    let batch = Batch::default();
    let pieces = pieces(spans);
    let mut filled = vec![Filled::default(); spans.len()];
    for (index, _) in &pieces {
        filled[*index].left += 1;
    }
    let filling = Arc::new(Filling {
        spans: Mutex::new(filled),
        changed: Condvar::new(),
    });
    let mut reported = 0;
    for (index, offset) in pieces {
        let span = &spans[index];
        let mut moving = Moving {
            filling: Arc::clone(&filling),
            index,
            // What holds unless the work comes to its end.
            result: Err(Error::new(ErrorKind::Internal, "a copy thread panicked")),
        };
        reported = filling.report(reported, false, done);
        if filling.failed(index) {
            continue;
        }
        let step = control.check().and_then(|()| {
            let streams = engine.streams(&span.device)?;
            Ok((streams, engine.ring(&span.device)?.acquire()?))
        });
        let (streams, mut slot) = match step {
            Ok(step) => step,
            Err(error) => {
                moving.result = Err(error);
                continue;
            }
        };
        let length = PIECE.min((span.bytes - offset) as usize);
        let address = span.address + offset;
        let (source, control) = (Arc::clone(source), Arc::clone(control));
        batch.submit(engine.workers(), move || {
            moving.result = source
                .read(index, offset, slot.bytes_mut(length))
                .and_then(|()| slot.copy_to_device(&streams, address, length));
            if moving.result.is_ok() {
                control.advance(length as u64);
            }
            Ok(())
        });
    }
    filling.report(reported, true, done);
    // The jobs hold the source and the device. A panic was noted as the end of its piece.
    let _ = batch.wait();
    let spans = lock(&filling.spans);
    spans
        .iter()
        .map(|span| span.failure.clone().map_or(Ok(()), Err))
        .collect()
}

/// (span, offset) of every piece, alternating between devices so that their buses work together.
fn pieces(spans: &[Span]) -> Vec<(usize, u64)> {
    let mut by_device: Vec<(u32, Vec<(usize, u64)>)> = Vec::new();
    for (index, span) in spans.iter().enumerate() {
        let ordinal = span.device.info().ordinal;
        let offsets = (0..span.bytes).step_by(PIECE).map(|offset| (index, offset));
        match by_device.iter_mut().find(|(known, _)| *known == ordinal) {
            Some((_, list)) => list.extend(offsets),
            None => by_device.push((ordinal, offsets.collect())),
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
