//! What a saver knows, under its one lock of the state. Every step that must be seen as one by
//! malloc, free, pause and resume is a function here; none calls a device.

use std::collections::{BTreeMap, BTreeSet};

use super::addresses::Class;
use super::residue::Residue;
use super::spans::{Span, SpanId, Spans};
use super::table::{Freed, Record, State, Table};
use super::{Allocation, Backing};
use crate::device::Address;

#[derive(Default)]
pub(super) struct Held {
    pub table: Table<Allocation>,
    pub spans: Spans,
    /// Device memory and addresses whose release failed or had to be put off.
    pub residues: Vec<Residue>,
    /// Allocations of a running ordered resume whose contents are complete.
    pub ready: BTreeSet<Address>,
    pub margins: BTreeMap<u32, u64>,
    pub margin_of_all: u64,
}

impl Held {
    /// The state of an allocation as its host sees it.
    pub fn state_of(&self, base: Address, record: &Record<Allocation>) -> State {
        match record.state {
            State::Resuming if self.ready.contains(&base) => State::Active,
            state => state,
        }
    }

    /// See [`Table::free`].
    pub fn free(&mut self, address: Address) -> Freed<Allocation> {
        let freed = self.table.free(address);
        if let Freed::Removed(record) = &freed {
            self.note_removed(record);
        }
        freed
    }

    /// See [`Table::finish`].
    pub fn finish(&mut self, address: Address, state: State) -> Option<Record<Allocation>> {
        let removed = self.table.finish(address, state);
        if let Some(record) = &removed {
            self.note_removed(record);
        }
        removed
    }

    /// A device may still work on the range of a freed allocation, so its span must stay.
    fn note_removed(&mut self, record: &Record<Allocation>) {
        if let Some(Backing::Shared(id)) = record.payload.backing
            && let Some(span) = self.spans.get_mut(id)
        {
            span.unsettled += 1;
        }
    }

    /// Takes a hole of a class out, to be cleared by the caller; [`Self::fill_hole`] or
    /// [`Self::give_up_hole`] must follow. No pause begins before.
    pub fn take_hole(&mut self, class: &Class, bytes: u64) -> Option<(SpanId, Address)> {
        let (id, address) = self.spans.take_hole(class, bytes)?;
        if let Some(span) = self.spans.get_mut(id) {
            span.clearing += 1;
        }
        Some((id, address))
    }

    /// Puts a new allocation into a hole.
    pub fn fill_hole(&mut self, id: SpanId, address: Address, record: Record<Allocation>) {
        self.end_clearing(id);
        self.table.insert(address, record);
    }

    /// A hole that could not be cleared is not used again.
    pub fn give_up_hole(&mut self, id: SpanId, address: Address, bytes: u64) {
        self.end_clearing(id);
        if let Some(span) = self.spans.get_mut(id) {
            span.unusable.push((address, bytes));
        }
    }

    fn end_clearing(&mut self, id: SpanId) {
        if let Some(span) = self.spans.get_mut(id) {
            span.clearing -= 1;
        }
    }

    /// The range of a freed allocation stays with its span; false if that is gone.
    pub fn add_hole(&mut self, id: SpanId, address: Address, bytes: u64) -> bool {
        let Some(span) = self.spans.get_mut(id) else {
            return false;
        };
        span.unsettled -= 1;
        span.add_hole(address, bytes);
        true
    }

    /// Whether nothing needs a span any more.
    fn is_empty(&self, id: SpanId) -> bool {
        self.spans.get(id).is_some_and(|span| {
            !span.leaving
                && span.unsettled == 0
                && span.clearing == 0
                && !self.table.range(span.base, span.bytes).any(|record| {
                    record.payload.backing == Some(Backing::Shared(id))
                        && record.state != State::Paused
                })
        })
    }

    /// Takes a span out that no allocation needs any more, unless a pause is at it.
    pub fn take_empty_span(&mut self, id: SpanId) -> Option<Span> {
        if !self.is_empty(id) {
            return None;
        }
        self.take_span(id)
    }

    /// Takes a span out, and with it the memory of paused allocations that are part of it.
    pub fn take_span(&mut self, id: SpanId) -> Option<Span> {
        let span = self.spans.remove(id)?;
        for record in self.table.range_mut(span.base, span.bytes) {
            if record.payload.backing == Some(Backing::Shared(id)) {
                record.payload.backing = None;
            }
        }
        Some(span)
    }

    /// Bytes of spans that no allocation has.
    pub fn held_bytes(&self, tag: &str, device: u32) -> u64 {
        self.spans
            .iter()
            .filter(|span| span.class.0 == device && span.class.1.tag() == tag)
            .map(Span::held_bytes)
            .sum()
    }
}
