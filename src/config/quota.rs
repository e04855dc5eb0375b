//! Reads the flags that limit how much containers may write, and how much space has to stay
//! free.

use super::flags::seconds;
use super::{Flags, wrong};
use crate::error::{Error, Result};
use crate::quota::ProjectRange;
use crate::snapshotter::{QuotaMode, QuotaOptions, limits};
use crate::text::size::{parse_bytes, parse_number};
use crate::types::Limits;
use crate::volume::Reserve;

/// Parses the flags of quotas.
pub(super) fn check(given: &Flags) -> Result<QuotaOptions> {
    let mode = match given.quota.as_deref() {
        Some("require") => QuotaMode::Require,
        Some("off") => QuotaMode::Off,
        _ => QuotaMode::Auto,
    };
    let ids = match given.quota_ids.as_deref() {
        None => ProjectRange::DEFAULT,
        Some(text) => parse_range(text).ok_or_else(|| {
            let right = format!(
                "two numbers from 1 to 4294967294 with a dash between them, such as {}",
                ProjectRange::DEFAULT
            );
            wrong("--quota-ids", text, right)
        })?,
    };
    let limit = |flag: &str, text: &Option<String>, parse: fn(&str) -> Option<u64>, wanted| {
        let Some(text) = text else {
            return Ok(None);
        };
        let number = parse(text).ok_or_else(|| wrong(flag, text, wanted))?;
        if number > 0 && mode == QuotaMode::Off {
            return Err(Error::invalid(format!(
                "{flag} {text} needs project quotas, which --quota off switches off: remove one \
                 of the two"
            )));
        }
        Ok((number > 0).then_some(number))
    };
    Ok(QuotaOptions {
        mode,
        ids,
        default: Limits {
            max_bytes: limit(
                "--default-max-size",
                &given.default_max_size,
                limits::parse_size,
                limits::size_wanted(),
            )?,
            max_inodes: limit(
                "--default-max-inodes",
                &given.default_max_inodes,
                limits::parse_inodes,
                limits::inodes_wanted(),
            )?,
        },
        usage_max_age: seconds("--usage-max-age", given.usage_max_age.as_deref(), 0)?,
    })
}

fn parse_range(text: &str) -> Option<ProjectRange> {
    let (first, last) = text.split_once('-')?;
    let number = |text| parse_number(text)?.try_into().ok();
    ProjectRange::new(number(first)?, number(last)?)
}

/// Parses `--reserve`: bytes, with or without a unit (K, M, G, T: powers of 1024; `iB`
/// may follow), or a percentage from 0% to 99%.
pub(super) fn parse_reserve(text: &str) -> Result<Reserve> {
    let parsed = match text.strip_suffix('%') {
        Some(number) => parse_number(number)
            .and_then(|percent| u8::try_from(percent).ok())
            .filter(|percent| *percent < 100)
            .map(Reserve::Percent),
        None => parse_bytes(text).map(Reserve::Bytes),
    };
    let right = "a size such as 500M or 2G, or a percentage from 0% to 99%";
    parsed.ok_or_else(|| wrong("--reserve", text, right))
}

#[cfg(test)]
mod tests {
    use super::super::flags::Arguments;
    use super::*;

    #[test]
    fn ranges_are_two_numbers() {
        let read = |text| parse_range(text).map(|range| range.to_string());
        assert_eq!(read("7-9").as_deref(), Some("7-9"));
        assert_eq!(read("5-5").as_deref(), Some("5-5"));
        for wrong in [
            "",
            "7",
            "-",
            "7-",
            "-9",
            "9-7",
            "0-9",
            "+7-9",
            "7--9",
            "7-9-11",
            "7 - 9",
            "1-4294967295",
            "1-99999999999",
            "a-b",
        ] {
            assert_eq!(read(wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn limits_need_quotas() {
        let given = |mode, max_size: Option<&str>, max_inodes: Option<&str>| {
            let mut words = vec![format!("--quota={mode}")];
            words.extend(max_size.map(|size| format!("--default-max-size={size}")));
            words.extend(max_inodes.map(|inodes| format!("--default-max-inodes={inodes}")));
            match Arguments::parse(words.into_iter().map(Into::into).collect())? {
                Arguments::Given { flags, .. } => check(&flags),
                _ => panic!("neither help nor version"),
            }
        };
        let limited = given("auto", Some("10G"), Some("1000")).unwrap().default;
        assert_eq!(limited.max_bytes, Some(10 << 30));
        assert_eq!(limited.max_inodes, Some(1000));
        assert_eq!(
            given("off", Some("0"), Some("0")).unwrap().default,
            Limits::NONE
        );
        for (mode, size, inodes, said) in [
            ("off", Some("10G"), None, "--quota off"),
            ("off", None, Some("100"), "--quota off"),
            ("auto", Some("10X"), None, "--default-max-size is \"10X\""),
            ("auto", Some("1K"), None, "at least 1M"),
            ("auto", None, Some("3"), "--default-max-inodes is \"3\""),
        ] {
            let text = given(mode, size, inodes).unwrap_err().chain();
            assert!(text.contains(said), "{text}");
        }
    }

    #[test]
    fn sizes_and_percentages() {
        let read = |text| parse_reserve(text).ok();
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
