//! Sorts the pieces of a copy by the way they take: checks each, finds out what memory it is, and
//! joins neighbours. One pass; nothing is copied here.

use super::Way;
use super::ranges::{Care, Known, Ranges, Side};
use crate::device::{Piece, Pitched, Place, Platform};
use crate::error::{Error, ErrorKind, Result};

/// The way of a piece. Pinned and managed memory is reached by the device itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Route {
    HostToHost,
    ToDevice { device: u32, pageable: bool },
    ToHost { device: u32, pageable: bool },
    OnDevice { device: u32 },
    ToPeer { from: u32, to: u32 },
}

impl Route {
    /// The devices that take part.
    pub fn devices(self) -> impl Iterator<Item = u32> {
        let (first, second) = match self {
            Route::HostToHost => (None, None),
            Route::ToDevice { device, .. }
            | Route::ToHost { device, .. }
            | Route::OnDevice { device } => (Some(device), None),
            Route::ToPeer { from, to } => (Some(to), Some(from)),
        };
        first.into_iter().chain(second)
    }
}

/// A piece, and where it begins in the concatenation of all.
#[derive(Clone, Copy, Debug)]
pub(super) struct Item {
    pub piece: Piece,
    pub at: u64,
}

impl Item {
    /// The part that begins `skip` bytes into it.
    pub fn part(&self, skip: u64, bytes: u64) -> Item {
        Item {
            piece: Piece {
                destination: self.piece.destination + skip,
                source: self.piece.source + skip,
                bytes,
            },
            at: self.at + skip,
        }
    }
}

/// Items of one route, in the order of the call.
#[derive(Debug)]
pub(super) struct Group {
    pub route: Route,
    pub items: Vec<Item>,
    /// How far the last item may be continued on either side.
    limits: (u64, u64),
}

impl Group {
    /// The first byte of the call that it holds.
    pub fn at(&self) -> u64 {
        self.items.first().map_or(u64::MAX, |item| item.at)
    }
}

/// See the head of the file.
pub(super) struct Planner<'a> {
    ranges: Ranges<'a>,
    devices: Option<&'a [u32]>,
    way: Way,
    groups: Vec<Group>,
    /// The group of the last piece.
    current: usize,
    /// The places and the way of the last piece, which most pieces share.
    last: Option<((Place, Place), Route)>,
    /// The most items that a group had: the next step is likely to have as many.
    most: usize,
    at: u64,
}

impl<'a> Planner<'a> {
    /// `devices` are those that may be used, `None` for all.
    pub fn new(
        platform: &'a dyn Platform,
        care: Care,
        devices: Option<&'a [u32]>,
        way: Way,
    ) -> Planner<'a> {
        Planner {
            ranges: Ranges::new(platform, care),
            devices,
            way,
            groups: Vec::new(),
            current: 0,
            last: None,
            most: 0,
            at: 0,
        }
    }

    /// Bytes of the pieces added.
    pub fn at(&self) -> u64 {
        self.at
    }

    /// What was added since the last call.
    pub fn take(&mut self) -> Vec<Group> {
        self.current = 0;
        let groups = std::mem::take(&mut self.groups);
        let largest = groups.iter().map(|group| group.items.len()).max();
        self.most = self.most.max(largest.unwrap_or(0));
        groups
    }

    /// Adds the next piece. After an error nothing of it was added.
    #[inline]
    pub fn add(&mut self, piece: &Piece) -> Result<()> {
        if piece.bytes == 0 {
            return Ok(());
        }
        check_addresses(piece)?;
        let (destination, source) = self.classify(
            (piece.destination, piece.bytes),
            (piece.source, piece.bytes),
        )?;
        let places = (destination.place, source.place);
        let route = match self.last {
            Some((known, route)) if known == places => route,
            _ => {
                let route = self.route(places.0, places.1)?;
                self.last = Some((places, route));
                route
            }
        };
        let whole = Item {
            piece: *piece,
            at: self.at,
        };
        let (limits, bytes) = ((destination.limit(), source.limit()), piece.bytes);
        if piece.destination + bytes <= limits.0 && piece.source + bytes <= limits.1 {
            self.push(route, whole, limits);
        } else {
            self.push_parts(route, whole)?;
        }
        self.at = self.at.saturating_add(bytes);
        Ok(())
    }

    /// The ranges of both sides, each an address and the bytes that must be there.
    #[inline]
    pub fn classify(
        &mut self,
        destination: (u64, u64),
        source: (u64, u64),
    ) -> Result<(Known, Known)> {
        Ok((
            self.ranges
                .covering(Side::Destination, destination.0, destination.1)?,
            self.ranges.covering(Side::Source, source.0, source.1)?,
        ))
    }

    /// A piece that crosses from one allocation or registration into the next.
    fn push_parts(&mut self, route: Route, whole: Item) -> Result<()> {
        let (piece, mut done) = (&whole.piece, 0);
        self.ranges.look_everywhere();
        self.classify(
            (piece.destination, piece.bytes),
            (piece.source, piece.bytes),
        )?;
        while done < whole.piece.bytes {
            let left = whole.piece.bytes - done;
            let rest = whole.part(done, left);
            let destination = self
                .ranges
                .at(Side::Destination, rest.piece.destination)?
                .limit();
            let source = self.ranges.at(Side::Source, rest.piece.source)?.limit();
            let bytes = left
                .min(destination - rest.piece.destination)
                .min(source - rest.piece.source);
            self.push(route, rest.part(0, bytes), (destination, source));
            done += bytes;
        }
        Ok(())
    }

    #[inline]
    fn push(&mut self, route: Route, item: Item, limits: (u64, u64)) {
        if self
            .groups
            .get(self.current)
            .is_none_or(|group| group.route != route)
        {
            self.current = self.group_of(route);
        }
        let group = &mut self.groups[self.current];
        let piece = &item.piece;
        if let Some(last) = group.items.last_mut()
            && last.at + last.piece.bytes == item.at
            && last.piece.destination + last.piece.bytes == piece.destination
            && last.piece.source + last.piece.bytes == piece.source
            && piece.destination + piece.bytes <= group.limits.0
            && piece.source + piece.bytes <= group.limits.1
        {
            last.piece.bytes += piece.bytes;
            return;
        }
        group.items.push(item);
        group.limits = limits;
    }

    fn group_of(&mut self, route: Route) -> usize {
        let known = self.groups.iter().position(|group| group.route == route);
        known.unwrap_or_else(|| {
            self.groups.push(Group {
                route,
                items: Vec::with_capacity(self.most),
                limits: (0, 0),
            });
            self.groups.len() - 1
        })
    }

    /// The way between two places, if the call allows it.
    #[inline]
    pub fn route(&self, destination: Place, source: Place) -> Result<Route> {
        let pageable = |place| place == Place::Pageable;
        let route = match (destination, source) {
            (Place::Device(to), Place::Device(from)) if to == from => {
                Route::OnDevice { device: to }
            }
            (Place::Device(to), Place::Device(from)) => Route::ToPeer { from, to },
            (Place::Device(device), host) => Route::ToDevice {
                device,
                pageable: pageable(host),
            },
            (host, Place::Device(device)) => Route::ToHost {
                device,
                pageable: pageable(host),
            },
            _ => Route::HostToHost,
        };
        if self.way != Way::Any {
            self.check_side(Side::Destination, destination)?;
            self.check_side(Side::Source, source)?;
        }
        if let Some(devices) = self.devices {
            check_devices(devices, Side::Destination, destination)?;
            check_devices(devices, Side::Source, source)?;
        }
        Ok(route)
    }

    /// Whether a side is memory of the kind that the call's name says. Managed memory is either.
    fn check_side(&self, side: Side, place: Place) -> Result<()> {
        let on_device = match side {
            Side::Destination => self.way != Way::ToHost,
            Side::Source => self.way != Way::ToDevice,
        };
        match place {
            Place::Device(device) if !on_device => Err(Error::invalid(
                side.name(),
                format_args!("is memory of device {device}, must be host memory"),
            )),
            Place::Pageable | Place::Pinned if on_device => Err(Error::invalid(
                side.name(),
                "is host memory, must be device memory",
            )),
            _ => Ok(()),
        }
    }
}

fn check_devices(devices: &[u32], side: Side, place: Place) -> Result<()> {
    match place {
        Place::Device(device) if !devices.contains(&device) => Err(Error::invalid(
            side.name(),
            format_args!("is memory of device {device}, for which the engine was not made"),
        )),
        _ => Ok(()),
    }
}

/// Both sides are there as numbers, and neither lies in the other.
#[inline]
fn check_addresses(piece: &Piece) -> Result<()> {
    check_extent(Side::Destination, piece.destination, piece.bytes)?;
    check_extent(Side::Source, piece.source, piece.bytes)?;
    let distance = piece.destination.abs_diff(piece.source);
    if distance < piece.bytes {
        return Err(overlap(piece.bytes - distance));
    }
    Ok(())
}

#[inline]
fn check_extent(side: Side, address: u64, bytes: u64) -> Result<()> {
    if address == 0 {
        return Err(Error::new(
            ErrorKind::NullPointer,
            format!("{} must not be NULL", side.name()),
        ));
    }
    if address.checked_add(bytes).is_none() {
        return Err(Error::invalid(
            side.name(),
            format_args!("{bytes} bytes at {address:#x} are more than there are addresses"),
        ));
    }
    Ok(())
}

fn overlap(bytes: u64) -> Error {
    Error::invalid("dst", format_args!("overlaps src by {bytes} bytes"))
}

/// Checks the numbers of a pitched copy that has bytes, and returns the bytes of both extents.
pub(super) fn check_layout(layout: &Pitched) -> Result<(u64, u64)> {
    let extent = |side: Side, address: u64, pitch: u64| -> Result<u64> {
        let name = match side {
            Side::Destination => "dst_pitch",
            Side::Source => "src_pitch",
        };
        if layout.height > 1 && pitch < layout.width {
            return Err(Error::invalid(
                name,
                format_args!("is {pitch}, less than the width of {} bytes", layout.width),
            ));
        }
        let bytes = (layout.height - 1)
            .checked_mul(pitch)
            .and_then(|bytes| bytes.checked_add(layout.width))
            .ok_or_else(|| Error::invalid("height", "the rows do not fit the address space"))?;
        check_extent(side, address, bytes)?;
        Ok(bytes)
    };
    let destination = extent(
        Side::Destination,
        layout.destination,
        layout.destination_pitch,
    )?;
    let source = extent(Side::Source, layout.source, layout.source_pitch)?;
    let distance = layout.destination.abs_diff(layout.source);
    let behind = if layout.destination < layout.source {
        destination
    } else {
        source
    };
    if distance < behind && !rows_interleave(layout, distance) {
        return Err(overlap(behind - distance));
    }
    Ok((destination, source))
}

/// Whether no row of one side touches a row of the other although the extents overlap: columns of
/// one matrix.
fn rows_interleave(layout: &Pitched, distance: u64) -> bool {
    let pitch = layout.destination_pitch;
    if pitch != layout.source_pitch || pitch == 0 {
        return false;
    }
    let shift = distance % pitch;
    shift >= layout.width && shift + layout.width <= pitch
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(destination: u64, source: u64, pitches: (u64, u64)) -> Pitched {
        Pitched {
            destination,
            destination_pitch: pitches.0,
            source,
            source_pitch: pitches.1,
            width: 10,
            height: 4,
        }
    }

    #[test]
    fn addresses_are_checked_as_numbers() {
        let check = |destination, source, bytes| {
            check_addresses(&Piece {
                destination,
                source,
                bytes,
            })
            .map_err(|error| error.to_string())
        };
        assert!(check(100, 200, 100).is_ok());
        assert_eq!(
            check(100, 150, 60).unwrap_err(),
            "dst: overlaps src by 10 bytes"
        );
        assert_eq!(
            check(150, 150, 1).unwrap_err(),
            "dst: overlaps src by 1 bytes"
        );
        assert_eq!(check(0, 1, 1).unwrap_err(), "dst must not be NULL");
        assert_eq!(check(1, 0, 1).unwrap_err(), "src must not be NULL");
        assert!(
            check(1, u64::MAX, 1)
                .unwrap_err()
                .starts_with("src: 1 bytes at")
        );
    }

    #[test]
    fn columns_of_one_matrix_do_not_overlap() {
        assert_eq!(
            check_layout(&layout(1000, 2000, (16, 20))).unwrap(),
            (58, 70)
        );
        assert!(check_layout(&layout(1010, 1000, (20, 20))).is_ok());
        assert!(check_layout(&layout(1000, 1010, (20, 20))).is_ok());
        for (destination, source, pitches) in [
            (1009, 1000, (20, 20)),
            (1011, 1000, (20, 20)),
            (1010, 1000, (20, 24)),
            (1000, 1000, (20, 20)),
        ] {
            let error = check_layout(&layout(destination, source, pitches)).unwrap_err();
            assert!(
                error.to_string().starts_with("dst: overlaps src"),
                "{error}"
            );
        }
        let error = check_layout(&layout(1000, 2000, (16, 9))).unwrap_err();
        assert!(error.to_string().starts_with("src_pitch: is 9"), "{error}");
        let error = check_layout(&layout(1000, 2000, (u64::MAX, 16))).unwrap_err();
        assert!(error.to_string().starts_with("height: "), "{error}");
    }
}
