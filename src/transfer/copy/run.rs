//! One copy at work: which streams it uses, what it hands to whom, and how it ends.

use std::sync::Arc;

use super::Floor;
use super::lane::Lane;
use super::plan::{Group, Item, Route};
use super::staged::{self, Work};
use super::table::Method;
use crate::device::{Device, Direction, Pitched, Stream};
use crate::error::{Error, ErrorKind, Result};
use crate::op::{Control, Ended};
use crate::transfer::{Batch, Engine, Streams};

/// A stream of the host, on which a copy takes its turn.
pub(super) struct HostStream {
    streams: Arc<Streams>,
    stream: Stream,
    capturing: bool,
}

impl HostStream {
    /// `handle` is a stream of `device`.
    pub fn new(engine: &Engine, device: u32, handle: u64) -> Result<HostStream> {
        let device = engine.platform().device(device)?;
        let stream = Stream::of_host(handle);
        let capturing = device.is_capturing(handle)?;
        // The legacy stream cannot be captured itself; it would wait for the one that is.
        if capturing && handle <= Stream::of_host(0).0 {
            return Err(capture(
                "the default stream cannot be used while another is captured",
            ));
        }
        Ok(HostStream {
            streams: engine.streams(&device)?,
            stream,
            capturing,
        })
    }

    /// Whether the stream is one of the device.
    pub fn fits(&self) -> bool {
        let recorded = self
            .streams
            .event()
            .and_then(|event| self.streams.device.event_record(event.event(), self.stream));
        recorded.is_ok()
    }

    /// Waits for what was queued so far.
    fn wait(&self) -> Result<()> {
        let device = &self.streams.device;
        let event = self.streams.event()?;
        device.event_record(event.event(), self.stream)?;
        device.event_synchronize(event.event())
    }
}

fn capture(why: &str) -> Error {
    Error::new(ErrorKind::Capture, format!("stream: {why}"))
}

/// Whose stream a lane uses.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Owner {
    Host,
    /// Ours, between two events on the host's.
    Between,
    Engine,
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct Key {
    device: u32,
    direction: Direction,
    staged: bool,
}

struct Used {
    key: Key,
    owner: Owner,
    lane: Lane,
}

/// See the head of the file. Must be ended by [`Self::finish`].
pub(super) struct Run {
    work: Work,
    host: Option<HostStream>,
    used: Vec<Used>,
    /// The host's stream was waited for, which copies by processor need.
    waited: bool,
}

impl Run {
    /// `host` is `None` for a copy that is waited for.
    pub fn new(engine: &Arc<Engine>, host: Option<HostStream>, control: &Arc<Control>) -> Run {
        Run {
            work: Work {
                engine: Arc::clone(engine),
                control: Arc::clone(control),
                floor: Arc::new(Floor::default()),
                batch: Batch::default(),
            },
            host,
            used: Vec::new(),
            waited: false,
        }
    }

    /// Bytes from `at` on are not certain.
    fn lower(&self, at: u64) {
        self.work.floor.lower(at);
    }

    /// None of these groups was submitted.
    pub fn lower_to(&self, groups: &[Group]) {
        for group in groups {
            self.lower(group.at());
        }
    }

    fn lane(&mut self, device: u32, direction: Direction, staged: bool) -> Result<usize> {
        let key = Key {
            device,
            direction,
            staged,
        };
        if let Some(index) = self.used.iter().position(|used| used.key == key) {
            return Ok(index);
        }
        let engine = &self.work.engine;
        let streams = engine.streams(&engine.platform().device(device)?)?;
        let (owner, lane) = match &self.host {
            None => (Owner::Engine, Lane::own(streams, direction)),
            Some(host) if ordinal(&host.streams.device) == device => {
                if host.capturing && staged {
                    return Err(capture("pageable memory cannot be copied in a capture"));
                }
                let lane = Lane::on(streams, host.stream, direction, host.capturing);
                (Owner::Host, lane)
            }
            Some(host) => {
                if host.capturing {
                    return Err(capture("is captured, and belongs to another device"));
                }
                let lane = Lane::own(streams, direction);
                follow(&host.streams, host.stream, &lane.streams, lane.stream)?;
                (Owner::Between, lane)
            }
        };
        self.used.push(Used { key, owner, lane });
        Ok(self.used.len() - 1)
    }

    /// Queues what was planned, or hands it to threads.
    ///
    /// # Safety
    /// The groups are what the planner made of memory that is valid for the call.
    pub unsafe fn submit(&mut self, groups: &[Group]) -> Result<()> {
        if self.work.batch.failed() {
            self.lower_to(groups);
            return Err(Error::new(ErrorKind::Internal, "an earlier piece failed"));
        }
        for (index, group) in groups.iter().enumerate() {
            // SAFETY: by this function's contract.
            let submitted = unsafe { self.submit_group(group) };
            if submitted.is_err() {
                self.lower_to(&groups[index + 1..]);
                return submitted;
            }
        }
        Ok(())
    }

    /// # Safety
    /// As for [`Self::submit`].
    unsafe fn submit_group(&mut self, group: &Group) -> Result<()> {
        let items = group.items.as_slice();
        // SAFETY: by this function's contract; the batch is waited for in `finish`.
        unsafe {
            match group.route {
                Route::HostToHost => self
                    .host_done()
                    .inspect_err(|_| self.lower(group.at()))
                    .and_then(|()| staged::on_host(&self.work, items)),
                Route::ToDevice { device, pageable } => {
                    self.queue_or_stage(device, Direction::ToDevice, pageable, items)
                }
                Route::ToHost { device, pageable } => {
                    self.queue_or_stage(device, Direction::ToHost, pageable, items)
                }
                Route::OnDevice { device } => {
                    self.queue_or_stage(device, Direction::OnDevice, false, items)
                }
                Route::ToPeer { from, to } => self
                    .submit_to_peer(from, to, items)
                    .inspect_err(|_| self.lower(group.at())),
            }
        }
    }

    /// # Safety
    /// As for [`Self::submit`].
    unsafe fn queue_or_stage(
        &mut self,
        device: u32,
        direction: Direction,
        pageable: bool,
        items: &[Item],
    ) -> Result<()> {
        let at = items.first().map_or(u64::MAX, |item| item.at);
        let mut lane = self.lane(device, direction, pageable);
        if pageable && direction == Direction::ToHost {
            // Here, so that no thread waits for work of the host: what ends that may need a thread.
            lane = lane.and_then(|lane| self.host_done().map(|()| lane));
        }
        let lane = lane.inspect_err(|_| self.lower(at))?;
        let (work, lane) = (&self.work, &mut self.used[lane].lane);
        // SAFETY: by this function's contract.
        unsafe {
            match (pageable, direction) {
                (true, Direction::ToDevice) => staged::to_device(work, lane, items),
                (true, _) => staged::to_host(work, lane, items),
                (false, _) => lane.queue(&work.engine, items, None).inspect_err(|_| {
                    let alone = items.len() == 1;
                    work.floor.lower(if alone { lane.reached } else { at });
                }),
            }
        }
    }

    /// # Safety
    /// As for [`Self::submit`].
    unsafe fn submit_to_peer(&mut self, from: u32, to: u32, items: &[Item]) -> Result<()> {
        let direct = self.lane(from, Direction::OnDevice, false)?;
        let mut left = items;
        while let Some(item) = left.first() {
            let lane = &mut self.used[direct].lane;
            // SAFETY: by this function's contract.
            match unsafe { lane.queue_to_peer(item, to) } {
                Ok(()) => left = &left[1..],
                Err(error) if error.kind() == ErrorKind::Unsupported => break,
                Err(error) => return Err(error),
            }
        }
        if left.is_empty() {
            return Ok(());
        }
        let first = self.lane(from, Direction::ToHost, true)?;
        let second = self.lane(to, Direction::ToDevice, true)?;
        let [first, second] = self
            .used
            .get_disjoint_mut([first, second])
            .map_err(|_| Error::new(ErrorKind::Internal, "two lanes are one"))?;
        // SAFETY: by this function's contract.
        unsafe { staged::between_devices(&self.work, (&mut first.lane, &mut second.lane), left) }
    }

    /// Queues a pitched copy between memory that the device reaches; false, and nothing done, if
    /// its rows are better copied as pieces.
    ///
    /// # Safety
    /// Both sides are valid for the call.
    pub unsafe fn submit_pitched(
        &mut self,
        pitched: &Pitched,
        device: u32,
        direction: Direction,
    ) -> Result<bool> {
        let index = self.lane(device, direction, false)?;
        let lane = &mut self.used[index].lane;
        lane.choose(&self.work.engine)?;
        if lane.method(pitched.width) == Method::Kernel {
            return Ok(false);
        }
        // SAFETY: by this function's contract.
        unsafe { lane.queue_pitched(pitched, 0) }?;
        Ok(true)
    }

    /// Before the processor touches memory in the place of the host's stream.
    fn host_done(&mut self) -> Result<()> {
        let Some(host) = &self.host else {
            return Ok(());
        };
        if host.capturing {
            return Err(capture("copies on the host cannot be captured"));
        }
        if !self.waited {
            host.wait()?;
            self.waited = true;
        }
        Ok(())
    }

    /// Waits for the threads and, unless the copy is on a stream of the host, for the devices.
    /// `submitted` is how far submitting came, `bytes` how many there were.
    pub fn finish(mut self, submitted: Result<()>, bytes: u64) -> Ended {
        // A failure of a job is the reason for a failure to submit more.
        let mut status = self.work.batch.wait().and(submitted);
        let failed = status.is_err();
        for used in &mut self.used {
            let ended = match (used.owner, &self.host) {
                (Owner::Host, _) => Ok(()),
                (Owner::Between, Some(host)) if !failed => {
                    let lane = &mut used.lane;
                    // Where the host's stream cannot be made to wait, the caller does.
                    follow(&lane.streams, lane.stream, &host.streams, host.stream)
                        .or_else(|_| lane.wait(&self.work.control))
                }
                _ => {
                    if failed {
                        // An error of a stream stays until it is asked for.
                        used.lane.begin(used.lane.first.unwrap_or(u64::MAX));
                    }
                    used.lane.wait(&self.work.control)
                }
            };
            if let Err(error) = ended {
                self.work.floor.lower(used.lane.first.unwrap_or(0));
                status = status.and(Err(error));
            }
        }
        let certain = bytes.min(self.work.floor.get());
        Ended {
            bytes: certain,
            status,
        }
    }
}

fn ordinal(device: &Arc<dyn Device>) -> u32 {
    device.info().ordinal
}

/// Later work of the second stream waits for what is queued on the first.
fn follow(first: &Streams, before: Stream, second: &Streams, after: Stream) -> Result<()> {
    let event = first.event()?;
    first.device.event_record(event.event(), before)?;
    second.device.stream_wait(after, event.event())
}

impl Drop for Run {
    /// Whatever happens, no thread uses the memory of a call that is over.
    fn drop(&mut self) {
        let _ = self.work.batch.wait();
    }
}
