//! Every driver call of a copy fails once, with out-of-memory or with a code that nobody knows; then
//! several in a row. After each: a status, every byte that is said to be certain is there, the same
//! copy succeeds when repeated, and nothing is leaked. Needs the software driver with two devices
//! (`TMS_TEST_CUDA=1`, `FAKECUDA_DEVICES=2`).

mod support;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use support::{FakeCuda, pattern};
use tms_memcache::device::{self, Device, Piece, Pitched, Stream};
use tms_memcache::{Copier, ErrorKind, Region, Result, Saver, Way};

const OUT_OF_MEMORY: i32 = 2;
const UNKNOWN: i32 = 12_345;
const MIB: usize = 1 << 20;
const BYTES: usize = MIB;

/// Faults are the process's, so the tests of this program take turns.
fn alone() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
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

/// Where bytes come from or go to.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Place {
    Device(u32),
    Pinned,
    Pageable,
}

struct World {
    saver: Saver,
    copier: Copier,
    device: Arc<dyn Device>,
    stream: Stream,
    on_device: [u64; 2],
    pinned: Vec<u8>,
    pageable: Vec<u8>,
}

impl World {
    fn new(method: Option<&str>) -> World {
        let platform = device::open("cuda").unwrap();
        let device = platform.device(0).unwrap();
        let saver = Saver::new(platform).unwrap();
        let region = Region::new("copies");
        let on_device = [0, 1].map(|d| saver.malloc(BYTES as u64, Some(d), &region).unwrap());
        let copier = Copier::new(Arc::clone(saver.engine()));
        for device in 0..2 {
            if let Some(method) = method {
                copier.set_table(device, &table(method)).unwrap();
            }
        }
        // One page more, so that a whole number of pages can be registered.
        let pinned = vec![0; BYTES + 4096];
        let world = World {
            saver,
            copier,
            stream: device.stream_create().unwrap(),
            device,
            on_device,
            pinned,
            pageable: vec![0; BYTES],
        };
        // SAFETY: the vector is never moved or grown, and unregistered before it goes.
        unsafe {
            world
                .device
                .register_host(world.address(Place::Pinned) as *mut u8, BYTES)
        }
        .unwrap();
        world
    }

    fn address(&self, place: Place) -> u64 {
        match place {
            Place::Device(device) => self.on_device[device as usize],
            Place::Pinned => (self.pinned.as_ptr() as u64).next_multiple_of(4096),
            Place::Pageable => self.pageable.as_ptr() as u64,
        }
    }

    fn get(&self, fake: &FakeCuda, place: Place, at: usize, bytes: usize) -> Vec<u8> {
        let address = self.address(place) + at as u64;
        match place {
            Place::Device(_) => fake.peek(address, bytes),
            // SAFETY: within the vectors; no copy runs.
            _ => unsafe { std::slice::from_raw_parts(address as *const u8, bytes) }.to_vec(),
        }
    }

    fn fill(&self, place: Place, data: &[u8]) {
        assert!(data.len() <= BYTES);
        match place {
            Place::Device(_) => self.saver.write(self.address(place), data).unwrap(),
            // SAFETY: within the vectors, which nobody borrows; no copy runs.
            _ => unsafe {
                let to = self.address(place) as *mut u8;
                std::ptr::copy_nonoverlapping(data.as_ptr(), to, data.len());
            },
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // A second panic would end the program before the other tests.
        if std::thread::panicking() {
            return;
        }
        self.device.stream_destroy(self.stream).unwrap();
        // SAFETY: no copy runs any more.
        unsafe {
            self.device
                .unregister_host(self.address(Place::Pinned) as *mut u8)
        }
        .unwrap();
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Shape {
    /// One piece of so many bytes.
    One(usize),
    /// So many pieces, each of so many bytes, apart on both sides.
    Many(usize, usize),
    /// Rows of so many bytes.
    Rows(usize, usize),
}

#[derive(Clone, Copy, Debug)]
struct Scenario {
    from: Place,
    to: Place,
    shape: Shape,
    stream: bool,
    /// The devices cannot reach each other.
    apart: bool,
}

const UNSUPPORTED: i32 = 801;

impl Scenario {
    /// Before each copy, because faults are reset together.
    fn prepare(&self, fake: &FakeCuda) {
        if self.apart {
            fake.fail("cuMemcpyPeerAsync", 1, UNSUPPORTED, -1);
        }
    }

    /// Offset on both sides and bytes, in the order of the call.
    fn parts(&self) -> Vec<(usize, usize)> {
        match self.shape {
            Shape::One(bytes) => vec![(0, bytes)],
            Shape::Many(count, bytes) | Shape::Rows(count, bytes) => (0..count)
                .map(|index| (index * (bytes + 16), bytes))
                .collect(),
        }
    }

    /// Puts new bytes where the parts are copied from, and returns them.
    fn fill(&self, world: &World, seed: u64) -> Vec<u8> {
        let (last, bytes) = self.parts().pop().unwrap();
        let data = pattern(last + bytes, seed);
        world.fill(self.from, &data);
        data
    }

    /// Copies; the status, and how many bytes are said to be certain. On a thread of its own: where
    /// the driver refuses to leave a context, that stays current on the thread.
    fn run(&self, world: &World) -> (Result<()>, u64) {
        std::thread::scope(|scope| scope.spawn(|| self.run_here(world)).join()).unwrap()
    }

    fn run_here(&self, world: &World) -> (Result<()>, u64) {
        let (to, from) = (world.address(self.to), world.address(self.from));
        let pieces: Vec<Piece> = self
            .parts()
            .into_iter()
            .map(|(at, bytes)| Piece {
                destination: to + at as u64,
                source: from + at as u64,
                bytes: bytes as u64,
            })
            .collect();
        // SAFETY: all of it lies in memory of the world, and streams are waited for.
        unsafe {
            if self.stream {
                let status = on_stream(world, &pieces);
                let total = pieces.iter().map(|piece| piece.bytes).sum();
                let certain = if status.is_ok() { total } else { 0 };
                return (status, certain);
            }
            let ended = match self.shape {
                Shape::Rows(height, width) => world.copier.copy_2d(&Pitched {
                    destination: to,
                    destination_pitch: width as u64 + 16,
                    source: from,
                    source_pitch: width as u64 + 16,
                    width: width as u64,
                    height: height as u64,
                }),
                _ => world.copier.copy(&pieces, Way::Any),
            };
            (ended.status, ended.bytes)
        }
    }

    /// That the first `certain` bytes of what was filled in are in place.
    fn check(&self, fake: &FakeCuda, world: &World, data: &[u8], certain: u64, what: &str) {
        let parts = self.parts();
        let got = world.get(fake, self.to, 0, data.len());
        let mut left = certain as usize;
        for (at, bytes) in parts {
            let bytes = bytes.min(left);
            assert!(
                got[at..at + bytes] == data[at..at + bytes],
                "{what}: a byte that is certain is not there, at {at}"
            );
            left -= bytes;
        }
        assert_eq!(left, 0, "{what}: more is certain than was asked for");
    }
}

/// Everything goes with the world, but not at once: a thread may hold its device until it has looked
/// for more work.
fn assert_nothing_left(fake: &FakeCuda, what: &str) {
    let left = || {
        [
            fake.live_bytes(0) + fake.live_bytes(1),
            fake.live_streams() + fake.live_events(),
            fake.registered_bytes(),
        ]
    };
    let deadline = Instant::now() + Duration::from_secs(20);
    while left() != [0; 3] && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(left(), [0; 3], "{what}");
}

/// # Safety
/// As for the copier's function.
unsafe fn on_stream(world: &World, pieces: &[Piece]) -> Result<()> {
    let stream = world.stream;
    // SAFETY: by this function's contract.
    let queued = unsafe { world.copier.copy_on_stream(pieces, Way::Any, stream.0) };
    let waited = world.device.stream_synchronize(stream);
    // Whatever fails, nothing may run on when the test goes on.
    if waited.is_err() {
        while world.device.stream_synchronize(stream).is_err() {}
    }
    queued.and(waited)
}

fn scenarios(method: &str) -> Vec<Scenario> {
    let mut all = Vec::new();
    // As plain copies, each piece is a call.
    let many = match method {
        "plain" => Shape::Many(15, 333),
        _ => Shape::Many(530, 33),
    };
    let ways = [
        (Place::Pageable, Place::Device(0)),
        (Place::Device(0), Place::Pageable),
        (Place::Pinned, Place::Device(1)),
        (Place::Device(1), Place::Pinned),
        (Place::Device(0), Place::Device(1)),
        (Place::Pageable, Place::Pinned),
    ];
    for (from, to) in ways {
        all.push((from, to, many, false));
    }
    if method == "kernel" {
        for (from, to) in ways {
            all.push((from, to, Shape::One(3 * MIB / 4 + 5), false));
        }
        let zero = Place::Device(0);
        for (from, to) in [
            (Place::Pageable, zero),
            (zero, Place::Pageable),
            (Place::Pinned, zero),
            (Place::Pinned, Place::Device(1)),
        ] {
            all.push((from, to, many, true));
        }
    } else {
        let rows = Shape::Rows(15, 5000);
        all.push((Place::Pinned, Place::Device(0), rows, false));
        all.push((Place::Device(1), Place::Pageable, rows, false));
    }
    let between = (Place::Device(0), Place::Device(1));
    let apart = [
        (many, false),
        (Shape::One(3 * MIB / 4 + 5), false),
        (many, true),
    ]
    .map(|(shape, stream)| (between.0, between.1, shape, stream));
    let reachable = all.len();
    all.extend(apart);
    all.into_iter()
        .enumerate()
        .map(|(index, (from, to, shape, stream))| Scenario {
            from,
            to,
            shape,
            stream,
            apart: index >= reachable,
        })
        .collect()
}

#[test]
fn every_call_of_a_copy_fails_once() {
    let Some(fake) = FakeCuda::loaded() else {
        println!("needs the software driver: not selected");
        return;
    };
    let _alone = alone();
    let before = fake.reserved_bytes();
    for method in ["kernel", "batch", "plain"] {
        let world = World::new(Some(method));
        for scenario in scenarios(method) {
            let name = format!("{method}, {scenario:?}");
            let mut seed = 1;
            // The first one creates what later ones use again.
            scenario.prepare(&fake);
            for _ in 0..2 {
                let data = scenario.fill(&world, seed);
                let (status, certain) = scenario.run(&world);
                status.unwrap();
                scenario.check(&fake, &world, &data, certain, &name);
            }
            let live = (
                fake.live_bytes(0),
                fake.live_bytes(1),
                fake.reserved_bytes(),
            );
            let streams = fake.live_streams();
            fake.reset_count();
            scenario.run(&world).0.unwrap();
            let calls = fake.count();
            fake.reset_faults();
            // Every call once, by turns with either code; some with those that follow.
            let faults = (1..=calls)
                .map(|nth| (nth, [OUT_OF_MEMORY, UNKNOWN][nth as usize % 2], 1))
                .chain((1..=calls).step_by(7).map(|nth| (nth, UNKNOWN, 4)));
            for (nth, code, repeat) in faults {
                seed += 1;
                let data = scenario.fill(&world, seed);
                fake.reset_count();
                scenario.prepare(&fake);
                fake.fail_any(nth, code, repeat);
                let (status, certain) = scenario.run(&world);
                fake.reset_faults();
                scenario.prepare(&fake);
                let what = format!("{name}: call {nth} of {calls} -> {code}: {status:?}");
                scenario.check(&fake, &world, &data, certain, &what);
                let total: usize = scenario.parts().iter().map(|part| part.1).sum();
                if status.is_ok() {
                    assert_eq!(certain as usize, total, "{what}");
                }
                let (repeated, certain) = scenario.run(&world);
                repeated.unwrap_or_else(|error| panic!("{what}; repeated: {error}"));
                scenario.check(&fake, &world, &data, certain, &what);
                fake.reset_faults();
                let now = (
                    fake.live_bytes(0),
                    fake.live_bytes(1),
                    fake.reserved_bytes(),
                );
                assert_eq!(now, live, "{what}");
                assert_eq!(fake.live_streams(), streams, "{what}");
            }
        }
    }
    assert_eq!(fake.reserved_bytes(), before);
    assert_nothing_left(&fake, "at the end");
}

#[test]
fn the_first_copy_and_its_measurements_fail_anywhere() {
    let Some(fake) = FakeCuda::loaded() else {
        println!("needs the software driver: not selected");
        return;
    };
    let _alone = alone();
    let scenario = Scenario {
        from: Place::Pageable,
        to: Place::Device(0),
        shape: Shape::Many(200, 1000),
        stream: false,
        apart: false,
    };
    let calls = {
        let world = World::new(None);
        fake.reset_count();
        scenario.run(&world).0.unwrap();
        fake.count()
    };
    // The next fault must not hit what is left of this one.
    assert_nothing_left(&fake, "without faults");
    let few = (1..=60).chain((61..calls - 40).step_by(calls as usize / 12));
    for nth in few.chain(calls - 40..=calls) {
        for repeat in [1, 6] {
            let world = World::new(None);
            let data = scenario.fill(&world, nth);
            let live = (fake.live_bytes(0), fake.reserved_bytes());
            fake.reset_count();
            fake.fail_any(nth, UNKNOWN, repeat);
            let (status, certain) = scenario.run(&world);
            fake.reset_faults();
            let what = format!("call {nth} of {calls}, {repeat} times: {status:?}");
            scenario.check(&fake, &world, &data, certain, &what);
            // Measuring is tried again, which gives back what it had left.
            let (repeated, certain) = scenario.run(&world);
            repeated.unwrap_or_else(|error| panic!("{what}; repeated: {error}"));
            scenario.check(&fake, &world, &data, certain, &what);
            assert_eq!((fake.live_bytes(0), fake.reserved_bytes()), live, "{what}");
            drop(world);
            assert_nothing_left(&fake, &what);
        }
    }
}

#[test]
fn a_lost_device_is_told_and_host_memory_is_copied_on() {
    let Some(fake) = FakeCuda::loaded() else {
        println!("needs the software driver: not selected");
        return;
    };
    let _alone = alone();
    let world = World::new(Some("kernel"));
    let to_device = Scenario {
        from: Place::Pageable,
        to: Place::Device(0),
        shape: Shape::Many(100, 1000),
        stream: false,
        apart: false,
    };
    to_device.run(&world).0.unwrap();
    fake.reset_count();
    fake.fail_any_effect(12, 700);
    let (status, certain) = to_device.run(&world);
    assert_eq!(status.unwrap_err().kind(), ErrorKind::DeviceLost);
    assert_eq!(certain, 0);
    fake.reset_faults();
    to_device.run(&world).0.unwrap();
    drop(world);
    assert_nothing_left(&fake, "a lost device");
}
