//! What an operation did, as C structs.

use std::ffi::c_void;

use super::argument::{Sized32, fill_struct, optional_struct, stated_size};
use super::fence::fail;
use super::status::TMS_OK;
use crate::allocator::Outcome;
use crate::error::Result;

/// One allocation that could not be brought where it should be.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct tms_failure_t {
    /// Its address.
    pub address: *mut c_void,
    /// Its size, bytes.
    pub bytes: u64,
    /// Why, a TMS_ERR code.
    pub status: i32,
    /// 0.
    pub reserved: u32,
}

/// What an operation did. Zero-fill it, then set struct_size, and failures if the list is wanted.
/// Filled whether the operation succeeds or not; not written if an argument is refused.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct tms_result_t {
    /// sizeof this struct.
    pub struct_size: u32,
    /// 0.
    pub reserved: u32,
    /// Allocations that changed state.
    pub done_count: u64,
    /// Their bytes.
    pub done_bytes: u64,
    /// Bytes copied to or from backups. Of a copy: how many bytes, from its beginning, are certain to
    /// be in place; its other counts are 0.
    pub copied_bytes: u64,
    /// Allocations of the selection that were already in the wanted state.
    pub unchanged_count: u64,
    /// Allocations that failed.
    pub failed_count: u64,
    /// Released bytes that did not become free on the device: held by another reference, or taken
    /// by another process meanwhile. Differences up to 32 MiB count as 0.
    pub shortfall_bytes: u64,
    /// The caller's array for the failed allocations, or NULL.
    pub failures: *mut tms_failure_t,
    /// Entries that fit the array; only the first are written if there are more.
    pub failures_capacity: usize,
    /// Bytes that a retained backup had already, which a pause did not copy again (see
    /// TMS_PAUSE_COPY_ALL). Not part of copied_bytes.
    pub unchanged_bytes: u64,
}

// SAFETY: `repr(C)`, plain data, `struct_size` first.
unsafe impl Sized32 for tms_result_t {}

/// A caller's `tms_result_t`, checked before the operation begins.
pub(super) struct ResultOut {
    pointer: *mut tms_result_t,
    stated: usize,
    failures: *mut tms_failure_t,
    capacity: usize,
}

impl ResultOut {
    /// # Safety
    /// `pointer` is NULL or valid for reads and writes of the size it states.
    pub unsafe fn new(pointer: *mut tms_result_t) -> Result<Option<ResultOut>> {
        if pointer.is_null() {
            return Ok(None);
        }
        // SAFETY: the caller's promise.
        let (stated, given) = unsafe {
            (
                stated_size(pointer, "result")?,
                optional_struct(pointer, "result")?,
            )
        };
        Ok(given.map(|given| ResultOut {
            pointer,
            stated,
            failures: given.failures,
            capacity: given.failures_capacity,
        }))
    }

    /// # Safety
    /// The array that the caller named is valid for writes of its capacity.
    pub unsafe fn write(&self, outcome: &Outcome) {
        let summary = &outcome.summary;
        let value = tms_result_t {
            struct_size: 0,
            reserved: 0,
            done_count: summary.done_count,
            done_bytes: summary.done_bytes,
            copied_bytes: summary.copied_bytes,
            unchanged_count: summary.unchanged_count,
            failed_count: summary.failures.len() as u64,
            shortfall_bytes: summary.shortfall_bytes,
            failures: self.failures,
            failures_capacity: self.capacity,
            unchanged_bytes: summary.unchanged_bytes,
        };
        // SAFETY: valid for the stated size, see `new`.
        unsafe { fill_struct(self.pointer, self.stated, &value) };
        if self.failures.is_null() {
            return;
        }
        for (index, failure) in summary.failures.iter().take(self.capacity).enumerate() {
            let entry = tms_failure_t {
                address: failure.address as *mut c_void,
                bytes: failure.bytes,
                status: failure.error.code(),
                reserved: 0,
            };
            // SAFETY: the caller's promise.
            unsafe { self.failures.add(index).write(entry) };
        }
    }
}

/// The status of an outcome, its message remembered.
pub(super) fn status_of(outcome: &Outcome) -> i32 {
    match &outcome.status {
        Ok(()) => TMS_OK,
        Err(error) => fail(error),
    }
}
