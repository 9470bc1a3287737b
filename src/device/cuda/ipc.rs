//! Physical memory as a file descriptor, to hand it to another process and take it from one.
//!
//! How the descriptor travels is no business of this file.

use std::ffi::{c_int, c_void};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use cudarc::driver::sys::CUmemAllocationHandleType;

use super::super::Physical;
use super::context::Current;
use crate::error::{Error, ErrorKind, Result};

const DESCRIPTOR: u32 = CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR.0;

pub(super) fn export(driver: &Current, physical: Physical) -> Result<OwnedFd> {
    let Some(function) = driver.cuMemExportToShareableHandle else {
        return Err(lacking("cuMemExportToShareableHandle"));
    };
    let mut descriptor: c_int = -1;
    let target = (&raw mut descriptor).cast::<c_void>();
    // SAFETY: for this handle type the driver writes one `int`.
    let code = unsafe { function(target, physical.0, DESCRIPTOR, 0) };
    driver.check(
        code,
        format_args!("cuMemExportToShareableHandle(handle {:#x})", physical.0),
    )?;
    if descriptor < 0 {
        return Err(Error::new(
            ErrorKind::Device,
            "cuMemExportToShareableHandle succeeded and gave no descriptor",
        ));
    }
    // SAFETY: the driver made the descriptor for the caller, who owns it now.
    let descriptor = unsafe { OwnedFd::from_raw_fd(descriptor) };
    close_on_exec(&descriptor)?;
    Ok(descriptor)
}

/// The driver does not promise the flag, and the descriptor is memory that no program started by
/// the host may inherit.
fn close_on_exec(descriptor: &OwnedFd) -> Result<()> {
    // SAFETY: an open descriptor and an integer.
    let result = unsafe { libc::fcntl(descriptor.as_raw_fd(), libc::F_SETFD, libc::FD_CLOEXEC) };
    if result != 0 {
        return Err(Error::last_os("fcntl(F_SETFD) of an exported handle"));
    }
    Ok(())
}

/// The descriptor stays the caller's.
pub(super) fn import(driver: &Current, descriptor: BorrowedFd<'_>) -> Result<Physical> {
    let Some(function) = driver.cuMemImportFromShareableHandle else {
        return Err(lacking("cuMemImportFromShareableHandle"));
    };
    let number = descriptor.as_raw_fd();
    let mut handle = 0;
    // SAFETY: `handle` is writable; for this handle type the number itself is passed as the pointer.
    let code = unsafe { function(&mut handle, number as usize as *mut c_void, DESCRIPTOR) };
    driver.check(
        code,
        format_args!("cuMemImportFromShareableHandle(descriptor {number})"),
    )?;
    Ok(Physical(handle))
}

fn lacking(function: &str) -> Error {
    Error::new(
        ErrorKind::Unsupported,
        format!("the CUDA driver lacks {function}"),
    )
}
