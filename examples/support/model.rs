//! A made-up model: random bytes under the tensor names of a small transformer, as a safetensors
//! file.

use std::collections::hash_map::RandomState;
use std::fs::File;
use std::hash::{BuildHasher, Hasher};
use std::io::{self, BufWriter, Seek, SeekFrom, Write};

use serde_json::{Map, json};

use super::random::Random;

/// Bytes of one weight matrix; the size of a real 4096 × 4096 BF16 matrix.
const MATRIX: u64 = 4096 * 4096 * 2;

const WEIGHTS: [&str; 4] = [
    "attn.qkv_proj",
    "attn.o_proj",
    "mlp.up_proj",
    "mlp.down_proj",
];

/// Writes tensors of `bytes` in total into `file`, and leaves it at its start.
pub fn write(file: &mut File, bytes: u64) -> io::Result<()> {
    let mut header = Map::new();
    let mut offset = 0;
    let mut number = 0;
    while offset < bytes {
        let length = MATRIX.min(bytes - offset);
        let name = format!(
            "model.layers.{}.{}.weight",
            number / WEIGHTS.len(),
            WEIGHTS[number % WEIGHTS.len()]
        );
        let (dtype, shape) = match length {
            MATRIX => ("BF16", json!([4096, 4096])),
            odd => ("U8", json!([odd])),
        };
        let end = offset + length;
        header.insert(
            name,
            json!({"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}),
        );
        offset = end;
        number += 1;
    }
    let mut header = serde_json::to_vec(&header)?;
    // The data begins at a multiple of 8, as the format recommends.
    header.resize(header.len().next_multiple_of(8), b' ');

    let mut out = BufWriter::with_capacity(1 << 20, &mut *file);
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(&header)?;
    let mut random = Random::new(RandomState::new().build_hasher().finish());
    let mut block = vec![0; 1 << 20];
    let mut left = bytes;
    while left > 0 {
        random.fill(&mut block);
        let part = left.min(block.len() as u64) as usize;
        out.write_all(&block[..part])?;
        left -= part as u64;
    }
    out.flush()?;
    drop(out);
    file.seek(SeekFrom::Start(0))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::support::safetensors;

    #[test]
    fn a_made_up_model_reads_back() {
        let path = std::env::temp_dir().join(format!("tms-model-{}", std::process::id()));
        let mut file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
            .unwrap();
        std::fs::remove_file(&path).unwrap();
        let size = MATRIX + 12345;
        write(&mut file, size).unwrap();
        let tensors = safetensors::read_header(&mut file, "model").unwrap();
        let lengths: Vec<_> = tensors.iter().map(|tensor| tensor.bytes).collect();
        assert_eq!(lengths, [MATRIX, 12345]);
        assert_eq!(tensors[1].name, "model.layers.0.attn.o_proj.weight");
    }
}
