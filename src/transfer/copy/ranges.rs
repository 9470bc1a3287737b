//! What kind of memory the addresses of one copy are.
//!
//! What the platform said is remembered for one call only: the host may free memory and allocate it
//! anew between two calls, but not while one works on it, so nothing here is ever stale. Within a
//! call each range is asked for once, however many pieces lie in it; asking costs about as much as
//! finding out that a remembered answer still holds would.

use std::collections::BTreeMap;

use crate::device::{DeviceKind, MemoryRange, Place, Platform};
use crate::error::{Error, ErrorKind, Result};

/// Device memory is mapped in whole blocks of addresses of this size: what is true of one address
/// in a block, whether memory is there and whether it is the host's, is true of all of it.
const BLOCK: u64 = 2 << 20;

/// Host memory is registered in whole pages.
const PAGE: u64 = 4 << 10;

/// Neighbouring addresses of one place, with memory at each of them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Known {
    pub start: u64,
    pub end: u64,
    pub place: Place,
    /// The end of the allocation, registration or reservation around them.
    limit: u64,
}

impl Known {
    fn contains(&self, address: u64) -> bool {
        self.start <= address && address < self.end
    }

    /// How far one copy may go: a driver refuses those that cross from one registration or
    /// allocation into the next.
    pub fn limit(&self) -> u64 {
        self.limit
    }
}

/// The sides of a copy, as the host calls them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Destination,
    Source,
}

impl Side {
    pub fn name(self) -> &'static str {
        match self {
            Side::Destination => "dst",
            Side::Source => "src",
        }
    }
}

/// What a call wants to know of its memory.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Care {
    /// That there is memory at every address, not only at both ends of a piece: a kernel that
    /// touches one without takes the whole context with it, where the driver would refuse a copy.
    pub everywhere: bool,
    /// Which pages are pinned, each by itself: those are left to the stream, and the others are
    /// copied at once.
    pub by_page: bool,
}

/// The memory of one call.
pub(super) struct Ranges<'a> {
    platform: &'a dyn Platform,
    care: Care,
    /// The range found last, by side: most pieces lie where the one before did.
    last: [Known; 2],
    known: BTreeMap<u64, Known>,
}

impl<'a> Ranges<'a> {
    pub fn new(platform: &'a dyn Platform, care: Care) -> Ranges<'a> {
        let nothing = Known {
            start: 0,
            end: 0,
            place: Place::Pageable,
            limit: 0,
        };
        Ranges {
            platform,
            care,
            last: [nothing; 2],
            known: BTreeMap::new(),
        }
    }

    /// From now on [`Care::everywhere`].
    pub fn look_everywhere(&mut self) {
        self.care.everywhere = true;
    }

    /// The range around `address`.
    #[inline]
    pub fn at(&mut self, side: Side, address: u64) -> Result<Known> {
        let last = self.last[side as usize];
        if last.contains(address) {
            return Ok(last);
        }
        let found = self.find(side, address)?;
        self.last[side as usize] = found;
        Ok(found)
    }

    fn find(&mut self, side: Side, address: u64) -> Result<Known> {
        if let Some((_, known)) = self.known.range(..=address).next_back()
            && known.contains(address)
        {
            return Ok(*known);
        }
        let range = self
            .platform
            .classify(address)
            .map_err(|error| match error.kind() {
                ErrorKind::InvalidArgument => nothing_at(side, address),
                _ => error.context(side.name()),
            })?;
        let found = match range.place {
            Place::Pageable => {
                check_readable(side, address)?;
                let block = if self.care.by_page { PAGE } else { BLOCK };
                let start = address / block * block;
                Known {
                    start,
                    end: start.saturating_add(block),
                    place: Place::Pageable,
                    limit: u64::MAX,
                }
            }
            place => self.mapped(place, &range, address),
        };
        self.known.insert(found.start, found);
        Ok(found)
    }

    /// The part of a range that is certain to have memory. The CUDA driver tells the whole of a
    /// reservation, of which other parts may be without: paused, or not mapped yet.
    fn mapped(&self, place: Place, range: &MemoryRange, address: u64) -> Known {
        let limit = end_of(range, address);
        let (mut start, mut end) = (range.start, limit);
        if self.platform.kind() == DeviceKind::Cuda {
            let block = address / BLOCK * BLOCK;
            (start, end) = (start.max(block), end.min(block.saturating_add(BLOCK)));
        }
        Known {
            start,
            end,
            place,
            limit,
        }
    }

    /// The range around `address`, after it is certain that all of `bytes` (not 0) are of that
    /// place; neighbouring ranges of one place count together.
    #[inline]
    pub fn covering(&mut self, side: Side, address: u64, bytes: u64) -> Result<Known> {
        let first = self.at(side, address)?;
        if first.end - address < bytes {
            self.check_rest(side, address, bytes, first)?;
        }
        Ok(first)
    }

    fn check_rest(&mut self, side: Side, address: u64, bytes: u64, first: Known) -> Result<()> {
        let end = address + bytes;
        if first.place == Place::Pageable {
            // How far it goes nobody knows but the host; its last byte tells most mistakes.
            let last = self.at(side, end - 1)?;
            return match last.place {
                Place::Device(_) => Err(leaves(side, address, bytes, end - last.start)),
                _ => Ok(()),
            };
        }
        let (mut at, mut limit) = (first.end, first.limit);
        while at < end {
            if !self.care.everywhere && limit > at {
                at = at.max((end.min(limit) - 1) / BLOCK * BLOCK);
            }
            match self.at(side, at) {
                Ok(next) if next.place == first.place => (at, limit) = (next.end, next.limit),
                Err(error) if error.kind() != ErrorKind::InvalidArgument => return Err(error),
                _ => return Err(leaves(side, address, bytes, end - at)),
            }
        }
        Ok(())
    }
}

fn end_of(range: &MemoryRange, address: u64) -> u64 {
    match range.bytes {
        // Of unknown extent: the host's word is taken for all of it.
        0 => u64::MAX,
        bytes => range.start.saturating_add(bytes).max(address + 1),
    }
}

fn leaves(side: Side, address: u64, bytes: u64, by: u64) -> Error {
    Error::invalid(
        side.name(),
        format_args!("{bytes} bytes at {address:#x} leave the memory there by {by} bytes"),
    )
}

/// An error instead of a crash where nothing is mapped: memory that was freed, or an allocation
/// that is paused.
fn check_readable(side: Side, address: u64) -> Result<()> {
    let mut byte = 0u8;
    let into = libc::iovec {
        iov_base: (&raw mut byte).cast(),
        iov_len: 1,
    };
    let from = libc::iovec {
        iov_base: address as *mut libc::c_void,
        iov_len: 1,
    };
    // SAFETY: reads one byte of this process into `byte`; an address that cannot be read is an
    // error of the call.
    let read = unsafe { libc::process_vm_readv(libc::getpid(), &into, 1, &from, 1, 0) };
    let refused = std::io::Error::last_os_error().raw_os_error();
    // Where the system forbids the call, nothing was found out.
    if read < 0 && refused == Some(libc::EFAULT) {
        return Err(nothing_at(side, address));
    }
    Ok(())
}

fn nothing_at(side: Side, address: u64) -> Error {
    Error::invalid(
        side.name(),
        format_args!("there is no memory at {address:#x}: freed, or paused?"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// Two neighbouring ranges of device 0 from 1 MiB on, one of device 1 behind them.
    #[derive(Debug, Default)]
    struct Layout {
        asked: AtomicUsize,
    }

    const MIB: u64 = 1 << 20;

    impl Platform for Layout {
        fn kind(&self) -> DeviceKind {
            DeviceKind::Host
        }

        fn device_count(&self) -> u32 {
            2
        }

        fn device(&self, _: u32) -> Result<Arc<dyn Device>> {
            Err(Error::invalid("device", "there is none"))
        }

        fn current_device(&self) -> u32 {
            0
        }

        fn classify(&self, address: u64) -> Result<MemoryRange> {
            self.asked.fetch_add(1, Ordering::Relaxed);
            let (place, start) = match address / MIB {
                1 => (Place::Device(0), MIB),
                2 => (Place::Device(0), 2 * MIB),
                3 => (Place::Device(1), 3 * MIB),
                4 => (Place::Pinned, 4 * MIB),
                _ => (Place::Pageable, address),
            };
            Ok(MemoryRange {
                place,
                start,
                bytes: if place == Place::Pageable { 0 } else { MIB },
                id: 1,
            })
        }
    }

    #[test]
    fn a_range_is_asked_for_once() {
        let layout = Layout::default();
        let mut ranges = Ranges::new(&layout, Care::default());
        for piece in 0..4096 {
            let known = ranges.covering(Side::Source, MIB + piece * 256, 256);
            assert_eq!(known.unwrap().place, Place::Device(0));
            let known = ranges.covering(Side::Destination, 4 * MIB + piece * 256, 256);
            assert_eq!(known.unwrap().limit(), 5 * MIB);
        }
        assert_eq!(layout.asked.load(Ordering::Relaxed), 2);
    }

    #[test]
    fn neighbours_of_one_place_count_together() {
        let layout = Layout::default();
        let mut ranges = Ranges::new(&layout, Care::default());
        ranges.covering(Side::Source, MIB + 5, 2 * MIB - 5).unwrap();
        let error = ranges
            .covering(Side::Source, MIB + 5, 2 * MIB + 2)
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        let text = error.to_string();
        assert!(
            text.starts_with("src: ") && text.ends_with(" by 7 bytes"),
            "{text}"
        );
        // But no copy goes over their border.
        let known = ranges.at(Side::Source, MIB + 5).unwrap();
        assert_eq!(known.limit(), 2 * MIB);
    }

    #[test]
    fn memory_that_is_not_there_is_an_error() {
        let layout = Layout::default();
        let mut ranges = Ranges::new(&layout, Care::default());
        let here = [1u8; 64];
        ranges
            .covering(Side::Source, here.as_ptr() as u64, 64)
            .unwrap();
        let error = ranges.at(Side::Destination, 64).unwrap_err();
        assert!(error.to_string().starts_with("dst: there is no memory"));
        // Pinned memory whose registration ends inside of the copy.
        let error = ranges
            .covering(Side::Destination, 5 * MIB - 1, 2)
            .unwrap_err();
        assert!(error.to_string().ends_with(" by 1 bytes"), "{error}");
    }
}
