//! Host memory of the benchmarks: anonymous pages in the process's own hands, filled by all cores.

use std::ptr::NonNull;
use std::sync::Arc;
use std::{slice, thread};

use tms_memcache::device::Device;

use super::Result;
use super::random::Random;

/// Pages, populated with huge ones where the system gives them, and pinned if wanted.
pub struct HostMemory {
    start: NonNull<u8>,
    bytes: usize,
    pinned: Option<Arc<dyn Device>>,
}

impl HostMemory {
    /// `bytes` of touched memory.
    pub fn new(bytes: usize) -> Result<HostMemory> {
        let bytes = bytes.max(1).next_multiple_of(2 << 20);
        // SAFETY: a new private mapping, of nobody else's addresses.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        let start = match NonNull::new(start.cast::<u8>()) {
            Some(start) if start.as_ptr().cast() != libc::MAP_FAILED => start,
            _ => return Err(format!("no host memory of {bytes} bytes").into()),
        };
        // SAFETY: the mapping above; a refusal only means small pages.
        unsafe { libc::madvise(start.as_ptr().cast(), bytes, libc::MADV_HUGEPAGE) };
        let mut memory = HostMemory {
            start,
            bytes,
            pinned: None,
        };
        in_parallel(memory.bytes_mut(), |_, part| {
            for page in part.chunks_mut(4096) {
                page[0] = 1;
            }
        });
        Ok(memory)
    }

    /// Registers the memory with the platform of `device`.
    pub fn pin(mut self, device: &Arc<dyn Device>) -> Result<HostMemory> {
        // SAFETY: the range stays mapped until `drop`, which unregisters it first.
        unsafe { device.register_host(self.start.as_ptr(), self.bytes) }?;
        self.pinned = Some(Arc::clone(device));
        Ok(self)
    }

    pub fn address(&self) -> u64 {
        self.start.as_ptr() as u64
    }

    pub fn bytes(&self) -> &[u8] {
        // SAFETY: mapped for `bytes`; devices write to it only in calls that take `&mut` or that
        // the caller of this waited for.
        unsafe { slice::from_raw_parts(self.start.as_ptr(), self.bytes) }
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and borrowed for writing.
        unsafe { slice::from_raw_parts_mut(self.start.as_ptr(), self.bytes) }
    }

    /// Fills the first `bytes` at random; another seed gives other bytes.
    pub fn randomize(&mut self, bytes: usize, seed: u64) {
        in_parallel(&mut self.bytes_mut()[..bytes], |number, part| {
            Random::new(seed.wrapping_mul(0x1_0000_0001) + number).fill(part);
        });
    }
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        if let Some(device) = &self.pinned {
            // SAFETY: nothing of a benchmark is queued when its memory goes.
            if unsafe { device.unregister_host(self.start.as_ptr()) }.is_err() {
                // Still pinned: the process keeps it.
                return;
            }
        }
        // SAFETY: the mapping of `new`, which nobody borrows any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.bytes) };
    }
}

/// Does `work` on parts of `memory` on every core. Parts are numbered.
fn in_parallel(memory: &mut [u8], work: impl Fn(u64, &mut [u8]) + Sync) {
    const PART: usize = 16 << 20;
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let mut parts: Vec<_> = memory.chunks_mut(PART).zip(0..).collect();
    let share = parts.len().div_ceil(cores).max(1);
    thread::scope(|scope| {
        for parts in parts.chunks_mut(share) {
            scope.spawn(|| {
                for (part, number) in parts {
                    work(*number, part);
                }
            });
        }
    });
}
