//! Reading settings written by people: sizes with a unit.
//!
//! Which variables exist is the business of the modules that read them.

use crate::error::{Error, Result};

/// Units and the power of 1024 each stands for.
const UNITS: [(&str, u32); 14] = [
    ("", 0),
    ("B", 0),
    ("K", 1),
    ("KB", 1),
    ("KIB", 1),
    ("M", 2),
    ("MB", 2),
    ("MIB", 2),
    ("G", 3),
    ("GB", 3),
    ("GIB", 3),
    ("T", 4),
    ("TB", 4),
    ("TIB", 4),
];

/// Bytes of a size such as `1048576`, `64MB`, `2.5G` or `1 tb`.
///
/// A unit is a power of 1024, in any case, with or without `B` or `iB`. A fraction needs a unit; a
/// result that is not whole is rounded down. The error says what is wrong with the text.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = |why: &str| format!("\"{text}\" {why}; write bytes, or a size like 512MB or 2.5G");
    let trimmed = text.trim();
    let unit_at = trimmed
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(trimmed.len());
    let (number, unit) = trimmed.split_at(unit_at);
    let unit = unit.trim().to_ascii_uppercase();
    let power = UNITS
        .iter()
        .find(|(name, _)| *name == unit)
        .map(|(_, power)| *power)
        .ok_or_else(|| wrong("has an unknown unit"))?;

    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || fraction.contains('.') || (number.contains('.') && fraction.is_empty()) {
        return Err(wrong("is not a size"));
    }
    if !fraction.is_empty() && power == 0 {
        return Err(wrong("is a fraction of a byte"));
    }
    let scale = 1u128 << (10 * power);
    let whole: u64 = whole.parse().map_err(|_| wrong("is too large"))?;
    // Fifteen digits tell every byte of a terabyte apart, and keep the product inside 128 bits.
    let digits = &fraction[..fraction.len().min(15)];
    let numerator = digits
        .bytes()
        .fold(0u128, |sum, digit| sum * 10 + u128::from(digit - b'0'));
    let denominator = digits.bytes().fold(1u128, |product, _| product * 10);
    let bytes = u128::from(whole) * scale + numerator * scale / denominator;
    u64::try_from(bytes).map_err(|_| wrong("is too large"))
}

/// The size in the environment variable `name`, `None` if it is unset or empty.
pub fn size_from_environment(name: &str) -> Result<Option<u64>> {
    match std::env::var(name) {
        Ok(text) if !text.trim().is_empty() => parse_size(&text)
            .map(Some)
            .map_err(|why| Error::invalid(name, why)),
        _ => Ok(None),
    }
}

/// The switch in the environment variable `name`: 1, true, yes, 0, false or no, in any case.
/// Anything else is logged and counts as `default`.
pub fn flag_from_environment(name: &str, default: bool) -> bool {
    let Ok(text) = std::env::var(name) else {
        return default;
    };
    match text.trim().to_ascii_lowercase().as_str() {
        "1" | "true" | "yes" => true,
        "0" | "false" | "no" => false,
        "" => default,
        _ => {
            tracing::error!(
                "{name}: \"{text}\" is none of 1, true, yes, 0, false, no; using {default}"
            );
            default
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_with_and_without_units() {
        for (text, bytes) in [
            ("0", 0),
            ("1048576", 1 << 20),
            ("10b", 10),
            ("1k", 1 << 10),
            ("64MB", 64 << 20),
            ("64 mb ", 64 << 20),
            ("2.5G", 5 << 29),
            ("1.5KiB", 1536),
            ("0.001kb", 1),
            ("1tB", 1 << 40),
            ("0.1234567890123456789T", 135_742_175_046),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_not_a_size_is_quoted() {
        for text in [
            "",
            " ",
            "GB",
            "-1",
            "+1",
            "1e9",
            "1.",
            ".5G",
            "1.2.3G",
            "1.5",
            "1.5B",
            "5XB",
            "1GB2",
            "0x10",
            "1,5G",
            "18446744073709551616",
            "16777216TB",
        ] {
            let why = parse_size(text).unwrap_err();
            assert!(why.contains(&format!("\"{text}\"")), "{why}");
        }
    }
}
