//! How bytes move between devices and host memory: streams, pinned memory, staging, threads.
//!
//! One [`Engine`] serves one platform. It knows spans of device memory and places in host memory;
//! what a span means, and when it may be copied, is decided above.

mod adopt;
pub mod arena;
mod chunk;
pub mod copy;
mod growth;
mod limits;
pub(crate) mod pages;
mod ring;
pub mod staging;
mod streams;
mod workers;

use std::any::Any;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub use adopt::Adopted;
pub use arena::{Arena, ArenaStats, ArenaUse, Block};
pub use limits::Headroom;
pub use streams::{Settled, SharedEvent, Streams};
pub use workers::{Batch, Workers};

use crate::config;
use crate::device::{Address, Device, DeviceKind, Direction, Platform};
use crate::error::{Error, Result};
pub use crate::op::Control;

/// What a resume without retention keeps pinned for the next pause, unless `TMS_PINNED_KEEP` says
/// otherwise.
const DEFAULT_KEEP: u64 = 16 << 30;

/// How an engine is made; zeros mean the defaults.
#[derive(Clone, Copy, Debug, Default)]
pub struct EngineOptions {
    /// Threads that copy, populate and pin: at most the cores, and at most 16. The default is as
    /// many as that (half on the host device, which has threads of its own).
    pub threads: u32,
    /// Pinned memory that bytes pass through on their way to and from pageable memory, files and
    /// stores; in whole slots of 4 MiB, at least two. The default is two for each thread. It is
    /// taken when first needed.
    pub staging_bytes: u64,
}

/// A range of device memory.
#[derive(Clone, Debug)]
pub struct Span {
    pub device: Arc<dyn Device>,
    pub address: Address,
    pub bytes: u64,
}

/// Everything that moves bytes for one platform.
pub struct Engine {
    platform: Arc<dyn Platform>,
    workers: Arc<Workers>,
    arena: Arena,
    /// Streams by ordinal; never held across a device call.
    streams: Mutex<Vec<Option<Arc<Streams>>>>,
    ring: Mutex<Option<Arc<staging::Ring>>>,
    /// For lists that devices read and write, kept from one pause to the next.
    scratch: Mutex<Option<Block>>,
    staging_bytes: usize,
    /// What explicit copies know and hold, see [`copy::Copier`].
    copies: copy::State,
    /// Memory that a device may still use, because it could not be asked whether it is done.
    quarantine: Mutex<Vec<Kept>>,
}

/// What must outlive the work of a device that could not be waited for.
struct Kept {
    device: Arc<dyn Device>,
    _memory: Box<dyn Any + Send>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.copies.settle();
        self.drain_quarantine();
        // What a device may still use is lost to the process rather than given to somebody else.
        std::mem::forget(std::mem::take(&mut *lock(&self.quarantine)));
        if let Some(ring) = lock(&self.ring).take()
            && !ring.is_settled()
        {
            std::mem::forget(ring);
        }
    }
}

impl Engine {
    /// See [`Self::with_options`].
    pub fn new(platform: Arc<dyn Platform>) -> Result<Engine> {
        Engine::with_options(platform, EngineOptions::default())
    }

    /// Reads `TMS_PINNED_LIMIT` and `TMS_PINNED_KEEP` (bytes, with an optional unit).
    pub fn with_options(platform: Arc<dyn Platform>, options: EngineOptions) -> Result<Engine> {
        let limit = config::size_from_environment("TMS_PINNED_LIMIT")?.unwrap_or(u64::MAX);
        let keep = config::size_from_environment("TMS_PINNED_KEEP")?.unwrap_or(DEFAULT_KEEP);
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        // The host device has threads of its own; together they stay below the number of cores.
        let threads = match (options.threads, platform.kind()) {
            (0, DeviceKind::Cuda) => cores,
            (0, DeviceKind::Host) => cores.div_ceil(2),
            (wanted, _) => cores.min(wanted as usize),
        };
        let workers = Arc::new(Workers::new(threads));
        let staging_bytes = match options.staging_bytes {
            0 => workers.most() * staging::DEPTH * staging::PIECE,
            bytes => usize::try_from(bytes)
                .ok()
                .filter(|&bytes| bytes <= isize::MAX as usize)
                .ok_or_else(|| Error::invalid("staging_bytes", "does not fit the address space"))?,
        };
        Ok(Engine {
            arena: Arena::new(Arc::clone(&workers), limit, keep),
            workers,
            platform,
            streams: Mutex::default(),
            ring: Mutex::default(),
            scratch: Mutex::default(),
            staging_bytes,
            copies: copy::State::default(),
            quarantine: Mutex::default(),
        })
    }

    pub fn platform(&self) -> &Arc<dyn Platform> {
        &self.platform
    }

    pub fn workers(&self) -> &Arc<Workers> {
        &self.workers
    }

    pub fn arena(&self) -> &Arena {
        &self.arena
    }

    /// Whether an explicit copy runs as an operation, or waits for its turn.
    pub fn is_copying(&self) -> bool {
        self.copies.busy()
    }

    /// The streams of a device, created on the first call.
    pub fn streams(&self, device: &Arc<dyn Device>) -> Result<Arc<Streams>> {
        let index = device.info().ordinal as usize;
        let known = |streams: &[Option<Arc<Streams>>]| streams.get(index).cloned().flatten();
        if let Some(existing) = known(&lock(&self.streams)) {
            return Ok(existing);
        }
        // Not under the lock, which malloc takes. Of two threads that come here at once, one gives
        // its streams back.
        let created = Arc::new(Streams::new(Arc::clone(device))?);
        let mut streams = lock(&self.streams);
        if let Some(existing) = known(&streams) {
            drop(streams);
            return Ok(existing);
        }
        if streams.len() <= index {
            streams.resize(index + 1, None);
        }
        streams[index] = Some(Arc::clone(&created));
        Ok(created)
    }

    /// The staging ring, created (and its memory touched) on the first call, which is a pause.
    pub fn ring(&self, device: &Arc<dyn Device>) -> Result<Arc<staging::Ring>> {
        let mut ring = lock(&self.ring);
        if let Some(existing) = &*ring {
            return Ok(Arc::clone(existing));
        }
        let created = Arc::new(staging::Ring::new(&self.arena, device, self.staging_bytes)?);
        *ring = Some(Arc::clone(&created));
        Ok(created)
    }

    /// Pinned memory for lists that a device reads and writes, to be given back by
    /// [`Self::keep_scratch`].
    pub fn take_scratch(&self, device: &Arc<dyn Device>, bytes: u64) -> Result<Block> {
        let kept = lock(&self.scratch).take();
        match kept {
            Some(kept) if kept.bytes() as u64 >= bytes => Ok(kept),
            // A chunk of its own, which keeps no chunk of backups pinned.
            _ => self.arena.allocate_alone(device, bytes),
        }
    }

    /// Keeps the memory for the next [`Self::take_scratch`].
    pub fn keep_scratch(&self, memory: Block) {
        let replaced = lock(&self.scratch).replace(memory);
        drop(replaced);
    }

    /// Waits for the copies queued on the devices of `spans`. Unless it is certain that none runs
    /// any more, `memory` is kept until that is known.
    pub fn settle<M: Send + 'static>(
        &self,
        devices: &[Arc<dyn Device>],
        direction: Direction,
        memory: impl Fn() -> M,
    ) -> Result<()> {
        let mut failure = None;
        for device in devices {
            match self.streams(device)?.settle(direction) {
                Settled::Done => {}
                Settled::Failed(error) => failure = Some(error),
                Settled::Unknown(error) => {
                    self.keep(Arc::clone(device), Box::new(memory()));
                    failure = Some(error);
                }
            }
        }
        failure.map_or(Ok(()), Err)
    }

    /// Keeps memory until `device` is known to be done.
    pub fn keep(&self, device: Arc<dyn Device>, memory: Box<dyn Any + Send>) {
        tracing::warn!(
            "memory is kept until the device {} answers",
            device.info().ordinal
        );
        lock(&self.quarantine).push(Kept {
            device,
            _memory: memory,
        });
    }

    /// Gives up what was kept for devices that answer again.
    pub fn drain_quarantine(&self) {
        let kept = std::mem::take(&mut *lock(&self.quarantine));
        if kept.is_empty() {
            return;
        }
        let (done, still): (Vec<_>, Vec<_>) = kept
            .into_iter()
            .partition(|kept| kept.device.synchronize().is_ok());
        lock(&self.quarantine).extend(still);
        drop(done);
    }

    /// Copies device memory to the host and waits. Work of other streams is not waited for.
    pub fn read(&self, device: &Arc<dyn Device>, address: Address, into: &mut [u8]) -> Result<()> {
        staging::read_device(self, device, address, into)
    }

    /// Copies host memory to the device and waits. Work of other streams is not waited for.
    pub fn write(&self, device: &Arc<dyn Device>, address: Address, from: &[u8]) -> Result<()> {
        staging::write_device(self, device, address, from)
    }
}

/// The distinct devices of some spans, in order of appearance.
pub fn devices_of<'a>(spans: impl IntoIterator<Item = &'a Span>) -> Vec<Arc<dyn Device>> {
    let mut devices: Vec<Arc<dyn Device>> = Vec::new();
    for span in spans {
        let ordinal = span.device.info().ordinal;
        if !devices
            .iter()
            .any(|device| device.info().ordinal == ordinal)
        {
            devices.push(Arc::clone(&span.device));
        }
    }
    devices
}
