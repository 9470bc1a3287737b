//! Queues pieces that a device reaches by itself on one stream of it, each by the method that the
//! table has for its size, and waits for them.

use std::sync::Arc;

use super::lists::{self, List};
use super::plan::Item;
use super::table::{CLASSES, Method, class_of};
use crate::device::{Device, Direction, Event, Piece, Pitched, Stream};
use crate::error::Result;
use crate::op::Control;
use crate::transfer::{Engine, Settled, Streams};

/// Pieces of one batch, at most.
const BATCH: usize = 4096;

/// Thread blocks of a copy kernel: over the bus, more than these gain nothing; on the device, the
/// memory wants all it can get.
const BLOCKS_BUS: u32 = 128;
const BLOCKS_DEVICE: u32 = 1024;

/// A large piece is cut into parts of this size, each with a mark behind it, by which a waiting
/// call knows how far it is. More than twice what fills the bus.
const PART: u64 = 64 << 20;

/// The streams 1 and 2 of the driver, the default ones, take no batches.
const LAST_DEFAULT_STREAM: u64 = 2;

/// Thread blocks of a copy kernel of that direction.
pub(super) fn blocks(direction: Direction) -> u32 {
    match direction {
        Direction::OnDevice => BLOCKS_DEVICE,
        Direction::ToDevice | Direction::ToHost => BLOCKS_BUS,
    }
}

/// Reached when everything of the lane before the byte `at` of the call is in place.
struct Mark {
    streams: Arc<Streams>,
    event: Event,
    at: u64,
    bytes: u64,
}

impl Drop for Mark {
    fn drop(&mut self) {
        self.streams.give_event(self.event);
    }
}

/// One stream and direction, as one call uses it.
pub(super) struct Lane {
    pub streams: Arc<Streams>,
    pub stream: Stream,
    pub direction: Direction,
    /// A capture takes nothing but plain copies.
    pub capturing: bool,
    methods: Option<[Method; CLASSES.len()]>,
    /// The first byte of the call that was queued here and is not known to be in place.
    pub first: Option<u64>,
    /// How far [`Self::queue`] came with a single item.
    pub reached: u64,
    /// Bytes queued behind the last mark.
    unmarked: u64,
    /// `None` where nobody will wait for the lane.
    marks: Option<Vec<Mark>>,
}

impl Lane {
    /// A lane on a stream of the host, or of another lane, for which this call does not wait.
    pub fn on(
        streams: Arc<Streams>,
        stream: Stream,
        direction: Direction,
        capturing: bool,
    ) -> Lane {
        Lane {
            streams,
            stream,
            direction,
            capturing,
            methods: None,
            first: None,
            reached: 0,
            unmarked: 0,
            marks: None,
        }
    }

    /// A lane on the engine's own stream, to be waited for by [`Self::wait`].
    pub fn own(streams: Arc<Streams>, direction: Direction) -> Lane {
        let stream = streams.of(direction);
        Lane {
            marks: Some(Vec::new()),
            ..Lane::on(streams, stream, direction, false)
        }
    }

    pub fn device(&self) -> &Arc<dyn Device> {
        &self.streams.device
    }

    /// A lane of the same stream, for what a thread stages.
    pub fn beside(&self) -> Lane {
        Lane {
            methods: self.methods,
            ..Lane::on(
                Arc::clone(&self.streams),
                self.stream,
                self.direction,
                self.capturing,
            )
        }
    }

    /// Finds out the methods, which may have to be measured first.
    pub fn choose(&mut self, engine: &Engine) -> Result<()> {
        if self.methods.is_none() && !self.capturing {
            let table = engine.copies.tables.of(engine, self.device())?;
            self.methods = Some(table.methods(self.direction, &**self.device()));
        }
        Ok(())
    }

    pub fn method(&self, bytes: u64) -> Method {
        match &self.methods {
            Some(methods) => methods[class_of(bytes)],
            None => Method::Plain,
        }
    }

    /// Notes that bytes from `at` on are about to be queued.
    pub fn begin(&mut self, at: u64) {
        self.first.get_or_insert(at);
    }

    /// Queues all items; a single one plainly. After an error some may have been queued.
    ///
    /// `room` is pinned room for a list of all items, of which there are at most
    /// [`lists::PIECES`]: a thread that others wait for must not wait for pinned memory.
    ///
    /// # Safety
    /// Every piece is memory that the device reaches, valid until the stream has passed; so is the
    /// room.
    pub unsafe fn queue(
        &mut self,
        engine: &Engine,
        items: &[Item],
        room: Option<*mut Piece>,
    ) -> Result<()> {
        if let Some(item) = items.first() {
            self.begin(item.at);
        }
        if items.len() > 1 {
            self.choose(engine)?;
        }
        let device = Arc::clone(self.device());
        let mut outcome = Ok(());
        device.together(&mut || {
            // SAFETY: by this function's contract.
            outcome = unsafe {
                match items {
                    [item] => self.queue_plain(item),
                    _ => self.queue_many(engine, items, room),
                }
            };
        });
        outcome
    }

    /// # Safety
    /// As for [`Self::queue`].
    unsafe fn queue_many(
        &mut self,
        engine: &Engine,
        items: &[Item],
        room: Option<*mut Piece>,
    ) -> Result<()> {
        let mut pending = Pending {
            room,
            ..Pending::default()
        };
        // SAFETY: by this function's contract.
        let queued = unsafe { self.queue_by_method(engine, items, &mut pending) };
        if let Some((Sheet::Own(list), _)) = pending.list.take() {
            engine.copies.lists.give(list);
        }
        queued
    }

    /// # Safety
    /// As for [`Self::queue`].
    unsafe fn queue_by_method(
        &mut self,
        engine: &Engine,
        items: &[Item],
        pending: &mut Pending,
    ) -> Result<()> {
        let batches = self.stream.0 > LAST_DEFAULT_STREAM;
        for item in items {
            // SAFETY: by this function's contract.
            unsafe {
                match self.method(item.piece.bytes) {
                    Method::Kernel => pending.list(engine, self, item.piece)?,
                    Method::Batch if batches => pending.batch(self, item.piece)?,
                    Method::Batch | Method::Plain => {
                        if item.piece.bytes > PART {
                            // A mark in it stands for what is before it, too.
                            pending.send(engine, self)?;
                        }
                        self.queue_plain(item)?;
                    }
                }
            }
        }
        // SAFETY: as above.
        unsafe { pending.send(engine, self) }
    }

    /// # Safety
    /// As for [`Self::queue`].
    unsafe fn queue_plain(&mut self, item: &Item) -> Result<()> {
        let bytes = item.piece.bytes;
        let part = if self.marks.is_some() { PART } else { bytes };
        let mut done = 0;
        self.reached = item.at;
        while done < bytes {
            let next = item.part(done, part.min(bytes - done));
            let piece = &next.piece;
            // SAFETY: by this function's contract.
            unsafe {
                self.device().copy(
                    piece.destination,
                    piece.source,
                    piece.bytes,
                    self.direction,
                    self.stream,
                )
            }?;
            self.unmarked += piece.bytes;
            done += piece.bytes;
            self.reached = item.at + done;
            if done < bytes {
                self.mark(item.at + done);
            }
        }
        Ok(())
    }

    /// Queues a pitched copy whose first byte is `at` in the call.
    ///
    /// # Safety
    /// As for [`Self::queue`], for each row.
    pub unsafe fn queue_pitched(&mut self, pitched: &Pitched, at: u64) -> Result<()> {
        self.begin(at);
        // SAFETY: by this function's contract.
        unsafe {
            self.device()
                .copy_pitched(pitched, self.direction, self.stream)
        }?;
        self.unmarked += pitched.width * pitched.height;
        Ok(())
    }

    /// Queues a copy into memory of the device `peer`.
    ///
    /// # Safety
    /// As for [`Self::queue`].
    pub unsafe fn queue_to_peer(&mut self, item: &Item, peer: u32) -> Result<()> {
        let piece = &item.piece;
        // SAFETY: by this function's contract.
        unsafe {
            self.device().copy_to_peer(
                piece.destination,
                peer,
                piece.source,
                piece.bytes,
                self.stream,
            )
        }?;
        self.begin(item.at);
        self.unmarked += piece.bytes;
        Ok(())
    }

    /// A mark is a convenience: without an event the call waits without it.
    fn mark(&mut self, at: u64) {
        let Some(marks) = &mut self.marks else { return };
        let Ok(event) = self.streams.take_event() else {
            return;
        };
        if self
            .streams
            .device
            .event_record(event, self.stream)
            .is_err()
        {
            self.streams.give_event(event);
            return;
        }
        marks.push(Mark {
            streams: Arc::clone(&self.streams),
            event,
            at,
            bytes: std::mem::take(&mut self.unmarked),
        });
    }

    /// Waits for what was queued on the engine's own stream. After an error, [`Self::first`] is the
    /// first byte that is not known to be in place.
    pub fn wait(&mut self, control: &Control) -> Result<()> {
        if self.first.is_none() {
            return Ok(());
        }
        let device = Arc::clone(self.device());
        let mut waited = Ok(());
        for mark in self.marks.take().unwrap_or_default() {
            if waited.is_ok() {
                waited = device.event_synchronize(mark.event).map(|()| {
                    self.first = Some(mark.at);
                    control.advance(mark.bytes);
                });
            }
        }
        let waited = waited.and_then(|()| self.wait_last());
        match waited {
            Ok(()) => {
                self.first = None;
                control.advance(self.unmarked);
                Ok(())
            }
            Err(error) => Err(match self.streams.settle(self.direction) {
                Settled::Unknown(_) => error.context("copies may still be running"),
                _ => error,
            }),
        }
    }

    /// Waits by an event, so that what others queue meanwhile is not waited for.
    fn wait_last(&self) -> Result<()> {
        let event = self.streams.event()?;
        let device = self.device();
        device.event_record(event.event(), self.stream)?;
        device.event_synchronize(event.event())
    }
}

/// Where a list for a kernel is written.
enum Sheet {
    Own(List),
    /// Of whoever queues, who knows when it has been read.
    Lent(*mut Piece),
}

impl Sheet {
    fn pointer(&self) -> *mut Piece {
        match self {
            Sheet::Own(list) => list.pointer(),
            Sheet::Lent(room) => *room,
        }
    }
}

/// Pieces on their way into a list or batch.
#[derive(Default)]
struct Pending {
    room: Option<*mut Piece>,
    list: Option<(Sheet, usize)>,
    list_bytes: u64,
    batch: Vec<Piece>,
}

impl Pending {
    /// # Safety
    /// As for [`Lane::queue`].
    unsafe fn list(&mut self, engine: &Engine, lane: &mut Lane, piece: Piece) -> Result<()> {
        let lent = match &self.list {
            Some((sheet, _)) => matches!(sheet, Sheet::Lent(_)),
            None => self.room.is_some(),
        };
        if lent {
            // The lender counted the pieces as they are.
            // SAFETY: by this function's contract.
            return unsafe { self.enter(engine, lane, piece) };
        }
        for tile in piece.tiles() {
            // SAFETY: by this function's contract; a tile is part of the piece.
            unsafe { self.enter(engine, lane, tile) }?;
        }
        Ok(())
    }

    /// # Safety
    /// As for [`Lane::queue`].
    unsafe fn enter(&mut self, engine: &Engine, lane: &mut Lane, piece: Piece) -> Result<()> {
        let (sheet, count) = match &mut self.list {
            Some(begun) => begun,
            none => none.insert((
                match self.room.take() {
                    Some(room) => Sheet::Lent(room),
                    None => Sheet::Own(engine.copies.lists.take(engine, lane.device())?),
                },
                0,
            )),
        };
        // SAFETY: no list is longer than `PIECES`, for which there is room, or than all items, for
        // which the lender has room; nobody else writes there and no kernel reads it yet.
        unsafe { sheet.pointer().add(*count).write(piece) };
        *count += 1;
        self.list_bytes += piece.bytes;
        if *count == lists::PIECES {
            // SAFETY: by this function's contract.
            unsafe { self.launch(engine, lane) }?;
        }
        Ok(())
    }

    /// # Safety
    /// As for [`Lane::queue`].
    unsafe fn batch(&mut self, lane: &mut Lane, piece: Piece) -> Result<()> {
        self.batch.push(piece);
        if self.batch.len() == BATCH {
            // SAFETY: by this function's contract.
            unsafe { self.send_batch(lane) }?;
        }
        Ok(())
    }

    /// # Safety
    /// As for [`Lane::queue`].
    unsafe fn send(&mut self, engine: &Engine, lane: &mut Lane) -> Result<()> {
        // SAFETY: by this function's contract.
        unsafe {
            self.launch(engine, lane)?;
            self.send_batch(lane)
        }
    }

    /// # Safety
    /// As for [`Lane::queue`].
    unsafe fn send_batch(&mut self, lane: &mut Lane) -> Result<()> {
        if self.batch.is_empty() {
            return Ok(());
        }
        // SAFETY: by this function's contract.
        unsafe {
            lane.device()
                .copy_batch(&self.batch, lane.direction, lane.stream)
        }?;
        lane.unmarked += self.batch.iter().map(|piece| piece.bytes).sum::<u64>();
        self.batch.clear();
        Ok(())
    }

    /// # Safety
    /// As for [`Lane::queue`].
    unsafe fn launch(&mut self, engine: &Engine, lane: &mut Lane) -> Result<()> {
        let Some((sheet, count)) = self.list.take() else {
            return Ok(());
        };
        // SAFETY: by this function's contract; the list is pinned, and its owner leaves it as it is
        // until the kernel has read it.
        let launched = unsafe {
            lane.device().copy_pieces(
                sheet.pointer(),
                count as u32,
                blocks(lane.direction),
                lane.stream,
            )
        };
        if let Sheet::Own(list) = sheet {
            match &launched {
                Ok(()) => engine.copies.lists.fly(engine, list, lane)?,
                Err(_) => engine.copies.lists.give(list),
            }
        }
        lane.unmarked += std::mem::take(&mut self.list_bytes);
        launched
    }
}
