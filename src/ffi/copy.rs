//! `tms_memcpy` and its kin: one piece, by direction; waiting, on a stream, as an operation.
//!
//! Batches and rows are in `copy_many`.

use std::ffi::c_void;

use super::argument::out;
use super::fence::fence;
use super::forward::forward;
use super::op::tms_op_t;
use super::status::TMS_OK;
use super::transfer::{copier, tms_transfer_engine_t};
use crate::device::Piece;
use crate::error::Result;
use crate::op::Ended;
use crate::transfer::copy::Way;

/// The status of a copy; how much of it is certain goes to the caller.
///
/// # Safety
/// `certain` is NULL or valid for writes.
pub(super) unsafe fn end(ended: Ended, certain: *mut u64) -> Result<i32> {
    if let Ok(certain) = out(certain, "certain") {
        // SAFETY: the caller's promise.
        unsafe { certain.write(ended.bytes) };
    }
    ended.status.map(|()| TMS_OK)
}

/// Runs the body of a function that tells what is certain: nothing, if the body cannot tell.
///
/// # Safety
/// `certain` is NULL or valid for writes.
pub(super) unsafe fn with_certain(certain: *mut u64, body: impl FnOnce() -> Result<Ended>) -> i32 {
    fence(|| {
        let ended = body().inspect_err(|_| {
            if let Ok(certain) = out(certain, "certain") {
                // SAFETY: the caller's promise.
                unsafe { certain.write(0) };
            }
        })?;
        // SAFETY: as above.
        unsafe { end(ended, certain) }
    })
}

fn piece(dst: *mut c_void, src: *const c_void, bytes: usize) -> Piece {
    Piece {
        destination: dst as u64,
        source: src as u64,
        bytes: bytes as u64,
    }
}

/// # Safety
/// As for [`tms_memcpy`].
unsafe fn copy(
    engine: *const tms_transfer_engine_t,
    piece: Piece,
    way: Way,
    certain: *mut u64,
) -> i32 {
    // SAFETY: by this function's contract.
    unsafe { with_certain(certain, || Ok(copier(engine)?.copy(&[piece], way))) }
}

/// # Safety
/// As for [`tms_memcpy_on_stream`].
unsafe fn copy_on_stream(
    engine: *const tms_transfer_engine_t,
    piece: Piece,
    way: Way,
    stream: *mut c_void,
) -> i32 {
    fence(|| {
        // SAFETY: by this function's contract.
        unsafe { copier(engine)?.copy_on_stream(&[piece], way, stream as u64) }.map(|()| TMS_OK)
    })
}

/// # Safety
/// As for [`tms_memcpy_async`].
unsafe fn copy_async(
    engine: *const tms_transfer_engine_t,
    piece: Piece,
    way: Way,
    op: *mut *mut tms_op_t,
) -> i32 {
    fence(|| {
        let op = out(op, "op")?;
        // SAFETY: by this function's contract.
        unsafe {
            let started = copier(engine)?.copy_async(vec![piece], way)?;
            op.write(tms_op_t::boxed(started));
        }
        Ok(TMS_OK)
    })
}

/// Copies bytes between any two places and waits: device memory, pinned, managed and pageable host
/// memory. The direction follows from the pointers.
///
/// `engine`: NULL for the engine of the process. `dst`, `src`: any alignment. They may lie anywhere in
/// their allocations, but must not leave them; neighbouring mappings of one device count as one, and
/// where pageable memory ends only its owner knows: neither is noticed. The two ranges must not
/// overlap. `bytes`: 0 is fine and touches nothing, with any pointers. `certain` receives, on success
/// and on failure, how many bytes from the beginning are certain to be in place; may be NULL.
///
/// Work that streams have queued on the memory is not waited for: synchronise first, or use the form
/// with a stream. Memory of one device is copied to another directly where they can reach each other,
/// else through the host. Pageable memory passes through pinned staging memory, by several threads.
/// Any thread; several at once.
///
/// Returns TMS_OK; TMS_ERR_NULL_POINTER naming dst or src; TMS_ERR_INVALID_ARGUMENT naming dst or src
/// (it leaves its memory, and by how many bytes; there is no memory, because it was freed or is
/// paused, though freed memory that is still held, see held_bytes of tms_stats_t, is not noticed; the
/// ranges overlap; memory of a device that the engine was not made for); TMS_ERR_OUT_OF_HOST_MEMORY
/// (no staging memory); TMS_ERR_DEVICE, TMS_ERR_DEVICE_LOST; or why no device can be used.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tms_memcpy(
    engine: *const tms_transfer_engine_t,
    dst: *mut c_void,
    src: *const c_void,
    bytes: usize,
    certain: *mut u64,
) -> i32 {
    forward!(tms_memcpy(engine, dst, src, bytes, certain));
    // SAFETY: valid by the function's contract.
    unsafe { copy(engine, piece(dst, src, bytes), Way::Any, certain) }
}

/// tms_memcpy in the order of a stream: after the work queued there before, and before the work
/// queued there later.
///
/// `engine`, `dst`, `src`, `bytes` as for tms_memcpy. `stream`: a CUstream (or cudaStream_t) of the
/// thread's current device, or of the device of the memory if that is another one; NULL for the legacy
/// default stream. Any thread.
///
/// Device, pinned and managed memory is copied when the stream gets there: it must stay valid, and the
/// bytes are not certain, until then. Where a side is pageable, the call reads the source, or brings
/// the bytes to their destination, before it returns; for the latter, and for copies between places on
/// the host, it waits for the stream. While the stream is being captured, copies of device and pinned
/// memory become part of the graph and others are refused.
///
/// Returns as tms_memcpy; TMS_ERR_CAPTURE for what cannot be captured. After an error, how much was
/// queued is not known.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tms_memcpy_on_stream(
    engine: *const tms_transfer_engine_t,
    dst: *mut c_void,
    src: *const c_void,
    bytes: usize,
    stream: *mut c_void,
) -> i32 {
    forward!(tms_memcpy_on_stream(engine, dst, src, bytes, stream));
    // SAFETY: valid by the function's contract.
    unsafe { copy_on_stream(engine, piece(dst, src, bytes), Way::Any, stream) }
}

/// tms_memcpy on a thread of the library.
///
/// `engine`, `dst`, `src`, `bytes` as for tms_memcpy; the memory must stay valid until the operation
/// has ended. `op` receives the operation, to be freed with tms_op_free; not NULL. Copies of an engine
/// run in the order they were started. tms_op_progress counts bytes; tms_op_wait returns what
/// tms_memcpy would have, argument errors included; copied_bytes of tms_op_result is how many bytes
/// are certain.
///
/// Returns TMS_OK, TMS_ERR_NULL_POINTER (op), TMS_ERR_FORKED, TMS_ERR_SHUTDOWN, TMS_ERR_IO (no thread
/// or descriptor), or why no device can be used.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tms_memcpy_async(
    engine: *const tms_transfer_engine_t,
    dst: *mut c_void,
    src: *const c_void,
    bytes: usize,
    op: *mut *mut tms_op_t,
) -> i32 {
    forward!(tms_memcpy_async(engine, dst, src, bytes, op));
    // SAFETY: valid by the function's contract.
    unsafe { copy_async(engine, piece(dst, src, bytes), Way::Any, op) }
}

/// tms_memcpy from host memory to memory of a device: src must be host memory, dst memory of a
/// device; managed memory may stand for either.
///
/// Parameters and errors as for tms_memcpy; also TMS_ERR_INVALID_ARGUMENT naming the side that is
/// memory of the other kind.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tms_memcpy_h2d(
    engine: *const tms_transfer_engine_t,
    dst: *mut c_void,
    src: *const c_void,
    bytes: usize,
    certain: *mut u64,
) -> i32 {
    forward!(tms_memcpy_h2d(engine, dst, src, bytes, certain));
    // SAFETY: valid by the function's contract.
    unsafe { copy(engine, piece(dst, src, bytes), Way::ToDevice, certain) }
}

/// tms_memcpy_h2d in the order of a stream. Parameters, rules and errors as for tms_memcpy_on_stream.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tms_memcpy_h2d_on_stream(
    engine: *const tms_transfer_engine_t,
    dst: *mut c_void,
    src: *const c_void,
    bytes: usize,
    stream: *mut c_void,
) -> i32 {
    forward!(tms_memcpy_h2d_on_stream(engine, dst, src, bytes, stream));
    // SAFETY: valid by the function's contract.
    unsafe { copy_on_stream(engine, piece(dst, src, bytes), Way::ToDevice, stream) }
}

/// tms_memcpy_h2d on a thread of the library. Parameters and errors as for tms_memcpy_async.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tms_memcpy_h2d_async(
    engine: *const tms_transfer_engine_t,
    dst: *mut c_void,
    src: *const c_void,
    bytes: usize,
    op: *mut *mut tms_op_t,
) -> i32 {
    forward!(tms_memcpy_h2d_async(engine, dst, src, bytes, op));
    // SAFETY: valid by the function's contract.
    unsafe { copy_async(engine, piece(dst, src, bytes), Way::ToDevice, op) }
}

/// tms_memcpy from memory of a device to host memory: src must be memory of a device, dst host
/// memory; managed memory may stand for either.
///
/// Parameters and errors as for tms_memcpy; also TMS_ERR_INVALID_ARGUMENT naming the side that is
/// memory of the other kind.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tms_memcpy_d2h(
    engine: *const tms_transfer_engine_t,
    dst: *mut c_void,
    src: *const c_void,
    bytes: usize,
    certain: *mut u64,
) -> i32 {
    forward!(tms_memcpy_d2h(engine, dst, src, bytes, certain));
    // SAFETY: valid by the function's contract.
    unsafe { copy(engine, piece(dst, src, bytes), Way::ToHost, certain) }
}

/// tms_memcpy_d2h in the order of a stream. Parameters, rules and errors as for tms_memcpy_on_stream.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tms_memcpy_d2h_on_stream(
    engine: *const tms_transfer_engine_t,
    dst: *mut c_void,
    src: *const c_void,
    bytes: usize,
    stream: *mut c_void,
) -> i32 {
    forward!(tms_memcpy_d2h_on_stream(engine, dst, src, bytes, stream));
    // SAFETY: valid by the function's contract.
    unsafe { copy_on_stream(engine, piece(dst, src, bytes), Way::ToHost, stream) }
}

/// tms_memcpy_d2h on a thread of the library. Parameters and errors as for tms_memcpy_async.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tms_memcpy_d2h_async(
    engine: *const tms_transfer_engine_t,
    dst: *mut c_void,
    src: *const c_void,
    bytes: usize,
    op: *mut *mut tms_op_t,
) -> i32 {
    forward!(tms_memcpy_d2h_async(engine, dst, src, bytes, op));
    // SAFETY: valid by the function's contract.
    unsafe { copy_async(engine, piece(dst, src, bytes), Way::ToHost, op) }
}

/// tms_memcpy from memory of a device to memory of the same or another device: both must be memory
/// of devices; managed memory may stand for either.
///
/// Parameters and errors as for tms_memcpy; also TMS_ERR_INVALID_ARGUMENT naming the side that is
/// memory of the other kind.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tms_memcpy_d2d(
    engine: *const tms_transfer_engine_t,
    dst: *mut c_void,
    src: *const c_void,
    bytes: usize,
    certain: *mut u64,
) -> i32 {
    forward!(tms_memcpy_d2d(engine, dst, src, bytes, certain));
    // SAFETY: valid by the function's contract.
    unsafe { copy(engine, piece(dst, src, bytes), Way::OnDevice, certain) }
}

/// tms_memcpy_d2d in the order of a stream. Parameters, rules and errors as for tms_memcpy_on_stream.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tms_memcpy_d2d_on_stream(
    engine: *const tms_transfer_engine_t,
    dst: *mut c_void,
    src: *const c_void,
    bytes: usize,
    stream: *mut c_void,
) -> i32 {
    forward!(tms_memcpy_d2d_on_stream(engine, dst, src, bytes, stream));
    // SAFETY: valid by the function's contract.
    unsafe { copy_on_stream(engine, piece(dst, src, bytes), Way::OnDevice, stream) }
}

/// tms_memcpy_d2d on a thread of the library. Parameters and errors as for tms_memcpy_async.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tms_memcpy_d2d_async(
    engine: *const tms_transfer_engine_t,
    dst: *mut c_void,
    src: *const c_void,
    bytes: usize,
    op: *mut *mut tms_op_t,
) -> i32 {
    forward!(tms_memcpy_d2d_async(engine, dst, src, bytes, op));
    // SAFETY: valid by the function's contract.
    unsafe { copy_async(engine, piece(dst, src, bytes), Way::OnDevice, op) }
}
