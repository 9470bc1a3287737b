//! Getting memory: addresses beside those of the same class, and a handle behind them, or a hole
//! that a freed neighbour left.

use super::*;

impl Saver {
    /// Allocates `bytes` on `device` (the thread's current one for `None`).
    ///
    /// [`ErrorKind::OutOfDeviceMemory`] if the device cannot give the memory or the margin would
    /// be touched.
    pub fn malloc(&self, bytes: u64, device: Option<u32>, region: &Region) -> Result<Address> {
        process::watch();
        process::check()?;
        region.check()?;
        if bytes == 0 {
            return Err(Error::invalid("bytes", "must not be 0"));
        }
        let ordinal = device.unwrap_or_else(|| self.platform().current_device());
        let device = self.platform().device(ordinal)?;
        // The first allocation makes everything a pause needs on the device.
        self.inner.engine.streams(&device)?;
        let rounded = round_up(bytes, device.info().granularity)
            .filter(|&rounded| rounded <= i64::MAX as u64)
            .ok_or_else(|| Error::invalid("bytes", format_args!("{bytes} is too large")))?;
        if region.exportable && !device.info().can_export {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "memory of this device cannot be exported",
            ));
        }
        let class = (ordinal, Arc::new(region.clone()));
        let record = |backing| Record {
            bytes: rounded,
            requested: bytes,
            tag: Arc::clone(&region.tag),
            state: State::Active,
            freed: false,
            payload: Allocation {
                device: Arc::clone(&device),
                region: Arc::clone(&class.1),
                backing: Some(backing),
                stored: None,
                exports: 0,
            },
        };
        if let Some((span, address)) = self.cleared_hole(&device, &class, rounded) {
            region::count_allocation();
            let record = record(Backing::Shared(span));
            self.held().fill_hole(span, address, record);
            self.inner.cleared.notify_all();
            return Ok(address);
        }
        let (address, physical) = match self.allocate(&device, rounded, &class) {
            Err(error) if error.kind() == ErrorKind::OutOfDeviceMemory && self.has_residues() => {
                // Our own left-overs are the only cache there is to empty. What must be waited for
                // stays: this thread may be capturing.
                self.drain_residues(|residue| !residue.unsettled);
                self.allocate(&device, rounded, &class)?
            }
            other => other?,
        };
        region::count_allocation();
        self.held()
            .table
            .insert(address, record(Backing::Own(physical)));
        Ok(address)
    }

    fn allocate(
        &self,
        device: &Arc<dyn Device>,
        bytes: u64,
        class: &Class,
    ) -> Result<(Address, Physical)> {
        let (ordinal, region) = class;
        self.check_margin(device, bytes)?;
        let address = self.inner.addresses.take(device, class, bytes)?;
        let mut residue = Residue::of(Arc::clone(device), address, bytes).with_addresses();
        let made = Self::back(device, address, bytes, region, &mut residue);
        match made {
            Ok(physical) => Ok((address, physical)),
            Err(error) => {
                self.clear_or_keep(residue);
                Err(error.context(format_args!(
                    "allocating {bytes} bytes on device {ordinal} for tag \"{}\"",
                    region.tag
                )))
            }
        }
    }

    /// Refuses `bytes` more if less than the margin would stay free.
    fn check_margin(&self, device: &Arc<dyn Device>, bytes: u64) -> Result<()> {
        let ordinal = device.info().ordinal;
        let margin = {
            let held = self.held();
            held.margins
                .get(&ordinal)
                .copied()
                .unwrap_or(held.margin_of_all)
        };
        if margin == 0 {
            return Ok(());
        }
        let free = device.memory()?.free;
        if free >= bytes.saturating_add(margin) {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::OutOfDeviceMemory,
            format!(
                "{bytes} bytes on device {ordinal}: {free} are free and {margin} must stay free"
            ),
        ))
    }

    /// Creates, maps and opens physical memory, noting every step in `residue`.
    fn back(
        device: &Arc<dyn Device>,
        address: Address,
        bytes: u64,
        region: &Region,
        residue: &mut Residue,
    ) -> Result<Physical> {
        let options = CreateOptions {
            exportable: region.exportable,
        };
        let physical = device.create(bytes, options)?;
        residue.physical = Some(physical);
        device.map(address, bytes, physical)?;
        residue.mapped = true;
        device.set_access(address, bytes, Self::peers(device, region))?;
        Ok(physical)
    }

    /// A hole of a span for a new allocation, with what others wrote taken out of it.
    fn cleared_hole(
        &self,
        device: &Arc<dyn Device>,
        class: &Class,
        bytes: u64,
    ) -> Option<(SpanId, Address)> {
        let (span, address) = self.held().take_hole(class, bytes)?;
        let cleared = self.inner.engine.streams(device).and_then(|streams| {
            // A stream of its own, so that no malloc waits for the copies of a resume.
            device.fill(address, 0, bytes, streams.clearing())?;
            device.stream_synchronize(streams.clearing())
        });
        let Err(error) = cleared else {
            return Some((span, address));
        };
        // Before anything is logged: pauses wait for the hole, and a subscriber may do what it likes.
        self.held().give_up_hole(span, address, bytes);
        self.inner.cleared.notify_all();
        tracing::warn!("{bytes} bytes at {address:#x} wait for the next pause: {error}");
        let empty = self.held().take_empty_span(span);
        if let Some(span) = empty {
            // To wait for the device, as this takes, could break a capture of this thread.
            self.put_off(Self::residue_of(self.platform(), span));
        }
        None
    }
}
