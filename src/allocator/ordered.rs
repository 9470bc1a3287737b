//! Resuming in a given order, so that the host can use the first allocations while the rest arrives.
//!
//! Everything is created and mapped before the first one is ready. What is ready counts as active for
//! questions, reads and writes; the book-keeping follows at the end, for all at once, as in any
//! resume.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Deref;
use std::sync::Arc;

use super::readiness::Readiness;
use super::resume::{Item, Patience, short_of_memory};
use super::table::State;
use super::{Op, Outcome, Region, ResumeOptions, Saver, lock};
use crate::backup::{BackupBackend, LoadItem, LoadObserver};
use crate::device::Address;
use crate::error::{Error, ErrorKind, Result};
use crate::op::{Control, Ending};
use crate::process;
use crate::transfer::SharedEvent;

/// A resume that makes its allocations usable one after the other.
#[derive(Clone)]
pub struct OrderedResume {
    op: Op,
    readiness: Arc<Readiness>,
}

impl Deref for OrderedResume {
    type Target = Op;

    fn deref(&self) -> &Op {
        &self.op
    }
}

impl OrderedResume {
    /// Whether the contents of the allocation around `pointer` are complete. Its error if it
    /// failed; [`ErrorKind::NotFound`] if it is not part of this resume. Calls no driver.
    pub fn is_ready(&self, pointer: Address) -> Result<bool> {
        self.readiness.is_ready(pointer)
    }

    /// Later work of `stream`, a stream of the host, sees the contents of the allocation around
    /// `pointer`. Returns at once if they are complete or on their way; otherwise the calling thread
    /// waits until they are. Errors as for [`Self::is_ready`].
    pub fn stream_wait(&self, pointer: Address, stream: u64) -> Result<()> {
        self.readiness.stream_wait(pointer, stream)
    }
}

/// An allocation that the host named.
struct Named {
    base: Address,
    bytes: u64,
    /// Each allocation has a reference of its own, which tells it from a later one at its address.
    region: Arc<Region>,
}

/// Fails what is not ready when the operation is over, however it ends.
struct Closing(Arc<Readiness>);

impl Drop for Closing {
    fn drop(&mut self) {
        self.0.close(&Error::new(
            ErrorKind::Internal,
            "the resume ended without this allocation",
        ));
    }
}

impl Saver {
    /// Resumes the allocations around `pointers`, and no others, in that order, on a thread of the
    /// library. Of the options only the wait for memory counts; tags are refused.
    ///
    /// [`ErrorKind::NotFound`] if a pointer is in no allocation.
    pub fn resume_ordered_async(
        &self,
        pointers: &[Address],
        options: &ResumeOptions,
    ) -> Result<OrderedResume> {
        process::check()?;
        if options.tags.is_some() {
            return Err(Error::invalid(
                "options.tags",
                "an ordered resume takes pointers, not tags",
            ));
        }
        let order = self.find_all(pointers)?;
        let places = order.iter().map(|named| (named.base, named.bytes));
        let readiness = Arc::new(Readiness::new(places.collect()));
        let closing = Closing(Arc::clone(&readiness));
        let saver = self.clone();
        let mut patience = Patience::new(options.wait);
        let op = self.inner.service.submit(move |control| {
            let readiness = &closing.0;
            let outcome = saver.resume_in_order(&order, readiness, control);
            // What failed later than that has ended, and those who wait for it know.
            if short_of_memory(&outcome)
                && outcome.summary.failures.is_empty()
                && let Some(nap) = patience.next()
            {
                std::thread::sleep(nap);
                return None;
            }
            if let Err(error) = &outcome.status {
                readiness.close(error);
            }
            Some(outcome)
        })?;
        Ok(OrderedResume { op, readiness })
    }

    /// The allocations around `pointers`, each once.
    fn find_all(&self, pointers: &[Address]) -> Result<Vec<Named>> {
        let held = self.held();
        let mut seen = BTreeSet::new();
        let mut allocations = Vec::new();
        for (index, &pointer) in pointers.iter().enumerate() {
            let (base, record) = held.table.find(pointer, 0).ok_or_else(|| {
                Error::new(
                    ErrorKind::NotFound,
                    format!("pointers[{index}]: {pointer:#x} is in no allocation of this saver"),
                )
            })?;
            if seen.insert(base) {
                allocations.push(Named {
                    base,
                    bytes: record.bytes,
                    region: Arc::clone(&record.payload.region),
                });
            }
        }
        Ok(allocations)
    }

    fn resume_in_order(
        &self,
        order: &[Named],
        readiness: &Readiness,
        control: &Arc<Control>,
    ) -> Outcome {
        let _running = match process::Running::start() {
            Ok(running) => running,
            Err(error) => return Outcome::failed(error),
        };
        let _turn = lock(&self.inner.turn);
        self.inner.engine.drain_quarantine();
        self.drain_residues(|_| true);
        let (items, unchanged_count) = self.select_these(order, readiness);
        let mut outcome = self.put_back(items, |items| {
            Loading {
                saver: self,
                readiness,
                control,
            }
            .run(order, items);
        });
        self.held().ready.clear();
        outcome.summary.unchanged_count = unchanged_count;
        outcome
    }

    /// Takes what is paused, by address as any resume does. What is active is ready.
    fn select_these(&self, order: &[Named], readiness: &Readiness) -> (Vec<Item>, u64) {
        let mut items = Vec::new();
        let mut unchanged = 0;
        let mut held = self.held();
        for named in order {
            let base = named.base;
            // What an earlier attempt said stays true: the host may have paused it again since.
            if let Some(ready) = readiness.ended_well(base) {
                unchanged += u64::from(ready);
                continue;
            }
            let record = held.table.get_mut(base).filter(|record| {
                !record.freed && Arc::ptr_eq(&record.payload.region, &named.region)
            });
            match record {
                Some(record) if record.state == State::Paused => {
                    record.state = State::Resuming;
                    items.push(Item::new(base, record));
                }
                Some(_) => {
                    unchanged += 1;
                    readiness.ended(base, Ok(()));
                }
                None => readiness.ended(
                    base,
                    Err(Error::new(
                        ErrorKind::NotFound,
                        format!("the allocation at {base:#x} was freed"),
                    )),
                ),
            }
        }
        items.sort_by_key(|item| item.address);
        (items, unchanged)
    }
}

/// The part of an ordered resume that copies.
struct Loading<'a> {
    saver: &'a Saver,
    readiness: &'a Readiness,
    control: &'a Arc<Control>,
}

impl Loading<'_> {
    fn run(&self, order: &[Named], items: &mut [Item]) {
        let by_address: BTreeMap<Address, usize> = items
            .iter()
            .enumerate()
            .map(|(index, item)| (item.address, index))
            .collect();
        let mut runs: Vec<(Arc<dyn BackupBackend>, Vec<usize>)> = Vec::new();
        let mut total = 0;
        for &index in order.iter().filter_map(|named| by_address.get(&named.base)) {
            let item = &items[index];
            let Some(stored) = &item.allocation.stored else {
                self.ready(item.address);
                continue;
            };
            total += item.bytes;
            match runs.last_mut() {
                Some((backend, run)) if backend.name() == stored.backend.name() => run.push(index),
                _ => runs.push((Arc::clone(&stored.backend), vec![index])),
            }
        }
        self.control.expect(total);
        for (backend, run) in runs {
            let (mut loads, mut bases) = (Vec::new(), Vec::new());
            for &index in &run {
                let item = &items[index];
                if let Some(stored) = &item.allocation.stored {
                    bases.push(item.address);
                    loads.push(LoadItem {
                        span: item.span(),
                        ticket: Arc::clone(&stored.ticket),
                    });
                }
            }
            let observer = Observer {
                loading: self,
                bases,
            };
            let engine = &self.saver.inner.engine;
            let results = backend.load(engine, &loads, self.control, &observer);
            for (index, result) in run.into_iter().zip(results) {
                items[index].result = result;
            }
        }
    }

    /// Usable from here on: first for the saver, then for those who wait.
    fn ready(&self, base: Address) {
        self.saver.held().ready.insert(base);
        self.readiness.ended(base, Ok(()));
    }
}

/// Passes on what one backend says.
struct Observer<'a> {
    loading: &'a Loading<'a>,
    bases: Vec<Address>,
}

impl LoadObserver for Observer<'_> {
    fn queued(&self, index: usize, event: &Arc<SharedEvent>) {
        self.loading.readiness.queued(self.bases[index], event);
    }

    fn done(&self, index: usize, result: &Result<()>) {
        let base = self.bases[index];
        match result {
            Ok(()) => self.loading.ready(base),
            Err(error) => {
                let error = error
                    .clone()
                    .context(format_args!("allocation {base:#x} stays paused"));
                self.loading.readiness.ended(base, Err(error));
            }
        }
    }
}
