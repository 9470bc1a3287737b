//! Backups in ordinary host memory: slower than pinned memory, but the system can swap it out and
//! it is gone from the process as soon as it is resumed.

use std::ptr::NonNull;
use std::sync::Arc;

use super::{BackupBackend, Discard, LoadItem, LoadObserver, StoreItem, Ticket, own};
use crate::error::{Error, ErrorKind, Result};
use crate::transfer::staging::{self, Sink, Source};
use crate::transfer::{Control, Engine, Span, Workers, pages};

pub struct MmapBackend;

/// A private anonymous mapping, unmapped with its last reference.
struct MmapTicket {
    pointer: NonNull<u8>,
    bytes: u64,
    /// Unmap it when nobody waits for that.
    workers: Arc<Workers>,
}

// SAFETY: the mapping belongs to the ticket; nothing about it depends on the thread.
unsafe impl Send for MmapTicket {}
// SAFETY: concurrent writers use disjoint parts, see `Places`.
unsafe impl Sync for MmapTicket {}

impl MmapTicket {
    fn new(engine: &Engine, bytes: u64) -> Result<MmapTicket> {
        let length = usize::try_from(bytes)
            .map_err(|_| Error::invalid("size", "does not fit the address space"))?;
        let base = pages::map(length)?;
        let pointer = NonNull::new(base as *mut u8)
            .ok_or_else(|| Error::new(ErrorKind::Internal, "memory was mapped at 0"))?;
        Ok(MmapTicket {
            pointer,
            bytes,
            workers: Arc::clone(engine.workers()),
        })
    }
}

impl Drop for MmapTicket {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this length; the last reference is going.
        unsafe { pages::unmap(self.pointer.as_ptr() as usize, self.bytes as usize) };
    }
}

impl Ticket for MmapTicket {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn is_in_host_memory(&self) -> bool {
        true
    }

    fn read_pointer(&self) -> Option<NonNull<u8>> {
        Some(self.pointer)
    }
}

/// The mappings of one store or load, by span.
struct Places(Vec<Arc<dyn Ticket>>);

impl Places {
    /// The `length` bytes that begin `offset` bytes into mapping `index`.
    fn place(&self, index: usize, offset: u64, length: usize) -> Result<*mut u8> {
        let ticket = own::<MmapTicket>(&self.0[index])?;
        if offset + length as u64 > ticket.bytes {
            return Err(Error::new(
                ErrorKind::Internal,
                "a piece outside its backup",
            ));
        }
        // SAFETY: checked above to lie inside the mapping.
        Ok(unsafe { ticket.pointer.as_ptr().add(offset as usize) })
    }
}

impl Sink for Places {
    fn prepare(&self, index: usize, offset: u64, length: usize) -> Result<()> {
        let place = self.place(index, offset, length)?;
        // A copy into pages that are not there would do as well, and as fast, but the end of the
        // memory would be a signal instead of an error.
        pages::populate(place as usize, length)
    }

    fn write(&self, index: usize, offset: u64, bytes: &[u8]) -> Result<()> {
        let place = self.place(index, offset, bytes.len())?;
        // SAFETY: in bounds; pieces do not overlap each other or the staging slot.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), place, bytes.len()) };
        Ok(())
    }
}

impl Source for Places {
    fn read(&self, index: usize, offset: u64, bytes: &mut [u8]) -> Result<()> {
        let place = self.place(index, offset, bytes.len())?;
        // SAFETY: in bounds; the mapping and the staging slot do not overlap.
        unsafe { std::ptr::copy_nonoverlapping(place, bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }
}

impl BackupBackend for MmapBackend {
    fn name(&self) -> &'static str {
        "mmap"
    }

    fn store(
        &self,
        engine: &Engine,
        items: &[StoreItem],
        control: &Arc<Control>,
    ) -> Result<Vec<Arc<dyn Ticket>>> {
        let fresh: u64 = items
            .iter()
            .filter(|item| item.previous.is_none())
            .map(|item| item.span.bytes)
            .sum();
        let short = || engine.arena().headroom().filter(|&left| fresh > left);
        // Pinned memory that nobody uses goes before anything is refused.
        if short().is_some()
            && let Some(left) = {
                engine.arena().release_idle();
                short()
            }
        {
            return Err(Error::new(
                ErrorKind::OutOfHostMemory,
                format!("mmap backup of {fresh} bytes: only {left} bytes of host memory are left"),
            ));
        }
        let mut tickets: Vec<Arc<dyn Ticket>> = Vec::with_capacity(items.len());
        for item in items {
            tickets.push(match &item.previous {
                Some(previous) => Arc::clone(previous),
                None => Arc::new(MmapTicket::new(engine, item.span.bytes)?),
            });
        }
        let spans: Vec<Span> = items.iter().map(|item| item.span.clone()).collect();
        let sink: Arc<dyn Sink> = Arc::new(Places(tickets.clone()));
        staging::drain(engine, &spans, &sink, control)?;
        Ok(tickets)
    }

    fn load(
        &self,
        engine: &Engine,
        items: &[LoadItem],
        control: &Arc<Control>,
        observer: &dyn LoadObserver,
    ) -> Vec<Result<()>> {
        let spans: Vec<Span> = items.iter().map(|item| item.span.clone()).collect();
        let places = items.iter().map(|item| Arc::clone(&item.ticket)).collect();
        let source: Arc<dyn Source> = Arc::new(Places(places));
        staging::fill(engine, &spans, &source, control, &|index, result| {
            observer.done(index, result);
        })
    }

    fn discard(&self, ticket: Arc<dyn Ticket>, why: Discard) {
        match own::<MmapTicket>(&ticket) {
            // By several threads; whoever resumed waits for them.
            Ok(own) if why == Discard::Resumed => {
                let workers = Arc::clone(&own.workers);
                workers.dispose(Box::new(ticket));
            }
            _ => drop(ticket),
        }
    }
}
