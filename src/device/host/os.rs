//! The system calls of the host device, each behind a function that returns a [`Result`].
//!
//! Nothing here knows what is mapped where; `memory` decides that before it calls.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use crate::device::Address;
use crate::error::{Error, ErrorKind, Result};

/// What lies at an address range.
#[derive(Clone, Copy)]
pub(super) enum Content {
    /// Addresses that are only kept.
    Nothing,
    /// Memory of a file from an offset on, readable and writable or not accessible at all.
    File {
        file: RawFd,
        offset: u64,
        accessible: bool,
    },
}

/// Keeps `bytes` of addresses, the first a multiple of `alignment` (a power of two).
pub(super) fn reserve(bytes: u64, alignment: u64) -> Result<Address> {
    let padded = bytes
        .checked_add(alignment)
        .ok_or_else(|| Error::invalid("bytes", format_args!("{bytes} is more than fits")))?;
    let start = place(0, padded, Content::Nothing, 0)
        .map_err(|error| Error::io(format_args!("reserving {bytes} bytes"), error))?;
    let aligned = start.next_multiple_of(alignment);
    let trimmed = unmap(start, aligned - start)
        .and_then(|()| unmap(aligned + bytes, start + padded - (aligned + bytes)));
    if let Err(error) = trimmed {
        // Whatever is left of the attempt goes back whole; a hole in it does not matter to munmap.
        let _ = unmap(start, padded);
        return Err(error);
    }
    Ok(aligned)
}

/// Gives addresses back to the system. The caller owns them; 0 bytes is nothing.
pub(super) fn unmap(address: Address, bytes: u64) -> Result<()> {
    if bytes == 0 {
        return Ok(());
    }
    // SAFETY: the range was reserved by this device and nothing of it is in use any more.
    let status = unsafe { libc::munmap(address as *mut libc::c_void, bytes as usize) };
    if status == 0 {
        Ok(())
    } else {
        Err(Error::last_os(format_args!(
            "munmap of {bytes} bytes at {address:#x}"
        )))
    }
}

/// Replaces what lies at a range of reserved addresses.
pub(super) fn replace(address: Address, bytes: u64, content: Content) -> Result<()> {
    match place(address, bytes, content, libc::MAP_FIXED) {
        Ok(_) => Ok(()),
        Err(error) => Err(Error::io(
            format_args!("mmap of {bytes} bytes at {address:#x}"),
            error,
        )),
    }
}

/// After a failed [`replace`]: makes sure that `content`, which was there before, is still there.
/// Old kernels can leave a hole.
pub(super) fn restore(address: Address, bytes: u64, content: Content) -> Result<()> {
    match place(address, bytes, content, libc::MAP_FIXED_NOREPLACE) {
        Ok(found) if found == address => Ok(()),
        // A kernel before 4.17 takes the address as a hint only.
        Ok(elsewhere) => unmap(elsewhere, bytes),
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
        Err(error) => Err(Error::io(
            format_args!("restoring {bytes} bytes at {address:#x}"),
            error,
        )),
    }
}

fn place(address: Address, bytes: u64, content: Content, how: i32) -> std::io::Result<Address> {
    let (protection, flags, file, offset) = match content {
        Content::Nothing => (
            libc::PROT_NONE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        ),
        Content::File {
            file,
            offset,
            accessible,
        } => (
            protection(accessible),
            libc::MAP_SHARED | libc::MAP_NORESERVE,
            file,
            offset,
        ),
    };
    // SAFETY: with MAP_FIXED the range lies inside a reservation of this device (the caller checked
    // it) and no running copy uses it; otherwise the kernel replaces nothing.
    let pointer = unsafe {
        libc::mmap(
            address as *mut libc::c_void,
            bytes as usize,
            protection,
            flags | how,
            file,
            offset as libc::off_t,
        )
    };
    if pointer == libc::MAP_FAILED {
        return Err(std::io::Error::last_os_error());
    }
    Ok(pointer as Address)
}

fn protection(accessible: bool) -> i32 {
    if accessible {
        libc::PROT_READ | libc::PROT_WRITE
    } else {
        libc::PROT_NONE
    }
}

/// Makes mapped memory readable and writable, or not accessible.
pub(super) fn protect(address: Address, bytes: u64, accessible: bool) -> Result<()> {
    // SAFETY: the range is mapped by this device, and memory that goes out of reach is not in use.
    let status = unsafe {
        libc::mprotect(
            address as *mut libc::c_void,
            bytes as usize,
            protection(accessible),
        )
    };
    if status == 0 {
        Ok(())
    } else {
        Err(Error::last_os(format_args!(
            "mprotect of {bytes} bytes at {address:#x}"
        )))
    }
}

/// Asks for huge pages. A wish: most systems leave them off for shared memory.
pub(super) fn prefer_huge_pages(address: Address, bytes: u64) {
    // SAFETY: advice on a range mapped by this device; it changes no contents.
    unsafe {
        libc::madvise(
            address as *mut libc::c_void,
            bytes as usize,
            libc::MADV_HUGEPAGE,
        )
    };
}

/// An empty file in memory that does not survive `exec`.
pub(super) fn memory_file() -> Result<OwnedFd> {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: the name is a NUL-terminated literal.
    let descriptor = unsafe { libc::memfd_create(c"tms-host".as_ptr(), flags) };
    if descriptor < 0 {
        return Err(Error::last_os("memfd_create"));
    }
    // SAFETY: a descriptor just made, owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// Sets the length of a file. Refused, not fatal, above the file size limit of the process.
pub(super) fn set_length(file: &OwnedFd, bytes: u64) -> Result<()> {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: writes one rlimit.
    let known = unsafe { libc::getrlimit(libc::RLIMIT_FSIZE, &mut limit) } == 0;
    // Beyond the limit the kernel would send SIGXFSZ, which ends the process.
    if known && bytes > limit.rlim_cur {
        return Err(Error::new(
            ErrorKind::OutOfDeviceMemory,
            format!(
                "{bytes} bytes are above the file size limit of {} (ulimit -f)",
                limit.rlim_cur
            ),
        ));
    }
    // SAFETY: a plain call on a descriptor that is owned here.
    if unsafe { libc::ftruncate(file.as_raw_fd(), bytes as libc::off_t) } == 0 {
        Ok(())
    } else {
        Err(Error::last_os(format_args!("ftruncate to {bytes} bytes")))
    }
}

/// Gives the pages of a part of a memory file back to the system.
pub(super) fn punch(file: &OwnedFd, offset: u64, bytes: u64) -> Result<()> {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    loop {
        // SAFETY: a plain call on a descriptor that is owned here; nothing maps the part any more.
        let status = unsafe {
            libc::fallocate(
                file.as_raw_fd(),
                mode,
                offset as libc::off_t,
                bytes as libc::off_t,
            )
        };
        if status == 0 {
            return Ok(());
        }
        let error = std::io::Error::last_os_error();
        if error.kind() != std::io::ErrorKind::Interrupted {
            return Err(Error::io("fallocate(PUNCH_HOLE)", error));
        }
    }
}

/// Fixes the length of a memory file, so that no holder can cut memory away under another.
pub(super) fn seal_length(file: &OwnedFd) -> Result<()> {
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: a plain call on a descriptor that is owned here.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } == 0 {
        Ok(())
    } else {
        Err(Error::last_os("fcntl(F_ADD_SEALS)"))
    }
}

/// Whether a descriptor is a memory file that cannot shrink any more.
pub(super) fn is_sealed(file: BorrowedFd<'_>) -> bool {
    // SAFETY: a plain call on a borrowed descriptor; on anything but a memory file it fails.
    let seals = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
    seals >= 0 && seals & libc::F_SEAL_SHRINK != 0
}

/// Length in bytes, and what tells two files apart: (device, inode).
pub(super) fn length_and_identity(file: BorrowedFd<'_>) -> Result<(u64, (u64, u64))> {
    // SAFETY: all zeroes is a valid `stat`, a plain struct of integers.
    let mut status: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: writes one stat.
    if unsafe { libc::fstat(file.as_raw_fd(), &mut status) } != 0 {
        return Err(Error::last_os("fstat"));
    }
    Ok((status.st_size as u64, (status.st_dev, status.st_ino)))
}

/// Another descriptor of the same file.
pub(super) fn duplicate(file: BorrowedFd<'_>) -> Result<OwnedFd> {
    file.try_clone_to_owned()
        .map_err(|error| Error::io("duplicating a descriptor", error))
}

/// Bytes of a page.
pub(super) fn page_size() -> u64 {
    // SAFETY: no arguments in memory.
    let bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    u64::try_from(bytes).unwrap_or(4096)
}

/// Bytes of memory of this machine.
pub(super) fn total_memory() -> Result<u64> {
    // SAFETY: all zeroes is a valid `sysinfo`, a plain struct of integers.
    let mut information: libc::sysinfo = unsafe { std::mem::zeroed() };
    // SAFETY: writes one sysinfo.
    if unsafe { libc::sysinfo(&mut information) } != 0 {
        return Err(Error::last_os("sysinfo"));
    }
    Ok(information.totalram * u64::from(information.mem_unit))
}

/// Runs `start`, which creates a thread, so that the thread never runs a signal handler of the host
/// program. Signals of faults stay open, or a crash handler would not see them.
pub(super) fn without_signals<T>(start: impl FnOnce() -> T) -> T {
    let mut before = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    let mut blocked = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: `sigfillset` writes `blocked` before `sigdelset` and `pthread_sigmask` read it; the
    // last writes `before`.
    let changed = unsafe {
        libc::sigfillset(blocked.as_mut_ptr());
        for fault in [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL] {
            libc::sigdelset(blocked.as_mut_ptr(), fault);
        }
        libc::pthread_sigmask(libc::SIG_SETMASK, blocked.as_ptr(), before.as_mut_ptr()) == 0
    };
    let result = start();
    if changed {
        // SAFETY: `before` was written by the call that changed the mask.
        unsafe {
            libc::pthread_sigmask(libc::SIG_SETMASK, before.as_ptr(), std::ptr::null_mut());
        }
    }
    result
}
