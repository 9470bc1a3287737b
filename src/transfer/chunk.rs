//! One piece of registered host memory: which parts of it are free, whom its pages belong to, and
//! how it is given back. Which chunks there are is the business of `arena`.

use std::any::Any;
use std::collections::BTreeMap;
use std::sync::Arc;

use super::pages;
use crate::device::Device;
use crate::error::{Error, ErrorKind, Result};

#[derive(Debug)]
pub(super) enum Phase {
    /// Being populated and registered, or waiting for it.
    Growing,
    /// Registered.
    Ready,
    /// Not usable, not registered; goes when its last block goes.
    Failed(Error),
}

/// Whom the pages belong to.
pub(super) enum Origin {
    /// Mapped by the arena for itself.
    Own,
    /// Mapped by somebody else, and mapped for as long as this lives.
    Adopted { _keeper: Arc<dyn Any + Send + Sync> },
}

/// What waits for a chunk, and hears whether it can be used.
pub(super) type Job = Box<dyn FnOnce(Result<()>) + Send>;

pub(super) struct Chunk {
    pub bytes: usize,
    /// Free ranges by offset; neighbours are merged.
    pub free: BTreeMap<usize, usize>,
    pub used: usize,
    pub phase: Phase,
    /// The device whose context registered the memory, and must unregister it.
    pub device: Arc<dyn Device>,
    pub origin: Origin,
    /// Done by whoever ends the growth.
    pub jobs: Vec<Job>,
}

impl Chunk {
    /// A chunk to be grown, of which the first `used` bytes belong to blocks.
    pub fn growing(bytes: usize, used: usize, device: &Arc<dyn Device>) -> Chunk {
        Chunk {
            bytes,
            free: match bytes - used {
                0 => BTreeMap::new(),
                rest => BTreeMap::from([(used, rest)]),
            },
            used,
            phase: Phase::Growing,
            device: Arc::clone(device),
            origin: Origin::Own,
            jobs: Vec::new(),
        }
    }

    pub fn is_growing(&self) -> bool {
        matches!(self.phase, Phase::Growing)
    }

    pub fn is_failed(&self) -> bool {
        matches!(self.phase, Phase::Failed(_))
    }

    pub fn is_own(&self) -> bool {
        matches!(self.origin, Origin::Own)
    }

    /// Whether it could go: nobody uses it, and nobody works on it.
    pub fn is_idle(&self) -> bool {
        self.used == 0 && !self.is_growing()
    }

    /// Whether it is worth keeping while it is idle.
    pub fn is_of_use(&self) -> bool {
        self.is_own() && !self.is_failed()
    }

    pub fn take(&mut self, bytes: usize) -> Option<usize> {
        let (&offset, &length) = self.free.iter().find(|&(_, &length)| length >= bytes)?;
        self.free.remove(&offset);
        if length > bytes {
            self.free.insert(offset + bytes, length - bytes);
        }
        self.used += bytes;
        Some(offset)
    }

    pub fn give(&mut self, mut offset: usize, mut bytes: usize) {
        self.used -= bytes;
        if let Some(next) = self.free.remove(&(offset + bytes)) {
            bytes += next;
        }
        if let Some((&before, &length)) = self.free.range(..offset).next_back()
            && before + length == offset
        {
            offset = before;
            bytes += length;
        }
        self.free.insert(offset, bytes);
    }
}

/// Unregisters a chunk and gives its pages back to whom they belong. Returns the chunk if the driver
/// kept it: then it stays mapped, because unmapping registered memory would leave the driver with
/// dangling pages.
pub(super) fn release_memory(base: usize, chunk: Chunk) -> Option<Chunk> {
    if crate::process::check().is_err() {
        return Some(chunk);
    }
    if matches!(chunk.phase, Phase::Ready) {
        // SAFETY: the chunk has no block, so no copy uses it, and it was registered here.
        if let Err(error) = unsafe { chunk.device.unregister_host(base as *mut u8) } {
            tracing::warn!("pinned memory is released later: {error}");
            return Some(chunk);
        }
    }
    if chunk.is_own() {
        // SAFETY: mapped by `pages::map`, and nothing refers to it any more.
        unsafe { pages::unmap(base, chunk.bytes) };
    }
    None
}

/// A panic becomes an error: whoever waits for the chunk must hear of it.
pub(super) fn contained(work: impl FnOnce() -> Result<()>) -> Result<()> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(work))
        .unwrap_or_else(|_| Err(Error::new(ErrorKind::Internal, "pinning memory panicked")))
}

/// Registers a chunk that stays mapped until it was unregistered.
pub(super) fn register(device: &dyn Device, base: usize, bytes: usize) -> Result<()> {
    contained(|| {
        // SAFETY: by this function's contract, see `release_memory`.
        unsafe { device.register_host(base as *mut u8, bytes) }
            .map_err(|error| error.context(format_args!("pinning {bytes} bytes of host memory")))
    })
}
