//! The streams of one device: one each way, because the bus carries both at once, and one for work
//! that stays on the device. Created with the first allocation of the device, so that a pause
//! allocates nothing on it.

use std::ops::Deref;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::device::{Device, Direction, Event, Stream};
use crate::error::{Error, ErrorKind, Result};

#[derive(Debug)]
pub struct Streams {
    pub device: Arc<dyn Device>,
    to_host: Stream,
    to_device: Stream,
    on_device: Stream,
    /// Events that nobody waits for, to be used again.
    events: Mutex<Vec<Event>>,
}

/// An event of the pool, given back when dropped.
#[derive(Debug)]
pub struct PooledEvent<S: Deref<Target = Streams>> {
    streams: S,
    event: Event,
}

/// An event that may outlive the call that recorded it.
pub type SharedEvent = PooledEvent<Arc<Streams>>;

impl<S: Deref<Target = Streams>> PooledEvent<S> {
    pub fn event(&self) -> Event {
        self.event
    }

    pub fn device(&self) -> &Arc<dyn Device> {
        &self.streams.device
    }
}

impl<S: Deref<Target = Streams>> Drop for PooledEvent<S> {
    fn drop(&mut self) {
        self.streams.give_event(self.event);
    }
}

impl Streams {
    pub fn new(device: Arc<dyn Device>) -> Result<Streams> {
        let mut made = Vec::new();
        let mut create = || -> Result<Stream> {
            let stream = device.stream_create().inspect_err(|_| {
                for stream in std::mem::take(&mut made) {
                    if let Err(error) = device.stream_destroy(stream) {
                        tracing::warn!("a stream is left over: {error}");
                    }
                }
            })?;
            made.push(stream);
            Ok(stream)
        };
        let (to_host, to_device, on_device) = (create()?, create()?, create()?);
        Ok(Streams {
            device,
            to_host,
            to_device,
            on_device,
            events: Mutex::default(),
        })
    }

    fn events(&self) -> MutexGuard<'_, Vec<Event>> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An event for one wait.
    pub fn event(&self) -> Result<PooledEvent<&Streams>> {
        Ok(PooledEvent {
            event: self.take_event()?,
            streams: self,
        })
    }

    /// A mark after what is queued in a direction so far, which others may wait for too.
    pub fn mark(self: &Arc<Self>, direction: Direction) -> Result<SharedEvent> {
        let marked = PooledEvent {
            event: self.take_event()?,
            streams: Arc::clone(self),
        };
        self.device.event_record(marked.event, self.of(direction))?;
        Ok(marked)
    }

    /// An event that its user gives back by [`Self::give_event`].
    pub fn take_event(&self) -> Result<Event> {
        let pooled = self.events().pop();
        pooled.map_or_else(|| self.device.event_create(), Ok)
    }

    pub fn give_event(&self, event: Event) {
        self.events().push(event);
    }

    pub fn of(&self, direction: Direction) -> Stream {
        match direction {
            Direction::ToHost => self.to_host,
            Direction::ToDevice => self.to_device,
            Direction::OnDevice => self.on_device,
        }
    }

    /// Waits until everything queued in a direction is done. A first failure is asked again of the
    /// whole device, because "not known to be finished" must not be taken for "finished":
    /// [`Settled::Unknown`] means that memory the copies use must be kept.
    pub fn settle(&self, direction: Direction) -> Settled {
        match self.device.stream_synchronize(self.of(direction)) {
            Ok(()) => Settled::Done,
            Err(error) => match self.device.synchronize() {
                Ok(()) => Settled::Failed(error),
                Err(_) if error.kind() == ErrorKind::DeviceLost => {
                    // Nothing runs on a lost device any more.
                    Settled::Failed(error)
                }
                Err(_) => Settled::Unknown(error),
            },
        }
    }
}

/// What is known of queued copies.
#[derive(Debug)]
pub enum Settled {
    /// Done, without an error.
    Done,
    /// No longer running, and at least one failed.
    Failed(Error),
    /// Perhaps still running.
    Unknown(Error),
}

impl Drop for Streams {
    fn drop(&mut self) {
        if crate::process::check().is_err() {
            return;
        }
        for stream in [self.to_host, self.to_device, self.on_device] {
            if let Err(error) = self.device.stream_destroy(stream) {
                tracing::debug!("a stream is left over: {error}");
            }
        }
        for event in std::mem::take(&mut *self.events()) {
            if let Err(error) = self.device.event_destroy(event) {
                tracing::debug!("an event is left over: {error}");
            }
        }
    }
}
