//! Questions to the driver about a device, asked once when the device is opened.
//!
//! None of them needs a context.

use std::ffi::{CStr, c_char, c_int};
use std::path::Path;

use cudarc::driver::sys::{CUdevice, CUdevice_attribute as Attribute};

use super::code::{INVALID_VALUE, NOT_SUPPORTED, SUCCESS};
use super::driver::DriverTable;
use super::vmm::{self, Purpose};
use crate::error::{Error, ErrorKind, Result};

/// A device and the driver to ask.
pub(super) struct Probe {
    driver: &'static DriverTable,
    pub(super) device: CUdevice,
}

impl Probe {
    pub(super) fn new(driver: &'static DriverTable, ordinal: u32) -> Result<Probe> {
        let mut device = 0;
        // SAFETY: `device` is writable.
        let code = unsafe { (driver.cuDeviceGet)(&mut device, ordinal as c_int) };
        driver.check(code, format_args!("cuDeviceGet({ordinal})"))?;
        Ok(Probe { driver, device })
    }

    pub(super) fn has(&self, attribute: Attribute) -> Result<bool> {
        let mut value = 0;
        // SAFETY: `value` is writable.
        let code = unsafe {
            (self.driver.cuDeviceGetAttribute)(&mut value, attribute as u32, self.device)
        };
        self.driver.check(
            code,
            format_args!(
                "cuDeviceGetAttribute({attribute:?}, device {})",
                self.device
            ),
        )?;
        Ok(value != 0)
    }

    pub(super) fn name(&self) -> Result<String> {
        let mut buffer: [c_char; 256] = [0; 256];
        // SAFETY: the buffer is as long as said, less the terminator that the driver may leave out.
        let code = unsafe {
            (self.driver.cuDeviceGetName)(
                buffer.as_mut_ptr(),
                buffer.len() as c_int - 1,
                self.device,
            )
        };
        self.driver.check(
            code,
            format_args!("cuDeviceGetName(device {})", self.device),
        )?;
        // SAFETY: the last byte is 0 in any case.
        let name = unsafe { CStr::from_ptr(buffer.as_ptr()) };
        Ok(name.to_string_lossy().into_owned())
    }

    /// The NUMA node of the slot that the device is in; `None` where nobody tells.
    pub(super) fn numa_node(&self) -> Option<u32> {
        let function = self.driver.cuDeviceGetPCIBusId?;
        let mut buffer: [c_char; 32] = [0; 32];
        // SAFETY: the buffer is as long as said, less a terminator that stays in any case.
        let code = unsafe { function(buffer.as_mut_ptr(), buffer.len() as c_int - 1, self.device) };
        if code != SUCCESS {
            return None;
        }
        // SAFETY: as above.
        let id = unsafe { CStr::from_ptr(buffer.as_ptr()) }.to_str().ok()?;
        node_of_slot(Path::new("/sys/bus/pci/devices"), id)
    }

    /// What fits all memory that will be created, and whether that can be memory for RDMA.
    pub(super) fn granularity(&self, can_export: bool) -> Result<(u64, bool)> {
        let rdma =
            self.has(Attribute::CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED)?;
        let (largest, rdma) = match self.largest_granularity(can_export, rdma) {
            Err(INVALID_VALUE | NOT_SUPPORTED) if rdma => {
                (self.largest_granularity(can_export, false), false)
            }
            largest => (largest, rdma),
        };
        let call = format_args!("cuMemGetAllocationGranularity(device {})", self.device);
        match largest {
            Ok(bytes) if bytes.is_power_of_two() => Ok((bytes, rdma)),
            Ok(bytes) => Err(Error::new(
                ErrorKind::Device,
                format!("{call}: {bytes} is not a power of two"),
            )),
            Err(code) => Err(self.driver.error(code, call)),
        }
    }

    fn largest_granularity(&self, can_export: bool, rdma: bool) -> Result<u64, c_int> {
        let purpose = |exportable| Purpose {
            device: self.device,
            exportable,
            rdma,
        };
        let private = vmm::granularity(self.driver, purpose(false))?;
        if !can_export {
            return Ok(private);
        }
        Ok(private.max(vmm::granularity(self.driver, purpose(true))?))
    }

    /// The devices that can be given access to memory of this one.
    pub(super) fn peers(&self, count: u32) -> Result<Vec<u32>> {
        let Some(function) = self.driver.cuDeviceCanAccessPeer else {
            return Ok(Vec::new());
        };
        let mut peers = Vec::new();
        for ordinal in 0..count {
            let other = Probe::new(self.driver, ordinal)?.device;
            if other == self.device {
                continue;
            }
            let mut can = 0;
            // SAFETY: `can` is writable.
            let code = unsafe { function(&mut can, other, self.device) };
            self.driver.check(
                code,
                format_args!("cuDeviceCanAccessPeer({other}, {})", self.device),
            )?;
            if can != 0 {
                peers.push(ordinal);
            }
        }
        Ok(peers)
    }
}

/// The system names slots in small letters, the driver in capitals; −1 means no node.
fn node_of_slot(slots: &Path, id: &str) -> Option<u32> {
    let file = slots.join(id.to_ascii_lowercase()).join("numa_node");
    std::fs::read_to_string(file).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_node_is_found_by_the_slot() {
        let slots = tempfile::tempdir().unwrap();
        for (slot, node) in [("0000:3b:00.0", "1\n"), ("0000:5e:00.0", "-1\n")] {
            std::fs::create_dir(slots.path().join(slot)).unwrap();
            std::fs::write(slots.path().join(slot).join("numa_node"), node).unwrap();
        }
        assert_eq!(node_of_slot(slots.path(), "0000:3B:00.0"), Some(1));
        assert_eq!(node_of_slot(slots.path(), "0000:5E:00.0"), None);
        assert_eq!(node_of_slot(slots.path(), "0000:AF:00.0"), None);
    }
}
