//! User and group id mappings, in the text form of containerd's labels.
//!
//! Owns the syntax `container:host:length[,container:host:length…]` of the
//! labels `containerd.io/snapshot/uidmapping` and
//! `containerd.io/snapshot/gidmapping`, and the checks that keep a mapping
//! unambiguous. It never applies a mapping to a file or a mount, and it never
//! reads labels itself.

use std::fmt;
use std::ops::Range;

/// How many ranges a mapping may have: the limit of the kernel for one map
/// (`user_namespaces(7)`).
const MAX_RANGES: usize = 340;

/// How many characters of a faulty text an error shows.
const SHOWN: usize = 80;

/// A one-to-one mapping from ids in a container to ids on the host.
///
/// A mapping has at least one and at most 340 ranges, of which no two have a
/// container id or a host id in common. [`IdMapping::parse`] reads the text of
/// containerd's labels `containerd.io/snapshot/uidmapping` and `gidmapping`
/// (`WithRemapperLabels` in `snapshotter_opts_unix.go`). [`Display`] writes the same
/// text, with the ranges ordered by container id and without leading zeros, for the
/// mount option `uidmap=…`.
///
/// [`Display`]: fmt::Display
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdMapping {
    /// Ordered by `container`.
    ranges: Vec<IdRange>,
}

/// Maps the `length` container ids that begin with `container` to as many host ids
/// that begin with `host`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct IdRange {
    container: u32,
    host: u32,
    length: u32,
}

impl IdRange {
    fn container_ids(self) -> Range<u32> {
        self.container..self.container + self.length
    }

    fn host_ids(self) -> Range<u32> {
        self.host..self.host + self.length
    }
}

impl IdMapping {
    /// Parses comma-separated ranges `container:host:length`, each part an
    /// unsigned decimal number of 32 bits.
    ///
    /// The ranges may come in any order. The kernel gives the id 4294967295 the
    /// meaning "no id", so no range may contain this id.
    ///
    /// # Errors
    ///
    /// Returns an error for the first range for which one of these is true:
    /// - it does not have exactly three parts, as in the empty text,
    /// - a part contains something other than digits, or is empty or too large,
    /// - its length is 0,
    /// - it reaches past the last id,
    /// - it has a container id or a host id in common with an earlier range,
    /// - the text has more than 340 ranges, and this is the first one too many.
    pub fn parse(text: &str) -> Result<IdMapping, IdMappingError> {
        let mut ranges: Vec<IdRange> = Vec::new();
        for (index, part) in text.split(',').enumerate() {
            let refuse = |problem: String| IdMappingError::new(part, index + 1, &problem);
            if index == MAX_RANGES {
                return Err(refuse(format!("is one too many: {MAX_RANGES} are allowed")));
            }
            let range = parse_range(part).map_err(refuse)?;
            for (earlier_index, earlier) in ranges.iter().enumerate() {
                let side = if overlap(&earlier.container_ids(), &range.container_ids()) {
                    "container"
                } else if overlap(&earlier.host_ids(), &range.host_ids()) {
                    "host"
                } else {
                    continue;
                };
                let earlier = earlier_index + 1;
                return Err(refuse(format!(
                    "must have no {side} ids in common with range {earlier}"
                )));
            }
            ranges.push(range);
        }
        ranges.sort_unstable_by_key(|range| range.container);
        Ok(IdMapping { ranges })
    }

    /// The id on the host for an id in the container, or `None` when no range
    /// has that id.
    #[must_use]
    pub fn host_id(&self, container_id: u32) -> Option<u32> {
        let after = self
            .ranges
            .partition_point(|range| range.container <= container_id);
        let range = self.ranges[..after].last()?;
        let offset = container_id - range.container;
        (offset < range.length).then(|| range.host + offset)
    }
}

impl fmt::Display for IdMapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        for IdRange {
            container,
            host,
            length,
        } in &self.ranges
        {
            write!(f, "{separator}{container}:{host}:{length}")?;
            separator = ",";
        }
        Ok(())
    }
}

fn parse_range(text: &str) -> Result<IdRange, String> {
    let mut parts = text.split(':');
    let (Some(container), Some(host), Some(length), None) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Err("must be container:host:length, as in 0:100000:65536".to_owned());
    };
    let range = IdRange {
        container: parse_number(container, "container id")?,
        host: parse_number(host, "host id")?,
        length: parse_number(length, "length")?,
    };
    if range.length == 0 {
        return Err("must have a length of at least 1".to_owned());
    }
    for (start, side) in [(range.container, "container"), (range.host, "host")] {
        if start.checked_add(range.length).is_none() {
            let last = u32::MAX - 1;
            return Err(format!("must end at the {side} id {last} or before it"));
        }
    }
    Ok(range)
}

fn parse_number(text: &str, part: &str) -> Result<u32, String> {
    // Digits only: the parser of the standard library also takes a plus sign.
    let is_decimal = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let number = text.parse().ok().filter(|_| is_decimal);
    number.ok_or_else(|| {
        format!(
            "must have a decimal number up to {} as its {part}",
            u32::MAX
        )
    })
}

/// Whether two ranges that are not empty have an id in common.
fn overlap(a: &Range<u32>, b: &Range<u32>) -> bool {
    a.start < b.end && b.start < a.end
}

/// An id mapping that cannot be used.
///
/// The error's text contains the faulty range (shortened, with control characters
/// escaped), the range's number, counted from one, and what would be right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdMappingError(String);

impl IdMappingError {
    fn new(range: &str, number: usize, problem: &str) -> IdMappingError {
        let end = range.char_indices().nth(SHOWN).map(|(index, _)| index);
        let shown = range[..end.unwrap_or(range.len())].escape_debug();
        let cut = if end.is_some() { "…" } else { "" };
        IdMappingError(format!(
            "invalid id mapping: range {number} (\"{shown}{cut}\") {problem}"
        ))
    }
}

impl fmt::Display for IdMappingError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for IdMappingError {}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> IdMapping {
        IdMapping::parse(text).unwrap_or_else(|error| panic!("{error}"))
    }

    /// Checks the number of the refused range and how the error ends.
    #[track_caller]
    fn check_refused(cases: &[(&str, usize, &str)]) {
        for (text, number, ending) in cases {
            let error = IdMapping::parse(text).expect_err("the mapping is faulty");
            let message = error.to_string();
            let range = format!("invalid id mapping: range {number} (");
            assert!(message.starts_with(&range), "{message}");
            assert!(message.ends_with(ending), "{message}");
            assert!(message.len() < 1000, "{message}");
            assert!(!message.contains(char::is_control), "{message:?}");
        }
    }

    #[test]
    fn ids_are_mapped_by_their_range() {
        let mapping = parsed("0:1000:1,1:100000:65536,70000:5:10");
        for (container, host) in [
            (0, Some(1000)),
            (1, Some(100_000)),
            (2, Some(100_001)),
            (65536, Some(165_535)),
            (65537, None),
            (69999, None),
            (70000, Some(5)),
            (70009, Some(14)),
            (70010, None),
            (u32::MAX, None),
        ] {
            assert_eq!(mapping.host_id(container), host, "{container}");
        }
        assert_eq!(parsed("1:0:1").host_id(0), None);
    }

    #[test]
    fn the_whole_id_space_can_be_mapped() {
        let mapping = parsed("0:0:4294967295");
        assert_eq!(mapping.host_id(0), Some(0));
        assert_eq!(mapping.host_id(u32::MAX - 1), Some(u32::MAX - 1));
        assert_eq!(mapping.host_id(u32::MAX), None);
        let last = parsed("4294967294:4294967294:1");
        assert_eq!(last.host_id(u32::MAX - 1), Some(u32::MAX - 1));
    }

    #[test]
    fn the_text_form_is_canonical() {
        for (text, canonical) in [
            ("0:100000:65536", "0:100000:65536"),
            ("10:5:1,0:100:10", "0:100:10,10:5:1"),
            ("00:0100:000000000010", "0:100:10"),
        ] {
            let mapping = parsed(text);
            assert_eq!(mapping.to_string(), canonical);
            assert_eq!(parsed(canonical), mapping);
        }
    }

    #[test]
    fn adjacent_ranges_do_not_overlap() {
        let mapping = parsed("10:20:10,0:10:10,20:0:10");
        assert_eq!(mapping.host_id(9), Some(19));
        assert_eq!(mapping.host_id(10), Some(20));
        assert_eq!(mapping.host_id(29), Some(9));
    }

    #[test]
    fn ranges_without_three_parts_are_refused() {
        let ending = "must be container:host:length, as in 0:100000:65536";
        check_refused(&[
            ("", 1, ending),
            ("0", 1, ending),
            ("0:1", 1, ending),
            ("0:1:2:3", 1, ending),
            ("0:0:1,", 2, ending),
            (",0:0:1", 1, ending),
            ("0:0:1,,1:1:1", 2, ending),
            ("0:0:1;1:1:1", 1, ending),
        ]);
    }

    #[test]
    fn parts_that_are_not_decimal_numbers_are_refused() {
        let container = "must have a decimal number up to 4294967295 as its container id";
        let host = "must have a decimal number up to 4294967295 as its host id";
        let length = "must have a decimal number up to 4294967295 as its length";
        check_refused(&[
            (":0:1", 1, container),
            ("0::1", 1, host),
            ("0:0:", 1, length),
            ("::", 1, container),
            ("+0:0:1", 1, container),
            ("-0:0:1", 1, container),
            ("0:-1:1", 1, host),
            ("0:0:+1", 1, length),
            (" 0:0:1", 1, container),
            ("0:0:1 ", 1, length),
            ("0: 0:1", 1, host),
            ("0:0:1, 1:1:1", 2, container),
            ("0:0:1\n", 1, length),
            ("0:0:1\0", 1, length),
            ("0x1:0:1", 1, container),
            ("1e3:0:1", 1, container),
            ("٣:0:1", 1, container),
            ("4294967296:0:1", 1, container),
            ("0:99999999999999999999:1", 1, host),
            ("0:0:4294967296", 1, length),
        ]);
    }

    #[test]
    fn empty_and_overflowing_ranges_are_refused() {
        check_refused(&[
            ("0:0:0", 1, "must have a length of at least 1"),
            ("0:0:1,1:1:0", 2, "must have a length of at least 1"),
            (
                "1:0:4294967295",
                1,
                "must end at the container id 4294967294 or before it",
            ),
            (
                "0:1:4294967295",
                1,
                "must end at the host id 4294967294 or before it",
            ),
            (
                "4294967295:0:1",
                1,
                "must end at the container id 4294967294 or before it",
            ),
            (
                "0:4294967295:1",
                1,
                "must end at the host id 4294967294 or before it",
            ),
        ]);
    }

    #[test]
    fn overlapping_ranges_are_refused() {
        check_refused(&[
            (
                "0:0:10,9:100:1",
                2,
                "must have no container ids in common with range 1",
            ),
            (
                "5:0:1,100:100:1,0:50:10",
                3,
                "must have no container ids in common with range 1",
            ),
            (
                "0:100:10,10:91:10",
                2,
                "must have no host ids in common with range 1",
            ),
            (
                "0:0:1,1:100:10,20:105:1",
                3,
                "must have no host ids in common with range 2",
            ),
            (
                "0:0:1,0:0:1",
                2,
                "must have no container ids in common with range 1",
            ),
        ]);
    }

    #[test]
    fn the_number_of_ranges_is_bounded() {
        let many = |count: usize| {
            let ranges: Vec<String> = (0..count).map(|id| format!("{id}:{id}:1")).collect();
            ranges.join(",")
        };
        assert_eq!(parsed(&many(340)).ranges.len(), 340);
        check_refused(&[(&many(341), 341, "is one too many: 340 are allowed")]);
        // The ranges after the first one too many are not read.
        check_refused(&[(
            &format!("{},x{}", many(340), ",".repeat(1 << 20)),
            341,
            "is one too many: 340 are allowed",
        )]);
    }

    #[test]
    fn errors_show_a_short_and_escaped_text() {
        let error = IdMapping::parse("0:0:1,\u{1b}[31m\n\"").expect_err("faulty");
        assert_eq!(
            error.to_string(),
            "invalid id mapping: range 2 (\"\\u{1b}[31m\\n\\\"\") must be container:host:length, \
             as in 0:100000:65536"
        );
        let error = IdMapping::parse(&"é".repeat(1 << 20)).expect_err("faulty");
        assert!(
            error
                .to_string()
                .contains(&format!("(\"{}…\")", "é".repeat(SHOWN)))
        );
    }
}
