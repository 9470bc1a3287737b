//! The table of driver entry points: each found by name in `libcuda.so.1`, once for the process.
//!
//! Every entry returns a plain `c_int`, and everything that the driver writes is received in plain
//! integers, so that no value of a newer driver is undefined behaviour. `cudarc` gives the types of
//! what goes in; none of its functions is called, because they panic where a symbol is missing.

use std::ffi::{CStr, CString, c_char, c_int, c_uchar, c_uint, c_ulonglong, c_void};
use std::fmt;
use std::ptr::NonNull;
use std::sync::OnceLock;

use cudarc::driver::sys::{
    CUDA_MEMCPY2D, CUcontext, CUdevice, CUdeviceptr, CUevent, CUfunction, CUmemAccessDesc,
    CUmemAllocationProp, CUmemGenericAllocationHandle, CUmemcpyAttributes, CUmodule, CUstream,
};

use crate::error::{Error, ErrorKind, Result};
use crate::process;

const LIBRARY: &CStr = c"libcuda.so.1";

/// The oldest driver this library works with, as the driver counts: 1000 × major + 10 × minor.
pub const OLDEST_VERSION: u32 = 12_000;

macro_rules! driver_table {
    (
        required { $($name:ident($($argument:ty),*);)* }
        optional { $($extra:ident($($extra_argument:ty),*);)* }
    ) => {
        /// The driver's functions under their own names. Optional ones are `None` where the driver
        /// lacks them.
        #[allow(non_snake_case)]
        pub struct DriverTable {
            $(pub $name: unsafe extern "C" fn($($argument),*) -> c_int,)*
            $(pub $extra: Option<unsafe extern "C" fn($($extra_argument),*) -> c_int>,)*
            /// The optional functions that the driver lacks.
            pub missing: Vec<&'static str>,
        }

        impl DriverTable {
            #[allow(non_snake_case)]
            fn resolve(library: &Library) -> Result<DriverTable> {
                let mut absent: Vec<&'static str> = Vec::new();
                let mut missing: Vec<&'static str> = Vec::new();
                $(let $name = library.symbol(stringify!($name), &mut absent);)*
                $(let $extra = library.symbol(stringify!($extra), &mut missing);)*
                let ($(Some($name),)*) = ($($name,)*) else {
                    return Err(lacks(&absent));
                };
                Ok(DriverTable {
                    // SAFETY: the driver exports this name with this signature, and a function
                    // pointer has the size of a data pointer.
                    $($name: unsafe {
                        std::mem::transmute::<
                            NonNull<c_void>,
                            unsafe extern "C" fn($($argument),*) -> c_int,
                        >($name)
                    },)*
                    // SAFETY: as above.
                    $($extra: $extra.map(|symbol| unsafe {
                        std::mem::transmute::<
                            NonNull<c_void>,
                            unsafe extern "C" fn($($extra_argument),*) -> c_int,
                        >(symbol)
                    }),)*
                    missing,
                })
            }
        }
    };
}

driver_table! {
    required {
        cuInit(c_uint);
        cuDriverGetVersion(*mut c_int);
        cuDeviceGetCount(*mut c_int);
        cuDeviceGet(*mut CUdevice, c_int);
        cuDeviceGetName(*mut c_char, c_int, CUdevice);
        cuDeviceGetAttribute(*mut c_int, c_uint, CUdevice);
        cuDevicePrimaryCtxRetain(*mut CUcontext, CUdevice);
        cuDevicePrimaryCtxRelease_v2(CUdevice);
        cuCtxPushCurrent_v2(CUcontext);
        cuCtxPopCurrent_v2(*mut CUcontext);
        cuCtxGetCurrent(*mut CUcontext);
        cuCtxGetDevice(*mut CUdevice);
        cuCtxSynchronize();
        cuMemGetInfo_v2(*mut usize, *mut usize);
        cuMemGetAllocationGranularity(*mut usize, *const CUmemAllocationProp, c_uint);
        cuMemAddressReserve(*mut CUdeviceptr, usize, usize, CUdeviceptr, c_ulonglong);
        cuMemAddressFree(CUdeviceptr, usize);
        cuMemCreate(
            *mut CUmemGenericAllocationHandle, usize, *const CUmemAllocationProp, c_ulonglong
        );
        cuMemRelease(CUmemGenericAllocationHandle);
        cuMemMap(CUdeviceptr, usize, usize, CUmemGenericAllocationHandle, c_ulonglong);
        cuMemUnmap(CUdeviceptr, usize);
        cuMemSetAccess(CUdeviceptr, usize, *const CUmemAccessDesc, usize);
        cuMemHostRegister_v2(*mut c_void, usize, c_uint);
        cuMemHostUnregister(*mut c_void);
        cuStreamCreate(*mut CUstream, c_uint);
        cuStreamDestroy_v2(CUstream);
        cuStreamSynchronize(CUstream);
        cuStreamWaitEvent(CUstream, CUevent, c_uint);
        cuEventCreate(*mut CUevent, c_uint);
        cuEventDestroy_v2(CUevent);
        cuEventRecord(CUevent, CUstream);
        cuEventQuery(CUevent);
        cuEventSynchronize(CUevent);
        cuMemcpyHtoDAsync_v2(CUdeviceptr, *const c_void, usize, CUstream);
        cuMemcpyDtoHAsync_v2(*mut c_void, CUdeviceptr, usize, CUstream);
        cuMemcpyDtoDAsync_v2(CUdeviceptr, CUdeviceptr, usize, CUstream);
        cuMemcpy2DAsync_v2(*const CUDA_MEMCPY2D, CUstream);
        cuMemcpyPeerAsync(CUdeviceptr, CUcontext, CUdeviceptr, CUcontext, usize, CUstream);
        cuMemsetD8Async(CUdeviceptr, c_uchar, usize, CUstream);
        cuPointerGetAttributes(c_uint, *mut c_uint, *mut *mut c_void, CUdeviceptr);
        cuModuleLoadData(*mut CUmodule, *const c_void);
        cuModuleUnload(CUmodule);
        cuModuleGetFunction(*mut CUfunction, CUmodule, *const c_char);
        cuLaunchKernel(
            CUfunction, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, CUstream,
            *mut *mut c_void, *mut *mut c_void
        );
    }
    optional {
        cuGetErrorName(c_int, *mut *const c_char);
        cuGetErrorString(c_int, *mut *const c_char);
        cuDeviceCanAccessPeer(*mut c_int, CUdevice, CUdevice);
        cuDeviceGetPCIBusId(*mut c_char, c_int, CUdevice);
        cuDevicePrimaryCtxGetState(CUdevice, *mut c_uint, *mut c_int);
        cuThreadExchangeStreamCaptureMode(*mut c_int);
        cuStreamIsCapturing(CUstream, *mut c_int);
        cuMemExportToShareableHandle(
            *mut c_void, CUmemGenericAllocationHandle, c_uint, c_ulonglong
        );
        cuMemImportFromShareableHandle(*mut CUmemGenericAllocationHandle, *mut c_void, c_uint);
        cuMemHostGetFlags(*mut c_uint, *mut c_void);
        // From CUDA 12.8 on. CUDA 13 left out the failed index; drivers export that form as
        // `cuMemcpyBatchAsync_v2` (headers of 13 map the plain name to it) and under this name still
        // the one of 12.8, as they do for every function that changed.
        cuMemcpyBatchAsync(
            *mut CUdeviceptr, *mut CUdeviceptr, *mut usize, usize, *mut CUmemcpyAttributes,
            *mut usize, usize, *mut usize, CUstream
        );
    }
}

/// Set once the library was found with every required function.
static TABLE: OnceLock<DriverTable> = OnceLock::new();

impl DriverTable {
    /// Finds the driver, without initialising it. A failure is not remembered: a launcher may
    /// bring the driver in later.
    pub fn load() -> Result<&'static DriverTable> {
        process::check()?;
        if let Some(table) = TABLE.get() {
            return Ok(table);
        }
        let table = DriverTable::resolve(&Library::open()?)?;
        Ok(TABLE.get_or_init(|| table))
    }

    /// The table if [`Self::load`] has succeeded before; never opens a library.
    pub fn loaded() -> Option<&'static DriverTable> {
        TABLE.get()
    }

    /// Initialises the driver and gives its version and number of devices, both known to be usable.
    pub(super) fn initialise(&self) -> Result<(u32, u32)> {
        // SAFETY: no pointers; the driver allows repeated calls.
        let code = unsafe { (self.cuInit)(0) };
        self.check(code, format_args!("cuInit"))
            .map_err(only_no_device)?;
        let version = self.version()?;
        let mut count = 0;
        // SAFETY: `count` is writable.
        let code = unsafe { (self.cuDeviceGetCount)(&mut count) };
        self.check(code, format_args!("cuDeviceGetCount"))
            .map_err(only_no_device)?;
        match u32::try_from(count) {
            Ok(count @ 1..) => Ok((version, count)),
            _ => Err(Error::new(
                ErrorKind::NoDevice,
                "the CUDA driver shows no device (CUDA_VISIBLE_DEVICES may hide them)",
            )),
        }
    }

    fn version(&self) -> Result<u32> {
        let mut version = 0;
        // SAFETY: `version` is writable.
        let code = unsafe { (self.cuDriverGetVersion)(&mut version) };
        self.check(code, format_args!("cuDriverGetVersion"))
            .map_err(only_no_device)?;
        usable_version(version)
    }
}

impl fmt::Debug for DriverTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DriverTable")
            .field("missing", &self.missing)
            .finish_non_exhaustive()
    }
}

/// A driver that is there and fails is never taken for a machine without one.
fn only_no_device(error: Error) -> Error {
    match error.kind() {
        ErrorKind::NoDevice | ErrorKind::Shutdown => error,
        _ => error.with_kind(ErrorKind::Device),
    }
}

fn usable_version(version: c_int) -> Result<u32> {
    match u32::try_from(version) {
        Ok(version) if version >= OLDEST_VERSION => Ok(version),
        _ => Err(Error::new(
            ErrorKind::NoDevice,
            format!(
                "the CUDA driver supports CUDA {}, and {} is needed; update the driver",
                readable_version(version.try_into().unwrap_or(0)),
                readable_version(OLDEST_VERSION),
            ),
        )),
    }
}

/// "12.8" for 12080.
pub fn readable_version(version: u32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

fn lacks(absent: &[&str]) -> Error {
    Error::new(
        ErrorKind::NoDevice,
        format!(
            "libcuda.so.1 lacks {}; update the driver",
            absent.join(", ")
        ),
    )
}

/// The open driver library. It is never closed: its functions are kept for the life of the process,
/// and closing a driver that turned out unusable would run its destructors in the host's process.
struct Library(NonNull<c_void>);

impl Library {
    fn open() -> Result<Library> {
        // SAFETY: a constant string; the constructors that run are the driver's own.
        let handle = unsafe { libc::dlopen(LIBRARY.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        NonNull::new(handle).map(Library).ok_or_else(|| {
            Error::new(
                ErrorKind::NoDevice,
                format!("the CUDA driver cannot be loaded: {}", loader_message()),
            )
        })
    }

    /// The address of `name`, which is added to `absent` if there is none.
    fn symbol(
        &self,
        name: &'static str,
        absent: &mut Vec<&'static str>,
    ) -> Option<NonNull<c_void>> {
        let found = CString::new(name).ok().and_then(|name| {
            // SAFETY: the handle is open and the name a C string.
            NonNull::new(unsafe { libc::dlsym(self.0.as_ptr(), name.as_ptr()) })
        });
        if found.is_none() {
            absent.push(name);
        }
        found
    }
}

/// What the loader said of this thread's last failure.
fn loader_message() -> String {
    // SAFETY: returns NULL or a string that is valid until this thread's next loader call.
    let message = unsafe { libc::dlerror() };
    if message.is_null() {
        return String::from("no reason given");
    }
    // SAFETY: as above, and it is copied at once.
    let message = unsafe { CStr::from_ptr(message) };
    message.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_read_as_nvidia_writes_them() {
        assert_eq!(readable_version(12_080), "12.8");
        assert_eq!(readable_version(13_000), "13.0");
        assert_eq!(readable_version(11_080), "11.8");
    }

    #[test]
    fn old_versions_are_no_device() {
        assert_eq!(usable_version(12_000).unwrap(), 12_000);
        assert_eq!(usable_version(13_020).unwrap(), 13_020);
        for version in [11_080, 0, -1, c_int::MIN] {
            let error = usable_version(version).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::NoDevice);
            assert!(error.to_string().contains("12.0"), "{error}");
        }
    }

    #[test]
    fn a_failing_driver_is_not_a_missing_one() {
        let kind = |kind| only_no_device(Error::new(kind, "")).kind();
        assert_eq!(kind(ErrorKind::NoDevice), ErrorKind::NoDevice);
        assert_eq!(kind(ErrorKind::OutOfDeviceMemory), ErrorKind::Device);
        assert_eq!(kind(ErrorKind::DeviceLost), ErrorKind::Device);
    }
}
