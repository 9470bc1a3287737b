//! Pieces with a pageable side: packed into, or unpacked from, slots of the staging ring by several
//! threads, while the bus works on other slots.
//!
//! The thread that calls waits for slots and gives each, with its load, to a job. Jobs never wait
//! for slots, so those that hold one come to an end.

use std::sync::Arc;

use super::Floor;
use super::lane::Lane;
use super::lists;
use super::plan::Item;
use crate::device::{Event, Piece};
use crate::error::Result;
use crate::op::Control;
use crate::transfer::staging::{PIECE, Slot};
use crate::transfer::{Batch, Engine, Streams};

/// A copy up to this size is done by the calling thread: handing it over would take longer.
const ALONE: u64 = 512 << 10;

/// The least that is worth a slot of its own.
const LEAST: u64 = 256 << 10;

/// A device address and its place in the slot agree modulo this, for the sake of copy kernels.
const ALIGNMENT: u64 = 16;

/// Room at the end of a slot for the entry of a piece in a kernel's list.
const ENTRY: u64 = size_of::<Piece>() as u64;

/// What several threads share of one call.
#[derive(Clone)]
pub(super) struct Work {
    pub engine: Arc<Engine>,
    pub control: Arc<Control>,
    pub floor: Arc<Floor>,
    pub batch: Batch,
}

/// What one slot carries: the pieces, and where each begins in the slot.
struct Load {
    parts: Vec<(Item, u64)>,
    bytes: u64,
}

impl Load {
    fn at(&self) -> u64 {
        self.parts.first().map_or(u64::MAX, |(item, _)| item.at)
    }

    /// The parts with their places in `slot` on one side.
    fn in_slot(&self, slot: &Slot, place: impl Fn(&mut Piece, u64)) -> Vec<Item> {
        let base = slot.pointer() as u64;
        let staged = self.parts.iter().map(|(item, start)| {
            let mut item = *item;
            place(&mut item.piece, base + start);
            item
        });
        staged.collect()
    }

    /// Where a kernel's list of the parts goes in `slot`: behind them, to its very end.
    fn list_in(&self, slot: &Slot) -> *mut Piece {
        let offset = PIECE - self.parts.len() * ENTRY as usize;
        // SAFETY: `Loads` left that much room at the end of the slot where there are several parts,
        // and one alone is not listed.
        unsafe { slot.pointer().add(offset).cast() }
    }
}

/// Cuts items into loads of at most `most` bytes. `aligned` is the address that copy kernels want
/// aligned.
struct Loads<'a> {
    items: &'a [Item],
    /// Bytes of the first item that went already.
    skip: u64,
    most: u64,
    aligned: fn(&Item) -> u64,
}

impl Iterator for Loads<'_> {
    type Item = Load;

    fn next(&mut self) -> Option<Load> {
        let mut load = Load {
            parts: Vec::new(),
            bytes: 0,
        };
        let mut end = 0;
        // Of more than one list a job would have to wait for the second.
        while load.parts.len() < lists::PIECES
            && let Some(item) = self.items.first()
        {
            let item = item.part(self.skip, item.piece.bytes - self.skip);
            // A part alone needs no list.
            let room = match load.parts.len() as u64 {
                0 => self.most,
                before => self.most.saturating_sub((before + 1) * ENTRY),
            };
            let phase = (self.aligned)(&item) % ALIGNMENT;
            let start = end + (phase + ALIGNMENT - end % ALIGNMENT) % ALIGNMENT;
            if start >= room {
                break;
            }
            let bytes = item.piece.bytes.min(room - start);
            load.parts.push((item.part(0, bytes), start));
            load.bytes += bytes;
            end = start + bytes;
            if bytes == item.piece.bytes {
                self.items = &self.items[1..];
                self.skip = 0;
            } else {
                self.skip += bytes;
                break;
            }
        }
        (!load.parts.is_empty()).then_some(load)
    }
}

/// The items in loads of a size that gives every thread some.
fn loads<'a>(work: &Work, items: &'a [Item], aligned: fn(&Item) -> u64) -> Loads<'a> {
    let total: u64 = items.iter().map(|item| item.piece.bytes).sum();
    // Two slots for each thread, where there is so much.
    let share = total / (2 * work.engine.workers().most() as u64);
    let most = share.next_multiple_of(LEAST).clamp(LEAST, PIECE as u64);
    Loads {
        items,
        skip: 0,
        most: if total <= ALONE { PIECE as u64 } else { most },
        aligned,
    }
}

/// Gives every load to `each`, until one fails. Nothing from the one that failed on is certain.
fn each_load(
    work: &Work,
    loads: Loads<'_>,
    mut each: impl FnMut(Load, bool) -> Result<()>,
) -> Result<()> {
    let mut loads = loads.peekable();
    let mut first = true;
    while let Some(load) = loads.next() {
        let at = load.at();
        if work.batch.failed() {
            // The batch tells why.
            work.floor.lower(at);
            return Ok(());
        }
        let alone = first && loads.peek().is_none();
        first = false;
        work.control
            .check()
            .and_then(|()| each(load, alone))
            .inspect_err(|_| work.floor.lower(at))?;
    }
    Ok(())
}

/// Has `job` done by a thread, or, where that would take longer, by this one.
fn hand_out(
    work: &Work,
    alone: bool,
    load: Load,
    job: impl FnOnce(&Work, &Load) -> Result<()> + Send + 'static,
) -> Result<()> {
    let inner = work.clone();
    let job = move || {
        job(&inner, &load).inspect_err(|_| inner.floor.lower(load.at()))?;
        inner.control.advance(load.bytes);
        Ok(())
    };
    if alone {
        return job();
    }
    work.batch.submit(work.engine.workers(), job);
    Ok(())
}

/// Finds out the methods for a group of several items, before threads need them.
fn choose(work: &Work, lane: &mut Lane, items: &[Item]) -> Result<()> {
    if items.len() < 2 {
        return Ok(());
    }
    lane.choose(&work.engine).inspect_err(|_| {
        work.floor
            .lower(items.first().map_or(u64::MAX, |item| item.at));
    })
}

fn acquire(work: &Work, lane: &Lane) -> Result<Slot> {
    work.engine.ring(lane.device())?.acquire()
}

/// Copies from pageable memory. When the jobs of the batch are done, the source was read and the
/// rest is queued on the lane's stream.
///
/// # Safety
/// Sources stay valid until the batch was waited for, destinations until the stream has passed.
pub(super) unsafe fn to_device(work: &Work, lane: &mut Lane, items: &[Item]) -> Result<()> {
    choose(work, lane, items)?;
    if let Some(item) = items.first() {
        lane.begin(item.at);
    }
    let loads = loads(work, items, |item| item.piece.destination);
    each_load(work, loads, |load, alone| {
        let slot = acquire(work, lane)?;
        let mut lane = lane.beside();
        hand_out(work, alone, load, move |work, load| {
            let staged = load.in_slot(&slot, |piece, place| piece.source = place);
            for ((item, _), staged) in load.parts.iter().zip(&staged) {
                let piece = &item.piece;
                // SAFETY: the source is valid by the function's contract; the slot is ours, and a
                // load fits into it.
                unsafe { copy_bytes(staged.piece.source, piece.source, piece.bytes) };
            }
            let room = Some(load.list_in(&slot));
            // SAFETY: the slot is pinned and leaves behind the copies; destinations by contract.
            unsafe { queue_and_leave(work, &mut lane, slot, room, &staged) }
        })
    })
}

/// Queues copies that use `slot`, which is free again when they are done.
///
/// # Safety
/// As for [`Lane::queue`].
unsafe fn queue_and_leave(
    work: &Work,
    lane: &mut Lane,
    mut slot: Slot,
    room: Option<*mut Piece>,
    staged: &[Item],
) -> Result<()> {
    // SAFETY: by this function's contract.
    match unsafe { queue_load(work, lane, room, staged) } {
        Ok(event) => {
            slot.leave(&lane.streams, event);
            Ok(())
        }
        Err(error) => {
            slot.abandon(lane.device());
            Err(error)
        }
    }
}

/// Queues a load, and the event behind it. After an error the device may use the slot.
///
/// # Safety
/// As for [`Lane::queue`], until the event has passed.
unsafe fn queue_load(
    work: &Work,
    lane: &mut Lane,
    room: Option<*mut Piece>,
    staged: &[Item],
) -> Result<Event> {
    let event = lane.streams.take_event()?;
    // SAFETY: by this function's contract.
    let queued = unsafe { lane.queue(&work.engine, staged, room) }
        .and_then(|()| lane.device().event_record(event, lane.stream));
    match queued {
        Ok(()) => Ok(event),
        Err(error) => {
            lane.streams.give_event(event);
            Err(error)
        }
    }
}

/// A load on its way from the device.
struct Flight {
    staged: Vec<Item>,
    streams: Arc<Streams>,
    event: Event,
    slot: Slot,
    landed: bool,
}

impl Drop for Flight {
    fn drop(&mut self) {
        if !self.landed {
            self.slot.abandon(&self.streams.device);
        }
        self.streams.give_event(self.event);
    }
}

impl Flight {
    /// # Safety
    /// As for [`Lane::queue`].
    unsafe fn start(work: &Work, lane: &mut Lane, mut slot: Slot, load: &Load) -> Result<Flight> {
        let staged = load.in_slot(&slot, |piece, place| piece.destination = place);
        // SAFETY: by this function's contract; the slot is waited for, or abandoned.
        match unsafe { queue_load(work, lane, Some(load.list_in(&slot)), &staged) } {
            Ok(event) => Ok(Flight {
                staged,
                streams: Arc::clone(&lane.streams),
                event,
                slot,
                landed: false,
            }),
            Err(error) => {
                slot.abandon(lane.device());
                Err(error)
            }
        }
    }

    /// Waits, and puts the bytes where they belong.
    ///
    /// # Safety
    /// The destinations are valid.
    unsafe fn land(mut self, load: &Load) -> Result<()> {
        self.streams.device.event_synchronize(self.event)?;
        self.landed = true;
        for ((item, _), staged) in load.parts.iter().zip(&self.staged) {
            let piece = &item.piece;
            // SAFETY: by this function's contract; the slot is ours, and no copy writes to it any
            // more.
            unsafe { copy_bytes(piece.destination, staged.piece.destination, piece.bytes) };
        }
        Ok(())
    }
}

/// Copies into pageable memory. When the jobs of the batch are done, the bytes are there.
///
/// # Safety
/// Both sides stay valid until the batch was waited for.
pub(super) unsafe fn to_host(work: &Work, lane: &mut Lane, items: &[Item]) -> Result<()> {
    choose(work, lane, items)?;
    let loads = loads(work, items, |item| item.piece.source);
    each_load(work, loads, |load, alone| {
        let slot = acquire(work, lane)?;
        // SAFETY: by the function's contract.
        let flight = unsafe { Flight::start(work, &mut lane.beside(), slot, &load) }?;
        // SAFETY: as above.
        hand_out(work, alone, load, move |_, load| unsafe {
            flight.land(load)
        })
    })
}

/// Copies between devices that cannot reach each other: to a slot on one stream, from it on the
/// other, which waits for the first. Queues everything; nothing is waited for but slots.
///
/// # Safety
/// Both sides stay valid until the second stream has passed.
pub(super) unsafe fn between_devices(
    work: &Work,
    lanes: (&mut Lane, &mut Lane),
    items: &[Item],
) -> Result<()> {
    let (from, to) = lanes;
    choose(work, from, items)?;
    choose(work, to, items)?;
    if let Some(item) = items.first() {
        // Both are waited for: where the first fails, the second may be told nothing of it.
        from.begin(item.at);
        to.begin(item.at);
    }
    let loads = loads(work, items, |item| item.piece.source);
    each_load(work, loads, |load, _| {
        let mut slot = acquire(work, from)?;
        let (mut from, mut to) = (from.beside(), to.beside());
        let into = load.in_slot(&slot, |piece, place| piece.destination = place);
        let out_of = load.in_slot(&slot, |piece, place| piece.source = place);
        let room = Some(load.list_in(&slot));
        // SAFETY: the source by this function's contract; the slot leaves behind the second copy,
        // or is abandoned.
        let queued = unsafe { queue_load(work, &mut from, room, &into) };
        let followed = queued.and_then(|event| {
            let followed = to.device().stream_wait(to.stream, event);
            from.streams.give_event(event);
            followed
        });
        if let Err(error) = followed {
            slot.abandon(from.device());
            return Err(error);
        }
        // The room is taken; this thread may wait for other.
        // SAFETY: as above, for the destination.
        unsafe { queue_and_leave(work, &mut to, slot, None, &out_of) }?;
        work.control.advance(load.bytes);
        Ok(())
    })
}

/// Copies between places in host memory. Done when the batch is.
///
/// # Safety
/// Both sides stay valid until the batch was waited for.
pub(super) unsafe fn on_host(work: &Work, items: &[Item]) -> Result<()> {
    each_load(work, loads(work, items, |_| 0), |load, alone| {
        hand_out(work, alone, load, |_, load| {
            for (item, _) in &load.parts {
                let piece = &item.piece;
                // SAFETY: by the function's contract.
                unsafe { copy_bytes(piece.destination, piece.source, piece.bytes) };
            }
            Ok(())
        })
    })
}

/// # Safety
/// Both sides are valid host memory, do not overlap, and nobody else writes to them.
unsafe fn copy_bytes(destination: u64, source: u64, bytes: u64) {
    let from = std::ptr::with_exposed_provenance::<u8>(source as usize);
    let to = std::ptr::with_exposed_provenance_mut::<u8>(destination as usize);
    // SAFETY: by this function's contract.
    unsafe { std::ptr::copy_nonoverlapping(from, to, bytes as usize) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loads_carry_every_byte_once_and_keep_the_alignment() {
        let sizes = [1u64, 15, 16, 17, 5000, 3, 700_000, 2, 524_288, 9];
        let mut at = 0;
        let items: Vec<Item> = sizes
            .iter()
            .map(|&bytes| {
                let item = Item {
                    piece: Piece {
                        destination: (1 << 30) + at * 3 + 5,
                        source: (1 << 20) + at,
                        bytes,
                    },
                    at,
                };
                at += bytes;
                item
            })
            .collect();
        let loads = Loads {
            items: &items,
            skip: 0,
            most: 1 << 18,
            aligned: |item| item.piece.destination,
        };
        let mut next = 0;
        for load in loads {
            let mut end = 0;
            let mut bytes = 0;
            for (item, start) in &load.parts {
                assert_eq!(item.at, next);
                assert_eq!(item.piece.source, (1 << 20) + next);
                assert_eq!(item.piece.destination % ALIGNMENT, start % ALIGNMENT);
                assert!(*start >= end);
                end = start + item.piece.bytes;
                next += item.piece.bytes;
                bytes += item.piece.bytes;
            }
            assert!(end <= 1 << 18);
            assert_eq!(load.bytes, bytes);
        }
        assert_eq!(next, at);
    }

    #[test]
    fn no_load_needs_a_second_list() {
        let items: Vec<Item> = (0..2 * lists::PIECES as u64 + 7)
            .map(|at| Item {
                piece: Piece {
                    destination: (1 << 30) + at * 2,
                    source: (1 << 20) + at,
                    bytes: 1,
                },
                at,
            })
            .collect();
        let loads = Loads {
            items: &items,
            skip: 0,
            most: PIECE as u64,
            aligned: |item| item.piece.destination,
        };
        let parts: Vec<usize> = loads.map(|load| load.parts.len()).collect();
        assert_eq!(parts, [lists::PIECES, lists::PIECES, 7]);
    }
}
