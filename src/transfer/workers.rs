//! A small pool of threads for work that keeps the bus busy: populating and pinning memory, copying
//! between staging and pageable memory, file input and output. Jobs never wait for other jobs.

use std::any::Any;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::error::{Error, ErrorKind, Result};

type Job = Box<dyn FnOnce() + Send>;

/// More threads than this do not copy faster: so many reach the speed of the memory.
const MOST: usize = 16;

/// Threads that give pages back at the same time. One needs a tenth of the time of a resume from
/// ordinary memory (measured on an H200: 27 ms for 10.7 GB).
const DISPOSERS: usize = 4;

struct Queue {
    jobs: VecDeque<Job>,
    /// What is to be dropped, and how many jobs are at that.
    refuse: VecDeque<Box<dyn Any + Send>>,
    disposing: usize,
    threads: usize,
    idle: usize,
    stopping: bool,
}

struct Shared {
    /// Protects the queue only; never held while a job runs.
    queue: Mutex<Queue>,
    changed: Condvar,
    disposed: Condvar,
    most: usize,
}

/// Threads start when there is work and stop when the pool is dropped.
pub struct Workers {
    shared: Arc<Shared>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Workers {
    /// At most `threads` threads, at least one.
    pub fn new(threads: usize) -> Workers {
        Workers {
            shared: Arc::new(Shared {
                queue: Mutex::new(Queue {
                    jobs: VecDeque::new(),
                    refuse: VecDeque::new(),
                    disposing: 0,
                    threads: 0,
                    idle: 0,
                    stopping: false,
                }),
                changed: Condvar::new(),
                disposed: Condvar::new(),
                most: threads.clamp(1, MOST),
            }),
        }
    }

    pub fn most(&self) -> usize {
        self.shared.most
    }

    /// Queues a job. If no thread can be started, the caller's thread does the work.
    pub fn submit(&self, job: impl FnOnce() + Send + 'static) {
        let mut queue = lock(&self.shared.queue);
        queue.jobs.push_back(Box::new(job));
        if queue.idle >= queue.jobs.len() || queue.threads >= self.shared.most {
            self.shared.changed.notify_one();
            return;
        }
        let shared = Arc::clone(&self.shared);
        let spawned = std::thread::Builder::new()
            .name(format!("tms-copy-{}", queue.threads))
            .spawn(move || serve(&shared));
        match spawned {
            Ok(_) => queue.threads += 1,
            Err(error) if queue.threads > 0 => {
                tracing::debug!("could not start another copy thread: {error}");
                self.shared.changed.notify_one();
            }
            Err(error) => {
                tracing::warn!("could not start a copy thread: {error}");
                let job = queue.jobs.pop_back();
                drop(queue);
                if let Some(job) = job {
                    job();
                }
            }
        }
    }
}

impl Workers {
    /// Drops something whose end takes long. See [`Self::wait_for_disposal`].
    pub fn dispose(&self, refuse: Box<dyn Any + Send>) {
        {
            let mut queue = lock(&self.shared.queue);
            queue.refuse.push_back(refuse);
            if queue.disposing == DISPOSERS {
                return;
            }
            queue.disposing += 1;
        }
        let shared = Arc::clone(&self.shared);
        self.submit(move || {
            loop {
                let mut queue = lock(&shared.queue);
                let Some(refuse) = queue.refuse.pop_front() else {
                    queue.disposing -= 1;
                    shared.disposed.notify_all();
                    return;
                };
                drop(queue);
                drop(refuse);
            }
        });
    }

    /// Waits until all that was to be dropped is.
    pub fn wait_for_disposal(&self) {
        drop(
            self.shared
                .disposed
                .wait_while(lock(&self.shared.queue), |queue| queue.disposing > 0)
                .unwrap_or_else(PoisonError::into_inner),
        );
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        lock(&self.shared.queue).stopping = true;
        self.shared.changed.notify_all();
    }
}

fn serve(shared: &Shared) {
    let mut queue = lock(&shared.queue);
    loop {
        if let Some(job) = queue.jobs.pop_front() {
            drop(queue);
            job();
            queue = lock(&shared.queue);
        } else if queue.stopping {
            return;
        } else {
            queue.idle += 1;
            queue = shared
                .changed
                .wait(queue)
                .unwrap_or_else(PoisonError::into_inner);
            queue.idle -= 1;
        }
    }
}

struct BatchState {
    outstanding: usize,
    error: Option<Error>,
}

/// Jobs that belong together: wait for all, learn the first error.
#[derive(Clone)]
pub struct Batch {
    state: Arc<(Mutex<BatchState>, Condvar)>,
}

impl Default for Batch {
    fn default() -> Self {
        let state = BatchState {
            outstanding: 0,
            error: None,
        };
        Batch {
            state: Arc::new((Mutex::new(state), Condvar::new())),
        }
    }
}

impl Batch {
    /// Queues a job of this batch. A panic in it becomes an internal error of the batch.
    pub fn submit(&self, workers: &Workers, job: impl FnOnce() -> Result<()> + Send + 'static) {
        lock(&self.state.0).outstanding += 1;
        let batch = self.clone();
        workers.submit(move || {
            let result = catch_unwind(AssertUnwindSafe(job))
                .unwrap_or_else(|_| Err(Error::new(ErrorKind::Internal, "a copy thread panicked")));
            let mut state = lock(&batch.state.0);
            state.outstanding -= 1;
            if let Err(error) = result {
                state.error.get_or_insert(error);
            }
            batch.state.1.notify_all();
        });
    }

    /// True once a job failed: there is no point in queueing more.
    pub fn failed(&self) -> bool {
        lock(&self.state.0).error.is_some()
    }

    /// Waits for all jobs and returns the first error.
    pub fn wait(&self) -> Result<()> {
        let mut state = lock(&self.state.0);
        while state.outstanding > 0 {
            state = self
                .state
                .1
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        state.error.take().map_or(Ok(()), Err)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn a_batch_waits_for_all_and_keeps_the_first_error() {
        let workers = Workers::new(3);
        let done = Arc::new(AtomicUsize::new(0));
        let batch = Batch::default();
        for index in 0..100 {
            let done = Arc::clone(&done);
            batch.submit(&workers, move || {
                done.fetch_add(1, Ordering::Relaxed);
                if index == 50 {
                    return Err(Error::invalid("index", "fifty"));
                }
                Ok(())
            });
        }
        assert_eq!(batch.wait().unwrap_err().kind(), ErrorKind::InvalidArgument);
        assert_eq!(done.load(Ordering::Relaxed), 100);
    }

    #[test]
    fn what_is_disposed_of_is_gone_after_the_wait() {
        struct Counted(Arc<AtomicUsize>);
        impl Drop for Counted {
            fn drop(&mut self) {
                std::thread::yield_now();
                self.0.fetch_add(1, Ordering::SeqCst);
            }
        }
        let workers = Workers::new(3);
        let done = Arc::new(AtomicUsize::new(0));
        workers.wait_for_disposal();
        for round in 1..=10 {
            for _ in 0..50 {
                workers.dispose(Box::new(Counted(Arc::clone(&done))));
            }
            workers.wait_for_disposal();
            assert_eq!(done.load(Ordering::SeqCst), 50 * round);
        }
    }

    #[test]
    fn a_panic_is_an_error() {
        let workers = Workers::new(1);
        let batch = Batch::default();
        batch.submit(&workers, || panic!("deliberate"));
        assert_eq!(batch.wait().unwrap_err().kind(), ErrorKind::Internal);
        batch.submit(&workers, || Ok(()));
        batch.wait().unwrap();
    }
}
