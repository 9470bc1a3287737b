//! What kind of memory the addresses of one copy are.
//!
//! What the platform said is remembered for one call only: the host may free memory and allocate it
//! anew between two calls, but not while one works on it, so nothing here is ever stale. Within a
//! call each range is asked for once, however many pieces lie in it; asking costs about as much as
//! finding out that a remembered answer still holds would.

use std::collections::BTreeMap;

use crate::device::{MemoryRange, Place, Platform};
use crate::error::{Error, ErrorKind, Result};

/// Device memory occupies whole blocks of addresses of this size, so what is pageable anywhere in
/// one is host memory everywhere in it, whose extent the platform does not tell.
const BLOCK: u64 = 2 << 20;

/// Neighbouring addresses of one place.
#[derive(Clone, Copy, Debug)]
pub(super) struct Known {
    pub start: u64,
    pub end: u64,
    pub place: Place,
}

impl Known {
    fn contains(&self, address: u64) -> bool {
        self.start <= address && address < self.end
    }

    /// How far one copy may go: over the edge of a registration it may not.
    pub fn limit(&self) -> u64 {
        match self.place {
            Place::Pinned => self.end,
            _ => u64::MAX,
        }
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

/// The memory of one call.
pub(super) struct Ranges<'a> {
    platform: &'a dyn Platform,
    /// The range found last, by side: most pieces lie where the one before did.
    last: [Known; 2],
    known: BTreeMap<u64, Known>,
}

impl<'a> Ranges<'a> {
    pub fn new(platform: &'a dyn Platform) -> Ranges<'a> {
        let nothing = Known {
            start: 0,
            end: 0,
            place: Place::Pageable,
        };
        Ranges {
            platform,
            last: [nothing; 2],
            known: BTreeMap::new(),
        }
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
                let start = address / BLOCK * BLOCK;
                Known {
                    start,
                    end: start.saturating_add(BLOCK),
                    place: Place::Pageable,
                }
            }
            place => Known {
                start: range.start,
                end: end_of(&range, address),
                place,
            },
        };
        self.known.insert(found.start, found);
        Ok(found)
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
        let mut at = first.end;
        while at < end {
            match self.at(side, at) {
                Ok(next) if next.place == first.place => at = next.end,
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
    use crate::device::{Device, DeviceKind};
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
        let mut ranges = Ranges::new(&layout);
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
        let mut ranges = Ranges::new(&layout);
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
    }

    #[test]
    fn memory_that_is_not_there_is_an_error() {
        let layout = Layout::default();
        let mut ranges = Ranges::new(&layout);
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
