//! The CUDA platform: finding the driver and its devices.
//!
//! One file each: [`driver`] the table of entry points, [`code`] what result codes mean, `context`
//! how a thread gets into a device's context and out, [`device`] one device, `probe` what it can do,
//! and by subject `vmm` addresses and physical memory, `ipc` memory as a descriptor, `stream`
//! streams, events and single copies, `copies` batched, pitched and peer copies, `kernels` our own
//! kernels, `pinned` host memory, `pointer` what is known of an address.
//!
//! The driver is called neither before [`CudaPlatform::open`], nor in a forked child, nor once the
//! process exits; every public call checks that first. It must be usable from any thread of the
//! host, whatever context is current there.

pub mod code;
mod context;
mod copies;
pub mod device;
pub mod driver;
mod ipc;
mod kernels;
mod pinned;
mod pointer;
mod probe;
mod stream;
mod vmm;

use std::sync::{Arc, OnceLock};

use super::{Device, DeviceKind, MemoryRange, Platform};
use crate::error::Result;
use crate::process;
use code::{INVALID_CONTEXT, SUCCESS};
pub use device::CudaDevice;
pub use driver::DriverTable;
use pointer::Attributes;

/// The visible CUDA devices of this process.
#[derive(Debug)]
pub struct CudaPlatform {
    driver: &'static DriverTable,
    version: u32,
    /// One place per ordinal, filled when that device is first asked for. A primary context stays
    /// retained as long as anyone holds its device.
    devices: Box<[OnceLock<Arc<CudaDevice>>]>,
}

impl CudaPlatform {
    /// Finds and initialises the driver. No context is made and no memory taken.
    ///
    /// [`crate::ErrorKind::NoDevice`] if there is no driver, no device, or a driver that is too
    /// old; [`crate::ErrorKind::Device`] if there is a driver and it fails.
    pub fn open() -> Result<CudaPlatform> {
        let driver = DriverTable::load()?;
        let (version, count) = driver.initialise()?;
        // After the driver set up its own exit handlers, so that ours runs before them.
        process::watch();
        if !driver.missing.is_empty() {
            tracing::info!(
                "the CUDA driver lacks {}; what needs them is off",
                driver.missing.join(", ")
            );
        }
        Ok(CudaPlatform {
            driver,
            version,
            devices: (0..count).map(|_| OnceLock::new()).collect(),
        })
    }

    /// The driver's entry points, for callers that pass a call through.
    pub fn driver(&self) -> &'static DriverTable {
        self.driver
    }

    /// See [`Platform::device`].
    pub fn cuda_device(&self, ordinal: u32) -> Result<Arc<CudaDevice>> {
        process::check()?;
        self.check_ordinal(ordinal)?;
        let slot = &self.devices[ordinal as usize];
        if let Some(device) = slot.get() {
            return Ok(Arc::clone(device));
        }
        // Outside of any lock, because making a context takes long. Of two threads that come here
        // at once the second gives its reference back.
        let device = CudaDevice::open(self.driver, ordinal, self.device_count(), self.version)?;
        Ok(Arc::clone(slot.get_or_init(|| Arc::new(device))))
    }

    /// `None` if the thread has no context or the driver does not tell.
    fn ordinal_of_thread(&self) -> Option<u32> {
        process::check().ok()?;
        if context::current(self.driver).ok()?.is_null() {
            return None;
        }
        let mut device = 0;
        // SAFETY: `device` is writable.
        let code = unsafe { (self.driver.cuCtxGetDevice)(&mut device) };
        let ordinal = u32::try_from(device).ok()?;
        (code == SUCCESS && ordinal < self.device_count()).then_some(ordinal)
    }
}

impl CudaPlatform {
    /// [`Attributes::of`] with the context of any open device current, if there is one.
    fn ask_in_a_context(&self, address: u64) -> Result<Result<Attributes, i32>> {
        let ask = || Ok(Attributes::of(self.driver, address));
        match self.devices.iter().find_map(OnceLock::get) {
            Some(device) => device.in_context(ask),
            None => ask(),
        }
    }

    /// Whether anybody in the process holds the primary context of a device; yes if the driver
    /// does not tell.
    fn primary_context_is_active(&self, ordinal: u32) -> bool {
        let Some(state) = self.driver.cuDevicePrimaryCtxGetState else {
            return true;
        };
        let (mut device, mut flags, mut active) = (0, 0, 0);
        // SAFETY: the out-parameters are local variables; the ordinal was checked by the caller.
        let code = unsafe {
            match (self.driver.cuDeviceGet)(&mut device, ordinal as i32) {
                SUCCESS => state(device, &mut flags, &mut active),
                code => code,
            }
        };
        code != SUCCESS || active != 0
    }
}

impl Platform for CudaPlatform {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Cuda
    }

    fn device_count(&self) -> u32 {
        self.devices.len() as u32
    }

    fn device(&self, ordinal: u32) -> Result<Arc<dyn Device>> {
        Ok(self.cuda_device(ordinal)?)
    }

    fn current_device(&self) -> u32 {
        self.ordinal_of_thread().unwrap_or(0)
    }

    /// Also `kernels`, once a device was opened that cannot run them.
    fn missing_symbols(&self) -> Vec<&'static str> {
        let mut opened = self.devices.iter().filter_map(OnceLock::get);
        let kernels = opened
            .any(|device| !device.has_kernels())
            .then_some("kernels");
        self.driver.missing.iter().copied().chain(kernels).collect()
    }

    fn classify(&self, address: u64) -> Result<MemoryRange> {
        process::check()?;
        let asked = match Attributes::of(self.driver, address) {
            Err(INVALID_CONTEXT) => self.ask_in_a_context(address)?,
            asked => asked,
        };
        let call = format_args!("cuPointerGetAttributes({address:#x})");
        let found = asked.map_err(|code| self.driver.error(code, call))?;
        found.range(address)
    }

    fn device_in_use(&self, ordinal: u32) -> Option<Arc<dyn Device>> {
        let slot = self.devices.get(ordinal as usize)?;
        // Somebody else in the process may work on a device that this platform never opened.
        if slot.get().is_none() && !self.primary_context_is_active(ordinal) {
            return None;
        }
        self.device(ordinal).ok()
    }
}
