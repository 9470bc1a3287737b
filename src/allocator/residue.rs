//! Device memory and addresses that still have to be given back, step by step. What fails is kept
//! and tried again by a later call; nothing is forgotten.

use std::sync::Arc;

use super::addresses::Addresses;
use super::spans::SpanId;
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
    /// The range is part of this span, which has the memory.
    pub part_of: Option<SpanId>,
    /// What goes back when nothing is mapped any more; addresses that an allocation still has are
    /// not among them.
    pub addresses: Vec<(Address, u64)>,
}

impl Residue {
    /// A range without memory, whose addresses stay with their allocations.
    pub fn of(device: Arc<dyn Device>, address: Address, bytes: u64) -> Residue {
        Residue {
            device,
            peers: Vec::new(),
            address,
            bytes,
            unsettled: false,
            mapped: false,
            physical: None,
            part_of: None,
            addresses: Vec::new(),
        }
    }

    /// The addresses of the range go too.
    pub fn with_addresses(mut self) -> Residue {
        self.addresses.push((self.address, self.bytes));
        self
    }

    /// Memory that is mapped.
    pub fn with_memory(mut self, physical: Physical) -> Residue {
        self.mapped = true;
        self.physical = Some(physical);
        self
    }

    pub fn contains(&self, address: Address) -> bool {
        self.mapped && address >= self.address && address - self.address < self.bytes
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
    pub fn clear(&mut self, home: &Addresses) -> bool {
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
        for (address, bytes) in self.addresses.drain(..) {
            home.give(address, bytes);
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
