//! What devices there are.

use std::ffi::c_char;

use super::argument::{Sized32, fill_struct, fill_text, out, stated_size};
use super::fence::fence;
use super::forward::forward;
use super::status::TMS_OK;
use crate::allocator::Saver;
use crate::device::DeviceKind;
use crate::error::{Error, Result};

/// The host device: memory of this machine, for machines without a GPU.
pub const TMS_DEVICE_HOST: i32 = 0;
/// A CUDA device.
pub const TMS_DEVICE_CUDA: i32 = 1;

/// Flag of tms_device_info_t: memory can be exported to other processes.
pub const TMS_DEVICE_CAN_EXPORT: u32 = 1;
/// Flag of tms_device_info_t: memory is created for GPUDirect RDMA.
pub const TMS_DEVICE_RDMA: u32 = 2;

/// A device. Set struct_size before the call.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct tms_device_info_t {
    /// sizeof this struct.
    pub struct_size: u32,
    /// TMS_DEVICE_HOST or TMS_DEVICE_CUDA.
    pub kind: i32,
    /// Position among the visible devices, from 0.
    pub ordinal: u32,
    /// 13000 for CUDA 13.0; 0 on the host device.
    pub driver_version: u32,
    /// Memory is taken in multiples of this, bytes.
    pub granularity: u64,
    /// Memory of the device, bytes.
    pub total_bytes: u64,
    /// Memory that is free now, bytes, all processes counted.
    pub free_bytes: u64,
    /// TMS_DEVICE_CAN_EXPORT, TMS_DEVICE_RDMA.
    pub flags: u32,
    /// Devices that can be given access to this one's memory.
    pub peer_count: u32,
    /// Name of the device, cut if longer.
    pub name: [c_char; 128],
    /// Driver functions that are missing, and "kernels" where those of this library cannot run,
    /// separated by commas; the features that need them are off.
    pub missing: [c_char; 256],
}

// SAFETY: `repr(C)`, plain data, `struct_size` first.
unsafe impl Sized32 for tms_device_info_t {}

/// An ordinal of the border: −1 means the thread's current device.
pub(super) fn ordinal(device: i32) -> Result<Option<u32>> {
    match device {
        -1 => Ok(None),
        device => u32::try_from(device).map(Some).map_err(|_| {
            Error::invalid(
                "device",
                format_args!("is {device}, must be −1 or an ordinal"),
            )
        }),
    }
}

/// Number of devices of the default saver's platform.
///
/// `count` receives it; not NULL. Opens the platform on the first call. Any thread.
///
/// Returns TMS_OK, TMS_ERR_NULL_POINTER, or why no device can be used (TMS_ERR_NO_DEVICE,
/// TMS_ERR_DEVICE, TMS_ERR_INVALID_ARGUMENT for a bad TMS_DEVICE).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tms_device_count(count: *mut u32) -> i32 {
    forward!(tms_device_count(count));
    fence(|| {
        let count = out(count, "count")?;
        let devices = super::saver::default_saver()?.platform().device_count();
        // SAFETY: valid for writes by the function's contract.
        unsafe { count.write(devices) };
        Ok(TMS_OK)
    })
}

/// Describes a device of the default saver's platform and makes it ready.
///
/// `device` is an ordinal, or −1 for the thread's current device. `info` is filled; not NULL, its
/// struct_size must be set. Any thread.
///
/// Returns TMS_OK, TMS_ERR_NULL_POINTER, TMS_ERR_INVALID_ARGUMENT (no such device), or why no
/// device can be used.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tms_device_info(device: i32, info: *mut tms_device_info_t) -> i32 {
    forward!(tms_device_info(device, info));
    fence(|| {
        // SAFETY: valid for reads of its size by the function's contract.
        let stated = unsafe { stated_size(info, "info") }?;
        let saver = super::saver::default_saver()?;
        let filled = describe(&saver, ordinal(device)?)?;
        // SAFETY: valid for writes of the stated size by the function's contract.
        unsafe { fill_struct(info, stated, &filled) };
        Ok(TMS_OK)
    })
}

fn describe(saver: &Saver, ordinal: Option<u32>) -> Result<tms_device_info_t> {
    let platform = saver.platform();
    let device = platform.device(ordinal.unwrap_or_else(|| platform.current_device()))?;
    let (known, memory) = (device.info(), device.memory()?);
    let mut info = tms_device_info_t {
        struct_size: 0,
        kind: match known.kind {
            DeviceKind::Host => TMS_DEVICE_HOST,
            DeviceKind::Cuda => TMS_DEVICE_CUDA,
        },
        ordinal: known.ordinal,
        driver_version: known.driver_version,
        granularity: known.granularity,
        total_bytes: memory.total,
        free_bytes: memory.free,
        flags: (u32::from(known.can_export) * TMS_DEVICE_CAN_EXPORT)
            | (u32::from(known.rdma) * TMS_DEVICE_RDMA),
        peer_count: known.peers.len() as u32,
        name: [0; 128],
        missing: [0; 256],
    };
    fill_text(&mut info.name, &known.name);
    fill_text(&mut info.missing, &platform.missing_symbols().join(","));
    Ok(info)
}
