//! GPU memory that is given back without being lost, and a pool of objects that outlives its
//! producers.

#![deny(unsafe_op_in_unsafe_fn)]

#[cfg(not(panic = "unwind"))]
compile_error!(
    "tms-memcache must be built with panic = \"unwind\": a panic is turned into a status"
);

pub mod allocator;
pub mod backup;
pub mod config;
pub mod device;
pub mod error;
pub mod ffi;
pub mod op;
pub mod process;
pub mod transfer;

pub use allocator::{
    Op, OrderedResume, Outcome, PauseOptions, Region, ResumeOptions, Saver, Summary, TagStats,
};
pub use error::{Error, ErrorKind, Result};
pub use transfer::copy::{Copier, Way};
