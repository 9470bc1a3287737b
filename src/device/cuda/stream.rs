//! Streams, events, and the work queued on them.
//!
//! Streams of the library are non-blocking and made here. The legacy stream orders the work of the
//! whole context behind it and breaks captures: it is used only where the host names it, see
//! [`Stream::of_host`].

use std::ffi::{c_int, c_void};
use std::ptr;

use cudarc::driver::sys::{CUevent, CUevent_flags, CUstream, CUstream_flags};

use super::super::{Address, Direction, Event, Stream};
use super::code::{CAPTURE_IMPLICIT, NOT_READY, SUCCESS};
use super::context::Current;
use crate::error::{Error, Result};

/// The driver's handle of a stream of the library or of the host.
pub(super) fn handle(stream: Stream) -> Result<CUstream> {
    if stream.0 == 0 {
        return Err(Error::invalid("stream", "0 is not a stream"));
    }
    Ok(ptr::with_exposed_provenance_mut(stream.0 as usize))
}

fn event_handle(event: Event) -> CUevent {
    ptr::with_exposed_provenance_mut(event.0 as usize)
}

pub(super) fn create(driver: &Current) -> Result<Stream> {
    let mut stream: CUstream = ptr::null_mut();
    let flags = CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
    // SAFETY: `stream` is writable.
    let code = unsafe { (driver.cuStreamCreate)(&mut stream, flags) };
    driver.check(code, format_args!("cuStreamCreate"))?;
    Ok(Stream(stream.expose_provenance() as u64))
}

pub(super) fn destroy(driver: &Current, stream: Stream) -> Result<()> {
    // SAFETY: made by `create`, and its owner gives it up.
    let code = unsafe { (driver.cuStreamDestroy_v2)(handle(stream)?) };
    driver.check(code, format_args!("cuStreamDestroy({:#x})", stream.0))
}

pub(super) fn synchronize(driver: &Current, stream: Stream) -> Result<()> {
    // SAFETY: made by `create`.
    let code = unsafe { (driver.cuStreamSynchronize)(handle(stream)?) };
    driver.check(code, format_args!("cuStreamSynchronize({:#x})", stream.0))
}

pub(super) fn wait(driver: &Current, stream: Stream, event: Event) -> Result<()> {
    // SAFETY: both were made here.
    let code = unsafe { (driver.cuStreamWaitEvent)(handle(stream)?, event_handle(event), 0) };
    driver.check(
        code,
        format_args!("cuStreamWaitEvent({:#x}, event {:#x})", stream.0, event.0),
    )
}

/// Whether a stream of the host is being captured; also true of a capture that was broken and has
/// not ended. False where the driver cannot tell.
///
/// Asked of the legacy stream, the driver answers with an error, and breaks nothing, while a
/// blocking stream of the context is captured.
pub(super) fn is_capturing(driver: &Current, stream: u64) -> Result<bool> {
    let Some(function) = driver.cuStreamIsCapturing else {
        return Ok(false);
    };
    let mut status: c_int = 0;
    let handle = ptr::with_exposed_provenance_mut(stream as usize);
    // SAFETY: `status` is writable; the stream is the host's, who keeps it alive during the call.
    match unsafe { function(handle, &mut status) } {
        SUCCESS => Ok(status != 0),
        CAPTURE_IMPLICIT => Ok(true),
        code => Err(driver.error(code, format_args!("cuStreamIsCapturing({stream:#x})"))),
    }
}

pub(super) fn event_create(driver: &Current) -> Result<Event> {
    let mut event: CUevent = ptr::null_mut();
    let flags = CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
    // SAFETY: `event` is writable.
    let code = unsafe { (driver.cuEventCreate)(&mut event, flags) };
    driver.check(code, format_args!("cuEventCreate"))?;
    Ok(Event(event.expose_provenance() as u64))
}

pub(super) fn event_destroy(driver: &Current, event: Event) -> Result<()> {
    // SAFETY: made by `event_create`, and its owner gives it up.
    let code = unsafe { (driver.cuEventDestroy_v2)(event_handle(event)) };
    driver.check(code, format_args!("cuEventDestroy({:#x})", event.0))
}

pub(super) fn event_record(driver: &Current, event: Event, stream: Stream) -> Result<()> {
    // SAFETY: both were made here.
    let code = unsafe { (driver.cuEventRecord)(event_handle(event), handle(stream)?) };
    driver.check(
        code,
        format_args!("cuEventRecord({:#x}, stream {:#x})", event.0, stream.0),
    )
}

pub(super) fn event_query(driver: &Current, event: Event) -> Result<bool> {
    // SAFETY: made by `event_create`.
    match unsafe { (driver.cuEventQuery)(event_handle(event)) } {
        SUCCESS => Ok(true),
        NOT_READY => Ok(false),
        code => Err(driver.error(code, format_args!("cuEventQuery({:#x})", event.0))),
    }
}

pub(super) fn event_synchronize(driver: &Current, event: Event) -> Result<()> {
    // SAFETY: made by `event_create`.
    let code = unsafe { (driver.cuEventSynchronize)(event_handle(event)) };
    driver.check(code, format_args!("cuEventSynchronize({:#x})", event.0))
}

/// # Safety
/// The host side must be valid for `bytes` until the stream has passed the copy, and nobody else
/// may touch it meanwhile.
pub(super) unsafe fn copy(
    driver: &Current,
    destination: u64,
    source: u64,
    bytes: u64,
    direction: Direction,
    stream: Stream,
) -> Result<()> {
    let (queue, length) = (handle(stream)?, bytes as usize);
    // SAFETY: by this function's contract; the driver checks device addresses.
    let code = unsafe {
        match direction {
            Direction::ToHost => {
                let target = ptr::with_exposed_provenance_mut::<c_void>(destination as usize);
                (driver.cuMemcpyDtoHAsync_v2)(target, source, length, queue)
            }
            Direction::ToDevice => {
                let origin = ptr::with_exposed_provenance::<c_void>(source as usize);
                (driver.cuMemcpyHtoDAsync_v2)(destination, origin, length, queue)
            }
            Direction::OnDevice => {
                (driver.cuMemcpyDtoDAsync_v2)(destination, source, length, queue)
            }
        }
    };
    driver.check(
        code,
        format_args!(
            "copy {direction:?} of {bytes} bytes from {source:#x} to {destination:#x} \
             on stream {:#x}",
            stream.0
        ),
    )
}

pub(super) fn fill(
    driver: &Current,
    address: Address,
    value: u8,
    bytes: u64,
    stream: Stream,
) -> Result<()> {
    // SAFETY: the driver checks the range; the stream was made here.
    let code = unsafe { (driver.cuMemsetD8Async)(address, value, bytes as usize, handle(stream)?) };
    driver.check(
        code,
        format_args!(
            "cuMemsetD8Async({address:#x}, {bytes} bytes, stream {:#x})",
            stream.0
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn the_legacy_stream_is_never_used_by_mistake() {
        let error = handle(Stream(0)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        assert_eq!(handle(Stream::of_host(0)).unwrap().addr(), 1);
        assert_eq!(handle(Stream(0x1000)).unwrap().addr(), 0x1000);
    }
}
