//! Putting memory and contents back: create and map everything first, then copy.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::table::{Record, State};
use super::{
    Allocation, Failure, Op, Outcome, Residue, ResumeOptions, Saver, Stored, Summary, lock, region,
};
use crate::backup::{self, Discard, LoadItem, Unobserved};
use crate::device::{Address, CreateOptions};
use crate::error::{ErrorKind, Result};
use crate::op::Ending;
use crate::process;
use crate::transfer::{Control, Span, devices_of};

/// First and longest pause between two looks at the free memory of a device.
const SHORTEST_NAP: Duration = Duration::from_millis(1);
const LONGEST_NAP: Duration = Duration::from_millis(50);

/// One allocation of a resume.
pub(super) struct Item {
    pub address: Address,
    pub bytes: u64,
    pub allocation: Allocation,
    /// What was created and mapped for it so far.
    residue: Residue,
    pub result: Result<()>,
}

impl Item {
    pub fn new(address: Address, record: &Record<Allocation>) -> Item {
        let device = Arc::clone(&record.payload.device);
        let mut residue = Residue::reserved(device, address, record.bytes);
        residue.unreserve = false;
        Item {
            address,
            bytes: record.bytes,
            allocation: record.payload.clone(),
            residue,
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

    fn create(&mut self, needed: u64) -> Result<()> {
        let region = &self.allocation.region;
        let options = CreateOptions {
            exportable: region.exportable,
        };
        let device = &self.allocation.device;
        let physical = device.create(self.bytes, options).map_err(|error| {
            if error.kind() != ErrorKind::OutOfDeviceMemory {
                return error;
            }
            let free = device.memory().map_or(0, |memory| memory.free);
            error.context(format_args!(
                "tag \"{}\" needs {needed} bytes in all, about {free} are free now ({} bytes short); \
                 release memory or pause something else, then resume again",
                region.tag(),
                self.bytes.saturating_sub(free).max(1),
            ))
        })?;
        self.residue.physical = Some(physical);
        Ok(())
    }

    fn map(&mut self) -> Result<()> {
        let device = &self.allocation.device;
        let Some(physical) = self.residue.physical else {
            return Ok(());
        };
        device.map(self.address, self.bytes, physical)?;
        self.residue.mapped = true;
        let peers = Saver::peers(device, &self.allocation.region);
        device.set_access(self.address, self.bytes, peers)
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
        match self.back_all(&mut items) {
            Ok(()) => {
                load(&mut items);
                self.finish(items)
            }
            Err(error) => {
                for item in items {
                    self.stay_paused(item);
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

    /// Creates everything, then maps everything: a shortage shows before the first mapping.
    fn back_all(&self, items: &mut [Item]) -> Result<()> {
        let needed: u64 = items.iter().map(|item| item.bytes).sum();
        Self::on_each_device(items, |item| item.create(needed))?;
        Self::on_each_device(items, Item::map)
    }

    /// Does a step for every item, device by device, until one fails.
    fn on_each_device(
        items: &mut [Item],
        mut step: impl FnMut(&mut Item) -> Result<()>,
    ) -> Result<()> {
        let spans: Vec<Span> = items.iter().map(Item::span).collect();
        let mut result = Ok(());
        for device in devices_of(&spans) {
            let ordinal = device.info().ordinal;
            device.together(&mut || {
                let theirs = items
                    .iter_mut()
                    .filter(|item| item.allocation.device.info().ordinal == ordinal);
                for item in theirs {
                    if result.is_ok() {
                        result = process::check().and_then(|()| step(item));
                    }
                }
            });
        }
        result
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
                    // A copy that failed may have left others of it on their way.
                    item.residue.unsettled = true;
                    self.stay_paused(item);
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
            payload.physical = item.residue.physical;
            let retain = payload.region.retain.unwrap_or_else(region::retain);
            match &mut payload.stored {
                Some(stored) if retain && stored.ticket.is_in_host_memory() => {}
                Some(stored) if stored.backend.reuses_place() => stored.complete = false,
                _ => unneeded = payload.stored.take(),
            }
        }
        let address = item.address;
        let freed = held.table.finish(address, State::Active);
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

    fn stay_paused(&self, item: Item) {
        let address = item.address;
        self.clear_or_keep(item.residue);
        let freed = self.held().table.finish(address, State::Paused);
        if let Some(record) = freed {
            self.give_back(address, record, None);
        }
    }
}
