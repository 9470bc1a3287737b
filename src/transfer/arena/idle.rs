//! Pinned memory that nobody uses: made ahead of need, kept up to a limit, and given back.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{Arena, Planned, clip, lock, rounded};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::op::Control;
use crate::transfer::chunk::{Chunk, release_memory};
use crate::transfer::pages::HUGE;

/// Chunks made ahead of need are this large, or as the largest block that is expected.
const AHEAD: usize = 1 << 30;

/// With less than this left to the host, idle memory goes instead of being kept.
pub(super) const PRESSURE: u64 = 1 << 30;

impl Arena {
    /// Makes sure that `bytes` are pinned beyond what is used now, in pieces for blocks of up to
    /// `largest` bytes, and waits until they are. From then on that much is kept while nobody uses
    /// it, even if it is more than the arena's `keep`, until a trim to less.
    pub fn prewarm(
        &self,
        device: &Arc<dyn Device>,
        bytes: u64,
        largest: u64,
        control: &Control,
    ) -> Result<()> {
        control.check()?;
        let wanted = rounded(bytes)
            .ok()
            .and_then(|bytes| bytes.checked_next_multiple_of(HUGE))
            .ok_or_else(|| Error::invalid("bytes", "does not fit the address space"))?;
        let piece = rounded(largest)?.next_multiple_of(HUGE).max(AHEAD);
        let (missing, before) = {
            let mut state = lock(&self.inner);
            let before = state.prewarmed;
            state.prewarmed = before.max(wanted);
            let free: usize = state
                .chunks
                .values()
                .filter(|chunk| chunk.is_of_use())
                .map(|chunk| chunk.bytes - chunk.used)
                .sum();
            (wanted.saturating_sub(free), before)
        };
        control.total.fetch_add(bytes, Ordering::Relaxed);
        control.advance(bytes.saturating_sub(missing as u64));
        let made = self.prewarm_missing(device, missing, piece, control);
        if made.is_err() {
            lock(&self.inner).prewarmed = before;
            self.trim_in_background();
        }
        made
    }

    fn prewarm_missing(
        &self,
        device: &Arc<dyn Device>,
        missing: usize,
        piece: usize,
        control: &Control,
    ) -> Result<()> {
        if missing == 0 {
            return Ok(());
        }
        self.check_limits(missing)?;
        let plan = (0..missing)
            .step_by(piece)
            .map(|offset| Planned {
                bytes: piece.min(missing - offset),
                parts: Vec::new(),
            })
            .collect();
        let grown = self.grow(device, plan, true)?;
        grown.growth.wait(|bytes| control.advance(bytes as u64))
    }

    /// What stays pinned while nobody uses it.
    pub(super) fn kept(&self) -> usize {
        if self
            .inner
            .headroom
            .recent()
            .is_some_and(|left| left < PRESSURE)
        {
            return 0;
        }
        self.inner.keep.max(lock(&self.inner).prewarmed)
    }

    /// Unpins idle chunks beyond what is kept, without making this thread wait for it.
    pub(super) fn trim_in_background(&self) {
        for (base, chunk) in self.take_out_idle(self.kept()) {
            let arena = self.clone();
            self.inner.workers.submit(move || {
                arena.release(base, Some(chunk));
            });
        }
    }

    /// Takes idle chunks out of the table: all that are of no use, and of the others as many as
    /// leave at most `keep` bytes idle, small ones first, so that little more than that goes.
    pub(super) fn take_out_idle(&self, keep: usize) -> Vec<(usize, Chunk)> {
        let mut state = lock(&self.inner);
        let mut idle: Vec<(bool, usize, usize)> = state
            .chunks
            .iter()
            .filter(|(_, chunk)| chunk.is_idle())
            .map(|(&base, chunk)| (chunk.is_of_use(), chunk.bytes, base))
            .collect();
        idle.sort_unstable();
        let mut excess = idle
            .iter()
            .filter(|(of_use, ..)| *of_use)
            .map(|(_, bytes, _)| bytes)
            .sum::<usize>()
            .saturating_sub(keep);
        idle.into_iter()
            .filter_map(|(of_use, bytes, base)| {
                if of_use && excess == 0 {
                    return None;
                }
                if of_use {
                    excess = excess.saturating_sub(bytes);
                }
                state.chunks.remove(&base).map(|chunk| (base, chunk))
            })
            .collect()
    }

    /// Unpins, before it returns, idle memory until at most `keep` bytes of it are left, prewarmed
    /// memory too. Returns the bytes that went.
    pub fn trim(&self, keep: u64) -> u64 {
        let keep = clip(keep);
        {
            let mut state = lock(&self.inner);
            state.prewarmed = state.prewarmed.min(keep);
        }
        self.take_out_idle(keep)
            .into_iter()
            .map(|(base, chunk)| {
                let bytes = chunk.bytes as u64;
                if self.release(base, Some(chunk)) {
                    bytes
                } else {
                    0
                }
            })
            .sum()
    }

    /// Unpins, before it returns, all that nobody uses; false if there was nothing.
    pub fn release_idle(&self) -> bool {
        let leaving = self.take_out_idle(0);
        let found = !leaving.is_empty();
        for (base, chunk) in leaving {
            self.release(base, Some(chunk));
        }
        found
    }

    /// Unregisters a chunk that was taken out of the table, and gives its memory back. What the
    /// driver refuses to unregister goes back into the table, to be tried again by a later trim.
    pub(in crate::transfer) fn release(&self, base: usize, chunk: Option<Chunk>) -> bool {
        let Some(chunk) = chunk else { return true };
        let bytes = chunk.bytes;
        let kept = release_memory(base, chunk);
        let mut state = lock(&self.inner);
        let released = kept.is_none();
        match kept {
            None => state.pinned -= bytes,
            Some(chunk) => drop(state.chunks.insert(base, chunk)),
        }
        released
    }
}
