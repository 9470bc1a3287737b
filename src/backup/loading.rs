//! Loading backups from pinned memory: every copy is queued at once, with marks in between, so that
//! the first items are known to be complete while the rest arrives.

use std::sync::Arc;

use super::pinned::{PinnedTicket, blocks_of};
use super::{LoadItem, LoadObserver, own};
use crate::device::{Device, Direction};
use crate::error::Result;
use crate::transfer::{Control, Engine, SharedEvent, Streams, devices_of};

/// Items are known to be complete after so many bytes of their device, or at their end if that is
/// later.
const MARK_AFTER: u64 = 64 << 20;

/// Items of one device that were queued since its last mark.
struct Unmarked {
    streams: Arc<Streams>,
    items: Vec<usize>,
    bytes: u64,
}

/// One load on its way.
pub(super) struct Loading<'a> {
    engine: &'a Engine,
    items: &'a [LoadItem],
    control: &'a Control,
    observer: &'a dyn LoadObserver,
    /// The ends that are known.
    results: Vec<Option<Result<()>>>,
    unmarked: Vec<Unmarked>,
    /// Marks in the order they were queued, and what is complete with each.
    marks: Vec<(Arc<SharedEvent>, Vec<usize>)>,
}

impl<'a> Loading<'a> {
    pub fn new(
        engine: &'a Engine,
        items: &'a [LoadItem],
        control: &'a Control,
        observer: &'a dyn LoadObserver,
    ) -> Loading<'a> {
        Loading {
            engine,
            items,
            control,
            observer,
            results: vec![None; items.len()],
            unmarked: Vec::new(),
            marks: Vec::new(),
        }
    }

    /// Queues one item, and a mark after it if one is due.
    pub fn queue(&mut self, index: usize) {
        match self.try_queue(index) {
            Ok(place) if self.unmarked[place].bytes >= MARK_AFTER => self.mark(place),
            Ok(_) => {}
            Err(error) => self.end(index, Err(error)),
        }
    }

    /// The place in `unmarked` of the item's device.
    fn try_queue(&mut self, index: usize) -> Result<usize> {
        let LoadItem { span, ticket } = &self.items[index];
        let streams = self.engine.streams(&span.device)?;
        own::<PinnedTicket>(ticket)?.copy_back(&streams, span, self.control)?;
        let found = self
            .unmarked
            .iter()
            .position(|unmarked| Arc::ptr_eq(&unmarked.streams, &streams));
        let place = found.unwrap_or_else(|| {
            self.unmarked.push(Unmarked {
                streams,
                items: Vec::new(),
                bytes: 0,
            });
            self.unmarked.len() - 1
        });
        let unmarked = &mut self.unmarked[place];
        unmarked.items.push(index);
        unmarked.bytes += span.bytes;
        Ok(place)
    }

    fn mark(&mut self, place: usize) {
        let unmarked = &mut self.unmarked[place];
        if unmarked.items.is_empty() {
            return;
        }
        match unmarked.streams.mark(Direction::ToDevice) {
            Ok(event) => {
                let event = Arc::new(event);
                unmarked.bytes = 0;
                let items = std::mem::take(&mut unmarked.items);
                for &index in &items {
                    self.observer.queued(index, &event);
                }
                self.marks.push((event, items));
            }
            // The next mark, or the end of the stream, tells of them too.
            Err(error) => tracing::debug!("a copy is not marked: {error}"),
        }
    }

    fn end(&mut self, index: usize, result: Result<()>) {
        if result.is_ok() {
            self.control.advance(self.items[index].span.bytes);
        }
        self.observer.done(index, &result);
        self.results[index] = Some(result);
    }

    /// Waits for everything that was queued.
    pub fn finish(mut self) -> Vec<Result<()>> {
        for place in 0..self.unmarked.len() {
            self.mark(place);
        }
        for (event, items) in std::mem::take(&mut self.marks) {
            if event.device().event_synchronize(event.event()).is_err() {
                // What it means is asked of the streams.
                break;
            }
            for index in items {
                self.end(index, Ok(()));
            }
        }
        for device in devices_of(self.items.iter().map(|item| &item.span)) {
            self.settle(&device);
        }
        // Every item is of one of the devices.
        self.results
            .into_iter()
            .map(|result| result.unwrap_or(Ok(())))
            .collect()
    }

    /// Waits for the stream of a device and ends the items that are left.
    fn settle(&mut self, device: &Arc<dyn Device>) {
        let ordinal = device.info().ordinal;
        let blocks = || blocks_of(self.items.iter().map(|item| &item.ticket));
        let settled = self
            .engine
            .settle(std::slice::from_ref(device), Direction::ToDevice, blocks);
        for index in 0..self.items.len() {
            if self.results[index].is_none()
                && self.items[index].span.device.info().ordinal == ordinal
            {
                // Which copy of the device failed is not known, so none of these counts.
                self.end(index, settled.clone());
            }
        }
    }
}
