//! Pieces with a pageable side: packed into, or unpacked from, slots of the staging ring by several
//! threads, while the bus works on other slots.

use std::sync::Arc;

use super::Floor;
use super::lane::Lane;
use super::plan::Item;
use crate::device::Piece;
use crate::error::Result;
use crate::op::Control;
use crate::transfer::staging::{PIECE, Slot};
use crate::transfer::{Batch, Engine};

/// A copy up to this size is done by the calling thread: handing it over would take longer.
const ALONE: u64 = 512 << 10;

/// The least that is worth a slot of its own.
const LEAST: u64 = 512 << 10;

/// A device address and its place in the slot agree modulo this, for the sake of copy kernels.
const ALIGNMENT: u64 = 16;

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
}

/// Cuts the items into loads of about `most` bytes. `aligned` is the side that is on the device.
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
        while let Some(item) = self.items.first() {
            let item = item.part(self.skip, item.piece.bytes - self.skip);
            let phase = (self.aligned)(&item) % ALIGNMENT;
            let start = end + (phase + ALIGNMENT - end % ALIGNMENT) % ALIGNMENT;
            if start >= self.most {
                break;
            }
            let bytes = item.piece.bytes.min(self.most - start);
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

fn loads<'a>(engine: &Engine, items: &'a [Item], aligned: fn(&Item) -> u64) -> (Loads<'a>, bool) {
    let total: u64 = items.iter().map(|item| item.piece.bytes).sum();
    // Two slots for each thread, where there is so much.
    let share = total / (2 * engine.workers().most() as u64);
    let most = share.next_multiple_of(LEAST).clamp(LEAST, PIECE as u64);
    let loads = Loads {
        items,
        skip: 0,
        most,
        aligned,
    };
    (loads, total <= ALONE)
}

/// Queues or does `job`, whose bytes from `at` on are not certain if it fails.
fn hand_out(
    work: &Work,
    alone: bool,
    at: u64,
    job: impl FnOnce(&Work) -> Result<()> + Send + 'static,
) -> Result<()> {
    let inner = work.clone();
    let job = move || job(&inner).inspect_err(|_| inner.floor.lower(at));
    if alone {
        return job();
    }
    work.batch.submit(work.engine.workers(), job);
    Ok(())
}

/// Gives every load a slot and to `each`, until one fails.
fn each_load(
    work: &Work,
    lane: &mut Lane,
    loads: Loads<'_>,
    mut each: impl FnMut(Slot, &mut Lane, Load) -> Result<()>,
) -> Result<()> {
    let first = loads.items.first().map_or(u64::MAX, |item| item.at);
    let ring = work
        .engine
        .ring(lane.device())
        .inspect_err(|_| work.floor.lower(first))?;
    for load in loads {
        let at = load.at();
        if work.batch.failed() {
            // The batch tells why.
            work.floor.lower(at);
            return Ok(());
        }
        work.control
            .check()
            .and_then(|()| ring.acquire())
            .and_then(|slot| each(slot, lane, load))
            .inspect_err(|_| work.floor.lower(at))?;
    }
    Ok(())
}

/// Where the parts of a load lie in its slot.
fn in_slot(slot: &Slot, load: &Load, place: impl Fn(&mut Piece, u64)) -> Vec<Item> {
    let base = slot.pointer() as u64;
    let staged = load.parts.iter().map(|(item, start)| {
        let mut item = *item;
        place(&mut item.piece, base + start);
        item
    });
    staged.collect()
}

/// Copies from pageable memory. When the jobs of the batch are done, the source was read and the
/// rest is queued on the lane's stream.
///
/// # Safety
/// Sources stay valid until the batch was waited for, destinations until the stream has passed.
pub(super) unsafe fn to_device(work: &Work, lane: &mut Lane, items: &[Item]) -> Result<()> {
    let (loads, alone) = loads(&work.engine, items, |item| item.piece.destination);
    if let Some(item) = items.first() {
        lane.begin(item.at);
    }
    each_load(work, lane, loads, |slot, lane, load| {
        let mut lane = lane.beside(&work.engine, load.parts.len())?;
        hand_out(work, alone, load.at(), move |work| {
            let staged = in_slot(&slot, &load, |piece, place| piece.source = place);
            for ((item, _), staged) in load.parts.iter().zip(&staged) {
                let piece = &item.piece;
                // SAFETY: the source is valid by the function's contract; the slot is ours, and a
                // load fits into it.
                unsafe { copy_bytes(staged.piece.source, piece.source, piece.bytes) };
            }
            // SAFETY: the slot is pinned and leaves behind the copies; destinations by contract.
            unsafe { queue_and_leave(work, &mut lane, slot, &staged) }?;
            work.control.advance(load.bytes);
            Ok(())
        })
    })
}

/// Queues copies that use `slot`, which is free again when they are done.
///
/// # Safety
/// As for [`Lane::queue`].
pub(super) unsafe fn queue_and_leave(
    work: &Work,
    lane: &mut Lane,
    mut slot: Slot,
    items: &[Item],
) -> Result<()> {
    let event = lane.streams.take_event()?;
    // SAFETY: by this function's contract.
    let queued = unsafe { lane.queue(&work.engine, items) }
        .and_then(|()| lane.device().event_record(event, lane.stream));
    match queued {
        Ok(()) => {
            slot.leave(&lane.streams, event);
            Ok(())
        }
        Err(error) => {
            lane.streams.give_event(event);
            slot.abandon(lane.device());
            Err(error)
        }
    }
}

/// Copies into pageable memory. When the jobs of the batch are done, the bytes are there.
///
/// # Safety
/// Both sides stay valid until the batch was waited for.
pub(super) unsafe fn to_host(work: &Work, lane: &mut Lane, items: &[Item]) -> Result<()> {
    let (loads, alone) = loads(&work.engine, items, |item| item.piece.source);
    each_load(work, lane, loads, |mut slot, lane, load| {
        let staged = in_slot(&slot, &load, |piece, place| piece.destination = place);
        let mut lane = lane.beside(&work.engine, staged.len())?;
        let event = lane.streams.take_event()?;
        // SAFETY: sources by this function's contract; the slot is waited for, or abandoned.
        let queued = unsafe { lane.queue(&work.engine, &staged) }
            .and_then(|()| lane.device().event_record(event, lane.stream));
        if let Err(error) = queued {
            lane.streams.give_event(event);
            slot.abandon(lane.device());
            return Err(error);
        }
        let streams = Arc::clone(&lane.streams);
        hand_out(work, alone, load.at(), move |work| {
            let waited = streams.device.event_synchronize(event);
            streams.give_event(event);
            if let Err(error) = waited {
                slot.abandon(&streams.device);
                return Err(error);
            }
            for ((item, _), staged) in load.parts.iter().zip(&staged) {
                let piece = &item.piece;
                // SAFETY: the destination is valid by the function's contract; the slot is ours,
                // and no copy writes to it any more.
                unsafe { copy_bytes(piece.destination, staged.piece.destination, piece.bytes) };
            }
            work.control.advance(load.bytes);
            Ok(())
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
    if let Some(item) = items.first() {
        to.begin(item.at);
    }
    let (loads, _) = loads(&work.engine, items, |item| item.piece.source);
    each_load(work, from, loads, |mut slot, from, load| {
        let into = in_slot(&slot, &load, |piece, place| piece.destination = place);
        let out_of = in_slot(&slot, &load, |piece, place| piece.source = place);
        let mut from = from.beside(&work.engine, into.len())?;
        let mut onward = to.beside(&work.engine, out_of.len())?;
        let streams = Arc::clone(&from.streams);
        let event = streams.event()?;
        // SAFETY: the source by this function's contract; the slot leaves behind the second copy.
        let queued = unsafe { from.queue(&work.engine, &into) }
            .and_then(|()| from.device().event_record(event.event(), from.stream))
            .and_then(|()| to.device().stream_wait(to.stream, event.event()));
        drop(event);
        if let Err(error) = queued {
            slot.abandon(from.device());
            return Err(error);
        }
        // SAFETY: as above, for the destination.
        unsafe { queue_and_leave(work, &mut onward, slot, &out_of) }?;
        work.control.advance(load.bytes);
        Ok(())
    })
}

/// Copies between places in host memory. Done when the batch is.
///
/// # Safety
/// Both sides stay valid until the batch was waited for.
pub(super) unsafe fn on_host(work: &Work, items: &[Item]) -> Result<()> {
    let (loads, alone) = loads(&work.engine, items, |_| 0);
    for load in loads {
        let at = load.at();
        if work.batch.failed() {
            work.floor.lower(at);
            return Ok(());
        }
        work.control.check().inspect_err(|_| work.floor.lower(at))?;
        hand_out(work, alone, at, move |work| {
            for (item, _) in &load.parts {
                let piece = &item.piece;
                // SAFETY: by the function's contract.
                unsafe { copy_bytes(piece.destination, piece.source, piece.bytes) };
            }
            work.control.advance(load.bytes);
            Ok(())
        })?;
    }
    Ok(())
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
}
