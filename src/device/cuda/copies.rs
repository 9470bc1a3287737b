//! Copies of more than one range by one call of the driver: batches, pitched copies, copies between
//! devices. Single copies are in `stream`, copy kernels in `kernels`.

use std::ffi::c_void;
use std::ptr;

use cudarc::driver::sys::{
    CUDA_MEMCPY2D, CUcontext, CUmemLocation, CUmemLocationType, CUmemcpyAttributes,
    CUmemcpySrcAccessOrder, CUmemorytype,
};

use super::super::{Direction, Piece, Pitched, Stream};
use super::code::SUCCESS;
use super::context::Current;
use super::stream;
use crate::error::{Error, ErrorKind, Result};

/// No driver takes a larger pitch.
const LARGEST_PITCH: u64 = i32::MAX as u64;

/// Sources are read in the order of the stream.
fn in_order() -> CUmemcpyAttributes {
    // Hints are for managed memory.
    let no_hint = CUmemLocation {
        type_: CUmemLocationType::CU_MEM_LOCATION_TYPE_INVALID,
        id: 0,
    };
    CUmemcpyAttributes {
        srcAccessOrder: CUmemcpySrcAccessOrder::CU_MEMCPY_SRC_ACCESS_ORDER_STREAM,
        srcLocHint: no_hint,
        dstLocHint: no_hint,
        flags: 0,
    }
}

/// # Safety
/// See [`super::super::Device::copy_batch`].
pub(super) unsafe fn batch(driver: &Current, pieces: &[Piece], stream: Stream) -> Result<()> {
    let Some(function) = driver.cuMemcpyBatchAsync else {
        return Err(Error::new(
            ErrorKind::Unsupported,
            "the CUDA driver lacks cuMemcpyBatchAsync",
        ));
    };
    let some = || pieces.iter().filter(|piece| piece.bytes > 0);
    let mut destinations: Vec<u64> = some().map(|piece| piece.destination).collect();
    let mut sources: Vec<u64> = some().map(|piece| piece.source).collect();
    let mut sizes: Vec<usize> = some().map(|piece| piece.bytes as usize).collect();
    let (mut attributes, mut first, mut failed) = (in_order(), 0, usize::MAX);
    let queue = stream::handle(stream)?;
    if sizes.is_empty() {
        return Ok(());
    }
    // SAFETY: three arrays of one length, one set of attributes that begins with the first copy,
    // and the caller's contract.
    let code = unsafe {
        function(
            destinations.as_mut_ptr(),
            sources.as_mut_ptr(),
            sizes.as_mut_ptr(),
            sizes.len(),
            &mut attributes,
            &mut first,
            1,
            &mut failed,
            queue,
        )
    };
    if code == SUCCESS {
        return Ok(());
    }
    let error = driver.error(
        code,
        format_args!(
            "cuMemcpyBatchAsync({} copies, stream {:#x})",
            sizes.len(),
            stream.0
        ),
    );
    let numbered = pieces.iter().enumerate();
    let at = numbered.filter(|(_, piece)| piece.bytes > 0).nth(failed);
    Err(match at {
        Some((at, _)) => error.context(format_args!("pieces[{at}]")),
        None => error,
    })
}

/// A checked copy that is not empty.
///
/// # Safety
/// See [`super::super::Device::copy_pitched`].
pub(super) unsafe fn pitched(
    driver: &Current,
    copy: &Pitched,
    direction: Direction,
    stream: Stream,
) -> Result<()> {
    let plain = |row: Piece| {
        let (to, from) = (row.destination, row.source);
        // SAFETY: by this function's contract.
        unsafe { stream::copy(driver, to, from, row.bytes, direction, stream) }
    };
    if copy.destination_pitch == copy.width && copy.source_pitch == copy.width {
        return plain(Piece {
            destination: copy.destination,
            source: copy.source,
            bytes: copy.width * copy.height,
        });
    }
    let pitch = copy.destination_pitch.max(copy.source_pitch);
    if copy.height == 1 || pitch > LARGEST_PITCH {
        return copy.rows().try_for_each(plain);
    }
    let host = CUmemorytype::CU_MEMORYTYPE_HOST;
    let device = CUmemorytype::CU_MEMORYTYPE_DEVICE;
    let (to, from) = match direction {
        Direction::ToHost => (host, device),
        Direction::ToDevice => (device, host),
        Direction::OnDevice => (device, device),
    };
    // Of the pointers on each side the driver reads the one that its memory type names.
    let parameters = CUDA_MEMCPY2D {
        srcXInBytes: 0,
        srcY: 0,
        srcMemoryType: from,
        srcHost: ptr::with_exposed_provenance::<c_void>(copy.source as usize),
        srcDevice: copy.source,
        srcArray: ptr::null_mut(),
        srcPitch: copy.source_pitch as usize,
        dstXInBytes: 0,
        dstY: 0,
        dstMemoryType: to,
        dstHost: ptr::with_exposed_provenance_mut::<c_void>(copy.destination as usize),
        dstDevice: copy.destination,
        dstArray: ptr::null_mut(),
        dstPitch: copy.destination_pitch as usize,
        WidthInBytes: copy.width as usize,
        Height: copy.height as usize,
    };
    // SAFETY: by this function's contract.
    let code = unsafe { (driver.cuMemcpy2DAsync_v2)(&parameters, stream::handle(stream)?) };
    driver.check(
        code,
        format_args!(
            "cuMemcpy2DAsync({direction:?}, {copy:x?}, stream {:#x})",
            stream.0
        ),
    )
}

/// From memory of `source_context` to memory of `destination_context`.
///
/// # Safety
/// See [`super::super::Device::copy_to_peer`]; both contexts are alive.
pub(super) unsafe fn to_peer(
    driver: &Current,
    piece: Piece,
    destination_context: CUcontext,
    source_context: CUcontext,
    stream: Stream,
) -> Result<()> {
    let Piece {
        destination,
        source,
        bytes,
    } = piece;
    // SAFETY: by this function's contract; the driver checks the addresses.
    let code = unsafe {
        (driver.cuMemcpyPeerAsync)(
            destination,
            destination_context,
            source,
            source_context,
            bytes as usize,
            stream::handle(stream)?,
        )
    };
    driver.check(
        code,
        format_args!(
            "cuMemcpyPeerAsync({bytes} bytes from {source:#x} to {destination:#x}, stream {:#x})",
            stream.0
        ),
    )
}
