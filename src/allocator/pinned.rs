//! The saver's pinned host memory: made ahead of need, given back, and counted.

use super::Saver;
use crate::error::{Error, Result};
use crate::op::{Control, Ended, Op};
use crate::process;
use crate::transfer::ArenaStats;

impl Saver {
    /// Makes sure that `bytes` of pinned host memory are there for the next backups, beyond what is
    /// used now, near `device` (the thread's current one for `None`), and waits until they are.
    /// From then on as much is kept while nobody uses it, until [`Self::trim_pinned`] to less.
    pub fn prewarm(&self, device: Option<u32>, bytes: u64) -> Result<()> {
        let ordinal = self.check_prewarm(device, bytes)?;
        self.prewarm_controlled(ordinal, bytes, &Control::default())
    }

    /// [`Self::prewarm`] on a thread of the library.
    pub fn prewarm_async(&self, device: Option<u32>, bytes: u64) -> Result<Op<Ended>> {
        let ordinal = self.check_prewarm(device, bytes)?;
        let saver = self.clone();
        self.inner.service.submit(move |control| {
            Some(Ended {
                status: saver.prewarm_controlled(ordinal, bytes, control),
                bytes: 0,
            })
        })
    }

    fn check_prewarm(&self, device: Option<u32>, bytes: u64) -> Result<u32> {
        process::check()?;
        if bytes == 0 {
            return Err(Error::invalid("bytes", "must not be 0"));
        }
        let ordinal = device.unwrap_or_else(|| self.platform().current_device());
        self.platform().check_ordinal(ordinal)?;
        Ok(ordinal)
    }

    fn prewarm_controlled(&self, ordinal: u32, bytes: u64, control: &Control) -> Result<()> {
        let _running = process::Running::start()?;
        let device = self.platform().device(ordinal)?;
        // A backup lies in one piece, so the memory must come in pieces for the largest.
        let largest = {
            let held = self.held();
            let of_device = |payload: &super::Allocation| payload.device.info().ordinal == ordinal;
            held.table
                .iter()
                .filter(|(_, record)| of_device(&record.payload))
                .map(|(_, record)| record.bytes)
                .max()
                .unwrap_or(0)
        };
        self.inner
            .engine
            .arena()
            .prewarm(&device, bytes, largest, control)
    }

    /// Unpins host memory that nobody uses until at most `keep` bytes of it are left, and returns
    /// the bytes that went.
    pub fn trim_pinned(&self, keep: u64) -> Result<u64> {
        process::check()?;
        Ok(self.inner.engine.arena().trim(keep))
    }

    /// Figures of the pinned host memory; takes milliseconds in processes with many mappings.
    pub fn pinned_stats(&self) -> ArenaStats {
        self.inner.engine.arena().stats()
    }
}
