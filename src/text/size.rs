//! Parsing sizes as people write them. Pure.

/// Parses a number of bytes: decimal digits, with or without a unit (K, M, G or
/// T, powers of 1024, in either case; `i` or `iB` may follow it). `None` for
/// any other text, and for a number of more than 64 bits.
pub fn parse_bytes(text: &str) -> Option<u64> {
    let unit_at = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(unit_at);
    let mut letters = unit.chars();
    let shift = match letters.next() {
        None => 0,
        Some('K' | 'k') => 10,
        Some('M' | 'm') => 20,
        Some('G' | 'g') => 30,
        Some('T' | 't') => 40,
        Some(_) => return None,
    };
    if shift > 0 && !matches!(letters.as_str(), "" | "i" | "iB") {
        return None;
    }
    parse_number(number)?.checked_mul(1 << shift)
}

/// Parses decimal digits only: no sign, which `parse` would accept.
pub fn parse_number(text: &str) -> Option<u64> {
    let is_number = text.bytes().all(|byte| byte.is_ascii_digit());
    is_number.then(|| text.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units_of_1024() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("3K", 3 << 10),
            ("512Mi", 512 << 20),
            ("500m", 500 << 20),
            ("10G", 10 << 30),
            ("2GiB", 2 << 30),
            ("1t", 1 << 40),
        ] {
            assert_eq!(parse_bytes(text), Some(bytes), "{text}");
        }
        for nonsense in [
            "",
            "G",
            "Mi",
            "-1",
            "+1",
            "1.5G",
            "1 G",
            " 1G",
            "1G ",
            "1Q",
            "1GB",
            "1i",
            "1Gib",
            "0x10",
            "1e9",
            "99999999999T",
            "99999999999999999999",
            "٣",
        ] {
            assert_eq!(parse_bytes(nonsense), None, "{nonsense:?}");
        }
    }
}
