//! What a saver knows, under its one lock of the state. Every step that must be seen as one by
//! malloc, free, pause and resume is a function here; none calls a device.

use std::collections::BTreeMap;

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
    pub margins: BTreeMap<u32, u64>,
    pub margin_of_all: u64,
}

impl Held {
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

    /// Puts a new allocation into a hole of its class.
    pub fn fill_hole(
        &mut self,
        class: &Class,
        bytes: u64,
        record: impl FnOnce(SpanId) -> Record<Allocation>,
    ) -> Option<Address> {
        let (span, address) = self.spans.take_hole(class, bytes)?;
        self.table.insert(address, record(span));
        Some(address)
    }

    /// Whether the range of a freed allocation should be cleared for others; if so,
    /// [`Self::end_clearing`] must follow, and no pause takes the span away before.
    pub fn begin_clearing(&mut self, id: SpanId) -> bool {
        let alone = self.is_empty_but_for(id, 1);
        match self.spans.get_mut(id) {
            Some(span) if !span.leaving && !alone => {
                span.clearing += 1;
                true
            }
            _ => false,
        }
    }

    pub fn end_clearing(&mut self, id: SpanId) {
        if let Some(span) = self.spans.get_mut(id) {
            span.clearing -= 1;
        }
    }

    /// The range of a freed allocation stays with its span; false if that is gone.
    pub fn add_hole(&mut self, id: SpanId, address: Address, bytes: u64, cleared: bool) -> bool {
        let Some(span) = self.spans.get_mut(id) else {
            return false;
        };
        span.unsettled -= 1;
        if cleared {
            span.add_hole(address, bytes);
        } else {
            span.unusable.push((address, bytes));
        }
        true
    }

    /// Whether a span has no allocation that needs it, and only so many freed ones.
    fn is_empty_but_for(&self, id: SpanId, unsettled: u32) -> bool {
        self.spans.get(id).is_some_and(|span| {
            span.unsettled == unsettled
                && !self.table.range(span.base, span.bytes).any(|record| {
                    record.payload.backing == Some(Backing::Shared(id))
                        && record.state != State::Paused
                })
        })
    }

    /// Takes a span out that no allocation needs any more, unless a pause is at it.
    pub fn take_empty_span(&mut self, id: SpanId) -> Option<Span> {
        let leaving = self.spans.get(id).is_none_or(|span| span.leaving);
        if leaving || !self.is_empty_but_for(id, 0) {
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
