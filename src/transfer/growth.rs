//! New chunks on their way into the arena: many threads populate them slice by slice, in order, and
//! whoever ends a chunk registers it, while the first ones are already copied into.
//!
//! Registering takes three times as long while others populate, and several threads in it at once
//! make up for that: one at a time was the bottleneck (measured on an H200 for 10.7 GB: 23 GB/s with
//! one thread for all registrations, 41 with as many as there are). All chunks of a growth lie in one mapping, made before the first page is touched:
//! mapping and unmapping stops every thread of the process that is populating.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::arena::{Arena, Claim};
use super::chunk::{contained, register};
use super::pages;
use crate::device::Device;
use crate::error::{Error, Result};

/// What one thread populates at a time. From 2 to 64 MiB made no difference on an H200.
const SLICE: usize = 8 << 20;

/// Threads that populate. Measured on an H200 with 16 cores, with the copies that follow: 23, 31,
/// 37 and 41 GB/s with 4, 6, 8 and 10; with more the copies suffer and it varies (30 to 44).
const POPULATORS: usize = 10;

/// Where the next slice begins.
#[derive(Default)]
struct Cursor {
    chunk: usize,
    offset: usize,
}

#[derive(Default)]
struct Progress {
    /// Bytes of each chunk that are not populated yet.
    left: Vec<usize>,
    failures: BTreeMap<usize, Error>,
    /// Bytes of chunks that came to an end, good or bad.
    ended: usize,
    error: Option<Error>,
}

pub(super) struct Growth {
    arena: Arena,
    device: Arc<dyn Device>,
    /// Base and length of each chunk, in the order in which they are wanted.
    chunks: Vec<(usize, usize)>,
    /// Chunks that nobody uses are wanted too.
    ahead: bool,
    /// Protects the order of slices. Held while limits are looked at, which nobody but the threads
    /// of this growth waits for. Taken before the lock of the arena's state.
    cursor: Mutex<Cursor>,
    /// Protects what is known of the chunks; never held while memory is worked on.
    progress: Mutex<Progress>,
    changed: Condvar,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Growth {
    /// `chunks` are in the arena's table already, growing.
    pub fn new(
        arena: &Arena,
        device: &Arc<dyn Device>,
        chunks: Vec<(usize, usize)>,
        ahead: bool,
    ) -> Arc<Growth> {
        let progress = Progress {
            left: chunks.iter().map(|&(_, bytes)| bytes).collect(),
            ..Progress::default()
        };
        Arc::new(Growth {
            arena: arena.clone(),
            device: Arc::clone(device),
            chunks,
            ahead,
            cursor: Mutex::default(),
            progress: Mutex::new(progress),
            changed: Condvar::new(),
        })
    }

    /// Has the work done by the arena's threads, or by this one where none can be started.
    pub fn start(self: &Arc<Self>) {
        let slices: usize = self
            .chunks
            .iter()
            .map(|&(_, bytes)| bytes.div_ceil(SLICE))
            .sum();
        let workers = self.arena.workers();
        for _ in 0..workers.most().min(POPULATORS).min(slices) {
            let growth = Arc::clone(self);
            workers.submit(move || growth.work());
        }
    }

    /// Waits for the end of all chunks. `tell` hears how many bytes came to an end.
    pub fn wait(&self, mut tell: impl FnMut(usize)) -> Result<()> {
        let total: usize = self.chunks.iter().map(|&(_, bytes)| bytes).sum();
        let mut told = 0;
        let mut progress = lock(&self.progress);
        loop {
            let news = progress.ended - told;
            if news > 0 {
                drop(progress);
                tell(news);
                told += news;
                progress = lock(&self.progress);
            } else if told == total {
                return progress.error.clone().map_or(Ok(()), Err);
            } else {
                progress = self
                    .changed
                    .wait(progress)
                    .unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    fn work(&self) {
        while let Some((chunk, offset, length)) = self.next() {
            let start = self.chunks[chunk].0 + offset;
            let populated = contained(|| pages::populate(start, length));
            self.arena.kept_promise(length);
            if let Some(populated) = self.populated(chunk, length, populated) {
                self.register(chunk, populated);
            }
        }
    }

    /// The next slice, as (chunk, offset, length). Each chunk is asked for before it is touched.
    fn next(&self) -> Option<(usize, usize, usize)> {
        let mut cursor = lock(&self.cursor);
        loop {
            let &(base, bytes) = self.chunks.get(cursor.chunk)?;
            if cursor.offset == 0 {
                match self.arena.claim(base, self.ahead) {
                    Claim::Granted => {}
                    Claim::Unwanted => {
                        self.end(bytes, None);
                        cursor.chunk += 1;
                        continue;
                    }
                    Claim::Refused(error) => {
                        let rest = &self.chunks[cursor.chunk..];
                        cursor.chunk = self.chunks.len();
                        drop(cursor);
                        for &(base, bytes) in rest {
                            self.arena.kept_promise(bytes);
                            self.arena.finish(base, Err(error.clone()));
                            self.end(bytes, Some(error.clone()));
                        }
                        return None;
                    }
                }
            }
            let (chunk, offset) = (cursor.chunk, cursor.offset);
            let length = SLICE.min(bytes - offset);
            cursor.offset += length;
            if cursor.offset == bytes {
                *cursor = Cursor {
                    chunk: chunk + 1,
                    offset: 0,
                };
            }
            return Some((chunk, offset, length));
        }
    }

    /// Notes the end of a slice. After the last one of a chunk, whether all went well.
    fn populated(&self, chunk: usize, length: usize, result: Result<()>) -> Option<Result<()>> {
        let mut progress = lock(&self.progress);
        if let Err(error) = result {
            progress.failures.entry(chunk).or_insert(error);
        }
        progress.left[chunk] -= length;
        if progress.left[chunk] > 0 {
            return None;
        }
        Some(progress.failures.remove(&chunk).map_or(Ok(()), Err))
    }

    fn register(&self, chunk: usize, populated: Result<()>) {
        let (base, bytes) = self.chunks[chunk];
        let registered = populated.and_then(|()| register(&*self.device, base, bytes));
        let error = registered.as_ref().err().cloned();
        self.arena.finish(base, registered);
        self.end(bytes, error);
    }

    fn end(&self, bytes: usize, error: Option<Error>) {
        let mut progress = lock(&self.progress);
        progress.ended += bytes;
        if progress.error.is_none() {
            progress.error = error;
        }
        self.changed.notify_all();
    }
}
