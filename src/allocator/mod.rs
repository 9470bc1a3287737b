//! Address ranges whose physical memory can be taken away and put back.
//!
//! A [`Saver`] owns allocations. [`Saver::pause`] secures what must be kept, then releases the
//! physical memory of a selection; [`Saver::resume`] puts memory and contents back at the same
//! addresses. Two locks: the lock of the state (table and residues) is held for moments and never
//! across device work; the lock of operations is held by one pause or resume at a time and never by
//! `malloc` or `free`.

mod addresses;
mod backing;
mod commit;
mod free;
mod held;
mod malloc;
mod options;
mod ordered;
mod outcome;
mod pause;
mod pinned;
mod readiness;
pub mod region;
mod residue;
mod resume;
mod spans;
pub mod table;

use std::collections::BTreeMap;
use std::fmt;
use std::ptr::NonNull;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};

use crate::backup::{BackupBackend, Discard, Ticket};
use crate::device::{self, Address, CreateOptions, Device, Physical, Platform, round_up};
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::op::{self, Service};
use crate::process;
use crate::transfer::{ArenaUse, Engine};

pub use options::{PauseOptions, ResumeOptions};
pub use ordered::OrderedResume;
pub use outcome::{AllocationInfo, Failure, Outcome, Summary, TagStats};
pub use region::Region;
pub use table::State;

use addresses::{Addresses, Class};
use held::Held;
use residue::Residue;
use spans::{Span, SpanId};
use table::{Freed, Record};

/// Where the physical memory of an allocation comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Backing {
    /// A handle of its own.
    Own(Physical),
    /// Part of a handle that spans several.
    Shared(SpanId),
}

/// A pause or resume that runs on a thread of the library.
pub type Op = op::Op<Outcome>;

/// What belongs to one allocation besides its place and state.
#[derive(Clone)]
struct Allocation {
    device: Arc<dyn Device>,
    /// Of this allocation alone, so that it tells it from a later one at the same address.
    region: Arc<Region>,
    /// There while it is active, and where a span goes on having the memory of a paused one.
    backing: Option<Backing>,
    stored: Option<Stored>,
    /// Descriptors handed out, or about to be: others may hold the memory.
    exports: u32,
}

impl Allocation {
    fn class(&self) -> Class {
        (self.device.info().ordinal, Arc::clone(&self.region))
    }
}

/// A backup and where it is.
#[derive(Clone)]
struct Stored {
    backend: Arc<dyn BackupBackend>,
    ticket: Arc<dyn Ticket>,
    /// The contents are complete; false for a place that is only kept for the next pause.
    complete: bool,
}

impl Stored {
    fn discard(self, why: Discard) {
        self.backend.discard(self.ticket, why);
    }

    /// Whether this backup lies in the place that the allocation had before.
    fn is_place_of(&self, allocation: &Allocation) -> bool {
        allocation
            .stored
            .as_ref()
            .is_some_and(|before| Arc::ptr_eq(&before.ticket, &self.ticket))
    }
}

struct Inner {
    engine: Arc<Engine>,
    /// Protects the book-keeping; never held across a device call.
    held: Mutex<Held>,
    /// Signalled when a hole of a span has been cleared, or was given up.
    cleared: Condvar,
    addresses: Addresses,
    /// Serialises pause and resume; taken before `held`, never by malloc or free.
    turn: Mutex<()>,
    service: Service,
}

/// Owns allocations on the devices of one platform. Cheap to clone; all clones are the same saver.
#[derive(Clone)]
pub struct Saver {
    inner: Arc<Inner>,
}

impl fmt::Debug for Saver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Saver on {}", self.inner.engine.platform().kind())
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if process::check().is_err() {
            return;
        }
        let platform = self.engine.platform();
        let held = self.held.get_mut().unwrap_or_else(PoisonError::into_inner);
        // Memory before the addresses of those that are part of it.
        let mut residues: Vec<Residue> = held
            .spans
            .drain()
            .map(|span| Saver::residue_of(platform, span))
            .collect();
        residues.append(&mut held.residues);
        for (address, record) in held.table.drain() {
            let allocation = record.payload;
            let device = Arc::clone(&allocation.device);
            let mut residue = Residue::of(device, address, record.bytes).with_addresses();
            if let Some(Backing::Own(physical)) = allocation.backing {
                residue = residue.with_memory(physical);
                residue.unsettled = true;
                residue.peers =
                    Saver::peers_in_use(platform, &allocation.device, &allocation.region);
            }
            if let Some(stored) = allocation.stored {
                stored.discard(Discard::Freed);
            }
            residues.push(residue);
        }
        for mut residue in residues {
            residue.clear(&self.addresses);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The saver of the process. Read by every hooked call, written when it is made and closed.
static DEFAULT: RwLock<Option<Saver>> = RwLock::new(None);

/// Held while the default saver is made, so that it is made once.
static DEFAULT_OPENING: Mutex<()> = Mutex::new(());

impl Saver {
    pub fn new(platform: Arc<dyn Platform>) -> Result<Saver> {
        Ok(Saver {
            inner: Arc::new(Inner {
                engine: Arc::new(Engine::new(platform)?),
                held: Mutex::default(),
                cleared: Condvar::new(),
                addresses: Addresses::default(),
                turn: Mutex::default(),
                service: Service::default(),
            }),
        })
    }

    /// The saver of the process, on the platform `TMS_DEVICE` asks for. Only success is
    /// remembered: a driver that appears later is found.
    pub fn process_default() -> Result<Saver> {
        process::check()?;
        if let Some(saver) = Saver::existing_default() {
            return Ok(saver);
        }
        let _opening = lock(&DEFAULT_OPENING);
        if let Some(saver) = Saver::existing_default() {
            return Ok(saver);
        }
        let saver = Saver::new(device::open_from_environment()?)?;
        *DEFAULT.write().unwrap_or_else(PoisonError::into_inner) = Some(saver.clone());
        Ok(saver)
    }

    /// The saver of the process if there is one already. Never opens a device.
    pub fn existing_default() -> Option<Saver> {
        DEFAULT
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Closes the saver of the process and forgets it. [`ErrorKind::Busy`] while an operation runs.
    pub fn close_default() -> Result<()> {
        let _opening = lock(&DEFAULT_OPENING);
        let Some(saver) = Saver::existing_default() else {
            return Ok(());
        };
        saver.close()?;
        *DEFAULT.write().unwrap_or_else(PoisonError::into_inner) = None;
        Ok(())
    }

    pub fn platform(&self) -> &Arc<dyn Platform> {
        self.inner.engine.platform()
    }

    /// What moves the bytes of this saver; explicit copies may share it.
    pub fn engine(&self) -> &Arc<Engine> {
        &self.inner.engine
    }

    /// Pinned host memory of this saver.
    pub fn arena_use(&self) -> ArenaUse {
        self.inner.engine.arena().usage()
    }

    /// Device memory and addresses that belong to no allocation: bytes that span freed ones or whose
    /// release failed, and bytes reserved.
    pub fn overhead(&self) -> (u64, u64) {
        let held = self.held();
        let spans: u64 = held.spans.iter().map(Span::held_bytes).sum();
        let residues = held.residues.iter();
        let residues: u64 = residues
            .filter(|residue| residue.physical.is_some())
            .map(|residue| residue.bytes)
            .sum();
        let used: u64 = held.table.iter().map(|(_, record)| record.bytes).sum();
        let reserved = self.inner.addresses.reserved_bytes();
        (spans + residues, reserved.saturating_sub(used))
    }

    /// Whether `pointer` lies in pinned memory of this saver.
    pub fn is_pinned(&self, pointer: usize) -> bool {
        self.inner.engine.arena().contains(pointer)
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        lock(&self.inner.held)
    }

    /// Bytes of `device` (all devices for `None`) that malloc leaves free.
    pub fn set_memory_margin(&self, device: Option<u32>, bytes: u64) -> Result<()> {
        if let Some(ordinal) = device {
            self.platform().check_ordinal(ordinal)?;
        }
        let mut held = self.held();
        match device {
            Some(ordinal) => {
                held.margins.insert(ordinal, bytes);
            }
            None => {
                held.margins.clear();
                held.margin_of_all = bytes;
            }
        }
        Ok(())
    }

    fn peers<'a>(device: &'a Arc<dyn Device>, region: &Region) -> &'a [u32] {
        if region.peer_access {
            &device.info().peers
        } else {
            &[]
        }
    }

    /// Other devices that could work on the allocation.
    fn peers_in_use(
        platform: &Arc<dyn Platform>,
        device: &Arc<dyn Device>,
        region: &Region,
    ) -> Vec<Arc<dyn Device>> {
        Self::peers(device, region)
            .iter()
            .filter_map(|&peer| platform.device_in_use(peer))
            .collect()
    }

    /// Whether `address` is the beginning of an allocation of this saver.
    pub fn owns(&self, address: Address) -> bool {
        self.held()
            .table
            .find(address, 0)
            .is_some_and(|(base, _)| base == address)
    }

    /// Host memory with the backup of `bytes` bytes at `pointer`, if there is a complete one.
    pub fn backup_pointer(&self, pointer: Address, bytes: u64) -> Option<NonNull<u8>> {
        let held = self.held();
        let (base, record) = held.table.find(pointer, bytes)?;
        let stored = record.payload.stored.as_ref()?;
        if !stored.complete {
            return None;
        }
        let start = stored.ticket.read_pointer()?;
        // SAFETY: `find` checked that the offset lies inside the allocation, and the backup has
        // the same length.
        Some(unsafe { start.add((pointer - base) as usize) })
    }

    pub fn query(&self, pointer: Address) -> Option<AllocationInfo> {
        let held = self.held();
        let (base, record) = held.table.find(pointer, 0)?;
        Some(AllocationInfo {
            base,
            bytes: record.bytes,
            requested: record.requested,
            tag: Arc::clone(&record.tag),
            device: record.payload.device.info().ordinal,
            state: held.state_of(base, record),
            backed: record
                .payload
                .stored
                .as_ref()
                .is_some_and(|stored| stored.complete),
            exported: record.payload.exports > 0,
        })
    }

    /// One entry for each tag and device, sorted.
    pub fn stats(&self) -> Vec<TagStats> {
        let held = self.held();
        let mut stats: BTreeMap<(Arc<str>, u32), TagStats> = BTreeMap::new();
        for (base, record) in held.table.iter() {
            let device = record.payload.device.info().ordinal;
            let entry = stats
                .entry((Arc::clone(&record.tag), device))
                .or_insert_with(|| TagStats {
                    tag: Arc::clone(&record.tag),
                    device,
                    active_count: 0,
                    active_bytes: 0,
                    paused_count: 0,
                    paused_bytes: 0,
                    backed_bytes: 0,
                    held_bytes: held.held_bytes(&record.tag, device),
                });
            match held.state_of(base, record) {
                State::Active | State::Pausing => {
                    entry.active_count += 1;
                    entry.active_bytes += record.bytes;
                }
                State::Paused | State::Resuming => {
                    entry.paused_count += 1;
                    entry.paused_bytes += record.bytes;
                }
            }
            if let Some(stored) = &record.payload.stored
                && stored.complete
            {
                entry.backed_bytes += stored.ticket.bytes();
            }
        }
        stats.into_values().collect()
    }

    /// A descriptor of the physical memory of an active, exportable allocation, and its size. From
    /// then on the allocation cannot be paused: others hold its memory.
    pub fn export(&self, pointer: Address) -> Result<(std::os::fd::OwnedFd, u64)> {
        process::check()?;
        let (base, bytes, device, physical) = {
            let mut held = self.held();
            let (base, record) = held
                .table
                .find(pointer, 0)
                .ok_or_else(|| unknown(pointer))?;
            let allocation = &record.payload;
            if !allocation.region.exportable {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    format!("{base:#x} was not allocated in an exportable region"),
                ));
            }
            let physical = match (record.state, allocation.backing) {
                (State::Active, Some(Backing::Own(physical))) => physical,
                // Exportable allocations have handles of their own.
                _ => return Err(not_active(base)),
            };
            let found = (base, record.bytes, Arc::clone(&allocation.device), physical);
            // Marked first: a pause that begins now must see it.
            if let Some(record) = held.table.get_mut(base) {
                record.payload.exports += 1;
            }
            found
        };
        let exported = device
            .export(physical)
            .context(|| format!("exporting {base:#x}"));
        if exported.is_err()
            && let Some(record) = self.held().table.get_mut(base)
        {
            record.payload.exports = record.payload.exports.saturating_sub(1);
        }
        Ok((exported?, bytes))
    }

    fn active_span(&self, address: Address, bytes: usize) -> Result<Arc<dyn Device>> {
        let held = self.held();
        let (base, record) = held
            .table
            .find(address, bytes as u64)
            .ok_or_else(|| unknown(address))?;
        if held.state_of(base, record) != State::Active {
            return Err(not_active(base));
        }
        Ok(Arc::clone(&record.payload.device))
    }

    /// Copies device memory of an active allocation to the host and waits. Pausing or freeing it
    /// meanwhile is the caller's error.
    pub fn read(&self, address: Address, into: &mut [u8]) -> Result<()> {
        process::check()?;
        let device = self.active_span(address, into.len())?;
        self.inner.engine.read(&device, address, into)
    }

    /// Copies host memory into an active allocation and waits. Pausing or freeing it meanwhile is
    /// the caller's error.
    pub fn write(&self, address: Address, from: &[u8]) -> Result<()> {
        process::check()?;
        let device = self.active_span(address, from.len())?;
        self.inner.engine.write(&device, address, from)
    }

    /// Frees every allocation. [`ErrorKind::Busy`] while an operation runs.
    pub fn close(&self) -> Result<()> {
        process::check()?;
        let _turn = match self.inner.turn.try_lock() {
            Ok(turn) => turn,
            Err(std::sync::TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(std::sync::TryLockError::WouldBlock) => {
                return Err(Error::new(
                    ErrorKind::Busy,
                    "an operation of the saver is running",
                ));
            }
        };
        if self.inner.service.busy() || self.inner.engine.is_copying() {
            return Err(Error::new(
                ErrorKind::Busy,
                "an operation of the saver is queued",
            ));
        }
        let addresses: Vec<Address> = {
            let held = self.held();
            held.table.iter().map(|(address, _)| address).collect()
        };
        for address in addresses {
            // Another thread may have freed it first, which is as good.
            let _ = self.free(address);
        }
        self.drain_residues(|_| true);
        Ok(())
    }
}

fn unknown(pointer: Address) -> Error {
    Error::new(
        ErrorKind::NotFound,
        format!("{pointer:#x} is in no allocation, or the range leaves it"),
    )
}

fn not_active(base: Address) -> Error {
    Error::new(
        ErrorKind::Busy,
        format!("the allocation at {base:#x} is not active: resume it first"),
    )
}
