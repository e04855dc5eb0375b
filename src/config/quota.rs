//! How much containers may write.

use std::time::Duration;

use super::wrong;
use crate::error::{Error, Result};
use crate::quota::ProjectRange;
use crate::snapshotter::{QuotaMode, QuotaOptions, limits};
use crate::text::size::parse_number;
use crate::types::Limits;

/// The flags as they were given.
pub(super) struct Given<'a> {
    pub mode: &'a str,
    pub ids: Option<&'a str>,
    pub max_size: Option<&'a str>,
    pub max_inodes: Option<&'a str>,
    pub usage_max_age: u32,
}

pub(super) fn check(given: &Given<'_>) -> Result<QuotaOptions> {
    let mode = match given.mode {
        "auto" => QuotaMode::Auto,
        "require" => QuotaMode::Require,
        "off" => QuotaMode::Off,
        other => {
            return Err(wrong("--quota", other, "\"auto\", \"require\" or \"off\""));
        }
    };
    let ids = match given.ids {
        None => ProjectRange::DEFAULT,
        Some(text) => parse_range(text).ok_or_else(|| {
            let right = format!(
                "two numbers from 1 to 4294967294 with a dash between them, such as {}",
                ProjectRange::DEFAULT
            );
            wrong("--quota-ids", text, right)
        })?,
    };
    let limit = |flag: &str, text: Option<&str>, parse: fn(&str) -> Option<u64>, wanted: String| {
        let Some(text) = text else {
            return Ok(None);
        };
        let number = parse(text).ok_or_else(|| wrong(flag, text, wanted))?;
        if number > 0 && mode == QuotaMode::Off {
            return Err(Error::invalid(format!(
                "{flag} {text} needs quotas, which --quota off switches off"
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
                given.max_size,
                limits::parse_size,
                limits::size_wanted(),
            )?,
            max_inodes: limit(
                "--default-max-inodes",
                given.max_inodes,
                limits::parse_inodes,
                limits::inodes_wanted(),
            )?,
        },
        usage_max_age: Duration::from_secs(given.usage_max_age.into()),
    })
}

fn parse_range(text: &str) -> Option<ProjectRange> {
    let (first, last) = text.split_once('-')?;
    let number = |text| parse_number(text)?.try_into().ok();
    ProjectRange::new(number(first)?, number(last)?)
}

#[cfg(test)]
mod tests {
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
        let given = |mode, max_size, max_inodes| {
            check(&Given {
                mode,
                ids: None,
                max_size,
                max_inodes,
                usage_max_age: 0,
            })
        };
        let limited = given("auto", Some("10G"), Some("1000")).unwrap().default;
        assert_eq!(limited.max_bytes, Some(10 << 30));
        assert_eq!(limited.max_inodes, Some(1000));
        assert_eq!(
            given("off", Some("0"), Some("0")).unwrap().default,
            Limits::NONE
        );
        for (mode, size, inodes, said) in [
            ("on", None, None, "\"require\""),
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
}
