//! What every device must do beyond single copies: pieces by a kernel, batches, pitched copies,
//! copies between devices, fingerprints, the host's streams, and the classification of addresses.
//! Part of `device_conformance.rs`.

use std::sync::Arc;

use tms_memcache::device::fingerprint::{self, Block, Key, Print, print_of};
use tms_memcache::device::{
    Device, DeviceKind, Direction, Piece, Pitched, Place, Platform, Stream,
};
use tms_memcache::error::{ErrorKind, Result};

use super::{MIB, Pages, Region, first, pattern, read, write};

const BLOCKS: u32 = 32;

/// Page-aligned host memory, registered with a device.
struct Pinned {
    device: Arc<dyn Device>,
    pages: Pages,
}

impl Pinned {
    fn new(device: &Arc<dyn Device>, bytes: usize) -> Self {
        let bytes = bytes.next_multiple_of(4096);
        let pages = Pages::new(bytes);
        // SAFETY: the pages outlive the registration.
        unsafe { device.register_host(pages.pointer, bytes) }.unwrap();
        Pinned {
            device: Arc::clone(device),
            pages,
        }
    }

    fn holding<T: Copy>(device: &Arc<dyn Device>, items: &[T]) -> Self {
        let pinned = Self::new(device, size_of_val(items).max(1));
        // SAFETY: the pages are large enough and aligned to more than T; nothing uses them yet.
        unsafe {
            let to = pinned.pages.pointer.cast::<T>();
            std::ptr::copy_nonoverlapping(items.as_ptr(), to, items.len());
        }
        pinned
    }

    fn address(&self) -> u64 {
        self.pages.pointer.expose_provenance() as u64
    }

    fn bytes(&mut self) -> &mut [u8] {
        self.pages.bytes()
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: every test synchronises before its memory goes.
        let done = unsafe { self.device.unregister_host(self.pages.pointer) };
        if !std::thread::panicking() {
            done.unwrap();
        }
    }
}

struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % limit
    }

    /// Sizes around the limits that a copy kernel has.
    fn size(&mut self) -> u64 {
        match self.below(6) {
            0 => self.below(80),
            1 => self.below(5000),
            2 => 4096,
            3 => Piece::TILE,
            4 => 512 * self.below(20) + self.below(3),
            _ => self.below(70_000),
        }
    }

    /// Pieces one behind the other with gaps, both sides within `bytes`.
    fn pieces(&mut self, destination: u64, source: u64, bytes: u64) -> Vec<Piece> {
        let (mut to, mut from) = (0, 0);
        let mut pieces = Vec::new();
        loop {
            let length = self.size();
            to += self.below(40);
            from += self.below(40);
            if self.below(3) == 0 {
                (to, from) = (to.next_multiple_of(16), from.next_multiple_of(16));
            }
            if to.max(from) + length > bytes {
                break;
            }
            pieces.push(Piece {
                destination: destination + to,
                source: source + from,
                bytes: length,
            });
            to += length;
            from += length;
        }
        // In no order of addresses.
        for at in (1..pieces.len()).rev() {
            let other = self.below(at as u64 + 1) as usize;
            pieces.swap(at, other);
        }
        pieces
    }
}

/// What the destination must be afterwards.
fn model(pieces: &[Piece], before: &[u8], at: u64, source: &[u8], source_at: u64) -> Vec<u8> {
    let mut after = before.to_vec();
    for piece in pieces {
        let to = (piece.destination - at) as usize;
        let from = (piece.source - source_at) as usize;
        let length = piece.bytes as usize;
        after[to..][..length].copy_from_slice(&source[from..][..length]);
    }
    after
}

fn on_stream(device: &dyn Device, work: impl FnOnce(Stream) -> Result<()>) {
    let stream = device.stream_create().unwrap();
    let queued = work(stream);
    let done = device.stream_synchronize(stream);
    device.stream_destroy(stream).unwrap();
    queued.and(done).unwrap();
}

fn run_pieces(device: &Arc<dyn Device>, pieces: &[Piece], blocks: u32) {
    assert!(device.has_kernels());
    let list = Pinned::holding(device, pieces);
    let (entries, count) = (list.pages.pointer.cast_const().cast(), pieces.len() as u32);
    // SAFETY: the list and what the pieces name are registered or mapped until the stream is done.
    on_stream(&**device, |stream| unsafe {
        device.copy_pieces(entries, count, blocks, stream)
    });
}

/// Runs `copy` on random pieces in all directions and compares every byte of the destinations.
fn check_against_the_model(
    device: &Arc<dyn Device>,
    seed: u64,
    copy: impl Fn(&[Piece], Direction),
) {
    let bytes = 4 * MIB;
    let (one, other) = (Region::new(device, 2), Region::new(device, 2));
    let mut host = Pinned::new(device, bytes as usize);
    let mut random = Random(seed);
    for round in 0..3 {
        let (source, before) = (pattern(round, bytes), pattern(round + 100, bytes));

        host.bytes().copy_from_slice(&source);
        write(&**device, one.address, &before);
        let pieces = random.pieces(one.address, host.address(), bytes);
        copy(&pieces, Direction::ToDevice);
        let wanted = model(&pieces, &before, one.address, &source, host.address());
        let got = read(&**device, one.address, bytes);
        assert!(got == wanted, "to the device, round {round}");

        write(&**device, other.address, &before);
        let pieces = random.pieces(other.address, one.address, bytes);
        copy(&pieces, Direction::OnDevice);
        let wanted = model(&pieces, &before, other.address, &got, one.address);
        let got = read(&**device, other.address, bytes);
        assert!(got == wanted, "on the device, round {round}");

        let pieces = random.pieces(host.address(), other.address, bytes);
        copy(&pieces, Direction::ToHost);
        let wanted = model(&pieces, &source, host.address(), &got, other.address);
        assert!(host.bytes() == wanted, "to the host, round {round}");
    }
}

pub fn pieces_have_any_size_and_alignment(platform: &Arc<dyn Platform>) {
    let device = first(platform);
    for (seed, blocks) in [(1, 1), (2, BLOCKS), (3, 10_000)] {
        check_against_the_model(&device, seed, |pieces, _| {
            run_pieces(&device, pieces, blocks);
        });
    }
}

pub fn pieces_of_every_pair_of_alignments(platform: &Arc<dyn Platform>) {
    let device = first(platform);
    let sizes = [1, 15, 16, 17, 31, 32, 33, 47, 48, 511, 4096, 4111, 8193];
    let slot = 8448;
    let bytes = 16 * 16 * slot;
    let region = Region::new(&device, 2);
    for size in sizes {
        let mut host = Pinned::new(&device, bytes as usize);
        let source = pattern(size, bytes);
        host.bytes().copy_from_slice(&source);
        let before = pattern(size + 1000, bytes);
        write(&*device, region.address, &before);
        let pieces: Vec<_> = (0..256)
            .map(|at| Piece {
                destination: region.address + at * slot + 16 + at % 16,
                source: host.address() + at * slot + 16 + at / 16,
                bytes: size,
            })
            .collect();
        run_pieces(&device, &pieces, BLOCKS);
        let wanted = model(&pieces, &before, region.address, &source, host.address());
        assert!(read(&*device, region.address, bytes) == wanted, "{size}");
    }
}

pub fn few_or_large_pieces_are_copied_too(platform: &Arc<dyn Platform>) {
    let device = first(platform);
    let bytes = 16 * MIB;
    let region = Region::new(&device, 9);
    let mut host = Pinned::new(&device, bytes as usize);
    let source = pattern(5, bytes);
    host.bytes().copy_from_slice(&source);
    let whole = Piece {
        destination: region.address + 5,
        source: host.address(),
        bytes,
    };
    run_pieces(&device, &[], BLOCKS);
    let nothing = Piece { bytes: 0, ..whole };
    run_pieces(&device, &[nothing, nothing], BLOCKS);
    assert_eq!(read(&*device, whole.destination, 64), [0; 64]);
    let large = Piece {
        bytes: 3 * MIB + 1,
        ..whole
    };
    run_pieces(&device, &[large], BLOCKS);
    assert!(read(&*device, whole.destination, large.bytes) == source[..large.bytes as usize]);
    let tiles: Vec<_> = whole.tiles().collect();
    run_pieces(&device, &tiles, BLOCKS);
    assert!(read(&*device, whole.destination, bytes) == source);

    let stream = device.stream_create().unwrap();
    let null: *const Piece = std::ptr::null();
    // SAFETY: refused, or nothing to do.
    unsafe {
        device.copy_pieces(null, 0, 1, stream).unwrap();
        let error = device.copy_pieces(null, 1, 1, stream).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    }
    device.stream_synchronize(stream).unwrap();
    device.stream_destroy(stream).unwrap();
}

pub fn pieces_keep_their_place_in_the_stream(platform: &Arc<dyn Platform>) {
    let device = first(platform);
    let region = Region::new(&device, 2);
    let mut host = Pinned::new(&device, 4096);
    let half = region.bytes / 2;
    let pieces = [Piece {
        destination: host.address(),
        source: region.address + half,
        bytes: 4096,
    }];
    let list = Pinned::holding(&device, &pieces);
    on_stream(&*device, |stream| {
        for value in 1..20 {
            device.fill(region.address, value, region.bytes, stream)?;
        }
        // SAFETY: all memory outlives the synchronisation.
        unsafe { device.copy_pieces(list.pages.pointer.cast(), 1, 1, stream) }?;
        device.fill(region.address, 99, region.bytes, stream)
    });
    assert!(host.bytes().iter().all(|byte| *byte == 19));
}

pub fn pieces_without_memory_behind_them_are_an_error(platform: &Arc<dyn Platform>) {
    let device = first(platform);
    let granule = device.info().granularity;
    let address = device.reserve(granule).unwrap();
    let host = Pages::new(4096);
    // SAFETY: kept for the life of the process: on a GPU the context is lost below.
    unsafe { device.register_host(host.pointer, 4096) }.unwrap();
    let at = host.pointer.expose_provenance() as u64;
    let piece = Piece {
        destination: at + 2048,
        source: address,
        bytes: 64,
    };
    // SAFETY: within the pages.
    unsafe { host.pointer.cast::<Piece>().write(piece) };
    let stream = device.stream_create().unwrap();
    // SAFETY: refused by the stream.
    let queued = unsafe { device.copy_pieces(host.pointer.cast(), 1, 1, stream) };
    std::mem::forget(host);
    assert!(queued.and(device.stream_synchronize(stream)).is_err());
}

pub fn batches_copy_what_their_pieces_say(platform: &Arc<dyn Platform>) {
    let device = first(platform);
    if !device.has_batch() {
        println!("{}: no batches", platform.kind());
        return;
    }
    check_against_the_model(&device, 9, |pieces, direction| {
        // SAFETY: the memory of the pieces outlives the synchronisation.
        on_stream(&*device, |stream| unsafe {
            device.copy_batch(pieces, direction, stream)
        });
    });
    let legacy = Stream::of_host(0);
    // SAFETY: nothing to copy, or refused.
    unsafe {
        on_stream(&*device, |stream| {
            device.copy_batch(&[], Direction::ToHost, stream)
        });
        let refused = device.copy_batch(&[], Direction::ToHost, legacy);
        assert_eq!(refused.unwrap_err().kind(), ErrorKind::Unsupported);
    }
}

pub fn pitched_copies_leave_the_gaps_alone(platform: &Arc<dyn Platform>) {
    let device = first(platform);
    let bytes = 2 * MIB;
    let (one, other) = (Region::new(&device, 1), Region::new(&device, 1));
    let mut host = Pinned::new(&device, bytes as usize);
    let shapes = [
        (100, 7, 100, 100),
        (100, 7, 128, 100),
        (3, 1000, 5, 17),
        (4096, 200, 8192, 4096 + 512),
        (4096, 200, 4096, 8192),
        (5000, 1, 0, 0),
        (0, 5, 10, 10),
        (10, 0, 10, 10),
    ];
    for (seed, (width, height, to_pitch, from_pitch)) in (0..).zip(shapes) {
        for direction in [Direction::ToDevice, Direction::OnDevice, Direction::ToHost] {
            let (source, before) = (pattern(seed, bytes), pattern(seed + 50, bytes));
            let (from, to) = match direction {
                Direction::ToDevice => (host.address(), one.address),
                Direction::OnDevice => (one.address, other.address),
                Direction::ToHost => (other.address, host.address()),
            };
            for (address, contents) in [(from, &source), (to, &before)] {
                if address == host.address() {
                    host.bytes().copy_from_slice(contents);
                } else {
                    write(&*device, address, contents);
                }
            }
            let copy = Pitched {
                destination: to + 3,
                destination_pitch: to_pitch,
                source: from + 1,
                source_pitch: from_pitch,
                width,
                height,
            };
            // SAFETY: the memory outlives the synchronisation.
            on_stream(&*device, |stream| unsafe {
                device.copy_pitched(&copy, direction, stream)
            });
            let got = match direction {
                Direction::ToHost => host.bytes().to_vec(),
                _ => read(&*device, to, bytes),
            };
            let rows: Vec<_> = copy.rows().collect();
            let wanted = model(&rows, &before, to, &source, from);
            assert!(got == wanted, "{direction:?} {width} x {height}");
        }
    }
    let overlapping = Pitched {
        destination: one.address,
        destination_pitch: 9,
        source: other.address,
        source_pitch: 10,
        width: 10,
        height: 2,
    };
    let stream = device.stream_create().unwrap();
    // SAFETY: refused.
    let refused = unsafe { device.copy_pitched(&overlapping, Direction::OnDevice, stream) };
    let error = refused.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    assert!(
        error.to_string().starts_with("destination_pitch"),
        "{error}"
    );
    device.stream_destroy(stream).unwrap();
}

pub fn a_peer_is_copied_to_without_access(platform: &Arc<dyn Platform>) {
    let device = first(platform);
    let region = Region::new(&device, 2);
    let stream = device.stream_create().unwrap();
    let refused = |peer| {
        // SAFETY: refused.
        let refused =
            unsafe { device.copy_to_peer(region.address, peer, region.address, 1, stream) };
        refused.unwrap_err().kind()
    };
    assert_eq!(refused(0), ErrorKind::InvalidArgument);
    assert_eq!(refused(platform.device_count()), ErrorKind::Unsupported);
    device.stream_destroy(stream).unwrap();
    let Some(&ordinal) = device.info().peers.first() else {
        println!("{}: no peers", platform.kind());
        return;
    };
    let peer = platform.device(ordinal).unwrap();
    let there = Region::new(&peer, 2);
    for (seed, bytes) in (0..).zip([0, 1, 4097, 3 * MIB + 5]) {
        let source = pattern(seed, bytes);
        write(&*device, region.address + 1, &source);
        let (to, from) = (there.address + 7, region.address + 1);
        // SAFETY: the memory outlives the synchronisation.
        on_stream(&*device, |stream| unsafe {
            device.copy_to_peer(to, ordinal, from, bytes, stream)
        });
        assert!(read(&*peer, to, bytes) == source, "{bytes}");
    }
}

pub fn fingerprints_are_those_of_the_definition(platform: &Arc<dyn Platform>) {
    let device = first(platform);
    assert!(device.has_kernels());
    let region = Region::new(&device, 9);
    let bytes = pattern(77, region.bytes);
    write(&*device, region.address, &bytes);
    let mut random = Random(5);
    let mut lengths = vec![
        0, 1, 15, 16, 17, 1000, 16_383, 16_384, 16_385, 32_768, 32_769,
    ];
    lengths.extend([
        fingerprint::BLOCK,
        fingerprint::BLOCK - 1,
        fingerprint::BLOCK - 17,
    ]);
    lengths.extend((0..40).map(|_| random.below(100_000)));
    let blocks: Vec<_> = lengths
        .iter()
        .map(|&bytes| Block {
            address: region.address + random.below((region.bytes - bytes) / 16) * 16,
            bytes,
        })
        .collect();
    let (one, other) = (Key::new().unwrap(), Key::new().unwrap());
    let list = Pinned::holding(&device, &blocks);
    let results = Pinned::holding(&device, &vec![Print([u64::MAX; 2]); blocks.len() + 1]);
    let entries = list.pages.pointer.cast_const().cast::<Block>();
    let places = results.pages.pointer.cast::<Print>();
    let run = |key: &Key, count: usize| {
        // SAFETY: all memory outlives the synchronisation.
        on_stream(&*device, |stream| unsafe {
            device.fingerprint(key, entries, places, count as u32, stream)
        });
    };
    // SAFETY: as many as were made; no stream uses them.
    let print = |at: usize| unsafe { places.add(at).read() };
    run(&one, 0);
    assert_eq!(print(0), Print([u64::MAX; 2]));
    for key in [&one, &other] {
        run(key, blocks.len());
        for (at, block) in blocks.iter().enumerate() {
            let start = (block.address - region.address) as usize;
            let wanted = print_of(key, &bytes[start..][..block.bytes as usize]);
            assert_eq!(print(at), wanted, "{block:?}");
        }
        assert_eq!(print(blocks.len()), Print([u64::MAX; 2]));
    }

    // One bit, in place.
    let block = blocks[11];
    let (before, at) = (print(11), block.address + random.below(block.bytes));
    let byte = read(&*device, at, 1)[0];
    write(&*device, at, &[byte ^ 0x10]);
    run(&other, 12);
    assert_ne!(print(11), before);
    write(&*device, at, &[byte]);
    run(&other, 12);
    assert_eq!(print(11), before);
}

pub fn addresses_are_classified(platform: &Arc<dyn Platform>) {
    let place = |address| platform.classify(address).unwrap().place;
    let inside = |address: u64| {
        let range = platform.classify(address).unwrap();
        assert!(range.start <= address && address - range.start < range.bytes);
        range
    };
    for ordinal in 0..platform.device_count().min(2) {
        let device = platform.device(ordinal).unwrap();
        let region = Region::new(&device, 3);
        for address in [region.address, region.address + region.bytes - 1] {
            assert_eq!(inside(address).place, Place::Device(ordinal));
        }
        let all = inside(region.address);
        assert!(all.start + all.bytes >= region.address + region.bytes);
    }
    let device = first(platform);
    let pages = Pages::new(1 << 20);
    let address = pages.pointer.expose_provenance() as u64;
    let mut ids = Vec::new();
    for _ in 0..2 {
        assert_eq!(place(address), Place::Pageable);
        // SAFETY: the pages outlive the registration.
        unsafe { device.register_host(pages.pointer, 1 << 20) }.unwrap();
        for address in [address, address + (1 << 20) - 1] {
            assert_eq!(inside(address).place, Place::Pinned);
        }
        ids.push(inside(address).id);
        // SAFETY: nothing is queued.
        unsafe { device.unregister_host(pages.pointer) }.unwrap();
    }
    assert!(ids[0] == 0 || ids[0] != ids[1]);
    let local = 0u8;
    let range = platform.classify(&raw const local as u64).unwrap();
    assert_eq!((range.place, range.bytes), (Place::Pageable, 0));

    // Reserved addresses without memory are nothing that the host may touch.
    let granule = device.info().granularity;
    let reserved = device.reserve(granule).unwrap();
    let found = platform.classify(reserved).map(|range| range.place);
    assert!(matches!(found, Err(_) | Ok(Place::Device(_))), "{found:?}");
    device.unreserve(reserved, granule).unwrap();
}

pub fn streams_of_the_host_are_used_like_own_ones(platform: &Arc<dyn Platform>) {
    let device = first(platform);
    let region = Region::new(&device, 4);
    let mut host = Pinned::new(&device, 4096);
    let own = device.stream_create().unwrap();
    let event = device.event_create().unwrap();
    let last = region.address + region.bytes - 4096;
    for (value, handle) in (1..).zip([0, 1, 2]) {
        let stream = Stream::of_host(handle);
        let (to, from) = (host.address(), last);
        for old in [100, value] {
            device
                .fill(region.address, old, region.bytes, stream)
                .unwrap();
        }
        device.event_record(event, stream).unwrap();
        device.stream_wait(own, event).unwrap();
        // SAFETY: the memory outlives the synchronisation.
        unsafe { device.copy(to, from, 4096, Direction::ToHost, own) }.unwrap();
        device.event_record(event, own).unwrap();
        device.stream_wait(stream, event).unwrap();
        device
            .fill(region.address, 50, region.bytes, stream)
            .unwrap();
        device.stream_synchronize(stream).unwrap();
        assert!(host.bytes().iter().all(|byte| *byte == value), "{handle}");
        assert_eq!(read(&*device, last, 1), [50]);
    }
    device.stream_destroy(own).unwrap();
    device.event_destroy(event).unwrap();
    if platform.kind() == DeviceKind::Host {
        for handle in [1, 2] {
            let destroyed = device.stream_destroy(Stream::of_host(handle));
            assert_eq!(destroyed.unwrap_err().kind(), ErrorKind::InvalidArgument);
        }
    }
}

/// What a kernel cannot reach is an error of the stream; only the host device survives the attempt.
pub fn unreachable_memory_is_an_error_of_the_stream(platform: &Arc<dyn Platform>) {
    let (device, other) = (first(platform), platform.device(1).unwrap());
    let (own, foreign) = (Region::new(&device, 1), Region::new(&other, 1));
    let pinned = Pinned::new(&device, 8192);
    let pageable = [0u8; 4096];
    let fails = |piece: Piece, text: &str| {
        let list = Pinned::holding(&device, &[piece]);
        let stream = device.stream_create().unwrap();
        // SAFETY: refused by the stream.
        unsafe { device.copy_pieces(list.pages.pointer.cast(), 1, 1, stream) }.unwrap();
        let error = device.stream_synchronize(stream).unwrap_err().to_string();
        assert!(
            error.contains("pieces[0]") && error.contains(text),
            "{error}"
        );
        device.stream_destroy(stream).unwrap();
    };
    let piece = |destination, source| Piece {
        destination,
        source,
        bytes: 4096,
    };
    let beyond = own.address + own.bytes - 100;
    fails(
        piece(own.address, pageable.as_ptr() as u64),
        "not registered",
    );
    fails(
        piece(own.address, pinned.address() + 8000),
        "not registered",
    );
    fails(piece(own.address, foreign.address), "no access");
    fails(piece(beyond, pinned.address()), "no memory is mapped");
    fails(
        piece(u64::MAX - 10, pinned.address()),
        "more than there are",
    );
    fails(piece(0, pinned.address()), "not registered");

    let stream = device.stream_create().unwrap();
    let unregistered = [piece(own.address, own.address + 8192)];
    // SAFETY: refused by the stream.
    unsafe { device.copy_pieces(unregistered.as_ptr(), 1, 1, stream) }.unwrap();
    device.stream_synchronize(stream).unwrap_err();
    device.stream_destroy(stream).unwrap();

    let key = Key::new().unwrap();
    for (address, text) in [
        (own.address + 8, "not a multiple of 16"),
        (foreign.address, "no access"),
        (pinned.address() + 8192 - 16, "not registered"),
    ] {
        let list = Pinned::holding(&device, &[Block { address, bytes: 64 }]);
        let results = Pinned::new(&device, 4096);
        let stream = device.stream_create().unwrap();
        let (blocks, prints) = (list.pages.pointer.cast(), results.pages.pointer.cast());
        // SAFETY: refused by the stream.
        unsafe { device.fingerprint(&key, blocks, prints, 1, stream) }.unwrap();
        let error = device.stream_synchronize(stream).unwrap_err().to_string();
        assert!(
            error.contains("blocks[0]") && error.contains(text),
            "{error}"
        );
        device.stream_destroy(stream).unwrap();
    }
}
