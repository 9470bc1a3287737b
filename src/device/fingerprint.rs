//! Keyed 128-bit fingerprints of device memory: equal fingerprints mean equal contents, but for a
//! probability that does not depend on the contents. Defined here, computed by a kernel on CUDA.

/// Bytes of a block; the last one of an allocation may be shorter.
pub const BLOCK: u64 = 2 << 20;

/// What a fingerprint depends on besides the contents. Secret, and new for each process.
#[repr(C)]
#[derive(Clone, Debug)]
pub struct Key {
    words: [u32; 36],
}

/// Some bytes to take the fingerprint of, at most [`BLOCK`].
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Block {
    pub address: u64,
    pub bytes: u64,
}

/// The fingerprint of a block.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Print(pub [u64; 2]);
