//! Device addresses for allocations: those of one class lie next to each other, so that one call
//! unmaps many of them and one physical handle can span several. Nothing is mapped here.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::region::Region;
use crate::device::{Address, Device};
use crate::error::Result;

/// The first reservation of a class, bytes; each further one is twice as large as the one before.
const FIRST: u64 = 1 << 30;
const LARGEST: u64 = 16 << 30;

/// What allocations have in common whose addresses may be neighbours.
pub type Class = (u32, Arc<Region>);

struct Reservation {
    device: Arc<dyn Device>,
    class: Class,
    bytes: u64,
    /// Ranges that no allocation has, by address; neighbours are merged.
    free: BTreeMap<Address, u64>,
}

#[derive(Default)]
struct State {
    /// By first address.
    reservations: BTreeMap<Address, Reservation>,
    /// The reservations of a class, oldest first.
    classes: HashMap<Class, Vec<Address>>,
}

/// The reserved addresses of a saver.
#[derive(Default)]
pub struct Addresses {
    /// Protects the book-keeping; never held across a device call.
    state: Mutex<State>,
}

impl Reservation {
    fn take(&mut self, bytes: u64) -> Option<Address> {
        let (&address, &length) = self.free.iter().find(|&(_, &length)| length >= bytes)?;
        self.free.remove(&address);
        if length > bytes {
            self.free.insert(address + bytes, length - bytes);
        }
        Some(address)
    }

    fn give(&mut self, address: Address, bytes: u64) {
        insert_merged(&mut self.free, address, bytes);
    }

    fn is_empty(&self, base: Address) -> bool {
        self.free.get(&base) == Some(&self.bytes)
    }
}

/// Adds a range to a set of ranges by first address, joined with its neighbours.
pub(super) fn insert_merged(ranges: &mut BTreeMap<u64, u64>, mut start: u64, mut bytes: u64) {
    if let Some(next) = ranges.remove(&(start + bytes)) {
        bytes += next;
    }
    if let Some((&before, &length)) = ranges.range(..start).next_back()
        && before + length == start
    {
        start = before;
        bytes += length;
    }
    ranges.insert(start, bytes);
}

impl State {
    fn take(&mut self, class: &Class, bytes: u64) -> Option<Address> {
        for base in self.classes.get(class)? {
            let reservation = self.reservations.get_mut(base)?;
            if let Some(address) = reservation.take(bytes) {
                return Some(address);
            }
        }
        None
    }

    fn containing(&mut self, address: Address) -> Option<(Address, &mut Reservation)> {
        let (&base, reservation) = self.reservations.range_mut(..=address).next_back()?;
        (address - base < reservation.bytes).then_some((base, reservation))
    }

    fn add(&mut self, base: Address, reservation: Reservation) {
        let class = reservation.class.clone();
        self.classes.entry(class).or_default().push(base);
        self.reservations.insert(base, reservation);
    }

    fn remove(&mut self, base: Address) -> Option<Reservation> {
        let removed = self.reservations.remove(&base)?;
        if let Some(bases) = self.classes.get_mut(&removed.class) {
            bases.retain(|&known| known != base);
            if bases.is_empty() {
                self.classes.remove(&removed.class);
            }
        }
        Some(removed)
    }
}

impl Addresses {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Addresses for `bytes` bytes, a multiple of the device's granularity.
    pub fn take(&self, device: &Arc<dyn Device>, class: &Class, bytes: u64) -> Result<Address> {
        let wanted = {
            let mut state = self.state();
            if let Some(address) = state.take(class, bytes) {
                return Ok(address);
            }
            let last = state.classes.get(class).and_then(|bases| bases.last());
            let last = last.and_then(|base| state.reservations.get(base));
            last.map_or(FIRST, |last| (last.bytes * 2).min(LARGEST))
        };
        // Not under the lock. Where addresses are scarce, just what is needed.
        let (base, reserved) = match device.reserve(wanted.max(bytes)) {
            Ok(base) => (base, wanted.max(bytes)),
            Err(_) if wanted > bytes => (device.reserve(bytes)?, bytes),
            Err(error) => return Err(error),
        };
        let mut free = BTreeMap::new();
        if reserved > bytes {
            free.insert(base + bytes, reserved - bytes);
        }
        self.state().add(
            base,
            Reservation {
                device: Arc::clone(device),
                class: class.clone(),
                bytes: reserved,
                free,
            },
        );
        Ok(base)
    }

    /// Takes addresses back, behind which nothing is mapped any more.
    pub fn give(&self, address: Address, bytes: u64) {
        let mut state = self.state();
        let Some((base, reservation)) = state.containing(address) else {
            return;
        };
        reservation.give(address, bytes);
        if !reservation.is_empty(base) {
            return;
        }
        let removed = state.remove(base);
        drop(state);
        if let Some(reservation) = removed {
            self.unreserve(base, reservation);
        }
    }

    /// Tries again to give up reservations that nobody uses.
    pub fn give_up_unused(&self) {
        let unused: Vec<_> = {
            let mut state = self.state();
            let empty = |(&base, reservation): (&Address, &Reservation)| {
                reservation.is_empty(base).then_some(base)
            };
            let bases: Vec<_> = state.reservations.iter().filter_map(empty).collect();
            bases
                .into_iter()
                .filter_map(|base| Some((base, state.remove(base)?)))
                .collect()
        };
        for (base, reservation) in unused {
            self.unreserve(base, reservation);
        }
    }

    fn unreserve(&self, base: Address, reservation: Reservation) {
        if let Err(error) = reservation.device.unreserve(base, reservation.bytes) {
            tracing::warn!(
                "{} bytes of addresses at {base:#x} stay reserved for later: {error}",
                reservation.bytes
            );
            self.state().add(base, reservation);
        }
    }

    pub fn reserved_bytes(&self) -> u64 {
        let state = self.state();
        state
            .reservations
            .values()
            .map(|reservation| reservation.bytes)
            .sum()
    }

    /// Whether two addresses lie in one reservation, so that one handle can be mapped over both.
    pub fn together(&self, one: Address, other: Address) -> bool {
        let mut state = self.state();
        let base = |state: &mut State, address| state.containing(address).map(|(base, _)| base);
        let first = base(&mut state, one);
        first.is_some() && first == base(&mut state, other)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Platform;
    use crate::device::host::HostPlatform;

    const MIB: u64 = 1 << 20;

    fn device() -> Arc<dyn Device> {
        HostPlatform::new(1, 1 << 30).device(0).unwrap()
    }

    fn class(tag: &str) -> Class {
        (0, Arc::new(Region::new(tag)))
    }

    #[test]
    fn one_class_has_neighbours_and_another_its_own() {
        let (addresses, device) = (Addresses::default(), device());
        let first = addresses.take(&device, &class("a"), 4 * MIB).unwrap();
        let other = addresses.take(&device, &class("b"), 4 * MIB).unwrap();
        let second = addresses.take(&device, &class("a"), 2 * MIB).unwrap();
        assert_eq!(second, first + 4 * MIB);
        assert!(addresses.together(first, second));
        assert!(!addresses.together(first, other));
        // What was given back is taken first.
        addresses.give(first, 4 * MIB);
        assert_eq!(
            addresses.take(&device, &class("a"), 2 * MIB).unwrap(),
            first
        );
        addresses.give(first, 2 * MIB);
        addresses.give(second, 2 * MIB);
        addresses.give(other, 4 * MIB);
        assert!(addresses.state().reservations.is_empty());
        assert!(addresses.state().classes.is_empty());
    }

    #[test]
    fn what_does_not_fit_gets_a_reservation_of_its_own() {
        let (addresses, device) = (Addresses::default(), device());
        let small = addresses.take(&device, &class("a"), 2 * MIB).unwrap();
        let large = addresses.take(&device, &class("a"), 5 << 30).unwrap();
        assert!(!addresses.together(small, large));
        addresses.give(large, 5 << 30);
        assert_eq!(addresses.state().reservations.len(), 1);
        addresses.give(small, 2 * MIB);
        assert!(addresses.state().reservations.is_empty());
    }

    #[test]
    fn neighbours_are_merged() {
        let mut ranges = BTreeMap::new();
        insert_merged(&mut ranges, 10, 5);
        insert_merged(&mut ranges, 20, 5);
        assert_eq!(ranges.len(), 2);
        insert_merged(&mut ranges, 15, 5);
        assert_eq!(ranges, BTreeMap::from([(10, 15)]));
    }
}
