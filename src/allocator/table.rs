//! Which allocations exist and in which state they are. Pure: no device is called here, so that the
//! lock around a table is held for moments only, and the rules can be checked without one.

use std::collections::BTreeMap;
use std::sync::Arc;

/// The life of an allocation: `Active → Pausing → Paused → Resuming → Active`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    Active,
    Pausing,
    Paused,
    Resuming,
}

#[derive(Clone, Debug)]
pub struct Record<P> {
    /// Bytes of address space, a multiple of the device's granularity.
    pub bytes: u64,
    /// Bytes the host asked for.
    pub requested: u64,
    pub tag: Arc<str>,
    pub state: State,
    /// The host freed it while an operation worked on it; the operation finishes the free.
    pub freed: bool,
    pub payload: P,
}

/// Allocations by address.
#[derive(Debug)]
pub struct Table<P> {
    records: BTreeMap<u64, Record<P>>,
}

/// What [`Table::free`] found.
#[derive(Debug)]
pub enum Freed<P> {
    /// No allocation begins at that address.
    Unknown,
    /// An operation works on it and will finish the free.
    Marked,
    /// Out of the table: the caller gives its memory back.
    Removed(Box<Record<P>>),
}

/// What [`Table::select`] found.
#[derive(Debug, PartialEq, Eq)]
pub struct Selection {
    pub addresses: Vec<u64>,
    /// Matching allocations that are already where the operation leads.
    pub unchanged: u64,
}

impl<P> Default for Table<P> {
    fn default() -> Self {
        Table {
            records: BTreeMap::new(),
        }
    }
}

impl<P> Table<P> {
    pub fn insert(&mut self, address: u64, record: Record<P>) {
        self.records.insert(address, record);
    }

    /// Allocations that the host has not freed.
    pub fn iter(&self) -> impl Iterator<Item = (u64, &Record<P>)> {
        self.records
            .iter()
            .filter(|(_, record)| !record.freed)
            .map(|(&address, record)| (address, record))
    }

    /// The allocation that contains all of `bytes` bytes at `pointer`.
    pub fn find(&self, pointer: u64, bytes: u64) -> Option<(u64, &Record<P>)> {
        let (&address, record) = self.records.range(..=pointer).next_back()?;
        let offset = pointer - address;
        let inside = offset < record.bytes && bytes <= record.bytes - offset;
        (inside && !record.freed).then_some((address, record))
    }

    /// The record of an allocation, freed or not.
    pub fn get_mut(&mut self, address: u64) -> Option<&mut Record<P>> {
        self.records.get_mut(&address)
    }

    /// The records that begin in a range of addresses, freed or not.
    pub fn range(&self, start: u64, bytes: u64) -> impl Iterator<Item = &Record<P>> {
        self.records
            .range(start..start + bytes)
            .map(|(_, record)| record)
    }

    /// See [`Self::range`].
    pub fn range_mut(&mut self, start: u64, bytes: u64) -> impl Iterator<Item = &mut Record<P>> {
        self.records
            .range_mut(start..start + bytes)
            .map(|(_, record)| record)
    }

    /// Takes everything out.
    pub fn drain(&mut self) -> impl Iterator<Item = (u64, Record<P>)> + use<P> {
        std::mem::take(&mut self.records).into_iter()
    }

    /// Moves every allocation with one of `tags` (all for `None`) from state `from` to state
    /// `through`, unless `refuse` objects to one, in which case nothing moves.
    pub fn select<E>(
        &mut self,
        tags: Option<&[String]>,
        from: State,
        through: State,
        mut refuse: impl FnMut(u64, &Record<P>) -> Result<bool, E>,
    ) -> Result<Selection, E> {
        let wanted = |record: &Record<P>| {
            !record.freed && tags.is_none_or(|tags| tags.iter().any(|tag| **tag == *record.tag))
        };
        let mut selection = Selection {
            addresses: Vec::new(),
            unchanged: 0,
        };
        for (&address, record) in &self.records {
            if !wanted(record) {
                continue;
            }
            if record.state != from {
                selection.unchanged += 1;
            } else if refuse(address, record)? {
                selection.addresses.push(address);
            }
        }
        for address in &selection.addresses {
            if let Some(record) = self.records.get_mut(address) {
                record.state = through;
            }
        }
        Ok(selection)
    }

    /// Ends an operation on one allocation. If the host freed it meanwhile, its record is removed
    /// and returned in the state it reached.
    pub fn finish(&mut self, address: u64, state: State) -> Option<Record<P>> {
        let record = self.records.get_mut(&address)?;
        record.state = state;
        if record.freed {
            return self.records.remove(&address);
        }
        None
    }

    /// The host frees the allocation that begins at `address`.
    pub fn free(&mut self, address: u64) -> Freed<P> {
        match self.records.get_mut(&address) {
            None => Freed::Unknown,
            Some(record) if record.freed => Freed::Unknown,
            Some(record) if matches!(record.state, State::Pausing | State::Resuming) => {
                record.freed = true;
                Freed::Marked
            }
            Some(_) => match self.records.remove(&address) {
                Some(record) => Freed::Removed(Box::new(record)),
                None => Freed::Unknown,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::convert::Infallible;

    fn record(tag: &str, state: State) -> Record<u32> {
        Record {
            bytes: 0x100,
            requested: 0x80,
            tag: tag.into(),
            state,
            freed: false,
            payload: 0,
        }
    }

    fn all(_: u64, _: &Record<u32>) -> Result<bool, Infallible> {
        Ok(true)
    }

    #[test]
    fn find_knows_the_edges() {
        let mut table = Table::default();
        table.insert(0x1000, record("a", State::Active));
        assert!(table.find(0xfff, 1).is_none());
        assert!(table.find(0x1000, 0x100).is_some());
        assert!(table.find(0x1000, 0x101).is_none());
        assert!(table.find(0x10ff, 1).is_some());
        assert!(table.find(0x1100, 0).is_none());
        assert!(table.find(0x10ff, u64::MAX).is_none());
    }

    #[test]
    fn select_moves_all_or_nothing() {
        let mut table = Table::default();
        table.insert(1, record("a", State::Active));
        table.insert(0x200, record("b", State::Active));
        table.insert(0x400, record("a", State::Paused));
        let tags = ["a".to_string()];
        let refused = table.select(Some(&tags), State::Active, State::Pausing, |_, _| Err(()));
        assert!(refused.is_err());
        assert!(
            table
                .iter()
                .all(|(_, record)| record.state != State::Pausing)
        );
        let selection = table
            .select(Some(&tags), State::Active, State::Pausing, all)
            .unwrap();
        assert_eq!(selection.addresses, [1]);
        assert_eq!(selection.unchanged, 1);
        let again = table
            .select(None, State::Active, State::Pausing, all)
            .unwrap();
        assert_eq!(again.addresses, [0x200]);
    }

    #[test]
    fn a_free_during_an_operation_is_finished_by_it() {
        let mut table = Table::default();
        table.insert(1, record("a", State::Active));
        table
            .select(None, State::Active, State::Pausing, all)
            .unwrap();
        assert!(matches!(table.free(1), Freed::Marked));
        assert!(matches!(table.free(1), Freed::Unknown), "a double free");
        assert!(table.find(1, 1).is_none());
        assert_eq!(table.iter().count(), 0);
        let removed = table.finish(1, State::Paused).unwrap();
        assert_eq!(removed.state, State::Paused);
        assert!(table.finish(1, State::Paused).is_none());
        assert!(matches!(table.free(1), Freed::Unknown));
    }

    #[test]
    fn free_takes_settled_allocations_out() {
        let mut table = Table::default();
        table.insert(1, record("a", State::Paused));
        assert!(matches!(table.free(2), Freed::Unknown));
        assert!(matches!(table.free(1), Freed::Removed(_)));
        assert!(matches!(table.free(1), Freed::Unknown));
    }
}
