//! One CUDA device: what it can do, and [`Device`] on top of the files beside this one.
//!
//! Arguments are checked here; every call then runs in the device's primary context.

use std::ffi::c_int;
use std::fmt;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::OnceLock;

use cudarc::driver::sys::{CUdevice, CUdevice_attribute as Attribute};

use super::super::fingerprint::{Block, Key, Print};
use super::super::{
    Address, CreateOptions, Device, DeviceInfo, DeviceKind, Direction, Event, MemoryUse, Physical,
    Piece, Pitched, Stream, check,
};
use super::code::{INVALID_VALUE, NOT_SUPPORTED};
use super::context::{Current, PrimaryContext, RelaxedCapture};
use super::driver::DriverTable;
use super::kernels::Kernels;
use super::probe::Probe;
use super::vmm::Purpose;
use super::{copies, ipc, pinned, stream, vmm};
use crate::error::{Error, ErrorKind, Result};
use crate::process;

/// A device whose primary context this process retains.
pub struct CudaDevice {
    driver: &'static DriverTable,
    context: PrimaryContext,
    /// The primary context of each device that was copied to, by its ordinal.
    peers: Box<[OnceLock<PrimaryContext>]>,
    /// `None` where they cannot be loaded, or cannot use pinned host memory at its own address.
    kernels: Option<Kernels>,
    device: CUdevice,
    info: DeviceInfo,
    /// What is true instead of `info` once the driver refused memory for GPUDirect RDMA.
    info_without_rdma: OnceLock<DeviceInfo>,
    /// Kernels can use pinned host memory.
    maps_host: bool,
}

impl CudaDevice {
    /// `ordinal` is below `count`.
    pub(super) fn open(
        driver: &'static DriverTable,
        ordinal: u32,
        count: u32,
        driver_version: u32,
    ) -> Result<CudaDevice> {
        let _mode = RelaxedCapture::begin(driver)?;
        let probe = Probe::new(driver, ordinal)?;
        if !probe.has(Attribute::CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED)? {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("device {ordinal} has no virtual memory management"),
            ));
        }
        // Before the rest, so that the device answers as it will while it is used.
        let context = PrimaryContext::retain(driver, probe.device)?;
        let can_export = driver.cuMemExportToShareableHandle.is_some()
            && probe
                .has(Attribute::CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED)?;
        let (granularity, rdma) = probe.granularity(can_export)?;
        let info = DeviceInfo {
            kind: DeviceKind::Cuda,
            ordinal,
            name: probe.name()?,
            granularity,
            driver_version,
            can_export,
            rdma,
            peers: probe.peers(count)?,
            numa_node: probe.numa_node(),
        };
        let maps_host = probe.has(Attribute::CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY)?;
        let reaches_host = maps_host
            && probe.has(Attribute::CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM)?;
        let kernels = Kernels::open(&context, ordinal, reaches_host);
        Ok(CudaDevice {
            driver,
            peers: (0..count).map(|_| OnceLock::new()).collect(),
            kernels,
            maps_host,
            device: probe.device,
            info_without_rdma: OnceLock::new(),
            context,
            info,
        })
    }

    fn kernels(&self) -> Result<&Kernels> {
        self.kernels.as_ref().ok_or_else(|| {
            Error::new(
                ErrorKind::Unsupported,
                format!(
                    "device {} runs no kernels of this library",
                    self.info.ordinal
                ),
            )
        })
    }

    /// The primary context of another device, which stays retained as long as this one's.
    fn peer(&self, ordinal: u32) -> Result<&PrimaryContext> {
        check::peer(&self.info, ordinal)?;
        let slot = &self.peers[ordinal as usize];
        if let Some(context) = slot.get() {
            return Ok(context);
        }
        // Outside of any lock; of two threads the second gives its reference back.
        let device = Probe::new(self.driver, ordinal)?.device;
        let context = PrimaryContext::retain(self.driver, device)?;
        Ok(slot.get_or_init(|| context))
    }

    /// The flags of pinned host memory that contains `pointer`; an error if it is not pinned.
    pub fn host_flags(&self, pointer: *const u8) -> Result<u32> {
        self.run(|driver| pinned::flags(driver, pointer))
    }

    /// Does `work` with this device's context current on the thread. Calls of this device inside of
    /// it cost no switch of context; those of others are allowed.
    pub fn in_context<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        self.run(|_| work())
    }

    fn run<T>(&self, work: impl FnOnce(&Current) -> Result<T>) -> Result<T> {
        self.context.run(work)
    }

    fn check_granules(&self, argument: &str, value: u64) -> Result<()> {
        let granularity = self.info.granularity;
        if !value.is_multiple_of(granularity) {
            return Err(Error::invalid(
                argument,
                format_args!("{value:#x} is not a multiple of {granularity:#x}"),
            ));
        }
        Ok(())
    }

    fn check_size(&self, bytes: u64) -> Result<()> {
        if bytes == 0 {
            return Err(Error::invalid("bytes", "must not be 0"));
        }
        self.check_granules("bytes", bytes)
    }

    fn check_range(&self, address: Address, bytes: u64) -> Result<()> {
        self.check_granules("address", address)?;
        self.check_size(bytes)
    }

    fn check_peers(&self, peers: &[u32]) -> Result<()> {
        let known = |peer: &u32| *peer == self.info.ordinal || self.info.peers.contains(peer);
        match peers.iter().find(|peer| !known(peer)) {
            None => Ok(()),
            Some(peer) => Err(Error::invalid(
                "peers",
                format_args!("device {peer} cannot reach device {}", self.info.ordinal),
            )),
        }
    }

    fn create_for(&self, driver: &Current, bytes: u64, purpose: Purpose) -> Result<Physical> {
        let plain = Purpose {
            rdma: false,
            ..purpose
        };
        match vmm::create(driver, bytes, purpose) {
            Ok(physical) => Ok(physical),
            // The device said that it can; without support for it beside the driver it refuses.
            Err(code @ (INVALID_VALUE | NOT_SUPPORTED)) if purpose.rdma => {
                let physical = vmm::create(driver, bytes, plain)
                    .map_err(|code| refused(driver, code, bytes, plain))?;
                self.turn_rdma_off(driver, code);
                Ok(physical)
            }
            Err(code) => Err(refused(driver, code, bytes, purpose)),
        }
    }

    fn turn_rdma_off(&self, driver: &Current, code: c_int) {
        let without = DeviceInfo {
            rdma: false,
            ..self.info.clone()
        };
        if self.info_without_rdma.set(without).is_ok() {
            tracing::warn!(
                "device {}: no memory for GPUDirect RDMA, {}; memory is created without",
                self.info.ordinal,
                driver.describe(code)
            );
        }
    }
}

impl Drop for CudaDevice {
    fn drop(&mut self) {
        let Some(kernels) = &self.kernels else { return };
        // Others may keep the context, and with it the modules.
        if process::check().is_ok() {
            let unloaded = self.run(|driver| {
                kernels.unload(driver);
                Ok(())
            });
            if let Err(error) = unloaded {
                tracing::warn!("device {}: kernels stay loaded: {error}", self.info.ordinal);
            }
        }
    }
}

fn refused(driver: &Current, code: c_int, bytes: u64, purpose: Purpose) -> Error {
    driver.error(
        code,
        format_args!("cuMemCreate({bytes} bytes, {purpose:?})"),
    )
}

impl fmt::Debug for CudaDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CudaDevice")
            .field("info", self.info())
            .finish_non_exhaustive()
    }
}

impl Device for CudaDevice {
    fn together(&self, work: &mut dyn FnMut()) {
        let mut done = false;
        // A context that cannot be entered is the failure of each call, not of the whole.
        let entered = self.in_context(|| {
            done = true;
            work();
            Ok(())
        });
        if entered.is_err() && !done {
            work();
        }
    }

    fn info(&self) -> &DeviceInfo {
        self.info_without_rdma.get().unwrap_or(&self.info)
    }

    fn memory(&self) -> Result<MemoryUse> {
        let (mut free, mut total) = (0, 0);
        self.run(|driver| {
            // SAFETY: both are writable.
            let code = unsafe { (driver.cuMemGetInfo_v2)(&mut free, &mut total) };
            driver.check(code, format_args!("cuMemGetInfo"))
        })?;
        Ok(MemoryUse {
            free: free as u64,
            total: total as u64,
        })
    }

    fn reserve(&self, bytes: u64) -> Result<Address> {
        self.check_size(bytes)?;
        self.run(|driver| vmm::reserve(driver, bytes, self.info.granularity))
    }

    fn unreserve(&self, address: Address, bytes: u64) -> Result<()> {
        self.check_range(address, bytes)?;
        self.run(|driver| vmm::unreserve(driver, address, bytes))
    }

    fn create(&self, bytes: u64, options: CreateOptions) -> Result<Physical> {
        self.check_size(bytes)?;
        if options.exportable && !self.info.can_export {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("device {} cannot export memory", self.info.ordinal),
            ));
        }
        let purpose = Purpose {
            device: self.device,
            exportable: options.exportable,
            rdma: self.info().rdma,
        };
        self.run(|driver| self.create_for(driver, bytes, purpose))
    }

    fn release(&self, physical: Physical) -> Result<()> {
        self.run(|driver| vmm::release(driver, physical))
    }

    fn map(&self, address: Address, bytes: u64, physical: Physical) -> Result<()> {
        self.check_range(address, bytes)?;
        self.run(|driver| vmm::map(driver, address, bytes, physical))
    }

    fn set_access(&self, address: Address, bytes: u64, peers: &[u32]) -> Result<()> {
        self.check_range(address, bytes)?;
        self.check_peers(peers)?;
        let others = peers
            .iter()
            .map(|peer| *peer as CUdevice)
            .filter(|peer| *peer != self.device);
        let devices = std::iter::once(self.device).chain(others);
        self.run(|driver| vmm::set_access(driver, address, bytes, devices))
    }

    fn unmap(&self, address: Address, bytes: u64) -> Result<()> {
        self.check_range(address, bytes)?;
        self.run(|driver| vmm::unmap(driver, address, bytes))
    }

    /// Seen before anything is broken is the capture of a blocking stream. With one of a
    /// non-blocking stream the driver refuses too, and breaks it.
    fn synchronize(&self) -> Result<()> {
        self.run(|driver| {
            if stream::is_capturing(driver, 0)? {
                return Err(Error::new(
                    ErrorKind::Capture,
                    format!("a stream of device {} is being captured", self.info.ordinal),
                ));
            }
            // SAFETY: takes nothing; the context is current.
            let code = unsafe { (driver.cuCtxSynchronize)() };
            driver.check(code, format_args!("cuCtxSynchronize"))
        })
    }

    fn stream_create(&self) -> Result<Stream> {
        self.run(stream::create)
    }

    fn stream_destroy(&self, stream: Stream) -> Result<()> {
        self.run(|driver| stream::destroy(driver, stream))
    }

    fn stream_synchronize(&self, stream: Stream) -> Result<()> {
        self.run(|driver| stream::synchronize(driver, stream))
    }

    fn stream_wait(&self, stream: Stream, event: Event) -> Result<()> {
        self.run(|driver| stream::wait(driver, stream, event))
    }

    fn is_capturing(&self, stream: u64) -> Result<bool> {
        self.run(|driver| stream::is_capturing(driver, stream))
    }

    fn event_create(&self) -> Result<Event> {
        self.run(stream::event_create)
    }

    fn event_destroy(&self, event: Event) -> Result<()> {
        self.run(|driver| stream::event_destroy(driver, event))
    }

    fn event_record(&self, event: Event, stream: Stream) -> Result<()> {
        self.run(|driver| stream::event_record(driver, event, stream))
    }

    fn event_query(&self, event: Event) -> Result<bool> {
        self.run(|driver| stream::event_query(driver, event))
    }

    fn event_synchronize(&self, event: Event) -> Result<()> {
        self.run(|driver| stream::event_synchronize(driver, event))
    }

    unsafe fn copy(
        &self,
        destination: u64,
        source: u64,
        bytes: u64,
        direction: Direction,
        stream: Stream,
    ) -> Result<()> {
        self.run(|driver| {
            if bytes == 0 {
                return Ok(());
            }
            // SAFETY: the caller's contract is the same.
            unsafe { stream::copy(driver, destination, source, bytes, direction, stream) }
        })
    }

    fn has_kernels(&self) -> bool {
        self.kernels.is_some()
    }

    fn has_batch(&self) -> bool {
        self.driver.cuMemcpyBatchAsync.is_some()
    }

    unsafe fn copy_pieces(
        &self,
        list: *const Piece,
        count: u32,
        blocks: u32,
        stream: Stream,
    ) -> Result<()> {
        check::pointer("list", list, count)?;
        check::blocks(blocks)?;
        let kernels = self.kernels()?;
        self.run(|driver| {
            if count == 0 {
                return Ok(());
            }
            // SAFETY: the caller's contract is the same.
            unsafe { kernels.copy_pieces(driver, list, count, blocks, stream) }
        })
    }

    unsafe fn copy_batch(
        &self,
        pieces: &[Piece],
        _direction: Direction,
        stream: Stream,
    ) -> Result<()> {
        check::not_legacy(stream)?;
        // SAFETY: the caller's contract is the same.
        self.run(|driver| unsafe { copies::batch(driver, pieces, stream) })
    }

    unsafe fn copy_pitched(
        &self,
        copy: &Pitched,
        direction: Direction,
        stream: Stream,
    ) -> Result<()> {
        copy.check()?;
        self.run(|driver| {
            if copy.is_empty() {
                return Ok(());
            }
            // SAFETY: the caller's contract is the same.
            unsafe { copies::pitched(driver, copy, direction, stream) }
        })
    }

    unsafe fn copy_to_peer(
        &self,
        destination: u64,
        peer: u32,
        source: u64,
        bytes: u64,
        stream: Stream,
    ) -> Result<()> {
        let peer = self.peer(peer)?.handle();
        let piece = Piece {
            destination,
            source,
            bytes,
        };
        self.run(|driver| {
            if bytes == 0 {
                return Ok(());
            }
            // SAFETY: the caller's contract is the same; this device retains both contexts.
            unsafe { copies::to_peer(driver, piece, peer, self.context.handle(), stream) }
        })
    }

    unsafe fn fingerprint(
        &self,
        key: &Key,
        blocks: *const Block,
        prints: *mut Print,
        count: u32,
        stream: Stream,
    ) -> Result<()> {
        check::pointer("blocks", blocks, count)?;
        check::pointer("prints", prints, count)?;
        let kernels = self.kernels()?;
        self.run(|driver| {
            if count == 0 {
                return Ok(());
            }
            // SAFETY: the caller's contract is the same.
            unsafe { kernels.fingerprint(driver, key, blocks, prints, count, stream) }
        })
    }

    fn fill(&self, address: Address, value: u8, bytes: u64, stream: Stream) -> Result<()> {
        self.run(|driver| {
            if bytes == 0 {
                return Ok(());
            }
            stream::fill(driver, address, value, bytes, stream)
        })
    }

    unsafe fn register_host(&self, pointer: *mut u8, bytes: usize) -> Result<()> {
        // SAFETY: the caller's contract is the same.
        self.run(|driver| unsafe { pinned::register(driver, pointer, bytes, self.maps_host) })
    }

    unsafe fn unregister_host(&self, pointer: *mut u8) -> Result<()> {
        // SAFETY: the caller's contract is the same.
        self.run(|driver| unsafe { pinned::unregister(driver, pointer) })
    }

    fn export(&self, physical: Physical) -> Result<OwnedFd> {
        self.run(|driver| ipc::export(driver, physical))
    }

    /// The driver does not tell the size behind a descriptor; a wrong `bytes` shows when it is
    /// mapped.
    fn import(&self, descriptor: BorrowedFd<'_>, bytes: u64) -> Result<Physical> {
        self.check_size(bytes)?;
        self.run(|driver| ipc::import(driver, descriptor))
    }
}
