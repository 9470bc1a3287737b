//! The tables of the host device's memory: reservations, mappings, physical memory, and the
//! questions asked of them.
//!
//! Locking, and the order of checks and changes, are the business of `memory`.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::os::{self, Content};
use crate::device::{Address, Physical};
use crate::error::{Error, ErrorKind, Result};

/// Bytes of one device's budget that are taken, given back when the last holder goes.
#[derive(Debug)]
pub(super) struct Charge {
    pub(super) used: Arc<[AtomicU64]>,
    pub(super) device: u32,
    pub(super) bytes: u64,
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.used[self.device as usize].fetch_sub(self.bytes, Ordering::AcqRel);
    }
}

/// Physical memory. Private memory is a part of its device's one file, because a descriptor for
/// each would use up the host's limit, and because a part can be given back even while a forked
/// child still maps it. Exportable and imported memory is a file of its own.
#[derive(Debug)]
pub(super) struct Chunk {
    // Before `charge`: the memory goes first, then the budget rises.
    pub(super) file: Arc<OwnedFd>,
    pub(super) offset: u64,
    pub(super) bytes: u64,
    pub(super) own_file: bool,
    /// Whose memory it is; of another process, who imported it.
    pub(super) device: u32,
    pub(super) charge: Option<Arc<Charge>>,
    pub(super) mappings: usize,
    pub(super) released: bool,
}

impl Drop for Chunk {
    fn drop(&mut self) {
        if self.own_file {
            return;
        }
        if let Err(error) = os::punch(&self.file, self.offset, self.bytes) {
            // The pages are still there, so the budget must go on counting them.
            tracing::error!(
                "{} bytes of host memory cannot be given back: {error}",
                self.bytes
            );
            std::mem::forget(self.charge.take());
        }
    }
}

#[derive(Debug)]
pub(super) struct Mapping {
    pub(super) bytes: u64,
    pub(super) physical: u64,
    /// One bit per device that may read and write.
    pub(super) access: u32,
}

#[derive(Debug)]
pub(super) struct Reservation {
    pub(super) bytes: u64,
    /// The kernel failed so badly that part of the range may belong to somebody else by now.
    pub(super) lost: bool,
}

/// Host memory that every device can reach.
#[derive(Debug)]
pub(super) struct Registration {
    pub(super) bytes: u64,
    pub(super) number: u64,
}

/// The one file of a device's private memory. Offsets are never used twice: 2^63 bytes last longer
/// than the process.
#[derive(Debug)]
pub(super) struct Arena {
    pub(super) file: Arc<OwnedFd>,
    pub(super) length: u64,
}

#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) reservations: BTreeMap<Address, Reservation>,
    pub(super) mappings: BTreeMap<Address, Mapping>,
    pub(super) chunks: HashMap<u64, Chunk>,
    pub(super) arenas: HashMap<u32, Arena>,
    pub(super) last_chunk: u64,
    /// Ranges that copies use right now, each under the number of its copy.
    pub(super) in_use: Vec<(u64, Range<Address>)>,
    pub(super) last_use: u64,
    pub(super) registered: BTreeMap<u64, Registration>,
    pub(super) last_registration: u64,
}

impl Chunk {
    pub(super) fn content(&self, accessible: bool) -> Content {
        Content::File {
            file: self.file.as_raw_fd(),
            offset: self.offset,
            accessible,
        }
    }

    pub(super) fn identity(&self) -> Option<(u64, u64)> {
        let (_, identity) = os::length_and_identity(self.file.as_fd()).ok()?;
        Some(identity)
    }
}

impl State {
    pub(super) fn add_chunk(&mut self, chunk: Chunk) -> Physical {
        self.last_chunk += 1;
        self.chunks.insert(self.last_chunk, chunk);
        Physical(self.last_chunk)
    }

    pub(super) fn add_file(
        &mut self,
        file: OwnedFd,
        bytes: u64,
        device: u32,
        charge: Option<Arc<Charge>>,
    ) -> Physical {
        self.add_chunk(Chunk {
            file: Arc::new(file),
            offset: 0,
            bytes,
            own_file: true,
            device: charge.as_ref().map_or(device, |charge| charge.device),
            charge,
            mappings: 0,
            released: false,
        })
    }

    /// A new part of the device's file.
    pub(super) fn extend_arena(&mut self, device: u32, bytes: u64) -> Result<(Arc<OwnedFd>, u64)> {
        let arena = match self.arenas.entry(device) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => entry.insert(Arena {
                file: Arc::new(os::memory_file()?),
                length: 0,
            }),
        };
        let offset = arena.length;
        let length = offset
            .checked_add(bytes)
            .filter(|length| i64::try_from(*length).is_ok())
            .ok_or_else(|| Error::new(ErrorKind::Internal, "the host device ran out of offsets"))?;
        os::set_length(&arena.file, length)?;
        arena.length = length;
        Ok((Arc::clone(&arena.file), offset))
    }

    /// Physical memory that was not released.
    pub(super) fn chunk(&mut self, physical: Physical) -> Result<&mut Chunk> {
        self.chunks
            .get_mut(&physical.0)
            .filter(|chunk| !chunk.released)
            .ok_or_else(|| {
                let why = format!("{physical:?} is not known, or was released");
                Error::invalid("physical", why)
            })
    }

    /// Takes memory that is released and unmapped out of the table. The caller drops it after the
    /// lock, because freeing many pages takes a while.
    pub(super) fn take_if_gone(&mut self, physical: u64) -> Option<Chunk> {
        let chunk = self.chunks.get(&physical)?;
        if chunk.released && chunk.mappings == 0 {
            self.chunks.remove(&physical)
        } else {
            None
        }
    }

    /// Start of the reservation that contains all of `range`.
    pub(super) fn reservation_of(&self, range: &Range<Address>) -> Result<Address> {
        let (at, reservation) = self
            .reservations
            .range(..=range.start)
            .next_back()
            .filter(|(at, reservation)| range.start - *at < reservation.bytes)
            .ok_or_else(|| not_reserved(range.start))?;
        let end = at + reservation.bytes;
        if range.end > end {
            let why = format!(
                "{:#x}..{:#x} goes beyond its reservation, which ends at {end:#x}",
                range.start, range.end
            );
            return Err(Error::invalid("address", why));
        }
        Ok(*at)
    }

    /// The same, refused where the kernel may have given addresses away.
    pub(super) fn sound_reservation_of(&self, range: &Range<Address>) -> Result<Address> {
        let at = self.reservation_of(range)?;
        if self.reservations.get(&at).is_some_and(|found| found.lost) {
            let why = format!("addresses at {at:#x} were lost by an earlier failure");
            return Err(Error::new(ErrorKind::Device, why));
        }
        Ok(at)
    }

    pub(super) fn check_not_device(&self, name: &str, range: &Range<u64>) -> Result<()> {
        let below = self.reservations.range(..range.end).next_back();
        match below {
            Some((at, reservation)) if at + reservation.bytes > range.start => {
                let why = format!("{:#x} is device memory, not host memory", range.start);
                Err(Error::invalid(name, why))
            }
            _ => Ok(()),
        }
    }

    /// The registered host memory that contains `address`, and its start.
    pub(super) fn registration_at(&self, address: u64) -> Option<(u64, &Registration)> {
        let (at, found) = self.registered.range(..=address).next_back()?;
        (address - at < found.bytes).then_some((*at, found))
    }

    /// Whether all of `range` is registered, in one piece or in neighbouring ones.
    pub(super) fn check_registered(&self, range: &Range<u64>) -> Result<()> {
        let mut at = range.start;
        while at < range.end {
            let Some((start, found)) = self.registration_at(at) else {
                let why = format!("host memory at {at:#x} is not registered");
                return Err(Error::new(ErrorKind::Device, why));
            };
            at = start + found.bytes;
        }
        Ok(())
    }

    /// Start of the mapping that contains `address`.
    pub(super) fn mapping_at(&self, address: Address) -> Option<(Address, &Mapping)> {
        let (at, mapping) = self.mappings.range(..=address).next_back()?;
        (address - at < mapping.bytes).then_some((*at, mapping))
    }

    pub(super) fn first_mapping_in(&self, range: &Range<Address>) -> Option<Address> {
        match self.mapping_at(range.start) {
            Some((at, _)) => Some(at),
            None => self.mappings.range(range.clone()).next().map(|(at, _)| *at),
        }
    }

    /// Starts of the mappings that make up exactly `range`.
    pub(super) fn whole_mappings(&self, range: &Range<Address>) -> Result<Vec<Address>> {
        let mut found = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let Some((start, mapping)) = self.mapping_at(at) else {
                let why = format!("nothing is mapped at {at:#x}");
                return Err(Error::invalid("address", why));
            };
            let end = start + mapping.bytes;
            if start != at || end > range.end {
                let why = format!(
                    "{:#x}..{:#x} cuts the mapping {start:#x}..{end:#x}",
                    range.start, range.end
                );
                return Err(Error::invalid("address", why));
            }
            found.push(start);
            at = end;
        }
        Ok(found)
    }

    pub(super) fn check_access(&self, device: u32, range: &Range<Address>) -> Result<()> {
        let mut at = range.start;
        while at < range.end {
            let Some((start, mapping)) = self.mapping_at(at) else {
                let why = format!("no memory is mapped at {at:#x}");
                return Err(Error::new(ErrorKind::Device, why));
            };
            if mapping.access & (1 << device) == 0 {
                let why = format!("device {device} has no access to {at:#x}");
                return Err(Error::new(ErrorKind::Device, why));
            }
            at = start + mapping.bytes;
        }
        Ok(())
    }

    pub(super) fn restore_mapping(&mut self, reserved: Address, at: Address) -> Result<()> {
        let Some(mapping) = self.mappings.get(&at) else {
            return Ok(());
        };
        let Some(chunk) = self.chunks.get(&mapping.physical) else {
            return Ok(());
        };
        let content = chunk.content(mapping.access != 0);
        self.restore(reserved, at, mapping.bytes, content)
    }

    /// After a failed change: puts back what was at a range, or marks its reservation as lost.
    pub(super) fn restore(
        &mut self,
        reserved: Address,
        address: Address,
        bytes: u64,
        content: Content,
    ) -> Result<()> {
        os::restore(address, bytes, content).inspect_err(|_| {
            // A copy must not follow the table into addresses that may be somebody else's.
            if let Some(mapping) = self.mappings.get_mut(&address) {
                mapping.access = 0;
            }
            if let Some(reservation) = self.reservations.get_mut(&reserved) {
                reservation.lost = true;
            }
        })
    }
}

pub(super) fn not_reserved(address: Address) -> Error {
    let why = format!("{address:#x} is not reserved by the host device");
    Error::invalid("address", why)
}
