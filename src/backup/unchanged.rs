//! Which blocks of device memory differ from their backup, told by fingerprints that the device
//! computes.
//!
//! A block's fingerprint is known while its backup has exactly the contents that it was taken of. It
//! is forgotten before the first byte of that backup is overwritten, and known again when the new
//! contents are complete. Fingerprints are taken before the copy: if the memory changed in between,
//! which is the host's error, the next comparison sees other contents and copies.

use std::collections::{BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use super::StoreItem;
use crate::device::fingerprint::{BLOCK, Block, Key, Print};
use crate::device::{Device, Direction};
use crate::error::{Error, Result};
use crate::transfer::{self, Engine, SharedEvent, devices_of};

/// Blocks that are decided about at once: few enough to begin copying early, enough for the whole
/// device.
const GROUP: u64 = 512;

/// Secret of this process, made by the first check.
static KEY: OnceLock<Key> = OnceLock::new();

fn key() -> Result<&'static Key> {
    if let Some(key) = KEY.get() {
        return Ok(key);
    }
    let key = Key::new()?;
    Ok(KEY.get_or_init(|| key))
}

/// The fingerprints that are known of the blocks of one backup.
#[derive(Debug)]
pub(super) struct Known(Mutex<Vec<Option<Print>>>);

impl Known {
    pub fn nothing_of(bytes: u64) -> Known {
        Known(Mutex::new(vec![None; blocks_in(bytes) as usize]))
    }

    fn prints(&self) -> MutexGuard<'_, Vec<Option<Print>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All of the backup is about to be overwritten.
    pub fn forget(&self) {
        self.prints().fill(None);
    }

    fn any(&self, run: &Run) -> bool {
        self.prints()[run.blocks()].iter().any(Option::is_some)
    }

    /// Forgets the blocks of a run that differ from `now`, and returns them as ranges of blocks.
    fn forget_changed(&self, run: &Run, now: &[Print]) -> Vec<std::ops::Range<u64>> {
        let mut prints = self.prints();
        let mut changed: Vec<std::ops::Range<u64>> = Vec::new();
        for ((known, now), block) in prints[run.blocks()].iter_mut().zip(now).zip(run.first..) {
            if known.as_ref() == Some(now) {
                continue;
            }
            *known = None;
            match changed.last_mut() {
                Some(last) if last.end == block => last.end += 1,
                _ => changed.push(block..block + 1),
            }
        }
        changed
    }

    fn publish(&self, run: &Run, now: &[Print]) {
        let mut prints = self.prints();
        for (known, now) in prints[run.blocks()].iter_mut().zip(now) {
            *known = Some(*now);
        }
    }
}

fn blocks_in(bytes: u64) -> u64 {
    bytes.div_ceil(BLOCK)
}

/// Neighbouring blocks of one item.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Run {
    item: usize,
    first: u64,
    count: u64,
}

impl Run {
    fn blocks(&self) -> std::ops::Range<usize> {
        self.first as usize..(self.first + self.count) as usize
    }
}

/// Some bytes of an item that have to be copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part {
    pub item: usize,
    pub offset: u64,
    pub bytes: u64,
}

/// Runs of one device whose fingerprints are taken by one launch.
struct Group {
    device: Arc<dyn Device>,
    runs: Vec<Run>,
    /// Place of its first block in the lists, and how many there are.
    first: u64,
    count: u64,
    /// When the fingerprints are there.
    taken: Option<SharedEvent>,
}

/// Pinned memory with the blocks of all groups, then room for their fingerprints.
struct Lists {
    memory: Arc<transfer::Block>,
    count: u64,
}

impl Lists {
    fn bytes_for(count: u64) -> u64 {
        count * (size_of::<Block>() + size_of::<Print>()) as u64
    }

    fn block(&self, index: u64) -> *mut Block {
        // SAFETY: `bytes_for` leaves room for `count` blocks, and `index` is at most that.
        unsafe {
            let start = self.memory.pointer().as_ptr().cast::<Block>();
            start.add(index.min(self.count) as usize)
        }
    }

    fn print(&self, index: u64) -> *mut Print {
        // SAFETY: the fingerprints follow the blocks, and there is room for `count` of them.
        unsafe {
            let start = self.block(self.count).cast::<Print>();
            start.add(index.min(self.count) as usize)
        }
    }

    /// The fingerprints of a group.
    ///
    /// # Safety
    /// The device is done with the group.
    unsafe fn prints(&self, group: &Group) -> &[Print] {
        // SAFETY: inside the lists, aligned because blocks of the arena begin at whole pages, and
        // written by the device by the caller's promise.
        unsafe { std::slice::from_raw_parts(self.print(group.first), group.count as usize) }
    }
}

/// The fingerprints of one store. Between [`Check::start`] and [`Check::settle`] devices work on it.
pub(super) struct Check {
    lists: Lists,
    devices: Vec<Arc<dyn Device>>,
    /// The items that take part.
    chosen: BTreeSet<usize>,
    groups: VecDeque<Group>,
    /// Groups that were decided about, to be published.
    decided: Vec<Group>,
}

/// Whether an item takes part in the check.
pub(super) fn is_possible(item: &StoreItem) -> bool {
    item.fingerprint && item.span.bytes > 0 && item.span.device.has_kernels()
}

/// Pinned memory for a check of the items `chosen`; `None` if there are none or the memory is
/// refused, which turns the check off.
pub(super) fn memory_for(
    engine: &Engine,
    items: &[StoreItem],
    chosen: &[usize],
) -> Option<transfer::Block> {
    let blocks = |&index: &usize| blocks_in(items[index].span.bytes);
    let count: u64 = chosen.iter().map(blocks).sum();
    let device = &items[*chosen.first()?].span.device;
    engine
        .take_scratch(device, Lists::bytes_for(count))
        .inspect_err(off)
        .ok()
}

pub(super) fn off(error: &Error) {
    tracing::debug!("no check for unchanged memory in this pause: {error}");
}

impl Check {
    /// Cuts the items `chosen` into groups, one device's blocks each.
    pub fn new(memory: transfer::Block, items: &[StoreItem], chosen: &[usize]) -> Check {
        let mut groups: VecDeque<Group> = VecDeque::new();
        let mut place = 0;
        let devices = devices_of(chosen.iter().map(|&index| &items[index].span));
        for device in &devices {
            let ordinal = device.info().ordinal;
            let mut open: Option<Group> = None;
            for &item in chosen {
                let span = &items[item].span;
                if span.device.info().ordinal != ordinal {
                    continue;
                }
                let mut first = 0;
                while first < blocks_in(span.bytes) {
                    let group = open.get_or_insert_with(|| Group {
                        device: Arc::clone(device),
                        runs: Vec::new(),
                        first: place,
                        count: 0,
                        taken: None,
                    });
                    let count = (blocks_in(span.bytes) - first).min(GROUP - group.count);
                    group.runs.push(Run { item, first, count });
                    group.count += count;
                    place += count;
                    first += count;
                    if group.count == GROUP {
                        groups.extend(open.take());
                    }
                }
            }
            groups.extend(open);
        }
        Check {
            lists: Lists {
                memory: Arc::new(memory),
                count: place,
            },
            devices,
            chosen: chosen.iter().copied().collect(),
            groups: alternate(groups),
            decided: Vec::new(),
        }
    }

    pub fn has(&self, item: usize) -> bool {
        self.chosen.contains(&item)
    }

    /// Queues the fingerprints of all groups, so that none is waited for by the one before.
    ///
    /// # Safety
    /// Every item is readable device memory until [`Self::settle`].
    pub unsafe fn start(&mut self, engine: &Engine, items: &[StoreItem]) -> Result<()> {
        self.lists.memory.wait()?;
        let key = key()?;
        for group in &mut self.groups {
            let mut place = group.first;
            for run in &group.runs {
                let span = &items[run.item].span;
                for block in run.first..run.first + run.count {
                    let part = part_of(run.item, span.bytes, &(block..block + 1));
                    // SAFETY: inside the lists; no device reads this group's blocks yet.
                    unsafe {
                        self.lists.block(place).write(Block {
                            address: span.address + part.offset,
                            bytes: part.bytes,
                        });
                    }
                    place += 1;
                }
            }
            let streams = engine.streams(&group.device)?;
            // SAFETY: the lists are pinned, have room for the group and stay as they are until the
            // stream was settled; the blocks are readable by this function's contract.
            unsafe {
                group.device.fingerprint(
                    key,
                    self.lists.block(group.first),
                    self.lists.print(group.first),
                    group.count as u32,
                    streams.of(Direction::OnDevice),
                )?;
            }
            group.taken = Some(streams.mark(Direction::OnDevice)?);
        }
        Ok(())
    }

    /// What has to be copied of the next group, `None` after the last. What is known of these blocks
    /// is forgotten; bytes that need no copy are told to `unchanged`.
    pub fn next(
        &mut self,
        engine: &Engine,
        items: &[StoreItem],
        known: &[&Known],
        unchanged: &mut u64,
    ) -> Result<Option<Vec<Part>>> {
        let Some(group) = self.groups.pop_front() else {
            return Ok(None);
        };
        let compare = group.runs.iter().any(|run| known[run.item].any(run));
        if let Some(taken) = &group.taken {
            if compare {
                group.device.event_synchronize(taken.event())?;
            } else {
                let stream = engine.streams(&group.device)?.of(Direction::ToHost);
                group.device.stream_wait(stream, taken.event())?;
            }
        }
        let mut parts = Vec::new();
        let mut place = 0;
        for run in &group.runs {
            let all = run.first..run.first + run.count;
            let bytes = items[run.item].span.bytes;
            if !compare {
                // Nothing is known of it, so there is nothing to forget.
                parts.push(part_of(run.item, bytes, &all));
                continue;
            }
            // SAFETY: the event after the group's fingerprints was waited for.
            let now = unsafe { self.lists.prints(&group) };
            let now = &now[place..place + run.count as usize];
            place += run.count as usize;
            let changed = known[run.item].forget_changed(run, now);
            *unchanged += part_of(run.item, bytes, &all).bytes;
            for range in changed {
                let part = part_of(run.item, bytes, &range);
                *unchanged -= part.bytes;
                parts.push(part);
            }
        }
        self.decided.push(group);
        Ok(Some(parts))
    }

    /// Waits until no device works with the lists.
    pub fn settle(&self, engine: &Engine) -> Result<()> {
        engine.settle(&self.devices, Direction::OnDevice, || {
            Arc::clone(&self.lists.memory)
        })
    }

    /// Makes the fingerprints known of what was copied.
    ///
    /// # Safety
    /// [`Self::settle`] succeeded, and so did every copy.
    pub unsafe fn publish(&self, known: &[&Known]) {
        for group in &self.decided {
            // SAFETY: by this function's contract.
            let mut now = unsafe { self.lists.prints(group) };
            for run in &group.runs {
                let (these, rest) = now.split_at(run.count as usize);
                known[run.item].publish(run, these);
                now = rest;
            }
        }
    }

    /// Gives the memory back, to be used by the next pause, unless a device may still use it.
    pub fn end(self, engine: &Engine) {
        if let Some(memory) = Arc::into_inner(self.lists.memory) {
            engine.keep_scratch(memory);
        }
    }
}

/// The bytes of a range of blocks of an item of `bytes` bytes.
fn part_of(item: usize, bytes: u64, blocks: &std::ops::Range<u64>) -> Part {
    let offset = blocks.start * BLOCK;
    Part {
        item,
        offset,
        bytes: (blocks.end * BLOCK).min(bytes) - offset,
    }
}

/// The groups of several devices by turns, so that all copy at once.
fn alternate(groups: VecDeque<Group>) -> VecDeque<Group> {
    let mut turns: Vec<(usize, Group)> = Vec::with_capacity(groups.len());
    let mut seen: Vec<(u32, usize)> = Vec::new();
    for group in groups {
        let ordinal = group.device.info().ordinal;
        let turn = match seen.iter_mut().find(|(known, _)| *known == ordinal) {
            Some((_, turn)) => {
                *turn += 1;
                *turn
            }
            None => {
                seen.push((ordinal, 0));
                0
            }
        };
        turns.push((turn, group));
    }
    turns.sort_by_key(|(turn, _)| *turn);
    turns.into_iter().map(|(_, group)| group).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Platform;
    use crate::device::host::HostPlatform;
    use crate::transfer::Span;

    fn print(value: u64) -> Print {
        Print([value, !value])
    }

    fn run(first: u64, count: u64) -> Run {
        let item = 0;
        Run { item, first, count }
    }

    #[test]
    fn the_last_block_is_as_long_as_it_is() {
        assert_eq!(blocks_in(0), 0);
        assert_eq!(blocks_in(1), 1);
        assert_eq!(blocks_in(BLOCK), 1);
        assert_eq!(blocks_in(BLOCK + 1), 2);
        let part = |blocks| part_of(3, 2 * BLOCK + 5, &blocks);
        assert_eq!(part(0..1).bytes, BLOCK);
        assert_eq!(part(0..2).bytes, 2 * BLOCK);
        assert_eq!(part(0..3).bytes, 2 * BLOCK + 5);
        let (item, offset, bytes) = (3, 2 * BLOCK, 5);
        let last = Part {
            item,
            offset,
            bytes,
        };
        assert_eq!(part(2..3), last);
    }

    #[test]
    fn what_differs_is_forgotten_until_it_is_published() {
        let known = Known::nothing_of(6 * BLOCK - 1);
        let now: Vec<Print> = (0..6).map(print).collect();
        let all = 0..6;
        assert!(!known.any(&run(0, 6)));
        assert_eq!(known.forget_changed(&run(0, 6), &now), [all]);
        assert!(!known.any(&run(0, 6)));
        known.publish(&run(0, 6), &now);
        assert!(known.forget_changed(&run(0, 6), &now).is_empty());
        let mut later = now.clone();
        for changed in [0, 2, 3, 5] {
            later[changed] = print(99);
        }
        assert_eq!(known.forget_changed(&run(0, 6), &later), [0..1, 2..4, 5..6]);
        // As long as nothing is published, also the contents of before are copied.
        assert_eq!(known.forget_changed(&run(0, 6), &now), [0..1, 2..4, 5..6]);
        known.publish(&run(2, 2), &later[2..4]);
        assert!(known.forget_changed(&run(1, 3), &later[1..4]).is_empty());
        assert!(known.any(&run(0, 2)) && !known.any(&run(5, 1)));
        known.forget();
        assert!(!known.any(&run(0, 6)));
    }

    #[test]
    fn groups_are_of_one_device_full_and_by_turns() {
        let platform = Arc::new(HostPlatform::new(2, 1 << 30));
        let item = |device: u32, blocks: u64| StoreItem {
            span: Span {
                device: platform.device(device).unwrap(),
                address: 0,
                bytes: blocks * BLOCK,
            },
            previous: None,
            fingerprint: true,
            directory: None,
        };
        let items = [
            item(0, GROUP + 10),
            item(1, 3),
            item(0, GROUP),
            item(1, GROUP),
        ];
        let engine = Engine::new(platform.clone()).unwrap();
        let chosen = [0, 1, 2, 3];
        let memory = memory_for(&engine, &items, &chosen).unwrap();
        let check = Check::new(memory, &items, &chosen);
        let found: Vec<(u32, u64, u64)> = check
            .groups
            .iter()
            .map(|group| (group.device.info().ordinal, group.first, group.count))
            .collect();
        let second = 2 * GROUP + 10;
        assert_eq!(
            found,
            [
                (0, 0, GROUP),
                (1, second, GROUP),
                (0, GROUP, GROUP),
                (1, second + GROUP, 3),
                (0, 2 * GROUP, 10)
            ]
        );
        assert_eq!(check.lists.count, second + GROUP + 3);
        let runs = &check.groups[2].runs;
        assert_eq!((runs[0].item, runs[0].first, runs[0].count), (0, GROUP, 10));
        assert_eq!((runs[1].item, runs[1].first), (2, 0));
        check.end(&engine);
    }
}
