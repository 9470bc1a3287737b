//! Pinned host memory for backups and staging, in chunks that outlive a single pause.
//!
//! Pinning memory costs far more than copying into it, so blocks come from chunks that were
//! populated and registered once (`growth`): copies into the first chunk start while others are
//! still being populated. A chunk is one registration, because the driver refuses a copy that spans
//! two (seen on an H200: code 1), and the host may copy from a whole backup. This file keeps the
//! books: what is pinned, who has it, what is kept when nobody does, and what may still be taken.
//! It knows nothing about what the bytes mean.

use std::collections::BTreeMap;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::chunk::{Chunk, Phase, release_memory};
use super::growth::Growth;
use super::limits::Headroom;
use super::pages::{self, HUGE, PAGE};
use super::workers::Workers;
use crate::device::Device;
use crate::error::{Error, ErrorKind, Result};
use crate::op::Control;

/// Small blocks share a chunk of at most this. Large enough for the full speed of registration and
/// to be worth a question to the system, small enough to start copying early and to give back what
/// one owner had. Measured on an H200: a first pause of 10.7 GB at 31, 34, 41 and 42 GB/s with 32,
/// 64, 128 and 256 MiB.
const SHARED: usize = 128 << 20;

/// Chunks made ahead of need are this large, or as the largest block that is expected.
const AHEAD: usize = 1 << 30;

/// With less than this left to the host, idle memory goes instead of being kept.
const PRESSURE: u64 = 1 << 30;

#[derive(Default)]
pub(super) struct State {
    /// Chunks by base address.
    pub chunks: BTreeMap<usize, Chunk>,
    pub pinned: usize,
    pub high_water: usize,
    /// What a prewarm asked to be there: idle memory up to this is kept whatever `keep` says.
    prewarmed: usize,
}

impl State {
    pub fn insert(&mut self, base: usize, chunk: Chunk) {
        self.pinned += chunk.bytes;
        self.high_water = self.high_water.max(self.pinned);
        self.chunks.insert(base, chunk);
    }
}

struct Inner {
    /// Protects the book-keeping; never held while memory is populated, registered or released.
    state: Mutex<State>,
    changed: Condvar,
    workers: Arc<Workers>,
    headroom: Headroom,
    /// Bytes of chunks that will be populated, and are not yet in the system's figures.
    promised: AtomicU64,
    limit: usize,
    keep: usize,
}

impl Drop for Inner {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        for (base, chunk) in std::mem::take(&mut state.chunks) {
            if let Err(kept) = release_memory(base, chunk) {
                // The driver still knows the pages, so nobody else may get them.
                std::mem::forget(kept);
            }
        }
    }
}

/// The arena of one platform.
#[derive(Clone)]
pub struct Arena {
    inner: Arc<Inner>,
}

/// Bytes of the arena.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ArenaUse {
    /// Registered or being registered.
    pub pinned: u64,
    /// Part of it that holds backups or staging, or was adopted.
    pub used: u64,
}

/// All figures of the arena, bytes unless said otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ArenaStats {
    /// Registered or being registered.
    pub pinned: u64,
    /// Part of it that holds backups or staging.
    pub used: u64,
    /// Part of it that nobody uses: pinned for the next need.
    pub idle: u64,
    /// Part of it that belongs to somebody else, see [`Arena::adopt`].
    pub adopted: u64,
    /// The most that was pinned at any time.
    pub high_water: u64,
    /// What may be pinned at most.
    pub limit: u64,
    /// What stays pinned while nobody uses it, at most.
    pub keep: u64,
    /// The part of `pinned` that is on huge pages.
    pub huge: u64,
    /// The rest of `pinned`: on pages of 4 KiB, or not populated yet.
    pub small: u64,
    /// Registrations, a number.
    pub chunks: u64,
}

/// Whether a chunk may be populated.
pub(super) enum Claim {
    Granted,
    /// Its blocks were given back before it was touched; it is gone.
    Unwanted,
    /// There is no room for it any more.
    Refused(Error),
}

fn lock(inner: &Inner) -> MutexGuard<'_, State> {
    inner.state.lock().unwrap_or_else(PoisonError::into_inner)
}

fn clip(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

impl Arena {
    /// `limit` bounds all pinned bytes, `keep` what stays pinned while nothing uses it.
    pub fn new(workers: Arc<Workers>, limit: u64, keep: u64) -> Arena {
        Arena::with_headroom(workers, limit, keep, Headroom::of_system())
    }

    /// Like [`Self::new`], with what the host has left told by `headroom`.
    pub fn with_headroom(
        workers: Arc<Workers>,
        limit: u64,
        keep: u64,
        headroom: Headroom,
    ) -> Arena {
        Arena {
            inner: Arc::new(Inner {
                state: Mutex::default(),
                changed: Condvar::new(),
                workers,
                headroom,
                promised: AtomicU64::new(0),
                limit: clip(limit),
                keep: clip(keep),
            }),
        }
    }

    pub(super) fn workers(&self) -> &Workers {
        &self.inner.workers
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.inner)
    }

    /// Bytes of host memory that may still be taken beside what this arena will take; `None` where
    /// the system does not tell.
    pub fn headroom(&self) -> Option<u64> {
        let promised = self.inner.promised.load(Ordering::Relaxed);
        let left = self.inner.headroom.now()?;
        Some(left.saturating_sub(promised))
    }

    /// One block for each size. Either all are given or none; limits are checked for all of them
    /// before memory is touched, and idle memory of ours goes before anything is refused. Blocks of
    /// new chunks become ready in the background, in order: see [`Block::wait`]. They are asked for
    /// again one by one before they are touched, because others of the host take memory too; what
    /// is refused then is an error of its blocks.
    pub fn allocate(&self, device: &Arc<dyn Device>, sizes: &[u64]) -> Result<Vec<Block>> {
        match self.try_allocate(device, sizes) {
            Err(error) if error.kind() == ErrorKind::OutOfHostMemory && self.release_idle() => {
                self.try_allocate(device, sizes)
            }
            other => other,
        }
    }

    /// A block in a chunk that nobody else gets a part of. `bytes` is a multiple of 2 MiB.
    pub fn allocate_alone(&self, device: &Arc<dyn Device>, bytes: u64) -> Result<Block> {
        let bytes = rounded(bytes)?.next_multiple_of(HUGE);
        let plan = vec![Planned {
            bytes,
            parts: vec![(0, bytes)],
        }];
        self.check_limits(bytes)?;
        self.grow(device, plan, false)?
            .blocks
            .pop()
            .map(|(_, block)| block)
            .ok_or_else(|| Error::new(ErrorKind::Internal, "a chunk without its block"))
    }

    fn try_allocate(&self, device: &Arc<dyn Device>, sizes: &[u64]) -> Result<Vec<Block>> {
        let sizes: Vec<usize> = sizes
            .iter()
            .map(|&bytes| rounded(bytes))
            .collect::<Result<_>>()?;
        let mut blocks = self.take(&sizes);
        let missing: Vec<(usize, usize)> = (0..sizes.len())
            .filter(|&index| blocks[index].is_none())
            .map(|index| (index, sizes[index]))
            .collect();
        if missing.is_empty() {
            return Ok(blocks.into_iter().flatten().collect());
        }
        let plan = plan_chunks(&missing)?;
        self.check_limits(total_of(&plan)?)?;
        for (index, block) in self.grow(device, plan, false)?.blocks {
            blocks[index] = Some(block);
        }
        Ok(blocks.into_iter().flatten().collect())
    }

    /// Blocks of existing chunks, where there are any.
    fn take(&self, sizes: &[usize]) -> Vec<Option<Block>> {
        let mut state = lock(&self.inner);
        // A chunk that had no room for a block has none for a larger one: where to go on.
        let (mut from, mut least) = (0, usize::MAX);
        sizes
            .iter()
            .map(|&bytes| {
                if bytes < least {
                    from = 0;
                }
                least = bytes;
                let (base, offset) =
                    state.chunks.range_mut(from..).find_map(|(&base, chunk)| {
                        from = base;
                        if chunk.is_failed() {
                            return None;
                        }
                        chunk.take(bytes).map(|offset| (base, offset))
                    })?;
                self.block(base, offset, bytes)
            })
            .collect()
    }

    fn block(&self, base: usize, offset: usize, bytes: usize) -> Option<Block> {
        Some(Block {
            arena: self.clone(),
            base,
            offset,
            bytes,
            pointer: NonNull::new((base + offset) as *mut u8)?,
            at_once: false,
        })
    }

    /// Whether `bytes` more may be pinned and taken from the host.
    fn check_limits(&self, bytes: usize) -> Result<()> {
        self.check_limit(bytes)?;
        // Reads files, so not under the lock.
        match self.headroom() {
            Some(left) if bytes as u64 > left => Err(short(bytes, left)),
            _ => Ok(()),
        }
    }

    /// Whether `bytes` more may be pinned.
    pub(super) fn check_limit(&self, bytes: usize) -> Result<()> {
        self.check_limit_in(&lock(&self.inner), bytes)
    }

    /// The same with the lock held: what is inserted before it is released stays within the limit.
    pub(super) fn check_limit_in(&self, state: &State, bytes: usize) -> Result<()> {
        let pinned = state.pinned;
        if pinned.saturating_add(bytes) > self.inner.limit {
            return Err(Error::new(
                ErrorKind::OutOfHostMemory,
                format!(
                    "pinning {bytes} more bytes would exceed TMS_PINNED_LIMIT ({} bytes, {pinned} in use)",
                    self.inner.limit
                ),
            ));
        }
        Ok(())
    }

    /// Maps the planned chunks, takes their blocks from their beginnings, and has them populated
    /// and registered.
    fn grow(&self, device: &Arc<dyn Device>, plan: Vec<Planned>, ahead: bool) -> Result<Grown> {
        let total = total_of(&plan)?;
        let mut base = pages::map(total)?;
        pages::keep_from_children(base, total);
        pages::prefer_node(base, total, device.info().numa_node);
        let mut chunks = Vec::with_capacity(plan.len());
        let mut blocks = Vec::new();
        let mut state = lock(&self.inner);
        // Others may have grown since the limits were looked at.
        if let Err(error) = self.check_limit_in(&state, total) {
            drop(state);
            // SAFETY: mapped above, and nobody knows of it.
            unsafe { pages::unmap(base, total) };
            return Err(error);
        }
        self.inner
            .promised
            .fetch_add(total as u64, Ordering::Relaxed);
        for planned in plan {
            let mut used = 0;
            for (index, bytes) in planned.parts {
                blocks.extend(self.block(base, used, bytes).map(|block| (index, block)));
                used += bytes;
            }
            state.insert(base, Chunk::growing(planned.bytes, used, device));
            chunks.push((base, planned.bytes));
            base += planned.bytes;
        }
        drop(state);
        let growth = Growth::new(self, device, chunks, ahead);
        growth.start();
        Ok(Grown { growth, blocks })
    }

    /// Asks for a growing chunk before it is touched. `ahead`: also if nobody has a block of it.
    pub(super) fn claim(&self, base: usize, ahead: bool) -> Claim {
        let unwanted = {
            let mut state = lock(&self.inner);
            match state.chunks.get(&base) {
                Some(chunk) if chunk.used > 0 || ahead => None,
                _ => Some(state.chunks.remove(&base)),
            }
        };
        if let Some(chunk) = unwanted {
            if let Some(chunk) = &chunk {
                self.kept_promise(chunk.bytes);
            }
            self.release(base, chunk);
            self.inner.changed.notify_all();
            return Claim::Unwanted;
        }
        // What is promised and what is left belong together: the former first, so that what is
        // populated in between counts twice rather than not at all.
        let refused = || {
            let promised = self.inner.promised.load(Ordering::Relaxed);
            let left = self.inner.headroom.now()?;
            (promised > left).then(|| short(clip(promised), left))
        };
        match refused() {
            Some(error) if !self.release_idle() => Claim::Refused(error),
            Some(_) => refused().map_or(Claim::Granted, Claim::Refused),
            None => Claim::Granted,
        }
    }

    /// `bytes` of what was promised are populated, or will not be.
    pub(super) fn kept_promise(&self, bytes: usize) {
        self.inner
            .promised
            .fetch_sub(bytes as u64, Ordering::Relaxed);
    }

    /// Notes the end of a chunk's growth.
    pub(super) fn finish(&self, base: usize, result: Result<()>) {
        let mut unused = false;
        if let Some(chunk) = lock(&self.inner).chunks.get_mut(&base) {
            chunk.phase = match result {
                Ok(()) => Phase::Ready,
                Err(error) => Phase::Failed(error),
            };
            unused = chunk.used == 0;
        }
        self.inner.changed.notify_all();
        if unused {
            // Its blocks were given back while it grew, or it was made ahead.
            self.trim_in_background();
        }
    }

    /// Waits until the chunk at `base` can be used.
    fn wait(&self, base: usize) -> Result<()> {
        let mut state = lock(&self.inner);
        loop {
            match state.chunks.get(&base).map(|chunk| &chunk.phase) {
                Some(Phase::Ready) => return Ok(()),
                Some(Phase::Failed(error)) => return Err(error.clone()),
                Some(Phase::Growing) => {
                    state = self
                        .inner
                        .changed
                        .wait(state)
                        .unwrap_or_else(PoisonError::into_inner);
                }
                None => return Err(Error::new(ErrorKind::Internal, "the chunk is gone")),
            }
        }
    }

    /// Takes a block back. With `now`, a chunk that thereby is empty is unregistered before this
    /// returns; otherwise it may stay pinned for the next use, up to the limit.
    fn give_back(&self, base: usize, offset: usize, bytes: usize, now: bool) {
        let mut state = lock(&self.inner);
        let Some(chunk) = state.chunks.get_mut(&base) else {
            return;
        };
        chunk.give(offset, bytes);
        if chunk.used > 0 {
            return;
        }
        if !now && !chunk.is_failed() {
            let growing = chunk.is_growing();
            drop(state);
            if !growing {
                self.trim_in_background();
            }
            return;
        }
        while state.chunks.get(&base).is_some_and(Chunk::is_growing) {
            state = self
                .inner
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        // Somebody else may have taken a block, or the chunk, while this thread waited.
        if state.chunks.get(&base).is_some_and(|chunk| chunk.used == 0) {
            let chunk = state.chunks.remove(&base);
            drop(state);
            self.release(base, chunk);
        }
    }

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
    fn kept(&self) -> usize {
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
    fn trim_in_background(&self) {
        for (base, chunk) in self.take_out_idle(self.kept()) {
            let arena = self.clone();
            self.inner.workers.submit(move || {
                arena.release(base, Some(chunk));
            });
        }
    }

    /// Takes idle chunks out of the table: all that are of no use, and of the others as many as
    /// leave at most `keep` bytes idle, small ones first, so that little more than that goes.
    fn take_out_idle(&self, keep: usize) -> Vec<(usize, Chunk)> {
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
    pub(super) fn release(&self, base: usize, chunk: Option<Chunk>) -> bool {
        let Some(chunk) = chunk else { return true };
        let bytes = chunk.bytes;
        let released = release_memory(base, chunk);
        let mut state = lock(&self.inner);
        match released {
            Ok(()) => {
                state.pinned -= bytes;
                true
            }
            Err(chunk) => {
                state.chunks.insert(base, chunk);
                false
            }
        }
    }

    pub fn usage(&self) -> ArenaUse {
        let state = lock(&self.inner);
        ArenaUse {
            pinned: state.pinned as u64,
            used: state.chunks.values().map(|chunk| chunk.used as u64).sum(),
        }
    }

    /// Everything at once. Asks the kernel about every mapping of the process, which can take
    /// milliseconds.
    pub fn stats(&self) -> ArenaStats {
        let mut stats = ArenaStats {
            limit: self.inner.limit as u64,
            ..ArenaStats::default()
        };
        let ranges: Vec<(usize, usize)> = {
            let state = lock(&self.inner);
            stats.keep = self.inner.keep.max(state.prewarmed) as u64;
            stats.pinned = state.pinned as u64;
            stats.high_water = state.high_water as u64;
            stats.chunks = state.chunks.len() as u64;
            for chunk in state.chunks.values() {
                if chunk.is_own() {
                    stats.used += chunk.used as u64;
                } else {
                    stats.adopted += chunk.bytes as u64;
                }
            }
            state
                .chunks
                .iter()
                .map(|(&base, chunk)| (base, chunk.bytes))
                .collect()
        };
        stats.idle = stats.pinned.saturating_sub(stats.used + stats.adopted);
        stats.huge = pages::huge_bytes(&ranges).min(stats.pinned);
        stats.small = stats.pinned - stats.huge;
        stats
    }

    /// Whether `pointer` lies in registered memory of this arena.
    pub fn contains(&self, pointer: usize) -> bool {
        let state = lock(&self.inner);
        state
            .chunks
            .range(..=pointer)
            .next_back()
            .is_some_and(|(base, chunk)| {
                pointer - base < chunk.bytes && matches!(chunk.phase, Phase::Ready)
            })
    }
}

fn short(bytes: usize, left: u64) -> Error {
    Error::new(
        ErrorKind::OutOfHostMemory,
        format!("pinning {bytes} more bytes: only {left} bytes of host memory are left"),
    )
}

/// Pinned memory that belongs to one owner, given back when dropped.
pub struct Block {
    arena: Arena,
    base: usize,
    offset: usize,
    bytes: usize,
    pointer: NonNull<u8>,
    /// How to give it back, see [`Block::release_now`].
    at_once: bool,
}

// SAFETY: the pointer refers to memory that the block owns; nothing in it depends on the thread.
unsafe impl Send for Block {}
// SAFETY: a shared block only tells its address and length.
unsafe impl Sync for Block {}

impl Block {
    pub fn pointer(&self) -> NonNull<u8> {
        self.pointer
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Waits until the block is populated and registered.
    pub fn wait(&self) -> Result<()> {
        self.arena.wait(self.base)
    }

    /// Gives the block back; if its chunk is empty then, it is unregistered before this returns.
    pub fn release_now(mut self) {
        self.at_once = true;
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        self.arena
            .give_back(self.base, self.offset, self.bytes, self.at_once);
    }
}

/// Chunks on their way, and their blocks, with what the plan called them.
struct Grown {
    growth: Arc<Growth>,
    blocks: Vec<(usize, Block)>,
}

/// A chunk to be made, and the blocks at its beginning: what they are called, and their sizes.
struct Planned {
    bytes: usize,
    parts: Vec<(usize, usize)>,
}

/// Packs blocks (name and size) into chunks: large ones alone, small ones together.
fn plan_chunks(missing: &[(usize, usize)]) -> Result<Vec<Planned>> {
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

fn total_of(plan: &[Planned]) -> Result<usize> {
    plan.iter()
        .try_fold(0usize, |sum, chunk| sum.checked_add(chunk.bytes))
        .ok_or_else(too_large)
}

fn too_large() -> Error {
    Error::invalid("size", "the sum does not fit the address space")
}

/// The size of a block: whole pages, at least one.
fn rounded(bytes: u64) -> Result<usize> {
    usize::try_from(bytes)
        .ok()
        .and_then(|bytes| bytes.max(1).checked_next_multiple_of(PAGE))
        .ok_or_else(|| Error::invalid("size", "does not fit the address space"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Platform;
    use crate::device::host::HostPlatform;

    use std::sync::atomic::AtomicUsize;

    const MIB: u64 = 1 << 20;
    const PLENTY: u64 = 1 << 40;

    fn arena_with(
        limit: u64,
        keep: u64,
        left: impl Fn() -> Option<u64> + Send + Sync + 'static,
    ) -> (Arena, Arc<dyn Device>) {
        let platform: Arc<dyn Platform> = Arc::new(HostPlatform::new(1, 1 << 30));
        let device = platform.device(0).unwrap();
        let headroom = Headroom::from_fn(left);
        let workers = Arc::new(Workers::new(2));
        let arena = Arena::with_headroom(workers, limit, keep, headroom);
        (arena, device)
    }

    fn arena(limit: u64, keep: u64) -> (Arena, Arc<dyn Device>) {
        arena_with(limit, keep, || Some(PLENTY))
    }

    /// A host that has plenty for the first `times` questions, and nothing afterwards.
    fn plenty_for(times: usize) -> impl Fn() -> Option<u64> + Send + Sync + 'static {
        let asked = AtomicUsize::new(0);
        move || {
            let before = asked.fetch_add(1, Ordering::SeqCst) < times;
            Some(if before { PLENTY } else { 0 })
        }
    }

    /// Pages of the block that are present.
    fn present(block: &Block) -> usize {
        let mut pages = vec![0u8; block.bytes() / PAGE];
        // SAFETY: the block is mapped, and there is a byte for each of its pages.
        let result = unsafe {
            libc::mincore(
                block.pointer().as_ptr().cast(),
                block.bytes(),
                pages.as_mut_ptr(),
            )
        };
        assert_eq!(result, 0);
        pages.into_iter().filter(|page| page & 1 != 0).count()
    }

    #[test]
    fn threads_that_grow_at_once_stay_within_the_limit() {
        let both = std::sync::Barrier::new(2);
        let asked = AtomicUsize::new(0);
        // Each has looked at the limit when it comes here for the first time.
        let (arena, device) = arena_with(3 * MIB, 0, move || {
            if asked.fetch_add(1, Ordering::SeqCst) < 2 {
                both.wait();
            }
            Some(PLENTY)
        });
        let allocate = || arena.try_allocate(&device, &[2 * MIB]);
        let results = std::thread::scope(|scope| {
            [scope.spawn(allocate), scope.spawn(allocate)].map(|thread| thread.join().unwrap())
        });
        let refused: Vec<_> = results
            .iter()
            .filter_map(|one| one.as_ref().err())
            .collect();
        assert_eq!(refused.len(), 1);
        assert_eq!(refused[0].kind(), ErrorKind::OutOfHostMemory);
        assert_eq!(arena.stats().high_water, 2 * MIB);
        let headroom = || arena.headroom() == Some(PLENTY);
        drop(results);
        while !headroom() {
            std::thread::yield_now();
        }
    }

    fn until_pinned_is(arena: &Arena, bytes: u64) {
        while arena.usage().pinned != bytes {
            std::thread::yield_now();
        }
    }

    fn ready(blocks: &[Block]) {
        for block in blocks {
            block.wait().unwrap();
        }
    }

    #[test]
    fn small_blocks_share_a_chunk_and_large_ones_do_not() {
        let (arena, device) = arena(u64::MAX, u64::MAX);
        let blocks = arena
            .allocate(&device, &[2 * MIB, 2 * MIB, 130 * MIB, 2 * MIB])
            .unwrap();
        ready(&blocks);
        let at = |index: usize| blocks[index].pointer().as_ptr() as usize;
        assert_eq!(at(1) - at(0), 2 * MIB as usize);
        assert_eq!(arena.usage().used, 136 * MIB);
        assert_eq!(lock(&arena.inner).chunks.len(), 3);
        // Memory that was given back is used again.
        drop(blocks);
        let pinned = arena.usage().pinned;
        ready(&arena.allocate(&device, &[130 * MIB]).unwrap());
        assert_eq!(arena.usage().pinned, pinned);
    }

    #[test]
    fn a_refusal_touches_nothing() {
        let (arena, device) = arena(100 * MIB, u64::MAX);
        let refused = arena.allocate(&device, &[80 * MIB, 80 * MIB]);
        assert_eq!(refused.err().unwrap().kind(), ErrorKind::OutOfHostMemory);
        assert_eq!(arena.usage(), ArenaUse::default());
    }

    #[test]
    fn idle_memory_makes_room() {
        let (arena, device) = arena(100 * MIB, u64::MAX);
        let blocks = arena.allocate(&device, &[70 * MIB]).unwrap();
        ready(&blocks);
        drop(blocks);
        ready(&arena.allocate(&device, &[90 * MIB]).unwrap());
        assert_eq!(arena.usage().pinned, 90 * MIB);
    }

    #[test]
    fn blocks_given_back_while_they_grow_are_not_kept_beyond_the_limit() {
        let (arena, device) = arena(u64::MAX, 0);
        drop(arena.allocate(&device, &[130 * MIB]).unwrap());
        until_pinned_is(&arena, 0);
    }

    #[test]
    fn released_at_once_means_unregistered() {
        let (arena, device) = arena(u64::MAX, u64::MAX);
        let mut blocks = arena.allocate(&device, &[2 * MIB, 2 * MIB]).unwrap();
        ready(&blocks);
        let pointer = blocks[0].pointer().as_ptr() as usize;
        blocks.pop().unwrap().release_now();
        assert!(arena.contains(pointer));
        blocks.pop().unwrap().release_now();
        assert!(!arena.contains(pointer));
        assert_eq!(arena.usage().pinned, 0);
    }

    #[test]
    fn a_block_alone_shares_nothing() {
        let (arena, device) = arena(u64::MAX, u64::MAX);
        drop(arena.allocate(&device, &[200 * MIB]).unwrap());
        let ring = arena.allocate_alone(&device, 64 * MIB).unwrap();
        let other = arena
            .allocate(&device, &[100 * MIB])
            .unwrap()
            .pop()
            .unwrap();
        other.wait().unwrap();
        let pointer = other.pointer().as_ptr() as usize;
        other.release_now();
        assert!(!arena.contains(pointer));
        ring.wait().unwrap();
    }

    #[test]
    fn what_the_host_does_not_have_is_refused_before_it_is_mapped() {
        let (arena, device) = arena_with(u64::MAX, u64::MAX, || Some(100 * MIB));
        let refused = arena.allocate(&device, &[80 * MIB, 80 * MIB]);
        let error = refused.err().unwrap();
        assert_eq!(error.kind(), ErrorKind::OutOfHostMemory);
        assert!(
            error.to_string().contains("only 104857600 bytes"),
            "{error}"
        );
        assert_eq!(arena.stats().high_water, 0);
        assert_eq!(arena.headroom(), Some(100 * MIB));
        ready(&arena.allocate(&device, &[80 * MIB]).unwrap());
    }

    #[test]
    fn memory_that_others_took_meanwhile_is_refused_before_it_is_touched() {
        // One question for all, one for the first chunk, and then there is nothing left.
        let (arena, device) = arena_with(u64::MAX, u64::MAX, plenty_for(2));
        let blocks = arena
            .allocate(&device, &[70 * MIB, 80 * MIB, 90 * MIB])
            .unwrap();
        blocks[0].wait().unwrap();
        assert_eq!(present(&blocks[0]), blocks[0].bytes() / PAGE);
        for block in &blocks[1..] {
            let error = block.wait().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::OutOfHostMemory);
            assert_eq!(present(block), 0);
            assert!(!arena.contains(block.pointer().as_ptr() as usize));
        }
        // Nothing of the refused ones stays promised or pinned, and nothing idle is kept.
        drop(blocks);
        until_pinned_is(&arena, 0);
        assert_eq!(arena.inner.promised.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn idle_memory_goes_before_a_chunk_is_refused_late() {
        let left = Arc::new(AtomicU64::new(PLENTY));
        let (told, first) = (Arc::clone(&left), Arc::new(AtomicUsize::new(0)));
        let asked = Arc::clone(&first);
        let (arena, device) = arena_with(u64::MAX, u64::MAX, move || {
            // The second question after the change finds what the idle chunk gave back.
            let now = told.load(Ordering::SeqCst);
            let nth = asked.fetch_add(1, Ordering::SeqCst);
            Some(if now == 0 && nth != 1 { PLENTY } else { now })
        });
        let idle = arena.allocate(&device, &[70 * MIB]).unwrap();
        ready(&idle);
        drop(idle);
        first.store(0, Ordering::SeqCst);
        left.store(0, Ordering::SeqCst);
        ready(&arena.allocate(&device, &[90 * MIB]).unwrap());
        assert_eq!(arena.usage().pinned, 90 * MIB);
    }

    #[test]
    fn little_memory_left_means_that_nothing_idle_is_kept() {
        let (arena, device) = arena_with(u64::MAX, u64::MAX, || Some(PRESSURE - 1));
        let blocks = arena.allocate(&device, &[5 * MIB]).unwrap();
        ready(&blocks);
        drop(blocks);
        until_pinned_is(&arena, 0);
    }

    #[test]
    fn prewarmed_memory_is_kept_and_used_until_it_is_trimmed() {
        let (arena, device) = arena(u64::MAX, 0);
        let control = Control::default();
        arena
            .prewarm(&device, 100 * MIB, 30 * MIB, &control)
            .unwrap();
        assert_eq!(control.total.load(Ordering::Relaxed), 100 * MIB);
        assert_eq!(control.done.load(Ordering::Relaxed), 100 * MIB);
        let stats = arena.stats();
        assert_eq!(
            (stats.pinned, stats.idle, stats.used),
            (100 * MIB, 100 * MIB, 0)
        );
        assert_eq!(stats.keep, 100 * MIB);
        assert_eq!(stats.huge + stats.small, stats.pinned);
        // Once more is nothing new.
        arena
            .prewarm(&device, 60 * MIB, 30 * MIB, &Control::default())
            .unwrap();
        assert_eq!(arena.usage().pinned, 100 * MIB);
        // The next need finds it, and it stays.
        let blocks = arena
            .allocate(&device, &[30 * MIB, 30 * MIB, 30 * MIB])
            .unwrap();
        ready(&blocks);
        assert_eq!(arena.usage().pinned, 100 * MIB);
        drop(blocks);
        assert_eq!(arena.stats().idle, 100 * MIB);
        assert_eq!(arena.trim(100 * MIB), 0);
        assert_eq!(arena.trim(0), 100 * MIB);
        assert_eq!(arena.usage(), ArenaUse::default());
        let stats = arena.stats();
        assert_eq!((stats.keep, stats.high_water), (0, 100 * MIB));
        drop(arena.allocate(&device, &[30 * MIB]).unwrap());
        until_pinned_is(&arena, 0);
    }

    #[test]
    fn a_prewarm_that_fails_leaves_nothing() {
        let (limited, device) = arena(50 * MIB, 0);
        let refused = limited.prewarm(&device, 100 * MIB, 0, &Control::default());
        assert_eq!(refused.unwrap_err().kind(), ErrorKind::OutOfHostMemory);
        assert_eq!(limited.stats().keep, 0);
        // Refused late: the one question for all was answered, the one for the chunk is not.
        let (late, device) = arena_with(u64::MAX, 0, plenty_for(1));
        let refused = late.prewarm(&device, 100 * MIB, 0, &Control::default());
        assert_eq!(refused.unwrap_err().kind(), ErrorKind::OutOfHostMemory);
        until_pinned_is(&late, 0);
        assert_eq!(late.stats().keep, 0);
        let cancelled = Control::default();
        cancelled.cancelled.store(true, Ordering::Relaxed);
        let refused = limited.prewarm(&device, MIB, 0, &cancelled);
        assert_eq!(refused.unwrap_err().kind(), ErrorKind::Cancelled);
    }

    #[test]
    fn a_trim_spares_what_is_used() {
        let (arena, device) = arena(u64::MAX, u64::MAX);
        let mut blocks = arena
            .allocate(&device, &[70 * MIB, 80 * MIB, 90 * MIB])
            .unwrap();
        ready(&blocks);
        let kept = blocks.pop().unwrap();
        drop(blocks);
        assert_eq!(arena.trim(u64::MAX), 0);
        // The small one is enough.
        assert_eq!(arena.trim(80 * MIB), 70 * MIB);
        assert_eq!(arena.trim(0), 80 * MIB);
        assert!(arena.contains(kept.pointer().as_ptr() as usize));
        assert_eq!(
            arena.usage(),
            ArenaUse {
                pinned: 90 * MIB,
                used: 90 * MIB
            }
        );
    }

    #[test]
    fn many_blocks_come_in_order_and_in_one_piece() {
        let (arena, device) = arena(u64::MAX, u64::MAX);
        let sizes: Vec<u64> = (0..40).map(|index| (1 + index % 7) * MIB).collect();
        let blocks = arena.allocate(&device, &sizes).unwrap();
        for (block, &bytes) in blocks.iter().zip(&sizes) {
            assert_eq!(block.bytes() as u64, bytes);
            block.wait().unwrap();
            assert_eq!(present(block), block.bytes() / PAGE);
        }
        let places: Vec<usize> = blocks
            .iter()
            .map(|block| block.pointer().as_ptr() as usize)
            .collect();
        assert!(places.is_sorted());
        drop(blocks);
        // The same again finds the same places, whatever the sizes.
        let pinned = arena.usage().pinned;
        let mut again = sizes.clone();
        again.reverse();
        ready(&arena.allocate(&device, &again).unwrap());
        assert_eq!(arena.usage().pinned, pinned);
    }
}
