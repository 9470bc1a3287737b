//! Physical handles that span several neighbouring allocations. The driver's cost is one of
//! handles, not of bytes: ten of 1 GiB are taken away five times faster than 320 of 32 MiB.
//!
//! A span is made by a resume, when it is known which neighbours live together, and is taken away
//! whole by a pause. Meanwhile an allocation of it that the host frees leaves a hole, which later
//! allocations of the same class use. Pure book-keeping: no device is called here.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::addresses::{Class, insert_merged};
use crate::device::{Address, Device, Physical};

/// No span is larger than this, bytes; what a freed allocation may hold back is bounded by it.
pub const LARGEST: u64 = 1 << 30;

/// Names a span; never given twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpanId(u64);

/// One handle over several allocations.
pub struct Span {
    pub device: Arc<dyn Device>,
    pub class: Class,
    pub base: Address,
    pub bytes: u64,
    pub physical: Physical,
    /// A pause takes it away: nothing new may come into it.
    pub leaving: bool,
    /// Freed allocations on whose range the device may still work.
    pub unsettled: u32,
    /// Holes that are being cleared at this moment for new allocations.
    pub clearing: u32,
    /// Ranges that no allocation has and no device works on, by address. What the last owner wrote
    /// is still in them.
    pub holes: BTreeMap<Address, u64>,
    /// Ranges that no allocation has and that could not be cleared.
    pub unusable: Vec<(Address, u64)>,
}

impl Span {
    /// Bytes that no allocation has.
    pub fn held_bytes(&self) -> u64 {
        let unusable = self.unusable.iter().map(|(_, bytes)| bytes);
        self.holes.values().chain(unusable).sum()
    }

    /// The addresses that no allocation has.
    pub fn unowned(&self) -> impl Iterator<Item = (Address, u64)> + '_ {
        let holes = self.holes.iter().map(|(&address, &bytes)| (address, bytes));
        holes.chain(self.unusable.iter().copied())
    }

    pub fn add_hole(&mut self, address: Address, bytes: u64) {
        insert_merged(&mut self.holes, address, bytes);
    }

    fn take_hole(&mut self, bytes: u64) -> Option<Address> {
        let (&address, &length) = self.holes.iter().find(|&(_, &length)| length >= bytes)?;
        self.holes.remove(&address);
        if length > bytes {
            self.holes.insert(address + bytes, length - bytes);
        }
        Some(address)
    }
}

/// The spans of a saver.
#[derive(Default)]
pub struct Spans {
    spans: HashMap<SpanId, Span>,
    last: u64,
}

impl Spans {
    pub fn insert(
        &mut self,
        device: Arc<dyn Device>,
        class: Class,
        base: Address,
        bytes: u64,
        physical: Physical,
    ) -> SpanId {
        self.last += 1;
        let id = SpanId(self.last);
        let span = Span {
            device,
            class,
            base,
            bytes,
            physical,
            leaving: false,
            unsettled: 0,
            clearing: 0,
            holes: BTreeMap::new(),
            unusable: Vec::new(),
        };
        self.spans.insert(id, span);
        id
    }

    pub fn get(&self, id: SpanId) -> Option<&Span> {
        self.spans.get(&id)
    }

    pub fn get_mut(&mut self, id: SpanId) -> Option<&mut Span> {
        self.spans.get_mut(&id)
    }

    pub fn remove(&mut self, id: SpanId) -> Option<Span> {
        self.spans.remove(&id)
    }

    pub fn iter(&self) -> impl Iterator<Item = &Span> {
        self.spans.values()
    }

    pub fn drain(&mut self) -> impl Iterator<Item = Span> + use<> {
        std::mem::take(&mut self.spans).into_values()
    }

    /// A hole of a span of `class` with room for `bytes`.
    pub fn take_hole(&mut self, class: &Class, bytes: u64) -> Option<(SpanId, Address)> {
        self.spans
            .iter_mut()
            .filter(|(_, span)| !span.leaving && span.class == *class)
            .find_map(|(&id, span)| Some((id, span.take_hole(bytes)?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::allocator::Region;
    use crate::device::Platform;
    use crate::device::host::HostPlatform;

    fn class(tag: &str) -> Class {
        (0, Arc::new(Region::new(tag)))
    }

    #[test]
    fn holes_serve_their_class_only_and_not_while_they_leave() {
        let device = HostPlatform::new(1, 1 << 20).device(0).unwrap();
        let mut spans = Spans::default();
        let id = spans.insert(device, class("a"), 0x1000, 0x4000, Physical(1));
        assert!(spans.take_hole(&class("a"), 0x1000).is_none());
        spans.get_mut(id).unwrap().add_hole(0x2000, 0x1000);
        spans.get_mut(id).unwrap().add_hole(0x3000, 0x1000);
        assert_eq!(spans.get(id).unwrap().held_bytes(), 0x2000);
        assert!(spans.take_hole(&class("b"), 0x1000).is_none());
        assert!(spans.take_hole(&class("a"), 0x3000).is_none());
        assert_eq!(
            spans.take_hole(&class("a"), 0x1000),
            Some((id, 0x2000)),
            "merged holes are used from the front"
        );
        spans.get_mut(id).unwrap().leaving = true;
        assert!(spans.take_hole(&class("a"), 0x1000).is_none());
        let unowned: Vec<_> = spans.get(id).unwrap().unowned().collect();
        assert_eq!(unowned, [(0x3000, 0x1000)]);
    }
}
