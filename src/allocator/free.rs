//! Giving memory back: at once, or later where that would break a capture or just failed.

use super::*;

impl Saver {
    /// Frees the allocation that begins at `address`.
    ///
    /// Memory that is active is synchronised with first; memory that is paused makes no device
    /// wait; memory that an operation works on is freed by that operation.
    pub fn free(&self, address: Address) -> Result<()> {
        self.free_on_stream(address, None)
    }

    /// Like [`Self::free`]. While `stream` is being captured, the release is put off.
    pub fn free_on_stream(&self, address: Address, stream: Option<u64>) -> Result<()> {
        process::check()?;
        let freed = self.held().free(address);
        match freed {
            Freed::Unknown => Err(Error::new(
                ErrorKind::NotFound,
                format!("no allocation begins at {address:#x}"),
            )),
            Freed::Marked => Ok(()),
            Freed::Removed(record) => {
                self.give_back(address, *record, stream);
                Ok(())
            }
        }
    }

    /// Gives back everything of an allocation that is out of the table.
    pub(super) fn give_back(
        &self,
        address: Address,
        record: Record<Allocation>,
        stream: Option<u64>,
    ) {
        let allocation = record.payload;
        let device = Arc::clone(&allocation.device);
        let mut residue = Residue::of(device, address, record.bytes).with_addresses();
        match allocation.backing {
            Some(Backing::Own(physical)) => residue = residue.with_memory(physical),
            Some(Backing::Shared(span)) => residue.part_of = Some(span),
            None => {}
        }
        if allocation.backing.is_some() {
            let device = &allocation.device;
            residue.unsettled = true;
            residue.peers = Self::peers_in_use(self.platform(), device, &allocation.region);
            let capturing =
                stream.is_some_and(|stream| device.is_capturing(stream).unwrap_or(false));
            if !capturing && residue.settle() {
                // The device is idle, and so is what was put off on it before.
                let ordinal = device.info().ordinal;
                self.drain_residues(|earlier| earlier.device.info().ordinal == ordinal);
            }
        }
        if let Some(stored) = allocation.stored {
            stored.discard(Discard::Freed);
        }
        if residue.unsettled {
            self.put_off(residue);
        } else {
            self.clear_or_keep(residue);
        }
    }

    /// What is left of a span that is out of the table.
    pub(super) fn residue_of(platform: &Arc<dyn Platform>, span: Span) -> Residue {
        let mut residue =
            Residue::of(Arc::clone(&span.device), span.base, span.bytes).with_memory(span.physical);
        residue.unsettled = true;
        residue.peers = Self::peers_in_use(platform, &span.device, &span.class.1);
        residue.addresses.extend(span.unowned());
        residue
    }

    /// The range of a freed allocation, on which no device works any more, becomes a hole of its
    /// span. With the last allocation the span goes.
    fn leave_span(&self, residue: &mut Residue, id: SpanId) {
        let empty = {
            let mut held = self.held();
            if held.add_hole(id, residue.address, residue.bytes) {
                // The addresses are the span's now.
                residue.addresses.clear();
            }
            held.take_empty_span(id)
        };
        if let Some(span) = empty {
            self.clear_or_keep(Self::residue_of(self.platform(), span));
        }
        for (address, bytes) in residue.addresses.drain(..) {
            self.inner.addresses.give(address, bytes);
        }
    }

    /// Gives up one residue; false if some of it is left.
    fn discharge(&self, residue: &mut Residue) -> bool {
        if !residue.settle() {
            return false;
        }
        match residue.part_of.take() {
            Some(span) => {
                self.leave_span(residue, span);
                true
            }
            None => residue.clear(&self.inner.addresses),
        }
    }

    /// Clears a residue now, or keeps it for the next call.
    pub(super) fn clear_or_keep(&self, mut residue: Residue) {
        self.pass_addresses_on(&mut residue);
        if !self.discharge(&mut residue) {
            self.held().residues.push(residue);
        }
    }

    /// Keeps a residue that must be waited for first: to wait now would break a capture, or fail
    /// as it just did.
    pub(super) fn put_off(&self, mut residue: Residue) {
        self.pass_addresses_on(&mut residue);
        self.held().residues.push(residue);
    }

    /// An earlier failure may have left something mapped there; the addresses can only go after it.
    fn pass_addresses_on(&self, residue: &mut Residue) {
        if residue.part_of.is_some() || residue.addresses.is_empty() {
            return;
        }
        let mut held = self.held();
        if let Some(earlier) = held
            .residues
            .iter_mut()
            .find(|earlier| earlier.contains(residue.address))
        {
            earlier.addresses.append(&mut residue.addresses);
        }
    }

    pub(super) fn has_residues(&self) -> bool {
        !self.held().residues.is_empty()
    }

    /// Tries again to release what could not be released before.
    pub(super) fn drain_residues(&self, wanted: impl Fn(&Residue) -> bool) {
        let residues = std::mem::take(&mut self.held().residues);
        for mut residue in residues {
            if !wanted(&residue) || !self.discharge(&mut residue) {
                self.held().residues.push(residue);
            }
        }
        self.inner.addresses.give_up_unused();
    }
}
