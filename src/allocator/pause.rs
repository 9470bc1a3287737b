//! Securing what must be kept before physical memory is taken away. What follows is the business of
//! `commit`.

use std::sync::{Arc, PoisonError};

use super::held::Held;
use super::table::State;
use super::{Allocation, Backing, Op, Outcome, PauseOptions, Saver, Stored, lock, region};
use crate::backup::{self, BackupBackend, Discard, StoreItem};
use crate::device::{Address, Device};
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::op::Ending;
use crate::process;
use crate::transfer::{Control, Span};

/// One allocation of a pause.
pub(super) struct Item {
    pub address: Address,
    pub bytes: u64,
    pub allocation: Allocation,
    /// Where its contents go, `None` if they are dropped.
    backend: Option<Arc<dyn BackupBackend>>,
    /// The new backup.
    pub stored: Option<Stored>,
}

impl Item {
    pub fn span(&self) -> Span {
        Span {
            device: Arc::clone(&self.allocation.device),
            address: self.address,
            bytes: self.bytes,
        }
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
        // A hole that is being cleared is about to become an allocation. That takes a moment, and
        // whoever clears does not wait for a pause.
        let clearing = |held: &mut Held| held.spans.iter().any(|span| span.clearing > 0);
        let mut guard = self
            .inner
            .cleared
            .wait_while(self.held(), clearing)
            .unwrap_or_else(PoisonError::into_inner);
        let held = &mut *guard;
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
            if let Some(Backing::Shared(id)) = record.payload.backing
                && let Some(span) = held.spans.get_mut(id)
            {
                span.leaving = true;
            }
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
                    && !stored.is_place_of(&item.allocation)
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
        let mut spans = Vec::new();
        for item in items {
            let mut held = self.held();
            if let Some(Backing::Shared(id)) = item.allocation.backing
                && let Some(span) = held.spans.get_mut(id)
            {
                span.leaving = false;
                spans.push(id);
            }
            let freed = held.finish(item.address, State::Active);
            drop(held);
            if let Some(record) = freed {
                self.give_back(item.address, record, None);
            }
        }
        spans.dedup();
        for id in spans {
            self.dissolve_if_empty(id);
        }
    }
}
