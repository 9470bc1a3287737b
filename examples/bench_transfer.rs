//! Explicit copies beside what the bare driver does with the same bytes, in the same run.
//!
//! `cargo run --release --example bench_transfer [-- OPTIONS]`; `--help` lists them. Without a GPU
//! it runs on the host device, with small sizes, where every copy is a `memcpy` in the end.

#[allow(dead_code)] // Each program takes what it needs.
mod support {
    pub mod bare;
    pub mod human;
    pub mod memory;
    pub mod number;
    pub mod random;
    pub mod report;

    pub type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;
}

use std::ffi::{CStr, c_void};
use std::process::ExitCode;
use std::ptr;
use std::sync::Arc;
use std::time::Instant;

use serde_json::json;
use tms_memcache::device::{Device, DeviceKind};
use tms_memcache::{Region, Saver, ffi};

use support::Result;
use support::bare::{Bare, Rows};
use support::human;
use support::memory::HostMemory;
use support::number;
use support::random::Random;
use support::report::{Other, Report, Row, Target};

const HELP: &str = "\
Measures the library's explicit copies beside the bare driver's, and prints one table.

Usage: cargo run --release --example bench_transfer -- [OPTIONS]

Options:
  --size SIZE      bytes of the large copies, such as 512M or 4G
                   [default: 4G on a GPU, 64M on the host device]
  --device N       the device; copies between devices go to the next one [default: 0]
  --repeat N       timed repetitions after one that warms up; the median counts [default: 5]
  --only WORD      rows with this word in their names; may be repeated
  --list           print the names of the rows
  --json           print one JSON object
  -h, --help       print this

TMS_DEVICE=auto|cuda|host chooses the platform, TMS_TRANSFER_TABLE overrides the measured table.";

/// Bytes that lie between scattered pieces on the device.
const GAP: usize = 256;

/// Most pieces of one scattered copy.
const MOST_PIECES: usize = 65536;

fn main() -> ExitCode {
    match Arguments::parse().and_then(|arguments| arguments.map_or(Ok(true), run)) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bench_transfer: {error}");
            ExitCode::FAILURE
        }
    }
}

struct Arguments {
    size: Option<usize>,
    device: u32,
    repeat: usize,
    only: Vec<String>,
    list: bool,
    json: bool,
}

impl Arguments {
    /// `None` after the help was printed.
    fn parse() -> Result<Option<Self>> {
        use lexopt::prelude::*;

        let mut arguments = Arguments {
            size: None,
            device: 0,
            repeat: 5,
            only: Vec::new(),
            list: false,
            json: false,
        };
        let mut parser = lexopt::Parser::from_env();
        while let Some(argument) = parser.next()? {
            match argument {
                Long("size") => {
                    let text = parser.value()?.string()?;
                    let size = human::parse_size(&text).map_err(|why| format!("--size: {why}"))?;
                    if size < 1 << 20 {
                        return Err(format!("--size: {text} is less than 1M").into());
                    }
                    arguments.size = Some(size as usize);
                }
                Long("device") => {
                    let text = parser.value()?.string()?;
                    arguments.device = number::parse("--device", &text, 0)?;
                }
                Long("repeat") => {
                    let text = parser.value()?.string()?;
                    arguments.repeat = number::parse("--repeat", &text, 1)?;
                }
                Long("only") => arguments.only.push(parser.value()?.string()?),
                Long("list") => arguments.list = true,
                Long("json") => arguments.json = true,
                Short('h') | Long("help") => {
                    println!("{HELP}");
                    return Ok(None);
                }
                other => return Err(other.unexpected().into()),
            }
        }
        Ok(Some(arguments))
    }

    fn wants(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|word| name.contains(&**word))
    }
}

/// Where one side of a copy lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Pageable,
    Pinned,
    Device,
    OtherDevice,
}

/// What is copied of the two sides.
#[derive(Clone, Copy, Debug)]
enum Shape {
    Whole,
    /// Pieces of so many bytes, in any order and with gaps on the device, one after the other on
    /// the host.
    Scattered(usize),
    /// Pieces of any size and alignment on both sides.
    Misaligned,
    /// Rows with gaps on the device, without on the host.
    Rows,
}

/// A copy that is measured.
struct Case {
    name: String,
    source: Place,
    destination: Place,
    shape: Shape,
    target: Option<Target>,
}

const BOTH: &str = "pinned both directions";
const QUERY: &str = "pointer query";

fn cases() -> Vec<Case> {
    use Place::{Device, OtherDevice, Pageable, Pinned};

    let mut cases = Vec::new();
    let mut add = |name: String, source, destination, shape, target: Option<f64>| {
        cases.push(Case {
            name,
            source,
            destination,
            shape,
            target: target.map(Target::Rate),
        });
    };
    let whole = Shape::Whole;
    add("pinned h2d".into(), Pinned, Device, whole, None);
    add("pinned d2h".into(), Device, Pinned, whole, None);
    add("pageable h2d".into(), Pageable, Device, whole, Some(50.0));
    add("pageable d2h".into(), Device, Pageable, whole, Some(45.0));
    for (label, piece) in [
        ("4 KiB", 4 << 10),
        ("16 KiB", 16 << 10),
        ("64 KiB", 64 << 10),
        ("256 KiB", 256 << 10),
        ("1 MiB", 1 << 20),
    ] {
        let target = Some(if piece == 4 << 10 { 48.0 } else { 50.0 });
        let shape = Shape::Scattered(piece);
        let name = |way| format!("scattered {label} {way}");
        add(name("h2d"), Pinned, Device, shape, target);
        add(name("d2h"), Device, Pinned, shape, target);
    }
    let shape = Shape::Misaligned;
    add("misaligned h2d".into(), Pinned, Device, shape, None);
    add("misaligned d2h".into(), Device, Pinned, shape, None);
    add("rows h2d".into(), Pinned, Device, Shape::Rows, None);
    add("rows d2h".into(), Device, Pinned, Shape::Rows, None);
    add("on the device".into(), Device, Device, whole, None);
    let shape = Shape::Scattered(64 << 10);
    let name = "scattered 64 KiB on the device";
    add(name.into(), Device, Device, shape, None);
    add("between devices".into(), Device, OtherDevice, whole, None);
    cases
}

fn run(arguments: Arguments) -> Result<bool> {
    let cases = cases();
    if arguments.list {
        let names = cases.iter().map(|case| &*case.name);
        for name in names.chain([BOTH, QUERY]) {
            println!("{name}");
        }
        return Ok(true);
    }
    let names = || cases.iter().map(|case| &*case.name).chain([BOTH, QUERY]);
    if !names().any(|name| arguments.wants(name)) {
        return Err("--only: no row has such a name; --list prints them".into());
    }
    let saver = Saver::process_default()?;
    let mut bench = Bench::new(&arguments, saver)?;
    for case in cases.iter().filter(|case| arguments.wants(&case.name)) {
        bench.measure_case(case)?;
    }
    if arguments.wants(BOTH) {
        bench.measure_both()?;
    }
    if arguments.wants(QUERY) {
        bench.measure_query()?;
    }
    let table = transfer_table(arguments.device)?;
    if arguments.json {
        let extra = json!({
            "size": bench.size,
            "repeat": arguments.repeat,
            "transfer_table": table,
        });
        println!("{:#}", bench.report.as_json(extra));
    } else {
        bench.report.print();
        println!("Transfer table of the device:");
        println!("{}", table.trim_end());
    }
    Ok(bench.report.right())
}

fn checked(code: i32) -> Result<()> {
    if code >= 0 {
        return Ok(());
    }
    // SAFETY: the text of this thread stays until its next call.
    let message = unsafe { CStr::from_ptr(ffi::tms_last_error_message()) };
    Err(message.to_string_lossy().into_owned().into())
}

/// The table by which the library chooses how to copy pieces.
fn transfer_table(device: u32) -> Result<String> {
    let device = i32::try_from(device)?;
    let mut needed = 0;
    // SAFETY: no buffer, and a place for its size.
    checked(unsafe {
        ffi::tms_transfer_table_get(ptr::null(), device, ptr::null_mut(), 0, &mut needed)
    })?;
    let mut text = vec![0_u8; needed];
    // SAFETY: a buffer of the size that is given.
    checked(unsafe {
        ffi::tms_transfer_table_get(
            ptr::null(),
            device,
            text.as_mut_ptr().cast(),
            text.len(),
            &mut needed,
        )
    })?;
    Ok(CStr::from_bytes_until_nul(&text)?.to_str()?.to_owned())
}

/// One piece: where it goes, where it comes from, and its bytes; offsets into the two sides.
#[derive(Clone, Copy, Debug)]
struct Piece {
    to: usize,
    from: usize,
    bytes: usize,
}

/// What a case copies, laid out.
struct Layout {
    pieces: Vec<Piece>,
    rows: Option<Rows>,
    bytes: usize,
    /// Bytes of either side that pieces lie in.
    from_bytes: usize,
    to_bytes: usize,
}

impl Layout {
    fn new(case: &Case, size: usize, small: usize) -> Layout {
        let scattered = |place| matches!(place, Place::Device | Place::OtherDevice);
        let mut random = Random::new(5);
        let mut layout = Layout {
            pieces: Vec::new(),
            rows: None,
            bytes: 0,
            from_bytes: 0,
            to_bytes: 0,
        };
        match case.shape {
            Shape::Whole => layout.pieces.push(Piece {
                to: 0,
                from: 0,
                bytes: size,
            }),
            Shape::Scattered(piece) => {
                let count = (small / piece).max(4096).min(size / piece);
                let places = shuffled(count, &mut random);
                for (index, &place) in places.iter().enumerate() {
                    let at = |side| match scattered(side) {
                        true => place * (piece + GAP),
                        false => index * piece,
                    };
                    let to = at(case.destination);
                    // On the device, pieces move to other places, the first to the last.
                    let from = match case.source == case.destination {
                        true => (count - 1 - place) * (piece + GAP),
                        false => at(case.source),
                    };
                    layout.pieces.push(Piece {
                        to,
                        from,
                        bytes: piece,
                    });
                }
            }
            Shape::Misaligned => {
                let (mut ends, mut sizes) = ([0, 0], Vec::new());
                let mut total = 0;
                while sizes.len() < MOST_PIECES {
                    let bytes = 1 + random.next() as usize % (32 << 10);
                    if total + bytes > small {
                        break;
                    }
                    total += bytes;
                    sizes.push(bytes);
                }
                let order = shuffled(sizes.len(), &mut random);
                let mut places = vec![0; sizes.len()];
                for &piece in &order {
                    places[piece] = ends[0];
                    ends[0] += sizes[piece] + 1 + random.next() as usize % 63;
                }
                for (&bytes, &to) in sizes.iter().zip(&places) {
                    let from = ends[1];
                    layout.pieces.push(Piece { to, from, bytes });
                    ends[1] += bytes + 1 + random.next() as usize % 63;
                }
            }
            Shape::Rows => {
                let (width, wide) = (4096, 10240);
                let pitch = |side| if scattered(side) { wide } else { width };
                let rows = Rows {
                    destination_pitch: pitch(case.destination),
                    source_pitch: pitch(case.source),
                    width,
                    height: small / wide,
                };
                layout.pieces.extend((0..rows.height).map(|row| Piece {
                    to: row * rows.destination_pitch,
                    from: row * rows.source_pitch,
                    bytes: width,
                }));
                layout.rows = Some(rows);
            }
        }
        for piece in &layout.pieces {
            layout.bytes += piece.bytes;
            layout.from_bytes = layout.from_bytes.max(piece.from + piece.bytes);
            layout.to_bytes = layout.to_bytes.max(piece.to + piece.bytes);
        }
        layout
    }
}

/// The numbers below `count` in any order.
fn shuffled(count: usize, random: &mut Random) -> Vec<usize> {
    let mut numbers: Vec<_> = (0..count).collect();
    for index in (1..count).rev() {
        numbers.swap(index, random.next() as usize % (index + 1));
    }
    numbers
}

/// Memory of a device, freed with the saver.
struct DeviceMemory {
    device: u32,
    address: u64,
}

struct Bench {
    bare: Bare,
    memory: Arc<dyn Device>,
    device: u32,
    devices: u32,
    kind: DeviceKind,
    size: usize,
    /// Bytes of copies of many small pieces.
    small: usize,
    repeat: usize,
    saver: Saver,
    pageable: HostMemory,
    pinned: HostMemory,
    /// What is, and what should be, in device memory.
    images: [HostMemory; 2],
    on_device: [DeviceMemory; 2],
    seed: u64,
    report: Report,
}

impl Bench {
    fn new(arguments: &Arguments, saver: Saver) -> Result<Bench> {
        let platform = Arc::clone(saver.platform());
        platform.check_ordinal(arguments.device)?;
        let device: Arc<dyn Device> = platform.device(arguments.device)?;
        let kind = platform.kind();
        let (size, small) = match kind {
            DeviceKind::Cuda => (4 << 30, 256 << 20),
            DeviceKind::Host => (64 << 20, 16 << 20),
        };
        let size = arguments.size.unwrap_or(size);
        let small = small.min(size);
        // Room for the gaps, which are widest beside pieces of 4 KiB, and for misaligned pieces.
        let room = size + size / 8 + (4 << 20);
        let allocate = || -> Result<DeviceMemory> {
            let region = Region::new("bench_transfer").with_peer_access(true);
            let address = saver.malloc(room as u64, Some(arguments.device), &region)?;
            Ok(DeviceMemory {
                device: arguments.device,
                address,
            })
        };
        Ok(Bench {
            bare: Bare::open(kind, platform.device_count())?,
            device: arguments.device,
            devices: platform.device_count(),
            kind,
            size,
            small,
            repeat: arguments.repeat,
            pageable: HostMemory::new(room)?,
            pinned: HostMemory::new(room)?.pin(&device)?,
            images: [HostMemory::new(room)?, HostMemory::new(room)?],
            on_device: [allocate()?, allocate()?],
            seed: 1,
            report: Report::new(device.info()),
            memory: device,
            saver,
        })
    }

    /// Seconds of one go of `work`: the median of several, after one that warms up.
    fn seconds(&self, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
        work()?;
        let mut times = Vec::new();
        for _ in 0..self.repeat {
            let started = Instant::now();
            work()?;
            times.push(started.elapsed().as_secs_f64());
        }
        times.sort_by(f64::total_cmp);
        Ok(times[times.len() / 2])
    }

    /// Memory of the source (`false`) or destination side of a case.
    fn side(&self, place: Place, destination: bool, other: &DeviceMemory) -> u64 {
        match place {
            Place::Pageable => self.pageable.address(),
            Place::Pinned => self.pinned.address(),
            Place::Device => self.on_device[usize::from(destination)].address,
            Place::OtherDevice => other.address,
        }
    }

    /// Puts random bytes, other ones each time, on the source's side.
    fn prepare(&mut self, place: Place, address: u64, bytes: usize) -> Result<()> {
        self.seed += 1;
        let seed = self.seed;
        match place {
            Place::Pageable => self.pageable.randomize(bytes, seed),
            Place::Pinned => self.pinned.randomize(bytes, seed),
            Place::Device | Place::OtherDevice => {
                self.images[0].randomize(bytes, seed);
                // SAFETY: both sides are as large as `room`, and nothing is queued.
                unsafe {
                    self.bare
                        .copy(self.device, address, self.images[0].address(), bytes)
                }?;
            }
        }
        Ok(())
    }

    fn image(&self, place: Place, image: usize) -> &HostMemory {
        match place {
            Place::Pageable => &self.pageable,
            Place::Pinned => &self.pinned,
            Place::Device | Place::OtherDevice => &self.images[image],
        }
    }

    /// Whether every piece arrived.
    fn right(&self, case: &Case, layout: &Layout, destination: &DeviceMemory) -> Result<bool> {
        if matches!(case.destination, Place::Device | Place::OtherDevice) {
            let image = self.images[1].address();
            // SAFETY: as in `prepare`.
            unsafe {
                self.bare.copy(
                    destination.device,
                    image,
                    destination.address,
                    layout.to_bytes,
                )
            }?;
        }
        let from = self.image(case.source, 0).bytes();
        let to = self.image(case.destination, 1).bytes();
        Ok(layout.pieces.iter().all(|piece| {
            to[piece.to..piece.to + piece.bytes] == from[piece.from..piece.from + piece.bytes]
        }))
    }

    fn measure_case(&mut self, case: &Case) -> Result<()> {
        let across = case.destination == Place::OtherDevice;
        if across && self.devices < 2 {
            return Ok(());
        }
        let mut other = DeviceMemory {
            device: (self.device + 1) % self.devices,
            address: 0,
        };
        let layout = Layout::new(case, self.size, self.small);
        if across {
            let region = Region::new("bench_transfer").with_peer_access(true);
            let bytes = layout.to_bytes as u64;
            other.address = self.saver.malloc(bytes, Some(other.device), &region)?;
        }
        let source = self.side(case.source, false, &other);
        let destination = self.side(case.destination, true, &other);
        let target = DeviceMemory {
            device: if across { other.device } else { self.device },
            address: destination,
        };
        self.prepare(case.source, source, layout.from_bytes)?;
        let seconds = self.ours(case, &layout, destination, source)?;
        let right = self.right(case, &layout, &target)?;
        let mut row = Row::new(&*case.name, layout.bytes as u64, seconds);
        row.right = Some(right);
        row.target = case.target;
        row.pieces = (layout.pieces.len() > 1).then_some(layout.pieces.len() as u64);
        row.peer = self.peer(case, &layout, destination, source)?;
        row.ceiling = Some(self.ceiling(case, &layout, destination, source)?);
        self.report.rows.push(row);
        if across {
            self.saver.free(other.address)?;
        }
        Ok(())
    }

    /// Seconds of the library.
    fn ours(&self, case: &Case, layout: &Layout, destination: u64, source: u64) -> Result<f64> {
        let (to, from) = (destination as *mut c_void, source as *const c_void);
        let none = ptr::null_mut();
        if let Some(rows) = &layout.rows {
            // SAFETY: here and below, both sides are valid for the layout, and stay so.
            return self.seconds(|| unsafe {
                checked(ffi::tms_memcpy_2d(
                    ptr::null(),
                    to,
                    rows.destination_pitch,
                    from,
                    rows.source_pitch,
                    rows.width,
                    rows.height,
                    none,
                ))
            });
        }
        if layout.pieces.len() == 1 {
            let copy = match (case.source, case.destination) {
                (Place::Pageable | Place::Pinned, _) => ffi::tms_memcpy_h2d,
                (_, Place::Pageable | Place::Pinned) => ffi::tms_memcpy_d2h,
                _ => ffi::tms_memcpy_d2d,
            };
            return self
                .seconds(|| unsafe { checked(copy(ptr::null(), to, from, layout.bytes, none)) });
        }
        let copies: Vec<_> = layout
            .pieces
            .iter()
            .map(|piece| ffi::tms_copy_t {
                dst: to.wrapping_byte_add(piece.to),
                src: from.wrapping_byte_add(piece.from),
                bytes: piece.bytes,
            })
            .collect();
        self.seconds(|| unsafe {
            checked(ffi::tms_memcpy_batch(
                ptr::null(),
                copies.as_ptr(),
                copies.len(),
                none,
            ))
        })
    }

    /// What a program does without the library: one call for each piece.
    fn peer(
        &self,
        case: &Case,
        layout: &Layout,
        destination: u64,
        source: u64,
    ) -> Result<Option<Other>> {
        let (blocking, queued) = self.bare.names();
        if case.source == Place::Pageable || case.destination == Place::Pageable {
            let seconds = self.seconds(|| unsafe {
                self.bare
                    .copy(self.device, destination, source, layout.bytes)
            })?;
            return Ok(Some(Other::new(blocking, seconds)));
        }
        if layout.pieces.len() == 1 {
            return Ok(None);
        }
        let lane = self.bare.lane(self.device)?;
        lane.enter()?;
        if let Some(rows) = &layout.rows {
            let mut possible = true;
            let seconds = self.seconds(|| {
                // SAFETY: both sides are valid for the rows, and the lane is waited for.
                possible &= unsafe { lane.copy_rows(destination, source, rows) }?;
                lane.synchronize()
            })?;
            let name = match self.kind {
                DeviceKind::Cuda => "cuMemcpy2DAsync",
                DeviceKind::Host => queued,
            };
            return Ok(possible.then(|| Other::new(name, seconds)));
        }
        let seconds = self.seconds(|| {
            for piece in &layout.pieces {
                let (to, from) = (destination + piece.to as u64, source + piece.from as u64);
                // SAFETY: as above, for the piece.
                unsafe { lane.copy(to, from, piece.bytes) }?;
            }
            lane.synchronize()
        })?;
        Ok(Some(Other::new(format!("{queued} each"), seconds)))
    }

    /// As many bytes in one piece between the device and pinned memory, or on the device.
    fn ceiling(
        &self,
        case: &Case,
        layout: &Layout,
        destination: u64,
        source: u64,
    ) -> Result<Other> {
        let pinned = |place, address| match place {
            Place::Pageable => self.pinned.address(),
            _ => address,
        };
        let to = pinned(case.destination, destination);
        let from = pinned(case.source, source);
        let lane = self.bare.lane(self.device)?;
        lane.enter()?;
        let other = (self.device + 1) % self.devices;
        let across = case.destination == Place::OtherDevice;
        let seconds = self.seconds(|| {
            // SAFETY: no side is smaller than the layout's bytes, and the lane is waited for.
            unsafe {
                match across {
                    true => lane.copy_to_peer(other, to, from, layout.bytes),
                    false => lane.copy(to, from, layout.bytes),
                }
            }?;
            lane.synchronize()
        })?;
        let name = match (across, self.kind) {
            (true, DeviceKind::Cuda) => "cuMemcpyPeerAsync",
            _ => self.bare.names().1,
        };
        Ok(Other::new(format!("{name}, one piece"), seconds))
    }

    /// One copy each way at once.
    fn measure_both(&mut self) -> Result<()> {
        let half = self.size / 2;
        let (up, down) = (self.on_device[0].address, self.on_device[1].address);
        let pinned = self.pinned.address();
        let (from, to) = (pinned, pinned + half as u64);
        self.prepare(Place::Device, down, half)?;
        self.seed += 1;
        self.pinned.randomize(half, self.seed);
        let lanes = [self.bare.lane(self.device)?, self.bare.lane(self.device)?];
        lanes[0].enter()?;
        let seconds = self.seconds(|| {
            // SAFETY: the sides are valid for `half` bytes, do not overlap, and are used by
            // nobody else until both streams were waited for.
            unsafe {
                checked(ffi::tms_memcpy_h2d_on_stream(
                    ptr::null(),
                    up as *mut c_void,
                    from as *const c_void,
                    half,
                    lanes[0].handle(),
                ))?;
                checked(ffi::tms_memcpy_d2h_on_stream(
                    ptr::null(),
                    to as *mut c_void,
                    down as *const c_void,
                    half,
                    lanes[1].handle(),
                ))?;
            }
            // On the host device the streams are not those of the lanes.
            Ok(self.memory.synchronize()?)
        })?;
        // SAFETY: nothing is queued any more.
        unsafe {
            self.bare
                .copy(self.device, self.images[1].address(), up, half)
        }?;
        let host = self.pinned.bytes();
        let right = self.images[1].bytes()[..half] == host[..half]
            && self.images[0].bytes()[..half] == host[half..2 * half];
        let bare = self.seconds(|| {
            // SAFETY: as above; both lanes are waited for.
            unsafe {
                lanes[0].copy(up, from, half)?;
                lanes[1].copy(to, down, half)?;
            }
            lanes.iter().try_for_each(|lane| lane.synchronize())
        })?;
        let mut row = Row::new(BOTH, 2 * half as u64, seconds);
        let (_, queued) = self.bare.names();
        row.ceiling = Some(Other::new(format!("{queued}, two streams"), bare));
        row.right = Some(right);
        self.report.rows.push(row);
        Ok(())
    }

    /// The cost of finding out what kind of memory a known address is.
    fn measure_query(&mut self) -> Result<()> {
        const CALLS: usize = 100_000;
        let start = self.on_device[0].address;
        let step = (self.size / CALLS) as u64;
        let mut info = ffi::tms_pointer_info_t {
            struct_size: size_of::<ffi::tms_pointer_info_t>() as u32,
            kind: 0,
            device: 0,
            reserved: 0,
            start: ptr::null_mut(),
            bytes: 0,
        };
        let seconds = self.seconds(|| {
            for call in 0..CALLS as u64 {
                let address = (start + call * step) as *const c_void;
                // SAFETY: the address is not followed; the struct is writable and sized.
                checked(unsafe { ffi::tms_pointer_query(ptr::null(), address, &mut info) })?;
            }
            Ok(())
        })?;
        let right = info.kind == ffi::TMS_MEMORY_DEVICE && info.device == self.device as i32;
        let mut known = true;
        let bare = self.seconds(|| {
            for call in 0..CALLS as u64 {
                known &= self.bare.classify(start + call * step)?;
            }
            Ok(())
        })?;
        let mut row = Row::new(QUERY, 0, seconds / CALLS as f64);
        row.timed = true;
        row.peer = known.then(|| Other::new("cuPointerGetAttributes", bare / CALLS as f64));
        row.target = Some(Target::Time(1e-6));
        row.right = Some(right);
        self.report.rows.push(row);
        Ok(())
    }
}
