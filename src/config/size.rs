//! Sizes as people write them.

use super::invalid;
use crate::error::Result;
use crate::volume::Reserve;

/// Reads bytes, with or without a unit (K, M, G, T: powers of 1024; `iB` may
/// follow), or a percentage from 0% to 99%.
pub(super) fn parse_reserve(flag: &str, text: &str) -> Result<Reserve> {
    let parsed = match text.strip_suffix('%') {
        Some(number) => digits(number)
            .and_then(|percent| u8::try_from(percent).ok())
            .filter(|percent| *percent < 100)
            .map(Reserve::Percent),
        None => parse_bytes(text).map(Reserve::Bytes),
    };
    parsed.ok_or_else(|| {
        invalid(format!(
            "{flag} is {text:?}, it has to be a size such as 500M or 2G, or a percentage from \
             0% to 99%"
        ))
    })
}

fn parse_bytes(text: &str) -> Option<u64> {
    let text = text.strip_suffix("iB").unwrap_or(text);
    let unit_at = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(unit_at);
    let shift = match unit {
        "" => 0,
        "K" | "k" => 10,
        "M" | "m" => 20,
        "G" | "g" => 30,
        "T" | "t" => 40,
        _ => return None,
    };
    digits(number)?.checked_mul(1 << shift)
}

/// Decimal digits only: no sign, which `parse` would take.
fn digits(text: &str) -> Option<u64> {
    let is_number = text.bytes().all(|byte| byte.is_ascii_digit());
    is_number.then(|| text.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_percentages() {
        let read = |text| parse_reserve("--reserve", text).ok();
        assert_eq!(read("0"), Some(Reserve::Bytes(0)));
        assert_eq!(read("4096"), Some(Reserve::Bytes(4096)));
        assert_eq!(read("3K"), Some(Reserve::Bytes(3 << 10)));
        assert_eq!(read("500m"), Some(Reserve::Bytes(500 << 20)));
        assert_eq!(read("2GiB"), Some(Reserve::Bytes(2 << 30)));
        assert_eq!(read("1T"), Some(Reserve::Bytes(1 << 40)));
        assert_eq!(read("0%"), Some(Reserve::Percent(0)));
        assert_eq!(read("99%"), Some(Reserve::Percent(99)));
        for nonsense in [
            "",
            "G",
            "-1",
            "+1",
            "1.5G",
            "1 G",
            "1Q",
            "100%",
            "%",
            "5%%",
            "99999999999T",
        ] {
            assert_eq!(read(nonsense), None, "{nonsense:?}");
        }
    }
}
