//! The filters of a `List` request, in containerd's filter language.
//!
//! This module owns the language from its text to the verdict on one snapshot:
//! scanning, unquoting, parsing, compiling regular expressions, and matching.
//! It never touches the metadata store, never logs, and never panics on what a
//! client sent: a filter is either understood completely or refused with a
//! [`FilterError`].
//!
//! A filter is a comma-separated list of selectors that must all hold:
//!
//! ```text
//! selectors := selector ("," selector)*
//! selector  := fieldpath [operator value]
//! fieldpath := field ("." field)*
//! field     := [A-Za-z0-9_]+ | quoted
//! operator  := "==" | "!=" | "~="
//! value     := a run of visible characters other than "," | quoted
//! quoted    := '"' … '"', and for the value of "~=" also /…/ and |…|
//! ```
//!
//! The behaviour follows containerd's `filters` package (`filters/parser.go`,
//! `filters/scanner.go`, `filters/quote.go`) and the fields a snapshot has
//! there (`adaptSnapshot` in `snapshots/storage/bolt.go`), except that a
//! regular expression that does not compile is refused while parsing.

mod error;
mod parser;
mod pattern;
mod quote;
mod scanner;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use regex_lite::Regex;

pub use self::error::FilterError;

/// What a filter may look at in one snapshot.
///
/// The field paths are those of `adaptSnapshot` in containerd's
/// `snapshots/storage/bolt.go`: `name`, `parent`, `kind` and `labels.<key>`.
#[derive(Clone, Copy, Debug)]
pub struct Subject<'a> {
    /// The key of the snapshot; always present, even when empty.
    pub name: &'a str,
    /// The key of the parent; always present, and empty for a base snapshot.
    pub parent: &'a str,
    /// `active`, `view` or `committed`; any other text counts as absent.
    pub kind: &'a str,
    /// The labels; a label is present when its key is in the map.
    pub labels: &'a BTreeMap<String, String>,
}

/// The parsed filters of one request, of which at least one has to match.
///
/// No filters at all, or an empty one among them, match every snapshot
/// (`ParseAll` in containerd's `filters/parser.go`).
#[derive(Debug)]
pub struct Filters {
    /// Each alternative is a list of conditions that must all hold. If there is no
    /// alternative, the filters match every snapshot.
    alternatives: Vec<Vec<Selector>>,
}

impl Filters {
    /// Filters that match every snapshot.
    #[must_use]
    pub fn all() -> Filters {
        Filters {
            alternatives: Vec::new(),
        }
    }

    /// Parses the filters of a request, each of which is one alternative.
    ///
    /// # Errors
    ///
    /// Returns the first error found when a filter does not follow the grammar,
    /// when a regular expression does not compile or exceeds the size allowed
    /// for one, or when the request has more regular expressions than allowed.
    /// Every filter is checked, even after one that matches everything.
    pub fn parse<S: AsRef<str>>(filters: &[S]) -> Result<Filters, FilterError> {
        let mut patterns_left = pattern::MAX_PATTERNS;
        let mut alternatives = Vec::with_capacity(filters.len());
        for filter in filters {
            let text = filter.as_ref();
            let selectors = parser::parse(text, &mut patterns_left)
                .map_err(|fault| FilterError::new(text, fault))?;
            alternatives.push(selectors);
        }
        if alternatives.iter().any(Vec::is_empty) {
            alternatives.clear();
        }
        Ok(Filters { alternatives })
    }

    /// Whether the filters match every snapshot, so that matching can be skipped.
    #[must_use]
    pub fn is_all(&self) -> bool {
        self.alternatives.is_empty()
    }

    /// Whether at least one of the filters matches the snapshot.
    #[must_use]
    pub fn matches(&self, subject: &Subject<'_>) -> bool {
        self.is_all()
            || self
                .alternatives
                .iter()
                .any(|selectors| selectors.iter().all(|selector| selector.matches(subject)))
    }
}

/// One condition on one field.
#[derive(Debug)]
struct Selector {
    field: Field,
    test: Test,
}

impl Selector {
    /// Applies the condition (`selector.Match` in containerd's
    /// `filters/filter.go`).
    ///
    /// `==` and the test for presence never match an absent field. `!=` and `~=`
    /// treat an absent field as an empty text: `labels.a!=""` does not match a
    /// snapshot without that label, and `labels.a~=^$` matches it.
    fn matches(&self, subject: &Subject<'_>) -> bool {
        let value = self.field.of(subject);
        match &self.test {
            Test::Present => value.is_some(),
            Test::Equal(wanted) => value.is_some_and(|value| value.as_bytes() == &**wanted),
            Test::NotEqual(unwanted) => value.unwrap_or_default().as_bytes() != &**unwanted,
            Test::Matches(regex) => regex.is_match(value.unwrap_or_default()),
        }
    }
}

/// The field that a path leads to.
#[derive(Debug)]
enum Field {
    Name,
    Parent,
    Kind,
    Label(Box<str>),
    /// A field that no snapshot has. A filter may name it; it counts as absent.
    Unknown,
}

impl Field {
    /// Resolves a path, given as its first element and the others joined by
    /// dots.
    ///
    /// What follows `name`, `parent` or `kind` is ignored, as in containerd.
    fn resolve(first: &[u8], others: Vec<u8>) -> Field {
        match first {
            b"name" => Field::Name,
            b"parent" => Field::Parent,
            b"kind" => Field::Kind,
            // A key with raw bytes from `\x` escapes that is not UTF-8 cannot
            // be the key of any label.
            b"labels" => String::from_utf8(others)
                .map_or(Field::Unknown, |key| Field::Label(key.into_boxed_str())),
            _ => Field::Unknown,
        }
    }

    /// The value of the field in `subject`, unless it is absent.
    fn of<'a>(&self, subject: &Subject<'a>) -> Option<&'a str> {
        match self {
            Field::Name => Some(subject.name),
            Field::Parent => Some(subject.parent),
            Field::Kind => {
                matches!(subject.kind, "active" | "view" | "committed").then_some(subject.kind)
            }
            Field::Label(key) => subject.labels.get(&**key).map(String::as_str),
            Field::Unknown => None,
        }
    }
}

/// What has to hold for the value of a field.
///
/// The operands are bytes because escapes can spell text that is not UTF-8.
/// Boxes keep a selector small: a request may carry very many of them.
#[derive(Debug)]
enum Test {
    Present,
    Equal(Box<[u8]>),
    NotEqual(Box<[u8]>),
    Matches(Box<Regex>),
}
