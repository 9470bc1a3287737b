//! The end of a pause: unmap and release everything, as one batch. From here on it only goes
//! forward.

use std::sync::Arc;

use super::pause::Item;
use super::spans::SpanId;
use super::table::State;
use super::{Backing, Failure, Outcome, Residue, Saver, Stored, Summary};
use crate::backup::Discard;
use crate::device::{Address, Device};
use crate::error::{Error, ErrorKind, Result};
use crate::transfer::{Span as Bytes, devices_of};

/// Other processes take and give memory too, so a smaller shortfall says nothing.
const SHORTFALL_NOISE: u64 = 32 << 20;

/// One physical handle and the allocations whose memory it is.
struct Unit {
    items: Vec<Item>,
    span: Option<SpanId>,
    /// Where its allocations end: paused once it is unmapped.
    state: State,
    /// Its physical memory.
    residue: Residue,
}

impl Unit {
    fn is_on(&self, device: &dyn Device) -> bool {
        self.residue.device.info().ordinal == device.info().ordinal
    }

    fn end(&self) -> Address {
        self.residue.address + self.residue.bytes
    }

    fn unmapped(&mut self, result: &Result<()>, summary: &mut Summary) {
        match result {
            Ok(()) => {
                self.state = State::Paused;
                self.residue.mapped = false;
            }
            Err(_) => self.state = State::Active,
        }
        for item in &self.items {
            if item.stored.is_some() {
                summary.copied_bytes += item.bytes;
            }
            match result {
                Ok(()) => {
                    summary.done_count += 1;
                    summary.done_bytes += item.bytes;
                }
                Err(error) => summary.failures.push(Failure {
                    address: item.address,
                    bytes: item.bytes,
                    error: error.clone().context("stays active"),
                }),
            }
        }
    }
}

impl Saver {
    /// Takes the memory of secured allocations away. What cannot be unmapped stays active and is
    /// listed.
    pub(super) fn commit(&self, items: Vec<Item>) -> Outcome {
        let bytes: Vec<Bytes> = items.iter().map(Item::span).collect();
        let devices = devices_of(&bytes);
        let before = free_bytes(&devices);
        let mut summary = Summary::default();
        let mut units = self.units_of(items);
        for device in &devices {
            device.together(&mut || {
                for run in self.runs_on(&mut units, &**device) {
                    unmap(run, &**device, &mut summary);
                }
            });
        }
        self.take_spans(&mut units);
        let mut released = 0;
        for device in &devices {
            device.together(&mut || {
                for unit in units.iter_mut().filter(|unit| unit.is_on(&**device)) {
                    released += self.release(unit, &mut summary);
                }
            });
        }
        summary.shortfall_bytes = shortfall(&before, &free_bytes(&devices), released);
        for unit in units {
            self.settle_paused(unit);
        }
        Outcome::from_summary("pause", summary)
    }

    /// The handles behind some allocations, which come in the order of their addresses.
    fn units_of(&self, items: Vec<Item>) -> Vec<Unit> {
        let held = self.held();
        let mut units: Vec<Unit> = Vec::with_capacity(items.len());
        for item in items {
            let device = Arc::clone(&item.allocation.device);
            let (span, residue) = match item.allocation.backing {
                Some(Backing::Shared(id)) => {
                    if let Some(unit) = units.last_mut()
                        && unit.span == Some(id)
                    {
                        unit.items.push(item);
                        continue;
                    }
                    match held.spans.get(id) {
                        Some(span) => {
                            let whole = Residue::of(device, span.base, span.bytes);
                            (Some(id), whole.with_memory(span.physical))
                        }
                        // Without its memory known, it can only be refused.
                        None => (None, Residue::of(device, item.address, item.bytes)),
                    }
                }
                Some(Backing::Own(physical)) => {
                    let own = Residue::of(device, item.address, item.bytes);
                    (None, own.with_memory(physical))
                }
                None => (None, Residue::of(device, item.address, item.bytes)),
            };
            units.push(Unit {
                items: vec![item],
                span,
                state: State::Active,
                residue,
            });
        }
        units
    }

    /// The units of a device in runs of neighbours, which one call can unmap.
    fn runs_on<'a>(&self, units: &'a mut [Unit], device: &dyn Device) -> Vec<&'a mut [Unit]> {
        units
            .chunk_by_mut(|one, next| {
                one.end() == next.residue.address
                    && one.is_on(device)
                    && next.is_on(device)
                    && self
                        .inner
                        .addresses
                        .together(one.residue.address, next.residue.address)
            })
            .filter(|run| run.first().is_some_and(|unit| unit.is_on(device)))
            .collect()
    }

    /// Spans that are unmapped are gone; those that are not go on.
    fn take_spans(&self, units: &mut [Unit]) {
        let mut held = self.held();
        for unit in units {
            let Some(id) = unit.span else { continue };
            if unit.state != State::Paused {
                if let Some(span) = held.spans.get_mut(id) {
                    span.leaving = false;
                }
            } else if let Some(span) = held.take_span(id) {
                unit.residue.addresses.extend(span.unowned());
            }
        }
    }

    /// Bytes that were released.
    fn release(&self, unit: &mut Unit, summary: &mut Summary) -> u64 {
        if unit.state != State::Paused {
            return 0;
        }
        if unit.residue.clear(&self.inner.addresses) {
            return unit.residue.bytes;
        }
        let error = Error::new(
            ErrorKind::Device,
            "paused, but its memory could not be released yet; the next call tries again",
        );
        summary
            .failures
            .extend(unit.items.iter().map(|item| Failure {
                address: item.address,
                bytes: item.bytes,
                error: error.clone(),
            }));
        0
    }

    /// Writes the end of a pause into the table.
    fn settle_paused(&self, unit: Unit) {
        let state = unit.state;
        if state == State::Paused && unit.residue.physical.is_some() {
            self.held().residues.push(unit.residue);
        }
        for item in unit.items {
            self.settle_item(item, state);
        }
        if let Some(id) = unit.span
            && state == State::Active
        {
            self.dissolve_if_empty(id);
        }
    }

    fn settle_item(&self, item: Item, state: State) {
        let mut held = self.held();
        let mut outdated = None;
        if let Some(record) = held.table.get_mut(item.address) {
            let payload = &mut record.payload;
            if state == State::Paused {
                payload.backing = None;
            }
            outdated = match &item.stored {
                Some(new) if new.is_place_of(payload) => None,
                _ => payload.stored.take(),
            };
            // Without a backup the contents are gone, and with them every older copy.
            payload.stored = item.stored;
        }
        let freed = held.finish(item.address, state);
        drop(held);
        if let Some(outdated) = outdated {
            Stored::discard(outdated, Discard::Freed);
        }
        if let Some(record) = freed {
            self.give_back(item.address, record, None);
        }
    }

    /// Gives a span back whose last allocation was freed while an operation was at it.
    pub(super) fn dissolve_if_empty(&self, id: SpanId) {
        let empty = self.held().take_empty_span(id);
        if let Some(span) = empty {
            self.clear_or_keep(Self::residue_of(self.platform(), span));
        }
    }
}

/// Unmaps neighbours by one call, and one by one if that is refused.
fn unmap(run: &mut [Unit], device: &dyn Device, summary: &mut Summary) {
    let Some(first) = run.first() else { return };
    let start = first.residue.address;
    let bytes = run.iter().map(|unit| unit.residue.bytes).sum();
    let whole = device.unmap(start, bytes);
    if whole.is_ok() || run.len() == 1 {
        for unit in run {
            unit.unmapped(&whole, summary);
        }
        return;
    }
    for unit in run {
        let result = device.unmap(unit.residue.address, unit.residue.bytes);
        unit.unmapped(&result, summary);
    }
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
