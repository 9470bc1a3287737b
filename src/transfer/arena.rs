//! Pinned host memory for backups and staging, in chunks that outlive a single pause.
//!
//! Pinning memory costs far more than copying into it, so blocks come from chunks that were
//! populated and registered once (`growth`): copies into the first chunk start while others are
//! still being populated. A chunk is one registration, because the driver refuses a copy that spans
//! two (seen on an H200: code 1), and the host may copy from a whole backup. This file keeps the
//! books: what is pinned, who has it, what is kept when nobody does, and what may still be taken.
//! It knows nothing about what the bytes mean.

mod idle;
mod plan;

use std::collections::BTreeMap;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use plan::{Planned, plan_chunks, rounded, total_of};

use super::chunk::{Chunk, Job, Phase, release_memory};
use super::growth::Growth;
use super::limits::Headroom;
use super::pages::{self, HUGE};
use super::workers::Workers;
use crate::device::Device;
use crate::error::{Error, ErrorKind, Result};

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
            if let Some(kept) = release_memory(base, chunk) {
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
        let mut jobs = Vec::new();
        if let Some(chunk) = lock(&self.inner).chunks.get_mut(&base) {
            chunk.phase = match &result {
                Ok(()) => Phase::Ready,
                Err(error) => Phase::Failed(error.clone()),
            };
            jobs = std::mem::take(&mut chunk.jobs);
            unused = chunk.used == 0;
        }
        for job in jobs {
            job(result.clone());
        }
        self.inner.changed.notify_all();
        if unused {
            // Its blocks were given back while it grew, or it was made ahead.
            self.trim_in_background();
        }
    }

    /// Does a job once the chunk at `base` can be used, or cannot.
    fn when_ready(&self, base: usize, job: Job) {
        let result = {
            let mut state = lock(&self.inner);
            match state.chunks.get_mut(&base) {
                Some(chunk) => match &chunk.phase {
                    Phase::Growing => {
                        chunk.jobs.push(job);
                        return;
                    }
                    Phase::Ready => Ok(()),
                    Phase::Failed(error) => Err(error.clone()),
                },
                None => Err(Error::new(ErrorKind::Internal, "the chunk is gone")),
            }
        };
        job(result);
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

    /// Does `job` when the block is populated and registered, or cannot be: at once, on this thread,
    /// or later on the one that registered it. That one comes first to the driver's lock, which a
    /// thread that waits for blocks gets only after all registrations (measured on an H200, 10.7 GB
    /// for the first time: 26 GB/s by a thread that waits, 40 so).
    pub fn when_ready(&self, job: impl FnOnce(Result<()>) + Send + 'static) {
        self.arena.when_ready(self.base, Box::new(job));
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

#[cfg(test)]
mod tests;
