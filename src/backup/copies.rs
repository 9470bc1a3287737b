//! Copies of one store that are queued when their host memory is ready, by this thread or by the one
//! that made it so.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::error::{Error, ErrorKind, Result};
use crate::transfer::{Block, Control};

#[derive(Default)]
struct State {
    /// Copies that are not queued yet.
    outstanding: usize,
    error: Option<Error>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    control: Arc<Control>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues one copy, unless another failed before.
    fn queue(&self, ready: Result<()>, copy: impl FnOnce() -> Result<()>) -> Result<()> {
        ready?;
        if let Some(error) = &self.state().error {
            return Err(error.clone());
        }
        self.control.check()?;
        catch_unwind(AssertUnwindSafe(copy))
            .unwrap_or_else(|_| Err(Error::new(ErrorKind::Internal, "queueing a copy panicked")))
    }
}

pub(super) struct Copies {
    shared: Arc<Shared>,
}

impl Copies {
    pub fn new(control: &Arc<Control>) -> Copies {
        Copies {
            shared: Arc::new(Shared {
                state: Mutex::default(),
                changed: Condvar::new(),
                control: Arc::clone(control),
            }),
        }
    }

    /// Has `copy` done when `block` is ready. An error says that one of the copies before failed.
    /// [`Self::wait`] must follow before the block or what the copy uses may go.
    pub fn queue(
        &self,
        block: &Block,
        copy: impl FnOnce() -> Result<()> + Send + 'static,
    ) -> Result<()> {
        {
            let mut state = self.shared.state();
            if let Some(error) = &state.error {
                return Err(error.clone());
            }
            state.outstanding += 1;
        }
        let shared = Arc::clone(&self.shared);
        block.when_ready(move |ready| {
            let result = shared.queue(ready, copy);
            let mut state = shared.state();
            state.outstanding -= 1;
            if let Err(error) = result {
                state.error.get_or_insert(error);
            }
            shared.changed.notify_all();
        });
        Ok(())
    }

    /// Waits until every copy is queued or failed, and returns the first failure.
    pub fn wait(&self) -> Result<()> {
        let state = self
            .shared
            .changed
            .wait_while(self.shared.state(), |state| state.outstanding > 0)
            .unwrap_or_else(PoisonError::into_inner);
        state.error.clone().map_or(Ok(()), Err)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Platform;
    use crate::device::host::HostPlatform;
    use crate::transfer::Engine;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn copies_into_growing_memory_are_all_queued_before_the_wait_ends() {
        let platform: Arc<dyn Platform> = Arc::new(HostPlatform::new(1, 1 << 30));
        let device = platform.device(0).unwrap();
        let engine = Engine::new(platform).unwrap();
        let blocks = engine
            .arena()
            .allocate(&device, &[96 << 20, 1 << 20, 160 << 20])
            .unwrap();
        let copies = Copies::new(&Arc::default());
        let done = Arc::new(AtomicUsize::new(0));
        for _ in 0..2 {
            for block in &blocks {
                let done = Arc::clone(&done);
                copies
                    .queue(block, move || {
                        done.fetch_add(1, Ordering::Relaxed);
                        Ok(())
                    })
                    .unwrap();
            }
            copies.wait().unwrap();
        }
        assert_eq!(done.load(Ordering::Relaxed), 6);
    }

    #[test]
    fn the_first_failure_ends_the_others() {
        let platform: Arc<dyn Platform> = Arc::new(HostPlatform::new(1, 1 << 30));
        let device = platform.device(0).unwrap();
        let engine = Engine::new(platform).unwrap();
        let block = engine
            .arena()
            .allocate(&device, &[1 << 20])
            .unwrap()
            .remove(0);
        block.wait().unwrap();
        let copies = Copies::new(&Arc::default());
        copies.queue(&block, || panic!("deliberate")).unwrap();
        assert_eq!(copies.wait().unwrap_err().kind(), ErrorKind::Internal);
        let refused = copies.queue(&block, || unreachable!("after a failure"));
        assert_eq!(refused.unwrap_err().kind(), ErrorKind::Internal);
    }
}
