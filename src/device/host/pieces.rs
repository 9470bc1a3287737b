//! What the host device does in the place of kernels and of the driver's larger copies: pieces,
//! batches, pitched copies, copies between devices, fingerprints.
//!
//! All of it runs on the threads of the streams. What a device cannot reach is an error, never a
//! fault: a kernel reaches the memory mapped for its device and registered host memory.

use std::ops::Range;
use std::sync::atomic::AtomicBool;

use super::memory::{InUse, Memory, SLICE, check_stop, overlap, range_of, slices};
use crate::device::fingerprint::{self, Block, Key, Print};
use crate::device::{Address, Direction, Piece, Pitched};
use crate::error::{Error, Result, ResultExt};

impl Memory {
    /// Checks at the call what can be known of a batch; names the piece at fault.
    pub(super) fn check_batch(&self, pieces: &[Piece], direction: Direction) -> Result<()> {
        for (at, piece) in pieces.iter().enumerate() {
            if piece.bytes > 0 {
                self.check_copy(piece.destination, piece.source, piece.bytes, direction)
                    .context(|| format!("pieces[{at}]"))?;
            }
        }
        Ok(())
    }

    /// The same for the ranges from the first to the last row.
    pub(super) fn check_pitched(&self, copy: &Pitched, direction: Direction) -> Result<()> {
        copy.check()?;
        for row in [0, copy.height - 1] {
            let destination = copy.destination + row * copy.destination_pitch;
            let source = copy.source + row * copy.source_pitch;
            self.check_copy(destination, source, copy.width, direction)?;
        }
        Ok(())
    }

    /// Copies as the driver does: each piece like a copy of its own. `name` is what an error calls
    /// them.
    ///
    /// # Safety
    /// As for [`Memory::copy`], for each piece.
    pub(super) unsafe fn copy_each(
        &self,
        device: u32,
        name: &str,
        pieces: impl Iterator<Item = Piece>,
        direction: Direction,
        stop: &AtomicBool,
    ) -> Result<()> {
        for (at, piece) in pieces.enumerate() {
            // SAFETY: by this function's contract.
            let copied = unsafe {
                let Piece {
                    destination,
                    source,
                    bytes,
                } = piece;
                self.copy(device, destination, source, bytes, direction, stop)
            };
            copied.context(|| format!("{name}[{at}]"))?;
        }
        Ok(())
    }

    /// Copies as the kernel does: from and to what `device` reaches.
    ///
    /// # Safety
    /// Registered host memory among the list and its pieces must be valid.
    pub(super) unsafe fn copy_pieces(
        &self,
        device: u32,
        list: u64,
        count: u32,
        stop: &AtomicBool,
    ) -> Result<()> {
        let bytes = u64::from(count) * size_of::<Piece>() as u64;
        let _list = self.hold_reachable(device, &[range_of(list, bytes)?])?;
        for at in 0..count as usize {
            check_stop(stop)?;
            // SAFETY: reachable, by the check above; an entry of the list.
            let piece = unsafe { (list as *const Piece).add(at).read_unaligned() };
            // SAFETY: by this function's contract.
            let copied = unsafe { self.copy_reachable(device, piece, stop) };
            copied.context(|| format!("pieces[{at}]"))?;
        }
        Ok(())
    }

    /// # Safety
    /// As for [`Self::copy_pieces`].
    unsafe fn copy_reachable(&self, device: u32, piece: Piece, stop: &AtomicBool) -> Result<()> {
        let to = range_of(piece.destination, piece.bytes)?;
        let from = range_of(piece.source, piece.bytes)?;
        let _in_use = self.hold_reachable(device, &[to.clone(), from.clone()])?;
        let slice = if overlap(&to, &from) {
            piece.bytes
        } else {
            SLICE
        };
        for (offset, length) in slices(piece.bytes, slice) {
            check_stop(stop)?;
            // SAFETY: device memory is mapped and stays so while `_in_use` lives; host memory is
            // registered, and whoever queued the work vouched for it.
            unsafe {
                std::ptr::copy(
                    (piece.source + offset) as *const u8,
                    (piece.destination + offset) as *mut u8,
                    length as usize,
                );
            }
        }
        Ok(())
    }

    /// Copies memory of `device` to memory of `peer`, with the rights of each on its side.
    pub(super) fn copy_to_peer(
        &self,
        device: u32,
        piece: Piece,
        peer: u32,
        stop: &AtomicBool,
    ) -> Result<()> {
        let to = range_of(piece.destination, piece.bytes)?;
        let from = range_of(piece.source, piece.bytes)?;
        let _source = self.hold(device, &[from]).context(|| "source")?;
        let _destination = self.hold(peer, &[to]).context(|| "destination")?;
        for (offset, length) in slices(piece.bytes, SLICE) {
            check_stop(stop)?;
            // SAFETY: both sides are mapped and stay so while they are held.
            unsafe {
                std::ptr::copy(
                    (piece.source + offset) as *const u8,
                    (piece.destination + offset) as *mut u8,
                    length as usize,
                );
            }
        }
        Ok(())
    }

    /// Writes the fingerprints of `count` blocks.
    ///
    /// # Safety
    /// Registered host memory among the lists must be valid, and nobody may write the blocks.
    pub(super) unsafe fn fingerprint(
        &self,
        device: u32,
        key: &Key,
        blocks: u64,
        prints: u64,
        count: u32,
        stop: &AtomicBool,
    ) -> Result<()> {
        let bytes = |each: usize| u64::from(count) * each as u64;
        let lists = [
            range_of(blocks, bytes(size_of::<Block>()))?,
            range_of(prints, bytes(size_of::<Print>()))?,
        ];
        let _lists = self.hold_reachable(device, &lists)?;
        for at in 0..count as usize {
            check_stop(stop)?;
            // SAFETY: reachable, by the check above; an entry of the list.
            let block = unsafe { (blocks as *const Block).add(at).read_unaligned() };
            if block.address % 16 != 0 {
                let why = format!("{:#x} is not a multiple of 16", block.address);
                return Err(Error::invalid(&format!("blocks[{at}]"), why));
            }
            let range = range_of(block.address, block.bytes)?;
            let _in_use = self
                .hold_reachable(device, &[range])
                .context(|| format!("blocks[{at}]"))?;
            // An empty block may have any address, 0 too, which no slice may have.
            let contents: &[u8] = if block.bytes == 0 {
                &[]
            } else {
                // SAFETY: mapped while `_in_use` lives, or registered; nobody writes it, by this
                // function's contract.
                unsafe {
                    std::slice::from_raw_parts(block.address as *const u8, block.bytes as usize)
                }
            };
            let print = fingerprint::print_of(key, contents);
            // SAFETY: reachable, by the check above; an entry of the list.
            unsafe { (prints as *mut Print).add(at).write_unaligned(print) };
        }
        Ok(())
    }

    /// Checks that kernels of `device` can use the ranges, and keeps what is device memory of them
    /// from being unmapped.
    fn hold_reachable(&self, device: u32, ranges: &[Range<Address>]) -> Result<InUse<'_>> {
        let mut on_device = Vec::new();
        {
            let state = self.lock();
            for range in ranges.iter().filter(|range| !range.is_empty()) {
                if state.check_not_device("", range).is_err() {
                    on_device.push(range.clone());
                } else {
                    state.check_registered(range)?;
                }
            }
        }
        self.hold(device, &on_device)
    }
}
