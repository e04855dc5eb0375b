//! What has to stay free, as people write it.

use super::wrong;
use crate::error::Result;
use crate::text::size::{parse_bytes, parse_number};
use crate::volume::Reserve;

/// Reads bytes, with or without a unit (K, M, G, T: powers of 1024; `iB` may
/// follow), or a percentage from 0% to 99%.
pub(super) fn parse_reserve(flag: &str, text: &str) -> Result<Reserve> {
    let parsed = match text.strip_suffix('%') {
        Some(number) => parse_number(number)
            .and_then(|percent| u8::try_from(percent).ok())
            .filter(|percent| *percent < 100)
            .map(Reserve::Percent),
        None => parse_bytes(text).map(Reserve::Bytes),
    };
    let right = "a size such as 500M or 2G, or a percentage from 0% to 99%";
    parsed.ok_or_else(|| wrong(flag, text, right))
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
