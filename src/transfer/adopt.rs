//! Pinning memory that somebody else mapped (segments of a store, memory of the host) with the
//! arena's book-keeping, and letting it go again.

use std::any::Any;
use std::collections::BTreeMap;
use std::ptr::NonNull;
use std::sync::Arc;

use super::arena::Arena;
use super::chunk::{Chunk, Origin, Phase, register};
use super::pages::PAGE;
use crate::device::Device;
use crate::error::{Error, Result};

/// Registered memory of somebody else. Dropping it lets the memory go.
pub struct Adopted {
    arena: Arena,
    /// Where each registration begins.
    bases: Vec<usize>,
}

impl Arena {
    /// Registers `bytes` at `pointer` (whole pages) in pieces of `piece` bytes, the last one
    /// shorter: no copy may span two. They count as pinned, against the limit, but not as memory
    /// taken from the host. Pages that are not there yet are populated by the registration, by one
    /// thread, so whoever is in a hurry populates them first. Either all is registered, or nothing.
    ///
    /// `keeper` keeps the mapping alive. It is dropped when the driver has let go of the last
    /// piece, which may be later than the [`Adopted`].
    ///
    /// # Safety
    /// The range is mapped, writable, for as long as `keeper` lives.
    pub unsafe fn adopt(
        &self,
        device: &Arc<dyn Device>,
        pointer: NonNull<u8>,
        bytes: usize,
        piece: usize,
        keeper: Arc<dyn Any + Send + Sync>,
    ) -> Result<Adopted> {
        let start = pointer.as_ptr() as usize;
        for (name, value) in [("pointer", start), ("bytes", bytes), ("piece", piece)] {
            if value == 0 || !value.is_multiple_of(PAGE) {
                return Err(Error::invalid(
                    name,
                    format_args!("{value:#x} is not a multiple of {PAGE}, or is 0"),
                ));
            }
        }
        self.check_limit(bytes)?;
        let mut adopted = Adopted {
            arena: self.clone(),
            bases: Vec::with_capacity(bytes.div_ceil(piece)),
        };
        for offset in (0..bytes).step_by(piece) {
            let (base, length) = (start + offset, piece.min(bytes - offset));
            // What was registered before a failure goes when `adopted` is dropped.
            register(&**device, base, length)?;
            let chunk = Chunk {
                bytes: length,
                free: BTreeMap::new(),
                used: length,
                phase: Phase::Ready,
                device: Arc::clone(device),
                origin: Origin::Adopted {
                    _keeper: Arc::clone(&keeper),
                },
                jobs: Vec::new(),
            };
            self.state().insert(base, chunk);
            adopted.bases.push(base);
        }
        Ok(adopted)
    }
}

impl Adopted {
    /// Unregisters the memory before it returns. No copy may use it any more. False if the driver
    /// refused for some of it: that stays registered and its keeper alive, and is tried again
    /// whenever the arena gives memory back.
    pub fn let_go(mut self) -> bool {
        self.release()
    }

    fn release(&mut self) -> bool {
        let mut all = true;
        for base in std::mem::take(&mut self.bases) {
            let chunk = self.arena.state().chunks.remove(&base).map(|mut chunk| {
                chunk.used = 0;
                chunk
            });
            all &= self.arena.release(base, chunk);
        }
        all
    }
}

impl Drop for Adopted {
    fn drop(&mut self) {
        self.release();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Platform;
    use crate::device::host::HostPlatform;
    use crate::error::ErrorKind;
    use crate::transfer::Workers;
    use std::fs::File;
    use std::os::fd::{AsRawFd, FromRawFd};

    /// A shared mapping of a memfd.
    struct Segment {
        pointer: NonNull<u8>,
        bytes: usize,
        _file: File,
    }

    // SAFETY: the mapping does not depend on the thread.
    unsafe impl Send for Segment {}
    // SAFETY: as above.
    unsafe impl Sync for Segment {}

    impl Segment {
        fn new(bytes: usize) -> Arc<Segment> {
            // SAFETY: a terminated name; the descriptor is fresh.
            let file = unsafe {
                File::from_raw_fd(libc::memfd_create(c"segment".as_ptr(), libc::MFD_CLOEXEC))
            };
            file.set_len(bytes as u64).unwrap();
            // SAFETY: a new mapping of an open file.
            let raw = unsafe {
                libc::mmap(
                    std::ptr::null_mut(),
                    bytes,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_SHARED,
                    file.as_raw_fd(),
                    0,
                )
            };
            assert_ne!(raw, libc::MAP_FAILED);
            Arc::new(Segment {
                pointer: NonNull::new(raw.cast()).unwrap(),
                bytes,
                _file: file,
            })
        }
    }

    impl Drop for Segment {
        fn drop(&mut self) {
            // SAFETY: mapped by `new`.
            unsafe { libc::munmap(self.pointer.as_ptr().cast(), self.bytes) };
        }
    }

    fn set_up(limit: u64) -> (HostPlatform, Arc<dyn Device>, Arena) {
        let platform = HostPlatform::new(1, 1 << 30);
        let device = platform.device(0).unwrap();
        let arena = Arena::new(Arc::new(Workers::new(2)), limit, 0);
        (platform, device, arena)
    }

    #[test]
    fn a_memfd_is_registered_in_pieces_and_let_go() {
        let (platform, device, arena) = set_up(u64::MAX);
        let segment = Segment::new(5 << 20);
        let (pointer, bytes) = (segment.pointer, segment.bytes);
        let start = pointer.as_ptr() as usize;
        let keeper: Arc<dyn Any + Send + Sync> = segment.clone();
        // SAFETY: the segment stays mapped while it lives.
        let adopted = unsafe { arena.adopt(&device, pointer, bytes, 2 << 20, keeper) }.unwrap();
        let stats = arena.stats();
        assert_eq!(
            (stats.chunks, stats.pinned, stats.adopted),
            (3, 5 << 20, 5 << 20)
        );
        assert_eq!((stats.used, stats.idle), (0, 0));
        for offset in [0, 2 << 20, bytes - 1] {
            assert!(arena.contains(start + offset));
            assert!(platform.is_registered((start + offset) as *const u8));
        }
        assert!(!arena.contains(start + bytes));
        // Nobody gets blocks of it, and a trim leaves it alone.
        let block = arena.allocate(&device, &[1 << 20]).unwrap().pop().unwrap();
        block.wait().unwrap();
        let at = block.pointer().as_ptr() as usize;
        assert!(at < start || at >= start + bytes);
        block.release_now();
        assert_eq!(arena.trim(0), 0);
        assert_eq!(Arc::strong_count(&segment), 4);
        assert!(adopted.let_go());
        assert_eq!(Arc::strong_count(&segment), 1);
        assert!(!arena.contains(start) && !platform.is_registered(start as *const u8));
        assert_eq!(arena.usage().pinned, 0);
    }

    #[test]
    fn a_refused_piece_takes_the_others_back() {
        let (platform, device, arena) = set_up(u64::MAX);
        let segment = Segment::new(4 << 20);
        let start = segment.pointer.as_ptr() as usize;
        // The last piece is registered already, so the device refuses it.
        // SAFETY: mapped until the end of the test.
        unsafe { device.register_host((start + (3 << 20)) as *mut u8, 1 << 20) }.unwrap();
        let keeper: Arc<dyn Any + Send + Sync> = segment.clone();
        // SAFETY: as above.
        let adopted =
            unsafe { arena.adopt(&device, segment.pointer, segment.bytes, 1 << 20, keeper) };
        assert!(adopted.is_err());
        assert_eq!(arena.usage().pinned, 0);
        assert!(!platform.is_registered(start as *const u8));
        assert_eq!(Arc::strong_count(&segment), 1);
        // SAFETY: nothing copies.
        unsafe { device.unregister_host((start + (3 << 20)) as *mut u8) }.unwrap();
    }

    #[test]
    fn what_the_driver_keeps_stays_mapped() {
        let (_platform, device, arena) = set_up(u64::MAX);
        let segment = Segment::new(1 << 20);
        let start = segment.pointer.as_ptr() as usize;
        let keeper: Arc<dyn Any + Send + Sync> = segment.clone();
        // SAFETY: mapped until the end of the test.
        let adopted =
            unsafe { arena.adopt(&device, segment.pointer, 1 << 20, 1 << 20, keeper) }.unwrap();
        // Behind the arena's back, so that the device refuses when the arena asks.
        // SAFETY: nothing copies.
        unsafe { device.unregister_host(start as *mut u8) }.unwrap();
        assert!(!adopted.let_go());
        assert_eq!(Arc::strong_count(&segment), 2);
        // SAFETY: as above.
        unsafe { device.register_host(start as *mut u8, 1 << 20) }.unwrap();
        assert_eq!(arena.trim(0), 1 << 20);
        assert_eq!(Arc::strong_count(&segment), 1);
    }

    #[test]
    fn the_limit_and_whole_pages_count() {
        let (_platform, device, arena) = set_up(1 << 20);
        let segment = Segment::new(2 << 20);
        let keeper = || -> Arc<dyn Any + Send + Sync> { segment.clone() };
        let adopt = |bytes, piece| {
            // SAFETY: mapped until the end of the test.
            unsafe { arena.adopt(&device, segment.pointer, bytes, piece, keeper()) }
                .err()
                .map(|error| error.kind())
        };
        assert_eq!(adopt(2 << 20, 1 << 20), Some(ErrorKind::OutOfHostMemory));
        assert_eq!(adopt(100, 4096), Some(ErrorKind::InvalidArgument));
        assert_eq!(adopt(4096, 0), Some(ErrorKind::InvalidArgument));
        assert_eq!(adopt(1 << 20, 1 << 20), None);
    }
}
