//! Pinned host memory for backups and staging, in chunks that outlive a single pause.
//!
//! Pinning memory costs far more than copying into it, so blocks come from chunks that were
//! populated (by several threads) and registered once: copies into the first chunk start while
//! others are still being populated. A chunk is one registration, because the driver refuses a copy
//! that spans two (seen on an H200: code 1), and the host may copy from a whole backup. This file
//! knows nothing about what the bytes mean.

use std::collections::BTreeMap;
use std::ptr::NonNull;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::chunk::{
    ALIGNMENT, Chunk, PAGE, Phase, SLICE, contained, map_anonymous, populate, release_memory,
};
use super::limits;
use super::workers::Workers;
use crate::device::Device;
use crate::error::{Error, ErrorKind, Result};

#[derive(Default)]
struct State {
    /// Chunks by base address.
    chunks: BTreeMap<usize, Chunk>,
    pinned: usize,
}

struct Inner {
    /// Protects the book-keeping; never held while memory is populated, registered or released.
    state: Mutex<State>,
    changed: Condvar,
    workers: Arc<Workers>,
    limit: usize,
    keep: usize,
}

impl Drop for Inner {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        for (base, chunk) in std::mem::take(&mut state.chunks) {
            release_memory(base, &chunk);
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
    /// Part of it that holds backups or staging.
    pub used: u64,
}

fn lock(inner: &Inner) -> MutexGuard<'_, State> {
    inner.state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Arena {
    /// `limit` bounds all pinned bytes, `keep` what stays pinned while nothing uses it.
    pub fn new(workers: Arc<Workers>, limit: u64, keep: u64) -> Arena {
        let clip = |bytes: u64| usize::try_from(bytes).unwrap_or(usize::MAX);
        Arena {
            inner: Arc::new(Inner {
                state: Mutex::default(),
                changed: Condvar::new(),
                workers,
                limit: clip(limit),
                keep: clip(keep),
            }),
        }
    }

    /// One block for each size. Either all are given or none; limits are checked for all of them
    /// before memory is touched, and idle memory of ours goes before anything is refused. Blocks of
    /// new chunks become ready in the background: see [`Block::wait`].
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
        let bytes = rounded(bytes)?.next_multiple_of(ALIGNMENT);
        self.check_limits(bytes)?;
        self.grow(device, bytes, &[bytes])?
            .pop()
            .ok_or_else(|| Error::new(ErrorKind::Internal, "a chunk without its block"))
    }

    fn try_allocate(&self, device: &Arc<dyn Device>, sizes: &[u64]) -> Result<Vec<Block>> {
        let sizes: Vec<usize> = sizes
            .iter()
            .map(|&bytes| rounded(bytes))
            .collect::<Result<_>>()?;
        let mut blocks: Vec<Option<Block>> = sizes.iter().map(|&bytes| self.take(bytes)).collect();
        let missing: Vec<usize> = (0..sizes.len())
            .filter(|&index| blocks[index].is_none())
            .collect();
        let plan = plan_chunks(&missing, &sizes)?;
        let total = plan
            .iter()
            .try_fold(0usize, |sum, chunk| sum.checked_add(chunk.bytes))
            .ok_or_else(|| Error::invalid("size", "the sum does not fit the address space"))?;
        if total > 0 {
            self.check_limits(total)?;
        }
        for chunk in plan {
            let parts: Vec<usize> = chunk.indices.iter().map(|&index| sizes[index]).collect();
            let made = self.grow(device, chunk.bytes, &parts)?;
            for (index, block) in chunk.indices.into_iter().zip(made) {
                blocks[index] = Some(block);
            }
        }
        Ok(blocks.into_iter().flatten().collect())
    }

    /// A block of an existing chunk.
    fn take(&self, bytes: usize) -> Option<Block> {
        let (base, offset) = lock(&self.inner)
            .chunks
            .iter_mut()
            .find_map(|(&base, chunk)| {
                if chunk.failed() {
                    return None;
                }
                chunk.take(bytes).map(|offset| (base, offset))
            })?;
        self.block(base, offset, bytes)
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

    /// Whether `bytes` more may be pinned.
    fn check_limits(&self, bytes: usize) -> Result<()> {
        // Reads files, so not under the lock.
        let headroom = limits::headroom();
        let state = lock(&self.inner);
        if state.pinned.saturating_add(bytes) > self.inner.limit {
            return Err(Error::new(
                ErrorKind::OutOfHostMemory,
                format!(
                    "pinning {bytes} more bytes would exceed TMS_PINNED_LIMIT ({} bytes, {} in use)",
                    self.inner.limit, state.pinned
                ),
            ));
        }
        // What is growing was promised but is not yet taken from the system's figures.
        let promised: usize = state
            .chunks
            .values()
            .map(|chunk| match &chunk.phase {
                Phase::Growing { left, .. } => (left * SLICE).min(chunk.bytes),
                _ => 0,
            })
            .sum();
        match headroom {
            Some(left) if (bytes as u64).saturating_add(promised as u64) > left => Err(Error::new(
                ErrorKind::OutOfHostMemory,
                format!("pinning {bytes} more bytes: only {left} bytes of host memory are left"),
            )),
            _ => Ok(()),
        }
    }

    /// Maps a chunk of `bytes`, takes blocks of the sizes `parts` from its beginning, and has it
    /// populated and registered.
    fn grow(&self, device: &Arc<dyn Device>, bytes: usize, parts: &[usize]) -> Result<Vec<Block>> {
        let base = map_anonymous(bytes)?;
        let count = bytes.div_ceil(SLICE);
        let used: usize = parts.iter().sum();
        let chunk = Chunk {
            bytes,
            free: match bytes - used {
                0 => BTreeMap::new(),
                rest => BTreeMap::from([(used, rest)]),
            },
            used,
            phase: Phase::Growing {
                left: count,
                failure: None,
            },
            device: Arc::clone(device),
        };
        {
            let mut state = lock(&self.inner);
            state.chunks.insert(base, chunk);
            state.pinned += bytes;
        }
        let mut offset = 0;
        let mut blocks = Vec::with_capacity(parts.len());
        for &part in parts {
            blocks.extend(self.block(base, offset, part));
            offset += part;
        }
        // Not under the lock: where no thread can be started, the work is done here.
        for index in 0..count {
            let arena = self.clone();
            let device = Arc::clone(device);
            let length = SLICE.min(bytes - index * SLICE);
            self.inner.workers.submit(move || {
                let populated = contained(|| populate(base + index * SLICE, length));
                arena.populated(base, bytes, &*device, populated);
            });
        }
        Ok(blocks)
    }

    /// Notes the end of a slice. The last one registers the chunk.
    fn populated(&self, base: usize, bytes: usize, device: &dyn Device, result: Result<()>) {
        let failure = {
            let mut state = lock(&self.inner);
            let Some(chunk) = state.chunks.get_mut(&base) else {
                return;
            };
            let Phase::Growing { left, failure } = &mut chunk.phase else {
                return;
            };
            *left -= 1;
            if let Err(error) = result {
                failure.get_or_insert(error);
            }
            if *left > 0 {
                return;
            }
            failure.take()
        };
        let registered = match failure {
            Some(error) => Err(error),
            None => contained(|| {
                // SAFETY: the chunk stays mapped until it was unregistered, see `release_memory`.
                unsafe { device.register_host(base as *mut u8, bytes) }.map_err(|error| {
                    error.context(format_args!("pinning {bytes} bytes of host memory"))
                })
            }),
        };
        let mut unused = false;
        if let Some(chunk) = lock(&self.inner).chunks.get_mut(&base) {
            chunk.phase = match registered {
                Ok(()) => Phase::Ready,
                Err(error) => Phase::Failed(error),
            };
            unused = chunk.used == 0;
        }
        self.inner.changed.notify_all();
        if unused {
            // Its blocks were given back while it grew.
            self.trim_to(self.inner.keep);
        }
    }

    /// Waits until the chunk at `base` can be used.
    fn wait(&self, base: usize) -> Result<()> {
        let mut state = lock(&self.inner);
        loop {
            match state.chunks.get(&base).map(|chunk| &chunk.phase) {
                Some(Phase::Ready) => return Ok(()),
                Some(Phase::Failed(error)) => return Err(error.clone()),
                Some(Phase::Growing { .. }) => {
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
        let failed = chunk.failed();
        if now || failed {
            while state.chunks.get(&base).is_some_and(Chunk::growing) {
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
            return;
        }
        drop(state);
        self.trim_to(self.inner.keep);
    }

    /// Unpins idle chunks, in the background: all that failed, and of the others as many as leave
    /// at most `keep` bytes idle.
    fn trim_to(&self, keep: usize) {
        let mut state = lock(&self.inner);
        let idle = |chunk: &Chunk| chunk.used == 0 && !chunk.growing();
        let mut excess = state
            .chunks
            .values()
            .filter(|chunk| idle(chunk) && !chunk.failed())
            .map(|chunk| chunk.bytes)
            .sum::<usize>()
            .saturating_sub(keep);
        let mut leaving = Vec::new();
        for (&base, chunk) in &state.chunks {
            if !idle(chunk) {
                continue;
            }
            if chunk.failed() {
                leaving.push(base);
            } else if excess > 0 {
                excess = excess.saturating_sub(chunk.bytes);
                leaving.push(base);
            }
        }
        let leaving: Vec<_> = leaving
            .into_iter()
            .map(|base| (base, state.chunks.remove(&base)))
            .collect();
        // Not under the lock: where no thread can be started, the work is done here.
        drop(state);
        for (base, chunk) in leaving {
            let arena = self.clone();
            self.inner
                .workers
                .submit(move || arena.release(base, chunk));
        }
    }

    /// Unpins, before it returns, all that nobody uses; false if there was nothing.
    pub fn release_idle(&self) -> bool {
        let leaving: Vec<_> = {
            let mut state = lock(&self.inner);
            let idle: Vec<usize> = state
                .chunks
                .iter()
                .filter(|(_, chunk)| chunk.used == 0 && !chunk.growing())
                .map(|(&base, _)| base)
                .collect();
            idle.into_iter()
                .map(|base| (base, state.chunks.remove(&base)))
                .collect()
        };
        let found = !leaving.is_empty();
        for (base, chunk) in leaving {
            self.release(base, chunk);
        }
        found
    }

    /// Unregisters and unmaps a chunk that was taken out of the table. What the driver refuses to
    /// unregister goes back into it, to be tried again by a later trim.
    fn release(&self, base: usize, chunk: Option<Chunk>) {
        let Some(chunk) = chunk else { return };
        let bytes = chunk.bytes;
        let released = release_memory(base, &chunk);
        let mut state = lock(&self.inner);
        if released {
            state.pinned -= bytes;
        } else {
            state.chunks.insert(base, chunk);
        }
    }

    pub fn usage(&self) -> ArenaUse {
        let state = lock(&self.inner);
        ArenaUse {
            pinned: state.pinned as u64,
            used: state.chunks.values().map(|chunk| chunk.used as u64).sum(),
        }
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

/// A chunk to be made, and which of the wanted blocks go into it.
struct Planned {
    bytes: usize,
    indices: Vec<usize>,
}

/// Packs blocks into chunks: large ones alone, small ones together.
fn plan_chunks(missing: &[usize], sizes: &[usize]) -> Result<Vec<Planned>> {
    let mut plan: Vec<Planned> = Vec::new();
    let mut room = 0;
    let mut remaining = missing
        .iter()
        .try_fold(0usize, |sum, &index| sum.checked_add(sizes[index]))
        .ok_or_else(|| Error::invalid("size", "the sum does not fit the address space"))?;
    for &index in missing {
        let bytes = sizes[index];
        match plan.last_mut() {
            Some(chunk) if bytes <= room => {
                chunk.indices.push(index);
                room -= bytes;
            }
            _ => {
                let chunk = bytes
                    .max(remaining.min(SLICE))
                    .checked_next_multiple_of(ALIGNMENT)
                    .ok_or_else(|| Error::invalid("size", "does not fit the address space"))?;
                plan.push(Planned {
                    bytes: chunk,
                    indices: vec![index],
                });
                room = chunk - bytes;
            }
        }
        remaining -= bytes;
    }
    Ok(plan)
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

    const MIB: u64 = 1 << 20;

    fn arena(limit: u64, keep: u64) -> (Arena, Arc<dyn Device>) {
        let platform: Arc<dyn Platform> = Arc::new(HostPlatform::new(1, 1 << 30));
        let device = platform.device(0).unwrap();
        (Arena::new(Arc::new(Workers::new(2)), limit, keep), device)
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
            .allocate(&device, &[2 * MIB, 2 * MIB, 70 * MIB, 2 * MIB])
            .unwrap();
        ready(&blocks);
        let at = |index: usize| blocks[index].pointer().as_ptr() as usize;
        assert_eq!(at(1) - at(0), 2 * MIB as usize);
        assert_eq!(arena.usage().used, 76 * MIB);
        assert_eq!(lock(&arena.inner).chunks.len(), 3);
        // Memory that was given back is used again.
        drop(blocks);
        let pinned = arena.usage().pinned;
        ready(&arena.allocate(&device, &[70 * MIB]).unwrap());
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
        while arena.usage().pinned > 0 {
            std::thread::yield_now();
        }
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
}
