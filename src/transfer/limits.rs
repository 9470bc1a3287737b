//! How much more host memory may be pinned: the tightest of what the system and every control
//! group above this process still have. Read before memory is touched, because the alternative to
//! a refusal here is the kernel's out-of-memory killer.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Left free for everybody else, bytes.
const MARGIN: u64 = 256 << 20;

/// How old a figure may be that only decides whether idle memory is kept.
const RECENT: Duration = Duration::from_millis(10);

/// What the host has left, asked when it is needed.
pub struct Headroom {
    ask: Box<dyn Fn() -> Option<u64> + Send + Sync>,
    /// The last answer. Never held while it is asked for.
    last: Mutex<Option<(Instant, Option<u64>)>>,
}

impl Headroom {
    /// What the system says.
    pub fn of_system() -> Headroom {
        Headroom::from_fn(system_headroom)
    }

    /// What `ask` says: bytes that may still be taken, or `None` if nobody knows.
    pub fn from_fn(ask: impl Fn() -> Option<u64> + Send + Sync + 'static) -> Headroom {
        Headroom {
            ask: Box::new(ask),
            last: Mutex::new(None),
        }
    }

    /// Bytes that may still be taken, after a margin; `None` where the system does not tell.
    pub fn now(&self) -> Option<u64> {
        let answer = (self.ask)();
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some((Instant::now(), answer));
        answer
    }

    /// Like [`Self::now`], a moment ago.
    pub fn recent(&self) -> Option<u64> {
        let last = *self.last.lock().unwrap_or_else(PoisonError::into_inner);
        match last {
            Some((when, answer)) if when.elapsed() < RECENT => answer,
            _ => self.now(),
        }
    }
}

fn system_headroom() -> Option<u64> {
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let system = fs::read_to_string("/proc/meminfo")
        .ok()
        .and_then(|text| available(&text));
    group_folders(&groups)
        .into_iter()
        .filter_map(|(folder, root)| group_headroom(&folder, &root))
        .chain(system)
        .min()
        .map(|bytes| bytes.saturating_sub(MARGIN))
}

fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib << 10)
}

/// The memory group of this process, in the unified hierarchy and in the older one.
fn group_folders(groups: &str) -> Vec<(PathBuf, PathBuf)> {
    groups
        .lines()
        .filter_map(|line| {
            let mut fields = line.splitn(3, ':');
            let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
            let root = if controllers.is_empty() {
                PathBuf::from("/sys/fs/cgroup")
            } else if controllers.split(',').any(|name| name == "memory") {
                PathBuf::from("/sys/fs/cgroup/memory")
            } else {
                return None;
            };
            Some((root.join(path.trim_start_matches('/')), root))
        })
        .collect()
}

/// The least headroom from `folder` up to the root of its hierarchy.
fn group_headroom(folder: &Path, root: &Path) -> Option<u64> {
    folder
        .ancestors()
        .take_while(|ancestor| ancestor.starts_with(root))
        .filter_map(|group| {
            let number = |name: &str| -> Option<u64> {
                fs::read_to_string(group.join(name))
                    .ok()?
                    .trim()
                    .parse()
                    .ok()
            };
            let limit = number("memory.max").or_else(|| number("memory.limit_in_bytes"))?;
            let used = number("memory.current").or_else(|| number("memory.usage_in_bytes"))?;
            // Clean file pages go before anything is killed, so they count as free.
            let cached = fs::read_to_string(group.join("memory.stat"))
                .ok()
                .and_then(|text| {
                    text.lines().find_map(|line| {
                        line.strip_prefix("inactive_file ")
                            .and_then(|value| value.trim().parse().ok())
                    })
                })
                .unwrap_or(0);
            Some(limit.saturating_sub(used.saturating_sub(cached)))
        })
        .min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_kernel_formats() {
        assert_eq!(
            available("MemTotal: 9 kB\nMemAvailable:   2048 kB\n"),
            Some(2 << 20)
        );
        assert_eq!(available("MemTotal: 9 kB\n"), None);
        let folders = group_folders("0::/a/b\n5:cpu:/c\n7:memory:/d\n");
        assert_eq!(folders[0].0, Path::new("/sys/fs/cgroup/a/b"));
        assert_eq!(folders[1].0, Path::new("/sys/fs/cgroup/memory/d"));
        assert_eq!(folders.len(), 2);
    }

    #[test]
    fn the_tightest_group_counts() {
        let root = std::env::temp_dir().join(format!("tms-limits-{}", std::process::id()));
        let inner = root.join("outer/inner");
        fs::create_dir_all(&inner).unwrap();
        fs::write(inner.join("memory.max"), "max\n").unwrap();
        fs::write(inner.join("memory.current"), "5\n").unwrap();
        fs::write(root.join("outer/memory.max"), "1000\n").unwrap();
        fs::write(root.join("outer/memory.current"), "400\n").unwrap();
        fs::write(
            root.join("outer/memory.stat"),
            "anon 1\ninactive_file 100\n",
        )
        .unwrap();
        assert_eq!(group_headroom(&inner, &root), Some(700));
        fs::remove_dir_all(&root).unwrap();
    }
}
