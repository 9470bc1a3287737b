//! The header of a safetensors file: which tensor lies where. Reads no tensor data.
//!
//! The format, <https://github.com/huggingface/safetensors#format>: 8 bytes with the length of the
//! header, little endian; the header, one JSON object; the data. Every byte of the data belongs to
//! exactly one tensor. A file that breaks a rule is refused with a message that names the file, the
//! tensor and the byte counts.

use std::collections::HashSet;
use std::fmt;
use std::fs::File;
use std::io::Read;

use serde_json::Value;

/// The reference implementation refuses longer headers, so no valid file has one.
const LONGEST_HEADER: u64 = 100_000_000;

/// The bytes that hold the header's length.
const PREFIX: u64 = 8;

/// The one key of the header that is not a tensor.
const METADATA: &str = "__metadata__";

/// One tensor of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor {
    pub name: String,
    pub dtype: String,
    pub shape: Vec<u64>,
    /// Where the data begins, bytes from the start of the file.
    pub offset: u64,
    pub bytes: u64,
}

/// What is wrong with a file, in one line that begins with its name.
#[derive(Debug)]
pub struct Invalid(String);

impl fmt::Display for Invalid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Invalid {}

/// Reads and checks the header of `file`, which is at its start; `name` is for messages. The
/// tensors come in the order of their data.
pub fn read_header(file: &mut File, name: &str) -> Result<Vec<Tensor>, Invalid> {
    let size = file
        .metadata()
        .map_err(|error| Invalid(format!("{name}: {error}")))?
        .len();
    parse(file, size).map_err(|why| Invalid(format!("{name}: {why}")))
}

fn parse(source: &mut impl Read, size: u64) -> Result<Vec<Tensor>, String> {
    if size < PREFIX {
        return Err(format!(
            "truncated: {size} bytes long, but a safetensors file begins with {PREFIX} bytes that \
             hold the length of its header"
        ));
    }
    let mut prefix = [0; PREFIX as usize];
    read_exact(source, &mut prefix, "length of the header")?;
    let length = u64::from_le_bytes(prefix);
    if length > LONGEST_HEADER {
        return Err(format!(
            "not a safetensors file: its first 8 bytes say that the header has {length} bytes; at \
             most {LONGEST_HEADER} are allowed"
        ));
    }
    let data = PREFIX + length;
    if data > size {
        return Err(format!(
            "truncated: the header ends at byte {data}, but the file has {size} bytes, {} too few",
            data - size
        ));
    }
    let mut header = vec![0; length as usize];
    read_exact(source, &mut header, "header")?;
    let header = String::from_utf8(header).map_err(|error| {
        format!(
            "the header is not UTF-8 from its byte {}",
            error.utf8_error().valid_up_to()
        )
    })?;
    let tensors = tensors(&header, data)?;
    check_data(&tensors, data, size)?;
    Ok(tensors)
}

fn read_exact(source: &mut impl Read, buffer: &mut [u8], what: &str) -> Result<(), String> {
    source
        .read_exact(buffer)
        .map_err(|error| format!("reading the {what}, {} bytes: {error}", buffer.len()))
}

/// The entries of the header, each checked by itself, sorted by their data.
fn tensors(header: &str, data: u64) -> Result<Vec<Tensor>, String> {
    let parsed: Value =
        serde_json::from_str(header).map_err(|error| format!("the header is not JSON: {error}"))?;
    let Value::Object(entries) = parsed else {
        return Err("the header is not a JSON object".to_owned());
    };
    if let Some(twice) = first_duplicate(header) {
        return Err(format!("two entries of the header are named \"{twice}\""));
    }
    let mut tensors = Vec::with_capacity(entries.len());
    for (name, entry) in &entries {
        if name == METADATA {
            continue;
        }
        let tensor =
            tensor(name, entry, data).map_err(|why| format!("tensor \"{name}\": {why}"))?;
        tensors.push(tensor);
    }
    // Empty tensors first where several begin at one byte: only then does each begin where the one
    // before it ends.
    tensors.sort_by(|a, b| (a.offset, a.bytes, &a.name).cmp(&(b.offset, b.bytes, &b.name)));
    Ok(tensors)
}

fn tensor(name: &str, entry: &Value, data: u64) -> Result<Tensor, String> {
    let field = |key: &str| {
        entry
            .get(key)
            .ok_or_else(|| format!("\"{key}\" is missing"))
    };
    let dtype = field("dtype")?
        .as_str()
        .ok_or("\"dtype\" is not a string")?
        .to_owned();
    let shape = numbers(field("shape")?).ok_or("\"shape\" is not a list of sizes")?;
    let offsets = numbers(field("data_offsets")?);
    let Some([begin, end]) = offsets
        .as_deref()
        .and_then(|list| <[u64; 2]>::try_from(list).ok())
    else {
        return Err("\"data_offsets\" is not a list of two offsets".to_owned());
    };
    let bits = bits_of(&dtype).ok_or_else(|| format!("unknown dtype \"{dtype}\""))?;
    let expected = shape
        .iter()
        .try_fold(bits, |product, size| product.checked_mul(*size))
        .ok_or_else(|| format!("the shape {shape:?} overflows 64 bits"))?;
    if begin > end {
        return Err(format!(
            "its data ends at {end}, before its begin at {begin}"
        ));
    }
    if expected % 8 != 0 {
        return Err(format!(
            "{dtype} of shape {shape:?} has {expected} bits, which are not whole bytes"
        ));
    }
    let (bytes, expected) = (end - begin, expected / 8);
    if expected != bytes {
        return Err(format!(
            "{dtype} of shape {shape:?} needs {expected} bytes, but its data has {bytes} ({begin} to {end})"
        ));
    }
    data.checked_add(end)
        .ok_or_else(|| format!("its end at {end} overflows 64 bits"))?;
    Ok(Tensor {
        name: name.to_owned(),
        dtype,
        shape,
        offset: data + begin,
        bytes,
    })
}

fn numbers(value: &Value) -> Option<Vec<u64>> {
    value.as_array()?.iter().map(Value::as_u64).collect()
}

/// Bits of one element, as the reference implementation lists them.
fn bits_of(dtype: &str) -> Option<u64> {
    Some(match dtype {
        "F4" => 4,
        "F6_E2M3" | "F6_E3M2" => 6,
        "BOOL" | "U8" | "I8" | "F8_E5M2" | "F8_E4M3" | "F8_E8M0" | "F8_E5M2FNUZ"
        | "F8_E4M3FNUZ" => 8,
        "U16" | "I16" | "F16" | "BF16" => 16,
        "U32" | "I32" | "F32" => 32,
        "U64" | "I64" | "F64" | "C64" => 64,
        _ => return None,
    })
}

/// The data must be covered without a gap and without an overlap, and be all there.
fn check_data(tensors: &[Tensor], data: u64, size: u64) -> Result<(), String> {
    if let Some(last) = tensors
        .iter()
        .max_by_key(|tensor| tensor.offset + tensor.bytes)
    {
        let end = last.offset + last.bytes;
        if end > size {
            return Err(format!(
                "truncated: tensor \"{}\" has {} bytes up to byte {end} of the file, but the file \
                 has {size} bytes, {} too few",
                last.name,
                last.bytes,
                end - size
            ));
        }
    }
    let mut end = data;
    let mut before = "the header".to_owned();
    for tensor in tensors {
        if tensor.offset < end {
            return Err(format!(
                "tensor \"{}\" begins at byte {} of the file, {} bytes before the end of {before}",
                tensor.name,
                tensor.offset,
                end - tensor.offset
            ));
        }
        if tensor.offset > end {
            return Err(format!(
                "{} bytes between {before} and tensor \"{}\" belong to no tensor",
                tensor.offset - end,
                tensor.name
            ));
        }
        end += tensor.bytes;
        before = format!("tensor \"{}\"", tensor.name);
    }
    if end < size {
        return Err(format!(
            "{} bytes after {before} belong to no tensor",
            size - end
        ));
    }
    Ok(())
}

/// The first key that stands twice at the top level of `object`, which is valid JSON.
///
/// `serde_json` keeps the last of two and does not tell.
fn first_duplicate(object: &str) -> Option<String> {
    let mut seen = HashSet::new();
    let mut depth = 0;
    let mut key_follows = false;
    let mut at = 0;
    let bytes = object.as_bytes();
    while at < bytes.len() {
        match bytes[at] {
            b'"' => {
                let end = end_of_string(bytes, at);
                if depth == 1 && key_follows {
                    let key: String = serde_json::from_str(&object[at..end]).ok()?;
                    if !seen.insert(key.clone()) {
                        return Some(key);
                    }
                }
                key_follows = false;
                at = end;
                continue;
            }
            b'{' | b'[' => {
                depth += 1;
                key_follows = true;
            }
            b'}' | b']' => depth -= 1,
            b',' => key_follows = true,
            _ => {}
        }
        at += 1;
    }
    None
}

/// The position behind the string that begins at `start`.
fn end_of_string(bytes: &[u8], start: usize) -> usize {
    let mut at = start + 1;
    while at < bytes.len() && bytes[at] != b'"' {
        at += if bytes[at] == b'\\' { 2 } else { 1 };
    }
    (at + 1).min(bytes.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(header: &str, data: usize) -> Vec<u8> {
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend_from_slice(header.as_bytes());
        file.resize(file.len() + data, 7);
        file
    }

    fn read(file: &[u8]) -> Result<Vec<Tensor>, String> {
        parse(&mut &file[..], file.len() as u64)
    }

    fn refused(header: &str, data: usize) -> String {
        read(&file(header, data)).unwrap_err()
    }

    const TWO: &str = r#"{"__metadata__":{"format":"pt"},
        "b":{"dtype":"F32","shape":[2,3],"data_offsets":[8,32]},
        "a":{"dtype":"BF16","shape":[4],"data_offsets":[0,8]}}  "#;

    #[test]
    fn tensors_come_in_the_order_of_their_data() {
        let tensors = read(&file(TWO, 32)).unwrap();
        let data = 8 + TWO.len() as u64;
        let found: Vec<_> = tensors
            .iter()
            .map(|t| (&*t.name, t.offset - data, t.bytes))
            .collect();
        assert_eq!(found, [("a", 0, 8), ("b", 8, 24)]);
        assert_eq!(tensors[1].shape, [2, 3]);
        assert_eq!(tensors[1].dtype, "F32");
    }

    #[test]
    fn scalars_empty_tensors_and_half_bytes_are_valid() {
        let header = r#"{"e":{"dtype":"F64","shape":[0,5],"data_offsets":[0,0]},
            "s":{"dtype":"I8","shape":[],"data_offsets":[0,1]},
            "z":{"dtype":"F4","shape":[6],"data_offsets":[1,4]},
            "f":{"dtype":"U8","shape":[0],"data_offsets":[4,4]}}"#;
        let tensors = read(&file(header, 4)).unwrap();
        assert_eq!(tensors.iter().map(|t| t.bytes).sum::<u64>(), 4);
        assert!(read(&file("{}", 0)).unwrap().is_empty());
    }

    #[test]
    fn every_truncation_is_noticed() {
        let whole = file(TWO, 32);
        for length in 0..whole.len() {
            let why = read(&whole[..length]).unwrap_err();
            assert!(why.starts_with("truncated"), "{length}: {why}");
        }
        let why = read(&whole[..whole.len() - 5]).unwrap_err();
        let (all, there) = (whole.len(), whole.len() - 5);
        assert_eq!(
            why,
            format!(
                "truncated: tensor \"b\" has 24 bytes up to byte {all} of the file, but the file \
                 has {there} bytes, 5 too few"
            )
        );
    }

    #[test]
    fn other_files_are_told_apart() {
        let why = read(b"\x89PNG\r\n\x1a\nmore").unwrap_err();
        assert!(why.starts_with("not a safetensors file"), "{why}");
        assert!(refused("[]", 0).contains("not a JSON object"));
        assert!(refused("{\"a\":", 0).contains("not JSON"));
        let mut broken = file("{}", 0);
        broken[9] = 0xff;
        assert!(
            read(&broken)
                .unwrap_err()
                .contains("not UTF-8 from its byte 1")
        );
    }

    #[test]
    fn a_name_stands_only_once() {
        let header = r#"{"x\u0041":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},
            "y":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},
            "xA":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#;
        assert_eq!(
            refused(header, 0),
            "two entries of the header are named \"xA\""
        );
        // The same words inside the entries are no names.
        let header = r#"{"dtype":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},
            "shape":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#;
        assert_eq!(read(&file(header, 0)).unwrap().len(), 2);
    }

    #[test]
    fn lengths_and_offsets_must_agree() {
        let one = |entry: &str| format!("{{\"w\":{entry}}}");
        let why = refused(
            &one(r#"{"dtype":"F32","shape":[3],"data_offsets":[0,8]}"#),
            8,
        );
        assert_eq!(
            why,
            "tensor \"w\": F32 of shape [3] needs 12 bytes, but its data has 8 (0 to 8)"
        );
        for (entry, part) in [
            (
                r#"{"dtype":"F32","shape":[2],"data_offsets":[8,0]}"#,
                "before its begin",
            ),
            (
                r#"{"dtype":"F32","shape":[2],"data_offsets":[0]}"#,
                "two offsets",
            ),
            (
                r#"{"dtype":"F32","shape":[2],"data_offsets":[-8,0]}"#,
                "two offsets",
            ),
            (
                r#"{"dtype":"F32","shape":2,"data_offsets":[0,8]}"#,
                "\"shape\"",
            ),
            (
                r#"{"dtype":"F32","data_offsets":[0,8]}"#,
                "\"shape\" is missing",
            ),
            (
                r#"{"dtype":"Q7","shape":[2],"data_offsets":[0,8]}"#,
                "unknown dtype \"Q7\"",
            ),
            (
                r#"{"dtype":7,"shape":[2],"data_offsets":[0,8]}"#,
                "\"dtype\"",
            ),
            (
                r#"{"dtype":"F4","shape":[15],"data_offsets":[0,8]}"#,
                "60 bits",
            ),
            (
                r#"{"dtype":"U8","shape":[9223372036854775807,9],"data_offsets":[0,8]}"#,
                "overflows",
            ),
            ("3", "\"dtype\" is missing"),
        ] {
            let why = refused(&one(entry), 8);
            assert!(why.contains(part), "{entry}: {why}");
        }
        let huge = one(
            r#"{"dtype":"U8","shape":[2],"data_offsets":[18446744073709551613,18446744073709551615]}"#,
        );
        assert!(refused(&huge, 8).contains("overflows"));
    }

    #[test]
    fn data_has_no_gap_no_overlap_and_no_rest() {
        let two = |a: &str, b: &str| {
            format!(
                r#"{{"a":{{"dtype":"U8","shape":[4],"data_offsets":[{a}]}},
                    "b":{{"dtype":"U8","shape":[4],"data_offsets":[{b}]}}}}"#
            )
        };
        let overlap = refused(&two("0,4", "2,6"), 6);
        assert!(
            overlap.contains("2 bytes before the end of tensor \"a\""),
            "{overlap}"
        );
        let gap = refused(&two("0,4", "7,11"), 11);
        assert!(
            gap.starts_with("3 bytes between tensor \"a\" and tensor \"b\""),
            "{gap}"
        );
        let rest = refused(&two("0,4", "4,8"), 20);
        assert!(rest.starts_with("12 bytes after tensor \"b\""), "{rest}");
        let front = refused(&two("1,5", "5,9"), 9);
        assert!(front.starts_with("1 bytes between the header"), "{front}");
    }
}
