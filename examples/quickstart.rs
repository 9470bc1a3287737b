//! A model's weights leave device memory and come back byte for byte.
//!
//! `cargo run --release --example quickstart [-- MODEL.safetensors]`; `--help` lists the options.
//! Needs no GPU: without one, this machine's memory plays the device.

mod support;

use std::error::Error;
use std::fs::File;
use std::io::Read;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use tms_memcache::device::{self, DeviceInfo, DeviceKind};
use tms_memcache::{Op, Outcome, PauseOptions, Region, ResumeOptions, Saver, Summary};
use xxhash_rust::xxh3::Xxh3Default;

use support::human;
use support::model;
use support::safetensors::{self, Tensor};

type Result<T, E = Box<dyn Error>> = std::result::Result<T, E>;

const HELP: &str = "\
Puts a model's weights into device memory, pauses them, resumes them and compares every tensor.

Usage: cargo run --release --example quickstart -- [OPTIONS] [MODEL.safetensors]

Without MODEL.safetensors a model of random bytes is made and removed afterwards.

Options:
  --size SIZE      size of the model to make, such as 512M or 2G [default: 1G]
  --keep PATH      keep the made model at PATH
  --backup KIND    where the weights wait while paused: pinned, mmap, file or none
                   (none: they are discarded, and loaded again afterwards) [default: pinned]
  --json           print the result as JSON
  -h, --help       print this

TMS_DEVICE=auto|cuda|host chooses the device.";

/// Bytes that are read from the file or the device at a time.
const CHUNK: usize = 16 << 20;

const TAG: &str = "weights";

/// How often the progress bar moves.
const TICK: Duration = Duration::from_millis(40);

fn main() -> ExitCode {
    // A program that prints into a pipe ends quietly when nobody reads any more.
    // SAFETY: restores the default of a signal before any thread runs.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
    match Arguments::parse().and_then(|arguments| arguments.map_or(Ok(()), run)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("quickstart: {error}");
            ExitCode::FAILURE
        }
    }
}

struct Arguments {
    model: Option<PathBuf>,
    size: u64,
    keep: Option<PathBuf>,
    backup: String,
    json: bool,
}

impl Arguments {
    /// `None` after the help was printed.
    fn parse() -> Result<Option<Self>> {
        use lexopt::prelude::*;

        let mut arguments = Arguments {
            model: None,
            size: 1 << 30,
            keep: None,
            backup: "pinned".to_owned(),
            json: false,
        };
        let mut made = false;
        let mut parser = lexopt::Parser::from_env();
        while let Some(argument) = parser.next()? {
            match argument {
                Long("size") => {
                    let size = parser.value()?.string()?;
                    arguments.size =
                        human::parse_size(&size).map_err(|why| format!("--size: {why}"))?;
                    made = true;
                }
                Long("keep") => {
                    arguments.keep = Some(parser.value()?.into());
                    made = true;
                }
                Long("backup") => {
                    let backup = parser.value()?.string()?;
                    if !["pinned", "mmap", "file", "none"].contains(&&*backup) {
                        return Err(format!(
                            "--backup {backup}: choose pinned, mmap, file or none"
                        )
                        .into());
                    }
                    arguments.backup = backup;
                }
                Long("json") => arguments.json = true,
                Short('h') | Long("help") => {
                    println!("{HELP}");
                    return Ok(None);
                }
                Value(path) if arguments.model.is_none() => arguments.model = Some(path.into()),
                other => return Err(other.unexpected().into()),
            }
        }
        if made && arguments.model.is_some() {
            return Err(
                "--size and --keep are for a made model; leave out MODEL.safetensors".into(),
            );
        }
        Ok(Some(arguments))
    }
}

fn run(arguments: Arguments) -> Result<()> {
    let platform = device::open_from_environment()?;
    let ordinal = platform.current_device();
    let device = platform.device(ordinal)?;
    let info = device.info().clone();
    let free = device.memory()?.free;
    if arguments.model.is_none() && arguments.size > free {
        return Err(too_large("the model to make", arguments.size, &info, free));
    }

    let mut model = Model::open(&arguments)?;
    let bytes = model.bytes();
    let granule = info.granularity;
    let sizes = model.tensors.iter().map(|tensor| tensor.bytes);
    let needed = sizes.map(|bytes| bytes.next_multiple_of(granule)).sum();
    if needed > free {
        return Err(too_large(&model.name, needed, &info, free));
    }
    let memory = || -> Result<Memory> {
        let used = device.memory()?;
        Ok(Memory {
            device: used.total - used.free,
            process: resident_bytes()?,
        })
    };

    let saver = Saver::new(platform.clone())?;
    let region = Region::new(TAG).with_backup(&arguments.backup);
    let mut report = Report::new(&arguments, &model, &info, memory()?);

    let started = Instant::now();
    let bar = progress_bar("load", bytes);
    let mut weights = Vec::with_capacity(model.tensors.len());
    for tensor in model.tensors.clone() {
        let address = match tensor.bytes {
            0 => 0,
            bytes => saver.malloc(bytes, Some(ordinal), &region)?,
        };
        let hash = model.load(&tensor, &saver, address, &bar)?;
        weights.push(Weight {
            tensor,
            address,
            hash,
        });
    }
    bar.finish_and_clear();
    report.step("load", bytes, started.elapsed(), memory()?);

    let keeps = arguments.backup != "none";
    let started = Instant::now();
    let outcome = watch("pause", &saver.pause_async(&PauseOptions::tags([TAG]))?);
    let elapsed = started.elapsed();
    check_outcome("pause", &outcome)?;
    report.moved("pause", &outcome.summary, elapsed, memory()?);

    let started = Instant::now();
    let outcome = watch("resume", &saver.resume_async(&ResumeOptions::tags([TAG]))?);
    let elapsed = started.elapsed();
    check_outcome("resume", &outcome)?;
    report.moved("resume", &outcome.summary, elapsed, memory()?);

    if !keeps {
        expect_other_contents(&weights, &saver)?;
        let started = Instant::now();
        let bar = progress_bar("load again", bytes);
        for weight in &weights {
            model.load(&weight.tensor, &saver, weight.address, &bar)?;
        }
        bar.finish_and_clear();
        report.step("load again", bytes, started.elapsed(), memory()?);
    }

    let started = Instant::now();
    compare(&weights, &saver, bytes)?;
    report.step("compare", bytes, started.elapsed(), memory()?);

    for weight in &weights {
        if weight.address != 0 {
            saver.free(weight.address)?;
        }
    }
    report.print(keeps, memory()?);
    Ok(())
}

fn too_large(what: &str, bytes: u64, device: &DeviceInfo, free: u64) -> Box<dyn Error> {
    format!(
        "{what} needs {bytes} bytes of device memory, but {} {} ({}) has {free} free",
        device.kind, device.ordinal, device.name
    )
    .into()
}

/// A model file and what its header says.
struct Model {
    file: File,
    name: String,
    made: bool,
    tensors: Vec<Tensor>,
    chunk: Vec<u8>,
}

/// A tensor that was loaded.
struct Weight {
    tensor: Tensor,
    /// 0 for a tensor without bytes.
    address: u64,
    hash: u64,
}

impl Model {
    fn open(arguments: &Arguments) -> Result<Self> {
        let (mut file, name) = match &arguments.model {
            Some(path) => {
                let name = path.display().to_string();
                let file = File::open(path).map_err(|error| format!("{name}: {error}"))?;
                if !file.metadata()?.is_file() {
                    return Err(format!("{name}: not a file").into());
                }
                (file, name)
            }
            None => make(arguments)?,
        };
        let tensors = safetensors::read_header(&mut file, &name)?;
        Ok(Model {
            file,
            name,
            made: arguments.model.is_none(),
            tensors,
            chunk: vec![0; CHUNK],
        })
    }

    fn bytes(&self) -> u64 {
        self.tensors.iter().map(|tensor| tensor.bytes).sum()
    }

    /// Copies a tensor from the file to `address`, and returns the hash of what was read.
    fn load(
        &mut self,
        tensor: &Tensor,
        saver: &Saver,
        address: u64,
        bar: &ProgressBar,
    ) -> Result<u64> {
        use std::os::unix::fs::FileExt;

        let mut hasher = Xxh3Default::new();
        let mut done = 0;
        while done < tensor.bytes {
            let length = (tensor.bytes - done).min(CHUNK as u64) as usize;
            let chunk = &mut self.chunk[..length];
            self.file
                .read_exact_at(chunk, tensor.offset + done)
                .map_err(|error| {
                    format!(
                        "{}: tensor \"{}\": reading {length} bytes at byte {} of the file: {error}",
                        self.name,
                        tensor.name,
                        tensor.offset + done
                    )
                })?;
            hasher.update(chunk);
            saver.write(address + done, chunk)?;
            done += length as u64;
            bar.inc(length as u64);
        }
        Ok(hasher.digest())
    }
}

/// Makes a model of random bytes. Without `--keep` its name is removed at once, so that nothing
/// is left behind however this program ends.
fn make(arguments: &Arguments) -> Result<(File, String)> {
    let path = match &arguments.keep {
        Some(path) => path.clone(),
        None => {
            let name = format!("tms-quickstart-{}.safetensors", std::process::id());
            std::env::temp_dir().join(name)
        }
    };
    let name = path.display().to_string();
    let wrong = |error: std::io::Error| format!("{name}: {error}");
    let mut file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)
        .map_err(wrong)?;
    if arguments.keep.is_none() {
        std::fs::remove_file(&path).map_err(wrong)?;
    }
    let bar = ProgressBar::new_spinner();
    bar.set_style(style("{spinner} {msg}"));
    bar.set_message(format!(
        "making a model of {} at {name}",
        human::bytes(arguments.size)
    ));
    bar.enable_steady_tick(TICK);
    let written = model::write(&mut file, arguments.size);
    bar.finish_and_clear();
    if let (Err(_), Some(path)) = (&written, &arguments.keep) {
        // Half a model is of no use; the error that counts is the one of the writing.
        let _ = std::fs::remove_file(path);
    }
    written.map_err(|error| {
        format!(
            "{name}: writing a model of {} bytes: {error}; choose another --size, or another folder \
             by TMPDIR or --keep",
            arguments.size
        )
    })?;
    Ok((file, name))
}

/// Shows the progress of an operation until it ends.
fn watch(what: &'static str, operation: &Op) -> Outcome {
    let bar = progress_bar(what, 0);
    loop {
        let outcome = operation.wait(Some(TICK));
        let (done, total) = operation.progress();
        bar.set_length(total);
        bar.set_position(done);
        if let Some(outcome) = outcome {
            bar.finish_and_clear();
            return outcome;
        }
    }
}

fn check_outcome(what: &str, outcome: &Outcome) -> Result<()> {
    for failure in &outcome.summary.failures {
        eprintln!(
            "{what}: {} bytes at {:#x}: {}",
            failure.bytes, failure.address, failure.error
        );
    }
    if let Err(error) = &outcome.status {
        return Err(format!("{what}: {error}").into());
    }
    Ok(())
}

/// Reads every tensor back from the device and compares its hash with that of the file.
fn compare(weights: &[Weight], saver: &Saver, bytes: u64) -> Result<()> {
    let bar = progress_bar("compare", bytes);
    let mut different = Vec::new();
    for weight in weights {
        if read_back(weight, saver, &bar)?.hash != weight.hash {
            different.push(&*weight.tensor.name);
        }
    }
    bar.finish_and_clear();
    match different.as_slice() {
        [] => Ok(()),
        [first, ..] => Err(format!(
            "{} of {} tensors came back with other bytes; the first is \"{first}\"",
            different.len(),
            weights.len()
        )
        .into()),
    }
}

/// Fails if anything that was not kept is there again. A tensor of zeros proves nothing, because
/// fresh memory may be zero.
fn expect_other_contents(weights: &[Weight], saver: &Saver) -> Result<()> {
    let hidden = ProgressBar::hidden();
    for weight in weights {
        let found = read_back(weight, saver, &hidden)?;
        if found.hash == weight.hash && !found.zero {
            return Err(format!(
                "tensor \"{}\" was not kept, and yet its bytes are there",
                weight.tensor.name
            )
            .into());
        }
    }
    Ok(())
}

struct Contents {
    hash: u64,
    zero: bool,
}

fn read_back(weight: &Weight, saver: &Saver, bar: &ProgressBar) -> Result<Contents> {
    let mut chunk = vec![0; CHUNK.min(weight.tensor.bytes as usize)];
    let mut hasher = Xxh3Default::new();
    let mut zero = true;
    let mut done = 0;
    while done < weight.tensor.bytes {
        let length = (weight.tensor.bytes - done).min(CHUNK as u64) as usize;
        let chunk = &mut chunk[..length];
        saver.read(weight.address + done, chunk)?;
        hasher.update(chunk);
        zero = zero && chunk.iter().all(|byte| *byte == 0);
        done += length as u64;
        bar.inc(length as u64);
    }
    Ok(Contents {
        hash: hasher.digest(),
        zero,
    })
}

fn progress_bar(what: &'static str, bytes: u64) -> ProgressBar {
    let bar = ProgressBar::new(bytes);
    bar.set_style(style(
        "{msg:10} [{bar:40}] {bytes}/{total_bytes}  {bytes_per_sec}",
    ));
    bar.set_message(what);
    bar
}

fn style(template: &str) -> ProgressStyle {
    // A wrong template would be a slip in this file; the plain bar is then good enough.
    ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=> ")
}

/// What is in use.
#[derive(Clone, Copy)]
struct Memory {
    /// Of the device, by all processes, bytes.
    device: u64,
    /// Resident memory of this process, bytes.
    process: u64,
}

fn resident_bytes() -> Result<u64> {
    let mut status = String::new();
    File::open("/proc/self/status")?.read_to_string(&mut status)?;
    let kilobytes = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .and_then(|rest| rest.trim().strip_suffix(" kB"))
        .and_then(|number| number.trim().parse::<u64>().ok())
        .ok_or("/proc/self/status has no VmRSS line")?;
    Ok(kilobytes * 1024)
}

struct Step {
    name: &'static str,
    bytes: u64,
    seconds: f64,
    /// Of the copy, gigabytes per second; `None` where nothing was copied.
    rate: Option<f64>,
    after: Memory,
}

struct Report {
    json: bool,
    device: DeviceInfo,
    backup: String,
    model: String,
    made: bool,
    tensors: usize,
    bytes: u64,
    before: Memory,
    steps: Vec<Step>,
}

impl Report {
    fn new(arguments: &Arguments, model: &Model, device: &DeviceInfo, before: Memory) -> Self {
        let report = Report {
            json: arguments.json,
            device: device.clone(),
            backup: arguments.backup.clone(),
            model: model.name.clone(),
            made: model.made,
            tensors: model.tensors.len(),
            bytes: model.bytes(),
            before,
            steps: Vec::new(),
        };
        if !report.json {
            report.print_head();
        }
        report
    }

    fn print_head(&self) {
        let device = &self.device;
        let driver = match device.driver_version {
            0 => String::new(),
            version => format!(
                ", driver for CUDA {}.{}",
                version / 1000,
                version % 1000 / 10
            ),
        };
        println!(
            "device   {} {}: {}{driver}",
            device.kind, device.ordinal, device.name
        );
        let origin = if self.made { ", random bytes" } else { "" };
        println!(
            "model    {}: {} in {} tensors{origin}",
            self.model,
            human::bytes(self.bytes),
            self.tensors
        );
        match self.backup.as_str() {
            "none" => println!("backup   none: the contents are not kept while paused"),
            backup => println!("backup   {backup}"),
        }
        println!();
        println!(
            "{:<12}{:>12}{:>10}{:>8}{:>16}{:>17}",
            "", "bytes", "seconds", "GB/s", "device memory", "process memory"
        );
        print_row("before", None, self.before);
    }

    /// A step that copied `bytes`.
    fn step(&mut self, name: &'static str, bytes: u64, elapsed: Duration, after: Memory) {
        let rate = human::rate(bytes, elapsed.as_secs_f64());
        self.push(name, bytes, elapsed, rate, after);
    }

    /// A pause or resume, which copies nothing where no contents are kept.
    fn moved(&mut self, name: &'static str, done: &Summary, elapsed: Duration, after: Memory) {
        let rate = human::rate(done.copied_bytes, elapsed.as_secs_f64());
        let rate = rate.filter(|_| done.copied_bytes > 0);
        self.push(name, done.done_bytes, elapsed, rate, after);
    }

    fn push(
        &mut self,
        name: &'static str,
        bytes: u64,
        elapsed: Duration,
        rate: Option<f64>,
        after: Memory,
    ) {
        let seconds = elapsed.as_secs_f64();
        let step = Step {
            name,
            bytes,
            seconds,
            rate,
            after,
        };
        if !self.json {
            print_row(name, Some(&step), after);
        }
        self.steps.push(step);
    }

    fn print(&self, kept: bool, after: Memory) {
        if self.json {
            println!("{:#}", self.as_json(kept, after));
            return;
        }
        print_row("freed", None, after);
        println!();
        let count = self.tensors;
        if kept {
            println!("All {count} tensors came back byte for byte.");
        } else {
            println!(
                "The contents were not kept: after the resume the same addresses held other bytes. \
                 Loaded\nagain, all {count} tensors are as in the file."
            );
        }
        if self.device.kind == DeviceKind::Host {
            println!(
                "Without a GPU, device and backup are both memory of this machine; pinned memory is kept \
                 for the\nnext pause (TMS_PINNED_KEEP). --backup file shows memory that leaves the machine's."
            );
        }
    }

    fn as_json(&self, kept: bool, after: Memory) -> serde_json::Value {
        let memory = |memory: Memory| json!({"device_bytes": memory.device, "process_bytes": memory.process});
        let steps: Vec<_> = self
            .steps
            .iter()
            .map(|step| {
                json!({
                    "step": step.name,
                    "bytes": step.bytes,
                    "seconds": step.seconds,
                    "gb_per_second": step.rate,
                    "memory_after": memory(step.after),
                })
            })
            .collect();
        json!({
            "device": {
                "kind": self.device.kind.to_string(),
                "ordinal": self.device.ordinal,
                "name": self.device.name,
                "driver_version": self.device.driver_version,
            },
            "model": {
                "path": self.model,
                "made": self.made,
                "tensors": self.tensors,
                "bytes": self.bytes,
            },
            "backup": self.backup,
            "contents_kept": kept,
            "memory_before": memory(self.before),
            "steps": steps,
            "memory_freed": memory(after),
            "verified_tensors": self.tensors,
        })
    }
}

fn print_row(name: &str, step: Option<&Step>, memory: Memory) {
    let (bytes, seconds, rate) = match step {
        Some(step) => (
            human::bytes(step.bytes),
            format!("{:.3}", step.seconds),
            step.rate.map_or(String::new(), |rate| format!("{rate:.1}")),
        ),
        None => Default::default(),
    };
    println!(
        "{name:<12}{bytes:>12}{seconds:>10}{rate:>8}{:>16}{:>17}",
        human::bytes(memory.device),
        human::bytes(memory.process)
    );
}
