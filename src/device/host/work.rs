//! What can be queued on a stream of the host device, and doing it.

use std::fmt;
use std::sync::atomic::AtomicBool;

use super::memory::Memory;
use crate::device::fingerprint::Key;
use crate::device::{Address, Direction, Piece, Pitched};
use crate::error::Result;

/// One piece of queued work.
#[derive(Clone, Debug)]
pub(super) enum Work {
    Copy {
        destination: u64,
        source: u64,
        bytes: u64,
        direction: Direction,
    },
    /// Each piece like a copy.
    Batch {
        pieces: Vec<Piece>,
        direction: Direction,
    },
    Pitched {
        copy: Pitched,
        direction: Direction,
    },
    ToPeer {
        piece: Piece,
        peer: u32,
    },
    /// In the place of the copy kernel; `list` is an address.
    Pieces {
        list: u64,
        count: u32,
    },
    /// In the place of the fingerprint kernel; `blocks` and `prints` are addresses.
    Fingerprint {
        key: Box<Key>,
        blocks: u64,
        prints: u64,
        count: u32,
    },
    Fill {
        address: Address,
        value: u8,
        bytes: u64,
    },
    /// Fires the record of this number.
    Record {
        event: u64,
        record: u64,
    },
    /// Goes on once the record of this number has fired.
    Wait {
        record: u64,
    },
}

impl Work {
    /// Does the work for `device`, until done or told to stop.
    pub(super) fn perform(&self, device: u32, memory: &Memory, stop: &AtomicBool) -> Result<()> {
        match *self {
            Work::Copy {
                destination,
                source,
                bytes,
                direction,
                // SAFETY: whoever queued the copy vouched for its host side until the stream has
                // passed it.
            } => unsafe { memory.copy(device, destination, source, bytes, direction, stop) },
            Work::Batch {
                ref pieces,
                direction,
                // SAFETY: as for a copy.
            } => unsafe {
                let pieces = pieces.iter().copied();
                memory.copy_each(device, "pieces", pieces, direction, stop)
            },
            Work::Pitched { copy, direction } => {
                // SAFETY: as for a copy.
                unsafe { memory.copy_each(device, "rows", copy.rows(), direction, stop) }
            }
            Work::ToPeer { piece, peer } => memory.copy_to_peer(device, piece, peer, stop),
            // SAFETY: as for a copy; the list is host memory, too.
            Work::Pieces { list, count } => unsafe {
                memory.copy_pieces(device, list, count, stop)
            },
            Work::Fingerprint {
                ref key,
                blocks,
                prints,
                count,
                // SAFETY: as for a copy; the lists are host memory, too.
            } => unsafe { memory.fingerprint(device, key, blocks, prints, count, stop) },
            Work::Fill {
                address,
                value,
                bytes,
            } => memory.fill(device, address, value, bytes, stop),
            Work::Record { .. } | Work::Wait { .. } => Ok(()),
        }
    }
}

impl fmt::Display for Work {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Work::Copy {
                destination,
                source,
                bytes,
                ..
            } => write!(
                f,
                "copy of {bytes} bytes from {source:#x} to {destination:#x}"
            ),
            Work::Batch { pieces, .. } => write!(f, "batch of {} copies", pieces.len()),
            Work::Pitched { copy, .. } => write!(
                f,
                "copy of {} rows of {} bytes from {:#x} to {:#x}",
                copy.height, copy.width, copy.source, copy.destination
            ),
            Work::ToPeer { piece, peer } => write!(
                f,
                "copy of {} bytes from {:#x} to {:#x} of device {peer}",
                piece.bytes, piece.source, piece.destination
            ),
            Work::Pieces { count, .. } => write!(f, "copy of {count} pieces"),
            Work::Fingerprint { count, .. } => write!(f, "fingerprints of {count} blocks"),
            Work::Fill { address, bytes, .. } => write!(f, "fill of {bytes} bytes at {address:#x}"),
            Work::Record { .. } | Work::Wait { .. } => f.write_str("event"),
        }
    }
}
