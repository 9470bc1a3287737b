//! Sizes and rates as people read and write them.

/// `1500000000` as `1.50 GB`: decimal units, as buses and disks are rated.
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["kB", "MB", "GB", "TB", "PB"];
    let mut value = count as f64;
    let mut unit = "B";
    for next in UNITS {
        if value < 999.5 {
            break;
        }
        value /= 1000.0;
        unit = next;
    }
    match unit {
        "B" => format!("{count} B"),
        _ => format!("{value:.2} {unit}"),
    }
}

/// Gigabytes per second, `None` where the time is too short to divide by.
pub fn rate(bytes: u64, seconds: f64) -> Option<f64> {
    (seconds > 1e-9).then(|| bytes as f64 / seconds / 1e9)
}

/// A size such as `512M`, `1.5G`, `2GiB` (all binary: one K is 1024) or a plain number of bytes.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = || format!("\"{text}\" is not a size; write for example 512M or 2G");
    let lower = text.trim().to_ascii_lowercase();
    let digits = lower
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(lower.len());
    let (number, unit) = lower.split_at(digits);
    let shift = match unit.trim() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(wrong()),
    };
    let value: f64 = number.parse().map_err(|_| wrong())?;
    let size = value * (1_u64 << shift) as f64;
    // Up to 2^53 every whole number has an exact f64, and no machine has more bytes.
    if size < 1.0 || size > (1_u64 << 53) as f64 {
        return Err(format!("\"{text}\" is out of range"));
    }
    Ok(size as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_back() {
        assert_eq!(parse_size("4096"), Ok(4096));
        assert_eq!(parse_size("2G"), Ok(2 << 30));
        assert_eq!(parse_size(" 1.5 GiB "), Ok(3 << 29));
        assert_eq!(parse_size("512mb"), Ok(512 << 20));
        for wrong in ["", "G", "1X", "-1", "0", "1.2.3", "9999999T"] {
            assert!(parse_size(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn bytes_have_three_digits() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(999), "999 B");
        assert_eq!(bytes(1000), "1.00 kB");
        assert_eq!(bytes(999_999), "1.00 MB");
        assert_eq!(bytes(1 << 30), "1.07 GB");
        assert_eq!(bytes(u64::MAX), "18446.74 PB");
    }
}
