//! What can go wrong, once, for the whole crate: an [`Error`] has a kind, a context and a source.
//!
//! The table [`ErrorKind::code`] is the only place where kinds and C status codes meet. Nothing here
//! knows about C strings or threads; that is the business of `ffi`.

use std::ffi::CStr;
use std::fmt;
use std::sync::Arc;

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// One kind per status code of the C headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// An argument is out of its range, or two arguments contradict each other.
    InvalidArgument,
    /// A pointer that must not be NULL is NULL.
    NullPointer,
    /// The address, key, tag or file is not known.
    NotFound,
    /// The device cannot give the physical memory.
    OutOfDeviceMemory,
    /// The host cannot give the memory, or a limit set for it was reached.
    OutOfHostMemory,
    /// This device, driver or build cannot do what was asked.
    Unsupported,
    /// No driver, no device, or a driver that cannot be used.
    NoDevice,
    /// A driver call failed; the device may still be used.
    Device,
    /// The device is lost for this process (a sticky error). Backups in host memory stay readable.
    DeviceLost,
    /// The object is in use.
    Busy,
    /// A deadline passed.
    Timeout,
    /// Reading or writing a file failed.
    Io,
    /// A disk or pool is full.
    NoSpace,
    /// Contents do not match their checksum or length.
    Corrupt,
    /// The memory is exported to other processes, so releasing it here would free nothing.
    Exported,
    /// A stream capture is active and forbids the call.
    Capture,
    /// The library was used before `fork`; the child cannot use it.
    Forked,
    /// The process is exiting, or the library was shut down.
    Shutdown,
    /// Two copies of the library in one process do not match.
    Abi,
    /// Part of the selection was done and part was not; the result lists which.
    Partial,
    /// The operation was cancelled before it changed anything.
    Cancelled,
    /// A defect of this library.
    Internal,
}

impl ErrorKind {
    /// Every kind, in the order of its code.
    pub const ALL: [ErrorKind; 22] = [
        ErrorKind::InvalidArgument,
        ErrorKind::NullPointer,
        ErrorKind::NotFound,
        ErrorKind::OutOfDeviceMemory,
        ErrorKind::OutOfHostMemory,
        ErrorKind::Unsupported,
        ErrorKind::NoDevice,
        ErrorKind::Device,
        ErrorKind::DeviceLost,
        ErrorKind::Busy,
        ErrorKind::Timeout,
        ErrorKind::Io,
        ErrorKind::NoSpace,
        ErrorKind::Corrupt,
        ErrorKind::Exported,
        ErrorKind::Capture,
        ErrorKind::Forked,
        ErrorKind::Shutdown,
        ErrorKind::Abi,
        ErrorKind::Partial,
        ErrorKind::Cancelled,
        ErrorKind::Internal,
    ];

    /// The status code of the C headers: the position in [`Self::ALL`], negated, from −1 on.
    pub const fn code(self) -> i32 {
        -(self as i32) - 1
    }

    /// The kind of a status code, `None` for success, information and unknown codes.
    pub fn from_code(code: i32) -> Option<Self> {
        let index = usize::try_from(-(i64::from(code)) - 1).ok()?;
        Self::ALL.get(index).copied()
    }

    /// A short English phrase, lower case, without a full stop.
    pub const fn describe(self) -> &'static CStr {
        match self {
            ErrorKind::InvalidArgument => c"invalid argument",
            ErrorKind::NullPointer => c"null pointer",
            ErrorKind::NotFound => c"not found",
            ErrorKind::OutOfDeviceMemory => c"out of device memory",
            ErrorKind::OutOfHostMemory => c"out of host memory",
            ErrorKind::Unsupported => c"not supported",
            ErrorKind::NoDevice => c"no usable device",
            ErrorKind::Device => c"device call failed",
            ErrorKind::DeviceLost => c"device lost",
            ErrorKind::Busy => c"busy",
            ErrorKind::Timeout => c"timed out",
            ErrorKind::Io => c"input or output failed",
            ErrorKind::NoSpace => c"no space left",
            ErrorKind::Corrupt => c"contents do not match their checksum",
            ErrorKind::Exported => c"memory is exported",
            ErrorKind::Capture => c"a stream capture forbids the call",
            ErrorKind::Forked => c"not usable in a forked child",
            ErrorKind::Shutdown => c"shutting down",
            ErrorKind::Abi => c"another copy of the library does not match",
            ErrorKind::Partial => c"partly done",
            ErrorKind::Cancelled => c"cancelled",
            ErrorKind::Internal => c"internal error",
        }
    }
}

/// A failure: its kind, what was being done (outermost first) and, where there is one, the cause.
///
/// `Display` is one line. `Debug` is the same line plus the kind.
#[derive(Clone, thiserror::Error)]
pub struct Error {
    kind: ErrorKind,
    message: String,
    #[source]
    source: Option<Arc<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Error {
            kind,
            message: message.into(),
            source: None,
        }
    }

    /// Names the argument at fault.
    pub fn invalid(argument: &str, why: impl fmt::Display) -> Self {
        Error::new(ErrorKind::InvalidArgument, format!("{argument}: {why}"))
    }

    /// An operating-system error about `what` (a path, a call).
    pub fn io(what: impl fmt::Display, source: std::io::Error) -> Self {
        let kind = match source.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT) => ErrorKind::NoSpace,
            Some(libc::ENOMEM) => ErrorKind::OutOfHostMemory,
            Some(libc::ENOENT) => ErrorKind::NotFound,
            _ => ErrorKind::Io,
        };
        Error {
            kind,
            message: format!("{what}: {source}"),
            source: Some(Arc::new(source)),
        }
    }

    /// The last operating-system error of this thread, about `what`.
    pub fn last_os(what: impl fmt::Display) -> Self {
        Error::io(what, std::io::Error::last_os_error())
    }

    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    pub fn code(&self) -> i32 {
        self.kind.code()
    }

    /// Puts what was being done in front of the message.
    pub fn context(mut self, what: impl fmt::Display) -> Self {
        self.message = format!("{what}: {}", self.message);
        self
    }

    /// The same message under another kind.
    pub fn with_kind(mut self, kind: ErrorKind) -> Self {
        self.kind = kind;
        self
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.kind, self.message)
    }
}

/// Adds context to the error of a result without building the text on success.
pub trait ResultExt<T> {
    fn context<D: fmt::Display>(self, what: impl FnOnce() -> D) -> Result<T>;
}

impl<T> ResultExt<T> for Result<T> {
    fn context<D: fmt::Display>(self, what: impl FnOnce() -> D) -> Result<T> {
        self.map_err(|error| error.context(what()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_and_kinds_are_one_to_one() {
        for kind in ErrorKind::ALL {
            assert!(kind.code() < 0);
            assert_eq!(ErrorKind::from_code(kind.code()), Some(kind));
        }
        for code in [0, 1, 2, -23, i32::MIN, i32::MAX] {
            assert_eq!(ErrorKind::from_code(code), None);
        }
    }

    #[test]
    fn context_reads_from_the_outside_in() {
        let error = Error::invalid("size", "must not be 0").context("malloc");
        assert_eq!(error.to_string(), "malloc: size: must not be 0");
    }
}
