//! Between device memory and places a device cannot reach (pageable memory, files, stores): a ring
//! of pinned slots, filled and emptied by several threads while the bus works on the others.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::arena::{Arena, Block};
use super::streams::{Settled, Streams};
use super::workers::Batch;
use super::{Control, Engine, Span};
use crate::device::{Address, Device, Direction, Event};
use crate::error::{Error, Result, ResultExt};

/// Bytes that move at once: large enough for the full speed of the bus.
pub const PIECE: usize = 8 << 20;

/// Bytes of a ring unless its engine was told otherwise.
pub const RING: usize = super::chunk::SLICE;

/// Fewer slots than this would make the bus and the threads take turns.
const FEWEST: usize = 2;

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
    /// Slots of queued copies that nobody waits for, in the order they were queued.
    leaving: VecDeque<Leaving>,
    /// Slots that a device may still write to or read from.
    abandoned: Vec<(usize, Arc<dyn Device>)>,
}

/// A slot that is free when its event has passed.
struct Leaving {
    index: usize,
    streams: Arc<Streams>,
    event: Event,
}

impl Leaving {
    /// Waits; gives back the index and, where the device did not answer, that device.
    fn wait(self) -> (usize, Option<Arc<dyn Device>>) {
        let passed = self.streams.device.event_synchronize(self.event);
        self.streams.give_event(self.event);
        match passed {
            Ok(()) => (self.index, None),
            Err(_) => (self.index, Some(Arc::clone(&self.streams.device))),
        }
    }
}

/// The slots, shared by all that stage.
pub struct Ring {
    block: Block,
    count: usize,
    slots: Mutex<Slots>,
    changed: Condvar,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Ring {
    /// `bytes` are rounded to whole slots.
    pub fn new(arena: &Arena, device: &Arc<dyn Device>, bytes: usize) -> Result<Ring> {
        let count = (bytes / PIECE).max(FEWEST);
        // A chunk of its own, which backups neither share nor keep pinned.
        let block = arena.allocate_alone(device, (PIECE * count) as u64)?;
        block.wait().context(|| "staging memory")?;
        Ok(Ring {
            block,
            count,
            slots: Mutex::new(Slots {
                free: (0..count).collect(),
                leaving: VecDeque::new(),
                abandoned: Vec::new(),
            }),
            changed: Condvar::new(),
        })
    }

    /// Whether no device can be working on a slot that nobody holds.
    pub fn is_settled(&self) -> bool {
        let mut slots = lock(&self.slots);
        for leaving in std::mem::take(&mut slots.leaving) {
            let (index, unsettled) = leaving.wait();
            slots
                .abandoned
                .extend(unsettled.map(|device| (index, device)));
        }
        slots
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
            if let Some(leaving) = slots.leaving.pop_front() {
                drop(slots);
                let (index, unsettled) = leaving.wait();
                slots = lock(&self.slots);
                match unsettled {
                    None => slots.free.push(index),
                    Some(device) => slots.abandoned.push((index, device)),
                }
                continue;
            }
            if let Some((index, device)) = slots.abandoned.pop() {
                drop(slots);
                let answer = device.synchronize();
                slots = lock(&self.slots);
                match answer {
                    Ok(()) => slots.free.push(index),
                    Err(error) => {
                        slots.abandoned.push((index, device));
                        if slots.abandoned.len() == self.count {
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
    /// [`PIECE`] bytes, page aligned.
    pub fn pointer(&self) -> *mut u8 {
        // SAFETY: the block is `PIECE * count` bytes long and the index below `count`.
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

    /// Gives the slot back once `event`, which `streams` gave and which was recorded after the last
    /// copy, has passed. Nobody waits for that before the slot is needed.
    pub fn leave(mut self, streams: &Arc<Streams>, event: Event) {
        let index = std::mem::replace(&mut self.index, usize::MAX);
        lock(&self.ring.slots).leaving.push_back(Leaving {
            index,
            streams: Arc::clone(streams),
            event,
        });
        self.ring.changed.notify_one();
    }

    /// Marks the slot as perhaps still used by the device; it is free again once that is settled.
    pub fn abandon(&mut self, device: &Arc<dyn Device>) {
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

/// Moves the source into every span. One result for each span: a span that failed does not stop
/// the others.
pub fn fill(
    engine: &Engine,
    spans: &[Span],
    source: &Arc<dyn Source>,
    control: &Arc<Control>,
) -> Vec<Result<()>> {
    let batch = Batch::default();
    let failures: Arc<Vec<Mutex<Option<Error>>>> =
        Arc::new(spans.iter().map(|_| Mutex::new(None)).collect());
    for (index, offset) in pieces(spans) {
        let span = &spans[index];
        if lock(&failures[index]).is_some() {
            continue;
        }
        let step = control.check().and_then(|()| {
            let streams = engine.streams(&span.device)?;
            Ok((streams, engine.ring(&span.device)?.acquire()?))
        });
        let (streams, mut slot) = match step {
            Ok(step) => step,
            Err(error) => {
                lock(&failures[index]).get_or_insert(error);
                continue;
            }
        };
        let length = PIECE.min((span.bytes - offset) as usize);
        let address = span.address + offset;
        let (source, control) = (Arc::clone(source), Arc::clone(control));
        let failures = Arc::clone(&failures);
        batch.submit(engine.workers(), move || {
            let moved = source
                .read(index, offset, slot.bytes_mut(length))
                .and_then(|()| slot.copy_to_device(&streams, address, length));
            match moved {
                Ok(()) => control.advance(length as u64),
                Err(error) => {
                    lock(&failures[index]).get_or_insert(error);
                }
            }
            Ok(())
        });
    }
    let all = batch.wait();
    failures
        .iter()
        .map(|failure| match (lock(failure).take(), &all) {
            (Some(error), _) => Err(error),
            (None, Ok(())) => Ok(()),
            (None, Err(error)) => Err(Error::new(error.kind(), error.to_string())),
        })
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
