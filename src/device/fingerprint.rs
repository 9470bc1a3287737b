//! Keyed 128-bit fingerprints of device memory: equal fingerprints mean equal contents, but for a
//! probability that does not depend on the contents. Defined here and computed in software for the
//! host device; on CUDA the kernel of `cuda/kernels/fingerprint.cu` computes the same.
//!
//! # Definition
//!
//! A block is followed by zero bytes up to whole steps of 16 KiB and read as little-endian words of
//! 32 bits. Each of two independent lanes turns it into a number below p = 2^61 - 1:
//!
//! 1. A step is cut into 256 chunks of 16 words, so that 32 neighbouring threads read 512
//!    neighbouring bytes: chunk t of a step, t = 32 w + l, consists of the four vectors of 16 bytes
//!    at 2048 w + 16 l + 512 j, j = 0..4.
//! 2. NH of a chunk under 16 words of key: vector 0 times vector 1 plus vector 2 times vector 3,
//!    where a key word is added to each word mod 2^32 and products are summed mod 2^64. The result
//!    is two coefficients, its upper and its lower half.
//! 3. A polynomial over the field of p elements with these coefficients in their order, the first
//!    one at the highest power, and the length in bytes as the constant term, at a random point r.
//!
//! # Probability of a miss
//!
//! Let two different contents of one block be chosen without knowledge of the key.
//!
//! *Of one length.* They differ in a chunk. NH over words of w bits is 2^-w-almost universal (Black,
//! Halevi, Krawczyk, Krovetz, Rogaway, "UMAC: Fast and Secure Message Authentication", CRYPTO 1999,
//! theorem 4.2; which words make a pair does not matter), so both NH values of that chunk are equal
//! with a probability of at most 2^-32. Else a coefficient differs, since coefficients are below
//! 2^32 < p, and the difference of the two polynomials is one of degree at most d that is not zero,
//! with at most d roots: r is one of them with probability d/p (polynomial hashing, Carter and
//! Wegman, "New hash functions and their use in authentication and set equality", 1981). A block of
//! [`BLOCK`] bytes has 2^15 chunks, so d = 2^16.
//!
//! *Of different lengths.* The constant terms differ, and the second part alone applies.
//!
//! The lanes have independent keys, so both miss with a probability of at most
//! (2^-32 + 2^16/p)^2 < 2^-63. Of n comparisons one misses with at most n times that.

use crate::error::{Error, Result};

/// Bytes of a block; the last one of an allocation may be shorter.
pub const BLOCK: u64 = 2 << 20;

/// Bytes that one pass of all threads reads.
const STEP: usize = CHUNKS * 64;
/// Chunks of a step: the threads that compute a fingerprint on a GPU.
const CHUNKS: usize = 256;
/// Bytes of a step whose chunks interleave.
const GROUP: usize = 2048;

const P: u64 = (1 << 61) - 1;

/// What a fingerprint depends on besides the contents. Secret, and new for each process.
///
/// The layout is the kernel's parameter.
#[repr(C)]
#[derive(Clone)]
pub struct Key {
    nh: [[u32; 16]; 2],
    /// r^1, r^2, r^4, … r^512 of each lane.
    powers: [[u64; 10]; 2],
}

/// Some bytes to take the fingerprint of, at most [`BLOCK`], aligned to at least 16.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Block {
    pub address: u64,
    pub bytes: u64,
}

/// The fingerprint of a block. Both numbers are below 2^61, so that others are free for marks.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Print(pub [u64; 2]);

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Key(secret)")
    }
}

impl Key {
    /// A new key from the system's random numbers.
    pub fn new() -> Result<Key> {
        let mut key = Key {
            nh: [[0; 16]; 2],
            powers: [[0; 10]; 2],
        };
        for (nh, powers) in key.nh.iter_mut().zip(&mut key.powers) {
            let bytes: [u8; 64] = random()?;
            for (word, bytes) in nh.iter_mut().zip(bytes.as_chunks().0) {
                *word = u32::from_le_bytes(*bytes);
            }
            let mut power = random_point()?;
            for place in powers {
                *place = power;
                power = reduce(u128::from(power) * u128::from(power));
            }
        }
        Ok(key)
    }
}

/// Uniform below p.
fn random_point() -> Result<u64> {
    loop {
        let point = u64::from_le_bytes(random()?) >> 3;
        if point < P {
            return Ok(point);
        }
    }
}

fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    let mut done = 0;
    while done < N {
        let rest = &mut bytes[done..];
        // SAFETY: writes at most as many bytes as `rest` has.
        let got = unsafe { libc::getrandom(rest.as_mut_ptr().cast(), rest.len(), 0) };
        match usize::try_from(got) {
            Ok(got) => done += got,
            Err(_) => {
                let error = std::io::Error::last_os_error();
                if error.kind() != std::io::ErrorKind::Interrupted {
                    return Err(Error::io("getrandom", error));
                }
            }
        }
    }
    Ok(bytes)
}

/// The fingerprint of `bytes`, computed in software.
pub fn print_of(key: &Key, bytes: &[u8]) -> Print {
    #[cfg(target_arch = "x86_64")]
    if std::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2.
        return unsafe { print_with_avx2(key, bytes) };
    }
    print(key, bytes)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn print_with_avx2(key: &Key, bytes: &[u8]) -> Print {
    print(key, bytes)
}

#[inline(always)]
fn print(key: &Key, bytes: &[u8]) -> Print {
    let mut sums = [[0; CHUNKS]; 2];
    let (steps, rest) = bytes.as_chunks::<STEP>();
    for step in steps {
        add_step(key, step, &mut sums);
    }
    if !rest.is_empty() {
        let mut step = [0; STEP];
        step[..rest.len()].copy_from_slice(rest);
        add_step(key, &step, &mut sums);
    }
    let mut print = [0; 2];
    for ((print, sums), powers) in print.iter_mut().zip(&sums).zip(&key.powers) {
        let chunks = sums
            .iter()
            .fold(0, |value, sum| step_of_horner(value, powers[1], *sum));
        *print = step_of_horner(chunks, powers[0], bytes.len() as u64);
    }
    Print(print)
}

/// One step of each thread's own polynomial, whose variable is r^512.
#[inline(always)]
fn add_step(key: &Key, step: &[u8; STEP], sums: &mut [[u64; CHUNKS]; 2]) {
    for (group, bytes) in step.as_chunks::<GROUP>().0.iter().enumerate() {
        let mut words = [0; GROUP / 4];
        for (word, bytes) in words.iter_mut().zip(bytes.as_chunks().0) {
            *word = u32::from_le_bytes(*bytes);
        }
        for ((sums, nh), powers) in sums.iter_mut().zip(&key.nh).zip(&key.powers) {
            let sums = &mut sums[group * 32..][..32];
            for (sum, value) in sums.iter_mut().zip(nh_of_group(nh, &words)) {
                *sum = fold(
                    u128::from(*sum) * u128::from(powers[9])
                        + u128::from(value >> 32) * u128::from(powers[0])
                        + u128::from(value as u32),
                );
            }
        }
    }
}

#[inline(always)]
fn nh_of_group(key: &[u32; 16], words: &[u32; GROUP / 4]) -> [u64; 32] {
    let vectors = words.as_chunks::<4>().0;
    let mut values = [0u64; 32];
    for (chunk, value) in values.iter_mut().enumerate() {
        for at in 0..4 {
            let word = |row: usize| {
                let word = vectors[row * 32 + chunk][at];
                u64::from(word.wrapping_add(key[row * 4 + at]))
            };
            *value = value
                .wrapping_add(word(0) * word(1))
                .wrapping_add(word(2) * word(3));
        }
    }
    values
}

fn step_of_horner(value: u64, point: u64, coefficient: u64) -> u64 {
    reduce(u128::from(value) * u128::from(point) + u128::from(coefficient))
}

/// `value`, which is below 2^124, mod p.
fn reduce(value: u128) -> u64 {
    let folded = fold(value);
    if folded >= P { folded - P } else { folded }
}

/// A number below 2^61 + 8 that is equal to `value`, which is below 2^124, mod p: 2^61 is 1.
#[inline(always)]
fn fold(value: u128) -> u64 {
    let folded = (value as u64 & P) + (value >> 61) as u64;
    (folded & P) + (folded >> 61)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Straight from the definition: every coefficient times its own power.
    fn by_definition(key: &Key, bytes: &[u8]) -> Print {
        let mut padded = bytes.to_vec();
        padded.resize(bytes.len().next_multiple_of(STEP), 0);
        let word = |at: usize| u32::from_le_bytes(padded[at..at + 4].try_into().unwrap());
        let mut print = [0u64; 2];
        for (lane, print) in print.iter_mut().enumerate() {
            let mut coefficients = Vec::new();
            for chunk in 0..padded.len() / 64 {
                let (step, t) = (chunk / 256, chunk % 256);
                let start = step * STEP + t / 32 * 2048 + t % 32 * 16;
                let nh = (0..8).fold(0u64, |sum, pair| {
                    let (row, q) = (pair / 4 * 2, pair % 4);
                    let one =
                        word(start + row * 512 + q * 4).wrapping_add(key.nh[lane][row * 4 + q]);
                    let other = word(start + (row + 1) * 512 + q * 4)
                        .wrapping_add(key.nh[lane][row * 4 + 4 + q]);
                    sum.wrapping_add(u64::from(one) * u64::from(other))
                });
                coefficients.extend([nh >> 32, nh & 0xFFFF_FFFF]);
            }
            coefficients.push(bytes.len() as u64);
            let mut power = 1u128;
            let mut sum = 0u128;
            for coefficient in coefficients.iter().rev() {
                sum = (sum + u128::from(*coefficient) * power) % u128::from(P);
                power = power * u128::from(key.powers[lane][0]) % u128::from(P);
            }
            *print = sum as u64;
        }
        Print(print)
    }

    fn noise(seed: u64, bytes: usize) -> Vec<u8> {
        (0..bytes as u64)
            .map(|at| ((at ^ seed << 32).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as u8)
            .collect()
    }

    #[test]
    fn prints_are_as_defined() {
        let key = Key::new().unwrap();
        for length in [
            0,
            1,
            15,
            16,
            17,
            511,
            2048,
            16383,
            16384,
            16385,
            100_001,
            2 << 20,
        ] {
            let bytes = noise(length as u64, length);
            let defined = by_definition(&key, &bytes);
            assert_eq!(print_of(&key, &bytes), defined, "{length} bytes");
            assert_eq!(print(&key, &bytes), defined, "{length} bytes");
            assert!(defined.0.iter().all(|lane| *lane < P));
        }
        let ones = vec![0xFF; 2 << 20];
        assert_eq!(print_of(&key, &ones), by_definition(&key, &ones));
    }

    #[test]
    fn every_bit_of_a_small_block_counts() {
        let key = Key::new().unwrap();
        let mut bytes = noise(1, 256);
        let print = print_of(&key, &bytes);
        for bit in 0..256 * 8 {
            bytes[bit / 8] ^= 1 << (bit % 8);
            let changed = print_of(&key, &bytes);
            assert!((0..2).all(|lane| changed.0[lane] != print.0[lane]), "{bit}");
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
        assert_eq!(print_of(&key, &bytes), print);
    }

    #[test]
    fn every_bit_of_a_large_block_counts() {
        let key = Key::new().unwrap();
        let mut bytes = noise(2, BLOCK as usize);
        let print = print_of(&key, &bytes);
        let places = [0, BLOCK * 8 - 1].into_iter();
        let others = (0..100).map(|_| u64::from_le_bytes(random().unwrap()) % (BLOCK * 8));
        for bit in places.chain(others) {
            let (at, mask) = ((bit / 8) as usize, 1 << (bit % 8));
            bytes[at] ^= mask;
            assert_ne!(print_of(&key, &bytes), print, "{bit}");
            bytes[at] ^= mask;
        }
    }

    #[test]
    fn the_order_of_words_counts() {
        let key = Key::new().unwrap();
        let bytes = noise(3, 65536);
        let print = print_of(&key, &bytes);
        for distance in [4, 16, 64, 512, 2048, 16384] {
            let mut swapped = bytes.clone();
            let (head, tail) = swapped.split_at_mut(distance);
            head[..4].swap_with_slice(&mut tail[..4]);
            assert_ne!(print_of(&key, &swapped), print, "{distance}");
        }
    }

    #[test]
    fn lengths_of_zeros_differ() {
        let key = Key::new().unwrap();
        let zeros = vec![0; BLOCK as usize];
        let lengths = (0..=64).chain([16383, 16384, 16385, BLOCK as usize - 1, BLOCK as usize]);
        let mut prints: Vec<_> = lengths.map(|n| print_of(&key, &zeros[..n]).0).collect();
        let count = prints.len();
        prints.sort_unstable();
        prints.dedup();
        assert_eq!(prints.len(), count);
    }

    #[test]
    fn keys_differ_and_their_powers_fit() {
        let (one, other) = (Key::new().unwrap(), Key::new().unwrap());
        let bytes = noise(4, 1000);
        assert_ne!(print_of(&one, &bytes), print_of(&other, &bytes));
        assert!(one.nh[0] != one.nh[1] && one.powers[0] != one.powers[1]);
        for powers in one.powers {
            for two in powers.windows(2) {
                let square = u128::from(two[0]) * u128::from(two[0]) % u128::from(P);
                assert_eq!(u128::from(two[1]), square);
            }
        }
    }
}
