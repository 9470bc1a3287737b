//! What every device must do, run over every platform: always over the host device, and over CUDA
//! where `TMS_TEST_CUDA=1` is set (with a real driver, or with fakecuda in the library path).
//!
//! Behaviour that only the host device has (budgets, resident memory, its threads) is tested in
//! `host_only` at the end. Pausing and tags are not known here.

#[path = "conformance/pieces.rs"]
mod pieces;

use std::os::fd::AsFd;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};
use std::time::{Duration, Instant};

use tms_memcache::device::host::HostPlatform;
use tms_memcache::device::{
    self, Address, CreateOptions, Device, DeviceKind, Direction, Physical, Platform, Stream,
};
use tms_memcache::error::{ErrorKind, Result};

use pieces::*;

type Test = fn(&Arc<dyn Platform>);

const MIB: u64 = 1 << 20;
const HOST_BUDGET: u64 = 1 << 30;

/// Tests that measure the whole process or device write; all others read.
static MEASURING: RwLock<()> = RwLock::new(());

/// Set in a process started by [`rerun`].
const CHILD: &str = "TMS_CONFORMANCE_CHILD";

fn on_host(test: Test, alone: bool) {
    run(alone, || {
        let platform: Arc<dyn Platform> = Arc::new(HostPlatform::new(2, HOST_BUDGET));
        test(&platform);
    });
}

fn on_cuda(test: Test, alone: bool) {
    let Some(platform) = cuda() else { return };
    run(alone, || test(platform));
}

/// For tests after which a real GPU cannot be used by the process any more.
fn on_cuda_in_a_child(test: Test, name: &str) {
    if std::env::var_os(CHILD).is_some() {
        return on_cuda(test, false);
    }
    if cuda().is_some() {
        let output = rerun(&format!("cuda::{name}"), &[]);
        assert!(output.status.success(), "{output:?}");
    }
}

fn run(alone: bool, test: impl FnOnce()) {
    // A failed test poisons the lock, which says nothing about the others.
    if alone {
        let _guard = MEASURING.write().unwrap_or_else(PoisonError::into_inner);
        test();
    } else {
        let _guard = MEASURING.read().unwrap_or_else(PoisonError::into_inner);
        test();
    }
}

fn cuda() -> Option<&'static Arc<dyn Platform>> {
    static PLATFORM: OnceLock<Option<Arc<dyn Platform>>> = OnceLock::new();
    let selected = || std::env::var_os("TMS_TEST_CUDA").is_some_and(|value| value == "1");
    let platform = PLATFORM.get_or_init(|| selected().then(|| device::open("cuda").unwrap()));
    if platform.is_none() {
        println!("cuda: not selected (TMS_TEST_CUDA=1)");
    }
    platform.as_ref()
}

/// Runs one test of this binary in a process of its own, with [`CHILD`] set.
fn rerun(test: &str, environment: &[(&str, &str)]) -> Output {
    Command::new(std::env::current_exe().unwrap())
        .args([test, "--exact", "--nocapture", "--test-threads=1"])
        .env(CHILD, "1")
        .envs(environment.iter().copied())
        .output()
        .unwrap()
}

macro_rules! conformance {
    (
        shared: [$($shared:ident),* $(,)?],
        alone: [$($alone:ident),* $(,)?],
        lost: [$($lost:ident),* $(,)?]
    ) => {
        mod host {
            $(#[test] fn $shared() { super::on_host(super::$shared, false) })*
            $(#[test] fn $alone() { super::on_host(super::$alone, true) })*
            $(#[test] fn $lost() { super::on_host(super::$lost, false) })*
        }
        mod cuda {
            $(#[test] fn $shared() { super::on_cuda(super::$shared, false) })*
            $(#[test] fn $alone() { super::on_cuda(super::$alone, true) })*
            $(#[test] fn $lost() { super::on_cuda_in_a_child(super::$lost, stringify!($lost)) })*
        }
    };
}

conformance! {
    shared: [
        describes_its_devices,
        reserves_aligned_addresses_that_do_not_overlap,
        maps_one_to_many_granules,
        copies_any_size_at_any_offset,
        copies_across_neighbouring_mappings,
        copies_of_nothing_do_nothing,
        fills_exactly_the_range,
        work_of_a_stream_is_done_in_order,
        an_event_orders_two_streams,
        an_event_without_a_record_is_done,
        an_event_can_be_recorded_again,
        a_wait_is_for_the_record_made_before_it,
        a_destroyed_stream_still_does_its_work,
        synchronize_waits_for_every_stream,
        fresh_memory_is_zero,
        contents_go_with_the_physical_memory,
        addresses_survive_their_memory,
        a_released_handle_lives_while_it_is_mapped,
        unmaps_neighbours_in_one_call,
        one_handle_maps_at_two_addresses,
        exports_to_an_import_of_the_same_memory,
        exports_only_what_was_created_for_it,
        registers_host_memory,
        refuses_sizes_that_are_not_granules,
        refuses_to_map_over_a_mapping,
        too_much_memory_is_an_error_that_passes,
        no_capture_is_active,
        threads_share_a_device,
        devices_work_side_by_side,
        a_peer_with_access_reads_and_writes,
        pieces_have_any_size_and_alignment,
        pieces_of_every_pair_of_alignments,
        few_or_large_pieces_are_copied_too,
        pieces_keep_their_place_in_the_stream,
        batches_copy_what_their_pieces_say,
        pitched_copies_leave_the_gaps_alone,
        a_peer_is_copied_to_without_access,
        fingerprints_are_those_of_the_definition,
        addresses_are_classified,
        streams_of_the_host_are_used_like_own_ones,
    ],
    alone: [free_memory_falls_and_rises],
    lost: [
        a_copy_without_memory_behind_it_is_an_error,
        pieces_without_memory_behind_them_are_an_error,
    ]
}

/// Mapped, accessible memory; everything is given back on drop.
struct Region {
    device: Arc<dyn Device>,
    address: Address,
    bytes: u64,
    physical: Physical,
}

impl Region {
    fn new(device: &Arc<dyn Device>, granules: u64) -> Self {
        Self::with(device, granules, CreateOptions::default(), &[])
    }

    fn with(
        device: &Arc<dyn Device>,
        granules: u64,
        options: CreateOptions,
        peers: &[u32],
    ) -> Self {
        let bytes = granules * device.info().granularity;
        let address = device.reserve(bytes).unwrap();
        let physical = device.create(bytes, options).unwrap();
        device.map(address, bytes, physical).unwrap();
        device.set_access(address, bytes, peers).unwrap();
        Region {
            device: Arc::clone(device),
            address,
            bytes,
            physical,
        }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        let done = self
            .device
            .synchronize()
            .and_then(|()| self.device.unmap(self.address, self.bytes))
            .and_then(|()| self.device.release(self.physical))
            .and_then(|()| self.device.unreserve(self.address, self.bytes));
        if !std::thread::panicking() {
            done.unwrap();
        }
    }
}

fn first(platform: &Arc<dyn Platform>) -> Arc<dyn Device> {
    platform.device(0).unwrap()
}

fn queue_write(device: &dyn Device, stream: Stream, address: Address, bytes: &[u8]) -> Result<()> {
    let (source, length) = (bytes.as_ptr() as u64, bytes.len() as u64);
    // SAFETY: every test synchronises the stream while `bytes` is still borrowed by its caller.
    unsafe { device.copy(address, source, length, Direction::ToDevice, stream) }
}

fn queue_read(
    device: &dyn Device,
    stream: Stream,
    address: Address,
    bytes: &mut [u8],
) -> Result<()> {
    let (destination, length) = (bytes.as_mut_ptr() as u64, bytes.len() as u64);
    // SAFETY: as for `queue_write`.
    unsafe { device.copy(destination, address, length, Direction::ToHost, stream) }
}

fn queue_move(
    device: &dyn Device,
    stream: Stream,
    to: Address,
    from: Address,
    bytes: u64,
) -> Result<()> {
    // SAFETY: no host side.
    unsafe { device.copy(to, from, bytes, Direction::OnDevice, stream) }
}

fn write(device: &dyn Device, address: Address, bytes: &[u8]) {
    let stream = device.stream_create().unwrap();
    queue_write(device, stream, address, bytes).unwrap();
    device.stream_synchronize(stream).unwrap();
    device.stream_destroy(stream).unwrap();
}

fn read(device: &dyn Device, address: Address, length: u64) -> Vec<u8> {
    let mut bytes = vec![0xEE; length as usize];
    let stream = device.stream_create().unwrap();
    queue_read(device, stream, address, &mut bytes).unwrap();
    device.stream_synchronize(stream).unwrap();
    device.stream_destroy(stream).unwrap();
    bytes
}

fn fill(device: &dyn Device, address: Address, value: u8, bytes: u64) {
    let stream = device.stream_create().unwrap();
    device.fill(address, value, bytes, stream).unwrap();
    device.stream_synchronize(stream).unwrap();
    device.stream_destroy(stream).unwrap();
}

/// Bytes that differ from place to place and from seed to seed.
fn pattern(seed: u64, length: u64) -> Vec<u8> {
    (0..length)
        .map(|at| ((at ^ seed).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as u8)
        .collect()
}

fn describes_its_devices(platform: &Arc<dyn Platform>) {
    let count = platform.device_count();
    assert!(count >= 1);
    assert!(platform.current_device() < count);
    for ordinal in 0..count {
        let device = platform.device(ordinal).unwrap();
        let info = device.info();
        assert_eq!(info.kind, platform.kind());
        assert_eq!(info.ordinal, ordinal);
        assert!(!info.name.is_empty());
        assert!(info.granularity.is_power_of_two() && info.granularity >= 4096);
        assert_eq!(info.driver_version != 0, info.kind == DeviceKind::Cuda);
        assert!(
            info.peers
                .iter()
                .all(|&peer| peer < count && peer != ordinal)
        );
        let memory = device.memory().unwrap();
        assert!(memory.total > 0 && memory.free <= memory.total);
    }
    assert!(platform.device(count).is_err());
    assert!(platform.device(u32::MAX).is_err());
}

fn reserves_aligned_addresses_that_do_not_overlap(platform: &Arc<dyn Platform>) {
    let device = first(platform);
    let granule = device.info().granularity;
    let mut ranges: Vec<_> = (1..=8)
        .map(|granules| {
            let bytes = granules * granule;
            (device.reserve(bytes).unwrap(), bytes)
        })
        .collect();
    ranges.sort_unstable();
    assert!(ranges.iter().all(|(address, _)| address % granule == 0));
    assert!(ranges.windows(2).all(|two| two[0].0 + two[0].1 <= two[1].0));
    for (address, bytes) in ranges {
        device.unreserve(address, bytes).unwrap();
    }
}

fn maps_one_to_many_granules(platform: &Arc<dyn Platform>) {
    let device = first(platform);
    for granules in [1, 2, 3, 7, 16] {
        let region = Region::new(&device, granules);
        let (head, tail) = (pattern(1, 100), pattern(2, 100));
        write(&*device, region.address, &head);
        write(&*device, region.address + region.bytes - 100, &tail);
        assert_eq!(read(&*device, region.address, 100), head);
        let end = region.address + region.bytes;
        assert_eq!(read(&*device, end - 100, 100), tail);
    }
}

fn copies_any_size_at_any_offset(platform: &Arc<dyn Platform>) {
    let device = first(platform);
    let one = Region::new(&device, 6);
    let other = Region::new(&device, 6);
    let lengths = [1, 3, 63, 64, 65, 4095, 4097, MIB + 7, 9 * MIB + 13];
    for (seed, length) in (0..).zip(lengths) {
        for offset in [0, 1, 511, 4096 + 3] {
            let bytes = pattern(seed, length);
            write(&*device, one.address + offset, &bytes);
            let stream = device.stream_create().unwrap();
            let to = other.address + 2 * offset;
            queue_move(&*device, stream, to, one.address + offset, length).unwrap();
            device.stream_synchronize(stream).unwrap();
            device.stream_destroy(stream).unwrap();
            assert!(read(&*device, to, length) == bytes, "{length} at {offset}");
        }
    }
}

/// Two handles side by side in one reservation, accessible by one call.
fn neighbours(device: &Arc<dyn Device>) -> (Address, u64, [Physical; 2]) {
    let granule = device.info().granularity;
    let address = device.reserve(3 * granule).unwrap();
    let one = device.create(granule, CreateOptions::default()).unwrap();
    let two = device
        .create(2 * granule, CreateOptions::default())
        .unwrap();
    device.map(address, granule, one).unwrap();
    device.map(address + granule, 2 * granule, two).unwrap();
    device.set_access(address, 3 * granule, &[]).unwrap();
    (address, granule, [one, two])
}

fn copies_across_neighbouring_mappings(platform: &Arc<dyn Platform>) {
    let device = first(platform);
    let (address, granule, handles) = neighbours(&device);
    let bytes = pattern(5, 2000);
    write(&*device, address + granule - 999, &bytes);
    assert_eq!(read(&*device, address + granule - 999, 2000), bytes);
    fill(&*device, address + granule - 10, 9, 20);
    assert_eq!(read(&*device, address + granule - 10, 20), [9; 20]);
    device.unmap(address, granule).unwrap();
    device.unmap(address + granule, 2 * granule).unwrap();
    for handle in handles {
        device.release(handle).unwrap();
    }
    device.unreserve(address, 3 * granule).unwrap();
}

fn copies_of_nothing_do_nothing(platform: &Arc<dyn Platform>) {
    let device = first(platform);
    let region = Region::new(&device, 1);
    let stream = device.stream_create().unwrap();
    queue_write(&*device, stream, region.address, &[]).unwrap();
    queue_read(&*device, stream, region.address, &mut []).unwrap();
    device.stream_synchronize(stream).unwrap();
    device.stream_destroy(stream).unwrap();
}

fn fills_exactly_the_range(platform: &Arc<dyn Platform>) {
    let device = first(platform);
    let region = Region::new(&device, 5);
    fill(&*device, region.address, 1, region.bytes);
    let middle = region.bytes - 2 * 12_345;
    fill(&*device, region.address + 12_345, 0xFE, middle);
    let bytes = read(&*device, region.address, region.bytes);
    let end = bytes.len() - 12_345;
    assert!(bytes[..12_345].iter().all(|byte| *byte == 1));
    assert!(bytes[12_345..end].iter().all(|byte| *byte == 0xFE));
    assert!(bytes[end..].iter().all(|byte| *byte == 1));
}

fn work_of_a_stream_is_done_in_order(platform: &Arc<dyn Platform>) {
    let device = first(platform);
    let region = Region::new(&device, 1);
    let stream = device.stream_create().unwrap();
    let sources: Vec<[u8; 16]> = (0..250).map(|value| [value; 16]).collect();
    let mut results = vec![[0u8; 16]; sources.len()];
    let (a, b) = (region.address, region.address + 4096);
    for (source, result) in sources.iter().zip(&mut results) {
        // Each step reads what the one before wrote, and writes what the one before read.
        device.fill(a, 0xFF, 16, stream).unwrap();
        queue_write(&*device, stream, a, source).unwrap();
        queue_move(&*device, stream, b, a, 16).unwrap();
        queue_read(&*device, stream, b, result).unwrap();
    }
    device.stream_synchronize(stream).unwrap();
    assert_eq!(results, sources);
    device.stream_destroy(stream).unwrap();
}

fn an_event_orders_two_streams(platform: &Arc<dyn Platform>) {
    let device = first(platform);
    let region = Region::new(&device, 8);
    let (one, two) = (
        device.stream_create().unwrap(),
        device.stream_create().unwrap(),
    );
    let (there, back) = (
        device.event_create().unwrap(),
        device.event_create().unwrap(),
    );
    let last = region.address + region.bytes - 1;
    let mut seen = [[0u8; 1]; 40];
    for (value, seen) in (1..).zip(&mut seen) {
        device
            .fill(region.address, value, region.bytes, one)
            .unwrap();
        device.event_record(there, one).unwrap();
        device.stream_wait(two, there).unwrap();
        queue_read(&*device, two, last, seen).unwrap();
        device.event_record(back, two).unwrap();
        device.stream_wait(one, back).unwrap();
    }
    device.event_synchronize(back).unwrap();
    assert!(device.event_query(back).unwrap() && device.event_query(there).unwrap());
    assert!((1..).zip(seen).all(|(value, seen)| seen == [value]));
    for stream in [one, two] {
        device.stream_synchronize(stream).unwrap();
        device.stream_destroy(stream).unwrap();
    }
    for event in [there, back] {
        device.event_destroy(event).unwrap();
    }
}

fn an_event_without_a_record_is_done(platform: &Arc<dyn Platform>) {
    let device = first(platform);
    let event = device.event_create().unwrap();
    let stream = device.stream_create().unwrap();
    assert!(device.event_query(event).unwrap());
    device.event_synchronize(event).unwrap();
    device.stream_wait(stream, event).unwrap();
    device.stream_synchronize(stream).unwrap();
    device.stream_destroy(stream).unwrap();
    device.event_destroy(event).unwrap();
}

fn an_event_can_be_recorded_again(platform: &Arc<dyn Platform>) {
    let device = first(platform);
    let region = Region::new(&device, 4);
    let stream = device.stream_create().unwrap();
    let event = device.event_create().unwrap();
    for value in 1..=20 {
        let mut seen = [0u8; 1];
        device
            .fill(region.address, value, region.bytes, stream)
            .unwrap();
        let last = region.address + region.bytes - 1;
        queue_read(&*device, stream, last, &mut seen).unwrap();
        device.event_record(event, stream).unwrap();
        device.event_synchronize(event).unwrap();
        assert_eq!(seen, [value]);
    }
    device.event_destroy(event).unwrap();
    device.stream_destroy(stream).unwrap();
}

fn a_wait_is_for_the_record_made_before_it(platform: &Arc<dyn Platform>) {
    let device = first(platform);
    let region = Region::new(&device, 8);
    let (one, two) = (
        device.stream_create().unwrap(),
        device.stream_create().unwrap(),
    );
    let event = device.event_create().unwrap();
    let mut seen = [0u8; 1];
    device.fill(region.address, 1, region.bytes, one).unwrap();
    device.event_record(event, one).unwrap();
    device.stream_wait(two, event).unwrap();
    queue_read(&*device, two, region.address, &mut seen).unwrap();
    // An event destroyed with a wait queued still lets the wait pass.
    device.event_destroy(event).unwrap();
    device.stream_synchronize(two).unwrap();
    assert_eq!(seen, [1]);
    for stream in [one, two] {
        device.stream_synchronize(stream).unwrap();
        device.stream_destroy(stream).unwrap();
    }
}

fn a_destroyed_stream_still_does_its_work(platform: &Arc<dyn Platform>) {
    let device = first(platform);
    let region = Region::new(&device, 8);
    let stream = device.stream_create().unwrap();
    for value in 1..=50 {
        device
            .fill(region.address, value, region.bytes, stream)
            .unwrap();
    }
    device.stream_destroy(stream).unwrap();
    device.synchronize().unwrap();
    let bytes = read(&*device, region.address, region.bytes);
    assert!(bytes.iter().all(|byte| *byte == 50));
}

fn synchronize_waits_for_every_stream(platform: &Arc<dyn Platform>) {
    let device = first(platform);
    let region = Region::new(&device, 8);
    let granule = device.info().granularity;
    let streams: Vec<_> = (0..8).map(|_| device.stream_create().unwrap()).collect();
    let mut seen = [[0u8; 1]; 8];
    for ((at, stream), seen) in (0..).zip(&streams).zip(&mut seen) {
        let address = region.address + at * granule;
        for value in 0..20 {
            device.fill(address, value, granule, *stream).unwrap();
        }
        queue_read(&*device, *stream, address + granule - 1, seen).unwrap();
    }
    device.synchronize().unwrap();
    assert_eq!(seen, [[19u8; 1]; 8]);
    for stream in streams {
        device.stream_destroy(stream).unwrap();
    }
}

fn fresh_memory_is_zero(platform: &Arc<dyn Platform>) {
    let device = first(platform);
    for _ in 0..4 {
        let region = Region::new(&device, 4);
        let bytes = read(&*device, region.address, region.bytes);
        assert!(bytes.iter().all(|byte| *byte == 0));
        fill(&*device, region.address, 0xAB, region.bytes);
    }
}

fn contents_go_with_the_physical_memory(platform: &Arc<dyn Platform>) {
    let device = first(platform);
    let granule = device.info().granularity;
    let physical = device.create(granule, CreateOptions::default()).unwrap();
    let (one, two) = (
        device.reserve(granule).unwrap(),
        device.reserve(granule).unwrap(),
    );
    let bytes = pattern(8, granule);
    device.map(one, granule, physical).unwrap();
    device.set_access(one, granule, &[]).unwrap();
    write(&*device, one, &bytes);
    device.unmap(one, granule).unwrap();
    device.map(two, granule, physical).unwrap();
    device.set_access(two, granule, &[]).unwrap();
    assert!(read(&*device, two, granule) == bytes);
    device.unmap(two, granule).unwrap();
    device.release(physical).unwrap();
    device.unreserve(one, granule).unwrap();
    device.unreserve(two, granule).unwrap();
}

fn addresses_survive_their_memory(platform: &Arc<dyn Platform>) {
    let device = first(platform);
    let granule = device.info().granularity;
    let bytes = 4 * granule;
    let address = device.reserve(bytes).unwrap();
    for value in 1..=5 {
        let physical = device.create(bytes, CreateOptions::default()).unwrap();
        device.map(address, bytes, physical).unwrap();
        device.set_access(address, bytes, &[]).unwrap();
        assert_eq!(read(&*device, address, 3), [0; 3], "an old life shows");
        fill(&*device, address, value, bytes);
        assert_eq!(read(&*device, address + bytes - 1, 1), [value]);
        device.unmap(address, bytes).unwrap();
        device.release(physical).unwrap();
        // Nobody else is given the addresses meanwhile.
        let elsewhere = device.reserve(bytes).unwrap();
        assert!(elsewhere + bytes <= address || address + bytes <= elsewhere);
        device.unreserve(elsewhere, bytes).unwrap();
    }
    device.unreserve(address, bytes).unwrap();
}

fn a_released_handle_lives_while_it_is_mapped(platform: &Arc<dyn Platform>) {
    let device = first(platform);
    let granule = device.info().granularity;
    let address = device.reserve(granule).unwrap();
    let physical = device.create(granule, CreateOptions::default()).unwrap();
    device.map(address, granule, physical).unwrap();
    device.release(physical).unwrap();
    device.set_access(address, granule, &[]).unwrap();
    let bytes = pattern(3, granule);
    write(&*device, address, &bytes);
    assert!(read(&*device, address, granule) == bytes);
    device.unmap(address, granule).unwrap();
    device.unreserve(address, granule).unwrap();
}

fn unmaps_neighbours_in_one_call(platform: &Arc<dyn Platform>) {
    let device = first(platform);
    let (address, granule, handles) = neighbours(&device);
    write(&*device, address + granule - 1, &[1, 2]);
    device.unmap(address, 3 * granule).unwrap();
    for handle in handles {
        device.release(handle).unwrap();
    }
    // The addresses are free for one handle over all of them.
    let physical = device
        .create(3 * granule, CreateOptions::default())
        .unwrap();
    device.map(address, 3 * granule, physical).unwrap();
    device.set_access(address, 3 * granule, &[]).unwrap();
    assert_eq!(read(&*device, address + granule - 1, 2), [0, 0]);
    device.unmap(address, 3 * granule).unwrap();
    device.release(physical).unwrap();
    device.unreserve(address, 3 * granule).unwrap();
}

/// Maps `physical` a second time and checks that both addresses show the same bytes.
fn check_alias(region: &Region, physical: Physical) {
    let device = &region.device;
    let alias = device.reserve(region.bytes).unwrap();
    device.map(alias, region.bytes, physical).unwrap();
    device.set_access(alias, region.bytes, &[]).unwrap();
    let bytes = pattern(11, 5000);
    write(&**device, region.address + 77, &bytes);
    assert_eq!(read(&**device, alias + 77, 5000), bytes);
    fill(&**device, alias, 6, 100);
    assert_eq!(read(&**device, region.address, 100), [6; 100]);
    device.unmap(alias, region.bytes).unwrap();
    device.unreserve(alias, region.bytes).unwrap();
}

fn one_handle_maps_at_two_addresses(platform: &Arc<dyn Platform>) {
    let region = Region::new(&first(platform), 2);
    check_alias(&region, region.physical);
    assert_eq!(read(&*region.device, region.address, 100), [6; 100]);
}

fn exports_to_an_import_of_the_same_memory(platform: &Arc<dyn Platform>) {
    let device = first(platform);
    if !device.info().can_export {
        println!("{}: no export", platform.kind());
        return;
    }
    let region = Region::with(&device, 2, CreateOptions { exportable: true }, &[]);
    let descriptor = device.export(region.physical).unwrap();
    let imported = device.import(descriptor.as_fd(), region.bytes).unwrap();
    drop(descriptor);
    check_alias(&region, imported);
    device.release(imported).unwrap();
    assert_eq!(read(&*device, region.address, 100), [6; 100]);
}

fn exports_only_what_was_created_for_it(platform: &Arc<dyn Platform>) {
    let device = first(platform);
    let region = Region::new(&device, 1);
    assert!(device.export(region.physical).is_err());
}

/// Page-aligned host memory.
struct Pages {
    pointer: *mut u8,
    layout: std::alloc::Layout,
}

impl Pages {
    fn new(bytes: usize) -> Self {
        let layout = std::alloc::Layout::from_size_align(bytes, 4096).unwrap();
        // SAFETY: the size is not 0.
        let pointer = unsafe { std::alloc::alloc_zeroed(layout) };
        assert!(!pointer.is_null());
        Pages { pointer, layout }
    }

    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: allocated with that size and initialised; borrowed from self.
        unsafe { std::slice::from_raw_parts_mut(self.pointer, self.layout.size()) }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout.
        unsafe { std::alloc::dealloc(self.pointer, self.layout) };
    }
}

fn registers_host_memory(platform: &Arc<dyn Platform>) {
    let device = first(platform);
    let region = Region::new(&device, 1);
    let mut pages = Pages::new(4 << 20);
    let bytes = pattern(4, MIB);
    for _ in 0..2 {
        // SAFETY: `pages` outlives the registration.
        unsafe { device.register_host(pages.pointer, 4 << 20) }.unwrap();
        // SAFETY: as above; it must be refused.
        assert!(unsafe { device.register_host(pages.pointer, 4 << 20) }.is_err());
        pages.bytes()[..MIB as usize].copy_from_slice(&bytes);
        write(&*device, region.address, &pages.bytes()[..MIB as usize]);
        assert!(read(&*device, region.address, MIB) == bytes);
        // SAFETY: no copy is queued any more.
        unsafe { device.unregister_host(pages.pointer) }.unwrap();
        // SAFETY: as above; it must be refused.
        assert!(unsafe { device.unregister_host(pages.pointer) }.is_err());
    }
}

fn refuses_sizes_that_are_not_granules(platform: &Arc<dyn Platform>) {
    let device = first(platform);
    let granule = device.info().granularity;
    for bytes in [0, 1, granule - 1, granule + 1] {
        let error = device.create(bytes, CreateOptions::default()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{error}");
    }
    assert!(device.reserve(0).is_err());
}

fn refuses_to_map_over_a_mapping(platform: &Arc<dyn Platform>) {
    let device = first(platform);
    let granule = device.info().granularity;
    let region = Region::new(&device, 2);
    write(&*device, region.address, &[1, 2, 3]);
    let physical = device.create(granule, CreateOptions::default()).unwrap();
    assert!(device.map(region.address, granule, physical).is_err());
    assert_eq!(read(&*device, region.address, 3), [1, 2, 3]);
    device.release(physical).unwrap();
}

fn too_much_memory_is_an_error_that_passes(platform: &Arc<dyn Platform>) {
    let device = first(platform);
    let granule = device.info().granularity;
    let total = device.memory().unwrap().total.next_multiple_of(granule);
    for _ in 0..3 {
        let error = device
            .create(total + granule, CreateOptions::default())
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OutOfDeviceMemory, "{error}");
    }
    let region = Region::new(&device, 1);
    write(&*device, region.address, &[1]);
}

fn no_capture_is_active(platform: &Arc<dyn Platform>) {
    assert!(!first(platform).is_capturing(0).unwrap());
}

fn threads_share_a_device(platform: &Arc<dyn Platform>) {
    let device = first(platform);
    std::thread::scope(|scope| {
        for seed in 0..6 {
            let device = &device;
            scope.spawn(move || {
                for round in 0..5 {
                    let region = Region::new(device, 1 + seed % 3);
                    let bytes = pattern(seed * 100 + round, 300_000);
                    write(&**device, region.address + seed, &bytes);
                    assert!(read(&**device, region.address + seed, 300_000) == bytes);
                }
            });
        }
    });
}

fn devices_work_side_by_side(platform: &Arc<dyn Platform>) {
    let devices: Vec<_> = (0..platform.device_count().min(4))
        .map(|ordinal| platform.device(ordinal).unwrap())
        .collect();
    let regions: Vec<_> = devices.iter().map(|one| Region::new(one, 2)).collect();
    for (seed, region) in (0..).zip(&regions) {
        write(&*region.device, region.address, &pattern(seed, 1000));
    }
    for (seed, region) in (0..).zip(&regions) {
        let bytes = read(&*region.device, region.address, 1000);
        assert_eq!(bytes, pattern(seed, 1000));
    }
}

fn a_peer_with_access_reads_and_writes(platform: &Arc<dyn Platform>) {
    let device = first(platform);
    let Some(&ordinal) = device.info().peers.first() else {
        println!("{}: no peers", platform.kind());
        return;
    };
    let peer = platform.device(ordinal).unwrap();
    let region = Region::with(&device, 2, CreateOptions::default(), &[ordinal]);
    let own = Region::new(&peer, 2);
    let bytes = pattern(21, 100_000);
    write(&*device, region.address, &bytes);
    let stream = peer.stream_create().unwrap();
    let (to, from) = (own.address + 5, region.address);
    queue_move(&*peer, stream, to, from, 100_000).unwrap();
    peer.fill(region.address, 7, 10, stream).unwrap();
    peer.stream_synchronize(stream).unwrap();
    assert!(read(&*peer, to, 100_000) == bytes);
    assert_eq!(read(&*device, region.address, 10), [7; 10]);

    // An event of one device orders a stream of another.
    let event = peer.event_create().unwrap();
    let other = device.stream_create().unwrap();
    let mut seen = [0u8; 1];
    peer.fill(region.address, 8, region.bytes, stream).unwrap();
    peer.event_record(event, stream).unwrap();
    device.stream_wait(other, event).unwrap();
    let last = region.address + region.bytes - 1;
    queue_read(&*device, other, last, &mut seen).unwrap();
    device.stream_synchronize(other).unwrap();
    assert_eq!(seen, [8]);
    device.stream_destroy(other).unwrap();
    peer.event_destroy(event).unwrap();
    peer.stream_destroy(stream).unwrap();
}

fn free_memory_falls_and_rises(platform: &Arc<dyn Platform>) {
    let device = first(platform);
    let granule = device.info().granularity;
    let bytes = (128 * MIB).next_multiple_of(granule);
    // The driver keeps some memory for itself, and other processes may come and go.
    let near = 16 * MIB;
    let before = device.memory().unwrap().free;
    let region = Region::new(&device, bytes / granule);
    fill(&*device, region.address, 1, bytes);
    let during = device.memory().unwrap().free;
    assert!(during + bytes <= before + near, "{before} then {during}");
    drop(region);
    let after = device.memory().unwrap().free;
    assert!(after + near >= before, "{before} then {after}");
}

fn a_copy_without_memory_behind_it_is_an_error(platform: &Arc<dyn Platform>) {
    let device = first(platform);
    let granule = device.info().granularity;
    let address = device.reserve(granule).unwrap();
    let stream = device.stream_create().unwrap();
    let mut bytes = [5u8; 64];
    let read = queue_read(&*device, stream, address, &mut bytes)
        .and_then(|()| device.stream_synchronize(stream));
    assert!(read.is_err());
    // On a GPU the context may be lost now, so this one only must not crash.
    let write = queue_write(&*device, stream, address, &bytes)
        .and_then(|()| device.stream_synchronize(stream));
    assert!(write.is_err());
}

/// What only the host device promises.
mod host_only {
    use super::*;

    fn new(devices: u32, granules: u64) -> Arc<dyn Platform> {
        Arc::new(HostPlatform::new(devices, granules * 2 * MIB))
    }

    fn invalid<T: std::fmt::Debug>(result: Result<T>, named: &str) {
        let error = result.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{error}");
        let message = error.to_string();
        assert!(message.contains(&format!("{named}: ")), "{message}");
    }

    /// A number of kB in a file of `/proc/self`.
    fn kilobytes(file: &str, field: &str) -> u64 {
        let text = std::fs::read_to_string(format!("/proc/self/{file}")).unwrap();
        let line = text.lines().find(|line| line.starts_with(field)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    fn worker_threads() -> usize {
        std::fs::read_dir("/proc/self/task")
            .unwrap()
            .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok())
            .filter(|name| name.starts_with("tms-host-"))
            .count()
    }

    #[test]
    fn what_kernels_cannot_reach_is_an_error() {
        run(false, || {
            unreachable_memory_is_an_error_of_the_stream(&new(2, 16))
        });
    }

    #[test]
    fn the_budget_is_kept_and_the_message_says_so() {
        run(false, || {
            let platform = new(2, 4);
            let device = first(&platform);
            let handles: Vec<_> = (0..4)
                .map(|_| device.create(2 * MIB, CreateOptions::default()).unwrap())
                .collect();
            let error = device
                .create(2 * MIB, CreateOptions::default())
                .unwrap_err();
            assert_eq!(error.kind(), ErrorKind::OutOfDeviceMemory);
            let message = error.to_string();
            assert!(message.contains("2097152 bytes wanted, 0 free of 8388608"));
            let other = platform.device(1).unwrap();
            assert_eq!(other.memory().unwrap().free, 8 * MIB);
            for handle in handles {
                device.release(handle).unwrap();
            }
            assert_eq!(device.memory().unwrap().free, 8 * MIB);
        });
    }

    #[test]
    fn memory_counts_until_it_is_released_and_unmapped() {
        run(false, || {
            let platform = new(1, 8);
            let device = first(&platform);
            let free = || device.memory().unwrap().free;
            for exportable in [false, true] {
                let options = CreateOptions { exportable };
                let address = device.reserve(4 * MIB).unwrap();
                let physical = device.create(4 * MIB, options).unwrap();
                device.map(address, 4 * MIB, physical).unwrap();
                device.release(physical).unwrap();
                assert_eq!(free(), 12 * MIB);
                device.unmap(address, 4 * MIB).unwrap();
                assert_eq!(free(), 16 * MIB);

                let physical = device.create(4 * MIB, options).unwrap();
                device.map(address, 4 * MIB, physical).unwrap();
                device.unmap(address, 4 * MIB).unwrap();
                assert_eq!(free(), 12 * MIB);
                device.release(physical).unwrap();
                assert_eq!(free(), 16 * MIB);
                device.unreserve(address, 4 * MIB).unwrap();
            }
        });
    }

    #[test]
    fn imported_memory_counts_once_and_until_its_last_holder() {
        run(false, || {
            let platform = new(1, 4);
            let device = first(&platform);
            let options = CreateOptions { exportable: true };
            let physical = device.create(4 * MIB, options).unwrap();
            let descriptor = device.export(physical).unwrap();
            let imported = device.import(descriptor.as_fd(), 4 * MIB).unwrap();
            assert_eq!(device.memory().unwrap().free, 4 * MIB);
            device.release(physical).unwrap();
            assert_eq!(device.memory().unwrap().free, 4 * MIB);
            device.release(imported).unwrap();
            assert_eq!(device.memory().unwrap().free, 8 * MIB);

            invalid(device.import(descriptor.as_fd(), 2 * MIB), "bytes");
            let file = std::fs::File::open("/proc/self/exe").unwrap();
            invalid(device.import(file.as_fd(), 2 * MIB), "descriptor");
        });
    }

    #[test]
    fn released_memory_goes_back_to_the_system() {
        run(true, || {
            let platform = new(1, 64);
            let device = first(&platform);
            let resident = || kilobytes("status", "RssShmem:") >> 10;
            for exportable in [false, true] {
                let before = resident();
                let region = Region::with(&device, 48, CreateOptions { exportable }, &[]);
                fill(&*device, region.address, 1, region.bytes);
                let during = resident();
                assert!(during >= before + 90, "{before} then {during} MiB");
                drop(region);
                let after = resident();
                assert!(after <= before + 5, "{before} then {after} MiB");
            }
        });
    }

    /// A forked child keeps its mappings of private memory; the pages go all the same.
    #[test]
    fn memory_goes_even_while_a_forked_child_maps_it() {
        run(true, || {
            let platform = new(1, 64);
            let device = first(&platform);
            let region = Region::new(&device, 48);
            fill(&*device, region.address, 1, region.bytes);
            // SAFETY: the child only waits to be killed.
            let child = unsafe { libc::fork() };
            if child == 0 {
                loop {
                    // SAFETY: async-signal-safe.
                    unsafe { libc::pause() };
                }
            }
            let system = || kilobytes("../meminfo", "Shmem:") >> 10;
            let during = system();
            drop(region);
            let after = system();
            // SAFETY: our own child, not waited for yet.
            unsafe {
                libc::kill(child, libc::SIGKILL);
                libc::waitpid(child, std::ptr::null_mut(), 0);
            }
            assert!(after + 64 <= during, "{during} then {after} MiB");
        });
    }

    #[test]
    fn private_memory_takes_no_descriptor_each() {
        run(true, || {
            let platform = new(1, 3000);
            let device = first(&platform);
            // Of memory only: a driver opens files of its own when it likes.
            let is_memory = |entry: &std::fs::DirEntry| {
                std::fs::read_link(entry.path())
                    .is_ok_and(|target| target.to_string_lossy().contains("memfd:"))
            };
            let open = || {
                let entries = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
                entries.filter(is_memory).count()
            };
            let before = open();
            let handles: Vec<_> = (0..3000)
                .map(|_| device.create(2 * MIB, CreateOptions::default()).unwrap())
                .collect();
            assert!(open() <= before + 1);
            for handle in handles {
                device.release(handle).unwrap();
            }
        });
    }

    #[test]
    fn misuse_names_the_argument_and_changes_nothing() {
        run(false, || {
            let platform = new(2, 16);
            let device = first(&platform);
            let default = CreateOptions::default();
            let region = Region::new(&device, 2);
            let (at, g) = (region.address, 2 * MIB);
            write(&*device, at, &[1, 2, 3]);
            let spare = device.create(g, default).unwrap();
            let empty = device.reserve(4 * g).unwrap();
            let before = device.memory().unwrap();

            invalid(device.unreserve(at, 2 * g), "address");
            invalid(device.unreserve(empty, g), "bytes");
            invalid(device.unreserve(empty + g, g), "address");
            invalid(device.unreserve(empty, 0), "bytes");
            invalid(device.release(Physical(u64::MAX)), "physical");
            invalid(device.map(empty, g, Physical(0)), "physical");
            invalid(device.map(empty, 2 * g, spare), "bytes");
            invalid(device.map(empty + 4096, g, spare), "address");
            invalid(device.map(empty + 4 * g, g, spare), "address");
            invalid(device.map(at + g, g, spare), "address");
            invalid(device.map(0, g, spare), "address");
            invalid(device.map(u64::MAX - g + 1, g, spare), "bytes");
            invalid(device.unmap(at, g), "address");
            invalid(device.unmap(at + g, g), "address");
            invalid(device.unmap(empty, g), "address");
            invalid(device.set_access(empty, g, &[]), "address");
            invalid(device.set_access(at, g, &[]), "address");
            invalid(device.set_access(at, 2 * g, &[2]), "peers");
            invalid(device.export(spare), "physical");
            invalid(device.reserve(g + 1), "bytes");
            invalid(device.reserve(u64::MAX - g + 1), "bytes");

            device.map(empty, g, spare).unwrap();
            invalid(device.unmap(empty, 2 * g), "address");
            device.unmap(empty, g).unwrap();
            assert_eq!(device.memory().unwrap(), before);
            assert_eq!(read(&*device, at, 3), [1, 2, 3]);
            device.release(spare).unwrap();
            invalid(device.release(spare), "physical");
            invalid(device.map(empty, g, spare), "physical");
            device.unreserve(empty, 4 * g).unwrap();
            invalid(device.unreserve(empty, 4 * g), "address");
        });
    }

    #[test]
    fn streams_and_events_are_known_by_their_device() {
        run(false, || {
            let platform = new(2, 4);
            let device = first(&platform);
            let other = platform.device(1).unwrap();
            let stream = device.stream_create().unwrap();
            let event = device.event_create().unwrap();
            invalid(other.stream_synchronize(stream), "stream");
            invalid(other.event_record(event, stream), "stream");
            let foreign = other.event_create().unwrap();
            invalid(device.event_record(foreign, stream), "event");
            device.stream_destroy(stream).unwrap();
            device.event_destroy(event).unwrap();
            invalid(device.stream_destroy(stream), "stream");
            invalid(device.stream_synchronize(stream), "stream");
            invalid(device.stream_wait(stream, foreign), "stream");
            invalid(device.event_record(foreign, stream), "stream");
            invalid(queue_write(&*device, stream, 0, &[]), "stream");
            invalid(device.fill(0, 0, 0, stream), "stream");
            invalid(device.event_query(event), "event");
            invalid(device.event_synchronize(event), "event");
            invalid(device.event_destroy(event), "event");
            let (new_stream, new_event) = (
                device.stream_create().unwrap(),
                device.event_create().unwrap(),
            );
            invalid(device.stream_wait(new_stream, event), "event");
            assert!(new_stream != stream && new_event != event);
        });
    }

    #[test]
    fn a_copy_against_its_direction_is_refused() {
        run(false, || {
            let platform = new(1, 8);
            let device = first(&platform);
            let region = Region::new(&device, 1);
            let stream = device.stream_create().unwrap();
            let mut host = [0u8; 16];
            let on_host = host.as_mut_ptr() as u64;
            let at = region.address;
            let end = at + region.bytes;
            for (to, from, direction, named) in [
                (on_host, at, Direction::ToDevice, "destination"),
                (on_host, on_host, Direction::ToHost, "source"),
                (on_host, at, Direction::OnDevice, "destination"),
                (at, on_host, Direction::OnDevice, "source"),
                (at, at, Direction::ToDevice, "source"),
                (at, at, Direction::ToHost, "destination"),
                (end - 8, on_host, Direction::ToDevice, "destination"),
                (at - 8, on_host, Direction::ToDevice, "destination"),
                (u64::MAX - 8, on_host, Direction::ToDevice, "bytes"),
            ] {
                // SAFETY: `host` holds 16 bytes and outlives the stream's work.
                let result = unsafe { device.copy(to, from, 16, direction, stream) };
                invalid(result, named);
            }
            invalid(device.fill(on_host, 1, 16, stream), "address");
            device.stream_synchronize(stream).unwrap();
        });
    }

    #[test]
    fn an_error_of_queued_work_stays_until_it_is_asked_for() {
        run(false, || {
            let platform = new(2, 8);
            let device = first(&platform);
            let region = Region::new(&device, 1);
            let address = device.reserve(4 * MIB).unwrap();
            let stream = device.stream_create().unwrap();
            let event = device.event_create().unwrap();
            device.fill(address + 4096, 1, 10, stream).unwrap();
            device.fill(address + 8192, 1, 10, stream).unwrap();
            device.fill(region.address, 4, 10, stream).unwrap();
            device.event_record(event, stream).unwrap();
            // The device only waits; the error belongs to the stream.
            device.synchronize().unwrap();
            assert!(device.event_query(event).is_err());
            assert!(device.event_synchronize(event).is_err());
            let error = device.stream_synchronize(stream).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Device);
            let first_address = format!("{:#x}", address + 4096);
            assert!(error.to_string().contains(&first_address), "{error}");
            device.stream_synchronize(stream).unwrap();
            // Work after the error was done all the same.
            assert_eq!(read(&*device, region.address, 10), [4; 10]);
            device.event_record(event, stream).unwrap();
            device.event_synchronize(event).unwrap();
            device.unreserve(address, 4 * MIB).unwrap();
        });
    }

    #[test]
    fn memory_without_access_or_released_is_not_touched() {
        run(false, || {
            let platform = new(2, 8);
            let device = first(&platform);
            let peer = platform.device(1).unwrap();
            let address = device.reserve(2 * MIB).unwrap();
            let physical = device.create(2 * MIB, CreateOptions::default()).unwrap();
            let stream = device.stream_create().unwrap();
            let fails = |device: &Arc<dyn Device>, stream| {
                device.fill(address, 1, 1, stream).unwrap();
                let error = device.stream_synchronize(stream).unwrap_err();
                assert!(error.to_string().contains(&format!("{address:#x}")));
            };
            fails(&device, stream);
            device.map(address, 2 * MIB, physical).unwrap();
            fails(&device, stream);
            device.set_access(address, 2 * MIB, &[]).unwrap();
            fill(&*device, address, 1, 1);
            let peer_stream = peer.stream_create().unwrap();
            fails(&peer, peer_stream);
            device.set_access(address, 2 * MIB, &[1]).unwrap();
            fill(&*peer, address, 2, 1);
            fill(&*device, address, 2, 1);
            device.unmap(address, 2 * MIB).unwrap();
            device.release(physical).unwrap();
            fails(&device, stream);
            device.unreserve(address, 2 * MIB).unwrap();
            invalid(device.fill(address, 1, 1, stream), "address");
        });
    }

    #[test]
    fn a_range_under_a_running_copy_is_not_unmapped() {
        run(false, || {
            let platform = new(1, 256);
            let device = first(&platform);
            let stream = device.stream_create().unwrap();
            let bytes = 256 * MIB;
            let address = device.reserve(bytes).unwrap();
            let mut refused = false;
            for _ in 0..20 {
                let physical = device.create(bytes, CreateOptions::default()).unwrap();
                device.map(address, bytes, physical).unwrap();
                device.set_access(address, bytes, &[]).unwrap();
                device.release(physical).unwrap();
                device.fill(address, 1, bytes, stream).unwrap();
                // SAFETY: on the host device an accessible device address is a host address.
                while unsafe { (address as *const u8).read_volatile() } == 0 {
                    std::hint::spin_loop();
                }
                let result = device.unmap(address, bytes);
                device.stream_synchronize(stream).unwrap();
                if let Err(error) = result {
                    assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
                    device.unmap(address, bytes).unwrap();
                    refused = true;
                    break;
                }
            }
            assert!(refused, "no copy was ever seen running");
            device.unreserve(address, bytes).unwrap();
        });
    }

    #[test]
    fn parked_streams_wait_and_hold_up_nobody() {
        run(false, || {
            let platform = new(1, 128);
            let device = first(&platform);
            let region = Region::new(&device, 64);
            let busy = device.stream_create().unwrap();
            let event = device.event_create().unwrap();
            let mut waited_for = false;
            for _ in 0..5 {
                for value in 0..20 {
                    device
                        .fill(region.address, value, region.bytes, busy)
                        .unwrap();
                }
                device.event_record(event, busy).unwrap();
                let source = [7u8; 1];
                let mut results = [[0u8; 1]; 12];
                // More streams than there are threads.
                let parked: Vec<_> = (0..12).map(|_| device.stream_create().unwrap()).collect();
                for (stream, result) in parked.iter().zip(&mut results) {
                    device.stream_wait(*stream, event).unwrap();
                    queue_write(&*device, *stream, region.address, &source).unwrap();
                    queue_read(&*device, *stream, region.address, result).unwrap();
                }
                let free = device.stream_create().unwrap();
                device.stream_synchronize(free).unwrap();
                std::thread::sleep(Duration::from_millis(2));
                let seen: Vec<_> = results
                    .iter()
                    // SAFETY: a byte of a live array, which a worker may write meanwhile.
                    .map(|result| unsafe { result.as_ptr().read_volatile() })
                    .collect();
                // Asked after looking: if it has not fired now, it had not fired then.
                if !device.event_query(event).unwrap() {
                    assert!(seen.iter().all(|byte| *byte == 0));
                    waited_for = true;
                }
                device.synchronize().unwrap();
                assert_eq!(results, [[7]; 12]);
                for stream in parked.into_iter().chain([free]) {
                    device.stream_destroy(stream).unwrap();
                }
            }
            assert!(waited_for, "the event had always fired");
        });
    }

    #[test]
    fn a_free_stream_overtakes_parked_ones() {
        run(false, || {
            let platform = new(1, 128);
            let device = first(&platform);
            let region = Region::new(&device, 64);
            let small = Region::new(&device, 1);
            let busy = device.stream_create().unwrap();
            let event = device.event_create().unwrap();
            let parked: Vec<_> = (0..12).map(|_| device.stream_create().unwrap()).collect();
            let free = device.stream_create().unwrap();
            // How the system shares the cores is its own affair, so not every time.
            let overtakes = || {
                for value in 0..40 {
                    device
                        .fill(region.address, value, region.bytes, busy)
                        .unwrap();
                }
                device.event_record(event, busy).unwrap();
                for stream in &parked {
                    device.stream_wait(*stream, event).unwrap();
                    device.fill(small.address, 1, 1, *stream).unwrap();
                }
                device.fill(small.address + 1, 1, 1, free).unwrap();
                device.stream_synchronize(free).unwrap();
                let overtook = !device.event_query(event).unwrap();
                device.synchronize().unwrap();
                overtook
            };
            assert!((0..20).any(|_| overtakes()), "it always came last");
        });
    }

    #[test]
    fn threads_start_on_first_need_and_stop_on_drop() {
        run(true, || {
            let before = worker_threads();
            let platform = new(1, 64);
            let device = first(&platform);
            let region = Region::new(&device, 32);
            let stream = device.stream_create().unwrap();
            assert_eq!(worker_threads(), before);
            device
                .fill(region.address, 1, region.bytes, stream)
                .unwrap();
            device.stream_synchronize(stream).unwrap();
            assert!(worker_threads() > before);
            for _ in 0..100 {
                let streams: Vec<_> = (0..10).map(|_| device.stream_create().unwrap()).collect();
                for stream in streams {
                    device.fill(region.address, 1, 4096, stream).unwrap();
                    device.stream_destroy(stream).unwrap();
                }
            }
            assert!(worker_threads() <= before + 4);
            drop(region);
            drop(device);
            assert!(worker_threads() > before);
            drop(platform);
            // A joined thread may still be listed for a moment.
            let deadline = Instant::now() + Duration::from_secs(5);
            while worker_threads() > before && Instant::now() < deadline {
                std::thread::yield_now();
            }
            assert_eq!(worker_threads(), before);
        });
    }

    /// Dropping a platform with memory mapped and work queued frees all of it, soon.
    #[test]
    fn a_dropped_platform_leaves_nothing() {
        run(true, || {
            let resident = kilobytes("status", "RssShmem:");
            let platform = new(1, 128);
            let device = first(&platform);
            let bytes = 128 * MIB;
            let address = device.reserve(bytes).unwrap();
            let physical = device.create(bytes, CreateOptions::default()).unwrap();
            device.map(address, bytes, physical).unwrap();
            device.set_access(address, bytes, &[]).unwrap();
            let stream = device.stream_create().unwrap();
            for value in 0..255 {
                device.fill(address, value, bytes, stream).unwrap();
            }
            drop((platform, device));
            assert!(kilobytes("status", "RssShmem:") <= resident + 4096);
            let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
            assert!(!maps.contains("memfd:tms-host"), "{maps}");
        });
    }

    #[test]
    fn knows_registered_host_memory() {
        run(false, || {
            let host = HostPlatform::new(2, 64 * MIB);
            let device = host.device(0).unwrap();
            let region = Region::new(&device, 1);
            let pages = Pages::new(16 * 4096);
            let at = |page: usize| pages.pointer.wrapping_add(page * 4096);
            // SAFETY: `pages` outlives the registrations; nothing is queued.
            let register = |pointer, bytes| unsafe { device.register_host(pointer, bytes) };
            register(at(4), 4 * 4096).unwrap();
            assert!(host.is_registered(at(4)) && host.is_registered(at(8).wrapping_sub(1)));
            assert!(!host.is_registered(at(8)) && !host.is_registered(at(4).wrapping_sub(1)));
            for (page, pages) in [(0, 5), (4, 4), (5, 1), (7, 3), (0, 16)] {
                invalid(register(at(page), pages * 4096), "pointer");
            }
            invalid(register(at(9).wrapping_add(8), 4096), "pointer");
            invalid(register(std::ptr::null_mut(), 4096), "pointer");
            invalid(register(at(9), 4095), "bytes");
            invalid(register(at(9), 0), "bytes");
            invalid(register(region.address as *mut u8, 4096), "pointer");
            register(at(8), 4096).unwrap();
            register(at(3), 4096).unwrap();
            // SAFETY: nothing is queued.
            let unregister = |pointer| unsafe { device.unregister_host(pointer) };
            invalid(unregister(at(5)), "pointer");
            for page in [3, 4, 8] {
                unregister(at(page)).unwrap();
                assert!(!host.is_registered(at(page)));
            }
        });
    }

    #[test]
    fn a_forked_child_gets_a_status() {
        run(false, || {
            let platform = new(1, 8);
            let device = first(&platform);
            let region = Region::new(&device, 1);
            let stream = device.stream_create().unwrap();
            device.fill(region.address, 1, 100, stream).unwrap();
            device.stream_synchronize(stream).unwrap();
            // SAFETY: the child only makes calls that return at once, and leaves by `_exit`.
            let child = unsafe { libc::fork() };
            if child == 0 {
                let forked = |result: Result<()>| match result {
                    Err(error) => error.kind() == ErrorKind::Forked,
                    Ok(()) => false,
                };
                let all = forked(device.synchronize())
                    && forked(device.stream_synchronize(stream))
                    && forked(device.fill(region.address, 1, 1, stream))
                    && forked(device.memory().map(drop))
                    && forked(device.unmap(region.address, region.bytes));
                // SAFETY: ends the child without destructors.
                unsafe { libc::_exit(if all { 0 } else { 1 }) };
            }
            let mut status = 0;
            // SAFETY: waits for our own child.
            unsafe { libc::waitpid(child, &mut status, 0) };
            assert_eq!(status, 0);
            assert_eq!(read(&*device, region.address, 100), [1; 100]);
        });
    }

    fn first_again(device: &dyn Device) -> Physical {
        device.create(2 * MIB, CreateOptions::default()).unwrap()
    }

    /// The kernel limits the mappings of a process. The call that meets the limit changes nothing.
    #[test]
    fn a_call_that_the_kernel_refuses_changes_nothing() {
        if std::env::var_os(CHILD).is_none() {
            let test = "host_only::a_call_that_the_kernel_refuses_changes_nothing";
            let output = rerun(test, &[]);
            assert!(output.status.success(), "{output:?}");
            return;
        }
        const MOST: u64 = 100_000;
        let platform = new(1, MOST);
        let device = first(&platform);
        let granule = 2 * MIB;
        let start = device.reserve(2 * MOST * granule).unwrap();
        // With a gap after each, so that the kernel cannot join them.
        let place = |number: u64| start + 2 * number * granule;
        let mut mapped = 0;
        let failed = loop {
            let physical = device.create(granule, CreateOptions::default()).unwrap();
            let result = device
                .map(place(mapped), granule, physical)
                .and_then(|()| device.set_access(place(mapped), granule, &[]));
            match result {
                Ok(()) => device.release(physical).unwrap(),
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::OutOfHostMemory, "{error}");
                    break physical;
                }
            }
            mapped += 1;
            if mapped == MOST {
                println!("no limit found");
                return;
            }
        };
        // Where even the undo was refused, nobody may use the reservation any more, and every call
        // says so: that is the other right answer.
        if let Err(error) = device.unmap(place(0), granule) {
            assert_eq!(error.kind(), ErrorKind::Device, "{error}");
            assert!(device.unmap(place(1), granule).is_err());
            return;
        }
        device
            .map(place(0), granule, first_again(&*device))
            .unwrap();
        // SAFETY: asks only whether the range is mapped at all.
        let kept = unsafe { libc::msync(place(mapped) as *mut _, granule as usize, 1) };
        assert_eq!(kept, 0, "a hole was left");
        let used = device.memory().unwrap();
        assert_eq!(used.total - used.free, (mapped + 1) * granule);
        for number in 0..mapped {
            device.unmap(place(number), granule).unwrap();
        }
        device.map(place(mapped), granule, failed).unwrap();
        device.set_access(place(mapped), granule, &[]).unwrap();
        write(&*device, place(mapped), &[1, 2, 3]);
        assert_eq!(read(&*device, place(mapped), 3), [1, 2, 3]);
    }

    /// `exit` while one thread waits and another works ends the process, soon and cleanly.
    #[test]
    fn exit_waits_for_nobody() {
        if std::env::var_os(CHILD).is_none() {
            let begin = Instant::now();
            let output = rerun("host_only::exit_waits_for_nobody", &[]);
            assert_eq!(output.status.code(), Some(42), "{output:?}");
            assert!(begin.elapsed() < Duration::from_secs(20));
            return;
        }
        static WAITING: AtomicBool = AtomicBool::new(false);
        let platform = new(1, 128);
        let device = first(&platform);
        let region = Region::new(&device, 128);
        let stream = device.stream_create().unwrap();
        for _ in 0..10_000 {
            device
                .fill(region.address, 1, region.bytes, stream)
                .unwrap();
        }
        std::thread::spawn(move || {
            WAITING.store(true, Ordering::Release);
            let _ = device.synchronize();
        });
        while !WAITING.load(Ordering::Acquire) {
            std::thread::yield_now();
        }
        std::process::exit(42);
    }

    #[test]
    fn the_environment_sets_count_and_budget() {
        if std::env::var_os(CHILD).is_none() {
            let settings = [
                ("TMS_HOST_DEVICES", "3"),
                ("TMS_HOST_DEVICE_MEMORY", "0.5GB"),
            ];
            let test = "host_only::the_environment_sets_count_and_budget";
            let output = rerun(test, &settings);
            assert!(output.status.success(), "{output:?}");
            return;
        }
        let platform = device::open("host").unwrap();
        assert_eq!(platform.device_count(), 3);
        let memory = platform.device(2).unwrap().memory().unwrap();
        assert_eq!((memory.free, memory.total), (512 * MIB, 512 * MIB));
    }
}
