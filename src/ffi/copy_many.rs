//! Copies of many pieces, and of rows; waiting, on a stream, as an operation.

use std::ffi::c_void;

use super::argument::{out, required};
use super::copy::with_certain;
use super::fence::fence;
use super::forward::forward;
use super::op::tms_op_t;
use super::status::TMS_OK;
use super::transfer::{copier, tms_transfer_engine_t};
use crate::device::{Piece, Pitched};
use crate::error::{Error, Result};
use crate::transfer::copy::Way;

/// One piece of a batch.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct tms_copy_t {
    /// Where the bytes go.
    pub dst: *mut c_void,
    /// Where they come from.
    pub src: *const c_void,
    /// How many; 0 is fine.
    pub bytes: usize,
}

// What the struct is read as.
const _: () = assert!(
    size_of::<tms_copy_t>() == size_of::<Piece>()
        && align_of::<tms_copy_t>() == align_of::<Piece>()
);

/// # Safety
/// `copies` is valid for reads of `count` entries for `'a`.
unsafe fn pieces<'a>(copies: *const tms_copy_t, count: usize) -> Result<&'a [Piece]> {
    if count == 0 {
        return Ok(&[]);
    }
    if count > isize::MAX as usize / size_of::<Piece>() {
        let why = format_args!("{count} entries do not fit the address space");
        return Err(Error::invalid("count", why));
    }
    // SAFETY: the caller's promise; both types are two addresses and a number of bytes, in the same
    // order, of the same size and alignment, and a piece may hold any numbers.
    unsafe {
        required(copies, "copies")?;
        Ok(std::slice::from_raw_parts(copies.cast::<Piece>(), count))
    }
}

/// Copies many pieces, of any sizes and any mix of directions, and waits.
///
/// `engine`: NULL for the engine of the process. `copies`: `count` entries; may be NULL if count is 0.
/// Each is a copy by the rules of tms_memcpy. Pieces are copied in any order and at the same time, so
/// what a byte holds is not defined where a destination overlaps another destination or another source.
/// Neighbours are joined; pieces that a device reaches by itself are copied by the method that its
/// transfer table has for their size (tms_transfer_table_get), others are packed into staging memory.
/// `certain` receives, on success and on failure, how many bytes of the concatenation of all pieces,
/// from its beginning, are certain to be in place; may be NULL. Any thread; several at once.
///
/// Arguments are checked in steps, the first of 512 pieces, while earlier pieces are being copied:
/// when a later piece is refused, earlier steps were copied.
///
/// Returns as tms_memcpy, with the number of the piece in the message; TMS_ERR_NULL_POINTER also for
/// copies; TMS_ERR_INVALID_ARGUMENT also for a count that no array has, and a wrong
/// TMS_TRANSFER_TABLE.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tms_memcpy_batch(
    engine: *const tms_transfer_engine_t,
    copies: *const tms_copy_t,
    count: usize,
    certain: *mut u64,
) -> i32 {
    forward!(tms_memcpy_batch(engine, copies, count, certain));
    // SAFETY: valid by the function's contract.
    unsafe {
        with_certain(certain, || {
            let pieces = pieces(copies, count)?;
            Ok(copier(engine)?.copy(pieces, Way::Any))
        })
    }
}

/// tms_memcpy_batch in the order of a stream. `copies` is not needed any more when this returns; for
/// the memory, and for `stream`, the rules of tms_memcpy_on_stream hold. Pieces of other devices than
/// the stream's are ordered by events.
///
/// Returns as tms_memcpy_batch; TMS_ERR_CAPTURE for what cannot be captured.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tms_memcpy_batch_on_stream(
    engine: *const tms_transfer_engine_t,
    copies: *const tms_copy_t,
    count: usize,
    stream: *mut c_void,
) -> i32 {
    forward!(tms_memcpy_batch_on_stream(engine, copies, count, stream));
    fence(|| {
        // SAFETY: valid by the function's contract.
        unsafe {
            let pieces = pieces(copies, count)?;
            copier(engine)?.copy_on_stream(pieces, Way::Any, stream as u64)?;
        }
        Ok(TMS_OK)
    })
}

/// tms_memcpy_batch on a thread of the library. `copies` is not needed any more when this returns.
/// Other parameters and errors as for tms_memcpy_async; TMS_ERR_NULL_POINTER also for copies.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tms_memcpy_batch_async(
    engine: *const tms_transfer_engine_t,
    copies: *const tms_copy_t,
    count: usize,
    op: *mut *mut tms_op_t,
) -> i32 {
    forward!(tms_memcpy_batch_async(engine, copies, count, op));
    fence(|| {
        let op = out(op, "op")?;
        // SAFETY: valid by the function's contract.
        unsafe {
            let pieces = pieces(copies, count)?.to_vec();
            let started = copier(engine)?.copy_async(pieces, Way::Any)?;
            op.write(tms_op_t::boxed(started));
        }
        Ok(TMS_OK)
    })
}

fn pitched(
    dst: *mut c_void,
    dst_pitch: usize,
    src: *const c_void,
    src_pitch: usize,
    width: usize,
    height: usize,
) -> Pitched {
    Pitched {
        destination: dst as u64,
        destination_pitch: dst_pitch as u64,
        source: src as u64,
        source_pitch: src_pitch as u64,
        width: width as u64,
        height: height as u64,
    }
}

/// Copies `height` rows of `width` bytes, which begin `dst_pitch` and `src_pitch` bytes apart, and
/// waits. The direction follows from the pointers.
///
/// `engine`: NULL for the engine of the process. `dst`, `src`: the first byte of the first row, by the
/// rules of tms_memcpy for everything up to the end of the last row. No row may overlap a row of the
/// other side; columns of one matrix (the same pitch) may be copied to others of its columns. Pitches
/// must not be less than the width, unless there is only one row. A width or height of 0 is fine and
/// touches nothing. Bytes between the rows are not changed. `certain` receives, on success and on
/// failure, how many bytes of the rows, in order, are certain to be in place; may be NULL. Any thread.
///
/// Returns as tms_memcpy; TMS_ERR_INVALID_ARGUMENT also naming dst_pitch, src_pitch or height.
#[allow(clippy::too_many_arguments)] // As the C functions that hosts know take them.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tms_memcpy_2d(
    engine: *const tms_transfer_engine_t,
    dst: *mut c_void,
    dst_pitch: usize,
    src: *const c_void,
    src_pitch: usize,
    width: usize,
    height: usize,
    certain: *mut u64,
) -> i32 {
    forward!(tms_memcpy_2d(
        engine, dst, dst_pitch, src, src_pitch, width, height, certain
    ));
    let rows = pitched(dst, dst_pitch, src, src_pitch, width, height);
    // SAFETY: valid by the function's contract.
    unsafe { with_certain(certain, || Ok(copier(engine)?.copy_2d(&rows))) }
}

/// tms_memcpy_2d in the order of a stream. Rules of memory and `stream` as for tms_memcpy_on_stream,
/// other parameters and errors as for tms_memcpy_2d.
#[allow(clippy::too_many_arguments)] // As the C functions that hosts know take them.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tms_memcpy_2d_on_stream(
    engine: *const tms_transfer_engine_t,
    dst: *mut c_void,
    dst_pitch: usize,
    src: *const c_void,
    src_pitch: usize,
    width: usize,
    height: usize,
    stream: *mut c_void,
) -> i32 {
    forward!(tms_memcpy_2d_on_stream(
        engine, dst, dst_pitch, src, src_pitch, width, height, stream
    ));
    fence(|| {
        let rows = pitched(dst, dst_pitch, src, src_pitch, width, height);
        // SAFETY: valid by the function's contract.
        unsafe { copier(engine)?.copy_2d_on_stream(&rows, stream as u64) }?;
        Ok(TMS_OK)
    })
}

/// tms_memcpy_2d on a thread of the library. `op` and errors as for tms_memcpy_async, other parameters
/// as for tms_memcpy_2d.
#[allow(clippy::too_many_arguments)] // As the C functions that hosts know take them.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tms_memcpy_2d_async(
    engine: *const tms_transfer_engine_t,
    dst: *mut c_void,
    dst_pitch: usize,
    src: *const c_void,
    src_pitch: usize,
    width: usize,
    height: usize,
    op: *mut *mut tms_op_t,
) -> i32 {
    forward!(tms_memcpy_2d_async(
        engine, dst, dst_pitch, src, src_pitch, width, height, op
    ));
    fence(|| {
        let op = out(op, "op")?;
        let rows = pitched(dst, dst_pitch, src, src_pitch, width, height);
        // SAFETY: valid by the function's contract.
        unsafe {
            let started = copier(engine)?.copy_2d_async(&rows)?;
            op.write(tms_op_t::boxed(started));
        }
        Ok(TMS_OK)
    })
}
