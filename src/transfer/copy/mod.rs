//! Explicit copies between any two places: device memory, pinned and pageable host memory.
//!
//! A [`Copier`] finds out what memory the addresses are (`ranges`), sorts the pieces by their way
//! (`plan`), and has each group queued on a stream (`lane`, by the method of `table`, measured by
//! `measure`) or moved through staging memory by threads (`staged`). `run` is one copy at work.
//!
//! Pieces are planned and queued in steps, so that the bus is busy while the rest is looked at.

mod lane;
mod lists;
mod measure;
mod plan;
mod ranges;
mod run;
mod staged;
mod table;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::device::{Direction, MemoryRange, Piece, Pitched};
use crate::error::{Error, Result};
use crate::op::{Control, Ended, Op, Service};
use crate::process;
use crate::transfer::Engine;

use plan::{Group, Planner, Route};
use ranges::Care;
use run::{HostStream, Run};

pub use table::{Method, Table};

/// Pieces that are looked at before the first are queued; each further step is twice as large.
const FIRST_STEP: usize = 512;
const LAST_STEP: usize = lists::PIECES;

/// Which way the caller says that the copy goes. Managed memory may be on either side of any.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// As the pointers say.
    Any,
    /// From host memory to memory of a device.
    ToDevice,
    /// From memory of a device to host memory.
    ToHost,
    /// From memory of a device to memory of the same or another one.
    OnDevice,
}

/// What the copies of one engine share.
#[derive(Default)]
pub(super) struct State {
    tables: measure::Tables,
    lists: lists::Lists,
    service: Service,
}

impl State {
    /// Before the engine goes: waits for what the devices may still use.
    pub fn settle(&self) {
        self.tables.settle();
        self.lists.settle();
    }

    /// Whether a copy runs or waits on the thread of operations.
    pub fn busy(&self) -> bool {
        self.service.busy()
    }
}

/// The first byte of a call that is not certain to be in place, lowered by whoever fails.
struct Floor(AtomicU64);

impl Default for Floor {
    fn default() -> Floor {
        Floor(AtomicU64::new(u64::MAX))
    }
}

impl Floor {
    fn lower(&self, at: u64) {
        self.0.fetch_min(at, Ordering::AcqRel);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }
}

/// Copies by an engine. Cheap to clone; may be used by many threads at once.
///
/// The source and the destination of a piece must not overlap. Pieces of one call may be copied in
/// any order and at the same time, so the contents are not defined where a destination overlaps
/// another piece. What an [`Ended`] counts is certain: the first so many bytes of the concatenation
/// of all pieces are in place, whether the copy succeeded or not.
#[derive(Clone)]
pub struct Copier {
    engine: Arc<Engine>,
    devices: Option<Arc<[u32]>>,
}

impl Copier {
    pub fn new(engine: Arc<Engine>) -> Copier {
        Copier {
            engine,
            devices: None,
        }
    }

    /// Refuses memory of other devices.
    pub fn with_devices(self, devices: &[u32]) -> Copier {
        Copier {
            devices: Some(devices.into()),
            ..self
        }
    }

    pub fn engine(&self) -> &Arc<Engine> {
        &self.engine
    }

    /// What kind of memory an address is.
    pub fn query(&self, address: u64) -> Result<MemoryRange> {
        process::check()?;
        self.engine.platform().classify(address)
    }

    /// Copies all pieces and waits. Work that other streams have queued on the memory is not waited
    /// for.
    ///
    /// # Safety
    /// Host memory among the pieces is valid for its size, and nobody else uses it in a way that
    /// the copy would disturb.
    pub unsafe fn copy(&self, pieces: &[Piece], way: Way) -> Ended {
        // SAFETY: by this function's contract.
        unsafe { self.controlled(pieces, way, &Arc::default()) }
    }

    /// Copies all pieces in the order of a stream of the host (a `CUstream`, 0 for the legacy
    /// stream), after what was queued there and before what will be.
    ///
    /// Pinned and device memory is copied when the stream gets there. When this returns, pageable
    /// sources were read, and bytes for pageable destinations are there.
    ///
    /// The stream is one of the calling thread's current device, or of a device of the memory if the
    /// current one does not take part. While it is being captured, pageable memory is refused.
    ///
    /// # Safety
    /// As for [`Self::copy`], for pinned and device memory until the stream has passed.
    pub unsafe fn copy_on_stream(&self, pieces: &[Piece], way: Way, stream: u64) -> Result<()> {
        let job = Job {
            copier: self,
            way,
            numbered: pieces.len() > 1,
            stream: Some(stream),
        };
        // SAFETY: by this function's contract.
        unsafe { job.perform(pieces.iter().copied(), &Arc::default()) }.status
    }

    /// Copies on a thread of the library, as [`Self::copy`] does.
    ///
    /// # Safety
    /// As for [`Self::copy`], until the operation has ended.
    pub unsafe fn copy_async(&self, pieces: Vec<Piece>, way: Way) -> Result<Op<Ended>> {
        let copier = self.clone();
        self.engine.copies.service.submit(move |control| {
            // SAFETY: by this function's contract.
            Some(unsafe { copier.controlled(&pieces, way, control) })
        })
    }

    /// # Safety
    /// As for [`Self::copy`].
    unsafe fn controlled(&self, pieces: &[Piece], way: Way, control: &Arc<Control>) -> Ended {
        let job = Job {
            copier: self,
            way,
            numbered: pieces.len() > 1,
            stream: None,
        };
        // SAFETY: by this function's contract.
        unsafe { job.perform(pieces.iter().copied(), control) }
    }

    /// Copies rows and waits. The bytes of the rows, in order, are the concatenation that counts.
    ///
    /// # Safety
    /// As for [`Self::copy`], for the rows.
    pub unsafe fn copy_2d(&self, pitched: &Pitched) -> Ended {
        // SAFETY: by this function's contract.
        unsafe { self.rows(pitched, None, &Arc::default()) }
    }

    /// Copies rows in the order of a stream of the host, see [`Self::copy_on_stream`].
    ///
    /// # Safety
    /// As for [`Self::copy_on_stream`], for the rows.
    pub unsafe fn copy_2d_on_stream(&self, pitched: &Pitched, stream: u64) -> Result<()> {
        // SAFETY: by this function's contract.
        unsafe { self.rows(pitched, Some(stream), &Arc::default()) }.status
    }

    /// Copies rows on a thread of the library.
    ///
    /// # Safety
    /// As for [`Self::copy_async`], for the rows.
    pub unsafe fn copy_2d_async(&self, pitched: &Pitched) -> Result<Op<Ended>> {
        let (copier, pitched) = (self.clone(), *pitched);
        self.engine.copies.service.submit(move |control| {
            // SAFETY: by this function's contract.
            Some(unsafe { copier.rows(&pitched, None, control) })
        })
    }

    /// # Safety
    /// As for [`Self::copy_2d`] or [`Self::copy_2d_on_stream`].
    unsafe fn rows(&self, pitched: &Pitched, stream: Option<u64>, control: &Arc<Control>) -> Ended {
        let job = Job {
            copier: self,
            way: Way::Any,
            numbered: false,
            stream,
        };
        // SAFETY: by this function's contract.
        unsafe { job.perform_rows(pitched, control) }
    }

    /// The transfer table of a device as text, one line for each direction and size class; measured
    /// now if it was not yet.
    pub fn table(&self, device: u32) -> Result<String> {
        let _running = process::Running::start()?;
        let device = self.engine.platform().device(device)?;
        let table = self.engine.copies.tables.measured(&self.engine, &device)?;
        Ok(table.text())
    }

    /// Chooses methods, see [`Table::set`].
    pub fn set_table(&self, device: u32, text: &str) -> Result<()> {
        process::check()?;
        let device = self.engine.platform().device(device)?;
        self.engine.copies.tables.set(&device, text)
    }
}

/// What a call says about itself.
struct Job<'a> {
    copier: &'a Copier,
    way: Way,
    /// The pieces have numbers, by which errors name them.
    numbered: bool,
    stream: Option<u64>,
}

impl Job<'_> {
    /// # Safety
    /// As for the function of [`Copier`] that the job is for.
    unsafe fn perform(
        &self,
        pieces: impl ExactSizeIterator<Item = Piece> + Clone,
        control: &Arc<Control>,
    ) -> Ended {
        let _running = match process::Running::start() {
            Ok(running) => running,
            Err(error) => return failed(error),
        };
        let total = pieces
            .clone()
            .fold(0u64, |sum, piece| sum.saturating_add(piece.bytes));
        control.total.store(total, Ordering::Relaxed);
        let mut planner = self.planner(pieces.len() > 1);
        let mut run = None;
        // SAFETY: by this function's contract.
        let submitted = unsafe { self.submit_all(pieces, &mut planner, &mut run, control) };
        match run {
            Some(run) => run.finish(submitted, planner.at()),
            None => Ended {
                bytes: 0,
                status: submitted,
            },
        }
    }

    /// # Safety
    /// As for [`Self::perform`].
    unsafe fn submit_all(
        &self,
        pieces: impl Iterator<Item = Piece>,
        planner: &mut Planner<'_>,
        run: &mut Option<Run>,
        control: &Arc<Control>,
    ) -> Result<()> {
        let (mut step, mut waiting) = (FIRST_STEP, 0);
        for (index, piece) in pieces.enumerate() {
            if let Err(error) = planner.add(&piece) {
                // What is before the piece was not asked to be copied alone; it is not queued.
                if let Some(run) = run {
                    run.lower_to(&planner.take());
                }
                return Err(match self.numbered {
                    true => error.context(format_args!("copies[{index}]")),
                    false => error,
                });
            }
            waiting += 1;
            if waiting == step {
                // SAFETY: by this function's contract.
                unsafe { self.submit(planner.take(), run, control) }?;
                (step, waiting) = ((step * 2).min(LAST_STEP), 0);
            }
        }
        // SAFETY: as above.
        unsafe { self.submit(planner.take(), run, control) }
    }

    /// # Safety
    /// As for [`Self::perform`].
    unsafe fn submit(
        &self,
        groups: Vec<Group>,
        run: &mut Option<Run>,
        control: &Arc<Control>,
    ) -> Result<()> {
        if groups.is_empty() {
            return Ok(());
        }
        let run = match run {
            Some(run) => run,
            none => none.insert(self.begin(groups.iter().map(|group| group.route), control)?),
        };
        control.check().inspect_err(|_| run.lower_to(&groups))?;
        // SAFETY: by this function's contract.
        unsafe { run.submit(&groups) }
    }

    /// `several` pieces may be copied by a kernel, one is not.
    fn planner(&self, several: bool) -> Planner<'_> {
        let platform = &**self.copier.engine.platform();
        let care = Care {
            everywhere: several,
            by_page: self.stream.is_some(),
        };
        Planner::new(platform, care, self.copier.devices.as_deref(), self.way)
    }

    /// A run whose first groups take these routes.
    fn begin(&self, routes: impl Iterator<Item = Route>, control: &Arc<Control>) -> Result<Run> {
        let engine = &self.copier.engine;
        let host = match self.stream {
            None => None,
            Some(handle) => Some(self.host_stream(handle, routes.flat_map(Route::devices))?),
        };
        Ok(Run::new(engine, host, control))
    }

    /// The host's stream, which the driver does not tell the device of: it is of the current device,
    /// unless it can be used with a device that takes part while the current one does not.
    fn host_stream(&self, handle: u64, devices: impl Iterator<Item = u32>) -> Result<HostStream> {
        let engine = &self.copier.engine;
        let current = engine.platform().current_device();
        let devices: Vec<u32> = devices.collect();
        if let Some(first) = devices.first()
            && !devices.contains(&current)
        {
            let host = HostStream::new(engine, *first, handle)?;
            if host.fits() {
                return Ok(host);
            }
        }
        HostStream::new(engine, current, handle)
    }

    /// # Safety
    /// As for [`Self::perform`].
    unsafe fn perform_rows(&self, pitched: &Pitched, control: &Arc<Control>) -> Ended {
        if pitched.width == 0 || pitched.height == 0 {
            return Ended {
                bytes: 0,
                status: process::check(),
            };
        }
        // SAFETY: by this function's contract.
        match unsafe { self.pitched(pitched, control) } {
            Ok(Some(ended)) => return ended,
            Ok(None) => {}
            Err(error) => return failed(error),
        }
        let contiguous =
            pitched.destination_pitch == pitched.width && pitched.source_pitch == pitched.width;
        let (rows, width) = match contiguous {
            true => (1, pitched.width * pitched.height),
            false => (pitched.height, pitched.width),
        };
        let rows = (0..rows as usize).map(|row| Piece {
            destination: pitched.destination + row as u64 * pitched.destination_pitch,
            source: pitched.source + row as u64 * pitched.source_pitch,
            bytes: width,
        });
        // SAFETY: by this function's contract.
        unsafe { self.perform(rows, control) }
    }

    /// Checks the rows as a whole. Does the copy by one call of the driver where that is best.
    ///
    /// # Safety
    /// As for [`Self::perform`].
    unsafe fn pitched(&self, pitched: &Pitched, control: &Arc<Control>) -> Result<Option<Ended>> {
        let _running = process::Running::start()?;
        let (destination, source) = plan::check_layout(pitched)?;
        let total = pitched
            .width
            .checked_mul(pitched.height)
            .ok_or_else(|| Error::invalid("height", "the rows do not fit the address space"))?;
        let mut planner = self.planner(false);
        let (to, from) =
            planner.classify((pitched.destination, destination), (pitched.source, source))?;
        let route = planner.route(to.place, from.place)?;
        let (device, direction) = match route {
            Route::ToDevice {
                device,
                pageable: false,
            } => (device, Direction::ToDevice),
            Route::ToHost {
                device,
                pageable: false,
            } => (device, Direction::ToHost),
            Route::OnDevice { device } => (device, Direction::OnDevice),
            _ => return Ok(None),
        };
        let contiguous =
            pitched.destination_pitch == pitched.width && pitched.source_pitch == pitched.width;
        let whole = pitched.destination + destination <= to.limit()
            && pitched.source + source <= from.limit();
        if pitched.height == 1 || contiguous || !whole {
            return Ok(None);
        }
        control.total.store(total, Ordering::Relaxed);
        let mut run = self.begin(std::iter::once(route), control)?;
        // SAFETY: by this function's contract.
        let submitted = unsafe { run.submit_pitched(pitched, device, direction) };
        match submitted {
            Ok(false) => Ok(None),
            Ok(true) => Ok(Some(run.finish(Ok(()), total))),
            Err(error) => Ok(Some(run.finish(Err(error), 0))),
        }
    }
}

fn failed(error: Error) -> Ended {
    Ended {
        bytes: 0,
        status: Err(error),
    }
}
