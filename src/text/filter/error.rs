//! Why a filter was refused.
//!
//! Owns the wording that a client gets to see, and cuts and escapes the text it
//! quotes. It never keeps more of a filter than it shows.

use std::borrow::Cow;
use std::fmt;

/// How many characters of the filter are shown before and after the error.
const CONTEXT: usize = 40;

/// A place in a filter, and what was expected there.
#[derive(Debug)]
pub(super) struct Fault {
    /// The byte offset into the filter.
    pub(super) position: usize,
    /// Completes the sentence "expected …".
    pub(super) expected: Cow<'static, str>,
}

impl Fault {
    /// A fault at the byte offset `position`.
    pub(super) fn new(position: usize, expected: impl Into<Cow<'static, str>>) -> Fault {
        Fault {
            position,
            expected: expected.into(),
        }
    }
}

/// A filter that cannot be used: not the filter language, or a regular
/// expression that does not compile or is too large.
///
/// The error's text contains the filter (of a long one the part around the error, with
/// control characters escaped), the byte position, and what was expected.
#[derive(Debug)]
pub struct FilterError {
    excerpt: String,
    position: usize,
    expected: Cow<'static, str>,
}

impl FilterError {
    /// Describes `fault`, whose position has to be a character boundary of the
    /// filter `text` or its end.
    pub(super) fn new(text: &str, fault: Fault) -> FilterError {
        FilterError {
            excerpt: excerpt(text, fault.position),
            position: fault.position,
            expected: fault.expected,
        }
    }
}

impl fmt::Display for FilterError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "invalid filter \"{}\": at byte {}: expected {}",
            self.excerpt, self.position, self.expected
        )
    }
}

impl std::error::Error for FilterError {}

/// The part of `text` around `position`, escaped, with `…` where it was cut.
fn excerpt(text: &str, position: usize) -> String {
    let (before, after) = text
        .split_at_checked(position)
        .expect("faults are at character boundaries of the filter");
    let start = before
        .char_indices()
        .rev()
        .nth(CONTEXT - 1)
        .map_or(0, |(index, _)| index);
    let end = after
        .char_indices()
        .nth(CONTEXT)
        .map_or(text.len(), |(index, _)| position + index);
    let mut shown = String::new();
    if start > 0 {
        shown.push('…');
    }
    shown.extend(text[start..end].escape_debug());
    if end < text.len() {
        shown.push('…');
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(text: &str, position: usize) -> String {
        FilterError::new(text, Fault::new(position, "something else")).to_string()
    }

    #[test]
    fn a_short_filter_is_shown_whole_and_escaped() {
        assert_eq!(
            shown("a\n\u{1b}[\"\0é", 3),
            "invalid filter \"a\\n\\u{1b}[\\\"\\0é\": at byte 3: expected something else"
        );
        assert_eq!(
            shown("", 0),
            "invalid filter \"\": at byte 0: expected something else"
        );
    }

    #[test]
    fn a_long_filter_is_cut_around_the_error() {
        let text = format!("{}X{}", "é".repeat(100_000), "ü".repeat(100_000));
        assert_eq!(
            shown(&text, 200_000),
            format!(
                "invalid filter \"…{}X{}…\": at byte 200000: expected something else",
                "é".repeat(CONTEXT),
                "ü".repeat(CONTEXT - 1)
            )
        );
        let end = shown(&text, text.len());
        assert!(end.contains(&format!("\"…{}\"", "ü".repeat(CONTEXT))));
        assert!(shown(&text, 0).contains(&format!("\"{}…\"", "é".repeat(CONTEXT))));
    }

    #[test]
    fn nothing_is_marked_as_cut_at_the_limit() {
        let text = format!("{}{}", "a".repeat(CONTEXT), "b".repeat(CONTEXT));
        assert!(!shown(&text, CONTEXT).contains('…'));
    }
}
