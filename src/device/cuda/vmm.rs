//! Addresses and physical memory: reserve, create, map, give access, and the way back.
//!
//! Nothing here remembers what was made; the driver does, and it refuses what does not fit.

use std::ffi::c_int;
use std::mem;

use cudarc::driver::sys::{
    CUdevice, CUmemAccess_flags, CUmemAccessDesc, CUmemAllocationGranularity_flags,
    CUmemAllocationHandleType, CUmemAllocationProp, CUmemAllocationType, CUmemLocation,
    CUmemLocationType,
};

use super::super::{Address, Physical};
use super::code::SUCCESS;
use super::context::Current;
use super::driver::DriverTable;
use crate::error::Result;

/// What physical memory is made for. The same settings are used to ask for the granularity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Purpose {
    pub(super) device: CUdevice,
    pub(super) exportable: bool,
    pub(super) rdma: bool,
}

impl Purpose {
    fn properties(self) -> CUmemAllocationProp {
        // SAFETY: plain integers and a pointer; all zeros is a valid value of each but the enums,
        // and 0 is the "invalid" or "none" variant of those.
        let mut properties: CUmemAllocationProp = unsafe { mem::zeroed() };
        properties.type_ = CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED;
        properties.location = location(self.device);
        if self.exportable {
            properties.requestedHandleTypes =
                CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
        }
        properties.allocFlags.gpuDirectRDMACapable = self.rdma.into();
        properties
    }
}

fn location(device: CUdevice) -> CUmemLocation {
    CUmemLocation {
        type_: CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE,
        id: device,
    }
}

/// The larger of the least and the recommended granularity, or the driver's code.
pub(super) fn granularity(driver: &DriverTable, purpose: Purpose) -> Result<u64, c_int> {
    let properties = purpose.properties();
    let mut largest = 0;
    for option in [
        CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_MINIMUM,
        CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_RECOMMENDED,
    ] {
        let mut bytes = 0;
        // SAFETY: both pointers are to locals.
        let code = unsafe {
            (driver.cuMemGetAllocationGranularity)(&mut bytes, &properties, option as u32)
        };
        if code != SUCCESS {
            return Err(code);
        }
        largest = largest.max(bytes as u64);
    }
    Ok(largest)
}

pub(super) fn reserve(driver: &Current, bytes: u64, alignment: u64) -> Result<Address> {
    let mut address = 0;
    // SAFETY: `address` is writable.
    let code = unsafe {
        (driver.cuMemAddressReserve)(&mut address, bytes as usize, alignment as usize, 0, 0)
    };
    driver.check(code, format_args!("cuMemAddressReserve({bytes} bytes)"))?;
    Ok(address)
}

pub(super) fn unreserve(driver: &Current, address: Address, bytes: u64) -> Result<()> {
    // SAFETY: the driver refuses what is no whole reservation without mappings.
    let code = unsafe { (driver.cuMemAddressFree)(address, bytes as usize) };
    driver.check(
        code,
        format_args!("cuMemAddressFree({address:#x}, {bytes} bytes)"),
    )
}

/// Physical memory, or the driver's code.
pub(super) fn create(driver: &Current, bytes: u64, purpose: Purpose) -> Result<Physical, c_int> {
    let mut handle = 0;
    // SAFETY: both pointers are to locals.
    let code =
        unsafe { (driver.cuMemCreate)(&mut handle, bytes as usize, &purpose.properties(), 0) };
    match code {
        SUCCESS => Ok(Physical(handle)),
        code => Err(code),
    }
}

pub(super) fn release(driver: &Current, physical: Physical) -> Result<()> {
    // SAFETY: the driver refuses a value that is no handle.
    let code = unsafe { (driver.cuMemRelease)(physical.0) };
    driver.check(code, format_args!("cuMemRelease(handle {:#x})", physical.0))
}

pub(super) fn map(
    driver: &Current,
    address: Address,
    bytes: u64,
    physical: Physical,
) -> Result<()> {
    // SAFETY: the driver refuses what is not reserved, is mapped already, or is not the whole
    // handle.
    let code = unsafe { (driver.cuMemMap)(address, bytes as usize, 0, physical.0, 0) };
    driver.check(
        code,
        format_args!(
            "cuMemMap({address:#x}, {bytes} bytes, handle {:#x})",
            physical.0
        ),
    )
}

pub(super) fn unmap(driver: &Current, address: Address, bytes: u64) -> Result<()> {
    // SAFETY: the driver refuses a range that is not made of whole mappings; the caller made sure
    // that no work uses it.
    let code = unsafe { (driver.cuMemUnmap)(address, bytes as usize) };
    driver.check(
        code,
        format_args!("cuMemUnmap({address:#x}, {bytes} bytes)"),
    )
}

/// Read and write access for all of `devices`.
pub(super) fn set_access(
    driver: &Current,
    address: Address,
    bytes: u64,
    devices: impl Iterator<Item = CUdevice>,
) -> Result<()> {
    let wanted: Vec<_> = devices
        .map(|device| CUmemAccessDesc {
            location: location(device),
            flags: CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
        })
        .collect();
    // SAFETY: the list is as long as said; the driver refuses what is not mapped.
    let code =
        unsafe { (driver.cuMemSetAccess)(address, bytes as usize, wanted.as_ptr(), wanted.len()) };
    driver.check(
        code,
        format_args!(
            "cuMemSetAccess({address:#x}, {bytes} bytes, {} devices)",
            wanted.len()
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn properties_say_the_purpose() {
        let purpose = Purpose {
            device: 3,
            exportable: false,
            rdma: false,
        };
        let private = purpose.properties();
        assert_eq!(private.location.id, 3);
        assert_eq!(private.requestedHandleTypes.0, 0);
        assert_eq!(private.allocFlags.gpuDirectRDMACapable, 0);
        let shared = Purpose {
            exportable: true,
            rdma: true,
            ..purpose
        };
        assert_eq!(shared.properties().requestedHandleTypes.0, 1);
        assert_eq!(shared.properties().allocFlags.gpuDirectRDMACapable, 1);
    }
}
