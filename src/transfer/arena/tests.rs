//! Tests of the books that the arena keeps, on the host device.

use super::idle::PRESSURE;
use super::*;
use crate::device::Platform;
use crate::device::host::HostPlatform;
use crate::op::Control;
use crate::transfer::pages::PAGE;

use std::sync::atomic::AtomicUsize;

const MIB: u64 = 1 << 20;
const PLENTY: u64 = 1 << 40;

fn arena_with(
    limit: u64,
    keep: u64,
    left: impl Fn() -> Option<u64> + Send + Sync + 'static,
) -> (Arena, Arc<dyn Device>) {
    let platform: Arc<dyn Platform> = Arc::new(HostPlatform::new(1, 1 << 30));
    let device = platform.device(0).unwrap();
    let headroom = Headroom::from_fn(left);
    let workers = Arc::new(Workers::new(2));
    let arena = Arena::with_headroom(workers, limit, keep, headroom);
    (arena, device)
}

fn arena(limit: u64, keep: u64) -> (Arena, Arc<dyn Device>) {
    arena_with(limit, keep, || Some(PLENTY))
}

/// A host that has plenty for the first `times` questions, and nothing afterwards.
fn plenty_for(times: usize) -> impl Fn() -> Option<u64> + Send + Sync + 'static {
    let asked = AtomicUsize::new(0);
    move || {
        let before = asked.fetch_add(1, Ordering::SeqCst) < times;
        Some(if before { PLENTY } else { 0 })
    }
}

/// Pages of the block that are present.
fn present(block: &Block) -> usize {
    let mut pages = vec![0u8; block.bytes() / PAGE];
    // SAFETY: the block is mapped, and there is a byte for each of its pages.
    let result = unsafe {
        libc::mincore(
            block.pointer().as_ptr().cast(),
            block.bytes(),
            pages.as_mut_ptr(),
        )
    };
    assert_eq!(result, 0);
    pages.into_iter().filter(|page| page & 1 != 0).count()
}

#[test]
fn threads_that_grow_at_once_stay_within_the_limit() {
    let both = std::sync::Barrier::new(2);
    let asked = AtomicUsize::new(0);
    // Each has looked at the limit when it comes here for the first time.
    let (arena, device) = arena_with(3 * MIB, 0, move || {
        if asked.fetch_add(1, Ordering::SeqCst) < 2 {
            both.wait();
        }
        Some(PLENTY)
    });
    let allocate = || arena.try_allocate(&device, &[2 * MIB]);
    let results = std::thread::scope(|scope| {
        [scope.spawn(allocate), scope.spawn(allocate)].map(|thread| thread.join().unwrap())
    });
    let refused: Vec<_> = results
        .iter()
        .filter_map(|one| one.as_ref().err())
        .collect();
    assert_eq!(refused.len(), 1);
    assert_eq!(refused[0].kind(), ErrorKind::OutOfHostMemory);
    assert_eq!(arena.stats().high_water, 2 * MIB);
    let headroom = || arena.headroom() == Some(PLENTY);
    drop(results);
    while !headroom() {
        std::thread::yield_now();
    }
}

fn until_pinned_is(arena: &Arena, bytes: u64) {
    while arena.usage().pinned != bytes {
        std::thread::yield_now();
    }
}

fn ready(blocks: &[Block]) {
    for block in blocks {
        block.wait().unwrap();
    }
}

#[test]
fn small_blocks_share_a_chunk_and_large_ones_do_not() {
    let (arena, device) = arena(u64::MAX, u64::MAX);
    let blocks = arena
        .allocate(&device, &[2 * MIB, 2 * MIB, 130 * MIB, 2 * MIB])
        .unwrap();
    ready(&blocks);
    let at = |index: usize| blocks[index].pointer().as_ptr() as usize;
    assert_eq!(at(1) - at(0), 2 * MIB as usize);
    assert_eq!(arena.usage().used, 136 * MIB);
    assert_eq!(lock(&arena.inner).chunks.len(), 3);
    // Memory that was given back is used again.
    drop(blocks);
    let pinned = arena.usage().pinned;
    ready(&arena.allocate(&device, &[130 * MIB]).unwrap());
    assert_eq!(arena.usage().pinned, pinned);
}

#[test]
fn a_refusal_touches_nothing() {
    let (arena, device) = arena(100 * MIB, u64::MAX);
    let refused = arena.allocate(&device, &[80 * MIB, 80 * MIB]);
    assert_eq!(refused.err().unwrap().kind(), ErrorKind::OutOfHostMemory);
    assert_eq!(arena.usage(), ArenaUse::default());
}

#[test]
fn idle_memory_makes_room() {
    let (arena, device) = arena(100 * MIB, u64::MAX);
    let blocks = arena.allocate(&device, &[70 * MIB]).unwrap();
    ready(&blocks);
    drop(blocks);
    ready(&arena.allocate(&device, &[90 * MIB]).unwrap());
    assert_eq!(arena.usage().pinned, 90 * MIB);
}

#[test]
fn blocks_given_back_while_they_grow_are_not_kept_beyond_the_limit() {
    let (arena, device) = arena(u64::MAX, 0);
    drop(arena.allocate(&device, &[130 * MIB]).unwrap());
    until_pinned_is(&arena, 0);
}

#[test]
fn released_at_once_means_unregistered() {
    let (arena, device) = arena(u64::MAX, u64::MAX);
    let mut blocks = arena.allocate(&device, &[2 * MIB, 2 * MIB]).unwrap();
    ready(&blocks);
    let pointer = blocks[0].pointer().as_ptr() as usize;
    blocks.pop().unwrap().release_now();
    assert!(arena.contains(pointer));
    blocks.pop().unwrap().release_now();
    assert!(!arena.contains(pointer));
    assert_eq!(arena.usage().pinned, 0);
}

#[test]
fn a_block_alone_shares_nothing() {
    let (arena, device) = arena(u64::MAX, u64::MAX);
    drop(arena.allocate(&device, &[200 * MIB]).unwrap());
    let ring = arena.allocate_alone(&device, 64 * MIB).unwrap();
    let other = arena
        .allocate(&device, &[100 * MIB])
        .unwrap()
        .pop()
        .unwrap();
    other.wait().unwrap();
    let pointer = other.pointer().as_ptr() as usize;
    other.release_now();
    assert!(!arena.contains(pointer));
    ring.wait().unwrap();
}

#[test]
fn what_the_host_does_not_have_is_refused_before_it_is_mapped() {
    let (arena, device) = arena_with(u64::MAX, u64::MAX, || Some(100 * MIB));
    let refused = arena.allocate(&device, &[80 * MIB, 80 * MIB]);
    let error = refused.err().unwrap();
    assert_eq!(error.kind(), ErrorKind::OutOfHostMemory);
    assert!(
        error.to_string().contains("only 104857600 bytes"),
        "{error}"
    );
    assert_eq!(arena.stats().high_water, 0);
    assert_eq!(arena.headroom(), Some(100 * MIB));
    ready(&arena.allocate(&device, &[80 * MIB]).unwrap());
}

#[test]
fn memory_that_others_took_meanwhile_is_refused_before_it_is_touched() {
    // One question for all, one for the first chunk, and then there is nothing left.
    let (arena, device) = arena_with(u64::MAX, u64::MAX, plenty_for(2));
    let blocks = arena
        .allocate(&device, &[70 * MIB, 80 * MIB, 90 * MIB])
        .unwrap();
    blocks[0].wait().unwrap();
    assert_eq!(present(&blocks[0]), blocks[0].bytes() / PAGE);
    for block in &blocks[1..] {
        let error = block.wait().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OutOfHostMemory);
        assert_eq!(present(block), 0);
        assert!(!arena.contains(block.pointer().as_ptr() as usize));
    }
    // Nothing of the refused ones stays promised or pinned, and nothing idle is kept.
    drop(blocks);
    until_pinned_is(&arena, 0);
    assert_eq!(arena.inner.promised.load(Ordering::SeqCst), 0);
}

#[test]
fn idle_memory_goes_before_a_chunk_is_refused_late() {
    let left = Arc::new(AtomicU64::new(PLENTY));
    let (told, first) = (Arc::clone(&left), Arc::new(AtomicUsize::new(0)));
    let asked = Arc::clone(&first);
    let (arena, device) = arena_with(u64::MAX, u64::MAX, move || {
        // The second question after the change finds what the idle chunk gave back.
        let now = told.load(Ordering::SeqCst);
        let nth = asked.fetch_add(1, Ordering::SeqCst);
        Some(if now == 0 && nth != 1 { PLENTY } else { now })
    });
    let idle = arena.allocate(&device, &[70 * MIB]).unwrap();
    ready(&idle);
    drop(idle);
    first.store(0, Ordering::SeqCst);
    left.store(0, Ordering::SeqCst);
    ready(&arena.allocate(&device, &[90 * MIB]).unwrap());
    assert_eq!(arena.usage().pinned, 90 * MIB);
}

#[test]
fn little_memory_left_means_that_nothing_idle_is_kept() {
    let (arena, device) = arena_with(u64::MAX, u64::MAX, || Some(PRESSURE - 1));
    let blocks = arena.allocate(&device, &[5 * MIB]).unwrap();
    ready(&blocks);
    drop(blocks);
    until_pinned_is(&arena, 0);
}

#[test]
fn prewarmed_memory_is_kept_and_used_until_it_is_trimmed() {
    let (arena, device) = arena(u64::MAX, 0);
    let control = Control::default();
    arena
        .prewarm(&device, 100 * MIB, 30 * MIB, &control)
        .unwrap();
    assert_eq!(control.total.load(Ordering::Relaxed), 100 * MIB);
    assert_eq!(control.done.load(Ordering::Relaxed), 100 * MIB);
    let stats = arena.stats();
    assert_eq!(
        (stats.pinned, stats.idle, stats.used),
        (100 * MIB, 100 * MIB, 0)
    );
    assert_eq!(stats.keep, 100 * MIB);
    assert_eq!(stats.huge + stats.small, stats.pinned);
    // Once more is nothing new.
    arena
        .prewarm(&device, 60 * MIB, 30 * MIB, &Control::default())
        .unwrap();
    assert_eq!(arena.usage().pinned, 100 * MIB);
    // The next need finds it, and it stays.
    let blocks = arena
        .allocate(&device, &[30 * MIB, 30 * MIB, 30 * MIB])
        .unwrap();
    ready(&blocks);
    assert_eq!(arena.usage().pinned, 100 * MIB);
    drop(blocks);
    assert_eq!(arena.stats().idle, 100 * MIB);
    assert_eq!(arena.trim(100 * MIB), 0);
    assert_eq!(arena.trim(0), 100 * MIB);
    assert_eq!(arena.usage(), ArenaUse::default());
    let stats = arena.stats();
    assert_eq!((stats.keep, stats.high_water), (0, 100 * MIB));
    drop(arena.allocate(&device, &[30 * MIB]).unwrap());
    until_pinned_is(&arena, 0);
}

#[test]
fn a_prewarm_that_fails_leaves_nothing() {
    let (limited, device) = arena(50 * MIB, 0);
    let refused = limited.prewarm(&device, 100 * MIB, 0, &Control::default());
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::OutOfHostMemory);
    assert_eq!(limited.stats().keep, 0);
    // Refused late: the one question for all was answered, the one for the chunk is not.
    let (late, device) = arena_with(u64::MAX, 0, plenty_for(1));
    let refused = late.prewarm(&device, 100 * MIB, 0, &Control::default());
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::OutOfHostMemory);
    until_pinned_is(&late, 0);
    assert_eq!(late.stats().keep, 0);
    let cancelled = Control::default();
    cancelled.cancelled.store(true, Ordering::Relaxed);
    let refused = limited.prewarm(&device, MIB, 0, &cancelled);
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::Cancelled);
}

#[test]
fn a_trim_spares_what_is_used() {
    let (arena, device) = arena(u64::MAX, u64::MAX);
    let mut blocks = arena
        .allocate(&device, &[70 * MIB, 80 * MIB, 90 * MIB])
        .unwrap();
    ready(&blocks);
    let kept = blocks.pop().unwrap();
    drop(blocks);
    assert_eq!(arena.trim(u64::MAX), 0);
    // The small one is enough.
    assert_eq!(arena.trim(80 * MIB), 70 * MIB);
    assert_eq!(arena.trim(0), 80 * MIB);
    assert!(arena.contains(kept.pointer().as_ptr() as usize));
    assert_eq!(
        arena.usage(),
        ArenaUse {
            pinned: 90 * MIB,
            used: 90 * MIB
        }
    );
}

#[test]
fn many_blocks_come_in_order_and_in_one_piece() {
    let (arena, device) = arena(u64::MAX, u64::MAX);
    let sizes: Vec<u64> = (0..40).map(|index| (1 + index % 7) * MIB).collect();
    let blocks = arena.allocate(&device, &sizes).unwrap();
    for (block, &bytes) in blocks.iter().zip(&sizes) {
        assert_eq!(block.bytes() as u64, bytes);
        block.wait().unwrap();
        assert_eq!(present(block), block.bytes() / PAGE);
    }
    let places: Vec<usize> = blocks
        .iter()
        .map(|block| block.pointer().as_ptr() as usize)
        .collect();
    assert!(places.is_sorted());
    drop(blocks);
    // The same again finds the same places, whatever the sizes.
    let pinned = arena.usage().pinned;
    let mut again = sizes.clone();
    again.reverse();
    ready(&arena.allocate(&device, &again).unwrap());
    assert_eq!(arena.usage().pinned, pinned);
}
