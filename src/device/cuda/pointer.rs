//! What the driver knows of an address.

use std::ffi::{c_int, c_uint, c_void};
use std::ptr;

use cudarc::driver::sys::{CUmemorytype, CUpointer_attribute as Attribute};

use super::super::{MemoryRange, Place};
use super::code::SUCCESS;
use super::driver::DriverTable;
use crate::error::{Error, ErrorKind, Result};

const HOST: c_uint = CUmemorytype::CU_MEMORYTYPE_HOST as c_uint;
const DEVICE: c_uint = CUmemorytype::CU_MEMORYTYPE_DEVICE as c_uint;

/// The attributes of an address, all zeros for one that the driver does not know.
#[derive(Default)]
pub(super) struct Attributes {
    memory_type: c_uint,
    ordinal: c_int,
    is_managed: c_uint,
    start: u64,
    bytes: usize,
    id: u64,
}

impl Attributes {
    /// Asks the driver, or gives its code. No current context is needed; a driver that wants one
    /// says so by its code.
    pub(super) fn of(driver: &DriverTable, address: u64) -> Result<Attributes, c_int> {
        let mut found = Attributes::default();
        let mut data: [(c_uint, *mut c_void); 6] = [
            (
                Attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE as c_uint,
                ptr::from_mut(&mut found.memory_type).cast(),
            ),
            (
                Attribute::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL as c_uint,
                ptr::from_mut(&mut found.ordinal).cast(),
            ),
            (
                Attribute::CU_POINTER_ATTRIBUTE_IS_MANAGED as c_uint,
                ptr::from_mut(&mut found.is_managed).cast(),
            ),
            (
                Attribute::CU_POINTER_ATTRIBUTE_RANGE_START_ADDR as c_uint,
                ptr::from_mut(&mut found.start).cast(),
            ),
            (
                Attribute::CU_POINTER_ATTRIBUTE_RANGE_SIZE as c_uint,
                ptr::from_mut(&mut found.bytes).cast(),
            ),
            (
                Attribute::CU_POINTER_ATTRIBUTE_BUFFER_ID as c_uint,
                ptr::from_mut(&mut found.id).cast(),
            ),
        ];
        let mut names = data.map(|(name, _)| name);
        let mut places = data.each_mut().map(|(_, place)| *place);
        // SAFETY: both lists have that many entries, and each place has the size of its attribute;
        // that of the boolean is large enough for a driver that writes an integer, and zero before.
        let code = unsafe {
            (driver.cuPointerGetAttributes)(
                names.len() as c_uint,
                names.as_mut_ptr(),
                places.as_mut_ptr(),
                address,
            )
        };
        match code {
            SUCCESS => Ok(found),
            code => Err(code),
        }
    }

    /// For virtual memory the driver gives the whole reservation as the range.
    pub(super) fn range(&self, address: u64) -> Result<MemoryRange> {
        let place = match self.memory_type {
            _ if self.is_managed != 0 => Place::Managed,
            HOST => Place::Pinned,
            DEVICE => Place::Device(u32::try_from(self.ordinal).map_err(|_| {
                let why = format!("{address:#x} is memory of no device ({})", self.ordinal);
                Error::new(ErrorKind::Device, why)
            })?),
            _ if self.bytes > 0 => {
                let why = format!("no memory is mapped at {address:#x}");
                return Err(Error::invalid("address", why));
            }
            _ => {
                return Ok(MemoryRange {
                    place: Place::Pageable,
                    start: address,
                    bytes: 0,
                    id: 0,
                });
            }
        };
        Ok(MemoryRange {
            place,
            start: self.start,
            bytes: self.bytes as u64,
            id: self.id,
        })
    }
}
