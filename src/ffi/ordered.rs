//! Resuming in a given order: the first allocations are used while the rest arrives.

use std::ffi::c_void;

use super::argument::{out, required};
use super::fence::fence;
use super::forward::forward;
use super::op::tms_op_t;
use super::options::{resume_options, tms_resume_options_t};
use super::saver::tms_saver_t;
use super::status::TMS_OK;
use crate::allocator::OrderedResume;
use crate::device::Address;
use crate::error::{Error, ErrorKind, Result};
use crate::process;

/// Resumes the given allocations, and no others, on a thread of the library, so that the first can be
/// used while the rest arrives.
///
/// Everything is created and mapped before the first allocation is ready; then the contents arrive in
/// the order given. tms_op_stream_wait and tms_op_ready tell of each allocation; an allocation that is
/// ready can be used, queried, and freed like an active one (its memory goes when the operation ends).
/// A failure later on leaves what is ready active and the rest paused: the operation ends with
/// TMS_ERR_PARTIAL and lists them. While device memory is short it waits up to options.wait_ms, and
/// other operations run; then everything stays paused.
///
/// `saver`: not NULL. `pointers`: array of `count` addresses, each anywhere in an allocation of this
/// saver, in the order of need; NULL if count is 0; not kept. The same allocation may be named twice
/// and may be active already. `options`: NULL for defaults; naming tags is refused. `op` receives the
/// operation, to be freed with tms_op_free; not NULL. Any thread. Operations of a saver run in the
/// order they were started.
///
/// Returns TMS_OK; TMS_ERR_NOT_FOUND for a pointer in no allocation, named by its index;
/// TMS_ERR_NULL_POINTER; TMS_ERR_INVALID_ARGUMENT; TMS_ERR_FORKED; TMS_ERR_SHUTDOWN; TMS_ERR_IO (no
/// thread or descriptor). The operation ends as tms_saver_resume does.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tms_saver_resume_ordered_async(
    saver: *const tms_saver_t,
    pointers: *const *mut c_void,
    count: usize,
    options: *const tms_resume_options_t,
    op: *mut *mut tms_op_t,
) -> i32 {
    forward!(tms_saver_resume_ordered_async(
        saver, pointers, count, options, op
    ));
    fence(|| {
        // SAFETY: valid by the function's contract.
        let (handle, options) = unsafe { (required(saver, "saver")?, resume_options(options)?) };
        let op = out(op, "op")?;
        let mut addresses: Vec<Address> = Vec::new();
        if count > 0 {
            // SAFETY: as above.
            unsafe { required(pointers, "pointers") }?;
            // SAFETY: an array of `count` entries by the function's contract.
            let given = unsafe { std::slice::from_raw_parts(pointers, count) };
            addresses.extend(given.iter().map(|&pointer| pointer as Address));
        }
        let started = handle.saver()?.resume_ordered_async(&addresses, &options)?;
        // SAFETY: valid for writes by the function's contract.
        unsafe { op.write(tms_op_t::boxed(started)) };
        Ok(TMS_OK)
    })
}

fn ordered(op: &tms_op_t) -> Result<&OrderedResume> {
    op.op.ordered().ok_or_else(|| {
        Error::new(
            ErrorKind::InvalidArgument,
            "op: not one of tms_saver_resume_ordered_async",
        )
    })
}

/// Makes a stream of the caller wait for the contents of one allocation of an ordered resume: work
/// queued on the stream afterwards sees them.
///
/// Returns at once if the contents are complete or on their way to the device. Where they are not on
/// their way yet, the calling thread waits until they are: until all memory is mapped, and for
/// contents from other backups than "pinned" until they have arrived. Never call it while holding
/// something that frees the device memory which the resume waits for. On the host device, which has
/// no streams of the caller, the calling thread waits until the contents are complete.
///
/// If copying fails after the call has returned, the operation ends with an error that lists the
/// allocation. After the operation has ended nothing is waited for.
///
/// `op`: of tms_saver_resume_ordered_async; not NULL. `pointer`: anywhere in one of its allocations.
/// `stream`: a CUstream of any device, not being captured; NULL: the legacy default stream. Any
/// thread, several at once.
///
/// Returns TMS_OK; the error of the allocation if it stays paused; TMS_ERR_NOT_FOUND if the operation
/// does not resume such an allocation, or it was freed before; TMS_ERR_NULL_POINTER (op);
/// TMS_ERR_INVALID_ARGUMENT (another kind of operation); TMS_ERR_CAPTURE; TMS_ERR_DEVICE;
/// TMS_ERR_FORKED; TMS_ERR_SHUTDOWN.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tms_op_stream_wait(
    op: *const tms_op_t,
    pointer: *const c_void,
    stream: *mut c_void,
) -> i32 {
    forward!(tms_op_stream_wait(op, pointer, stream));
    fence(|| {
        // SAFETY: valid by the function's contract.
        let handle = unsafe { required(op, "op") }?;
        ordered(handle)?.stream_wait(pointer as Address, stream as u64)?;
        Ok(TMS_OK)
    })
}

/// Whether the contents of one allocation of an ordered resume are complete, for every stream. Touches
/// no device and waits for nothing.
///
/// `op`: of tms_saver_resume_ordered_async; not NULL. `pointer`: anywhere in one of its allocations.
/// `ready`: receives 1 or 0; not NULL. Any thread.
///
/// Returns TMS_OK; the error of the allocation if it stays paused; TMS_ERR_NOT_FOUND,
/// TMS_ERR_NULL_POINTER and TMS_ERR_INVALID_ARGUMENT as tms_op_stream_wait; TMS_ERR_FORKED.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tms_op_ready(
    op: *const tms_op_t,
    pointer: *const c_void,
    ready: *mut i32,
) -> i32 {
    forward!(tms_op_ready(op, pointer, ready));
    fence(|| {
        // SAFETY: valid by the function's contract.
        let handle = unsafe { required(op, "op") }?;
        let ready = out(ready, "ready")?;
        if process::forked() {
            process::check()?;
        }
        let is_ready = ordered(handle)?.is_ready(pointer as Address)?;
        // SAFETY: valid for writes by the function's contract.
        unsafe { ready.write(i32::from(is_ready)) };
        Ok(TMS_OK)
    })
}
