//! Which chunks are made for blocks that no chunk has room for.

use crate::error::{Error, Result};
use crate::transfer::pages::{HUGE, PAGE};

/// Small blocks share a chunk of at most this. Large enough for the full speed of registration and
/// to be worth a question to the system, small enough to start copying early and to give back what
/// one owner had. Measured on an H200: a first pause of 10.7 GB at 31, 34, 41 and 42 GB/s with 32,
/// 64, 128 and 256 MiB.
const SHARED: usize = 128 << 20;

/// A chunk to be made, and the blocks at its beginning: what they are called, and their sizes.
pub(super) struct Planned {
    pub bytes: usize,
    pub parts: Vec<(usize, usize)>,
}

/// Packs blocks (name and size) into chunks: large ones alone, small ones together.
pub(super) fn plan_chunks(missing: &[(usize, usize)]) -> Result<Vec<Planned>> {
    let mut plan: Vec<Planned> = Vec::new();
    for &(index, bytes) in missing {
        match plan.last_mut() {
            Some(chunk) if bytes <= SHARED.saturating_sub(chunk.bytes) => {
                chunk.parts.push((index, bytes));
                chunk.bytes += bytes;
            }
            _ => plan.push(Planned {
                bytes,
                parts: vec![(index, bytes)],
            }),
        }
    }
    for chunk in &mut plan {
        chunk.bytes = chunk
            .bytes
            .checked_next_multiple_of(HUGE)
            .ok_or_else(too_large)?;
    }
    Ok(plan)
}

pub(super) fn total_of(plan: &[Planned]) -> Result<usize> {
    plan.iter()
        .try_fold(0usize, |sum, chunk| sum.checked_add(chunk.bytes))
        .ok_or_else(too_large)
}

fn too_large() -> Error {
    Error::invalid("size", "the sum does not fit the address space")
}

/// The size of a block: whole pages, at least one.
pub(super) fn rounded(bytes: u64) -> Result<usize> {
    usize::try_from(bytes)
        .ok()
        .and_then(|bytes| bytes.max(1).checked_next_multiple_of(PAGE))
        .ok_or_else(|| Error::invalid("size", "does not fit the address space"))
}
