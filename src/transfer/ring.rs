//! The ring of pinned slots that staged bytes pass through: who has which slot, and what the devices
//! may still be doing with it. What passes through is the business of `staging`.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::arena::{Arena, Block};
use super::streams::{PooledEvent, Settled, Streams};
use crate::device::{Address, Device, Direction, Event};
use crate::error::{Result, ResultExt};

/// Bytes of a slot, which move at once. Measured on an H200 with 8 to 16 threads, either way: 48
/// GB/s with 1 MiB, 51.5 with 2, 53.2 with 4, 53.7 with 8.
pub const PIECE: usize = 4 << 20;

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
    fn has_passed(&self) -> bool {
        matches!(self.streams.device.event_query(self.event), Ok(true))
    }

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
    /// A ring of `bytes`, in whole slots, at least two.
    pub fn new(arena: &Arena, device: &Arc<dyn Device>, bytes: usize) -> Result<Ring> {
        let count = bytes.div_ceil(PIECE).max(2);
        // A chunk of its own, which backups neither share nor keep pinned.
        let block = arena.allocate_alone(device, (PIECE as u64).saturating_mul(count as u64))?;
        block.wait().context(|| "staging memory")?;
        Ok(Ring {
            block,
            count,
            slots: Mutex::new(Slots {
                // The last is taken first.
                free: (0..count).rev().collect(),
                leaving: VecDeque::new(),
                abandoned: Vec::new(),
            }),
            changed: Condvar::new(),
        })
    }

    /// Number of slots.
    pub fn count(&self) -> usize {
        self.count
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

    /// A slot, if one is free now.
    pub fn try_acquire(self: &Arc<Self>) -> Option<Slot> {
        let oldest = {
            let mut slots = lock(&self.slots);
            if let Some(index) = slots.free.pop() {
                return Some(self.slot(index));
            }
            slots.leaving.pop_front()?
        };
        if oldest.has_passed() {
            oldest.streams.give_event(oldest.event);
            return Some(self.slot(oldest.index));
        }
        lock(&self.slots).leaving.push_front(oldest);
        // Somebody may have come meanwhile, and waits for others to give slots back.
        self.changed.notify_one();
        None
    }

    /// Waits for a free slot. Not for jobs of the workers, because jobs that hold slots may be
    /// queued behind them, nor for whoever holds a slot already.
    pub fn acquire(self: &Arc<Self>) -> Result<Slot> {
        let mut slots = lock(&self.slots);
        loop {
            if let Some(index) = slots.free.pop() {
                return Ok(self.slot(index));
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

    fn slot(self: &Arc<Self>, index: usize) -> Slot {
        Slot {
            ring: Arc::clone(self),
            index,
        }
    }
}

/// One pinned buffer of [`PIECE`] bytes, free again when dropped. After a copy of it failed it must
/// only be dropped.
pub struct Slot {
    ring: Arc<Ring>,
    /// `usize::MAX` once the slot was abandoned.
    index: usize,
}

impl Slot {
    /// [`PIECE`] bytes, page aligned.
    pub fn pointer(&self) -> *mut u8 {
        assert!(self.index < self.ring.count);
        // SAFETY: the block is `PIECE * count` bytes long.
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
        let event = self.queue(streams, address, length, Direction::ToHost)?;
        self.finish(streams, &event, Direction::ToHost)
    }

    /// Copies from the slot to the device and waits.
    pub fn copy_to_device(
        &mut self,
        streams: &Streams,
        address: Address,
        length: usize,
    ) -> Result<()> {
        let event = self.queue(streams, address, length, Direction::ToDevice)?;
        self.finish(streams, &event, Direction::ToDevice)
    }

    /// Starts a copy between the slot and the device, to be waited for as a [`Flight`].
    pub fn start(
        mut self,
        streams: &Streams,
        address: Address,
        length: usize,
        direction: Direction,
    ) -> Result<Flight<'_>> {
        let event = self.queue(streams, address, length, direction)?;
        Ok(Flight {
            slot: self,
            streams,
            event: Some(event),
            direction,
        })
    }

    fn queue<'a>(
        &mut self,
        streams: &'a Streams,
        address: Address,
        length: usize,
        direction: Direction,
    ) -> Result<PooledEvent<&'a Streams>> {
        assert!(length <= PIECE);
        let device = &streams.device;
        let host = self.pointer() as u64;
        let (destination, source) = match direction {
            Direction::ToHost => (host, address),
            Direction::ToDevice | Direction::OnDevice => (address, host),
        };
        let event = streams.event()?;
        let stream = streams.of(direction);
        // SAFETY: the slot is ours and outlives the copy: it is waited for in `finish`, or
        // abandoned.
        let queued = unsafe { device.copy(destination, source, length as u64, direction, stream) }
            .and_then(|()| device.event_record(event.event(), stream));
        match queued {
            Ok(()) => Ok(event),
            Err(error) => {
                self.settle(streams, direction);
                Err(error)
            }
        }
    }

    fn finish(
        &mut self,
        streams: &Streams,
        event: &PooledEvent<&Streams>,
        direction: Direction,
    ) -> Result<()> {
        let waited = streams.device.event_synchronize(event.event());
        if waited.is_err() {
            self.settle(streams, direction);
        }
        waited
    }

    /// After a failure: abandons the slot unless the device is certain to be done with it.
    fn settle(&mut self, streams: &Streams, direction: Direction) {
        if let Settled::Unknown(_) = streams.settle(direction) {
            self.abandon(&streams.device);
        }
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

/// A slot with a copy under way.
pub struct Flight<'a> {
    slot: Slot,
    streams: &'a Streams,
    /// `None` once it was waited for.
    event: Option<PooledEvent<&'a Streams>>,
    direction: Direction,
}

impl Flight<'_> {
    /// Waits for the copy and gives the slot back; after a failure it is given back to the ring.
    pub fn land(mut self) -> Result<Slot> {
        self.wait()?;
        let ring = Arc::clone(&self.slot.ring);
        let index = std::mem::replace(&mut self.slot.index, usize::MAX);
        Ok(ring.slot(index))
    }

    fn wait(&mut self) -> Result<()> {
        match self.event.take() {
            Some(event) => self.slot.finish(self.streams, &event, self.direction),
            None => Ok(()),
        }
    }
}

impl Drop for Flight<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.wait() {
            tracing::debug!("a staged copy that nobody needs failed: {error}");
        }
    }
}
