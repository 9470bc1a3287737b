//! What memory is made of: [`Platform`] finds devices, [`Device`] reserves addresses, creates
//! physical memory, maps one into the other and moves bytes.
//!
//! Nothing in this folder knows about tags, pausing or backups. Two implementations: [`cuda`] over
//! the driver's virtual-memory functions, and [`host`] over memfd for machines without a GPU. Both
//! pass the suite in `c_tests/device_conformance.rs`.

mod check;
pub mod cuda;
pub mod fingerprint;
pub mod host;
mod piece;

use std::fmt;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
pub use piece::{Piece, Pitched};

/// A device address. On the host device it is also a host address.
pub type Address = u64;

/// Physical memory, named by its device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Physical(pub u64);

/// A queue of work of one device, created by [`Device::stream_create`] or given by the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Stream(pub u64);

impl Stream {
    /// A stream of the host: a `CUstream` (0 or 1 for the legacy stream, 2 for the thread's own).
    /// Work of the library that nobody asked to be there never goes to the default streams.
    pub fn of_host(handle: u64) -> Stream {
        // 0 stays the name of no stream.
        Stream(if handle == 0 { 1 } else { handle })
    }
}

/// A mark in a stream, created by [`Device::event_create`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Event(pub u64);

/// Which family a device belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DeviceKind {
    Host,
    Cuda,
}

impl fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DeviceKind::Host => "host",
            DeviceKind::Cuda => "cuda",
        })
    }
}

/// What is true of a device for its whole life.
#[derive(Clone, Debug)]
pub struct DeviceInfo {
    pub kind: DeviceKind,
    /// Position among the visible devices of its platform, from 0.
    pub ordinal: u32,
    pub name: String,
    /// Physical memory comes in multiples of this, bytes, a power of two.
    pub granularity: u64,
    /// 12080 for CUDA 12.8; 0 on the host device.
    pub driver_version: u32,
    /// Physical memory can be handed to another process as a file descriptor.
    pub can_export: bool,
    /// New physical memory is created for GPUDirect RDMA.
    pub rdma: bool,
    /// Ordinals of the devices that can be given access to this one's memory.
    pub peers: Vec<u32>,
    /// The NUMA node that the device is attached to, where the system tells.
    pub numa_node: Option<u32>,
}

/// Bytes of physical memory of a device, all processes counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryUse {
    pub free: u64,
    pub total: u64,
}

/// Options of new physical memory; the default is private memory without peers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct CreateOptions {
    /// Allow [`Device::export`].
    pub exportable: bool,
}

/// Which way a copy goes. The host side of `ToHost` and `ToDevice` is any host address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    ToHost,
    ToDevice,
    OnDevice,
}

/// What kind of memory an address belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    /// Host memory that no device can reach by itself.
    Pageable,
    /// Host memory that every device of the platform can reach: allocated by the driver or
    /// registered with it.
    Pinned,
    /// Memory that the driver moves between host and device.
    Managed,
    /// Memory of the device with this ordinal.
    Device(u32),
}

/// What is known of the memory around an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryRange {
    pub place: Place,
    /// The first address of which the same is known; for pageable memory, the address asked for.
    pub start: u64,
    /// Bytes from `start`; 0 where it is not known, which is always so for pageable memory.
    pub bytes: u64,
    /// Another one after the memory was freed and allocated anew at the same address; 0 where the
    /// platform does not tell.
    pub id: u64,
}

/// One device.
///
/// All sizes and addresses of physical memory are multiples of [`DeviceInfo::granularity`]; a
/// handle is mapped whole and a mapping is unmapped whole. Calls return at once unless they say
/// that they wait. A failed call has changed nothing. Any thread may call; the calling thread's
/// current device or context is the same afterwards.
pub trait Device: Send + Sync + fmt::Debug {
    fn info(&self) -> &DeviceInfo;

    fn memory(&self) -> Result<MemoryUse>;

    /// Reserves `bytes` of addresses without memory behind them, aligned to the granularity.
    fn reserve(&self, bytes: u64) -> Result<Address>;

    /// Gives back a whole reservation in which nothing is mapped.
    fn unreserve(&self, address: Address, bytes: u64) -> Result<()>;

    /// Creates physical memory. [`ErrorKind::OutOfDeviceMemory`] when there is not enough.
    fn create(&self, bytes: u64, options: CreateOptions) -> Result<Physical>;

    /// Releases physical memory. It goes when nothing maps it any more.
    fn release(&self, physical: Physical) -> Result<()>;

    /// Maps the whole of `physical` at `address`, without access for anyone yet.
    fn map(&self, address: Address, bytes: u64, physical: Physical) -> Result<()>;

    /// Gives this device and `peers` (ordinals) read and write access to mapped addresses. The
    /// range may span several neighbouring mappings.
    fn set_access(&self, address: Address, bytes: u64, peers: &[u32]) -> Result<()>;

    /// Unmaps one or several whole, neighbouring mappings. Waits for nothing: whoever calls made
    /// sure that no queued work uses the range.
    fn unmap(&self, address: Address, bytes: u64) -> Result<()>;

    /// Waits until all work queued on this device by this process is done. With a capture active
    /// that this would break: [`ErrorKind::Capture`], where it can be seen.
    fn synchronize(&self) -> Result<()>;

    /// Creates a stream that does not synchronise with the legacy stream.
    fn stream_create(&self) -> Result<Stream>;

    /// Destroys a stream; its queued work is still done.
    fn stream_destroy(&self, stream: Stream) -> Result<()>;

    /// Waits until the stream's work is done, and returns the first error of that work.
    fn stream_synchronize(&self, stream: Stream) -> Result<()>;

    /// Later work of `stream` waits for `event`.
    fn stream_wait(&self, stream: Stream, event: Event) -> Result<()>;

    /// Whether a stream of the host (a `CUstream`, 0 for the legacy stream) is being captured.
    fn is_capturing(&self, stream: u64) -> Result<bool>;

    fn event_create(&self) -> Result<Event>;

    fn event_destroy(&self, event: Event) -> Result<()>;

    fn event_record(&self, event: Event, stream: Stream) -> Result<()>;

    /// True when the work before the last record is done (or nothing was recorded).
    fn event_query(&self, event: Event) -> Result<bool>;

    /// Waits for the work before the last record.
    fn event_synchronize(&self, event: Event) -> Result<()>;

    /// Queues a copy of `bytes` from `source` to `destination`. Host memory must stay valid until
    /// the stream has passed the copy. A device range without memory behind it is an error, of
    /// this call or of the stream's next synchronisation, never a crash.
    ///
    /// # Safety
    /// The host side must be valid for `bytes`, and nobody else may touch it meanwhile.
    unsafe fn copy(
        &self,
        destination: u64,
        source: u64,
        bytes: u64,
        direction: Direction,
        stream: Stream,
    ) -> Result<()>;

    /// Whether [`Self::copy_pieces`] and [`Self::fingerprint`] work.
    fn has_kernels(&self) -> bool;

    /// Whether [`Self::copy_batch`] works.
    fn has_batch(&self) -> bool;

    /// Queues all pieces as one kernel. Any sizes and alignments, 0 bytes too; no destination may
    /// overlap another piece or its own source. A piece is copied by one warp: cut those of more
    /// than [`Piece::TILE`] bytes by [`Piece::tiles`], or they are slow. `list` is pinned memory and
    /// stays unchanged until the stream has passed the copy. `blocks` bounds the thread blocks of
    /// the kernel, of 8 warps each.
    ///
    /// # Safety
    /// As for [`Self::copy`], for each piece; both sides are memory that this device can reach
    /// (its own, a peer's to which it has access, or pinned), and so is the list.
    unsafe fn copy_pieces(
        &self,
        list: *const Piece,
        count: u32,
        blocks: u32,
        stream: Stream,
    ) -> Result<()>;

    /// Queues all pieces by one call of the driver, in no order among each other. An error names
    /// the piece at fault, `pieces[7]`, where it is known; pieces before it may be queued then. Not
    /// on the legacy stream: [`ErrorKind::Unsupported`].
    ///
    /// # Safety
    /// As for [`Self::copy`], for each piece.
    unsafe fn copy_batch(
        &self,
        pieces: &[Piece],
        direction: Direction,
        stream: Stream,
    ) -> Result<()>;

    /// Queues a pitched copy. Rows must not overlap.
    ///
    /// # Safety
    /// As for [`Self::copy`], for each row.
    unsafe fn copy_pitched(
        &self,
        copy: &Pitched,
        direction: Direction,
        stream: Stream,
    ) -> Result<()>;

    /// Queues a copy from this device's memory to that of the device `peer`, on a stream of this
    /// one. Neither device needs access to the other's memory. [`ErrorKind::Unsupported`] where the
    /// two cannot reach each other.
    ///
    /// # Safety
    /// As for [`Self::copy`].
    unsafe fn copy_to_peer(
        &self,
        destination: u64,
        peer: u32,
        source: u64,
        bytes: u64,
        stream: Stream,
    ) -> Result<()>;

    /// Queues the keyed fingerprints of blocks of this device's memory, see
    /// [`fingerprint::Key`]. `blocks` and `prints` are pinned memory with `count` entries; both
    /// stay valid, and the first unchanged, until the stream has passed the work.
    ///
    /// # Safety
    /// As above, and every block is readable device memory at a multiple of 16.
    unsafe fn fingerprint(
        &self,
        key: &fingerprint::Key,
        blocks: *const fingerprint::Block,
        prints: *mut fingerprint::Print,
        count: u32,
        stream: Stream,
    ) -> Result<()>;

    /// Queues setting `bytes` device bytes to `value`.
    fn fill(&self, address: Address, value: u8, bytes: u64, stream: Stream) -> Result<()>;

    /// Pins host memory, so that copies to and from it are asynchronous and at bus speed. Page
    /// aligned; valid for every device of the platform.
    ///
    /// # Safety
    /// The range must stay mapped until it is unregistered.
    unsafe fn register_host(&self, pointer: *mut u8, bytes: usize) -> Result<()>;

    /// Undoes [`Self::register_host`] of exactly that pointer.
    ///
    /// # Safety
    /// No copy that uses the range may be queued.
    unsafe fn unregister_host(&self, pointer: *mut u8) -> Result<()>;

    /// Does `work`, many calls of this device, at the cost of one entry into it. The calls report
    /// their failures themselves.
    fn together(&self, work: &mut dyn FnMut()) {
        work();
    }

    /// A descriptor that another process can import. Needs [`CreateOptions::exportable`].
    fn export(&self, physical: Physical) -> Result<OwnedFd>;

    /// Physical memory of another process. Release it like one's own.
    fn import(&self, descriptor: BorrowedFd<'_>, bytes: u64) -> Result<Physical>;
}

/// A family of devices that share addresses and pinned host memory.
pub trait Platform: Send + Sync + fmt::Debug {
    fn kind(&self) -> DeviceKind;

    /// Number of visible devices, at least 1.
    fn device_count(&self) -> u32;

    /// The device `ordinal`, made ready on the first call (on CUDA: its primary context retained).
    fn device(&self, ordinal: u32) -> Result<Arc<dyn Device>>;

    /// An error that names the argument unless there is a device `ordinal`.
    fn check_ordinal(&self, ordinal: u32) -> Result<()> {
        let count = self.device_count();
        if ordinal < count {
            return Ok(());
        }
        Err(Error::invalid(
            "device",
            format_args!(
                "{ordinal} does not exist, the last one is {}",
                count.saturating_sub(1)
            ),
        ))
    }

    /// Driver functions that are missing; the features that need them are off.
    fn missing_symbols(&self) -> Vec<&'static str> {
        Vec::new()
    }

    /// The device `ordinal` if this process already works with it; never makes it ready.
    fn device_in_use(&self, ordinal: u32) -> Option<Arc<dyn Device>> {
        self.device(ordinal).ok()
    }

    /// Ordinal of the calling thread's current device, 0 if it has none.
    fn current_device(&self) -> u32;

    /// What kind of memory `address` belongs to. Any address may be asked for; it is not read. An
    /// error for reserved device addresses without memory behind them, where that is known. Of
    /// virtual memory the CUDA driver names the whole reservation, of which other parts may be
    /// without memory.
    fn classify(&self, address: u64) -> Result<MemoryRange>;
}

/// Opens what `TMS_DEVICE` asks for: `auto` (CUDA if a driver and a device answer, else host),
/// `cuda` or `host`.
pub fn open_from_environment() -> Result<Arc<dyn Platform>> {
    let wanted = std::env::var("TMS_DEVICE").unwrap_or_default();
    open(&wanted).map_err(|error| match error.kind() {
        ErrorKind::InvalidArgument => error.context("TMS_DEVICE"),
        _ => error,
    })
}

/// See [`open_from_environment`]. In any case of letters; the empty string means `auto`.
pub fn open(wanted: &str) -> Result<Arc<dyn Platform>> {
    match wanted.to_ascii_lowercase().as_str() {
        "host" => Ok(Arc::new(host::HostPlatform::from_environment()?)),
        "cuda" => Ok(Arc::new(cuda::CudaPlatform::open()?)),
        "" | "auto" => match cuda::CudaPlatform::open() {
            Ok(platform) => Ok(Arc::new(platform)),
            Err(error) if error.kind() == ErrorKind::NoDevice => {
                tracing::info!("no CUDA device ({error}); using the host device");
                Ok(Arc::new(host::HostPlatform::from_environment()?))
            }
            Err(error) => Err(error),
        },
        other => Err(Error::invalid(
            "device",
            format_args!("\"{other}\" is none of auto, cuda, host"),
        )),
    }
}

/// `bytes` rounded up to a multiple of `granularity`, `None` on overflow.
pub fn round_up(bytes: u64, granularity: u64) -> Option<u64> {
    bytes.checked_next_multiple_of(granularity)
}
