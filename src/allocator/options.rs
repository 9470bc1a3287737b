//! What a caller says to a pause or a resume.

use std::time::Duration;

use crate::config;

/// Which allocations to pause and what to keep of them.
#[derive(Clone, Debug, Default)]
pub struct PauseOptions {
    pub(super) tags: Option<Vec<String>>,
    pub(super) backup: Option<String>,
    pub(super) skip_exported: bool,
    pub(super) copy_all: bool,
}

impl PauseOptions {
    pub fn all() -> Self {
        Self::default()
    }

    pub fn tags<T: Into<String>>(tags: impl IntoIterator<Item = T>) -> Self {
        PauseOptions {
            tags: Some(tags.into_iter().map(Into::into).collect()),
            ..Self::default()
        }
    }

    /// Overrides what the regions say: a backend, or `"none"` to drop the contents.
    pub fn with_backup(mut self, name: &str) -> Self {
        self.backup = Some(name.to_string());
        self
    }

    /// Leaves exported allocations active instead of refusing the call.
    pub fn with_skip_exported(mut self, skip: bool) -> Self {
        self.skip_exported = skip;
        self
    }

    /// Copies everything, also what a retained backup has already.
    pub fn with_copy_all(mut self, copy_all: bool) -> Self {
        self.copy_all = copy_all;
        self
    }

    /// Whether unchanged memory is looked for: not with [`Self::with_copy_all`], and not with
    /// `TMS_UNCHANGED_CHECK=0`.
    pub(super) fn checks_unchanged(&self) -> bool {
        !self.copy_all && config::flag_from_environment("TMS_UNCHANGED_CHECK", true)
    }
}

/// Which allocations to resume.
#[derive(Clone, Debug, Default)]
pub struct ResumeOptions {
    pub(super) tags: Option<Vec<String>>,
    pub(super) wait: Duration,
}

impl ResumeOptions {
    pub fn all() -> Self {
        Self::default()
    }

    pub fn tags<T: Into<String>>(tags: impl IntoIterator<Item = T>) -> Self {
        ResumeOptions {
            tags: Some(tags.into_iter().map(Into::into).collect()),
            ..Self::default()
        }
    }

    /// How long to wait for device memory that somebody else is about to release.
    pub fn with_wait(mut self, wait: Duration) -> Self {
        self.wait = wait;
        self
    }
}
