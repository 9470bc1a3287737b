//! The peers of the benchmarks: copies as a program makes them without this library, straight
//! through the CUDA driver. On the host device they are `memcpy`.
//!
//! Not a model for applications: errors end the benchmark, and contexts stay current.

use std::ffi::{CStr, c_int, c_uint, c_void};
use std::ptr;

use cudarc::driver::sys::{CUDA_MEMCPY2D_st, CUmemorytype};
use tms_memcache::device::DeviceKind;

use super::Result;

/// Rows of `width` bytes that begin `pitch` bytes apart on either side.
#[derive(Clone, Copy, Debug)]
pub struct Rows {
    pub destination_pitch: usize,
    pub source_pitch: usize,
    pub width: usize,
    pub height: usize,
}

type Handle = *mut c_void;

type Retain = unsafe extern "C" fn(*mut Handle, c_int) -> c_int;
type OnHandle = unsafe extern "C" fn(Handle) -> c_int;
type StreamCreate = unsafe extern "C" fn(*mut Handle, c_uint) -> c_int;
type Copy = unsafe extern "C" fn(u64, u64, usize) -> c_int;
type CopyAsync = unsafe extern "C" fn(u64, u64, usize, Handle) -> c_int;
type CopyPeer = unsafe extern "C" fn(u64, Handle, u64, Handle, usize, Handle) -> c_int;
type CopyRows = unsafe extern "C" fn(*const CUDA_MEMCPY2D_st, Handle) -> c_int;
type Attributes = unsafe extern "C" fn(c_uint, *const c_int, *const Handle, u64) -> c_int;

/// The driver's entry points that a bare copy needs.
struct Driver {
    set_current: OnHandle,
    stream_create: StreamCreate,
    stream_synchronize: OnHandle,
    copy: Copy,
    copy_async: CopyAsync,
    copy_peer: CopyPeer,
    /// Missing from software drivers.
    copy_rows: Option<CopyRows>,
    attributes: Attributes,
    contexts: Vec<Handle>,
}

/// Copies without the library.
pub struct Bare(Option<Driver>);

/// A stream of one device.
pub struct Lane<'a> {
    bare: &'a Bare,
    device: usize,
    stream: Handle,
}

// SAFETY: a stream of the driver may be used from any thread.
unsafe impl Send for Lane<'_> {}
// SAFETY: the driver's functions may be called from any thread; contexts are only read.
unsafe impl Sync for Bare {}

fn check(what: &str, code: c_int) -> Result<()> {
    match code {
        0 => Ok(()),
        code => Err(format!("{what} returned {code}").into()),
    }
}

impl Driver {
    fn open(devices: u32) -> Result<Driver> {
        // SAFETY: a constant name; the driver is loaded already.
        let library = unsafe { libc::dlopen(c"libcuda.so.1".as_ptr(), libc::RTLD_NOW) };
        if library.is_null() {
            return Err("libcuda.so.1 cannot be loaded".into());
        }
        // SAFETY: the handle is open and stays so; the name is terminated.
        let find = |name: &CStr| unsafe { libc::dlsym(library, name.as_ptr()) };
        macro_rules! entry {
            ($name:literal as $kind:ty) => {{
                let address = find($name);
                if address.is_null() {
                    return Err(format!("the driver has no {}", $name.to_string_lossy()).into());
                }
                // SAFETY: the function of this name has this signature.
                unsafe { std::mem::transmute::<*mut c_void, $kind>(address) }
            }};
        }
        let retain = entry!(c"cuDevicePrimaryCtxRetain" as Retain);
        let copy_rows = find(c"cuMemcpy2DAsync_v2");
        let mut driver = Driver {
            set_current: entry!(c"cuCtxSetCurrent" as OnHandle),
            stream_create: entry!(c"cuStreamCreate" as StreamCreate),
            stream_synchronize: entry!(c"cuStreamSynchronize" as OnHandle),
            copy: entry!(c"cuMemcpy" as Copy),
            copy_async: entry!(c"cuMemcpyAsync" as CopyAsync),
            copy_peer: entry!(c"cuMemcpyPeerAsync" as CopyPeer),
            // SAFETY: NULL is the `None` of a function pointer; otherwise as for the others.
            copy_rows: unsafe { std::mem::transmute::<*mut c_void, Option<CopyRows>>(copy_rows) },
            attributes: entry!(c"cuPointerGetAttributes" as Attributes),
            contexts: Vec::new(),
        };
        for device in 0..devices {
            let mut context = ptr::null_mut();
            // SAFETY: `context` is writable; without device 0's driver there would be no devices.
            check("cuDevicePrimaryCtxRetain", unsafe {
                retain(&mut context, device as c_int)
            })?;
            driver.contexts.push(context);
        }
        Ok(driver)
    }
}

impl Bare {
    /// For a platform of `devices` devices that the library has opened.
    pub fn open(kind: DeviceKind, devices: u32) -> Result<Bare> {
        Ok(Bare(match kind {
            DeviceKind::Cuda => Some(Driver::open(devices)?),
            DeviceKind::Host => None,
        }))
    }

    /// How the peers are called in tables: copies that wait, and copies that are queued.
    pub fn names(&self) -> (&'static str, &'static str) {
        match self.0 {
            Some(_) => ("cuMemcpy", "cuMemcpyAsync"),
            None => ("memcpy", "memcpy"),
        }
    }

    pub fn lane(&self, device: u32) -> Result<Lane<'_>> {
        let mut stream = ptr::null_mut();
        if let Some(driver) = &self.0 {
            self.enter(device as usize)?;
            // SAFETY: `stream` is writable; 1 makes a stream apart from the legacy one.
            check("cuStreamCreate", unsafe {
                (driver.stream_create)(&mut stream, 1)
            })?;
        }
        Ok(Lane {
            bare: self,
            device: device as usize,
            stream,
        })
    }

    fn enter(&self, device: usize) -> Result<()> {
        match &self.0 {
            // SAFETY: a context that stays retained.
            Some(driver) => check("cuCtxSetCurrent", unsafe {
                (driver.set_current)(driver.contexts[device])
            }),
            None => Ok(()),
        }
    }

    /// Copies and waits; pageable memory goes through the driver's own staging.
    ///
    /// # Safety
    /// Both ranges are valid for `bytes` and nobody else uses them.
    pub unsafe fn copy(
        &self,
        device: u32,
        destination: u64,
        source: u64,
        bytes: usize,
    ) -> Result<()> {
        self.enter(device as usize)?;
        match &self.0 {
            // SAFETY: the caller's promise.
            Some(driver) => check("cuMemcpy", unsafe {
                (driver.copy)(destination, source, bytes)
            }),
            None => {
                // SAFETY: the caller's promise; memory of the host device has host addresses.
                unsafe {
                    ptr::copy_nonoverlapping(source as *const u8, destination as *mut u8, bytes)
                };
                Ok(())
            }
        }
    }

    /// Asks the driver what an address is; `false` where there is no driver.
    pub fn classify(&self, address: u64) -> Result<bool> {
        let Some(driver) = &self.0 else {
            return Ok(false);
        };
        let (mut kind, mut ordinal, mut managed) = (0_u32, 0_i32, 0_u32);
        // CU_POINTER_ATTRIBUTE_MEMORY_TYPE, _DEVICE_ORDINAL, _IS_MANAGED.
        let wanted: [c_int; 3] = [2, 9, 8];
        let found: [Handle; 3] = [
            (&raw mut kind).cast(),
            (&raw mut ordinal).cast(),
            (&raw mut managed).cast(),
        ];
        // SAFETY: three attributes, and three places of the size that each of them has.
        check("cuPointerGetAttributes", unsafe {
            (driver.attributes)(3, wanted.as_ptr(), found.as_ptr(), address)
        })?;
        Ok(true)
    }
}

impl Lane<'_> {
    /// The stream, as the library takes it; NULL on the host device.
    pub fn handle(&self) -> *mut c_void {
        self.stream
    }

    /// Makes the lane's device current on this thread, once before many copies.
    pub fn enter(&self) -> Result<()> {
        self.bare.enter(self.device)
    }

    /// Queues a copy; call [`Self::enter`] before.
    ///
    /// # Safety
    /// Both ranges are valid for `bytes` until the lane was synchronised.
    pub unsafe fn copy(&self, destination: u64, source: u64, bytes: usize) -> Result<()> {
        match &self.bare.0 {
            // SAFETY: the caller's promise.
            Some(driver) => check("cuMemcpyAsync", unsafe {
                (driver.copy_async)(destination, source, bytes, self.stream)
            }),
            // SAFETY: the caller's promise.
            None => unsafe {
                self.bare
                    .copy(self.device as u32, destination, source, bytes)
            },
        }
    }

    /// Queues a copy from the lane's device to the device `peer`.
    ///
    /// # Safety
    /// As for [`Self::copy`].
    pub unsafe fn copy_to_peer(
        &self,
        peer: u32,
        destination: u64,
        source: u64,
        bytes: usize,
    ) -> Result<()> {
        let Some(driver) = &self.bare.0 else {
            // SAFETY: the caller's promise.
            return unsafe { self.copy(destination, source, bytes) };
        };
        let (to, from) = (driver.contexts[peer as usize], driver.contexts[self.device]);
        // SAFETY: the caller's promise; the contexts stay retained.
        check("cuMemcpyPeerAsync", unsafe {
            (driver.copy_peer)(destination, to, source, from, bytes, self.stream)
        })
    }

    /// Queues a copy of rows; `false` if the driver has no such function.
    ///
    /// # Safety
    /// As for [`Self::copy`], for every row.
    pub unsafe fn copy_rows(&self, destination: u64, source: u64, rows: &Rows) -> Result<bool> {
        let Some(driver) = &self.bare.0 else {
            for row in 0..rows.height {
                let to = destination + (row * rows.destination_pitch) as u64;
                let from = source + (row * rows.source_pitch) as u64;
                // SAFETY: the caller's promise.
                unsafe { self.copy(to, from, rows.width) }?;
            }
            return Ok(true);
        };
        let Some(copy_rows) = driver.copy_rows else {
            return Ok(false);
        };
        // Unified: the driver finds out from the address, which stands where a device's would.
        let copy = CUDA_MEMCPY2D_st {
            srcXInBytes: 0,
            srcY: 0,
            srcMemoryType: CUmemorytype::CU_MEMORYTYPE_UNIFIED,
            srcHost: ptr::null(),
            srcDevice: source,
            srcArray: ptr::null_mut(),
            srcPitch: rows.source_pitch,
            dstXInBytes: 0,
            dstY: 0,
            dstMemoryType: CUmemorytype::CU_MEMORYTYPE_UNIFIED,
            dstHost: ptr::null_mut(),
            dstDevice: destination,
            dstArray: ptr::null_mut(),
            dstPitch: rows.destination_pitch,
            WidthInBytes: rows.width,
            Height: rows.height,
        };
        // SAFETY: the caller's promise.
        check("cuMemcpy2DAsync", unsafe { copy_rows(&copy, self.stream) })?;
        Ok(true)
    }

    /// Waits for the copies that were queued.
    pub fn synchronize(&self) -> Result<()> {
        match &self.bare.0 {
            // SAFETY: a stream of this lane.
            Some(driver) => check("cuStreamSynchronize", unsafe {
                (driver.stream_synchronize)(self.stream)
            }),
            None => Ok(()),
        }
    }
}
