//! The streams of one device: one each way, because the bus carries both at once. Created with the
//! first allocation of the device, so that a pause allocates nothing on it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::device::{Device, Direction, Event, Stream};
use crate::error::{Error, ErrorKind, Result};

#[derive(Debug)]
pub struct Streams {
    pub device: Arc<dyn Device>,
    to_host: Stream,
    to_device: Stream,
    /// Events that nobody waits for, to be used again.
    events: Mutex<Vec<Event>>,
}

/// An event of the pool, given back when dropped.
pub struct PooledEvent<'a> {
    streams: &'a Streams,
    event: Event,
}

impl PooledEvent<'_> {
    pub fn event(&self) -> Event {
        self.event
    }
}

impl Drop for PooledEvent<'_> {
    fn drop(&mut self) {
        self.streams.give_event(self.event);
    }
}

impl Streams {
    pub fn new(device: Arc<dyn Device>) -> Result<Streams> {
        let to_host = device.stream_create()?;
        let to_device = device.stream_create().inspect_err(|_| {
            if let Err(error) = device.stream_destroy(to_host) {
                tracing::warn!("a stream is left over: {error}");
            }
        })?;
        Ok(Streams {
            device,
            to_host,
            to_device,
            events: Mutex::default(),
        })
    }

    fn events(&self) -> MutexGuard<'_, Vec<Event>> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An event for one wait.
    pub fn event(&self) -> Result<PooledEvent<'_>> {
        Ok(PooledEvent {
            streams: self,
            event: self.take_event()?,
        })
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
            Direction::ToDevice | Direction::OnDevice => self.to_device,
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
        for stream in [self.to_host, self.to_device] {
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
