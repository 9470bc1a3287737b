//! Copying to memory that will not be read soon, past the caches: half the traffic on the memory
//! bus, because lines that are overwritten as a whole need not be fetched first.

/// Copies `bytes` bytes. Other threads see them once they were told of the end in any way that
/// orders memory.
///
/// # Safety
/// Both ranges are valid for `bytes` and do not overlap.
pub unsafe fn copy(source: *const u8, destination: *mut u8, bytes: usize) {
    #[cfg(target_arch = "x86_64")]
    if bytes >= x86::LEAST && std::arch::is_x86_feature_detected!("avx") {
        // SAFETY: the processor has the instructions; the rest is this function's contract.
        return unsafe { x86::copy(source, destination, bytes) };
    }
    // SAFETY: by this function's contract.
    unsafe { std::ptr::copy_nonoverlapping(source, destination, bytes) };
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{__m256i, _mm_sfence, _mm256_loadu_si256, _mm256_stream_si256};

    /// Less is likely to be read soon, and not worth the fence.
    pub const LEAST: usize = 64 << 10;

    const VECTOR: usize = size_of::<__m256i>();

    /// What one turn of the loop copies: two cache lines.
    const TURN: usize = 4 * VECTOR;

    /// # Safety
    /// Both ranges are valid for `bytes` and do not overlap.
    #[target_feature(enable = "avx")]
    pub unsafe fn copy(source: *const u8, destination: *mut u8, bytes: usize) {
        let head = destination.align_offset(VECTOR).min(bytes);
        let turns = (bytes - head) / TURN;
        let body = head + turns * TURN;
        // SAFETY: every access lies below `bytes` in its range, and those of vectors to the
        // destination begin at a multiple of their size.
        unsafe {
            std::ptr::copy_nonoverlapping(source, destination, head);
            for turn in 0..turns {
                let from = source.add(head + turn * TURN).cast::<__m256i>();
                let to = destination.add(head + turn * TURN).cast::<__m256i>();
                let first = _mm256_loadu_si256(from);
                let second = _mm256_loadu_si256(from.add(1));
                let third = _mm256_loadu_si256(from.add(2));
                let fourth = _mm256_loadu_si256(from.add(3));
                _mm256_stream_si256(to, first);
                _mm256_stream_si256(to.add(1), second);
                _mm256_stream_si256(to.add(2), third);
                _mm256_stream_si256(to.add(3), fourth);
            }
            std::ptr::copy_nonoverlapping(source.add(body), destination.add(body), bytes - body);
        }
        // Streaming stores are ordered with nothing, a later release of a lock included.
        _mm_sfence();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_length_and_alignment() {
        let source: Vec<u8> = (0..300_000u32).map(|i| (i * 7 + i / 251) as u8).collect();
        for bytes in [0, 1, 31, 65_535, 65_536, 65_537, 100_000, 262_143] {
            for offset in [0, 1, 31, 32, 63] {
                let mut got = vec![0xA5u8; bytes + 200];
                // SAFETY: both ranges lie inside their vectors.
                unsafe { copy(source[3..].as_ptr(), got[offset..].as_mut_ptr(), bytes) };
                assert!(got[..offset].iter().all(|&byte| byte == 0xA5));
                assert!(got[offset..][..bytes] == source[3..][..bytes]);
                assert!(got[offset + bytes..].iter().all(|&byte| byte == 0xA5));
            }
        }
    }
}
