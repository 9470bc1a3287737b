//! Pinned host memory of a saver: made ahead of need, given back, and counted.

use super::argument::{Sized32, fill_struct, out, required, stated_size};
use super::device::ordinal;
use super::fence::fence;
use super::forward::forward;
use super::op::tms_op_t;
use super::saver::tms_saver_t;
use super::status::TMS_OK;

/// Pinned host memory of a saver, bytes unless said otherwise. Set struct_size before the call.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct tms_pinned_stats_t {
    /// sizeof this struct.
    pub struct_size: u32,
    /// Chunks, a number; each is one registration with the driver.
    pub chunk_count: u32,
    /// Registered with the driver, or on the way there.
    pub pinned_bytes: u64,
    /// Part of it that holds backups or staging.
    pub used_bytes: u64,
    /// Part of it that nobody uses: it is there for the next pause.
    pub idle_bytes: u64,
    /// Part of it that is registered in place and belongs to others, such as segments of a store.
    pub adopted_bytes: u64,
    /// The most that was pinned at any time.
    pub high_water_bytes: u64,
    /// What may be pinned at most (TMS_PINNED_LIMIT); UINT64_MAX: as much as the host has.
    pub limit_bytes: u64,
    /// What stays pinned while nobody uses it: TMS_PINNED_KEEP, or what a prewarm asked for if that
    /// is more.
    pub keep_bytes: u64,
    /// Part of pinned_bytes that is on huge pages.
    pub huge_page_bytes: u64,
    /// The rest of pinned_bytes: on small pages (4 KiB), or not populated yet.
    pub small_page_bytes: u64,
}

// SAFETY: `repr(C)`, plain data, `struct_size` first.
unsafe impl Sized32 for tms_pinned_stats_t {}

/// Populates and pins host memory ahead of need, so that the next pause with pinned backups finds
/// it: pinning takes longer than copying. For instance while a model is loading.
///
/// When it returns, at least `bytes` are pinned beyond what is used now; memory that is idle
/// already counts. It is shared by all devices of the saver; `device` says near which of them it
/// is taken. From then on that much stays pinned while nobody uses it, also across pauses and
/// resumes and if it is more than TMS_PINNED_KEEP, until tms_saver_trim to less, or until the host
/// runs short of memory. Freeing an allocation with a retained backup gives back the chunk that the
/// backup was in, if nothing else is in it, prewarmed or not.
///
/// Memory comes in chunks of 1 GiB, or of the largest allocation that exists on the device at the
/// time of the call: a larger backup does not fit into them and takes new memory. If the call fails,
/// nothing of it is kept.
///
/// `saver`: not NULL. `device`: an ordinal, or −1 for the thread's current device. `bytes`: more
/// than 0. Any thread; a pause may run meanwhile and uses what is ready.
///
/// Returns TMS_OK; TMS_ERR_OUT_OF_HOST_MEMORY (TMS_PINNED_LIMIT, or the host or a control group has
/// not enough left); TMS_ERR_NULL_POINTER; TMS_ERR_INVALID_ARGUMENT; TMS_ERR_DEVICE;
/// TMS_ERR_FORKED; TMS_ERR_SHUTDOWN.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tms_saver_prewarm(
    saver: *const tms_saver_t,
    device: i32,
    bytes: u64,
) -> i32 {
    forward!(tms_saver_prewarm(saver, device, bytes));
    fence(|| {
        // SAFETY: valid by the function's contract.
        let handle = unsafe { required(saver, "saver") }?;
        handle.saver()?.prewarm(ordinal(device)?, bytes)?;
        Ok(TMS_OK)
    })
}

/// tms_saver_prewarm on a thread of the library.
///
/// `op` receives the operation, to be freed with tms_op_free; not NULL. Its progress counts the
/// bytes that are pinned. Operations of a saver run in the order they were started: a pause started
/// after it waits for it.
///
/// Returns TMS_OK, TMS_ERR_NULL_POINTER, TMS_ERR_INVALID_ARGUMENT, TMS_ERR_FORKED,
/// TMS_ERR_SHUTDOWN, TMS_ERR_IO (no thread or descriptor).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tms_saver_prewarm_async(
    saver: *const tms_saver_t,
    device: i32,
    bytes: u64,
    op: *mut *mut tms_op_t,
) -> i32 {
    forward!(tms_saver_prewarm_async(saver, device, bytes, op));
    fence(|| {
        // SAFETY: valid by the function's contract.
        let handle = unsafe { required(saver, "saver") }?;
        let op = out(op, "op")?;
        let started = handle.saver()?.prewarm_async(ordinal(device)?, bytes)?;
        // SAFETY: valid for writes by the function's contract.
        unsafe { op.write(tms_op_t::boxed(started)) };
        Ok(TMS_OK)
    })
}

/// Unpins host memory that nobody uses, prewarmed memory too, until at most `keep_bytes` of it are
/// left. Memory goes in whole chunks. The contents of backups are not touched.
///
/// `saver`: not NULL. `keep_bytes`: 0 gives back all that is idle; what a prewarm keeps from then
/// on is no more than this. `released` receives the bytes that were given back; may be NULL. Any
/// thread.
///
/// Returns TMS_OK, TMS_ERR_NULL_POINTER, TMS_ERR_FORKED, TMS_ERR_SHUTDOWN.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tms_saver_trim(
    saver: *const tms_saver_t,
    keep_bytes: u64,
    released: *mut u64,
) -> i32 {
    forward!(tms_saver_trim(saver, keep_bytes, released));
    fence(|| {
        // SAFETY: valid by the function's contract.
        let handle = unsafe { required(saver, "saver") }?;
        let bytes = handle.saver()?.trim_pinned(keep_bytes)?;
        if let Ok(released) = out(released, "released") {
            // SAFETY: valid for writes by the function's contract.
            unsafe { released.write(bytes) };
        }
        Ok(TMS_OK)
    })
}

/// Figures of the saver's pinned host memory.
///
/// `saver`: not NULL. `stats` is filled; not NULL, its struct_size must be set. Any thread. Asks
/// the system about the pages of the process, which takes milliseconds where there are thousands of
/// mappings.
///
/// Returns TMS_OK, TMS_ERR_NULL_POINTER, TMS_ERR_INVALID_ARGUMENT.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tms_saver_pinned_stats(
    saver: *const tms_saver_t,
    stats: *mut tms_pinned_stats_t,
) -> i32 {
    forward!(tms_saver_pinned_stats(saver, stats));
    fence(|| {
        // SAFETY: valid by the function's contract.
        let (handle, stated) = unsafe { (required(saver, "saver")?, stated_size(stats, "stats")?) };
        let found = handle.saver()?.pinned_stats();
        let value = tms_pinned_stats_t {
            struct_size: 0,
            chunk_count: u32::try_from(found.chunks).unwrap_or(u32::MAX),
            pinned_bytes: found.pinned,
            used_bytes: found.used,
            idle_bytes: found.idle,
            adopted_bytes: found.adopted,
            high_water_bytes: found.high_water,
            limit_bytes: found.limit,
            keep_bytes: found.keep,
            huge_page_bytes: found.huge,
            small_page_bytes: found.small,
        };
        // SAFETY: valid for writes of the stated size by the function's contract.
        unsafe { fill_struct(stats, stated, &value) };
        Ok(TMS_OK)
    })
}
