//! Taking physical memory away: secure every backup, then, as one batch, unmap and release.

use std::sync::Arc;

use super::table::State;
use super::{
    Allocation, Failure, Op, Outcome, PauseOptions, Residue, Saver, Stored, Summary, lock, region,
};
use crate::backup::{self, BackupBackend, Discard, StoreItem};
use crate::device::{Address, Device};
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::op::Ending;
use crate::process;
use crate::transfer::{Control, Span, devices_of};

/// Other processes take and give memory too, so a smaller shortfall says nothing.
const SHORTFALL_NOISE: u64 = 32 << 20;

/// One allocation of a pause.
struct Item {
    address: Address,
    bytes: u64,
    allocation: Allocation,
    /// Where its contents go, `None` if they are dropped.
    backend: Option<Arc<dyn BackupBackend>>,
    /// The new backup.
    stored: Option<Stored>,
}

impl Item {
    fn span(&self) -> Span {
        Span {
            device: Arc::clone(&self.allocation.device),
            address: self.address,
            bytes: self.bytes,
        }
    }
}

/// One allocation after the commit point.
struct Leaving {
    item: Item,
    /// Where it ends: paused once it is unmapped.
    state: State,
    /// Its physical memory.
    residue: Residue,
}

impl Leaving {
    fn new(item: Item) -> Leaving {
        let device = Arc::clone(&item.allocation.device);
        let mut residue = Residue::reserved(device, item.address, item.bytes);
        residue.unreserve = false;
        residue.physical = item.allocation.physical;
        Leaving {
            item,
            state: State::Active,
            residue,
        }
    }

    fn is_on(&self, device: &dyn Device) -> bool {
        self.residue.device.info().ordinal == device.info().ordinal
    }

    fn fails(&self, error: Error, summary: &mut Summary) {
        summary.failures.push(Failure {
            address: self.item.address,
            bytes: self.item.bytes,
            error,
        });
    }

    fn unmap(&mut self, summary: &mut Summary) {
        if self.item.stored.is_some() {
            summary.copied_bytes += self.item.bytes;
        }
        match self
            .residue
            .device
            .unmap(self.item.address, self.item.bytes)
        {
            Ok(()) => {
                self.state = State::Paused;
                summary.done_count += 1;
                summary.done_bytes += self.item.bytes;
            }
            Err(error) => self.fails(error.context("stays active"), summary),
        }
    }

    /// Bytes that were released.
    fn release(&mut self, summary: &mut Summary) -> u64 {
        if self.state != State::Paused {
            return 0;
        }
        if self.residue.clear() {
            return self.item.bytes;
        }
        let error = Error::new(
            ErrorKind::Device,
            "paused, but its memory could not be released yet; the next call tries again",
        );
        self.fails(error, summary);
        0
    }
}

impl Saver {
    /// Pauses a selection. All backups are complete before the first byte is released; if one
    /// fails, everything stays active. After that point each allocation that cannot be unmapped
    /// stays active and is listed.
    pub fn pause(&self, options: &PauseOptions) -> Outcome {
        self.pause_controlled(options, &Arc::default())
    }

    /// [`Self::pause`] on a thread of the library.
    pub fn pause_async(&self, options: &PauseOptions) -> Result<Op> {
        self.check_pause(options)?;
        let (saver, options) = (self.clone(), options.clone());
        self.inner
            .service
            .submit(move |control| Some(saver.pause_controlled(&options, control)))
    }

    fn check_pause(&self, options: &PauseOptions) -> Result<()> {
        match options.backup.as_deref() {
            None | Some("none") => Ok(()),
            Some(name) => backup::by_name(name).map(|_| ()),
        }
    }

    fn pause_controlled(&self, options: &PauseOptions, control: &Arc<Control>) -> Outcome {
        let _running = match process::Running::start() {
            Ok(running) => running,
            Err(error) => return Outcome::failed(error),
        };
        let _turn = lock(&self.inner.turn);
        self.inner.engine.drain_quarantine();
        self.drain_residues(|_| true);
        let (mut items, unchanged_count) = match self.select_active(options) {
            Ok(selected) => selected,
            Err(error) => return Outcome::failed(error),
        };
        let mut outcome = match self.secure(&mut items, options, control) {
            Ok(()) => self.commit(items),
            Err(error) => {
                self.stay_active(items);
                Outcome::failed(error.context("pause"))
            }
        };
        outcome.summary.unchanged_count = unchanged_count;
        outcome.summary.note_unchanged(control);
        outcome
            .summary
            .warn_if_empty("pause", options.tags.as_deref());
        outcome
    }

    fn select_active(&self, options: &PauseOptions) -> Result<(Vec<Item>, u64)> {
        self.check_pause(options)?;
        let mut held = self.held();
        let selection = held.table.select(
            options.tags.as_deref(),
            State::Active,
            State::Pausing,
            |address, record| match record.payload.exports > 0 {
                true if options.skip_exported => Ok(false),
                true => Err(Error::new(
                    ErrorKind::Exported,
                    format!(
                        "pause: the allocation at {address:#x} (tag \"{}\") is exported; releasing it would \
                         free nothing and leave the other side with stale memory",
                        record.tag
                    ),
                )),
                false => Ok(true),
            },
        )?;
        let mut items = Vec::with_capacity(selection.addresses.len());
        for address in selection.addresses {
            let Some(record) = held.table.get_mut(address) else {
                continue;
            };
            let name = match options.backup.as_deref() {
                None => record.payload.region.backup.as_deref(),
                Some("none") => None,
                Some(name) => Some(name),
            };
            items.push(Item {
                address,
                bytes: record.bytes,
                allocation: record.payload.clone(),
                // Names were checked when the region and the options were made.
                backend: name.and_then(|name| backup::by_name(name).ok()),
                stored: None,
            });
        }
        Ok((items, selection.unchanged))
    }

    /// Waits for queued work, then stores what must be kept. On an error nothing new is kept.
    fn secure(
        &self,
        items: &mut [Item],
        options: &PauseOptions,
        control: &Arc<Control>,
    ) -> Result<()> {
        let total = items
            .iter()
            .filter(|item| item.backend.is_some())
            .map(|item| item.bytes)
            .sum();
        control.expect(total);
        self.synchronize_all(items)?;
        let stored = self
            .store_all(items, options, control)
            .and_then(|()| control.check());
        if stored.is_err() {
            for item in items.iter_mut() {
                // A place from before belongs to the record, which keeps it.
                if let Some(stored) = item.stored.take()
                    && !is_place_of(&item.allocation, &stored)
                {
                    stored.discard(Discard::Resumed);
                }
            }
        }
        stored
    }

    /// Every device that may have work queued on the selection is waited for once.
    fn synchronize_all(&self, items: &[Item]) -> Result<()> {
        let mut done: Vec<u32> = Vec::new();
        let mut wait = |device: &Arc<dyn Device>| -> Result<()> {
            let ordinal = device.info().ordinal;
            if !done.contains(&ordinal) {
                device.synchronize()?;
                done.push(ordinal);
            }
            Ok(())
        };
        for item in items {
            let device = &item.allocation.device;
            wait(device)?;
            for peer in Self::peers_in_use(self.platform(), device, &item.allocation.region) {
                wait(&peer)?;
            }
        }
        Ok(())
    }

    /// Stores backend by backend, all devices of one at once.
    fn store_all(
        &self,
        items: &mut [Item],
        options: &PauseOptions,
        control: &Arc<Control>,
    ) -> Result<()> {
        let checks = options.checks_unchanged();
        for name in backup::NAMES {
            let chosen: Vec<usize> = (0..items.len())
                .filter(|&index| {
                    let backend = items[index].backend.as_ref();
                    backend.is_some_and(|backend| backend.name() == name)
                })
                .collect();
            let Some(&first) = chosen.first() else {
                continue;
            };
            let Some(backend) = items[first].backend.clone() else {
                continue;
            };
            let requests: Vec<StoreItem> = chosen
                .iter()
                .map(|&index| {
                    let item = &items[index];
                    let previous = item.allocation.stored.as_ref();
                    StoreItem {
                        span: item.span(),
                        previous: previous
                            .filter(|stored| stored.backend.name() == name)
                            .map(|stored| Arc::clone(&stored.ticket)),
                        fingerprint: checks
                            && item.allocation.region.retain.unwrap_or_else(region::retain),
                        directory: item.allocation.region.directory.clone(),
                    }
                })
                .collect();
            self.doubt_places(&chosen, items);
            let tickets = backend
                .store(&self.inner.engine, &requests, control)
                .context(|| format!("backup \"{name}\""))?;
            for (&index, ticket) in chosen.iter().zip(tickets) {
                items[index].stored = Some(Stored {
                    backend: Arc::clone(&backend),
                    ticket,
                    complete: true,
                });
            }
        }
        Ok(())
    }

    /// From here on the old contents of places that are used again cannot be relied on.
    fn doubt_places(&self, chosen: &[usize], items: &[Item]) {
        let mut held = self.held();
        for &index in chosen {
            let chosen = items[index].backend.as_ref();
            if let Some(record) = held.table.get_mut(items[index].address)
                && let Some(stored) = &mut record.payload.stored
                && chosen.is_some_and(|backend| backend.name() == stored.backend.name())
            {
                stored.complete = false;
            }
        }
    }

    /// Nothing was released: every allocation is active again.
    fn stay_active(&self, items: Vec<Item>) {
        for item in items {
            let freed = self.held().table.finish(item.address, State::Active);
            if let Some(record) = freed {
                self.give_back(item.address, record, None);
            }
        }
    }

    /// Unmaps everything, then releases everything: in turns the driver takes longer. From here
    /// on it only goes forward.
    fn commit(&self, items: Vec<Item>) -> Outcome {
        let spans: Vec<Span> = items.iter().map(Item::span).collect();
        let devices = devices_of(&spans);
        let before = free_bytes(&devices);
        let mut summary = Summary::default();
        let mut leaving: Vec<Leaving> = items.into_iter().map(Leaving::new).collect();
        for device in &devices {
            device.together(&mut || {
                for left in leaving.iter_mut().filter(|left| left.is_on(&**device)) {
                    left.unmap(&mut summary);
                }
            });
        }
        let mut released = 0;
        for device in &devices {
            device.together(&mut || {
                for left in leaving.iter_mut().filter(|left| left.is_on(&**device)) {
                    released += left.release(&mut summary);
                }
            });
        }
        summary.shortfall_bytes = shortfall(&before, &free_bytes(&devices), released);
        for left in leaving {
            self.settle_paused(left);
        }
        Outcome::from_summary("pause", summary)
    }

    /// Writes the end of a pause into the table.
    fn settle_paused(&self, left: Leaving) {
        let Leaving {
            item,
            state,
            residue,
        } = left;
        let mut held = self.held();
        if residue.physical.is_some() && state == State::Paused {
            held.residues.push(residue);
        }
        let mut outdated = None;
        if let Some(record) = held.table.get_mut(item.address) {
            let payload = &mut record.payload;
            if state == State::Paused {
                payload.physical = None;
            }
            outdated = match &item.stored {
                Some(new) if is_place_of(payload, new) => None,
                _ => payload.stored.take(),
            };
            // Without a backup the contents are gone, and with them every older copy.
            payload.stored = item.stored;
        }
        let freed = held.table.finish(item.address, state);
        drop(held);
        if let Some(outdated) = outdated {
            outdated.discard(Discard::Freed);
        }
        if let Some(record) = freed {
            self.give_back(item.address, record, None);
        }
    }
}

/// Whether a backup lies in the place that the allocation had before.
fn is_place_of(allocation: &Allocation, stored: &Stored) -> bool {
    allocation
        .stored
        .as_ref()
        .is_some_and(|before| Arc::ptr_eq(&before.ticket, &stored.ticket))
}

/// Free bytes of all devices together, `None` if one does not tell.
fn free_bytes(devices: &[Arc<dyn Device>]) -> Option<u64> {
    devices
        .iter()
        .map(|device| device.memory().ok().map(|memory| memory.free))
        .sum()
}

/// Released bytes that did not become free.
fn shortfall(before: &Option<u64>, after: &Option<u64>, released: u64) -> u64 {
    let (Some(before), Some(after)) = (before, after) else {
        return 0;
    };
    let missing = released.saturating_sub(after.saturating_sub(*before));
    if missing <= SHORTFALL_NOISE {
        return 0;
    }
    tracing::warn!(
        "{missing} of {released} released bytes did not become free: held by another reference \
         (exported, peer-mapped or registered memory), or taken by another process meanwhile"
    );
    missing
}
