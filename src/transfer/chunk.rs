//! One piece of pinned host memory: which parts of it are free, and how it is mapped, populated,
//! registered and given back. Which chunks there are is the business of `arena`.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::device::Device;
use crate::error::{Error, ErrorKind, Result};

/// What one thread populates at a time; also the size of a chunk shared by small blocks. Large
/// enough for the bus (32 MiB is), small enough to start copying early.
pub const SLICE: usize = 64 << 20;

/// Blocks begin at multiples of this: a huge page, so that a chunk of small blocks has no holes.
pub(super) const ALIGNMENT: usize = 2 << 20;

pub(super) const PAGE: usize = 4096;

#[derive(Debug)]
pub(super) enum Phase {
    /// So many slices are not populated yet; the thread that ends the last one registers.
    Growing { left: usize, failure: Option<Error> },
    /// Registered.
    Ready,
    /// Not usable, not registered; goes when its last block goes.
    Failed(Error),
}

pub(super) struct Chunk {
    pub bytes: usize,
    /// Free ranges by offset; neighbours are merged.
    pub free: BTreeMap<usize, usize>,
    pub used: usize,
    pub phase: Phase,
    /// The device whose context registered the memory, and must unregister it.
    pub device: Arc<dyn Device>,
}

impl Chunk {
    pub fn growing(&self) -> bool {
        matches!(self.phase, Phase::Growing { .. })
    }

    pub fn failed(&self) -> bool {
        matches!(self.phase, Phase::Failed(_))
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

/// Unregisters and unmaps; false if the driver kept it, and then it stays mapped, because
/// unmapping registered memory would leave the driver with dangling pages.
pub(super) fn release_memory(base: usize, chunk: &Chunk) -> bool {
    if crate::process::check().is_err() {
        return false;
    }
    if matches!(chunk.phase, Phase::Ready) {
        // SAFETY: the chunk has no block, so no copy uses it, and it was registered here.
        if let Err(error) = unsafe { chunk.device.unregister_host(base as *mut u8) } {
            tracing::warn!("pinned memory is released later: {error}");
            return false;
        }
    }
    // SAFETY: mapped by `map_anonymous`, and nothing refers to it any more.
    unsafe { libc::munmap(base as *mut libc::c_void, chunk.bytes) };
    true
}

/// A panic of a job becomes an error: whoever waits for the chunk must hear of it.
pub(super) fn contained(work: impl FnOnce() -> Result<()>) -> Result<()> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(work))
        .unwrap_or_else(|_| Err(Error::new(ErrorKind::Internal, "pinning memory panicked")))
}

/// Reserves zero-filled private memory, aligned for huge pages, without touching it.
pub(super) fn map_anonymous(bytes: usize) -> Result<usize> {
    let span = bytes + ALIGNMENT;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let raw = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            span,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    if raw == libc::MAP_FAILED {
        return Err(
            Error::last_os(format_args!("mapping {bytes} bytes of host memory"))
                .with_kind(ErrorKind::OutOfHostMemory),
        );
    }
    let start = raw as usize;
    let base = start.next_multiple_of(ALIGNMENT);
    // SAFETY: head and tail belong to the mapping just made and lie outside the aligned part. A
    // failure only leaves addresses reserved.
    unsafe {
        if base > start {
            libc::munmap(raw, base - start);
        }
        let tail = start + span - (base + bytes);
        if tail > 0 {
            libc::munmap((base + bytes) as *mut libc::c_void, tail);
        }
        libc::madvise(base as *mut libc::c_void, bytes, libc::MADV_HUGEPAGE);
        // A forked child must neither see nor copy what a device writes to.
        libc::madvise(base as *mut libc::c_void, bytes, libc::MADV_DONTFORK);
    }
    Ok(base)
}

/// Makes every page present. Refusal by the kernel is an error, not a signal.
pub(super) fn populate(base: usize, bytes: usize) -> Result<()> {
    // SAFETY: the range is mapped, private and writable; populating does not change its contents.
    let result =
        unsafe { libc::madvise(base as *mut libc::c_void, bytes, libc::MADV_POPULATE_WRITE) };
    if result == 0 {
        return Ok(());
    }
    let error = std::io::Error::last_os_error();
    if error.raw_os_error() != Some(libc::EINVAL) {
        return Err(Error::io(
            format_args!("populating {bytes} bytes of host memory"),
            error,
        )
        .with_kind(ErrorKind::OutOfHostMemory));
    }
    // Kernels before 5.14 do not know the advice.
    for offset in (0..bytes).step_by(PAGE) {
        let page = (base + offset) as *mut u8;
        // SAFETY: inside the mapped range; the page is fresh, so writing 0 changes nothing.
        unsafe { page.write_volatile(0) };
    }
    Ok(())
}
