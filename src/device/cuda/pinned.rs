//! Host memory pinned for the devices.
//!
//! Which memory and for how long is the caller's business.

use std::ffi::{c_uint, c_void};

use cudarc::driver::sys::{CU_MEMHOSTREGISTER_DEVICEMAP, CU_MEMHOSTREGISTER_PORTABLE};

use super::context::Current;
use crate::error::{Error, ErrorKind, Result};

/// Pins for every context; `mapped` so that kernels can read and write the memory too.
///
/// # Safety
/// The range must stay mapped in this process until it is unregistered.
pub(super) unsafe fn register(
    driver: &Current,
    pointer: *mut u8,
    bytes: usize,
    mapped: bool,
) -> Result<()> {
    check_range(pointer, bytes)?;
    let mut flags = CU_MEMHOSTREGISTER_PORTABLE;
    if mapped {
        flags |= CU_MEMHOSTREGISTER_DEVICEMAP;
    }
    // SAFETY: by this function's contract.
    let code = unsafe { (driver.cuMemHostRegister_v2)(pointer.cast::<c_void>(), bytes, flags) };
    driver
        .check(
            code,
            format_args!("cuMemHostRegister({pointer:p}, {bytes} bytes)"),
        )
        .map_err(|error| match error.kind() {
            // What ran out is the memory that the system lets the process pin.
            ErrorKind::OutOfDeviceMemory => error.with_kind(ErrorKind::OutOfHostMemory),
            _ => error,
        })
}

/// # Safety
/// No work that uses the memory may be queued.
pub(super) unsafe fn unregister(driver: &Current, pointer: *mut u8) -> Result<()> {
    // SAFETY: the driver refuses what is not registered; the rest is this function's contract.
    let code = unsafe { (driver.cuMemHostUnregister)(pointer.cast::<c_void>()) };
    driver.check(code, format_args!("cuMemHostUnregister({pointer:p})"))
}

/// The flags of pinned memory that contains `pointer`; an error if it is not pinned.
pub(super) fn flags(driver: &Current, pointer: *const u8) -> Result<u32> {
    let Some(function) = driver.cuMemHostGetFlags else {
        return Err(Error::new(
            ErrorKind::Unsupported,
            "the CUDA driver lacks cuMemHostGetFlags",
        ));
    };
    let mut flags: c_uint = 0;
    // SAFETY: `flags` is writable; the driver only looks the address up.
    let code = unsafe { function(&mut flags, pointer.cast_mut().cast::<c_void>()) };
    driver.check(code, format_args!("cuMemHostGetFlags({pointer:p})"))?;
    Ok(flags)
}

fn check_range(pointer: *mut u8, bytes: usize) -> Result<()> {
    // SAFETY: reads a constant of the system.
    let page = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096);
    if pointer.is_null() || !pointer.addr().is_multiple_of(page) {
        return Err(Error::invalid(
            "pointer",
            format_args!("{pointer:p} is not the start of a page"),
        ));
    }
    if bytes == 0 || !bytes.is_multiple_of(page) {
        return Err(Error::invalid(
            "bytes",
            format_args!("{bytes} is not a multiple of {page}"),
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ptr;

    #[test]
    fn only_whole_pages_are_registered() {
        let at = |address: usize| ptr::without_provenance_mut(address);
        assert!(check_range(at(1 << 20), 1 << 20).is_ok());
        for (address, bytes) in [(0, 1 << 20), (1, 1 << 20), (1 << 20, 0), (1 << 20, 100)] {
            let error = check_range(at(address), bytes).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        }
    }
}
