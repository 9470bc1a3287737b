//! How far each allocation of an ordered resume is, as seen by those who wait for it.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::device::{Address, DeviceKind, Stream};
use crate::error::{Error, ErrorKind, Result};
use crate::process;
use crate::transfer::SharedEvent;

/// How often a waiting caller looks whether the process was forked or began to exit.
const EXIT_CHECK: Duration = Duration::from_millis(20);

const READY: u8 = 1;
const FAILED: u8 = 2;

#[derive(Clone)]
enum Progress {
    Waiting,
    /// Complete as soon as the event is.
    Queued(Arc<SharedEvent>),
    Ready,
    Failed(Error),
}

struct Place {
    base: Address,
    bytes: u64,
    /// 0 or the end, which does not change: for those who only ask.
    end: AtomicU8,
}

/// The allocations of one ordered resume.
pub(super) struct Readiness {
    /// Sorted by address.
    places: Vec<Place>,
    /// Of each place. Never held across a device call.
    progress: Mutex<Vec<Progress>>,
    changed: Condvar,
}

impl Readiness {
    /// `allocations` by base address and size, without duplicates.
    pub fn new(mut allocations: Vec<(Address, u64)>) -> Readiness {
        allocations.sort_unstable();
        Readiness {
            progress: Mutex::new(vec![Progress::Waiting; allocations.len()]),
            places: allocations
                .into_iter()
                .map(|(base, bytes)| Place {
                    base,
                    bytes,
                    end: AtomicU8::new(0),
                })
                .collect(),
            changed: Condvar::new(),
        }
    }

    fn progress(&self) -> MutexGuard<'_, Vec<Progress>> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The place of the allocation that contains `pointer`.
    fn find(&self, pointer: Address) -> Result<usize> {
        let after = self.places.partition_point(|place| place.base <= pointer);
        after
            .checked_sub(1)
            .filter(|&index| pointer - self.places[index].base < self.places[index].bytes)
            .ok_or_else(|| {
                Error::new(
                    ErrorKind::NotFound,
                    format!("pointer: {pointer:#x} is in no allocation of this resume"),
                )
            })
    }

    fn set(&self, base: Address, progress: Progress) {
        let Ok(index) = self.find(base) else { return };
        let mut all = self.progress();
        if matches!(all[index], Progress::Ready | Progress::Failed(_)) {
            return;
        }
        match progress {
            Progress::Ready => self.places[index].end.store(READY, Ordering::Release),
            Progress::Failed(_) => self.places[index].end.store(FAILED, Ordering::Release),
            Progress::Waiting | Progress::Queued(_) => {}
        }
        all[index] = progress;
        self.changed.notify_all();
    }

    pub fn queued(&self, base: Address, event: &Arc<SharedEvent>) {
        self.set(base, Progress::Queued(Arc::clone(event)));
    }

    pub fn ended(&self, base: Address, result: Result<()>) {
        self.set(
            base,
            result.map_or_else(Progress::Failed, |()| Progress::Ready),
        );
    }

    /// How the allocation at `base` ended, `None` if it has not.
    pub fn ended_well(&self, base: Address) -> Option<bool> {
        let index = self.find(base).ok()?;
        match self.places[index].end.load(Ordering::Acquire) {
            READY => Some(true),
            FAILED => Some(false),
            _ => None,
        }
    }

    /// Nothing more happens: what is not ready failed.
    pub fn close(&self, error: &Error) {
        for place in &self.places {
            self.set(place.base, Progress::Failed(error.clone()));
        }
    }

    /// Whether the contents at `pointer` are complete, or why they will not be.
    pub fn is_ready(&self, pointer: Address) -> Result<bool> {
        let index = self.find(pointer)?;
        match self.places[index].end.load(Ordering::Acquire) {
            READY => Ok(true),
            FAILED => match &self.progress()[index] {
                Progress::Failed(error) => Err(error.clone()),
                _ => Ok(false),
            },
            _ => Ok(false),
        }
    }

    /// Makes a stream of the host wait for the contents at `pointer`. Where they are not on their
    /// way yet, the calling thread waits until they are.
    pub fn stream_wait(&self, pointer: Address, stream: u64) -> Result<()> {
        process::check()?;
        let index = self.find(pointer)?;
        let event = loop {
            let progress = self.progress();
            match &progress[index] {
                Progress::Ready => return Ok(()),
                Progress::Failed(error) => return Err(error.clone()),
                Progress::Queued(event) if event.device().info().kind == DeviceKind::Cuda => {
                    break Arc::clone(event);
                }
                // The host device knows no streams of the host.
                Progress::Queued(_) | Progress::Waiting => {}
            }
            drop(
                self.changed
                    .wait_timeout(progress, EXIT_CHECK)
                    .unwrap_or_else(PoisonError::into_inner),
            );
            process::check()?;
        };
        // The event is not recorded anew as long as it is held here, and what is recorded in it now
        // counts, whatever happens to it later.
        event
            .device()
            .stream_wait(Stream::of_host(stream), event.event())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure() -> Error {
        Error::new(ErrorKind::Io, "lost")
    }

    #[test]
    fn pointers_into_allocations_are_found() {
        let readiness = Readiness::new(vec![(0x3000, 0x10), (0x1000, 0x100)]);
        readiness.ended(0x1000, Ok(()));
        assert!(readiness.is_ready(0x1000).unwrap());
        assert!(readiness.is_ready(0x10ff).unwrap());
        assert!(!readiness.is_ready(0x300f).unwrap());
        for outside in [0, 0xfff, 0x1100, 0x2fff, 0x3010] {
            let error = readiness.is_ready(outside).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::NotFound);
        }
    }

    #[test]
    fn an_end_is_final_and_closing_fails_the_rest() {
        let readiness = Readiness::new(vec![(1, 1), (2, 1), (3, 1)]);
        readiness.ended(1, Ok(()));
        readiness.ended(2, Err(failure()));
        readiness.close(&Error::new(ErrorKind::Cancelled, "stopped"));
        assert!(readiness.is_ready(1).unwrap());
        assert_eq!(readiness.is_ready(2).unwrap_err().kind(), ErrorKind::Io);
        let closed = readiness.stream_wait(3, 0).unwrap_err();
        assert_eq!(closed.kind(), ErrorKind::Cancelled);
        assert!(readiness.stream_wait(1, 0).is_ok());
    }
}
