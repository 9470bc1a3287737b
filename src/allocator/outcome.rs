//! What comes back: of an operation, and of questions about allocations.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::State;
use crate::device::Address;
use crate::error::{Error, ErrorKind, Result};
use crate::op::{Control, Ending};

/// One allocation that an operation could not bring where it should be.
#[derive(Clone, Debug)]
pub struct Failure {
    pub address: Address,
    pub bytes: u64,
    pub error: Error,
}

/// What an operation did, whether it succeeded or not.
#[derive(Clone, Debug, Default)]
pub struct Summary {
    /// Allocations that changed state.
    pub done_count: u64,
    pub done_bytes: u64,
    /// Bytes copied to or from backups.
    pub copied_bytes: u64,
    /// Bytes that a retained backup had already, which were not copied again.
    pub unchanged_bytes: u64,
    /// Allocations of the selection that were already in the wanted state.
    pub unchanged_count: u64,
    /// Released bytes that did not become free on the device: held by another reference.
    pub shortfall_bytes: u64,
    pub failures: Vec<Failure>,
}

impl Summary {
    /// What needed no copy was not copied.
    pub(super) fn note_unchanged(&mut self, control: &Control) {
        let unchanged = control.unchanged.load(Ordering::Relaxed);
        self.unchanged_bytes = unchanged.min(self.copied_bytes);
        self.copied_bytes -= self.unchanged_bytes;
    }

    /// Says so where named tags selected nothing: a mistyped tag is no error, and looks like one.
    pub(super) fn warn_if_empty(&self, verb: &str, tags: Option<&[String]>) {
        let selected = self.done_count + self.unchanged_count + self.failures.len() as u64;
        if let Some(tags) = tags
            && selected == 0
        {
            tracing::warn!("{verb}: no allocation has the tag {}", tags.join(" or "));
        }
    }
}

/// The end of a pause or resume.
#[derive(Clone, Debug)]
pub struct Outcome {
    pub status: Result<()>,
    pub summary: Summary,
}

impl Ending for Outcome {
    fn failed(error: Error) -> Outcome {
        Outcome {
            status: Err(error),
            summary: Summary::default(),
        }
    }
}

impl Outcome {
    /// The status follows from the failures: none, some (*partial*), or all.
    pub(super) fn from_summary(verb: &str, summary: Summary) -> Outcome {
        let status = match summary.failures.first() {
            None => Ok(()),
            Some(first) if summary.done_count == 0 => Err(first.error.clone()),
            Some(first) => Err(Error::new(
                ErrorKind::Partial,
                format!(
                    "{verb}: {} of {} allocations failed, the first at {:#x}: {}",
                    summary.failures.len(),
                    summary.failures.len() as u64 + summary.done_count,
                    first.address,
                    first.error
                ),
            )),
        };
        Outcome { status, summary }
    }
}

/// Bytes and counts of one tag on one device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TagStats {
    pub tag: Arc<str>,
    pub device: u32,
    pub active_count: u64,
    pub active_bytes: u64,
    pub paused_count: u64,
    pub paused_bytes: u64,
    /// Bytes of complete backups, of paused and of active allocations.
    pub backed_bytes: u64,
}

/// One allocation, as seen from outside.
#[derive(Clone, Debug)]
pub struct AllocationInfo {
    pub base: Address,
    pub bytes: u64,
    pub requested: u64,
    pub tag: Arc<str>,
    pub device: u32,
    pub state: State,
    pub backed: bool,
    pub exported: bool,
}
