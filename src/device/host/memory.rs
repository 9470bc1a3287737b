//! Addresses and memory of all host devices of a platform: what is reserved, created, mapped,
//! accessible, registered, and in use by a copy right now.
//!
//! Nothing here knows about streams. Every call checks first and changes afterwards, so that misuse
//! changes nothing.

use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::os::{self, Content};
use super::tables::{Charge, Chunk, Mapping, Registration, Reservation, State, not_reserved};
use crate::device::{Address, CreateOptions, Direction, MemoryRange, MemoryUse, Physical, Place};
use crate::error::{Error, ErrorKind, Result, ResultExt};

/// Sizes and addresses are multiples of this: the size of a huge page, as on CUDA.
pub(super) const GRANULARITY: u64 = 2 << 20;

/// Copies look up after this many bytes whether the platform is being dropped.
pub(super) const SLICE: u64 = 8 << 20;

/// See the head of the file.
#[derive(Debug)]
pub(super) struct Memory {
    devices: u32,
    total: u64,
    used: Arc<[AtomicU64]>,
    /// Protects every table. Never held while bytes are copied or pages are freed, nor together
    /// with the lock of the streams.
    state: Mutex<State>,
}

/// Ranges that cannot be unmapped while this lives.
pub(super) struct InUse<'a> {
    memory: &'a Memory,
    number: u64,
}

impl Drop for InUse<'_> {
    fn drop(&mut self) {
        let number = self.number;
        self.memory.lock().in_use.retain(|(of, _)| *of != number);
    }
}

impl Memory {
    pub(super) fn new(devices: u32, total: u64) -> Self {
        Memory {
            devices,
            total,
            used: (0..devices).map(|_| AtomicU64::new(0)).collect(),
            state: Mutex::default(),
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn usage(&self, device: u32) -> MemoryUse {
        let used = self.used[device as usize].load(Ordering::Acquire);
        MemoryUse {
            free: self.total.saturating_sub(used),
            total: self.total,
        }
    }

    pub(super) fn reserve(&self, bytes: u64) -> Result<Address> {
        check_size(bytes)?;
        // Under the lock: a concurrent unreserve must not see the table and the system differ.
        let mut state = self.lock();
        let address = os::reserve(bytes, GRANULARITY)?;
        let reservation = Reservation { bytes, lost: false };
        state.reservations.insert(address, reservation);
        Ok(address)
    }

    pub(super) fn unreserve(&self, address: Address, bytes: u64) -> Result<()> {
        let range = check_range(address, bytes)?;
        let mut state = self.lock();
        let reservation = match state.reservations.get(&address) {
            Some(found) if found.bytes == bytes => found,
            Some(found) => {
                let why = format!("the reservation at {address:#x} has {} bytes", found.bytes);
                return Err(Error::invalid("bytes", why));
            }
            None => return Err(not_reserved(address)),
        };
        if let Some(at) = state.first_mapping_in(&range) {
            let why = format!("{at:#x} is still mapped");
            return Err(Error::invalid("address", why));
        }
        if !reservation.lost {
            os::unmap(address, bytes)?;
        }
        state.reservations.remove(&address);
        Ok(())
    }

    pub(super) fn create(
        &self,
        device: u32,
        bytes: u64,
        options: CreateOptions,
    ) -> Result<Physical> {
        check_size(bytes)?;
        let charge = self.charge(device, bytes)?;
        if options.exportable {
            let file = os::memory_file()?;
            os::set_length(&file, bytes)?;
            os::seal_length(&file)?;
            return Ok(self.lock().add_file(file, bytes, device, Some(charge)));
        }
        let mut state = self.lock();
        let (file, offset) = state.extend_arena(device, bytes)?;
        Ok(state.add_chunk(Chunk {
            file,
            offset,
            bytes,
            own_file: false,
            device,
            charge: Some(charge),
            mappings: 0,
            released: false,
        }))
    }

    fn charge(&self, device: u32, bytes: u64) -> Result<Arc<Charge>> {
        let used = &self.used[device as usize];
        used.fetch_update(Ordering::AcqRel, Ordering::Acquire, |used| {
            used.checked_add(bytes).filter(|sum| *sum <= self.total)
        })
        .map_err(|used| {
            let free = self.total.saturating_sub(used);
            let total = self.total;
            Error::new(
                ErrorKind::OutOfDeviceMemory,
                format!("host device {device}: {bytes} bytes wanted, {free} free of {total}"),
            )
        })?;
        Ok(Arc::new(Charge {
            used: Arc::clone(&self.used),
            device,
            bytes,
        }))
    }

    pub(super) fn release(&self, physical: Physical) -> Result<()> {
        let mut state = self.lock();
        state.chunk(physical)?.released = true;
        let gone = state.take_if_gone(physical.0);
        drop(state);
        drop(gone);
        Ok(())
    }

    pub(super) fn map(&self, address: Address, bytes: u64, physical: Physical) -> Result<()> {
        let range = check_range(address, bytes)?;
        let mut state = self.lock();
        let reserved = state.sound_reservation_of(&range)?;
        let chunk = state.chunk(physical)?;
        if chunk.bytes != bytes {
            let why = format!("{bytes}, but the physical memory has {}", chunk.bytes);
            return Err(Error::invalid("bytes", why));
        }
        let content = chunk.content(false);
        if let Some(at) = state.first_mapping_in(&range) {
            let why = format!("{at:#x} is mapped already");
            return Err(Error::invalid("address", why));
        }
        if let Err(error) = os::replace(address, bytes, content) {
            let kept = state.restore(reserved, address, bytes, Content::Nothing);
            return Err(with_loss(error, kept));
        }
        os::prefer_huge_pages(address, bytes);
        state.chunk(physical)?.mappings += 1;
        let mapping = Mapping {
            bytes,
            physical: physical.0,
            access: 0,
        };
        state.mappings.insert(address, mapping);
        Ok(())
    }

    pub(super) fn set_access(&self, address: Address, bytes: u64, devices: &[u32]) -> Result<()> {
        let range = check_range(address, bytes)?;
        let mut access = 0;
        for &device in devices {
            if device >= self.devices {
                let why = format!("there is no device {device}, only {}", self.devices);
                return Err(Error::invalid("peers", why));
            }
            access |= 1 << device;
        }
        let mut state = self.lock();
        let mappings = state.whole_mappings(&range)?;
        let closed: Vec<_> = mappings
            .iter()
            .filter(|at| state.mappings.get(at).is_some_and(|m| m.access == 0))
            .copied()
            .collect();
        for (done, &at) in closed.iter().enumerate() {
            let bytes = state.mappings.get(&at).map_or(0, |m| m.bytes);
            if let Err(error) = os::protect(at, bytes, true) {
                for undo in &closed[..=done] {
                    let bytes = state.mappings.get(undo).map_or(0, |m| m.bytes);
                    // The table, which copies go by, was not changed yet, so a failure here only
                    // leaves memory open to stray pointers.
                    let _ = os::protect(*undo, bytes, false);
                }
                return Err(error);
            }
        }
        for (_, mapping) in state.mappings.range_mut(range) {
            mapping.access |= access;
        }
        Ok(())
    }

    pub(super) fn unmap(&self, address: Address, bytes: u64) -> Result<()> {
        let range = check_range(address, bytes)?;
        let mut state = self.lock();
        let reserved = state.sound_reservation_of(&range)?;
        let mappings = state.whole_mappings(&range)?;
        if let Some((_, used)) = state.in_use.iter().find(|(_, used)| overlap(used, &range)) {
            let why = format!(
                "a copy of {:#x}..{:#x} is running; synchronise before unmapping",
                used.start, used.end
            );
            return Err(Error::new(ErrorKind::Busy, why));
        }
        if let Err(error) = os::replace(address, bytes, Content::Nothing) {
            let mut kept = Ok(());
            for at in mappings {
                kept = kept.and(state.restore_mapping(reserved, at));
            }
            return Err(with_loss(error, kept));
        }
        let mut gone = Vec::new();
        for at in mappings {
            if let Some(mapping) = state.mappings.remove(&at) {
                if let Some(chunk) = state.chunks.get_mut(&mapping.physical) {
                    chunk.mappings -= 1;
                }
                gone.extend(state.take_if_gone(mapping.physical));
            }
        }
        drop(state);
        drop(gone);
        Ok(())
    }

    pub(super) fn export(&self, physical: Physical) -> Result<OwnedFd> {
        let mut state = self.lock();
        let chunk = state.chunk(physical)?;
        if !chunk.own_file {
            let why = format!("{physical:?} was not created exportable");
            return Err(Error::invalid("physical", why));
        }
        os::duplicate(chunk.file.as_fd())
    }

    pub(super) fn import(
        &self,
        device: u32,
        descriptor: BorrowedFd<'_>,
        bytes: u64,
    ) -> Result<Physical> {
        check_size(bytes)?;
        let (length, identity) = os::length_and_identity(descriptor)?;
        if !os::is_sealed(descriptor) {
            let why = "not memory exported by a host device";
            return Err(Error::invalid("descriptor", why));
        }
        if length != bytes {
            let why = format!("{bytes}, but the exported memory has {length}");
            return Err(Error::invalid("bytes", why));
        }
        let file = os::duplicate(descriptor)?;
        let mut state = self.lock();
        // Memory of this platform that comes back stays charged until its last handle goes; memory
        // of another process is counted there.
        let charge = state
            .chunks
            .values()
            .filter(|chunk| chunk.own_file)
            .find(|chunk| chunk.identity() == Some(identity))
            .and_then(|chunk| chunk.charge.clone());
        Ok(state.add_file(file, bytes, device, charge))
    }

    pub(super) fn register(&self, pointer: u64, bytes: u64) -> Result<()> {
        let page = os::page_size();
        if pointer == 0 || !pointer.is_multiple_of(page) {
            let why = format!("{pointer:#x} is not a multiple of the page size, {page}");
            return Err(Error::invalid("pointer", why));
        }
        if bytes == 0 || !bytes.is_multiple_of(page) {
            let why = format!("{bytes} is not a multiple of the page size, {page}");
            return Err(Error::invalid("bytes", why));
        }
        let range = range_of(pointer, bytes)?;
        let mut state = self.lock();
        state.check_not_device("pointer", &range)?;
        if let Some((at, found)) = state.registered.range(..range.end).next_back()
            && at + found.bytes > range.start
        {
            let why = format!("{at:#x}, {} bytes, is registered already", found.bytes);
            return Err(Error::invalid("pointer", why));
        }
        state.last_registration += 1;
        let number = state.last_registration;
        state
            .registered
            .insert(pointer, Registration { bytes, number });
        Ok(())
    }

    pub(super) fn unregister(&self, pointer: u64) -> Result<()> {
        match self.lock().registered.remove(&pointer) {
            Some(_) => Ok(()),
            None => {
                let why = format!("{pointer:#x} is not registered");
                Err(Error::invalid("pointer", why))
            }
        }
    }

    pub(super) fn is_registered(&self, pointer: u64) -> bool {
        self.lock().registration_at(pointer).is_some()
    }

    pub(super) fn classify(&self, address: u64) -> Result<MemoryRange> {
        let state = self.lock();
        if let Some((start, mapping)) = state.mapping_at(address)
            && let Some(chunk) = state.chunks.get(&mapping.physical)
        {
            return Ok(MemoryRange {
                place: Place::Device(chunk.device),
                start,
                bytes: mapping.bytes,
                id: mapping.physical,
            });
        }
        let byte = address..address.saturating_add(1);
        if state.check_not_device("address", &byte).is_err() {
            let why = format!("no memory is mapped at {address:#x}");
            return Err(Error::invalid("address", why));
        }
        Ok(match state.registration_at(address) {
            Some((start, found)) => MemoryRange {
                place: Place::Pinned,
                start,
                bytes: found.bytes,
                id: found.number,
            },
            None => MemoryRange {
                place: Place::Pageable,
                start: address,
                bytes: 0,
                id: 0,
            },
        })
    }

    /// Checks at the call what can be known before the stream gets there.
    pub(super) fn check_copy(
        &self,
        destination: u64,
        source: u64,
        bytes: u64,
        direction: Direction,
    ) -> Result<()> {
        let destination = range_of(destination, bytes)?;
        let source = range_of(source, bytes)?;
        let state = self.lock();
        for (name, range, on_device) in [
            ("destination", &destination, direction != Direction::ToHost),
            ("source", &source, direction != Direction::ToDevice),
        ] {
            if on_device {
                state.reservation_of(range).context(|| name)?;
            } else {
                state.check_not_device(name, range)?;
            }
        }
        Ok(())
    }

    pub(super) fn check_fill(&self, address: Address, bytes: u64) -> Result<()> {
        let range = range_of(address, bytes)?;
        self.lock().reservation_of(&range).map(drop)
    }

    /// Copies now, as work of `device`.
    ///
    /// # Safety
    /// The host side must be valid for `bytes`. The device side is checked.
    pub(super) unsafe fn copy(
        &self,
        device: u32,
        destination: u64,
        source: u64,
        bytes: u64,
        direction: Direction,
        stop: &AtomicBool,
    ) -> Result<()> {
        let (to, from) = (range_of(destination, bytes)?, range_of(source, bytes)?);
        let _in_use = match direction {
            Direction::ToHost => self.hold(device, std::slice::from_ref(&from)),
            Direction::ToDevice => self.hold(device, std::slice::from_ref(&to)),
            Direction::OnDevice => self.hold(device, &[to.clone(), from.clone()]),
        }?;
        // Slices of overlapping ranges would read what an earlier one wrote.
        let slice = if overlap(&to, &from) { bytes } else { SLICE };
        for (offset, length) in slices(bytes, slice) {
            check_stop(stop)?;
            // SAFETY: the device side is mapped and accessible and stays so while `_in_use` lives;
            // the caller vouches for the host side.
            unsafe {
                std::ptr::copy(
                    (source + offset) as *const u8,
                    (destination + offset) as *mut u8,
                    length as usize,
                );
            }
        }
        Ok(())
    }

    /// Sets bytes now, as work of `device`.
    pub(super) fn fill(
        &self,
        device: u32,
        address: Address,
        value: u8,
        bytes: u64,
        stop: &AtomicBool,
    ) -> Result<()> {
        let _in_use = self.hold(device, &[range_of(address, bytes)?])?;
        for (offset, length) in slices(bytes, SLICE) {
            check_stop(stop)?;
            // SAFETY: mapped and accessible while `_in_use` lives.
            unsafe {
                std::ptr::write_bytes((address + offset) as *mut u8, value, length as usize);
            }
        }
        Ok(())
    }

    /// Keeps memory that `device` may use from being unmapped.
    pub(super) fn hold(&self, device: u32, ranges: &[Range<Address>]) -> Result<InUse<'_>> {
        let mut state = self.lock();
        for range in ranges {
            state.check_access(device, range)?;
        }
        state.last_use += 1;
        let number = state.last_use;
        let held = ranges.iter().map(|range| (number, range.clone()));
        state.in_use.extend(held);
        Ok(InUse {
            memory: self,
            number,
        })
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        for (address, reservation) in &state.reservations {
            if reservation.lost {
                continue;
            }
            if let Err(error) = os::unmap(*address, reservation.bytes) {
                tracing::warn!("addresses of the host device stay reserved: {error}");
            }
        }
    }
}

fn with_loss(error: Error, kept: Result<()>) -> Error {
    match kept {
        Ok(()) => error,
        Err(loss) => error.context(format_args!("addresses were lost ({loss}) after")),
    }
}

fn check_size(bytes: u64) -> Result<()> {
    if bytes == 0 || !bytes.is_multiple_of(GRANULARITY) || i64::try_from(bytes).is_err() {
        let why = format!("{bytes} is not a multiple of {GRANULARITY} above 0");
        return Err(Error::invalid("bytes", why));
    }
    Ok(())
}

fn check_range(address: Address, bytes: u64) -> Result<Range<Address>> {
    check_size(bytes)?;
    if !address.is_multiple_of(GRANULARITY) {
        let why = format!("{address:#x} is not a multiple of {GRANULARITY}");
        return Err(Error::invalid("address", why));
    }
    range_of(address, bytes)
}

pub(super) fn range_of(address: Address, bytes: u64) -> Result<Range<Address>> {
    match address.checked_add(bytes) {
        Some(end) => Ok(address..end),
        None => {
            let why = format!("{bytes} from {address:#x} on are more than there are");
            Err(Error::invalid("bytes", why))
        }
    }
}

pub(super) fn overlap(one: &Range<u64>, other: &Range<u64>) -> bool {
    one.start < other.end && other.start < one.end
}

/// Offset and length of every slice of `bytes`.
pub(super) fn slices(bytes: u64, slice: u64) -> impl Iterator<Item = (u64, u64)> {
    (0..bytes)
        .step_by(slice.max(1) as usize)
        .map(move |offset| (offset, slice.min(bytes - offset)))
}

pub(super) fn check_stop(stop: &AtomicBool) -> Result<()> {
    if stop.load(Ordering::Relaxed) {
        return Err(Error::new(
            ErrorKind::Shutdown,
            "the platform is being dropped",
        ));
    }
    Ok(())
}
