//! Operations that run on a thread of the library: poll, wait, or watch a descriptor.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::{Outcome, lock};
use crate::error::{Error, ErrorKind, Result};
use crate::transfer::Control;

struct Shared {
    outcome: Mutex<Option<Outcome>>,
    changed: Condvar,
    /// Readable once the operation has ended, and from then on.
    eventfd: OwnedFd,
    control: Arc<Control>,
}

/// A running or ended operation. Dropping the handle does not stop it.
#[derive(Clone)]
pub struct Op {
    shared: Arc<Shared>,
}

impl Op {
    fn new() -> Result<Op> {
        // SAFETY: no pointer is passed.
        let raw = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if raw < 0 {
            return Err(Error::last_os("eventfd"));
        }
        Ok(Op {
            shared: Arc::new(Shared {
                outcome: Mutex::default(),
                changed: Condvar::new(),
                // SAFETY: a fresh descriptor that nobody else owns.
                eventfd: unsafe { OwnedFd::from_raw_fd(raw) },
                control: Arc::default(),
            }),
        })
    }

    /// The outcome, once the operation has ended.
    pub fn outcome(&self) -> Option<Outcome> {
        lock(&self.shared.outcome).clone()
    }

    pub fn is_done(&self) -> bool {
        lock(&self.shared.outcome).is_some()
    }

    /// Waits for the end, at most `timeout` (`None`: for ever). `None` if it did not end in time.
    pub fn wait(&self, timeout: Option<Duration>) -> Option<Outcome> {
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

    fn finish(&self, outcome: Outcome) {
        *lock(&self.shared.outcome) = Some(outcome);
        self.shared.changed.notify_all();
        let one = 1u64.to_ne_bytes();
        // SAFETY: the descriptor is open and the buffer is 8 bytes. A counter that is full is
        // readable all the same.
        unsafe { libc::write(self.eventfd(), one.as_ptr().cast(), one.len()) };
    }
}

/// One step of an operation: the outcome, or `None` to be called again later.
type Step = Box<dyn FnMut(&Arc<Control>) -> Option<Outcome> + Send>;

struct Task {
    op: Op,
    step: Step,
}

#[derive(Default)]
struct Queue {
    tasks: VecDeque<Task>,
    /// Operations whose end was not announced yet.
    unfinished: usize,
    running: bool,
}

/// Runs operations in the order they came, on one thread that exists while there are any. An
/// operation that waits for memory goes to the end, so that others can free some.
#[derive(Default)]
pub(super) struct Service {
    queue: Arc<Mutex<Queue>>,
}

impl Service {
    pub fn submit(
        &self,
        step: impl FnMut(&Arc<Control>) -> Option<Outcome> + Send + 'static,
    ) -> Result<Op> {
        crate::process::watch();
        crate::process::check()?;
        let op = Op::new()?;
        let mut queue = lock(&self.queue);
        queue.tasks.push_back(Task {
            op: op.clone(),
            step: Box::new(step),
        });
        if !queue.running {
            let shared = Arc::clone(&self.queue);
            let spawned = std::thread::Builder::new()
                .name("tms-op".to_string())
                .spawn(move || serve(&shared));
            if let Err(error) = spawned {
                queue.tasks.pop_back();
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
        let control = Arc::clone(&task.op.shared.control);
        let stepped = catch_unwind(AssertUnwindSafe(|| (task.step)(&control)));
        let outcome = match stepped {
            Ok(None) => {
                lock(shared).tasks.push_back(task);
                continue;
            }
            Ok(Some(outcome)) => outcome,
            Err(_) => Outcome::failed(Error::new(ErrorKind::Internal, "the operation panicked")),
        };
        // Whoever hears of the end may free the saver at once: the step, which holds it, goes
        // first, and so does the mark that makes it busy.
        let Task { op, step } = task;
        drop(step);
        lock(shared).unfinished -= 1;
        op.finish(outcome);
    }
}
