//! The tables of an engine's devices, measured when the first scattered copy needs one.
//!
//! What is measured decides about speed only: every method copies everything.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::lists::{self, List};
use super::table::{CLASSES, DIRECTIONS, Method, Table};
use crate::device::{Address, CreateOptions, Device, Direction, Physical, Piece, Stream, round_up};
use crate::error::{Error, ErrorKind, Result};
use crate::transfer::{Block, Engine, Streams};

const VARIABLE: &str = "TMS_TRANSFER_TABLE";

/// Bytes that one measurement moves, out of a place twice as large.
const MOVED: u64 = 4 << 20;
const PLACE: u64 = 2 * MOVED;

/// Plain copies and batches cost so much each that fewer tell enough.
const MOST_CALLS: usize = 128;

/// Seconds that one round should take, and how often it may do its work for that.
const LONG_ENOUGH: f64 = 0.5e-3;
const MOST_TIMES: f64 = 8.0;

/// The first round warms up, the best of the others counts.
const ROUNDS: usize = 3;

/// A device that cannot be measured is given up after so many times.
const MOST_FAILURES: u32 = 3;

/// Speeds of a direction and class, by [`Method::ALL`].
type Measured = (Direction, usize, [f64; 3]);

#[derive(Clone)]
struct Known {
    table: Arc<Table>,
    measured: bool,
    failures: u32,
}

/// The tables of one engine.
#[derive(Default)]
pub(super) struct Tables {
    /// By ordinal; never held across a device call.
    known: Mutex<BTreeMap<u32, Known>>,
    /// Held while one thread measures; taken before `known`.
    measuring: Mutex<()>,
    /// Scratch memory that could not be given back.
    leftovers: Mutex<Vec<Scratch>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Tables {
    /// The table of a device, measured first unless there is nothing to choose.
    pub fn of(&self, engine: &Engine, device: &Arc<dyn Device>) -> Result<Arc<Table>> {
        if !lock(&self.leftovers).is_empty() {
            self.clear_leftovers();
        }
        let choice = device.has_kernels() || device.has_batch();
        let known = self.current(device)?;
        if known.measured || !choice || known.table.is_fixed() || known.failures >= MOST_FAILURES {
            return Ok(known.table);
        }
        match self.measured(engine, device) {
            Ok(table) => Ok(table),
            Err(error) => {
                tracing::debug!(
                    "device {}: the transfer table was not measured: {error}",
                    device.info().ordinal
                );
                Ok(known.table)
            }
        }
    }

    /// The table of a device, measured if it was not yet.
    pub fn measured(&self, engine: &Engine, device: &Arc<dyn Device>) -> Result<Arc<Table>> {
        let _turn = lock(&self.measuring);
        self.clear_leftovers();
        let known = self.current(device)?;
        if known.measured {
            return Ok(known.table);
        }
        let outcome = measure(engine, device, &self.leftovers);
        let mut tables = lock(&self.known);
        let known = tables.entry(device.info().ordinal).or_insert(known);
        match outcome {
            Ok(results) => {
                let table = Arc::make_mut(&mut known.table);
                for (direction, class, speeds) in results {
                    table.note(direction, class, speeds);
                }
                known.measured = true;
                Ok(Arc::clone(&known.table))
            }
            Err(error) => {
                known.failures += 1;
                Err(error)
            }
        }
    }

    /// Chooses methods by text, see [`Table::set`].
    pub fn set(&self, device: &Arc<dyn Device>, text: &str) -> Result<()> {
        let current = self.current(device)?;
        let mut tables = lock(&self.known);
        let known = tables.entry(device.info().ordinal).or_insert(current);
        Arc::make_mut(&mut known.table).set(text)
    }

    /// What is known now; the first time, what the environment says.
    fn current(&self, device: &Arc<dyn Device>) -> Result<Known> {
        let ordinal = device.info().ordinal;
        if let Some(known) = lock(&self.known).get(&ordinal) {
            return Ok(known.clone());
        }
        let mut table = Table::default();
        if let Ok(text) = std::env::var(VARIABLE) {
            table.set(&text).map_err(|error| error.context(VARIABLE))?;
        }
        let known = Known {
            table: Arc::new(table),
            measured: false,
            failures: 0,
        };
        Ok(lock(&self.known).entry(ordinal).or_insert(known).clone())
    }

    /// Tries again to give back what could not be given back.
    pub fn clear_leftovers(&self) {
        let leftovers = std::mem::take(&mut *lock(&self.leftovers));
        for mut scratch in leftovers {
            if !scratch.clear() {
                lock(&self.leftovers).push(scratch);
            }
        }
    }

    /// As above, for the last time: what a device may still use is lost to the process.
    pub fn settle(&self) {
        self.clear_leftovers();
        std::mem::forget(std::mem::take(&mut *lock(&self.leftovers)));
    }
}

/// Device and host memory to measure with.
struct Scratch {
    streams: Arc<Streams>,
    bytes: u64,
    address: Option<Address>,
    physical: Option<Physical>,
    mapped: bool,
    block: Option<Block>,
    /// For kernels, if the device has any.
    list: Option<List>,
    /// Copies were queued and not waited for.
    busy: bool,
}

impl Scratch {
    fn make(&mut self, engine: &Engine) -> Result<()> {
        let device = &self.streams.device;
        let address = device.reserve(self.bytes)?;
        self.address = Some(address);
        let physical = device.create(self.bytes, CreateOptions::default())?;
        self.physical = Some(physical);
        device.map(address, self.bytes, physical)?;
        self.mapped = true;
        device.set_access(address, self.bytes, &[])?;
        let block = engine
            .arena()
            .allocate(device, &[PLACE])?
            .pop()
            .ok_or_else(|| Error::new(ErrorKind::Internal, "no block was allocated"))?;
        block.wait()?;
        self.block = Some(block);
        if device.has_kernels() {
            self.list = Some(engine.copies.lists.take(engine, device)?);
        }
        Ok(())
    }

    /// Gives everything back; false if something is left.
    fn clear(&mut self) -> bool {
        let device = &self.streams.device;
        if self.busy && !lists::is_idle(device) {
            return false;
        }
        self.busy = false;
        self.block = None;
        if let Some(address) = self.address
            && self.mapped
        {
            self.mapped = device.unmap(address, self.bytes).is_err();
        }
        if let Some(physical) = self.physical
            && !self.mapped
            && device.release(physical).is_ok()
        {
            self.physical = None;
        }
        if let Some(address) = self.address
            && !self.mapped
            && device.unreserve(address, self.bytes).is_ok()
        {
            self.address = None;
        }
        self.address.is_none() && self.physical.is_none()
    }

    /// The pieces of one measurement: device pieces apart from each other, host pieces together.
    fn pieces(&self, direction: Direction, size: u64) -> Vec<Piece> {
        let on_device = self.address.unwrap_or_default();
        let on_host = self
            .block
            .as_ref()
            .map_or(0, |block| block.pointer().as_ptr() as u64);
        (0..MOVED / size)
            .map(|index| {
                let (apart, together) = (index * size * 2, index * size);
                let (destination, source) = match direction {
                    Direction::ToDevice => (on_device + apart, on_host + together),
                    Direction::ToHost => (on_host + together, on_device + apart),
                    Direction::OnDevice => (on_device + PLACE + apart, on_device + apart),
                };
                Piece {
                    destination,
                    source,
                    bytes: size,
                }
            })
            .collect()
    }

    /// 10⁹ bytes a second of one method.
    fn time(&mut self, method: Method, direction: Direction, pieces: &[Piece]) -> Result<f64> {
        let streams = Arc::clone(&self.streams);
        let (device, stream) = (&streams.device, streams.of(direction));
        let pieces: Vec<Piece> = match method {
            Method::Kernel => {
                let tiles = pieces.iter().flat_map(|piece| piece.tiles());
                tiles.take(lists::PIECES).collect()
            }
            Method::Plain | Method::Batch => pieces.iter().take(MOST_CALLS).copied().collect(),
        };
        if let (Method::Kernel, Some(list)) = (method, &mut self.list) {
            list.write(&pieces);
        }
        let event = streams.event()?;
        let bytes: u64 = pieces.iter().map(|piece| piece.bytes).sum();
        let mut best = f64::INFINITY;
        // What is over too soon is done several times, or the wait for it would count.
        let mut times = 1;
        self.busy = true;
        for round in 0..ROUNDS {
            let begun = Instant::now();
            for _ in 0..times {
                self.queue(&**device, method, direction, stream, &pieces)?;
            }
            device.event_record(event.event(), stream)?;
            device.event_synchronize(event.event())?;
            let seconds = begun.elapsed().as_secs_f64() / f64::from(times);
            if round > 0 {
                best = best.min(seconds);
            }
            times = (LONG_ENOUGH / seconds.max(1e-9)).clamp(1.0, MOST_TIMES) as u32;
        }
        self.busy = false;
        Ok(bytes as f64 / best.max(1e-9) / 1e9)
    }

    fn queue(
        &self,
        device: &dyn Device,
        method: Method,
        direction: Direction,
        stream: Stream,
        pieces: &[Piece],
    ) -> Result<()> {
        let mut outcome = Ok(());
        device.together(&mut || {
            // SAFETY: the pieces lie in scratch memory, which stays until nothing is queued; so
            // does the list, whose first entries are the pieces.
            outcome = unsafe {
                match (method, &self.list) {
                    (Method::Kernel, Some(list)) => device.copy_pieces(
                        list.pointer(),
                        pieces.len() as u32,
                        super::lane::blocks(direction),
                        stream,
                    ),
                    (Method::Batch, _) => device.copy_batch(pieces, direction, stream),
                    _ => pieces.iter().try_for_each(|piece| {
                        device.copy(
                            piece.destination,
                            piece.source,
                            piece.bytes,
                            direction,
                            stream,
                        )
                    }),
                }
            };
        });
        outcome
    }

    fn measure(&mut self) -> Result<Vec<Measured>> {
        let device = Arc::clone(&self.streams.device);
        let mut results = Vec::new();
        for direction in DIRECTIONS {
            for (class, end) in CLASSES.into_iter().enumerate() {
                // The last class has no end; this is what is larger than the others.
                let size = end.min(MOVED / 2);
                let pieces = self.pieces(direction, size);
                let mut speeds = [0.0; 3];
                for (speed, method) in speeds.iter_mut().zip(Method::ALL) {
                    if method.works_on(&*device) {
                        *speed = self.time(method, direction, &pieces)?;
                    }
                }
                results.push((direction, class, speeds));
            }
        }
        Ok(results)
    }
}

fn measure(
    engine: &Engine,
    device: &Arc<dyn Device>,
    leftovers: &Mutex<Vec<Scratch>>,
) -> Result<Vec<Measured>> {
    let bytes = round_up(2 * PLACE, device.info().granularity)
        .ok_or_else(|| Error::new(ErrorKind::Internal, "the granularity is too large"))?;
    let mut scratch = Scratch {
        streams: engine.streams(device)?,
        bytes,
        address: None,
        physical: None,
        mapped: false,
        block: None,
        list: None,
        busy: false,
    };
    let results = scratch.make(engine).and_then(|()| scratch.measure());
    if results.is_err() {
        // An error of a stream stays until it is asked for.
        for direction in DIRECTIONS {
            scratch.streams.settle(direction);
        }
    }
    // What is refused once may be granted the second time, and then nothing is left.
    let cleared = scratch.clear() || scratch.clear();
    if let Some(list) = scratch.list.take_if(|_| !scratch.busy) {
        engine.copies.lists.give(list);
    }
    if !cleared {
        lock(leftovers).push(scratch);
    }
    results
}
