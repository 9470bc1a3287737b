//! Explicit copies against plain models of memory: any sizes, offsets, lists, directions, streams and
//! methods, on the host device and, if selected, on CUDA. Bytes around the copied ones are compared
//! too. Failures of driver calls are in `copy_faults.rs`.

mod support;

use std::sync::Arc;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use support::{FakeCuda, pattern};
use tms_memcache::device::host::HostPlatform;
use tms_memcache::device::{self, Device, Piece, Pitched, Place, Platform};
use tms_memcache::{Copier, Region, Saver, Way};
use tms_memcache::{Error, ErrorKind};

const MIB: usize = 1 << 20;
const METHODS: [&str; 3] = ["kernel", "batch", "plain"];

/// The platforms to test: two devices each.
fn platforms() -> Vec<Arc<dyn Platform>> {
    let mut found: Vec<Arc<dyn Platform>> = vec![Arc::new(HostPlatform::new(2, 4 << 30))];
    if FakeCuda::loaded().is_some() {
        found.push(device::open("cuda").unwrap());
    }
    found
}

/// A table that has one method for everything.
fn table(method: &str) -> String {
    let mut text = String::new();
    for direction in ["h2d", "d2h", "d2d"] {
        for class in ["4096", "16384", "65536", "262144", "1048576", "max"] {
            text += &format!("{direction}:{class}={method},");
        }
    }
    text
}

/// Memory of some kind, and what should be in it.
struct Memory {
    /// The ordinal of a device, `None` on the host.
    device: Option<u32>,
    address: u64,
    model: Vec<u8>,
}

/// Two devices' memory, pinned and pageable memory, all full of known bytes.
struct World {
    saver: Saver,
    copier: Copier,
    devices: Vec<Arc<dyn Device>>,
    places: Vec<Memory>,
}

const PINNED: usize = 2;
const PAGEABLE: usize = 3;

fn mapped(bytes: usize) -> u64 {
    // SAFETY: a new mapping at an address of the kernel's choice.
    let raw = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            bytes,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    assert_ne!(raw, libc::MAP_FAILED);
    raw as u64
}

impl World {
    fn new(platform: Arc<dyn Platform>, bytes: usize) -> World {
        let saver = Saver::new(Arc::clone(&platform)).unwrap();
        let devices: Vec<_> = (0..2).map(|d| platform.device(d).unwrap()).collect();
        let region = Region::new("copies");
        let mut addresses: Vec<(Option<u32>, u64)> = (0..2)
            .map(|d| {
                let address = saver.malloc(bytes as u64, Some(d), &region).unwrap();
                (Some(d), address)
            })
            .collect();
        for _ in 0..2 {
            addresses.push((None, mapped(bytes)));
        }
        // SAFETY: mapped above, and unregistered before it is unmapped.
        unsafe { devices[0].register_host(addresses[PINNED].1 as *mut u8, bytes) }.unwrap();
        let places = addresses
            .into_iter()
            .map(|(device, address)| Memory {
                device,
                address,
                model: vec![0; bytes],
            })
            .collect();
        let mut world = World {
            copier: Copier::new(Arc::clone(saver.engine())),
            saver,
            devices,
            places,
        };
        for index in 0..4 {
            world.fill(index, index as u64 + 1);
        }
        world
    }

    fn fill(&mut self, place: usize, seed: u64) {
        let memory = &mut self.places[place];
        memory.model = pattern(memory.model.len(), seed);
        match memory.device {
            Some(_) => self.saver.write(memory.address, &memory.model).unwrap(),
            // SAFETY: mapped with this size, and no copy runs.
            None => unsafe {
                std::ptr::copy_nonoverlapping(
                    memory.model.as_ptr(),
                    memory.address as *mut u8,
                    memory.model.len(),
                );
            },
        }
    }

    fn contents(&self, place: usize) -> Vec<u8> {
        let memory = &self.places[place];
        let mut got = vec![0; memory.model.len()];
        match memory.device {
            Some(_) => self.saver.read(memory.address, &mut got).unwrap(),
            // SAFETY: mapped with this size, and no copy runs.
            None => unsafe {
                std::ptr::copy_nonoverlapping(
                    memory.address as *const u8,
                    got.as_mut_ptr(),
                    got.len(),
                );
            },
        }
        got
    }

    fn check(&self, what: &str) {
        for (index, memory) in self.places.iter().enumerate() {
            let got = self.contents(index);
            if got == memory.model {
                continue;
            }
            if let Some(at) = (0..got.len()).find(|&at| got[at] != memory.model[at]) {
                panic!("{what}: byte {at} of place {index} differs");
            }
        }
    }

    fn piece(&self, to: (usize, usize), from: (usize, usize), bytes: usize) -> Piece {
        Piece {
            destination: self.places[to.0].address + to.1 as u64,
            source: self.places[from.0].address + from.1 as u64,
            bytes: bytes as u64,
        }
    }

    /// Applies a copy to the models.
    fn expect(&mut self, to: (usize, usize), from: (usize, usize), bytes: usize) {
        let source = self.places[from.0].model[from.1..from.1 + bytes].to_vec();
        self.places[to.0].model[to.1..to.1 + bytes].copy_from_slice(&source);
    }

    fn set_tables(&self, method: &str) {
        for device in 0..2 {
            self.copier.set_table(device, &table(method)).unwrap();
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // A second panic would end the program before the other tests.
        if std::thread::panicking() {
            return;
        }
        for memory in &self.places {
            match memory.device {
                Some(_) => self.saver.free(memory.address).unwrap(),
                None => {
                    if memory.address == self.places[PINNED].address {
                        // SAFETY: no copy runs any more.
                        unsafe { self.devices[0].unregister_host(memory.address as *mut u8) }
                            .unwrap();
                    }
                    // SAFETY: mapped by `mapped` with this size.
                    unsafe { libc::munmap(memory.address as *mut _, memory.model.len()) };
                }
            }
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Form {
    Waiting,
    OnStream,
    Operation,
}

/// Copies by a form, and checks what it says.
fn run(world: &World, pieces: &[Piece], form: Form, on: u32) -> Result<(), Error> {
    let total: u64 = pieces.iter().map(|piece| piece.bytes).sum();
    // SAFETY: all pieces lie in memory of the world.
    unsafe {
        match form {
            Form::Waiting => {
                let ended = world.copier.copy(pieces, Way::Any);
                ended.status.clone()?;
                assert_eq!(ended.bytes, total);
            }
            Form::OnStream => {
                let device = &world.devices[on as usize];
                let stream = device.stream_create()?;
                let queued = world.copier.copy_on_stream(pieces, Way::Any, stream.0);
                device.stream_synchronize(stream)?;
                device.stream_destroy(stream)?;
                queued?;
            }
            Form::Operation => {
                let op = world.copier.copy_async(pieces.to_vec(), Way::Any)?;
                let ended = op.wait(None).unwrap();
                ended.status?;
                assert_eq!(ended.bytes, total);
                assert_eq!(op.progress(), (total, total));
            }
        }
    }
    Ok(())
}

/// The device whose stream a list wants: device 0 unless only the other takes part.
fn stream_device(world: &World, lists: &[(usize, usize)]) -> u32 {
    let mut devices = lists
        .iter()
        .flat_map(|&(to, from)| [world.places[to].device, world.places[from].device])
        .flatten();
    match devices.next() {
        Some(1) if !devices.any(|device| device == 0) => 1,
        _ => 0,
    }
}

/// One piece of a generated list: places, gap before the destination, where the source is, size.
#[derive(Clone, Debug)]
struct Wanted {
    to: usize,
    from: usize,
    gap: usize,
    source: usize,
    bytes: usize,
}

fn sizes() -> impl Strategy<Value = usize> {
    prop_oneof![
        1 => Just(0usize),
        6 => 1usize..300,
        3 => prop::sample::select(vec![4095usize, 4096, 4097, 16384, 65536]),
        2 => 300usize..40_000,
        1 => 40_000usize..400_000,
    ]
}

fn lists() -> impl Strategy<Value = Vec<Wanted>> {
    // Most gaps are none, so that neighbours are joined.
    let gap = prop_oneof![2 => Just(0usize), 1 => 0usize..40];
    let one = (0usize..4, 0usize..4, gap, 0usize..MIB, sizes()).prop_map(
        |(to, from, gap, source, bytes)| Wanted {
            to,
            from,
            gap,
            source,
            bytes,
        },
    );
    prop::collection::vec(one, 0..60)
}

/// Pieces whose sources lie in the first half of their places and whose destinations, all apart,
/// in the second. Copies them in the models too.
fn realise(world: &mut World, wanted: &[Wanted]) -> (Vec<Piece>, Vec<(usize, usize)>) {
    let half = world.places[0].model.len() / 2;
    let mut next = [half; 4];
    let mut after = [0usize; 4];
    let (mut pieces, mut routes) = (Vec::new(), Vec::new());
    for piece in wanted {
        let at = next[piece.to] + piece.gap;
        if at + piece.bytes > half * 2 || piece.bytes > half {
            continue;
        }
        // Now and then a source that follows the one before.
        let source = if piece.source % 3 == 0 && after[piece.from] + piece.bytes <= half {
            after[piece.from]
        } else {
            piece.source % (half - piece.bytes + 1)
        };
        let (to, from) = ((piece.to, at), (piece.from, source));
        pieces.push(world.piece(to, from, piece.bytes));
        if piece.bytes > 0 {
            routes.push((piece.to, piece.from));
        }
        world.expect(to, from, piece.bytes);
        next[piece.to] = at + piece.bytes;
        after[piece.from] = source + piece.bytes;
    }
    (pieces, routes)
}

#[test]
fn lists_of_any_mix_are_copied_by_every_method_and_form() {
    for platform in platforms() {
        let kind = platform.kind();
        let world = std::cell::RefCell::new(World::new(platform, 2 * MIB));
        let forms = prop::sample::select(vec![Form::Waiting, Form::OnStream, Form::Operation]);
        let strategy = (
            lists(),
            prop::sample::select(METHODS.to_vec()),
            forms,
            any::<u64>(),
        );
        let mut runner = TestRunner::new(Config {
            cases: 60,
            failure_persistence: None,
            ..Config::default()
        });
        runner
            .run(&strategy, |(wanted, method, form, seed)| {
                let mut world = world.borrow_mut();
                world.set_tables(method);
                for place in 0..4 {
                    world.fill(place, seed.wrapping_add(place as u64));
                }
                let (pieces, routes) = realise(&mut world, &wanted);
                let on = stream_device(&world, &routes);
                run(&world, &pieces, form, on).unwrap();
                world.check(&format!("{kind}, {method}, {form:?}"));
                Ok(())
            })
            .unwrap();
    }
}

#[test]
fn single_pieces_of_all_sizes_go_every_way() {
    let sizes = [
        0,
        1,
        4095,
        512 * 1024 + 1,
        2 * MIB,
        2 * MIB + 1,
        5 * MIB - 3,
        17 * MIB + 77,
    ];
    for platform in platforms() {
        let kind = platform.kind();
        let mut world = World::new(platform, 40 * MIB);
        for to in 0..4 {
            for from in 0..4 {
                for (turn, &bytes) in sizes.iter().enumerate() {
                    // The larger ones by turns only: they are about slots, not about ways.
                    if bytes > 5 * MIB && (to + from) % 2 == 0 {
                        continue;
                    }
                    let form = [Form::Waiting, Form::OnStream, Form::Operation][(to + turn) % 3];
                    let (to, from) = ((to, 20 * MIB + 13 * turn), (from, 5 + turn));
                    let piece = world.piece(to, from, bytes);
                    world.expect(to, from, bytes);
                    let on = stream_device(&world, &[(to.0, from.0)]);
                    run(&world, &[piece], form, on).unwrap();
                }
            }
            world.check(&format!("{kind}, to place {to}"));
        }
    }
}

#[test]
fn a_large_piece_among_many_small_ones_and_64_mib_of_pageable_memory() {
    for platform in platforms() {
        let mut world = World::new(platform, 136 * MIB);
        for method in METHODS {
            world.set_tables(method);
            for (to, from) in [(0, PAGEABLE), (PAGEABLE, 0), (1, PINNED)] {
                let mut pieces = vec![];
                let mut at = 68 * MIB;
                for index in 0..1500 {
                    let bytes = if index == 700 {
                        64 * MIB
                    } else {
                        300 + index % 7
                    };
                    let source = (index * 997) % (3 * MIB);
                    pieces.push(world.piece((to, at), (from, source), bytes));
                    world.expect((to, at), (from, source), bytes);
                    at += bytes + 1;
                }
                run(&world, &pieces, Form::Waiting, 0).unwrap();
            }
            world.check(method);
        }
    }
}

#[test]
fn a_stream_keeps_its_order() {
    for platform in platforms() {
        let mut world = World::new(platform, 8 * MIB);
        let device = Arc::clone(&world.devices[0]);
        let stream = device.stream_create().unwrap();
        let half = 4 * MIB;
        for (from, to) in [(0, 0), (0, PINNED), (0, PAGEABLE), (0, 1)] {
            let address = world.places[0].address;
            for value in [1u8, 2] {
                device.fill(address, value, half as u64, stream).unwrap();
                let piece = world.piece((to, half), (from, 0), half);
                // SAFETY: both lie in memory of the world.
                unsafe {
                    world
                        .copier
                        .copy_on_stream(&[piece], Way::Any, stream.0)
                        .unwrap();
                }
            }
            // Overwrites the source behind the copy.
            device.fill(address, 3, half as u64, stream).unwrap();
            device.stream_synchronize(stream).unwrap();
            world.places[to].model[half..].fill(2);
            world.places[0].model[..half].fill(3);
            world.check(&format!("to place {to}"));
        }
        // A pageable source was read when the call returns.
        for turn in [0, 1] {
            // The second time the stream is not of the device.
            let (to, from) = ((turn, 1), (PAGEABLE, 3));
            let piece = world.piece(to, from, half);
            world.expect(to, from, half);
            // SAFETY: both lie in memory of the world.
            unsafe {
                world
                    .copier
                    .copy_on_stream(&[piece], Way::Any, stream.0)
                    .unwrap();
            }
            world.fill(PAGEABLE, 77 + turn as u64);
        }
        device.stream_synchronize(stream).unwrap();
        device.stream_destroy(stream).unwrap();
        world.check("pageable sources");
    }
}

#[test]
fn rows_are_copied_and_nothing_between_them() {
    for platform in platforms() {
        let mut world = World::new(platform, 4 * MIB);
        for method in METHODS {
            world.set_tables(method);
            for (to, from) in (0..16).map(|index| (index / 4, index % 4)) {
                for (width, pitches, height) in [
                    (100, (128, 104), 300),
                    (64, (64, 64), 1000),
                    (5000, (5000, 8192), 33),
                    (7, (1, 1), 1),
                    (0, (5, 5), 10),
                ] {
                    let pitched = Pitched {
                        destination: world.places[to].address + 2 * MIB as u64 + 3,
                        destination_pitch: pitches.0 as u64,
                        source: world.places[from].address + 9,
                        source_pitch: pitches.1 as u64,
                        width: width as u64,
                        height: height as u64,
                    };
                    for row in 0..height {
                        let at = (to, 2 * MIB + 3 + row * pitches.0);
                        world.expect(at, (from, 9 + row * pitches.1), width);
                    }
                    // SAFETY: both lie in memory of the world.
                    let ended = unsafe { world.copier.copy_2d(&pitched) };
                    ended.status.unwrap();
                    assert_eq!(ended.bytes as usize, width * height);
                }
            }
            world.check(method);
        }
    }
}

fn refusal(world: &World, pieces: &[Piece], way: Way) -> (ErrorKind, String) {
    // SAFETY: what is refused is not touched; what is not lies in memory of the world.
    let ended = unsafe { world.copier.copy(pieces, way) };
    assert_eq!(ended.bytes, 0);
    let error = ended.status.unwrap_err();
    (error.kind(), error.to_string())
}

#[test]
fn what_is_wrong_is_named() {
    for platform in platforms() {
        let world = World::new(platform, 4 * MIB);
        let end = 4 * MIB;
        let refused = |piece: Piece, way: Way, starts: &str| {
            let (kind, text) = refusal(&world, &[piece], way);
            assert_eq!(kind, ErrorKind::InvalidArgument, "{text}");
            assert!(text.starts_with(starts), "{text}");
            text
        };
        for place in [0, 1, PINNED] {
            let text = refused(
                world.piece((place, end - 10), (PAGEABLE, 0), 17),
                Way::Any,
                "dst: ",
            );
            // Behind pinned memory there may be other memory, which is no part of it either.
            assert!(text.contains(" by 7 bytes"), "{text}");
            let text = refused(
                world.piece((PAGEABLE, 0), (place, end - 10), 17),
                Way::Any,
                "src: ",
            );
            assert!(text.contains(" by 7 bytes"), "{text}");
        }
        refused(
            world.piece((0, 5), (0, 0), 6),
            Way::Any,
            "dst: overlaps src by 1 bytes",
        );
        refused(
            world.piece((0, 0), (0, 0), 1),
            Way::Any,
            "dst: overlaps src",
        );
        let to_device = world.piece((0, 0), (PINNED, 0), 9);
        let to_host = world.piece((PAGEABLE, 0), (1, 0), 9);
        let on_device = world.piece((0, 0), (1, 0), 9);
        let on_host = world.piece((PINNED, 0), (PAGEABLE, 0), 9);
        refused(to_device, Way::ToHost, "dst: is memory of device 0");
        refused(to_device, Way::OnDevice, "src: is host memory");
        refused(to_host, Way::ToDevice, "dst: is host memory");
        refused(to_host, Way::OnDevice, "dst: is host memory");
        refused(on_device, Way::ToHost, "dst: is memory of device 0");
        refused(on_device, Way::ToDevice, "src: is memory of device 1");
        refused(on_host, Way::ToHost, "src: is host memory");
        refused(on_host, Way::ToDevice, "dst: is host memory");
        let null = Piece {
            destination: 0,
            ..to_device
        };
        let (kind, text) = refusal(&world, &[to_host, null], Way::Any);
        assert_eq!(kind, ErrorKind::NullPointer);
        assert_eq!(text, "copies[1]: dst must not be NULL");
        let nothing = Piece {
            destination: 0,
            source: 0,
            bytes: 0,
        };
        // SAFETY: nothing is touched.
        unsafe { world.copier.copy(&[nothing], Way::ToDevice) }
            .status
            .unwrap();
        let only = world.copier.clone().with_devices(&[1]);
        // SAFETY: refused.
        let error = unsafe { only.copy(&[to_device], Way::Any) }
            .status
            .unwrap_err();
        assert!(
            error.to_string().starts_with("dst: is memory of device 0"),
            "{error}"
        );
        world.check("refusals");
    }
}

#[test]
fn a_late_piece_that_is_refused_leaves_what_is_certain() {
    for platform in platforms() {
        let mut world = World::new(platform, 4 * MIB);
        for method in METHODS {
            world.set_tables(method);
            for from in [PINNED, PAGEABLE, 0] {
                let mut pieces: Vec<Piece> = (0..3000)
                    .map(|index| world.piece((0, 2 * MIB + index * 101), (from, index * 300), 100))
                    .collect();
                pieces[2500].source = 8;
                // SAFETY: all but one lie in memory of the world, and that one is refused.
                let ended = unsafe { world.copier.copy(&pieces, Way::Any) };
                let error = ended.status.unwrap_err();
                assert!(
                    error.to_string().starts_with("copies[2500]: src: "),
                    "{error}"
                );
                let certain = ended.bytes as usize / 100;
                assert!((512..=2500).contains(&certain), "{certain}");
                let got = world.contents(0);
                for index in 0..certain {
                    let at = 2 * MIB + index * 101;
                    let source = world.places[from].model[index * 300..index * 300 + 100].to_vec();
                    assert!(got[at..at + 100] == source, "piece {index} is not there");
                }
                world.fill(0, 9);
            }
        }
    }
}

#[test]
fn memory_of_a_paused_allocation_is_an_error() {
    for platform in platforms() {
        let world = World::new(platform, 4 * MIB);
        let pausable = Region::new("paused").with_backup("pinned");
        let address = world.saver.malloc(2 << 20, Some(0), &pausable).unwrap();
        world
            .saver
            .pause(&tms_memcache::PauseOptions::tags(["paused"]))
            .status
            .unwrap();
        for place in [1, PINNED, PAGEABLE] {
            let other = world.places[place].address;
            for (destination, source) in [(address, other), (other, address)] {
                let piece = Piece {
                    destination,
                    source,
                    bytes: 4096,
                };
                let (kind, text) = refusal(&world, &[piece], Way::Any);
                assert_eq!(kind, ErrorKind::InvalidArgument, "{text}");
                assert!(text.contains("paused?"), "{text}");
            }
        }
        world.saver.free(address).unwrap();
        world.check("paused");
    }
}

/// The driver tells the whole of a reservation for an address of it, but only a part has memory.
#[test]
fn a_part_of_a_reservation_without_memory_is_an_error_for_kernels_too() {
    for platform in platforms() {
        let mut world = World::new(platform, 4 * MIB);
        world.set_tables("kernel");
        let device = Arc::clone(&world.devices[0]);
        let granule = device.info().granularity;
        let address = device.reserve(4 * granule).unwrap();
        // Memory, none, memory, none.
        let made = [0, 2].map(|index| {
            let at = address + index * granule;
            let physical = device.create(granule, Default::default()).unwrap();
            device.map(at, granule, physical).unwrap();
            device.set_access(at, granule, &[]).unwrap();
            (at, physical)
        });
        for (at, bytes) in [
            (granule, 100),
            (2 * granule - 50, 100),
            (granule - 50, 100),
            (granule - 50, granule + 100),
            (3 * granule, 100),
            (3 * granule - 1, 2),
        ] {
            for place in [1, PINNED, PAGEABLE] {
                let other = world.places[place].address;
                for down in [true, false] {
                    let pieces = [(0, 100), (at, bytes), (300, 100)].map(|(offset, bytes)| {
                        let (to, from) = (address + offset, other);
                        Piece {
                            destination: if down { to } else { from },
                            source: if down { from } else { to },
                            bytes,
                        }
                    });
                    let (kind, text) = refusal(&world, &pieces, Way::Any);
                    assert_eq!(kind, ErrorKind::InvalidArgument, "{text}");
                    assert!(text.starts_with("copies[1]: "), "{text}");
                }
            }
        }
        // Nothing was broken.
        let pieces = [0, 200].map(|at| world.piece((0, at), (PINNED, at), 100));
        for at in [0, 200] {
            world.expect((0, at), (PINNED, at), 100);
        }
        run(&world, &pieces, Form::Waiting, 0).unwrap();
        for (at, physical) in made {
            device.unmap(at, granule).unwrap();
            device.release(physical).unwrap();
        }
        device.unreserve(address, 4 * granule).unwrap();
        world.check("holes");
    }
}

/// Pinned memory is read when the stream gets there, wherever it lies.
#[test]
fn pinned_memory_beside_pageable_memory_waits_for_the_stream() {
    for platform in platforms() {
        let world = World::new(platform, 32 * MIB);
        let device = &world.devices[0];
        let stream = device.stream_create().unwrap();
        let block = mapped(34 * MIB).next_multiple_of(2 << 20);
        // The last pages stay pageable.
        let pinned = 32 * MIB - 8192;
        // SAFETY: mapped above, unregistered below.
        unsafe { device.register_host(block as *mut u8, pinned) }.unwrap();
        let (here, there) = (world.places[0].address, world.places[1].address);
        let tail = block + pinned as u64;
        let piece = |destination, source, bytes: usize| Piece {
            destination,
            source,
            bytes: bytes as u64,
        };
        for turn in 1..=5u8 {
            device.fill(here, turn, pinned as u64, stream).unwrap();
            let first = [piece(block, here, pinned)];
            let second = [
                piece(there, tail + 4096, 4096),
                piece(there + 8192, tail - 4096, 4096),
            ];
            // SAFETY: all of it is mapped.
            unsafe {
                let copier = &world.copier;
                copier.copy_on_stream(&first, Way::Any, stream.0).unwrap();
                copier.copy_on_stream(&second, Way::Any, stream.0).unwrap();
            }
            device.stream_synchronize(stream).unwrap();
            world.devices[1].synchronize().unwrap();
            let mut got = vec![0; 4096];
            world.saver.read(there + 8192, &mut got).unwrap();
            assert!(got.iter().all(|&byte| byte == turn), "turn {turn}");
        }
        // SAFETY: no copy runs.
        unsafe { device.unregister_host(block as *mut u8) }.unwrap();
        device.stream_destroy(stream).unwrap();
    }
}

/// What a stream of the host waits for may itself need the threads of the library.
#[test]
fn threads_do_not_wait_for_the_work_of_the_host() {
    let Some(fake) = FakeCuda::loaded() else {
        println!("needs the software driver: not selected");
        return;
    };
    use std::ffi::c_void;
    use std::sync::mpsc;
    use tms_memcache::transfer::{Engine, EngineOptions};

    unsafe extern "C" fn block(argument: *mut c_void) {
        // SAFETY: the test passes a receiver that outlives the stream's work.
        let _ = unsafe { &*argument.cast::<mpsc::Receiver<()>>() }.recv();
    }
    type Launch = unsafe extern "C" fn(u64, unsafe extern "C" fn(*mut c_void), *mut c_void) -> i32;

    let platform = device::open("cuda").unwrap();
    let world = World::new(Arc::clone(&platform), 4 * MIB);
    let one = EngineOptions {
        threads: 1,
        ..EngineOptions::default()
    };
    let copier = Copier::new(Arc::new(Engine::with_options(platform, one).unwrap()));
    let device = Arc::clone(&world.devices[0]);
    let stream = device.stream_create().unwrap();
    let (go, gate) = mpsc::channel::<()>();
    let launched = in_context(&world, || {
        // SAFETY: the type of the driver's function; the gate lives until the stream is done.
        unsafe {
            let launch: Launch = fake.entry("cuLaunchHostFunc");
            launch(stream.0, block, (&raw const gate).cast_mut().cast())
        }
    });
    assert_eq!(launched, 0);
    let to_host = world.piece((PAGEABLE, 0), (0, 0), 3 * MIB);
    let on_host = world.piece((PAGEABLE, 3 * MIB), (PINNED, 0), MIB);
    let (done, ended) = mpsc::channel();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            // SAFETY: in memory of the world.
            unsafe { copier.copy_on_stream(&[to_host], Way::Any, stream.0) }
        });
        std::thread::sleep(std::time::Duration::from_millis(100));
        scope.spawn(|| {
            // SAFETY: as above.
            let status = unsafe { copier.copy(&[on_host], Way::Any) }.status;
            done.send(status).unwrap();
        });
        let ended = ended.recv_timeout(std::time::Duration::from_secs(20));
        go.send(()).unwrap();
        waiting.join().unwrap().unwrap();
        ended
            .expect("a copy waited for the stream of another")
            .unwrap();
    });
    device.stream_synchronize(stream).unwrap();
    device.stream_destroy(stream).unwrap();
}

/// Calls the driver with the context of the world's first device current.
fn in_context(world: &World, call: impl FnOnce() -> i32) -> i32 {
    let mut call = Some(call);
    let mut code = -1;
    world.devices[0].together(&mut || {
        if let Some(call) = call.take() {
            code = call();
        }
    });
    code
}

/// Runs one test of this program in a process with another environment.
fn again(test: &str, environment: &[(&str, &str)]) {
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .envs(environment.iter().copied())
        .env("TMS_TEST_AGAIN", "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{environment:?}: {text}");
    let told = String::from_utf8_lossy(&output.stdout);
    assert!(told.contains("1 passed"), "{told}");
}

#[test]
fn the_variable_chooses_methods_and_is_checked() {
    const NAME: &str = "TMS_TRANSFER_TABLE";
    if std::env::var_os("TMS_TEST_AGAIN").is_none() {
        let test = "the_variable_chooses_methods_and_is_checked";
        again(test, &[(NAME, "h2d:4096=plain,d2d:max=kernel")]);
        again(test, &[(NAME, "h2d:4096=quick")]);
        return;
    }
    let good = !std::env::var(NAME).unwrap().contains("quick");
    for platform in platforms() {
        let mut world = World::new(platform, MIB);
        let table = world.copier.table(0);
        let pieces = [0, 200].map(|at| world.piece((0, at), (PINNED, at), 100));
        if good {
            let table = table.unwrap();
            assert!(table.contains("h2d:4096=plain"), "{table}");
            assert!(table.contains("d2d:max=kernel"), "{table}");
            for at in [0, 200] {
                world.expect((0, at), (PINNED, at), 100);
            }
            run(&world, &pieces, Form::Waiting, 0).unwrap();
        } else {
            let error = table.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidArgument);
            assert!(error.to_string().starts_with(NAME), "{error}");
            let (kind, text) = refusal(&world, &pieces, Way::Any);
            assert_eq!(kind, ErrorKind::InvalidArgument, "{text}");
        }
        world.check("variable");
    }
}

#[test]
fn a_device_without_kernels_copies_everything() {
    if FakeCuda::loaded().is_none() || std::env::var_os("TMS_TEST_AGAIN").is_some() {
        println!("needs the software driver: not selected");
        return;
    }
    let none = [("FAKECUDA_FAIL", "cuModuleLoadData:1:218:-1")];
    again(
        "lists_of_any_mix_are_copied_by_every_method_and_form",
        &none,
    );
    again("the_table_is_measured_kept_and_overridden", &none);
}

#[test]
fn freed_memory_and_memory_at_the_same_address_are_told_apart() {
    for platform in platforms() {
        let mut world = World::new(platform, 4 * MIB);
        // The same address is device memory, then pageable, then pinned memory.
        let bytes = 2 * MIB;
        for turn in 0..6 {
            let address = mapped(bytes);
            if turn % 2 == 1 {
                // SAFETY: mapped above, unregistered below.
                unsafe { world.devices[0].register_host(address as *mut u8, bytes) }.unwrap();
            }
            let place = world.copier.query(address).unwrap().place;
            assert_eq!(place, [Place::Pageable, Place::Pinned][turn % 2]);
            // SAFETY: mapped with that size.
            unsafe {
                let model = &world.places[0].model;
                std::ptr::copy_nonoverlapping(model.as_ptr(), address as *mut u8, bytes);
            }
            let piece = Piece {
                destination: world.places[1].address,
                source: address,
                bytes: bytes as u64,
            };
            world.expect((1, 0), (0, 0), bytes);
            run(&world, &[piece], Form::Waiting, 0).unwrap();
            world.check("same address");
            world.fill(0, 50 + turn as u64);
            // SAFETY: as above; no copy runs.
            unsafe {
                if turn % 2 == 1 {
                    world.devices[0]
                        .unregister_host(address as *mut u8)
                        .unwrap();
                }
                libc::munmap(address as *mut _, bytes);
            }
            let (kind, text) = refusal(&world, &[piece], Way::Any);
            assert_eq!(kind, ErrorKind::InvalidArgument, "{text}");
        }
    }
}

#[test]
fn the_table_is_measured_kept_and_overridden() {
    for platform in platforms() {
        let world = World::new(platform, 4 * MIB);
        let text = world.copier.table(0).unwrap();
        assert_eq!(text.lines().count(), 18);
        for line in text.lines() {
            assert!(line.contains("=") && line.contains(" plain:"), "{line}");
        }
        assert_eq!(world.copier.table(0).unwrap(), text, "measured once");
        world.copier.set_table(0, "h2d:4096=batch").unwrap();
        assert!(
            world
                .copier
                .table(0)
                .unwrap()
                .starts_with("h2d:4096=batch plain:")
        );
        world.copier.set_table(0, &text).unwrap();
        assert_eq!(world.copier.table(0).unwrap(), text);
        let error = world.copier.set_table(0, "h2d:4096=fast").unwrap_err();
        assert!(error.to_string().starts_with("text: "), "{error}");
        assert!(world.copier.table(9).is_err());
        assert_eq!(world.copier.table(1).unwrap().lines().count(), 18);
    }
}

#[test]
fn several_threads_copy_at_once() {
    for platform in platforms() {
        let world = World::new(platform, 16 * MIB);
        for method in METHODS {
            world.set_tables(method);
            std::thread::scope(|scope| {
                for thread in 0..4usize {
                    let world = &world;
                    scope.spawn(move || {
                        // Each thread has a part of every place to itself.
                        let part = thread * 4 * MIB;
                        for turn in 0..3 {
                            let data = pattern(MIB, (thread * 10 + turn) as u64);
                            let pageable = world.places[PAGEABLE].address + part as u64;
                            // SAFETY: this thread's part of the place.
                            unsafe {
                                std::ptr::copy_nonoverlapping(
                                    data.as_ptr(),
                                    pageable as *mut u8,
                                    MIB,
                                );
                            }
                            let way = [PAGEABLE, 0, PINNED, 1, PAGEABLE];
                            for (hop, pair) in way.windows(2).enumerate() {
                                let (to, from) = (part + (hop + 1) * 600_000, part + hop * 600_000);
                                let pieces: Vec<Piece> = (0..500)
                                    .map(|index| {
                                        let at = index * 1100;
                                        world.piece((pair[1], to + at), (pair[0], from + at), 1100)
                                    })
                                    .collect();
                                run(world, &pieces, Form::Waiting, 0).unwrap();
                            }
                            // SAFETY: as above; no copy of this part runs.
                            let got = unsafe {
                                std::slice::from_raw_parts(
                                    (pageable + 4 * 600_000) as *const u8,
                                    550_000,
                                )
                            };
                            assert!(got == &data[..550_000], "thread {thread}, turn {turn}");
                        }
                    });
                }
            });
        }
    }
}
