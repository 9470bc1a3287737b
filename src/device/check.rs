//! Checks of arguments that every implementation makes.

use super::{DeviceInfo, Stream};
use crate::error::{Error, ErrorKind, Result};

/// `pointer` may be NULL only where there is nothing.
pub(super) fn pointer<T>(name: &str, pointer: *const T, count: u32) -> Result<()> {
    if pointer.is_null() && count > 0 {
        return Err(Error::invalid(name, "must not be NULL"));
    }
    Ok(())
}

pub(super) fn blocks(blocks: u32) -> Result<()> {
    if blocks == 0 {
        return Err(Error::invalid("blocks", "must not be 0"));
    }
    Ok(())
}

/// The driver refuses batches on the legacy stream.
pub(super) fn not_legacy(stream: Stream) -> Result<()> {
    if stream == Stream::of_host(0) {
        return Err(Error::new(
            ErrorKind::Unsupported,
            "batched copies are not possible on the legacy stream",
        ));
    }
    Ok(())
}

/// That a copy to `peer` is possible.
pub(super) fn peer(info: &DeviceInfo, peer: u32) -> Result<()> {
    if info.peers.contains(&peer) {
        return Ok(());
    }
    let ordinal = info.ordinal;
    if peer == ordinal {
        return Err(Error::invalid("peer", "is the device itself"));
    }
    Err(Error::new(
        ErrorKind::Unsupported,
        format!("peer: device {ordinal} cannot reach device {peer}"),
    ))
}
