//! Where paused bytes go. A [`BackupBackend`] stores many spans of device memory at once and loads
//! them again; what it keeps of one span is a [`Ticket`].
//!
//! Storing is all or nothing and never changes device memory, so a failed store has lost nothing.
//! Loading reports each span on its own. When a span may be stored or loaded is decided by
//! `allocator`; how the bytes travel is the business of `transfer`.

mod copies;
mod file;
mod loading;
mod mmap;
mod pinned;
mod unchanged;

use std::any::Any;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::transfer::{Control, Engine, SharedEvent, Span};

pub use file::{FileBackend, set_default_folder};
pub use mmap::MmapBackend;
pub use pinned::PinnedBackend;

/// The backup of one span.
pub trait Ticket: Any + Send + Sync {
    /// Bytes of the span.
    fn bytes(&self) -> u64;

    /// Whether the contents are kept in host memory.
    fn is_in_host_memory(&self) -> bool {
        false
    }

    /// Host memory with the contents of the span, for backends that have it there. Writable: what
    /// the owner writes is what a load restores. Only for handing it out: from then on nothing is
    /// taken for granted about these contents.
    fn read_pointer(&self) -> Option<NonNull<u8>> {
        None
    }
}

/// One span to store.
pub struct StoreItem {
    pub span: Span,
    /// A ticket of the same backend for the same span, whose place is to be used again. Its old
    /// contents are lost as soon as the store begins.
    pub previous: Option<Arc<dyn Ticket>>,
    /// Leave out what is in that place already, where the backend can tell, and remember what is
    /// needed to tell next time.
    pub fingerprint: bool,
    /// For backends that use files.
    pub directory: Option<Arc<Path>>,
}

/// One span to load.
#[derive(Clone)]
pub struct LoadItem {
    pub span: Span,
    pub ticket: Arc<dyn Ticket>,
}

/// Hears how far a load is. Called on the thread that loads.
pub trait LoadObserver {
    /// Item `index` is on its way and complete once `event` is. Not every backend says this.
    fn queued(&self, _index: usize, _event: &Arc<SharedEvent>) {}

    /// Item `index` has ended: if well, its contents are complete for every stream.
    fn done(&self, _index: usize, _result: &Result<()>) {}
}

/// For loads whose end is enough.
pub struct Unobserved;

impl LoadObserver for Unobserved {}

/// Why a ticket is not needed any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Discard {
    /// The contents are back on the device: its memory may be kept for the next pause.
    Resumed,
    /// The allocation is gone: give everything back now.
    Freed,
}

pub trait BackupBackend: Send + Sync {
    fn name(&self) -> &'static str;

    /// Stores all items and returns their tickets in order, or an error, after which nothing new
    /// is kept (a previous ticket stays usable as a place, with undefined contents).
    fn store(
        &self,
        engine: &Engine,
        items: &[StoreItem],
        control: &Arc<Control>,
    ) -> Result<Vec<Arc<dyn Ticket>>>;

    /// Loads the items, in their order, and returns one result for each: the one that `observer`
    /// was told. Tickets stay valid either way.
    fn load(
        &self,
        engine: &Engine,
        items: &[LoadItem],
        control: &Arc<Control>,
        observer: &dyn LoadObserver,
    ) -> Vec<Result<()>>;

    fn discard(&self, ticket: Arc<dyn Ticket>, why: Discard);

    /// Whether the ticket is kept as a place for the next store even without retention.
    fn reuses_place(&self) -> bool {
        false
    }
}

/// The backends of this build, by name.
pub const NAMES: [&str; 3] = ["pinned", "mmap", "file"];

/// The backend called `name`.
pub fn by_name(name: &str) -> Result<Arc<dyn BackupBackend>> {
    match name {
        "pinned" => Ok(Arc::new(PinnedBackend)),
        "mmap" => Ok(Arc::new(MmapBackend)),
        "file" => Ok(Arc::new(FileBackend)),
        _ => Err(Error::invalid(
            "backup",
            format_args!("\"{name}\" is none of none, {}", NAMES.join(", ")),
        )),
    }
}

/// The ticket as the type its backend made.
fn own<T: Ticket>(ticket: &Arc<dyn Ticket>) -> Result<&T> {
    let any: &dyn Any = &**ticket;
    any.downcast_ref().ok_or_else(|| {
        Error::new(
            crate::error::ErrorKind::Internal,
            "a ticket of another backend",
        )
    })
}

/// Removes what must not outlive the process. Called once, when `exit` has begun.
pub(crate) fn at_exit() {
    file::remove_all();
}
