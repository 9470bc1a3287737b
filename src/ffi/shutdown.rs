//! The end, for hosts that want one before the process ends.

use super::fence::fence;
use super::forward::forward;
use super::status::TMS_OK;
use crate::allocator::Saver;

/// Frees the default saver with every allocation of it, stops its threads and gives its devices
/// back. Savers of tms_saver_create are not touched. A later call that needs the default saver
/// makes a new one. Not needed at exit. Any thread; no other thread may use the default saver or its
/// memory meanwhile.
///
/// Returns TMS_OK, also if there is nothing to free; TMS_ERR_BUSY while an operation runs (nothing
/// was freed); TMS_ERR_FORKED; TMS_ERR_SHUTDOWN.
#[unsafe(no_mangle)]
pub extern "C" fn tms_shutdown() -> i32 {
    forward!(tms_shutdown());
    fence(|| Saver::close_default().map(|()| TMS_OK))
}
