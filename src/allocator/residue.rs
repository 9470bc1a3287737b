//! Device memory and addresses that still have to be given back, step by step. What fails is kept
//! and tried again by a later call; nothing is forgotten.

use std::sync::Arc;

use crate::device::{Address, Device, Physical};
use crate::error::ErrorKind;

#[derive(Debug)]
pub(super) struct Residue {
    pub device: Arc<dyn Device>,
    /// Other devices that may work on the range.
    pub peers: Vec<Arc<dyn Device>>,
    pub address: Address,
    pub bytes: u64,
    /// The device may still work on the range: wait for it before anything else.
    pub unsettled: bool,
    pub mapped: bool,
    pub physical: Option<Physical>,
    /// The addresses go too; false while an allocation still has them.
    pub unreserve: bool,
}

impl Residue {
    /// Addresses without memory.
    pub fn reserved(device: Arc<dyn Device>, address: Address, bytes: u64) -> Residue {
        Residue {
            device,
            peers: Vec::new(),
            address,
            bytes,
            unsettled: false,
            mapped: false,
            physical: None,
            unreserve: true,
        }
    }

    /// Waits for what may still work on the range; false if that failed.
    pub fn settle(&mut self) -> bool {
        if self.unsettled {
            for device in self.peers.iter().chain([&self.device]) {
                match device.synchronize() {
                    Ok(()) => {}
                    // Nothing runs on a lost device any more.
                    Err(error) if error.kind() == ErrorKind::DeviceLost => {}
                    Err(error) => return self.put_off(&error),
                }
            }
            self.unsettled = false;
        }
        true
    }

    /// Gives back what is left; true when nothing is.
    pub fn clear(&mut self) -> bool {
        if !self.settle() {
            return false;
        }
        if self.mapped {
            match self.device.unmap(self.address, self.bytes) {
                Ok(()) => self.mapped = false,
                Err(error) => return self.put_off(&error),
            }
        }
        if let Some(physical) = self.physical {
            match self.device.release(physical) {
                Ok(()) => self.physical = None,
                Err(error) => return self.put_off(&error),
            }
        }
        if self.unreserve {
            match self.device.unreserve(self.address, self.bytes) {
                Ok(()) => self.unreserve = false,
                Err(error) => return self.put_off(&error),
            }
        }
        true
    }

    fn put_off(&self, error: &crate::error::Error) -> bool {
        tracing::warn!(
            "{} bytes at {:#x} are given back later: {error}",
            self.bytes,
            self.address
        );
        false
    }
}
