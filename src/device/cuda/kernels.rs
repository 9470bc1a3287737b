//! The library's kernels on one device: loading them, and queueing them on a stream.
//!
//! Their sources and how they are compiled are in `kernels/`. The PTX is compiled for the device by
//! the driver, when the device is opened, so that no launch has to.

use std::ffi::{CStr, c_uint, c_void};
use std::ptr;

use cudarc::driver::sys::{CUfunction, CUmodule};

use super::super::fingerprint::{Block, Key, Print};
use super::super::{Piece, Stream};
use super::code::SUCCESS;
use super::context::{Current, PrimaryContext};
use super::stream;
use crate::error::Result;

/// Threads of a block, of both kernels.
const THREADS: c_uint = 256;
const WARPS: u32 = THREADS / 32;

macro_rules! ptx {
    ($path:literal) => {
        match CStr::from_bytes_with_nul(concat!(include_str!($path), "\0").as_bytes()) {
            Ok(text) => text,
            Err(_) => panic!("PTX has no zero bytes"),
        }
    };
}

const COPY: (&CStr, &CStr) = (ptx!("kernels/copy.ptx"), c"tms_copy_pieces");
const FINGERPRINT: (&CStr, &CStr) = (ptx!("kernels/fingerprint.ptx"), c"tms_fingerprint");

/// A kernel and the module that holds it.
struct Kernel {
    module: CUmodule,
    function: CUfunction,
}

/// Kernels in a primary context. They stay loaded until [`Self::unload`].
pub(super) struct Kernels {
    copy: Kernel,
    fingerprint: Kernel,
}

// SAFETY: the driver allows modules and functions on every thread with their context current; they
// are only passed to the driver.
unsafe impl Send for Kernels {}
// SAFETY: as above.
unsafe impl Sync for Kernels {}

impl Kernel {
    fn load(driver: &Current, (ptx, name): (&CStr, &CStr)) -> Result<Kernel> {
        let mut module: CUmodule = ptr::null_mut();
        // SAFETY: `module` is writable; the image is PTX and ends with a zero byte.
        let code = unsafe { (driver.cuModuleLoadData)(&mut module, ptx.as_ptr().cast()) };
        driver.check(code, format_args!("cuModuleLoadData({name:?})"))?;
        let mut function: CUfunction = ptr::null_mut();
        // SAFETY: `function` is writable, the module was just loaded, the name is a C string.
        let code = unsafe { (driver.cuModuleGetFunction)(&mut function, module, name.as_ptr()) };
        let kernel = Kernel { module, function };
        driver
            .check(code, format_args!("cuModuleGetFunction({name:?})"))
            .inspect_err(|_| kernel.unload(driver))?;
        Ok(kernel)
    }

    fn unload(&self, driver: &Current) {
        // SAFETY: loaded by `load`, and its owner gives it up.
        let code = unsafe { (driver.cuModuleUnload)(self.module) };
        if code != SUCCESS {
            tracing::warn!("cuModuleUnload: {}", driver.describe(code));
        }
    }

    /// # Safety
    /// The parameters are those of the kernel, and what they point to is as it expects.
    unsafe fn launch(
        &self,
        driver: &Current,
        name: &CStr,
        blocks: c_uint,
        stream: Stream,
        parameters: &mut [*mut c_void],
    ) -> Result<()> {
        let queue = stream::handle(stream)?;
        // SAFETY: by this function's contract; the driver copies the parameters during the call.
        let code = unsafe {
            (driver.cuLaunchKernel)(
                self.function,
                blocks,
                1,
                1,
                THREADS,
                1,
                1,
                0,
                queue,
                parameters.as_mut_ptr(),
                ptr::null_mut(),
            )
        };
        driver.check(
            code,
            format_args!(
                "cuLaunchKernel({name:?}, {blocks} blocks, stream {:#x})",
                stream.0
            ),
        )
    }
}

impl Kernels {
    /// `None` where they cannot run: they are a faster way, not the only one.
    pub(super) fn open(
        context: &PrimaryContext,
        ordinal: u32,
        reaches_host: bool,
    ) -> Option<Kernels> {
        if !reaches_host {
            tracing::info!("device {ordinal}: kernels cannot use pinned memory; they are off");
            return None;
        }
        let loaded = context.run(Kernels::load).inspect_err(|error| {
            tracing::warn!("device {ordinal}: copies and checks go without kernels: {error}");
        });
        loaded.ok()
    }

    fn load(driver: &Current) -> Result<Kernels> {
        let copy = Kernel::load(driver, COPY)?;
        let fingerprint = Kernel::load(driver, FINGERPRINT).inspect_err(|_| copy.unload(driver))?;
        Ok(Kernels { copy, fingerprint })
    }

    pub(super) fn unload(&self, driver: &Current) {
        self.copy.unload(driver);
        self.fingerprint.unload(driver);
    }

    /// # Safety
    /// See [`super::super::Device::copy_pieces`].
    pub(super) unsafe fn copy_pieces(
        &self,
        driver: &Current,
        list: *const Piece,
        count: u32,
        blocks: u32,
        stream: Stream,
    ) -> Result<()> {
        let blocks = blocks.min(count.div_ceil(WARPS));
        let (mut list, mut count) = (list, count);
        let mut parameters = [parameter(&mut list), parameter(&mut count)];
        // SAFETY: the parameters of the kernel; the rest is this function's contract.
        unsafe {
            self.copy
                .launch(driver, COPY.1, blocks, stream, &mut parameters)
        }
    }

    /// # Safety
    /// See [`super::super::Device::fingerprint`].
    pub(super) unsafe fn fingerprint(
        &self,
        driver: &Current,
        key: &Key,
        blocks: *const Block,
        prints: *mut Print,
        count: u32,
        stream: Stream,
    ) -> Result<()> {
        let (mut key, mut blocks, mut prints) = (key.clone(), blocks, prints);
        let mut number = count;
        let mut parameters = [
            parameter(&mut key),
            parameter(&mut blocks),
            parameter(&mut prints),
            parameter(&mut number),
        ];
        let grid = count.min(c_uint::MAX >> 1);
        // SAFETY: as for `copy_pieces`.
        unsafe {
            self.fingerprint
                .launch(driver, FINGERPRINT.1, grid, stream, &mut parameters)
        }
    }
}

fn parameter<T>(value: &mut T) -> *mut c_void {
    ptr::from_mut(value).cast()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// PTX 8.0 is what a driver of CUDA 12.0 reads, and sm_80 the oldest device in use.
    #[test]
    fn the_oldest_driver_reads_the_kernels() {
        for (ptx, name) in [COPY, FINGERPRINT] {
            let text = ptx.to_str().unwrap();
            let value = |directive| {
                let line = text.lines().find_map(|line| line.strip_prefix(directive));
                line.unwrap().trim().to_owned()
            };
            assert_eq!(value(".version"), "8.0");
            assert_eq!(value(".target"), "sm_80");
            let entry = format!(".visible .entry {}(", name.to_str().unwrap());
            assert_eq!(text.matches(&entry).count(), 1, "{name:?}");
            assert_eq!(text.matches(".entry").count(), 1, "{name:?}");
            assert_eq!(value(".maxntid"), format!("{THREADS}, 1, 1"));
        }
    }

    #[test]
    fn the_key_has_the_size_of_the_parameter() {
        let text = FINGERPRINT.0.to_str().unwrap();
        let parameter = format!(
            ".param .align 8 .b8 tms_fingerprint_param_0[{}]",
            size_of::<Key>()
        );
        assert!(text.contains(&parameter));
        assert!(size_of::<Key>() <= 4096);
    }
}
