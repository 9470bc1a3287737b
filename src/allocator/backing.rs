//! Putting physical memory behind allocations that are paused: neighbours share a handle, because
//! the driver's cost is one of handles.

use std::sync::Arc;

use super::resume::Item;
use super::spans;
use super::{Backing, Residue, Saver};
use crate::device::{CreateOptions, Device};
use crate::error::{ErrorKind, Result};
use crate::process;
use crate::transfer::{Span as Bytes, devices_of};

/// Memory for one or several neighbouring allocations.
struct Unit {
    /// The first of its allocations and how many there are.
    first: usize,
    count: usize,
    /// What was created and mapped so far.
    residue: Residue,
}

impl Unit {
    fn is_on(&self, device: &dyn Device) -> bool {
        self.residue.device.info().ordinal == device.info().ordinal
    }

    fn create(&mut self, items: &[Item], needed: u64) -> Result<()> {
        let region = &items[self.first].allocation.region;
        let options = CreateOptions {
            exportable: region.exportable,
        };
        let (device, bytes) = (&self.residue.device, self.residue.bytes);
        let physical = device.create(bytes, options).map_err(|error| {
            if error.kind() != ErrorKind::OutOfDeviceMemory {
                return error;
            }
            let free = device.memory().map_or(0, |memory| memory.free);
            error.context(format_args!(
                "tag \"{}\" needs {needed} bytes in all, about {free} are free now ({} bytes short); \
                 release memory or pause something else, then resume again",
                region.tag(),
                bytes.saturating_sub(free).max(1),
            ))
        })?;
        self.residue.physical = Some(physical);
        Ok(())
    }

    fn map(&mut self) -> Result<()> {
        let Some(physical) = self.residue.physical else {
            return Ok(());
        };
        let (address, bytes) = (self.residue.address, self.residue.bytes);
        self.residue.device.map(address, bytes, physical)?;
        self.residue.mapped = true;
        Ok(())
    }
}

impl Saver {
    /// Creates everything, then maps everything: a shortage shows before the first mapping. After
    /// an error nothing is left but what could not be undone, which is kept for later.
    pub(super) fn back_all(&self, items: &[Item]) -> Result<()> {
        let mut units = self.group(items);
        match self.back_units(&mut units, items) {
            Ok(()) => {
                self.enter_backing(units, items);
                Ok(())
            }
            Err(error) => {
                for unit in units {
                    self.clear_or_keep(unit.residue);
                }
                Err(error)
            }
        }
    }

    fn back_units(&self, units: &mut [Unit], items: &[Item]) -> Result<()> {
        let needed = units.iter().map(|unit| unit.residue.bytes).sum();
        let bytes: Vec<Bytes> = items.iter().map(Item::span).collect();
        let devices = devices_of(&bytes);
        on_each_device(&devices, units, |unit| unit.create(items, needed))?;
        on_each_device(&devices, units, Unit::map)?;
        let mut result = Ok(());
        for device in &devices {
            device.together(&mut || {
                if result.is_ok() {
                    result = self.open(units, items, &**device);
                }
            });
        }
        result
    }

    /// Gives the device, and the peers of the regions, access to runs of neighbours.
    fn open(&self, units: &[Unit], items: &[Item], device: &dyn Device) -> Result<()> {
        let runs = units.chunk_by(|one, next| {
            one.residue.address + one.residue.bytes == next.residue.address
                && one.is_on(device)
                && next.is_on(device)
                && self
                    .inner
                    .addresses
                    .together(one.residue.address, next.residue.address)
        });
        for run in runs {
            let Some(first) = run.first().filter(|unit| unit.is_on(device)) else {
                continue;
            };
            process::check()?;
            let allocation = &items[first.first].allocation;
            let peers = Self::peers(&allocation.device, &allocation.region);
            let bytes = run.iter().map(|unit| unit.residue.bytes).sum();
            device.set_access(first.residue.address, bytes, peers)?;
        }
        Ok(())
    }

    /// One handle for neighbours that lie in one reservation, and so are of one class. Items come
    /// in the order of their addresses.
    fn group(&self, items: &[Item]) -> Vec<Unit> {
        let mut units: Vec<Unit> = Vec::new();
        for (index, item) in items.iter().enumerate() {
            // Part of a span that stayed because others of it were resumed.
            if item.allocation.backing.is_some() {
                continue;
            }
            if let Some(unit) = units.last_mut() {
                let residue = &mut unit.residue;
                if !item.allocation.region.exportable
                    && residue.address + residue.bytes == item.address
                    && residue.bytes + item.bytes <= spans::LARGEST
                    && unit.first + unit.count == index
                    && self.inner.addresses.together(residue.address, item.address)
                {
                    residue.bytes += item.bytes;
                    unit.count += 1;
                    continue;
                }
            }
            let device = Arc::clone(&item.allocation.device);
            units.push(Unit {
                first: index,
                count: 1,
                residue: Residue::of(device, item.address, item.bytes),
            });
        }
        units
    }

    /// Writes into the table whose memory is where.
    fn enter_backing(&self, units: Vec<Unit>, items: &[Item]) {
        let mut held = self.held();
        for unit in units {
            let Some(physical) = unit.residue.physical else {
                continue;
            };
            let members = &items[unit.first..unit.first + unit.count];
            let backing = match members {
                [_] => Backing::Own(physical),
                _ => Backing::Shared(held.spans.insert(
                    Arc::clone(&unit.residue.device),
                    members[0].allocation.class(),
                    unit.residue.address,
                    unit.residue.bytes,
                    physical,
                )),
            };
            for item in members {
                if let Some(record) = held.table.get_mut(item.address) {
                    record.payload.backing = Some(backing);
                }
            }
        }
    }
}

/// Does a step for every unit, device by device, until one fails.
fn on_each_device(
    devices: &[Arc<dyn Device>],
    units: &mut [Unit],
    mut step: impl FnMut(&mut Unit) -> Result<()>,
) -> Result<()> {
    let mut result = Ok(());
    for device in devices {
        device.together(&mut || {
            for unit in units.iter_mut().filter(|unit| unit.is_on(&**device)) {
                if result.is_ok() {
                    result = process::check().and_then(|()| step(unit));
                }
            }
        });
    }
    result
}
