//! The border: the only place with `extern "C"`, raw pointers from callers and C types.
//!
//! One file per C object. Bodies stand inside `fence::fence`; arguments are checked by the
//! functions of `argument`; functions of the process-wide state begin with `forward!`, because
//! two copies of the library may meet in one process.

// The doc comments become the C headers, where they state the contract of every pointer.
#![allow(clippy::missing_safety_doc)]
// Addresses are compared, and passed on to another copy of the library, never followed.
#![allow(clippy::not_unsafe_ptr_arg_deref)]

mod argument;
pub mod compat;
mod copy;
mod copy_many;
mod device;
mod fence;
mod forward;
mod log;
mod memcache;
mod op;
mod options;
mod ordered;
mod pinned;
mod region;
mod result;
mod saver;
mod shutdown;
mod status;
mod torch;
mod transfer;

pub use copy::*;
pub use copy_many::*;
pub use device::*;
pub use log::*;
pub use memcache::*;
pub use op::*;
pub use options::*;
pub use ordered::*;
pub use pinned::*;
pub use region::*;
pub use result::*;
pub use saver::*;
pub use shutdown::*;
pub use status::*;
pub use torch::*;
pub use transfer::*;
