//! Pages of host memory: mapping them, asking for huge ones near a device, making them present, and
//! counting which are huge. What they hold and whether they are pinned is the business of others.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::sync::Once;

use crate::error::{Error, ErrorKind, Result};

/// The size of a huge page. Mappings begin at multiples of it.
pub const HUGE: usize = 2 << 20;

pub(super) const PAGE: usize = 4096;

/// Reserves zero-filled private memory at a multiple of [`HUGE`], without touching it.
pub fn map(bytes: usize) -> Result<usize> {
    let too_large = || Error::invalid("size", "does not fit the address space");
    let span = bytes.checked_add(HUGE).ok_or_else(too_large)?;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let raw = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            span,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    if raw == libc::MAP_FAILED {
        return Err(
            Error::last_os(format_args!("mapping {bytes} bytes of host memory"))
                .with_kind(ErrorKind::OutOfHostMemory),
        );
    }
    let start = raw as usize;
    let base = start.next_multiple_of(HUGE);
    let end = (base + bytes).next_multiple_of(PAGE);
    // SAFETY: head and tail belong to the mapping just made and lie outside of the part that is
    // kept. A failure only leaves addresses reserved.
    unsafe {
        if base > start {
            libc::munmap(raw, base - start);
        }
        if start + span > end {
            libc::munmap(end as *mut libc::c_void, start + span - end);
        }
    }
    ask_for_huge_pages(base, bytes);
    Ok(base)
}

/// Gives back memory of [`map`], or a part of it that begins at a multiple of [`PAGE`].
///
/// # Safety
/// Nothing may refer to the memory any more.
pub unsafe fn unmap(base: usize, bytes: usize) {
    // SAFETY: by this function's contract. A failure only leaves the memory mapped.
    unsafe { libc::munmap(base as *mut libc::c_void, bytes) };
}

/// A forked child neither sees nor copies the memory: a device may be writing to it.
pub fn keep_from_children(base: usize, bytes: usize) {
    // SAFETY: advice about a mapping of ours; refusal leaves things as they are.
    unsafe { libc::madvise(base as *mut libc::c_void, bytes, libc::MADV_DONTFORK) };
}

/// Asks for memory of a NUMA node while that has some, before pages are touched. Another node's
/// memory is better than none, so this is a preference, and a refusal is only told.
pub fn prefer_node(base: usize, bytes: usize, node: Option<u32>) {
    /// Nodes that the mask has room for, as many as kernels are built for.
    const NODES: usize = 1024;
    let Some(node) = node.filter(|&node| (node as usize) < NODES && several_nodes()) else {
        return;
    };
    let mut mask = [0u64; NODES / 64];
    mask[node as usize / 64] = 1 << (node % 64);
    // SAFETY: the mask has the stated number of bits (the kernel counts one more), and the range
    // is a mapping of ours.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mbind,
            base,
            bytes,
            libc::MPOL_PREFERRED,
            mask.as_ptr(),
            NODES + 1,
            0,
        )
    };
    if result != 0 {
        tracing::debug!(
            "pinned memory cannot be placed on node {node}: {}",
            std::io::Error::last_os_error()
        );
    }
}

fn several_nodes() -> bool {
    fs::read_to_string("/sys/devices/system/node/online").is_ok_and(|nodes| lists_several(&nodes))
}

/// Whether a list of numbers in the kernel's way (`0-1,4`) has more than one.
fn lists_several(list: &str) -> bool {
    list.contains(['-', ','])
}

/// Says once why pages are small, where they are.
fn ask_for_huge_pages(base: usize, bytes: usize) {
    static TOLD: Once = Once::new();
    // SAFETY: advice about a mapping of ours; refusal changes nothing but speed.
    let result = unsafe { libc::madvise(base as *mut libc::c_void, bytes, libc::MADV_HUGEPAGE) };
    let why = match result {
        0 if huge_pages_allowed() => return,
        0 => "switched off in /sys/kernel/mm/transparent_hugepage or for this process".to_string(),
        _ => std::io::Error::last_os_error().to_string(),
    };
    TOLD.call_once(|| {
        tracing::warn!(
            "no transparent huge pages ({why}): host memory is on pages of 4 KiB, which take longer to make and to pin"
        );
    });
}

fn huge_pages_allowed() -> bool {
    const FOLDER: &str = "/sys/kernel/mm/transparent_hugepage";
    let read = |name: &str| fs::read_to_string(format!("{FOLDER}/{name}")).unwrap_or_default();
    // SAFETY: the request takes no pointer.
    let disabled = unsafe { libc::prctl(libc::PR_GET_THP_DISABLE, 0, 0, 0, 0) };
    disabled != 1 && allowed(&read("enabled"), &read("hugepages-2048kB/enabled"))
}

/// `all` is the setting for every size of huge pages, `own` the one for 2 MiB, empty where there is
/// none. The chosen word stands in brackets.
fn allowed(all: &str, own: &str) -> bool {
    let set = |text: &str, word: &str| text.contains(&format!("[{word}]"));
    let advised = |text: &str| set(text, "always") || set(text, "madvise");
    match own {
        "" => advised(all),
        own if set(own, "inherit") => advised(all),
        own => advised(own),
    }
}

/// Makes every page present. Refusal by the kernel is an error, not a signal.
pub fn populate(base: usize, bytes: usize) -> Result<()> {
    // SAFETY: the range is mapped, private and writable; populating does not change its contents.
    let result =
        unsafe { libc::madvise(base as *mut libc::c_void, bytes, libc::MADV_POPULATE_WRITE) };
    if result == 0 {
        return Ok(());
    }
    let error = std::io::Error::last_os_error();
    if error.raw_os_error() != Some(libc::EINVAL) {
        return Err(Error::io(
            format_args!("populating {bytes} bytes of host memory"),
            error,
        )
        .with_kind(ErrorKind::OutOfHostMemory));
    }
    // Kernels before 5.14 do not know the advice.
    for offset in (0..bytes).step_by(PAGE) {
        let page = (base + offset) as *mut u8;
        // SAFETY: inside the mapped range; the page is fresh, so writing 0 changes nothing.
        unsafe { page.write_volatile(0) };
    }
    Ok(())
}

/// Bytes of `ranges` (base and length, sorted) that are on huge pages. Reads what the kernel tells
/// about every mapping of the process, so it is for questions, not for decisions.
pub fn huge_bytes(ranges: &[(usize, usize)]) -> u64 {
    match File::open("/proc/self/smaps") {
        Ok(file) => count_huge(BufReader::new(file), ranges),
        Err(_) => 0,
    }
}

fn count_huge(smaps: impl BufRead, ranges: &[(usize, usize)]) -> u64 {
    const FIELDS: [&str; 5] = [
        "AnonHugePages",
        "ShmemPmdMapped",
        "FilePmdMapped",
        "Shared_Hugetlb",
        "Private_Hugetlb",
    ];
    let mut total = 0;
    // What of the mapping at hand belongs to the ranges: it cannot have more huge bytes than that.
    let mut ours = 0;
    for line in smaps.lines().map_while(|line| line.ok()) {
        let Some((name, rest)) = line.split_once([':', ' ']) else {
            continue;
        };
        if let Some((start, end)) = bounds(name) {
            ours = overlap(ranges, start, end);
        } else if ours > 0 && FIELDS.contains(&name) {
            let kib: Option<u64> = rest.split_whitespace().next().and_then(|n| n.parse().ok());
            let bytes = (kib.unwrap_or(0) << 10).min(ours);
            ours -= bytes;
            total += bytes;
        }
    }
    total
}

/// The addresses of a mapping, `7f00-8f00`.
fn bounds(text: &str) -> Option<(usize, usize)> {
    let (start, end) = text.split_once('-')?;
    let number = |text| usize::from_str_radix(text, 16).ok();
    Some((number(start)?, number(end)?))
}

fn overlap(ranges: &[(usize, usize)], start: usize, end: usize) -> u64 {
    let first = ranges.partition_point(|&(base, bytes)| base + bytes <= start);
    ranges[first..]
        .iter()
        .take_while(|&&(base, _)| base < end)
        .map(|&(base, bytes)| ((base + bytes).min(end) - base.max(start)) as u64)
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_are_aligned_zero_and_writable() {
        let bytes = 3 * HUGE + PAGE;
        let base = map(bytes).unwrap();
        assert!(base.is_multiple_of(HUGE));
        keep_from_children(base, bytes);
        // A node that this machine does not have is refused by the kernel, and that is all.
        prefer_node(base, bytes, Some(1000));
        populate(base, bytes).unwrap();
        // SAFETY: mapped above, and nobody else knows of it.
        let all = unsafe { std::slice::from_raw_parts_mut(base as *mut u8, bytes) };
        assert!(all.iter().all(|&byte| byte == 0));
        all[bytes - 1] = 1;
        let huge = huge_bytes(&[(base, bytes)]);
        assert!(huge <= 3 * HUGE as u64 && huge.is_multiple_of(HUGE as u64));
        // SAFETY: the slice is not used any more.
        unsafe { unmap(base, bytes) };
    }

    #[test]
    fn the_chosen_setting_counts() {
        assert!(allowed("always [madvise] never", ""));
        assert!(allowed(
            "[always] madvise never",
            "always [inherit] madvise never"
        ));
        assert!(allowed(
            "always madvise [never]",
            "always inherit [madvise] never"
        ));
        assert!(!allowed(
            "always madvise [never]",
            "always [inherit] madvise never"
        ));
        assert!(!allowed(
            "[always] madvise never",
            "always inherit madvise [never]"
        ));
        assert!(!allowed("", ""));
    }

    #[test]
    fn lists_of_nodes() {
        assert!(!lists_several("0\n"));
        assert!(lists_several("0-1\n"));
        assert!(lists_several("0,2\n"));
    }

    #[test]
    fn only_our_part_of_a_mapping_counts() {
        let smaps = "\
1000000-1400000 rw-p 00000000 00:00 0 \n\
Size:               4096 kB\n\
AnonHugePages:      4096 kB\n\
ShmemPmdMapped:        0 kB\n\
VmFlags: rd wr mr mw me dc ac hg \n\
2000000-2400000 rw-p 00000000 00:00 0  [heap]\n\
AnonHugePages:      4096 kB\n\
3000000-3400000 rw-s 00000000 00:05 12 /memfd:pool (deleted)\n\
AnonHugePages:         0 kB\n\
ShmemPmdMapped:     2048 kB\n";
        let count = |ranges: &[(usize, usize)]| count_huge(smaps.as_bytes(), ranges);
        assert_eq!(count(&[(0x100_0000, 4 << 20)]), 4 << 20);
        assert_eq!(count(&[(0x120_0000, 2 << 20)]), 2 << 20);
        assert_eq!(
            count(&[
                (0x100_0000, 2 << 20),
                (0x120_0000, 2 << 20),
                (0x300_0000, 4 << 20)
            ]),
            6 << 20
        );
        assert_eq!(count(&[(0x500_0000, 4 << 20)]), 0);
        assert_eq!(count(&[]), 0);
    }
}
