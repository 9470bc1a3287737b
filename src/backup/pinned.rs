//! Backups in pinned host memory: asynchronous copies each way, at the speed of the bus. What is in
//! the backup already is not copied again, see [`unchanged`].

use std::collections::VecDeque;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::copies::Copies;
use super::loading::Loading;
use super::unchanged::{self, Check, Known, Part};
use super::{BackupBackend, Discard, LoadItem, LoadObserver, StoreItem, Ticket, own};
use crate::device::Direction;
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::transfer::{Block, Control, Engine, Span, Streams, devices_of};

pub struct PinnedBackend;

pub(super) struct PinnedTicket {
    /// Taken out when the ticket is discarded, so that a late reader cannot keep it pinned.
    /// Shared with whoever must keep it until the device is done with it.
    block: Mutex<Option<Arc<Block>>>,
    pointer: NonNull<u8>,
    bytes: u64,
    known: Known,
    /// The host may write to the backup whenever it likes.
    handed_out: AtomicBool,
}

// SAFETY: the pointer is only handed out; the block it points into belongs to the ticket.
unsafe impl Send for PinnedTicket {}
// SAFETY: as above; the block is behind a mutex.
unsafe impl Sync for PinnedTicket {}

impl Ticket for PinnedTicket {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn is_in_host_memory(&self) -> bool {
        true
    }

    fn read_pointer(&self) -> Option<NonNull<u8>> {
        self.handed_out.store(true, Ordering::Release);
        Some(self.pointer)
    }
}

impl PinnedTicket {
    fn new(block: Block, bytes: u64) -> PinnedTicket {
        PinnedTicket {
            pointer: block.pointer(),
            block: Mutex::new(Some(Arc::new(block))),
            bytes,
            known: Known::nothing_of(bytes),
            handed_out: AtomicBool::new(false),
        }
    }

    fn block(&self) -> std::sync::MutexGuard<'_, Option<Arc<Block>>> {
        self.block.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The memory of the backup, until it is discarded.
    fn memory(&self) -> Result<Arc<Block>> {
        let block = self.block().clone();
        block.ok_or_else(|| Error::new(ErrorKind::Internal, "the backup was discarded"))
    }

    /// Queues the copy of one span back to its device.
    pub fn copy_back(&self, streams: &Streams, span: &Span, control: &Control) -> Result<()> {
        let block = self.memory()?;
        control.check()?;
        block.wait()?;
        let (stream, host) = (
            streams.of(Direction::ToDevice),
            block.pointer().as_ptr() as u64,
        );
        // SAFETY: the block is as long as the span, and is kept until the stream was settled.
        unsafe {
            span.device
                .copy(span.address, host, span.bytes, Direction::ToDevice, stream)
        }
    }
}

/// The memory of some tickets, to be kept even if the tickets are discarded.
pub(super) fn blocks_of<'a>(
    tickets: impl IntoIterator<Item = &'a Arc<dyn Ticket>>,
) -> Vec<Arc<Block>> {
    tickets
        .into_iter()
        .filter_map(|ticket| own::<PinnedTicket>(ticket).ok()?.block().clone())
        .collect()
}

impl BackupBackend for PinnedBackend {
    fn name(&self) -> &'static str {
        "pinned"
    }

    fn store(
        &self,
        engine: &Engine,
        items: &[StoreItem],
        control: &Arc<Control>,
    ) -> Result<Vec<Arc<dyn Ticket>>> {
        let Some(first) = items.first() else {
            return Ok(Vec::new());
        };
        let order = by_turns(items);
        let mut checked = Vec::new();
        for &index in &order {
            let item = &items[index];
            let handed_out = match &item.previous {
                Some(previous) => own::<PinnedTicket>(previous)?
                    .handed_out
                    .load(Ordering::Acquire),
                None => false,
            };
            if unchanged::is_possible(item) && !handed_out {
                checked.push(index);
            }
        }
        // Before the backups, whose memory may take long to populate.
        let mut scratch = unchanged::memory_for(engine, items, &checked);
        // In the order in which they are copied: new memory becomes ready little by little.
        let fresh: Vec<usize> = order
            .iter()
            .copied()
            .filter(|&index| items[index].previous.is_none())
            .collect();
        let sizes: Vec<u64> = fresh.iter().map(|&index| items[index].span.bytes).collect();
        let allocate = || engine.arena().allocate(&first.span.device, &sizes);
        let blocks = match (allocate(), scratch.take()) {
            (Err(error), Some(memory)) if error.kind() == ErrorKind::OutOfHostMemory => {
                unchanged::off(&error);
                memory.release_now();
                allocate()
            }
            (blocks, memory) => {
                scratch = memory;
                blocks
            }
        };
        let blocks = blocks.context(|| "pinned backup")?;
        let mut places: Vec<Option<Arc<dyn Ticket>>> =
            items.iter().map(|item| item.previous.clone()).collect();
        for (index, block) in fresh.into_iter().zip(blocks) {
            places[index] = Some(Arc::new(PinnedTicket::new(block, items[index].span.bytes)));
        }
        let tickets: Vec<Arc<dyn Ticket>> = places.into_iter().flatten().collect();
        if tickets.len() != items.len() {
            return Err(Error::new(ErrorKind::Internal, "too few blocks"));
        }
        let check = scratch.map(|memory| Check::new(memory, items, &checked));
        let unchanged = Storing {
            engine,
            items,
            order,
            tickets: tickets.iter().map(own).collect::<Result<_>>()?,
            copies: Copies::new(control),
        }
        .run(check)?;
        control.unchanged.fetch_add(unchanged, Ordering::Relaxed);
        for item in items {
            control.advance(item.span.bytes);
        }
        Ok(tickets)
    }

    fn load(
        &self,
        engine: &Engine,
        items: &[LoadItem],
        control: &Arc<Control>,
        observer: &dyn LoadObserver,
    ) -> Vec<Result<()>> {
        let mut loading = Loading::new(engine, items, control, observer);
        for index in 0..items.len() {
            loading.queue(index);
        }
        loading.finish()
    }

    fn discard(&self, ticket: Arc<dyn Ticket>, why: Discard) {
        let Ok(ticket) = own::<PinnedTicket>(&ticket) else {
            return;
        };
        let block = ticket.block().take();
        match block.and_then(Arc::into_inner) {
            Some(block) if why == Discard::Freed => block.release_now(),
            block => drop(block),
        }
    }
}

/// The items in an order in which every device has its share at any time.
fn by_turns(items: &[StoreItem]) -> Vec<usize> {
    let ordinal = |index: usize| items[index].span.device.info().ordinal;
    let mut queues: Vec<(u64, VecDeque<usize>)> = Vec::new();
    for index in 0..items.len() {
        match queues.iter_mut().find(|(_, queue)| {
            queue
                .front()
                .is_some_and(|&first| ordinal(first) == ordinal(index))
        }) {
            Some((_, queue)) => queue.push_back(index),
            None => queues.push((0, VecDeque::from([index]))),
        }
    }
    let mut order = Vec::with_capacity(items.len());
    while let Some((given, queue)) = queues
        .iter_mut()
        .filter(|(_, queue)| !queue.is_empty())
        .min_by_key(|(given, _)| *given)
    {
        let next = queue.pop_front();
        *given += next.map_or(0, |index| items[index].span.bytes);
        order.extend(next);
    }
    order
}

/// One store on its way.
struct Storing<'a> {
    engine: &'a Engine,
    items: &'a [StoreItem],
    order: Vec<usize>,
    tickets: Vec<&'a PinnedTicket>,
    copies: Copies,
}

impl Storing<'_> {
    /// Copies what has to be copied and returns how many bytes had not.
    fn run(&self, check: Option<Check>) -> Result<u64> {
        let mut check = match check {
            Some(check) => self.start(check)?,
            None => None,
        };
        let checks = |index| check.as_ref().is_some_and(|check| check.has(index));
        let whole: Vec<usize> = self
            .order
            .iter()
            .copied()
            .filter(|&index| !checks(index))
            .collect();
        let mut unchanged = 0;
        let queued = self
            .copy_whole(&whole)
            .and_then(|()| self.copy_changed(check.as_mut(), &mut unchanged));
        // Copies into memory that is still being pinned are queued by those who pin it.
        let queued = queued.and(self.copies.wait());
        let devices = devices_of(self.items.iter().map(|item| &item.span));
        let blocks = || {
            self.tickets
                .iter()
                .filter_map(|ticket| ticket.block().clone())
        };
        let settled = self
            .engine
            .settle(&devices, Direction::ToHost, || blocks().collect::<Vec<_>>());
        let checked = check
            .as_ref()
            .map_or(Ok(()), |check| check.settle(self.engine));
        let result = queued.and(settled).and(checked);
        if let Some(check) = check {
            if result.is_ok() {
                // SAFETY: the streams of copies and of fingerprints were settled without an error.
                unsafe { check.publish(&self.known()) };
            }
            check.end(self.engine);
        }
        result.map(|()| unchanged)
    }

    /// Has the fingerprints taken; without them everything is copied.
    fn start(&self, mut check: Check) -> Result<Option<Check>> {
        // SAFETY: the spans are mapped until the store has ended, and it settles the check before.
        let started = unsafe { check.start(self.engine, self.items) };
        let Err(error) = started else {
            return Ok(Some(check));
        };
        unchanged::off(&error);
        check.settle(self.engine)?;
        check.end(self.engine);
        Ok(None)
    }

    fn known(&self) -> Vec<&Known> {
        self.tickets.iter().map(|ticket| &ticket.known).collect()
    }

    fn copy_whole(&self, items: &[usize]) -> Result<()> {
        for &item in items {
            self.tickets[item].known.forget();
            let bytes = self.items[item].span.bytes;
            self.copy(Part {
                item,
                offset: 0,
                bytes,
            })?;
        }
        Ok(())
    }

    fn copy_changed(&self, check: Option<&mut Check>, unchanged: &mut u64) -> Result<()> {
        let Some(check) = check else {
            return Ok(());
        };
        let known = self.known();
        while let Some(parts) = check.next(self.engine, self.items, &known, unchanged)? {
            for part in parts {
                self.copy(part)?;
            }
        }
        Ok(())
    }

    /// Queues a copy as soon as its host memory is ready.
    fn copy(&self, part: Part) -> Result<()> {
        let span = &self.items[part.item].span;
        let streams = self.engine.streams(&span.device)?;
        let block = self.tickets[part.item].memory()?;
        let host = block.pointer().as_ptr() as u64 + part.offset;
        let (address, bytes) = (span.address + part.offset, part.bytes);
        self.copies.queue(&block, move || {
            let stream = streams.of(Direction::ToHost);
            // SAFETY: the block is as long as the span; both are kept until the stream was settled,
            // which happens after the last of these was done.
            unsafe {
                let direction = Direction::ToHost;
                streams.device.copy(host, address, bytes, direction, stream)
            }
        })
    }
}
