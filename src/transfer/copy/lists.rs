//! Pinned memory for the lists that copy kernels read. A list must not change before its kernel has
//! run, so it goes out with an event and is used again when that has passed.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::device::{Device, Event, Piece};
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::transfer::{Block, Engine, Streams};

/// Pieces of one list. Long enough that the bus does not notice the gap between two kernels, short
/// enough that the first one starts early.
pub(super) const PIECES: usize = 4096;

const BYTES: usize = PIECES * size_of::<Piece>();

/// Lists that are made at once: as many as fit the least that an arena pins.
const TOGETHER: usize = (2 << 20) / BYTES;

/// Lists of one engine, at most: beyond that, a call waits for an earlier kernel.
const MOST: usize = 16 * TOGETHER;

/// One list, and the memory it is a part of.
pub(super) struct List {
    block: Arc<Block>,
    offset: usize,
}

impl List {
    pub fn pointer(&self) -> *mut Piece {
        // SAFETY: the block holds `TOGETHER` lists and the offset is that of one of them.
        unsafe { self.block.pointer().as_ptr().add(self.offset).cast() }
    }

    /// Sets an entry; `index` is below [`PIECES`].
    pub fn set(&mut self, index: usize, piece: Piece) {
        assert!(index < PIECES);
        // SAFETY: within the list, which nobody else writes and no kernel reads any more; a page
        // holds whole words, so the entry is aligned.
        unsafe { self.pointer().add(index).write(piece) };
    }
}

/// A list that a kernel may still read.
struct Flying {
    list: List,
    streams: Arc<Streams>,
    event: Event,
}

#[derive(Default)]
struct State {
    free: Vec<List>,
    /// In the order of their launches.
    flying: VecDeque<Flying>,
    made: usize,
}

/// The lists of one engine.
#[derive(Default)]
pub(super) struct Lists {
    /// Never held across a device call.
    state: Mutex<State>,
}

impl Lists {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A list for a kernel of `device`.
    pub fn take(&self, engine: &Engine, device: &Arc<dyn Device>) -> Result<List> {
        loop {
            let (oldest, full) = {
                let mut state = self.lock();
                if let Some(list) = state.free.pop() {
                    return Ok(list);
                }
                (state.flying.pop_front(), state.made >= MOST)
            };
            match oldest {
                Some(flying) => {
                    if let Some(list) = self.land(engine, flying, full) {
                        return Ok(list);
                    }
                    if !full {
                        self.grow(engine, device)?;
                    }
                }
                None if full => {
                    return Err(Error::new(
                        ErrorKind::OutOfHostMemory,
                        "every list of copy kernels is in use or lost",
                    ));
                }
                None => self.grow(engine, device)?,
            }
        }
    }

    /// The list of a kernel that is over; with `wait` it is waited for. Where the device does not
    /// answer, the list is given up.
    fn land(&self, engine: &Engine, flying: Flying, wait: bool) -> Option<List> {
        let device = &flying.streams.device;
        let passed = if wait {
            device.event_synchronize(flying.event).map(|()| true)
        } else {
            device.event_query(flying.event)
        };
        match passed {
            Ok(false) => {
                self.lock().flying.push_front(flying);
                None
            }
            Ok(true) => {
                flying.streams.give_event(flying.event);
                Some(flying.list)
            }
            Err(_) => {
                flying.streams.give_event(flying.event);
                if is_idle(device) {
                    return Some(flying.list);
                }
                self.lock().made -= 1;
                engine.keep(Arc::clone(device), Box::new(flying.list));
                None
            }
        }
    }

    fn grow(&self, engine: &Engine, device: &Arc<dyn Device>) -> Result<()> {
        let block = engine
            .arena()
            .allocate(device, &[(TOGETHER * BYTES) as u64])?
            .pop()
            .ok_or_else(|| Error::new(ErrorKind::Internal, "no block was allocated"))?;
        block.wait().context(|| "memory for lists of pieces")?;
        let block = Arc::new(block);
        let mut state = self.lock();
        state.made += TOGETHER;
        state.free.extend((0..TOGETHER).map(|index| List {
            block: Arc::clone(&block),
            offset: index * BYTES,
        }));
        Ok(())
    }

    /// Takes back a list that no kernel reads.
    pub fn give(&self, list: List) {
        self.lock().free.push(list);
    }

    /// Takes a list that a kernel reads; `event`, of `streams`, was recorded behind the kernel.
    pub fn fly(&self, list: List, streams: &Arc<Streams>, event: Event) {
        self.lock().flying.push_back(Flying {
            list,
            streams: Arc::clone(streams),
            event,
        });
    }

    /// Waits for every kernel, before the memory goes. What a device may still read is lost to the
    /// process rather than given to somebody else.
    pub fn settle(&self) {
        let flying = std::mem::take(&mut self.lock().flying);
        for flying in flying {
            let device = &flying.streams.device;
            let passed = device.event_synchronize(flying.event).is_ok();
            flying.streams.give_event(flying.event);
            if !passed && !is_idle(device) {
                std::mem::forget(flying.list);
            }
        }
    }
}

/// Whether nothing runs on the device any more.
pub(super) fn is_idle(device: &Arc<dyn Device>) -> bool {
    match device.synchronize() {
        Ok(()) => true,
        Err(error) => error.kind() == ErrorKind::DeviceLost,
    }
}
