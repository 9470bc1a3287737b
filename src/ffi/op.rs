//! `tms_op_t`: a pause, a resume or a copy that runs on a thread of the library.

use std::time::Duration;

use super::argument::{out, required};
use super::fence::fence;
use super::forward::forward;
use super::result::{ResultOut, status_of, tms_result_t};
use super::status::TMS_OK;
use crate::allocator::{OrderedResume, Outcome, Summary};
use crate::error::{Error, ErrorKind};
use crate::op::{Ended, Ending, Op};

/// A running or ended operation. Belongs to the caller, who frees it with tms_op_free.
#[allow(non_camel_case_types)]
pub struct tms_op_t {
    pub(super) op: Box<dyn Operation>,
}

impl tms_op_t {
    pub(super) fn boxed(op: impl Operation + 'static) -> *mut tms_op_t {
        Box::into_raw(Box::new(tms_op_t { op: Box::new(op) }))
    }
}

/// What the functions of this file need of an operation, whatever its end.
pub(super) trait Operation: Send + Sync {
    fn is_done(&self) -> bool;

    /// The end as a result tells it, waited for at most `timeout` (`None`: for ever).
    fn wait(&self, timeout: Option<Duration>) -> Option<Outcome>;

    /// Bytes done and bytes in all.
    fn progress(&self) -> (u64, u64);

    fn eventfd(&self) -> i32;

    /// The operation as an ordered resume, if it is one.
    fn ordered(&self) -> Option<&OrderedResume> {
        None
    }
}

impl<T: Ending + Into<Outcome>> Operation for Op<T> {
    fn is_done(&self) -> bool {
        Op::is_done(self)
    }

    fn wait(&self, timeout: Option<Duration>) -> Option<Outcome> {
        Op::wait(self, timeout).map(Into::into)
    }

    fn progress(&self) -> (u64, u64) {
        Op::progress(self)
    }

    fn eventfd(&self) -> i32 {
        Op::eventfd(self)
    }
}

impl Operation for OrderedResume {
    fn is_done(&self) -> bool {
        Op::is_done(self)
    }

    fn wait(&self, timeout: Option<Duration>) -> Option<Outcome> {
        Op::wait(self, timeout)
    }

    fn progress(&self) -> (u64, u64) {
        Op::progress(self)
    }

    fn eventfd(&self) -> i32 {
        Op::eventfd(self)
    }

    fn ordered(&self) -> Option<&OrderedResume> {
        Some(self)
    }
}

/// A copy in the words of a result: what is certain was copied.
impl From<Ended> for Outcome {
    fn from(ended: Ended) -> Outcome {
        Outcome {
            status: ended.status,
            summary: Summary {
                copied_bytes: ended.bytes,
                ..Summary::default()
            },
        }
    }
}

/// Waiting without a deadline.
pub const TMS_WAIT_FOREVER: u64 = u64::MAX;

fn running() -> Error {
    Error::new(ErrorKind::Timeout, "the operation is still running")
}

/// Whether the operation has ended. Touches no device and takes no lock that one is waited for with.
///
/// `op`, `done`: not NULL; `done` receives 1 or 0. Any thread.
///
/// Returns TMS_OK or TMS_ERR_NULL_POINTER.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tms_op_poll(op: *const tms_op_t, done: *mut i32) -> i32 {
    forward!(tms_op_poll(op, done));
    fence(|| {
        // SAFETY: valid by the function's contract.
        let handle = unsafe { required(op, "op") }?;
        let done = out(done, "done")?;
        // SAFETY: valid for writes by the function's contract.
        unsafe { done.write(i32::from(handle.op.is_done())) };
        Ok(TMS_OK)
    })
}

/// Waits for the end of the operation, at most `timeout_ms` milliseconds (TMS_WAIT_FOREVER: without
/// a deadline).
///
/// `op`: not NULL. Any thread, several at once.
///
/// Returns the status of the operation, with its message; TMS_ERR_TIMEOUT if it still runs (no
/// operation ends with that code); TMS_ERR_NULL_POINTER; TMS_ERR_FORKED in a forked child.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tms_op_wait(op: *const tms_op_t, timeout_ms: u64) -> i32 {
    forward!(tms_op_wait(op, timeout_ms));
    fence(|| {
        // SAFETY: valid by the function's contract.
        let handle = unsafe { required(op, "op") }?;
        if crate::process::forked() {
            crate::process::check()?;
        }
        let timeout = (timeout_ms != TMS_WAIT_FOREVER).then(|| Duration::from_millis(timeout_ms));
        let outcome = handle.op.wait(timeout).ok_or_else(running)?;
        Ok(status_of(&outcome))
    })
}

/// How far the operation is, in bytes copied.
///
/// `op`, `done_bytes`, `total_bytes`: not NULL. The total is 0 until the selection is known, and
/// stays 0 if nothing has to be copied. Any thread.
///
/// Returns TMS_OK or TMS_ERR_NULL_POINTER.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tms_op_progress(
    op: *const tms_op_t,
    done_bytes: *mut u64,
    total_bytes: *mut u64,
) -> i32 {
    forward!(tms_op_progress(op, done_bytes, total_bytes));
    fence(|| {
        // SAFETY: valid by the function's contract.
        let handle = unsafe { required(op, "op") }?;
        let (done, total) = (
            out(done_bytes, "done_bytes")?,
            out(total_bytes, "total_bytes")?,
        );
        let (done_now, total_now) = handle.op.progress();
        // SAFETY: valid for writes by the function's contract.
        unsafe {
            done.write(done_now);
            total.write(total_now);
        }
        Ok(TMS_OK)
    })
}

/// What the operation did, once it has ended.
///
/// `op`, `result`: not NULL. Any thread.
///
/// Returns the status of the operation, TMS_ERR_TIMEOUT if it still runs (result is not written),
/// TMS_ERR_NULL_POINTER, TMS_ERR_INVALID_ARGUMENT.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tms_op_result(op: *const tms_op_t, result: *mut tms_result_t) -> i32 {
    forward!(tms_op_result(op, result));
    fence(|| {
        // SAFETY: valid by the function's contract.
        let (handle, result) = unsafe {
            required(result, "result")?;
            (required(op, "op")?, ResultOut::new(result)?)
        };
        let outcome = handle.op.wait(Some(Duration::ZERO)).ok_or_else(running)?;
        if let Some(result) = result {
            // SAFETY: as above.
            unsafe { result.write(&outcome) };
        }
        Ok(status_of(&outcome))
    })
}

/// A descriptor that becomes readable when the operation ends, and stays so: for poll, epoll or an
/// event loop.
///
/// `op`, `fd`: not NULL. The descriptor belongs to the operation and is valid until
/// tms_op_free: do not close or read it. Any thread.
///
/// Returns TMS_OK or TMS_ERR_NULL_POINTER.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tms_op_eventfd(op: *const tms_op_t, fd: *mut i32) -> i32 {
    forward!(tms_op_eventfd(op, fd));
    fence(|| {
        // SAFETY: valid by the function's contract.
        let handle = unsafe { required(op, "op") }?;
        let fd = out(fd, "fd")?;
        // SAFETY: valid for writes by the function's contract.
        unsafe { fd.write(handle.op.eventfd()) };
        Ok(TMS_OK)
    })
}

/// Frees the handle. A running operation goes on to its end.
///
/// `op` may be NULL. Returns TMS_OK.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tms_op_free(op: *mut tms_op_t) -> i32 {
    forward!(tms_op_free(op));
    fence(|| {
        if !op.is_null() {
            // SAFETY: made by `boxed`, and not used afterwards by the function's contract.
            drop(unsafe { Box::from_raw(op) });
        }
        Ok(TMS_OK)
    })
}
