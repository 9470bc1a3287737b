//! Pausing and resuming device memory, beside bare pinned copies of the same bytes in the same run.
//!
//! `cargo run --release --example bench_pause [-- OPTIONS]`; `--help` lists them. Every case has a
//! process of its own (this program again), so that "first" is the first time in a process.

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

use std::ffi::CStr;
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::ptr;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tms_memcache::device::{Device, DeviceKind, Platform};
use tms_memcache::{Outcome, PauseOptions, Region, ResumeOptions, Saver, ffi};

use support::Result;
use support::bare::Bare;
use support::human;
use support::memory::HostMemory;
use support::number;
use support::report::{Other, Report, Row, Target};

const HELP: &str = "\
Measures pause and resume beside bare pinned copies of the same bytes, and prints one table.

Usage: cargo run --release --example bench_pause -- [OPTIONS]

Options:
  --count N        allocations [default: 320 on a GPU, 16 on the host device]
  --bytes SIZE     bytes of each [default: 32M on a GPU, 2M on the host device]
  --devices N      devices that are paused together [default: all, 4 at most]
  --file DIR       also measure file backups, in this folder
  --touch SIZE     host memory that is touched and released before anything is timed; on a virtual
                   machine the first touch is slower [default: twice all bytes, at most half of
                   what is available; nothing on the host device]
  --repeat N       timed repetitions where it is not the first time that counts [default: 5]
  --only WORD      cases with this word in their names; may be repeated
  --list           print the names of the cases
  --json           print one JSON object
  -h, --help       print this

TMS_DEVICE=auto|cuda|host chooses the platform.";

const TAG: &str = "bench_pause";

/// The random bytes of two allocations are the same, this many bytes apart.
const SHIFT: usize = 64;

/// Bytes that a bare copy moves at a time, through one piece of pinned memory.
const CEILING_PIECE: usize = 1 << 30;

fn main() -> ExitCode {
    match Arguments::parse().and_then(|arguments| arguments.map_or(Ok(true), run)) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bench_pause: {error}");
            ExitCode::FAILURE
        }
    }
}

#[derive(Default)]
struct Arguments {
    count: Option<usize>,
    bytes: Option<u64>,
    devices: Option<u32>,
    file: Option<PathBuf>,
    touch: Option<u64>,
    repeat: Option<usize>,
    only: Vec<String>,
    list: bool,
    json: bool,
    /// The case that this process is for.
    child: Option<String>,
}

impl Arguments {
    /// `None` after the help was printed.
    fn parse() -> Result<Option<Self>> {
        use lexopt::prelude::*;

        let size = |name: &str, value: std::ffi::OsString| -> Result<u64> {
            human::parse_size(&value.string()?).map_err(|why| format!("{name}: {why}").into())
        };
        let number = |name: &str, value: std::ffi::OsString| -> Result<usize> {
            Ok(number::parse(name, &value.string()?, 1)?)
        };
        let mut arguments = Arguments::default();
        let mut parser = lexopt::Parser::from_env();
        while let Some(argument) = parser.next()? {
            match argument {
                Long("count") => arguments.count = Some(number("--count", parser.value()?)?),
                Long("bytes") => arguments.bytes = Some(size("--bytes", parser.value()?)?),
                Long("devices") => {
                    let devices = number("--devices", parser.value()?)?;
                    arguments.devices = Some(u32::try_from(devices).unwrap_or(u32::MAX));
                }
                Long("file") => arguments.file = Some(parser.value()?.into()),
                Long("touch") => {
                    arguments.touch = Some(match parser.value()?.string()? {
                        none if none == "0" => 0,
                        text => size("--touch", text.into())?,
                    });
                }
                Long("repeat") => arguments.repeat = Some(number("--repeat", parser.value()?)?),
                Long("only") => arguments.only.push(parser.value()?.string()?),
                Long("list") => arguments.list = true,
                Long("json") => arguments.json = true,
                Long("child") => arguments.child = Some(parser.value()?.string()?),
                Short('h') | Long("help") => {
                    println!("{HELP}");
                    return Ok(None);
                }
                other => return Err(other.unexpected().into()),
            }
        }
        Ok(Some(arguments))
    }
}

/// What a process measures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    /// Pinned backups, the first time and again.
    Pinned,
    /// The same, after `tms_saver_prewarm`.
    Prewarmed,
    /// Retained pinned backups, of memory that did and did not change; `false`: nothing is
    /// compared with the backup.
    Retained(bool),
    /// Without a backup: 320 allocations of 32 MiB, or as many bytes in 20.
    Nothing,
    NothingLarge,
    Mmap,
    File,
    /// All devices at once.
    Together,
    /// A resume in layers.
    Ordered,
}

const CASES: [(&str, What); 10] = [
    ("pinned", What::Pinned),
    ("prewarmed", What::Prewarmed),
    ("retained", What::Retained(true)),
    ("retained, not compared", What::Retained(false)),
    ("without backup", What::Nothing),
    ("without backup, large", What::NothingLarge),
    ("mmap", What::Mmap),
    ("file", What::File),
    ("devices together", What::Together),
    ("ordered", What::Ordered),
];

/// What an H200 must reach, by the name of the row.
const TARGETS: [(&str, Target); 15] = [
    ("pinned, first pause", Target::Rate(35.0)),
    ("pinned, pause again", Target::Rate(54.0)),
    ("pinned, resume again", Target::Rate(54.0)),
    ("retained, unchanged, pause", Target::Time(0.030)),
    ("without backup, first pause", Target::Time(0.010)),
    ("without backup, first resume", Target::Time(0.004)),
    ("without backup, pause again", Target::Time(0.004)),
    ("without backup, resume again", Target::Time(0.002)),
    ("mmap, pause", Target::Rate(30.0)),
    ("mmap, resume", Target::Rate(45.0)),
    ("devices together, pause again", Target::OfCeiling(0.95)),
    ("devices together, resume again", Target::OfCeiling(0.95)),
    ("ordered, first part", Target::Time(0.025)),
    ("retained, changed, pause", Target::Rate(54.0)),
    ("retained, resume", Target::Rate(54.0)),
];

/// How many processes measure a case in which it is the first time that counts.
const PROCESSES: usize = 4;

/// Sizes that all processes of a run have in common.
#[derive(Clone, Debug)]
struct Sizes {
    count: usize,
    bytes: u64,
    devices: u32,
    repeat: usize,
    /// Before each resume, and each pause after one: the driver clears released memory in the
    /// background, which slows the copies of whoever resumes at once.
    idle: Duration,
    file: Option<PathBuf>,
}

impl Sizes {
    fn new(arguments: &Arguments, platform: &dyn Platform) -> Sizes {
        let (count, bytes, idle) = match platform.kind() {
            DeviceKind::Cuda => (320, 32 << 20, 30),
            DeviceKind::Host => (16, 2 << 20, 0),
        };
        let devices = arguments.devices.unwrap_or(4).min(platform.device_count());
        Sizes {
            count: arguments.count.unwrap_or(count),
            bytes: arguments.bytes.unwrap_or(bytes),
            devices,
            repeat: arguments.repeat.unwrap_or(5),
            idle: Duration::from_millis(idle),
            file: arguments.file.clone(),
        }
    }

    fn total(&self) -> u64 {
        self.count as u64 * self.bytes
    }

    /// Arguments that make a child find the same sizes.
    fn arguments(&self) -> Vec<String> {
        let mut arguments = vec![
            format!("--count={}", self.count),
            format!("--bytes={}", self.bytes),
            format!("--devices={}", self.devices),
            format!("--repeat={}", self.repeat),
        ];
        if let Some(folder) = &self.file {
            arguments.push(format!("--file={}", folder.display()));
        }
        arguments
    }
}

fn run(arguments: Arguments) -> Result<bool> {
    if arguments.list {
        for (name, _) in CASES {
            println!("{name}");
        }
        return Ok(true);
    }
    if let Some(name) = &arguments.child {
        let what = CASES.into_iter().find(|(known, _)| known == name);
        let (name, what) = what.ok_or_else(|| format!("--child: there is no case {name}"))?;
        let saver = Saver::process_default()?;
        let sizes = Sizes::new(&arguments, &**saver.platform());
        for row in Bench::new(saver, sizes)?.measure(name, what)? {
            println!("{}", row_to_json(&row));
        }
        return Ok(true);
    }
    // Closed again, so that the children have all of the device.
    let (sizes, info) = {
        let platform = tms_memcache::device::open_from_environment()?;
        let info = platform.device(0)?.info().clone();
        (Sizes::new(&arguments, &*platform), info)
    };
    let wanted = |name: &str| {
        arguments.only.is_empty() || arguments.only.iter().any(|word| name.contains(&**word))
    };
    let cases: Vec<_> = CASES
        .into_iter()
        .filter(|(name, what)| match what {
            What::File => sizes.file.is_some() && wanted(name),
            What::Together => sizes.devices > 1 && wanted(name),
            _ => wanted(name),
        })
        .collect();
    if cases.is_empty() {
        return Err("no case has such a name here; --list prints them".into());
    }
    let touched = touch(&arguments, &sizes, info.kind)?;
    let mut report = Report::new(&info);
    for (name, what) in cases {
        let processes = match (info.kind, what) {
            (DeviceKind::Cuda, What::Pinned | What::Nothing | What::NothingLarge) => PROCESSES,
            _ => 1,
        };
        report.rows.extend(in_processes(name, &sizes, processes)?);
    }
    for row in &mut report.rows {
        let target = TARGETS.iter().find(|(name, _)| *name == row.name);
        row.target = target.map(|(_, target)| *target);
    }
    if arguments.json {
        let extra = json!({
            "count": sizes.count,
            "bytes_each": sizes.bytes,
            "devices": sizes.devices,
            "repeat": sizes.repeat,
            "host_memory_touched": touched,
            "processes_for_first_times": PROCESSES,
        });
        println!("{:#}", report.as_json(extra));
    } else {
        report.print();
        println!(
            "{} x {}; every case in a process of its own; on a GPU the rows of cases with first times \
             are medians of {} processes after one that does not count, because the first one on a \
             machine registers memory several times more slowly; TMS_PINNED_KEEP covers what is \
             paused; {} of host memory touched and released before.",
            sizes.count,
            human::bytes(sizes.bytes),
            PROCESSES - 1,
            human::bytes(touched)
        );
    }
    Ok(report.right())
}

/// Lets the machine find its memory before anything is timed; returns the bytes.
fn touch(arguments: &Arguments, sizes: &Sizes, kind: DeviceKind) -> Result<u64> {
    let wanted = match (arguments.touch, kind) {
        (Some(bytes), _) => bytes,
        (None, DeviceKind::Host) => 0,
        (None, DeviceKind::Cuda) => {
            let all = sizes.total() * u64::from(sizes.devices) * 2;
            all.min(available_memory()? / 2)
        }
    };
    if wanted > 0 {
        drop(HostMemory::new(wanted as usize)?);
    }
    Ok(wanted)
}

/// Memory that can be had without swapping: the machine's, or the control group's if that is less.
fn available_memory() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let kilobytes = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.trim().strip_suffix(" kB"))
        .and_then(|number| number.trim().parse::<u64>().ok())
        .ok_or("/proc/meminfo has no MemAvailable line")?;
    let limit = std::fs::read_to_string("/sys/fs/cgroup/memory.max").ok();
    let limit = limit.and_then(|text| text.trim().parse::<u64>().ok());
    Ok(limit.unwrap_or(u64::MAX).min(kilobytes * 1024))
}

/// The medians of several fresh processes, of which the first does not count.
fn in_processes(name: &str, sizes: &Sizes, processes: usize) -> Result<Vec<Row>> {
    let mut rows = in_a_process(name, sizes)?;
    if processes == 1 {
        return Ok(rows);
    }
    let mut all = Vec::new();
    for _ in 1..processes {
        all.push(in_a_process(name, sizes)?);
    }
    for (index, row) in rows.iter_mut().enumerate() {
        let others: Vec<&Row> = all.iter().filter_map(|rows| rows.get(index)).collect();
        row.seconds = median(others.iter().map(|row| row.seconds).collect());
        row.right = others
            .iter()
            .map(|row| row.right)
            .fold(row.right, |one, other| {
                one.and_then(|one| other.map(|other| one && other))
            });
    }
    Ok(rows)
}

/// Measures a case in a fresh process, which prints a JSON line for each row.
fn in_a_process(name: &str, sizes: &Sizes) -> Result<Vec<Row>> {
    // All that is paused is kept pinned for the next time, as a host with this much to pause would
    // choose.
    let keep = std::env::var("TMS_PINNED_KEEP")
        .unwrap_or_else(|_| (sizes.total() * u64::from(sizes.devices)).to_string());
    let output = Command::new(std::env::current_exe()?)
        .env("TMS_PINNED_KEEP", keep)
        .arg(format!("--child={name}"))
        .args(sizes.arguments())
        .stderr(Stdio::inherit())
        .output()?;
    if !output.status.success() {
        return Err(format!("the process for \"{name}\" ended with {}", output.status).into());
    }
    let lines = std::str::from_utf8(&output.stdout)?.lines();
    lines
        .map(|line| row_from_json(&serde_json::from_str(line)?))
        .collect()
}

fn row_to_json(row: &Row) -> Value {
    json!({
        "name": row.name,
        "bytes": row.bytes,
        "pieces": row.pieces,
        "seconds": row.seconds,
        "timed": row.timed,
        "ceiling": row.ceiling.as_ref().map(|other| (&other.what, other.seconds)),
        "right": row.right,
    })
}

fn row_from_json(row: &Value) -> Result<Row> {
    let missing = || format!("not a row: {row}");
    let name = row["name"].as_str().ok_or_else(missing)?;
    let bytes = row["bytes"].as_u64().ok_or_else(missing)?;
    let seconds = row["seconds"].as_f64().ok_or_else(missing)?;
    let mut result = Row::new(name, bytes, seconds);
    result.pieces = row["pieces"].as_u64();
    result.timed = row["timed"] == true;
    result.right = row["right"].as_bool();
    if let (Some(what), Some(seconds)) = (row["ceiling"][0].as_str(), row["ceiling"][1].as_f64()) {
        result.ceiling = Some(Other::new(what, seconds));
    }
    Ok(result)
}

fn checked(code: i32) -> Result<()> {
    if code >= 0 {
        return Ok(());
    }
    // SAFETY: the text of this thread stays until its next call.
    let message = unsafe { CStr::from_ptr(ffi::tms_last_error_message()) };
    Err(message.to_string_lossy().into_owned().into())
}

#[derive(Clone, Copy, Debug)]
struct Allocation {
    device: u32,
    address: u64,
    bytes: usize,
    /// Where its bytes begin in the random block.
    content: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    ToHost,
    ToDevice,
}

struct Bench {
    saver: Saver,
    bare: Bare,
    sizes: Sizes,
    device: Arc<dyn Device>,
    allocations: Vec<Allocation>,
    /// Random bytes; allocations hold parts of it.
    block: HostMemory,
    rows: Vec<Row>,
}

impl Bench {
    fn new(saver: Saver, sizes: Sizes) -> Result<Bench> {
        let platform = Arc::clone(saver.platform());
        let device = platform.device(0)?;
        Ok(Bench {
            bare: Bare::open(platform.kind(), platform.device_count())?,
            device,
            allocations: Vec::new(),
            block: HostMemory::new(1)?,
            rows: Vec::new(),
            saver,
            sizes,
        })
    }

    fn measure(mut self, name: &str, what: What) -> Result<Vec<Row>> {
        let Sizes { count, bytes, .. } = self.sizes;
        let region = Region::new(TAG);
        let pinned = region.clone().with_backup("pinned");
        match what {
            What::Pinned => {
                self.allocate(&pinned, count, bytes, 1)?;
                self.first_and_again(name)?;
            }
            What::Prewarmed => {
                self.allocate(&pinned, count, bytes, 1)?;
                self.prewarm()?;
                self.first_and_again(name)?;
            }
            What::Retained(compared) => {
                self.allocate(&pinned.with_retain(true), count, bytes, 1)?;
                self.retained(name, compared)?;
            }
            What::Nothing => {
                self.allocate(&region, count, bytes, 1)?;
                self.without_backup(name)?;
            }
            What::NothingLarge => {
                let large = (count / 16).max(1);
                self.allocate(&region, large, self.sizes.total() / large as u64, 1)?;
                self.without_backup(name)?;
            }
            What::Mmap => {
                self.allocate(&region.with_backup("mmap"), count, bytes, 1)?;
                self.again(name, "")?;
            }
            What::File => {
                let folder = self.sizes.file.clone().ok_or("--file is missing")?;
                let region = region.with_backup("file").with_directory(&folder);
                self.allocate(&region, count, bytes, 1)?;
                self.again(name, "")?;
            }
            What::Together => {
                self.allocate(&pinned, count, bytes, self.sizes.devices)?;
                self.first_and_again(name)?;
            }
            What::Ordered => {
                self.allocate(&pinned, count, bytes, 1)?;
                self.ordered(name)?;
            }
        }
        for allocation in std::mem::take(&mut self.allocations) {
            self.saver.free(allocation.address)?;
        }
        Ok(self.rows)
    }

    /// Allocates on the first `devices` devices, and fills every allocation with other bytes.
    fn allocate(&mut self, region: &Region, count: usize, bytes: u64, devices: u32) -> Result<()> {
        let bytes = bytes as usize;
        self.block = HostMemory::new(bytes + 2 * count * SHIFT)?;
        let all = self.block.bytes().len();
        self.block.randomize(all, 11);
        for device in 0..devices {
            for number in 0..count {
                let address = self.saver.malloc(bytes as u64, Some(device), region)?;
                self.allocations.push(Allocation {
                    device,
                    address,
                    bytes,
                    content: number * SHIFT,
                });
            }
        }
        self.fill()
    }

    fn fill(&self) -> Result<()> {
        for allocation in &self.allocations {
            let source = self.block.address() + allocation.content as u64;
            // SAFETY: the allocation is active and as long as the part of the block.
            unsafe {
                self.bare.copy(
                    allocation.device,
                    allocation.address,
                    source,
                    allocation.bytes,
                )
            }?;
        }
        Ok(())
    }

    /// Gives every allocation bytes that it never had.
    fn change(&mut self) -> Result<()> {
        let shift = self.allocations.len() * SHIFT;
        for allocation in &mut self.allocations {
            allocation.content = if allocation.content < shift {
                allocation.content + shift
            } else {
                allocation.content - shift
            };
        }
        self.fill()
    }

    /// Whether the allocations hold their bytes.
    fn right(&self, allocations: &[Allocation]) -> Result<bool> {
        let longest = allocations.iter().map(|allocation| allocation.bytes).max();
        let found = HostMemory::new(longest.unwrap_or(0))?;
        for allocation in allocations {
            let Allocation { bytes, content, .. } = *allocation;
            // SAFETY: the allocation is active, the memory as long, and nobody else has it.
            unsafe {
                self.bare.copy(
                    allocation.device,
                    found.address(),
                    allocation.address,
                    bytes,
                )
            }?;
            if found.bytes()[..bytes] != self.block.bytes()[content..content + bytes] {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn total(&self) -> u64 {
        self.allocations
            .iter()
            .map(|allocation| allocation.bytes as u64)
            .sum()
    }

    fn row(&mut self, name: String, seconds: f64) -> &mut Row {
        let mut row = Row::new(name, self.total(), seconds);
        row.pieces = Some(self.allocations.len() as u64);
        let last = self.rows.len();
        self.rows.push(row);
        &mut self.rows[last]
    }

    /// Compares the bytes, then measures the ceilings, which write over them, and puts both into
    /// the rows.
    fn conclude(&mut self) -> Result<()> {
        let right = self.right(&self.allocations)?;
        let ceilings = [self.ceiling(Way::ToHost)?, self.ceiling(Way::ToDevice)?];
        for row in &mut self.rows {
            row.right = row.right.or(Some(right));
            if row.timed {
                continue;
            }
            let resumes = row.name.contains("resume");
            row.ceiling = Some(ceilings[usize::from(resumes)].clone());
        }
        Ok(())
    }

    /// The same bytes between the allocations and pinned memory, without the library: one stream
    /// for each device, all at once.
    fn ceiling(&self, way: Way) -> Result<Other> {
        let longest = self.allocations.iter().map(|allocation| allocation.bytes);
        let longest = longest.max().unwrap_or(1);
        let most = self.allocations.len().max(1);
        // Several devices together are fast enough to find a small place in the processor's cache.
        let piece = match self.devices() {
            1 => CEILING_PIECE,
            _ => 4 * CEILING_PIECE,
        };
        let room = longest * (piece / longest).clamp(1, most);
        let mut lanes = Vec::new();
        for device in 0..self.devices() {
            let mut memory = HostMemory::new(room)?;
            memory.randomize(room, 23);
            lanes.push((self.bare.lane(device)?, memory.pin(&self.device)?));
        }
        let mut times = Vec::new();
        for _ in 0..4 {
            let started = Instant::now();
            for (number, allocation) in self.in_turns().into_iter().enumerate() {
                let (lane, memory) = &lanes[allocation.device as usize];
                let place = number / lanes.len() * longest % (room - longest + 1);
                let host = memory.address() + place as u64;
                let (to, from) = match way {
                    Way::ToHost => (host, allocation.address),
                    Way::ToDevice => (allocation.address, host),
                };
                lane.enter()?;
                // SAFETY: the allocation is active, `longest` bytes of host memory follow `place`,
                // and all lanes are waited for.
                unsafe { lane.copy(to, from, allocation.bytes) }?;
            }
            for (lane, _) in &lanes {
                lane.enter()?;
                lane.synchronize()?;
            }
            times.push(started.elapsed().as_secs_f64());
        }
        // The first one warmed up.
        let (_, queued) = self.bare.names();
        Ok(Other::new(queued, median(times.split_off(1))))
    }

    fn devices(&self) -> u32 {
        let devices = self.allocations.iter().map(|allocation| allocation.device);
        devices.max().unwrap_or(0) + 1
    }

    /// The allocations, one of each device in turn.
    fn in_turns(&self) -> Vec<Allocation> {
        let mut allocations = self.allocations.clone();
        allocations.sort_by_key(|allocation| (allocation.content, allocation.device));
        allocations
    }

    fn pause(&self) -> Result<f64> {
        let started = Instant::now();
        let outcome = self.saver.pause(&PauseOptions::tags([TAG]));
        finished(outcome, started)
    }

    fn resume(&self) -> Result<f64> {
        thread::sleep(self.sizes.idle);
        self.resume_at_once()
    }

    fn resume_at_once(&self) -> Result<f64> {
        let started = Instant::now();
        let outcome = self.saver.resume(&ResumeOptions::tags([TAG]));
        finished(outcome, started)
    }

    /// Medians of several cycles.
    fn cycles(&self) -> Result<[f64; 2]> {
        let (mut pauses, mut resumes) = (Vec::new(), Vec::new());
        for _ in 0..self.sizes.repeat {
            thread::sleep(self.sizes.idle);
            pauses.push(self.pause()?);
            resumes.push(self.resume()?);
        }
        Ok([median(pauses), median(resumes)])
    }

    fn first_and_again(&mut self, name: &str) -> Result<()> {
        let seconds = self.pause()?;
        self.row(format!("{name}, first pause"), seconds);
        let seconds = self.resume()?;
        self.row(format!("{name}, first resume"), seconds);
        self.again(name, " again")
    }

    fn again(&mut self, name: &str, again: &str) -> Result<()> {
        let [pause, resume] = self.cycles()?;
        self.row(format!("{name}, pause{again}"), pause);
        self.row(format!("{name}, resume{again}"), resume);
        self.conclude()
    }

    /// These rows are times, of driver calls alone.
    fn without_backup(&mut self, name: &str) -> Result<()> {
        let (pause, resume) = (self.pause()?, self.resume_at_once()?);
        let (mut pauses, mut resumes) = (Vec::new(), Vec::new());
        for _ in 0..self.sizes.repeat {
            pauses.push(self.pause()?);
            resumes.push(self.resume_at_once()?);
        }
        // A device that had nothing to do answers its first calls more slowly.
        let rested = self.cycles()?;
        for (part, seconds) in [
            ("first pause", pause),
            ("first resume", resume),
            ("pause again", median(pauses)),
            ("resume again", median(resumes)),
            ("pause after a rest", rested[0]),
            ("resume after a rest", rested[1]),
        ] {
            self.row(format!("{name}, {part}"), seconds).timed = true;
        }
        Ok(())
    }

    fn retained(&mut self, name: &str, compared: bool) -> Result<()> {
        let options = PauseOptions::tags([TAG]).with_copy_all(!compared);
        let pause = |bench: &Bench| -> Result<f64> {
            let started = Instant::now();
            finished(bench.saver.pause(&options), started)
        };
        // Makes the backups, and the fingerprints of them.
        pause(self)?;
        self.resume()?;
        let (mut pauses, mut resumes) = (Vec::new(), Vec::new());
        for _ in 0..self.sizes.repeat {
            pauses.push(pause(self)?);
            resumes.push(self.resume()?);
        }
        self.row(format!("{name}, unchanged, pause"), median(pauses));
        self.row(format!("{name}, resume"), median(resumes));
        let mut pauses = Vec::new();
        for _ in 0..self.sizes.repeat {
            self.change()?;
            pauses.push(pause(self)?);
            self.resume()?;
        }
        self.row(format!("{name}, changed, pause"), median(pauses));
        self.conclude()
    }

    /// Makes pinned memory ready before the first pause, as a host does while it loads a model.
    fn prewarm(&mut self) -> Result<()> {
        let mut saver = ptr::null();
        // SAFETY: `saver` is writable.
        checked(unsafe { ffi::tms_saver_default(&mut saver) })?;
        let started = Instant::now();
        // SAFETY: a live handle.
        checked(unsafe { ffi::tms_saver_prewarm(saver, 0, self.total()) })?;
        let seconds = started.elapsed().as_secs_f64();
        self.row("prewarmed, prewarm".into(), seconds).timed = true;
        Ok(())
    }

    /// How soon the first part, a tenth of all and at most 1 GiB, can be used.
    fn ordered(&mut self, name: &str) -> Result<()> {
        let part = (self.total() / 10).min(1 << 30);
        let mut first = 0;
        let mut bytes = 0;
        while bytes < part {
            bytes += self.allocations[first].bytes as u64;
            first += 1;
        }
        let lane = self.bare.lane(0)?;
        lane.enter()?;
        let order: Vec<_> = self.allocations.iter().map(|one| one.address).collect();
        let (mut parts, mut alls, mut right) = (Vec::new(), Vec::new(), true);
        for _ in 0..=self.sizes.repeat {
            self.pause()?;
            thread::sleep(self.sizes.idle);
            let started = Instant::now();
            let options = ResumeOptions::all();
            let resume = self.saver.resume_ordered_async(&order, &options)?;
            for &address in &order[..first] {
                resume.stream_wait(address, lane.handle() as u64)?;
            }
            lane.synchronize()?;
            parts.push(started.elapsed().as_secs_f64());
            let outcome = resume.wait(None).ok_or("the ordered resume has no end")?;
            alls.push(finished(outcome, started)?);
            right &= self.right(&self.allocations)?;
        }
        // The first one warmed up.
        let row = self.row(format!("{name}, first part"), median(parts.split_off(1)));
        row.bytes = bytes;
        row.pieces = Some(first as u64);
        row.timed = true;
        self.row(format!("{name}, whole resume"), median(alls.split_off(1)));
        let part = self.allocations[..first].to_vec();
        let all = std::mem::replace(&mut self.allocations, part);
        let ceiling = self.ceiling(Way::ToDevice)?;
        self.allocations = all;
        self.rows[0].ceiling = Some(ceiling);
        self.rows[1].ceiling = Some(self.ceiling(Way::ToDevice)?);
        for row in &mut self.rows {
            row.right = Some(right);
        }
        Ok(())
    }
}

/// Seconds since `started`, if the operation did all that it should.
fn finished(outcome: Outcome, started: Instant) -> Result<f64> {
    let seconds = started.elapsed().as_secs_f64();
    outcome.status?;
    Ok(seconds)
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}
