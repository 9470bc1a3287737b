//! Backups in pinned host memory: one asynchronous copy each way, at the speed of the bus.

use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

use super::{BackupBackend, Discard, LoadItem, StoreItem, Ticket, own};
use crate::device::Direction;
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::transfer::{Block, Control, Engine, devices_of};

pub struct PinnedBackend;

struct PinnedTicket {
    /// Taken out when the ticket is discarded, so that a late reader cannot keep it pinned.
    /// Shared with whoever must keep it until the device is done with it.
    block: Mutex<Option<Arc<Block>>>,
    pointer: NonNull<u8>,
    bytes: u64,
}

// SAFETY: the pointer is only handed out; the block it points into belongs to the ticket.
unsafe impl Send for PinnedTicket {}
// SAFETY: as above; the block is behind a mutex.
unsafe impl Sync for PinnedTicket {}

impl Ticket for PinnedTicket {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn read_pointer(&self) -> Option<NonNull<u8>> {
        Some(self.pointer)
    }
}

impl PinnedTicket {
    fn block(&self) -> std::sync::MutexGuard<'_, Option<Arc<Block>>> {
        self.block.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues the copy of one span, as soon as its host memory is ready.
    fn copy(
        &self,
        engine: &Engine,
        span: &crate::transfer::Span,
        direction: Direction,
        control: &Control,
    ) -> Result<()> {
        let guard = self.block();
        let block = guard
            .as_ref()
            .ok_or_else(|| Error::new(ErrorKind::Internal, "the backup was discarded"))?;
        let stream = engine.streams(&span.device)?.of(direction);
        control.check()?;
        block.wait()?;
        let host = block.pointer().as_ptr() as u64;
        let (destination, source) = match direction {
            Direction::ToHost => (host, span.address),
            Direction::ToDevice | Direction::OnDevice => (span.address, host),
        };
        // SAFETY: the block is as long as the span, and is kept until the stream was settled.
        unsafe {
            span.device
                .copy(destination, source, span.bytes, direction, stream)
        }
    }
}

/// The memory of some tickets, to be kept even if the tickets are discarded.
fn blocks_of<'a>(tickets: impl IntoIterator<Item = &'a Arc<dyn Ticket>>) -> Vec<Arc<Block>> {
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
        let sizes: Vec<u64> = items
            .iter()
            .filter(|item| item.previous.is_none())
            .map(|item| item.span.bytes)
            .collect();
        let mut blocks = engine
            .arena()
            .allocate(&first.span.device, &sizes)
            .context(|| "pinned backup")?
            .into_iter();
        let mut tickets: Vec<Arc<dyn Ticket>> = Vec::with_capacity(items.len());
        for item in items {
            let ticket: Arc<dyn Ticket> = match &item.previous {
                Some(previous) => Arc::clone(previous),
                None => {
                    let block = blocks
                        .next()
                        .ok_or_else(|| Error::new(ErrorKind::Internal, "too few blocks"))?;
                    Arc::new(PinnedTicket {
                        pointer: block.pointer(),
                        block: Mutex::new(Some(Arc::new(block))),
                        bytes: item.span.bytes,
                    })
                }
            };
            tickets.push(ticket);
        }
        let mut queued = Ok(());
        for (item, ticket) in items.iter().zip(&tickets) {
            queued = own::<PinnedTicket>(ticket)
                .and_then(|ticket| ticket.copy(engine, &item.span, Direction::ToHost, control));
            if queued.is_err() {
                break;
            }
        }
        let devices = devices_of(items.iter().map(|item| &item.span));
        let settled = engine.settle(&devices, Direction::ToHost, || blocks_of(&tickets));
        queued.and(settled)?;
        for item in items {
            control.advance(item.span.bytes);
        }
        Ok(tickets)
    }

    fn load(&self, engine: &Engine, items: &[LoadItem], control: &Arc<Control>) -> Vec<Result<()>> {
        let mut results: Vec<Result<()>> = items
            .iter()
            .map(|item| {
                own::<PinnedTicket>(&item.ticket).and_then(|ticket| {
                    ticket.copy(engine, &item.span, Direction::ToDevice, control)
                })
            })
            .collect();
        for device in devices_of(items.iter().map(|item| &item.span)) {
            let blocks = || blocks_of(items.iter().map(|item| &item.ticket));
            let settled = engine.settle(std::slice::from_ref(&device), Direction::ToDevice, blocks);
            let Err(error) = settled else { continue };
            // Which copy of the device failed is not known, so none of them counts.
            let ordinal = device.info().ordinal;
            for (item, result) in items.iter().zip(&mut results) {
                if item.span.device.info().ordinal == ordinal && result.is_ok() {
                    *result = Err(Error::new(error.kind(), error.to_string()));
                }
            }
        }
        for (item, result) in items.iter().zip(&results) {
            if result.is_ok() {
                control.advance(item.span.bytes);
            }
        }
        results
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
