//! The primary context of a device, and the way in and out of it on a thread of the host.
//!
//! Work runs with the context current and the thread's capture mode relaxed, so that no call of
//! ours breaks a capture that is none of ours; afterwards both are what they were. The context is
//! pushed and popped, never set.

use std::cell::Cell;
use std::ffi::c_int;
use std::marker::PhantomData;
use std::ops::Deref;
use std::ptr;

use cudarc::driver::sys::{CUcontext, CUdevice, CUstreamCaptureMode};

use super::code::SUCCESS;
use super::driver::DriverTable;
use crate::error::Result;
use crate::process;

const RELAXED: c_int = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED as c_int;

thread_local! {
    /// The context of the innermost [`PrimaryContext::run`] of this thread, NULL outside of any.
    static ENTERED: Cell<CUcontext> = const { Cell::new(ptr::null_mut()) };
}

/// A reference to a device's primary context.
///
/// Dropping it gives the reference back, except while the process exits: then the system reclaims
/// it, since the driver may be gone already.
pub(super) struct PrimaryContext {
    driver: &'static DriverTable,
    device: CUdevice,
    handle: CUcontext,
}

// SAFETY: the driver allows a context to be current on any number of threads; the handle is only
// passed to the driver.
unsafe impl Send for PrimaryContext {}
// SAFETY: as above.
unsafe impl Sync for PrimaryContext {}

/// Proof that a context is current on this thread; the way to the driver's functions meanwhile.
pub(super) struct Current {
    driver: &'static DriverTable,
    /// It must not leave the thread.
    _thread: PhantomData<*const ()>,
}

impl Deref for Current {
    type Target = DriverTable;

    fn deref(&self) -> &DriverTable {
        self.driver
    }
}

impl PrimaryContext {
    pub(super) fn retain(driver: &'static DriverTable, device: CUdevice) -> Result<Self> {
        process::check()?;
        // Making a context allocates, which a capture in the global mode would not survive.
        let _mode = RelaxedCapture::begin(driver)?;
        let mut handle = ptr::null_mut();
        // SAFETY: `handle` is writable, the device was given by the driver.
        let code = unsafe { (driver.cuDevicePrimaryCtxRetain)(&mut handle, device) };
        driver.check(
            code,
            format_args!("cuDevicePrimaryCtxRetain(device {device})"),
        )?;
        Ok(PrimaryContext {
            driver,
            device,
            handle,
        })
    }

    /// The driver's handle, alive as long as this.
    pub(super) fn handle(&self) -> CUcontext {
        self.handle
    }

    /// Does `work` in this context. Inside of another `run` of the same context and thread it costs
    /// nothing.
    pub(super) fn run<T>(&self, work: impl FnOnce(&Current) -> Result<T>) -> Result<T> {
        process::check()?;
        // A thread that is ending may have no thread-local storage any more: then nothing nests.
        let entered = ENTERED.try_with(Cell::get).unwrap_or(ptr::null_mut());
        let _guard = if entered == self.handle {
            None
        } else {
            Some(Entered::enter(self, entered)?)
        };
        work(&Current {
            driver: self.driver,
            _thread: PhantomData,
        })
    }
}

impl Drop for PrimaryContext {
    fn drop(&mut self) {
        if process::check().is_err() {
            return;
        }
        let Ok(_mode) = RelaxedCapture::begin(self.driver) else {
            tracing::warn!("the primary context of device {} is kept", self.device);
            return;
        };
        // SAFETY: the reference was taken in `retain` and is given back once.
        let code = unsafe { (self.driver.cuDevicePrimaryCtxRelease_v2)(self.device) };
        if code != SUCCESS {
            let reason = self.driver.describe(code);
            tracing::warn!(
                "cuDevicePrimaryCtxRelease(device {}): {reason}",
                self.device
            );
        }
    }
}

/// The context is current and the capture mode relaxed, until dropped.
struct Entered<'a> {
    context: &'a PrimaryContext,
    /// What [`ENTERED`] was before.
    outer: CUcontext,
    /// False where the thread had the context current anyway.
    pushed: bool,
    /// Dropped last, after the pop.
    _mode: RelaxedCapture,
}

impl<'a> Entered<'a> {
    fn enter(context: &'a PrimaryContext, outer: CUcontext) -> Result<Self> {
        let mode = RelaxedCapture::begin(context.driver)?;
        // Pushing onto itself is avoided, so that afterwards the current context tells whether a
        // push or pop that returned an error was done: they also return errors of earlier work.
        let pushed = current(context.driver)
            .map_err(|code| context.driver.error(code, format_args!("cuCtxGetCurrent")))?
            != context.handle;
        if pushed {
            context.push()?;
        }
        let _ = ENTERED.try_with(|entered| entered.set(context.handle));
        Ok(Entered {
            context,
            outer,
            pushed,
            _mode: mode,
        })
    }
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        let _ = ENTERED.try_with(|entered| entered.set(self.outer));
        if self.pushed {
            self.context.pop();
        }
    }
}

impl PrimaryContext {
    fn push(&self) -> Result<()> {
        // SAFETY: a context that this object holds a reference to.
        let code = unsafe { (self.driver.cuCtxPushCurrent_v2)(self.handle) };
        let done = self.driver.check(
            code,
            format_args!("cuCtxPushCurrent(device {})", self.device),
        );
        if done.is_err() && current(self.driver).is_ok_and(|current| current == self.handle) {
            self.pop();
        }
        done
    }

    fn pop(&self) {
        if self.pop_once().is_ok() {
            return;
        }
        if let Err(code) = self.pop_once() {
            let reason = self.driver.describe(code);
            tracing::error!(
                "cuCtxPopCurrent(device {}): {reason}; the context stays current on this thread",
                self.device
            );
        }
    }

    /// `Ok` if the context is not the thread's current one any more, whatever the driver returned;
    /// otherwise the driver's code.
    fn pop_once(&self) -> Result<(), c_int> {
        let mut popped = ptr::null_mut();
        // SAFETY: `popped` is writable.
        let code = unsafe { (self.driver.cuCtxPopCurrent_v2)(&mut popped) };
        let done = code == SUCCESS
            || popped == self.handle
            || current(self.driver).is_ok_and(|current| current != self.handle);
        if done { Ok(()) } else { Err(code) }
    }
}

/// The calling thread's current context, NULL if it has none; the driver's code on failure.
pub(super) fn current(driver: &DriverTable) -> Result<CUcontext, c_int> {
    let mut context = ptr::null_mut();
    // SAFETY: `context` is writable.
    match unsafe { (driver.cuCtxGetCurrent)(&mut context) } {
        SUCCESS => Ok(context),
        code => Err(code),
    }
}

/// The calling thread's capture mode is relaxed, until dropped. Does nothing on a driver that
/// cannot exchange the mode.
pub(super) struct RelaxedCapture {
    driver: &'static DriverTable,
    /// What it was before; `None` if there is nothing to restore.
    before: Option<c_int>,
    /// The mode belongs to the thread.
    _thread: PhantomData<*const ()>,
}

impl RelaxedCapture {
    pub(super) fn begin(driver: &'static DriverTable) -> Result<Self> {
        let before = exchange(driver, RELAXED).map_err(|code| {
            driver.error(code, format_args!("cuThreadExchangeStreamCaptureMode"))
        })?;
        Ok(RelaxedCapture {
            driver,
            before: (before != RELAXED).then_some(before),
            _thread: PhantomData,
        })
    }
}

impl Drop for RelaxedCapture {
    fn drop(&mut self) {
        let Some(before) = self.before else { return };
        let again = |_| exchange(self.driver, before);
        if let Err(code) = exchange(self.driver, before).or_else(again) {
            let reason = self.driver.describe(code);
            tracing::error!(
                "cuThreadExchangeStreamCaptureMode({before}): {reason}; \
                 the thread stays in relaxed mode"
            );
        }
    }
}

/// Sets the thread's mode and gives the one before, or the driver's code.
fn exchange(driver: &DriverTable, mut mode: c_int) -> Result<c_int, c_int> {
    let Some(function) = driver.cuThreadExchangeStreamCaptureMode else {
        return Ok(mode);
    };
    // SAFETY: `mode` is readable and writable.
    match unsafe { function(&mut mode) } {
        SUCCESS => Ok(mode),
        code => Err(code),
    }
}
