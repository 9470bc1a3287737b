//! The host device: a device made of this machine's memory, for machines without a GPU.
//!
//! Addresses are reserved with `mmap`, physical memory is a part of a memory file and counted
//! against a budget per device, and streams are queues served by a few threads. It is a real
//! device, not a mock: contents, access, ordering and errors are those of the trait, and released
//! memory goes back to the system. What kernels do on a GPU its threads do in software.

mod memory;
mod os;
mod pieces;
mod streams;
mod tables;
mod work;

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use self::memory::{GRANULARITY, Memory};
use self::streams::Streams;
use self::work::Work;
use super::fingerprint::{Block, Key, Print};
use super::{
    Address, CreateOptions, Device, DeviceInfo, DeviceKind, Direction, Event, MemoryRange,
    MemoryUse, Physical, Piece, Pitched, Platform, Stream, check,
};
use crate::config;
use crate::error::{Error, Result};
use crate::process;

/// Devices of one platform, at most.
pub const MOST_DEVICES: u32 = 16;

const DEVICES: &str = "TMS_HOST_DEVICES";
const DEVICE_MEMORY: &str = "TMS_HOST_DEVICE_MEMORY";

/// Host devices that share addresses and threads.
///
/// Its devices keep it alive. When it and all of them are dropped, the threads stop, queued work is
/// dropped, and all memory and addresses go back to the system.
#[derive(Debug)]
pub struct HostPlatform {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    devices: u32,
    memory: Arc<Memory>,
    streams: Arc<Streams>,
}

impl Drop for Shared {
    fn drop(&mut self) {
        if process::check().is_err() {
            // A forked child has no threads to join and must not free what its parent uses; at exit
            // the system takes everything.
            std::mem::forget(Arc::clone(&self.memory));
            std::mem::forget(Arc::clone(&self.streams));
            return;
        }
        self.streams.stop();
    }
}

impl HostPlatform {
    /// `devices` (1 to [`MOST_DEVICES`], others are brought into that range) with a budget of
    /// `bytes_per_device` each.
    pub fn new(devices: u32, bytes_per_device: u64) -> Self {
        // Without the watch a forked child would wait for threads that it does not have.
        process::watch();
        let devices = devices.clamp(1, MOST_DEVICES);
        let memory = Arc::new(Memory::new(devices, bytes_per_device));
        HostPlatform {
            shared: Arc::new(Shared {
                devices,
                streams: Arc::new(Streams::new(Arc::clone(&memory))),
                memory,
            }),
        }
    }

    /// As many devices as `TMS_HOST_DEVICES` says (1 to 16, default 1), each with a budget of
    /// `TMS_HOST_DEVICE_MEMORY` (a size such as `512MB` or `2.5G`, default all of the machine's
    /// memory).
    pub fn from_environment() -> Result<Self> {
        let devices = match variable(DEVICES)? {
            Some(text) => parse_devices(&text)?,
            None => 1,
        };
        let bytes = match variable(DEVICE_MEMORY)? {
            Some(text) => parse_memory(&text)?,
            None => os::total_memory()?,
        };
        Ok(HostPlatform::new(devices, bytes))
    }

    /// Whether `pointer` lies in host memory registered with a device of this platform.
    pub fn is_registered(&self, pointer: *const u8) -> bool {
        process::check().is_ok() && self.shared.memory.is_registered(pointer as u64)
    }
}

/// The value of an environment variable, `None` if it is not set or empty.
fn variable(name: &str) -> Result<Option<String>> {
    match std::env::var(name) {
        Ok(text) if text.trim().is_empty() => Ok(None),
        Ok(text) => Ok(Some(text)),
        Err(std::env::VarError::NotPresent) => Ok(None),
        Err(error) => Err(Error::invalid(name, error)),
    }
}

fn parse_devices(text: &str) -> Result<u32> {
    let devices = text.trim().parse().ok();
    devices
        .filter(|devices| (1..=MOST_DEVICES).contains(devices))
        .ok_or_else(|| {
            let why = format!("\"{text}\" is not a number from 1 to {MOST_DEVICES}");
            Error::invalid(DEVICES, why)
        })
}

fn parse_memory(text: &str) -> Result<u64> {
    let bytes = config::parse_size(text).map_err(|why| Error::invalid(DEVICE_MEMORY, why))?;
    if bytes < GRANULARITY {
        let why = format!("\"{text}\" is less than one granule of {GRANULARITY} bytes");
        return Err(Error::invalid(DEVICE_MEMORY, why));
    }
    Ok(bytes)
}

impl Platform for HostPlatform {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Host
    }

    fn device_count(&self) -> u32 {
        self.shared.devices
    }

    fn device(&self, ordinal: u32) -> Result<Arc<dyn Device>> {
        self.check_ordinal(ordinal)?;
        Ok(Arc::new(HostDevice {
            shared: Arc::clone(&self.shared),
            info: DeviceInfo {
                kind: DeviceKind::Host,
                ordinal,
                name: "host memory".to_owned(),
                granularity: GRANULARITY,
                driver_version: 0,
                can_export: true,
                rdma: false,
                peers: (0..self.shared.devices)
                    .filter(|peer| *peer != ordinal)
                    .collect(),
                numa_node: None,
            },
        }))
    }

    fn current_device(&self) -> u32 {
        0
    }

    fn classify(&self, address: u64) -> Result<MemoryRange> {
        process::check()?;
        self.shared.memory.classify(address)
    }
}

/// One device of a [`HostPlatform`].
#[derive(Debug)]
struct HostDevice {
    shared: Arc<Shared>,
    info: DeviceInfo,
}

impl HostDevice {
    /// The tables of memory, unless the process was forked or exits: a lock may be held for ever by
    /// a thread that is not there.
    fn tables(&self) -> Result<&Memory> {
        process::check()?;
        Ok(&self.shared.memory)
    }

    fn streams(&self) -> Result<&Arc<Streams>> {
        process::check()?;
        Ok(&self.shared.streams)
    }

    /// Queues `work` unless it is `nothing`; the stream is checked in any case.
    fn submit(
        &self,
        stream: Stream,
        nothing: bool,
        work: impl FnOnce(&Memory) -> Result<Work>,
    ) -> Result<()> {
        let streams = self.streams()?;
        streams.check(self.info.ordinal, stream)?;
        if nothing {
            return Ok(());
        }
        let work = work(&self.shared.memory)?;
        streams.submit(self.info.ordinal, stream, work)
    }
}

impl Device for HostDevice {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn memory(&self) -> Result<MemoryUse> {
        Ok(self.tables()?.usage(self.info.ordinal))
    }

    fn reserve(&self, bytes: u64) -> Result<Address> {
        self.tables()?.reserve(bytes)
    }

    fn unreserve(&self, address: Address, bytes: u64) -> Result<()> {
        self.tables()?.unreserve(address, bytes)
    }

    fn create(&self, bytes: u64, options: CreateOptions) -> Result<Physical> {
        self.tables()?.create(self.info.ordinal, bytes, options)
    }

    fn release(&self, physical: Physical) -> Result<()> {
        self.tables()?.release(physical)
    }

    fn map(&self, address: Address, bytes: u64, physical: Physical) -> Result<()> {
        self.tables()?.map(address, bytes, physical)
    }

    fn set_access(&self, address: Address, bytes: u64, peers: &[u32]) -> Result<()> {
        let devices = [&[self.info.ordinal], peers].concat();
        self.tables()?.set_access(address, bytes, &devices)
    }

    fn unmap(&self, address: Address, bytes: u64) -> Result<()> {
        self.tables()?.unmap(address, bytes)
    }

    fn synchronize(&self) -> Result<()> {
        self.streams()?.synchronize_device(self.info.ordinal)
    }

    fn stream_create(&self) -> Result<Stream> {
        Ok(self.streams()?.create(self.info.ordinal))
    }

    fn stream_destroy(&self, stream: Stream) -> Result<()> {
        self.streams()?.destroy(self.info.ordinal, stream)
    }

    fn stream_synchronize(&self, stream: Stream) -> Result<()> {
        self.streams()?.synchronize(self.info.ordinal, stream)
    }

    fn stream_wait(&self, stream: Stream, event: Event) -> Result<()> {
        self.streams()?.wait(self.info.ordinal, stream, event)
    }

    /// There is no capture on the host device.
    fn is_capturing(&self, _stream: u64) -> Result<bool> {
        Ok(false)
    }

    fn event_create(&self) -> Result<Event> {
        Ok(self.streams()?.event_create(self.info.ordinal))
    }

    fn event_destroy(&self, event: Event) -> Result<()> {
        self.streams()?.event_destroy(event)
    }

    fn event_record(&self, event: Event, stream: Stream) -> Result<()> {
        self.streams()?
            .event_record(self.info.ordinal, event, stream)
    }

    fn event_query(&self, event: Event) -> Result<bool> {
        self.streams()?.event_query(event)
    }

    fn event_synchronize(&self, event: Event) -> Result<()> {
        self.streams()?.event_synchronize(event)
    }

    unsafe fn copy(
        &self,
        destination: u64,
        source: u64,
        bytes: u64,
        direction: Direction,
        stream: Stream,
    ) -> Result<()> {
        self.submit(stream, bytes == 0, |memory| {
            memory.check_copy(destination, source, bytes, direction)?;
            Ok(Work::Copy {
                destination,
                source,
                bytes,
                direction,
            })
        })
    }

    fn has_kernels(&self) -> bool {
        true
    }

    fn has_batch(&self) -> bool {
        true
    }

    unsafe fn copy_pieces(
        &self,
        list: *const Piece,
        count: u32,
        blocks: u32,
        stream: Stream,
    ) -> Result<()> {
        check::pointer("list", list, count)?;
        check::blocks(blocks)?;
        self.submit(stream, count == 0, |_| {
            Ok(Work::Pieces {
                list: list.expose_provenance() as u64,
                count,
            })
        })
    }

    unsafe fn copy_batch(
        &self,
        pieces: &[Piece],
        direction: Direction,
        stream: Stream,
    ) -> Result<()> {
        check::not_legacy(stream)?;
        self.submit(stream, pieces.is_empty(), |memory| {
            memory.check_batch(pieces, direction)?;
            Ok(Work::Batch {
                pieces: pieces.to_vec(),
                direction,
            })
        })
    }

    unsafe fn copy_pitched(
        &self,
        copy: &Pitched,
        direction: Direction,
        stream: Stream,
    ) -> Result<()> {
        self.submit(stream, copy.is_empty(), |memory| {
            memory.check_pitched(copy, direction)?;
            Ok(Work::Pitched {
                copy: *copy,
                direction,
            })
        })
    }

    unsafe fn copy_to_peer(
        &self,
        destination: u64,
        peer: u32,
        source: u64,
        bytes: u64,
        stream: Stream,
    ) -> Result<()> {
        check::peer(&self.info, peer)?;
        self.submit(stream, bytes == 0, |memory| {
            memory.check_copy(destination, source, bytes, Direction::OnDevice)?;
            let piece = Piece {
                destination,
                source,
                bytes,
            };
            Ok(Work::ToPeer { piece, peer })
        })
    }

    unsafe fn fingerprint(
        &self,
        key: &Key,
        blocks: *const Block,
        prints: *mut Print,
        count: u32,
        stream: Stream,
    ) -> Result<()> {
        check::pointer("blocks", blocks, count)?;
        check::pointer("prints", prints, count)?;
        self.submit(stream, count == 0, |_| {
            Ok(Work::Fingerprint {
                key: Box::new(key.clone()),
                blocks: blocks.expose_provenance() as u64,
                prints: prints.expose_provenance() as u64,
                count,
            })
        })
    }

    fn fill(&self, address: Address, value: u8, bytes: u64, stream: Stream) -> Result<()> {
        self.submit(stream, bytes == 0, |memory| {
            memory.check_fill(address, bytes)?;
            Ok(Work::Fill {
                address,
                value,
                bytes,
            })
        })
    }

    unsafe fn register_host(&self, pointer: *mut u8, bytes: usize) -> Result<()> {
        self.tables()?.register(pointer as u64, bytes as u64)
    }

    unsafe fn unregister_host(&self, pointer: *mut u8) -> Result<()> {
        self.tables()?.unregister(pointer as u64)
    }

    fn export(&self, physical: Physical) -> Result<OwnedFd> {
        self.tables()?.export(physical)
    }

    fn import(&self, descriptor: BorrowedFd<'_>, bytes: u64) -> Result<Physical> {
        self.tables()?.import(self.info.ordinal, descriptor, bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn settings_out_of_range_name_their_variable() {
        for text in ["0", "17", "-1", "two", "1.0", ""] {
            let error = parse_devices(text).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidArgument);
            assert!(error.to_string().starts_with(DEVICES), "{error}");
        }
        for text in ["0", "1MB", "lots"] {
            let error = parse_memory(text).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidArgument);
            assert!(error.to_string().starts_with(DEVICE_MEMORY), "{error}");
        }
    }

    #[test]
    fn settings_in_range_are_taken() {
        assert_eq!(parse_devices(" 16 ").unwrap(), 16);
        assert_eq!(parse_memory("2mb").unwrap(), GRANULARITY);
        assert_eq!(parse_memory("2.5G").unwrap(), 5 << 29);
    }
}
