//! Memory outside regions on a machine without any CUDA library: ordinary host memory, with a list
//! that tells it from foreign pointers. Not used where a runtime or a driver exists.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::collections::BTreeMap;
use std::ffi::c_void;
use std::sync::{Mutex, PoisonError};

/// `cudaMalloc` promises at least this alignment.
const ALIGNMENT: usize = 256;

/// Address and size of every live block.
static BLOCKS: Mutex<BTreeMap<usize, usize>> = Mutex::new(BTreeMap::new());

/// `None` when the host has no memory.
pub fn malloc(bytes: usize) -> Option<*mut c_void> {
    let layout = Layout::from_size_align(bytes, ALIGNMENT).ok()?;
    if bytes == 0 {
        return None;
    }
    // SAFETY: the size is not zero.
    let pointer = unsafe { alloc_zeroed(layout) };
    if pointer.is_null() {
        return None;
    }
    let mut blocks = BLOCKS.lock().unwrap_or_else(PoisonError::into_inner);
    blocks.insert(pointer as usize, bytes);
    Some(pointer.cast())
}

/// False: the pointer is not from [`malloc`].
pub fn free(pointer: *mut c_void) -> bool {
    let mut blocks = BLOCKS.lock().unwrap_or_else(PoisonError::into_inner);
    let removed = blocks.remove(&(pointer as usize));
    drop(blocks);
    let Some(layout) = removed.and_then(|bytes| Layout::from_size_align(bytes, ALIGNMENT).ok())
    else {
        return false;
    };
    // SAFETY: the block came from `alloc_zeroed` with this layout and just left the list.
    unsafe { dealloc(pointer.cast(), layout) };
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knows_its_own_blocks() {
        let block = malloc(1000).unwrap();
        assert_eq!(block as usize % ALIGNMENT, 0);
        assert!(!free(block.wrapping_byte_add(8)));
        assert!(free(block));
        assert!(!free(block));
        assert!(malloc(0).is_none());
        assert!(malloc(usize::MAX).is_none());
    }
}
