//! Operations that run on a thread of the library: poll, wait, or watch a descriptor.
//!
//! What an operation does and how it ends is its owner's business: [`Op`] is generic over the end,
//! and one [`Service`] runs operations with different ends.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind, Result};

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Watched and steered from outside while an operation runs.
#[derive(Debug, Default)]
pub struct Control {
    pub done: AtomicU64,
    pub total: AtomicU64,
    /// Part of what is done: bytes that were in place already and were not moved.
    pub unchanged: AtomicU64,
    pub cancelled: AtomicBool,
}

impl Control {
    pub fn advance(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Begins to count, from 0 to `bytes`.
    pub fn expect(&self, bytes: u64) {
        self.total.store(bytes, Ordering::Relaxed);
        self.done.store(0, Ordering::Relaxed);
    }

    /// An error once the operation was cancelled or the process began to exit.
    pub fn check(&self) -> Result<()> {
        crate::process::check()?;
        if self.cancelled.load(Ordering::Relaxed) {
            return Err(Error::new(
                ErrorKind::Cancelled,
                "the operation was cancelled",
            ));
        }
        Ok(())
    }
}

/// How an operation ends.
pub trait Ending: Clone + Send + 'static {
    /// The end of an operation that did nothing because of an error.
    fn failed(error: Error) -> Self;
}

/// The end of an operation that works on bytes and on nothing else.
#[derive(Clone, Debug)]
pub struct Ended {
    pub status: Result<()>,
    /// Bytes that are certain to be done, whether it succeeded or not.
    pub bytes: u64,
}

impl Ending for Ended {
    fn failed(error: Error) -> Ended {
        Ended {
            status: Err(error),
            bytes: 0,
        }
    }
}

struct Shared<T> {
    outcome: Mutex<Option<T>>,
    changed: Condvar,
    /// Readable once the operation has ended, and from then on.
    eventfd: OwnedFd,
    control: Arc<Control>,
}

/// A running or ended operation. Dropping the handle does not stop it.
pub struct Op<T> {
    shared: Arc<Shared<T>>,
}

impl<T> Clone for Op<T> {
    fn clone(&self) -> Self {
        Op {
            shared: Arc::clone(&self.shared),
        }
    }
}

impl<T: Clone> Op<T> {
    fn new() -> Result<Op<T>> {
        // SAFETY: no pointer is passed.
        let raw = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if raw < 0 {
            return Err(Error::last_os("eventfd"));
        }
        Ok(Op {
            shared: Arc::new(Shared {
                outcome: Mutex::new(None),
                changed: Condvar::new(),
                // SAFETY: a fresh descriptor that nobody else owns.
                eventfd: unsafe { OwnedFd::from_raw_fd(raw) },
                control: Arc::default(),
            }),
        })
    }

    /// The outcome, once the operation has ended.
    pub fn outcome(&self) -> Option<T> {
        lock(&self.shared.outcome).clone()
    }

    pub fn is_done(&self) -> bool {
        lock(&self.shared.outcome).is_some()
    }

    /// Asks the operation to stop as soon as it can without losing anything. It ends with
    /// [`ErrorKind::Cancelled`] unless it was too far to stop.
    pub fn cancel(&self) {
        self.shared.control.cancelled.store(true, Ordering::Relaxed);
    }

    /// Waits for the end, at most `timeout` (`None`: for ever). `None` if it did not end in time.
    pub fn wait(&self, timeout: Option<Duration>) -> Option<T> {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let mut outcome = lock(&self.shared.outcome);
        while outcome.is_none() {
            outcome = match deadline {
                None => self
                    .shared
                    .changed
                    .wait(outcome)
                    .unwrap_or_else(PoisonError::into_inner),
                Some(deadline) => {
                    let left = deadline.checked_duration_since(Instant::now())?;
                    self.shared
                        .changed
                        .wait_timeout(outcome, left)
                        .unwrap_or_else(PoisonError::into_inner)
                        .0
                }
            };
        }
        outcome.clone()
    }

    /// Bytes copied so far and bytes to copy in all. Reads two counters of ours, nothing else.
    pub fn progress(&self) -> (u64, u64) {
        let control = &self.shared.control;
        (
            control.done.load(Ordering::Relaxed),
            control.total.load(Ordering::Relaxed),
        )
    }

    /// A descriptor that becomes readable at the end. It belongs to the operation.
    pub fn eventfd(&self) -> RawFd {
        self.shared.eventfd.as_raw_fd()
    }

    fn finish(&self, outcome: T) {
        *lock(&self.shared.outcome) = Some(outcome);
        self.shared.changed.notify_all();
        let one = 1u64.to_ne_bytes();
        // SAFETY: the descriptor is open and the buffer is 8 bytes. A counter that is full is
        // readable all the same.
        unsafe { libc::write(self.eventfd(), one.as_ptr().cast(), one.len()) };
    }
}

/// An operation in the queue, whatever its end.
trait Task: Send {
    /// Does one step; false to be called again later.
    fn step(&mut self) -> bool;

    /// Drops what the step holds.
    fn retire(&mut self);

    /// Tells of the end.
    fn announce(self: Box<Self>);
}

struct Stepped<T, S> {
    op: Op<T>,
    /// The outcome, or `None` to be called again later.
    step: Option<S>,
    outcome: Option<T>,
}

impl<T, S> Task for Stepped<T, S>
where
    T: Ending,
    S: FnMut(&Arc<Control>) -> Option<T> + Send,
{
    fn step(&mut self) -> bool {
        let control = &self.op.shared.control;
        let Some(step) = &mut self.step else {
            return true;
        };
        self.outcome =
            catch_unwind(AssertUnwindSafe(|| step(control))).unwrap_or_else(|_| Some(panicked()));
        self.outcome.is_some()
    }

    fn retire(&mut self) {
        self.step = None;
    }

    fn announce(self: Box<Self>) {
        self.op.finish(self.outcome.unwrap_or_else(panicked));
    }
}

fn panicked<T: Ending>() -> T {
    T::failed(Error::new(ErrorKind::Internal, "the operation panicked"))
}

#[derive(Default)]
struct Queue {
    tasks: VecDeque<Box<dyn Task>>,
    /// Operations whose end was not announced yet.
    unfinished: usize,
    running: bool,
}

/// Runs operations in the order they came, on one thread that exists while there are any. An
/// operation that waits for memory goes to the end, so that others can free some.
#[derive(Default)]
pub struct Service {
    queue: Arc<Mutex<Queue>>,
}

impl Service {
    /// Queues an operation. `step` returns its end, or `None` to be called again later.
    pub fn submit<T: Ending>(
        &self,
        step: impl FnMut(&Arc<Control>) -> Option<T> + Send + 'static,
    ) -> Result<Op<T>> {
        crate::process::watch();
        crate::process::check()?;
        let op = Op::new()?;
        let mut queue = lock(&self.queue);
        queue.tasks.push_back(Box::new(Stepped {
            op: op.clone(),
            step: Some(step),
            outcome: None,
        }));
        if !queue.running {
            let shared = Arc::clone(&self.queue);
            let spawned = std::thread::Builder::new()
                .name("tms-op".to_string())
                .spawn(move || serve(&shared));
            if let Err(error) = spawned {
                let refused = queue.tasks.pop_back();
                drop(queue);
                drop(refused);
                return Err(Error::io("starting a thread", error));
            }
            queue.running = true;
        }
        queue.unfinished += 1;
        Ok(op)
    }

    /// Whether any operation runs or waits.
    pub fn busy(&self) -> bool {
        lock(&self.queue).unfinished > 0
    }
}

fn serve(shared: &Mutex<Queue>) {
    loop {
        let mut queue = lock(shared);
        let Some(mut task) = queue.tasks.pop_front() else {
            queue.running = false;
            return;
        };
        drop(queue);
        if !task.step() {
            lock(shared).tasks.push_back(task);
            continue;
        }
        // Whoever hears of the end may free the saver at once: the step, which holds it, goes
        // first, and so does the mark that makes it busy.
        task.retire();
        lock(shared).unfinished -= 1;
        task.announce();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_with_different_ends_share_a_thread_and_keep_their_order() {
        let service = Service::default();
        let order = Arc::new(Mutex::new(Vec::new()));
        let mut tries = 0;
        let noted = Arc::clone(&order);
        let first = service
            .submit(move |control| {
                tries += 1;
                control.advance(10);
                lock(&noted).push("first");
                (tries == 2).then_some(Ended {
                    status: Ok(()),
                    bytes: 20,
                })
            })
            .unwrap();
        let noted = Arc::clone(&order);
        let second = service
            .submit(move |_| {
                lock(&noted).push("second");
                Some(Ended::failed(Error::invalid("this", "fails")))
            })
            .unwrap();
        assert_eq!(first.wait(None).unwrap().bytes, 20);
        assert_eq!(first.progress(), (20, 0));
        assert!(second.wait(None).unwrap().status.is_err());
        let order = lock(&order).clone();
        // The second may have come when the first was through.
        assert!(
            order == ["first", "second", "first"] || order == ["first", "first", "second"],
            "{order:?}"
        );
        let panics = service
            .submit(|_| -> Option<Ended> { panic!("deliberate") })
            .unwrap();
        let end = panics.wait(None).unwrap();
        assert_eq!(end.status.unwrap_err().kind(), ErrorKind::Internal);
        assert!(!service.busy());
    }

    #[test]
    fn a_cancelled_operation_notices() {
        let service = Service::default();
        let op = service
            .submit(|control| {
                let status = control.check();
                status.is_err().then_some(Ended { status, bytes: 0 })
            })
            .unwrap();
        op.cancel();
        let end = op.wait(None).unwrap();
        assert_eq!(end.status.unwrap_err().kind(), ErrorKind::Cancelled);
    }
}
