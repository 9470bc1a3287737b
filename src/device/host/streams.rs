//! Streams and events of all host devices of a platform, and the threads that serve them.
//!
//! A stream is a queue that at most one thread serves at a time. A stream that must wait for an
//! event is parked and occupies no thread. A wait refers to a record made earlier, so waits cannot
//! form a circle and all queued work comes to an end.
//!
//! What the work does to memory is the business of `memory`.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use super::memory::Memory;
use super::os;
use super::work::Work;
use crate::device::{Event, Stream};
use crate::error::{Error, ErrorKind, Result};
use crate::process;

/// More threads than this only compete for the memory bus.
const MOST_WORKERS: usize = 4;

/// How often a waiting caller looks whether the process began to exit.
const EXIT_CHECK: Duration = Duration::from_millis(20);

/// The default streams of the host's runtime, [`Stream::of_host`]: each device has a queue for
/// either, without anybody creating it. All threads share the second.
const DEFAULTS: std::ops::RangeInclusive<u64> = 1..=2;

/// Their queues' numbers begin here, beyond all others.
const FIRST_DEFAULT: u64 = 1 << 63;

/// An error of asynchronous work, which is reported more than once.
#[derive(Clone, Debug)]
struct Failure {
    kind: ErrorKind,
    message: String,
}

impl Failure {
    fn to_error(&self) -> Error {
        Error::new(self.kind, self.message.clone())
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// Nothing queued.
    Idle,
    /// In the list of streams that a thread may take.
    Ready,
    Running,
    /// In the list of a record that has not fired.
    Parked,
}

#[derive(Debug)]
struct Queue {
    device: u32,
    work: VecDeque<Work>,
    place: Place,
    /// Work ever queued, and work done of it.
    queued: u64,
    done: u64,
    /// The first since the last synchronisation.
    failure: Option<Failure>,
    destroyed: bool,
}

impl Queue {
    fn new(device: u32) -> Self {
        Queue {
            device,
            work: VecDeque::new(),
            place: Place::Idle,
            queued: 0,
            done: 0,
            failure: None,
            destroyed: false,
        }
    }
}

/// The number under which a stream's queue is kept: each device has its own default streams.
fn queue_number(device: u32, stream: Stream) -> u64 {
    if DEFAULTS.contains(&stream.0) {
        return FIRST_DEFAULT + 2 * u64::from(device) + stream.0;
    }
    stream.0
}

#[derive(Debug)]
struct Mark {
    device: u32,
    /// Number of the last record, 0 before the first.
    record: u64,
    /// The failure of the stream at that record.
    failure: Option<Failure>,
}

#[derive(Debug, Default)]
struct State {
    streams: HashMap<u64, Queue>,
    events: HashMap<u64, Mark>,
    /// Records that have not fired, with the streams parked at each.
    pending: HashMap<u64, Vec<u64>>,
    ready: VecDeque<u64>,
    /// The last number given to a stream, event or record; none is given twice.
    last_number: u64,
    workers: Vec<JoinHandle<()>>,
    /// Threads that wait for a stream to become ready.
    idle_workers: usize,
    /// Callers that wait for progress.
    waiting: usize,
}

/// See the head of the file.
#[derive(Debug)]
pub(super) struct Streams {
    memory: Arc<Memory>,
    most_workers: usize,
    /// Set once, by [`Self::stop`].
    stop: AtomicBool,
    /// Protects queues, events and the list of threads. Not held while work is done.
    state: Mutex<State>,
    work_ready: Condvar,
    work_done: Condvar,
}

impl Streams {
    pub(super) fn new(memory: Arc<Memory>) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Streams {
            memory,
            most_workers: cores.min(MOST_WORKERS),
            stop: AtomicBool::new(false),
            state: Mutex::default(),
            work_ready: Condvar::new(),
            work_done: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits, without the lock, until `done`, or until the process begins to exit.
    fn wait_until(&self, done: impl Fn(&State) -> bool) -> Result<MutexGuard<'_, State>> {
        let mut state = self.lock();
        while !done(&state) {
            process::check()?;
            state.waiting += 1;
            (state, _) = self
                .work_done
                .wait_timeout(state, EXIT_CHECK)
                .unwrap_or_else(PoisonError::into_inner);
            state.waiting -= 1;
        }
        Ok(state)
    }

    pub(super) fn create(&self, device: u32) -> Stream {
        let mut state = self.lock();
        let number = state.next_number();
        state.streams.insert(number, Queue::new(device));
        Stream(number)
    }

    pub(super) fn destroy(&self, device: u32, stream: Stream) -> Result<()> {
        if DEFAULTS.contains(&stream.0) {
            let why = "a default stream cannot be destroyed";
            return Err(Error::invalid("stream", why));
        }
        let mut state = self.lock();
        let queue = state.queue(device, stream)?;
        queue.destroyed = true;
        if queue.place == Place::Idle {
            let failure = state.forget(stream.0);
            drop(state);
            warn_of(failure);
        }
        Ok(())
    }

    /// Waits for all work queued so far, then returns and clears the stream's first error.
    pub(super) fn synchronize(&self, device: u32, stream: Stream) -> Result<()> {
        let queued = self.lock().queue(device, stream)?.queued;
        let number = queue_number(device, stream);
        let mut state = self.wait_until(|state| state.has_done(number, queued))?;
        let failure = state
            .streams
            .get_mut(&number)
            .and_then(|queue| queue.failure.take());
        match failure {
            Some(failure) => Err(failure.to_error()),
            None => Ok(()),
        }
    }

    /// Waits for all work queued on `device` so far. Errors stay with their streams: taking them
    /// here would hide them from the callers whose work failed.
    pub(super) fn synchronize_device(&self, device: u32) -> Result<()> {
        let targets: Vec<_> = self
            .lock()
            .streams
            .iter()
            .filter(|(_, queue)| queue.device == device)
            .map(|(number, queue)| (*number, queue.queued))
            .collect();
        for (stream, queued) in targets {
            drop(self.wait_until(|state| state.has_done(stream, queued))?);
        }
        Ok(())
    }

    /// Whether `stream` is one of `device`.
    pub(super) fn check(&self, device: u32, stream: Stream) -> Result<()> {
        self.lock().queue(device, stream).map(drop)
    }

    pub(super) fn submit(self: &Arc<Self>, device: u32, stream: Stream, work: Work) -> Result<()> {
        let mut state = self.lock();
        state.queue(device, stream)?;
        self.enqueue(&mut state, queue_number(device, stream), work)
    }

    fn enqueue(self: &Arc<Self>, state: &mut State, stream: u64, work: Work) -> Result<()> {
        // A stream at another place is in the hands of a thread, or will be.
        if state.streams.get(&stream).map(|q| q.place) == Some(Place::Idle) {
            self.have_worker(state)?;
        }
        if let Some(queue) = state.streams.get_mut(&stream) {
            queue.work.push_back(work);
            queue.queued += 1;
        }
        self.make_ready(state, stream, Place::Idle);
        Ok(())
    }

    /// Hands a stream with work to the threads, if it is at `from`.
    fn make_ready(&self, state: &mut State, stream: u64, from: Place) {
        let Some(queue) = state.streams.get_mut(&stream) else {
            return;
        };
        if queue.place == from {
            queue.place = Place::Ready;
            state.ready.push_back(stream);
            self.work_ready.notify_one();
        }
    }

    /// Starts a thread where those that wait do not suffice. An error only if there is none at all.
    fn have_worker(self: &Arc<Self>, state: &mut State) -> Result<()> {
        if state.idle_workers > state.ready.len() || state.workers.len() >= self.most_workers {
            return Ok(());
        }
        match start_worker(self, state.workers.len()) {
            Ok(worker) => state.workers.push(worker),
            Err(error) if state.workers.is_empty() => {
                return Err(Error::io("starting a thread of the host device", error));
            }
            Err(_) => {}
        }
        Ok(())
    }

    pub(super) fn event_create(&self, device: u32) -> Event {
        let mut state = self.lock();
        let number = state.next_number();
        let mark = Mark {
            device,
            record: 0,
            failure: None,
        };
        state.events.insert(number, mark);
        Event(number)
    }

    pub(super) fn event_destroy(&self, event: Event) -> Result<()> {
        let mut state = self.lock();
        state.mark(event)?;
        // A record still queued fires all the same.
        state.events.remove(&event.0);
        Ok(())
    }

    pub(super) fn event_record(
        self: &Arc<Self>,
        device: u32,
        event: Event,
        stream: Stream,
    ) -> Result<()> {
        let mut state = self.lock();
        state.queue(device, stream)?;
        let of = state.mark(event)?.device;
        if of != device {
            let why = format!("{event:?} belongs to device {of}, the stream to device {device}");
            return Err(Error::invalid("event", why));
        }
        let record = state.next_number();
        let work = Work::Record {
            event: event.0,
            record,
        };
        self.enqueue(&mut state, queue_number(device, stream), work)?;
        // The lock was held throughout, so the record cannot have fired yet.
        state.pending.insert(record, Vec::new());
        let mark = state.mark(event)?;
        mark.record = record;
        mark.failure = None;
        Ok(())
    }

    pub(super) fn event_query(&self, event: Event) -> Result<bool> {
        let mut state = self.lock();
        let record = state.mark(event)?.record;
        if state.pending.contains_key(&record) {
            return Ok(false);
        }
        state.failure_of(event, record).map(|()| true)
    }

    pub(super) fn event_synchronize(&self, event: Event) -> Result<()> {
        let record = self.lock().mark(event)?.record;
        let state = self.wait_until(|state| !state.pending.contains_key(&record))?;
        state.failure_of(event, record)
    }

    /// Later work of `stream` waits for the last record of `event`, which may be of any device.
    pub(super) fn wait(self: &Arc<Self>, device: u32, stream: Stream, event: Event) -> Result<()> {
        let mut state = self.lock();
        state.queue(device, stream)?;
        let record = state.mark(event)?.record;
        if !state.pending.contains_key(&record) {
            return Ok(());
        }
        let number = queue_number(device, stream);
        self.enqueue(&mut state, number, Work::Wait { record })
    }

    /// Serves streams until [`Self::stop`].
    fn serve(&self) {
        let mut state = self.lock();
        while !self.stop.load(Ordering::Acquire) {
            let Some(stream) = state.ready.pop_front() else {
                state.idle_workers += 1;
                state = self
                    .work_ready
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
                state.idle_workers -= 1;
                continue;
            };
            let Some((device, work)) = state.start(stream) else {
                continue;
            };
            drop(state);
            let result = work.perform(device, &self.memory, &self.stop);
            state = self.lock();
            if let Err(error) = result {
                state.fail(stream, &work, &error);
            }
            let unseen = self.finish(&mut state, stream, &work);
            if unseen.is_some() {
                // Not under the lock: a subscriber may call this library.
                drop(state);
                warn_of(unseen);
                state = self.lock();
            }
        }
    }

    /// Books finished work and makes the stream, and those that waited for it, go on. The failure
    /// of a destroyed stream, which nobody can ask for any more, is returned.
    fn finish(&self, state: &mut State, stream: u64, work: &Work) -> Option<Failure> {
        let mut unseen = None;
        if let Work::Record { event, record } = *work {
            state.fire(stream, event, record);
            for parked in state.pending.remove(&record).unwrap_or_default() {
                self.make_ready(state, parked, Place::Parked);
            }
        }
        if let Some(queue) = state.streams.get_mut(&stream) {
            queue.done += 1;
            if !queue.work.is_empty() {
                // To the end of the line, so that no stream starves. This thread takes the next
                // ready one itself, so none need be woken.
                queue.place = Place::Ready;
                state.ready.push_back(stream);
            } else if queue.destroyed {
                unseen = state.forget(stream);
            } else {
                queue.place = Place::Idle;
            }
        }
        if state.waiting > 0 {
            self.work_done.notify_all();
        }
        unseen
    }

    /// Stops the threads. Running work ends at its next slice, and queued work is dropped.
    pub(super) fn stop(&self) {
        let workers = {
            let mut state = self.lock();
            self.stop.store(true, Ordering::Release);
            std::mem::take(&mut state.workers)
        };
        self.work_ready.notify_all();
        for worker in workers {
            // A panic of a worker was reported on its own thread.
            let _ = worker.join();
        }
    }
}

impl State {
    fn next_number(&mut self) -> u64 {
        self.last_number = (self.last_number + 1).max(DEFAULTS.end() + 1);
        self.last_number
    }

    fn queue(&mut self, device: u32, stream: Stream) -> Result<&mut Queue> {
        let number = queue_number(device, stream);
        if number != stream.0 {
            self.streams
                .entry(number)
                .or_insert_with(|| Queue::new(device));
        }
        let queue = self
            .streams
            .get_mut(&number)
            .filter(|queue| !queue.destroyed)
            .ok_or_else(|| {
                Error::invalid("stream", format_args!("{:#x} is not known", stream.0))
            })?;
        if queue.device != device {
            let why = format!(
                "{stream:?} belongs to device {}, not {device}",
                queue.device
            );
            return Err(Error::invalid("stream", why));
        }
        Ok(queue)
    }

    fn mark(&mut self, event: Event) -> Result<&mut Mark> {
        self.events
            .get_mut(&event.0)
            .ok_or_else(|| Error::invalid("event", format_args!("{event:?} is not known")))
    }

    /// Whether the first `queued` pieces of work of a stream are done. One that is gone did all.
    fn has_done(&self, stream: u64, queued: u64) -> bool {
        self.streams
            .get(&stream)
            .is_none_or(|queue| queue.done >= queued)
    }

    /// Takes the next work of a ready stream, or parks it.
    fn start(&mut self, stream: u64) -> Option<(u32, Work)> {
        let queue = self.streams.get_mut(&stream)?;
        if let Some(Work::Wait { record }) = queue.work.front()
            && let Some(parked) = self.pending.get_mut(record)
        {
            parked.push(stream);
            queue.place = Place::Parked;
            return None;
        }
        queue.place = Place::Running;
        Some((queue.device, queue.work.pop_front()?))
    }

    fn fail(&mut self, stream: u64, work: &Work, error: &Error) {
        let Some(queue) = self.streams.get_mut(&stream) else {
            return;
        };
        queue.failure.get_or_insert_with(|| Failure {
            kind: error.kind(),
            message: format!("{work} on host device {}: {error}", queue.device),
        });
    }

    /// Passes the stream's failure on to the event, unless the event was recorded anew meanwhile.
    fn fire(&mut self, stream: u64, event: u64, record: u64) {
        let failure = self.streams.get(&stream).and_then(|q| q.failure.clone());
        if let Some(mark) = self.events.get_mut(&event)
            && mark.record == record
        {
            mark.failure = failure;
        }
    }

    fn failure_of(&self, event: Event, record: u64) -> Result<()> {
        let failure = self
            .events
            .get(&event.0)
            .filter(|mark| mark.record == record)
            .and_then(|mark| mark.failure.as_ref());
        match failure {
            Some(failure) => Err(failure.to_error()),
            None => Ok(()),
        }
    }

    /// Removes a destroyed stream that has done all its work; returns what nobody asked for.
    fn forget(&mut self, stream: u64) -> Option<Failure> {
        self.streams.remove(&stream).and_then(|q| q.failure)
    }
}

fn warn_of(unseen: Option<Failure>) {
    if let Some(failure) = unseen {
        tracing::warn!("a destroyed stream had failed: {}", failure.message);
    }
}

/// Starts one thread that serves `streams`.
fn start_worker(streams: &Arc<Streams>, number: usize) -> std::io::Result<JoinHandle<()>> {
    let streams = Arc::clone(streams);
    os::without_signals(|| {
        std::thread::Builder::new()
            .name(format!("tms-host-{number}"))
            .spawn(move || streams.serve())
    })
}
