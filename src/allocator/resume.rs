//! Putting memory and contents back: first all memory (see `backing`), then the contents.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::table::{Record, State};
use super::{
    Allocation, Backing, Failure, Op, Outcome, Residue, ResumeOptions, Saver, Stored, Summary,
    lock, region,
};
use crate::backup::{self, Discard, LoadItem, Unobserved};
use crate::device::Address;
use crate::error::{ErrorKind, Result};
use crate::op::Ending;
use crate::process;
use crate::transfer::{Control, Span};

/// First and longest pause between two looks at the free memory of a device.
const SHORTEST_NAP: Duration = Duration::from_millis(1);
const LONGEST_NAP: Duration = Duration::from_millis(50);

/// One allocation of a resume.
pub(super) struct Item {
    pub address: Address,
    pub bytes: u64,
    pub allocation: Allocation,
    pub result: Result<()>,
}

impl Item {
    pub fn new(address: Address, record: &Record<Allocation>) -> Item {
        Item {
            address,
            bytes: record.bytes,
            allocation: record.payload.clone(),
            result: Ok(()),
        }
    }

    pub fn span(&self) -> Span {
        Span {
            device: Arc::clone(&self.allocation.device),
            address: self.address,
            bytes: self.bytes,
        }
    }
}

/// Waits between attempts, for longer each time.
pub(super) struct Patience {
    deadline: Instant,
    nap: Duration,
}

impl Patience {
    pub fn new(wait: Duration) -> Patience {
        let now = Instant::now();
        Patience {
            // A wait beyond what the clock can express is as good as a day.
            deadline: now
                .checked_add(wait)
                .unwrap_or(now + Duration::from_secs(86_400)),
            nap: SHORTEST_NAP,
        }
    }

    /// How long to sleep before the next attempt, `None` when the time is up.
    pub fn next(&mut self) -> Option<Duration> {
        let left = self.deadline.checked_duration_since(Instant::now())?;
        if left.is_zero() {
            return None;
        }
        let nap = self.nap.min(left);
        self.nap = (self.nap * 2).min(LONGEST_NAP);
        Some(nap)
    }
}

pub(super) fn short_of_memory(outcome: &Outcome) -> bool {
    matches!(&outcome.status, Err(error) if error.kind() == ErrorKind::OutOfDeviceMemory)
}

impl Saver {
    /// Resumes a selection. If device memory is short, waits as the options say; then everything
    /// stays paused and the call can be repeated. An allocation whose contents cannot be loaded
    /// stays paused and is listed.
    pub fn resume(&self, options: &ResumeOptions) -> Outcome {
        let control = Arc::default();
        let mut patience = Patience::new(options.wait);
        loop {
            // Between attempts nothing is held, so that a pause that would free memory can run.
            let outcome = self.resume_once(options, &control);
            if !short_of_memory(&outcome) {
                return outcome;
            }
            match patience.next() {
                Some(nap) => std::thread::sleep(nap),
                None => return outcome,
            }
        }
    }

    /// [`Self::resume`] on a thread of the library.
    pub fn resume_async(&self, options: &ResumeOptions) -> Result<Op> {
        let (saver, options) = (self.clone(), options.clone());
        let mut patience = Patience::new(options.wait);
        self.inner.service.submit(move |control| {
            let outcome = saver.resume_once(&options, control);
            if short_of_memory(&outcome)
                && let Some(nap) = patience.next()
            {
                std::thread::sleep(nap);
                return None;
            }
            Some(outcome)
        })
    }

    fn resume_once(&self, options: &ResumeOptions, control: &Arc<Control>) -> Outcome {
        let _running = match process::Running::start() {
            Ok(running) => running,
            Err(error) => return Outcome::failed(error),
        };
        let _turn = lock(&self.inner.turn);
        self.inner.engine.drain_quarantine();
        self.drain_residues(|_| true);
        let (items, unchanged_count) = self.select_paused(options);
        let mut outcome = self.put_back(items, |items| self.load_all(items, control));
        outcome.summary.unchanged_count = unchanged_count;
        outcome
            .summary
            .warn_if_empty("resume", options.tags.as_deref());
        outcome
    }

    /// Backs a selection, has its contents loaded, and writes the end into the table.
    pub(super) fn put_back(&self, mut items: Vec<Item>, load: impl FnOnce(&mut [Item])) -> Outcome {
        match self.back_all(&items) {
            Ok(()) => {
                load(&mut items);
                let outcome = self.finish(items);
                // What the backups took of the host is free again when this returns.
                self.inner.engine.workers().wait_for_disposal();
                outcome
            }
            Err(error) => {
                for item in items {
                    self.stay_paused(item.address);
                }
                Outcome::failed(error.context("resume"))
            }
        }
    }

    fn select_paused(&self, options: &ResumeOptions) -> (Vec<Item>, u64) {
        let mut held = self.held();
        let all = |_: u64, _: &_| Ok::<bool, std::convert::Infallible>(true);
        let Ok(selection) =
            held.table
                .select(options.tags.as_deref(), State::Paused, State::Resuming, all);
        let mut items = Vec::with_capacity(selection.addresses.len());
        for address in selection.addresses {
            let Some(record) = held.table.get_mut(address) else {
                continue;
            };
            items.push(Item::new(address, record));
        }
        (items, selection.unchanged)
    }

    /// Loads backend by backend, all devices of one at once.
    fn load_all(&self, items: &mut [Item], control: &Arc<Control>) {
        let backed = |item: &Item| item.allocation.stored.is_some();
        let total = items
            .iter()
            .filter(|item| backed(item))
            .map(|item| item.bytes)
            .sum();
        control.expect(total);
        for name in backup::NAMES {
            let mut chosen = Vec::new();
            let mut loads = Vec::new();
            let mut backend = None;
            for (index, item) in items.iter().enumerate() {
                let Some(stored) = &item.allocation.stored else {
                    continue;
                };
                if stored.backend.name() == name {
                    chosen.push(index);
                    backend = Some(Arc::clone(&stored.backend));
                    loads.push(LoadItem {
                        span: item.span(),
                        ticket: Arc::clone(&stored.ticket),
                    });
                }
            }
            let Some(backend) = backend else { continue };
            let results = backend.load(&self.inner.engine, &loads, control, &Unobserved);
            for (index, result) in chosen.into_iter().zip(results) {
                items[index].result = result;
            }
        }
    }

    /// Makes active what is complete; takes the memory of the rest away again.
    fn finish(&self, items: Vec<Item>) -> Outcome {
        let mut summary = Summary::default();
        for mut item in items {
            match std::mem::replace(&mut item.result, Ok(())) {
                Ok(()) => {
                    summary.done_count += 1;
                    summary.done_bytes += item.bytes;
                    if item.allocation.stored.is_some() {
                        summary.copied_bytes += item.bytes;
                    }
                    self.become_active(item);
                }
                Err(error) => {
                    summary.failures.push(Failure {
                        address: item.address,
                        bytes: item.bytes,
                        error: error.context(format_args!(
                            "allocation {:#x} (tag \"{}\") stays paused",
                            item.address,
                            item.allocation.region.tag()
                        )),
                    });
                    self.take_memory_away(&item);
                    self.stay_paused(item.address);
                }
            }
        }
        Outcome::from_summary("resume", summary)
    }

    fn become_active(&self, item: Item) {
        let mut held = self.held();
        let mut unneeded = None;
        if let Some(record) = held.table.get_mut(item.address) {
            let payload = &mut record.payload;
            let retain = payload.region.retain.unwrap_or_else(region::retain);
            match &mut payload.stored {
                Some(stored) if retain && stored.ticket.is_in_host_memory() => {}
                Some(stored) if stored.backend.reuses_place() => stored.complete = false,
                _ => unneeded = payload.stored.take(),
            }
        }
        let address = item.address;
        let freed = held.finish(address, State::Active);
        drop(held);
        // The item has a reference of its own, which would keep the backup alive.
        drop(item);
        if let Some(unneeded) = unneeded {
            Stored::discard(unneeded, Discard::Resumed);
        }
        if let Some(record) = freed {
            self.give_back(address, record, None);
        }
    }

    /// Takes away the memory of an allocation that could not be loaded, unless its neighbours need
    /// the handle: then it stays for the next attempt.
    fn take_memory_away(&self, item: &Item) {
        let taken = {
            let mut held = self.held();
            let record = held.table.get_mut(item.address);
            record.and_then(|record| match record.payload.backing {
                Some(Backing::Own(physical)) => {
                    record.payload.backing = None;
                    Some(physical)
                }
                _ => None,
            })
        };
        if let Some(physical) = taken {
            let device = Arc::clone(&item.allocation.device);
            let mut residue = Residue::of(device, item.address, item.bytes).with_memory(physical);
            // A copy that failed may have left others of it on their way, and a peer may wait for it.
            residue.unsettled = true;
            residue.peers = Self::peers_in_use(
                self.platform(),
                &item.allocation.device,
                &item.allocation.region,
            );
            self.clear_or_keep(residue);
        }
    }

    fn stay_paused(&self, address: Address) {
        let (freed, span) = {
            let mut held = self.held();
            let backing = held
                .table
                .get_mut(address)
                .map(|record| record.payload.backing);
            let span = match backing.flatten() {
                Some(Backing::Shared(id)) => Some(id),
                _ => None,
            };
            (held.finish(address, State::Paused), span)
        };
        if let Some(record) = freed {
            self.give_back(address, record, None);
        }
        if let Some(id) = span {
            self.dissolve_if_empty(id);
        }
    }
}
