//! The regular expressions of `~=`.
//!
//! Owns the limits that keep a client's expressions from costing much memory or
//! time. It never interprets an expression itself: that is `regex_lite`'s work,
//! which bounds nesting and whose matching time is linear in the value.
//!
//! The dialect is that of `regex_lite`, which is close to Go's `regexp` but not
//! the same. `regex_lite` refuses Unicode classes (`\pL`), `\Q…\E`, octal escapes and
//! literal braces (`x{1`). It reads these differently from Go: `\<`, `\>`
//! and `\b{start}` are word boundaries, spaces may stand inside the braces of a
//! repetition, `\s` includes the vertical tab, `(?i)` folds ASCII only, and a
//! class that starts with `--` is read differently.

use std::borrow::Cow;

use regex_lite::{Regex, RegexBuilder};

/// How many regular expressions the filters of one request may have together.
pub(super) const MAX_PATTERNS: usize = 64;

/// How large, in bytes, one compiled expression may become. Counted repetition
/// makes a few bytes of text arbitrarily large, and matching visits every state
/// for every character of a value.
const MAX_COMPILED: usize = 256 * 1024;

/// How long, in bytes, the text of one expression may be. Its syntax tree is
/// built before the compiled size is known, and is many times as large.
const MAX_TEXT: usize = 32 * 1024;

/// Compiles the expression spelled by `text`.
///
/// # Errors
///
/// If `text` is not UTF-8, exceeds a limit or does not compile, returns the end of a
/// sentence that begins with "expected".
pub(super) fn compile(text: Vec<u8>) -> Result<Regex, Cow<'static, str>> {
    if text.len() > MAX_TEXT {
        return Err(format!("a regular expression of at most {MAX_TEXT} bytes").into());
    }
    let text =
        String::from_utf8(text).map_err(|_| Cow::from("a regular expression that is UTF-8"))?;
    RegexBuilder::new(&text)
        .size_limit(MAX_COMPILED)
        .build()
        .map_err(|error| format!("a regular expression that compiles ({error})").into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(text: &str) -> String {
        compile(text.as_bytes().to_vec())
            .expect_err("the expression is refused")
            .into_owned()
    }

    #[test]
    fn ordinary_expressions_compile() {
        let digests: Vec<String> = (0..100).map(|n| format!("sha256:{n:064x}")).collect();
        for text in [
            "",
            ".*",
            "^[a-z0-9]+(?:[._-][a-z0-9]+)*$",
            r"(?i)layer-\d{1,255}",
            "[[:alpha:]]",
            &format!("^(?:{})$", digests.join("|")),
        ] {
            assert!(compile(text.into()).is_ok(), "{text}");
        }
    }

    #[test]
    fn faulty_expressions_are_refused() {
        for text in [
            "(", ")", "[", "*", "a{", "a{2,1}", r"\", r"\1", "(?=a)", r"\pL", r"\Qa\E", r"\101",
            "x{1",
        ] {
            assert!(
                refusal(text).starts_with("a regular expression that compiles ("),
                "{text}"
            );
        }
        assert_eq!(
            compile(b"\xff".to_vec()).expect_err("not UTF-8"),
            "a regular expression that is UTF-8"
        );
    }

    #[test]
    fn large_expressions_are_refused() {
        for text in [
            "a{1000000}",
            "(?:){4294967295}",
            "(?:^){4294967295}",
            "(?:a{0}){4294967295}",
            "(((a{1000}){1000}){1000}){1000}",
            "(?:(?:){1000}){1000}",
            "[^a]{100000}",
            ".{0,100000}",
        ] {
            assert!(refusal(text).contains("size limit"), "{text}");
        }
        assert!(refusal(&"a".repeat(MAX_TEXT + 1)).contains("bytes"));
        assert!(refusal(&"a".repeat(MAX_TEXT)).contains("size limit"));
    }

    #[test]
    fn deep_expressions_are_refused_without_exhausting_the_stack() {
        for text in [
            "(".repeat(MAX_TEXT),
            format!("{}{}", "(".repeat(1000), ")".repeat(1000)),
            format!("a{}", "*".repeat(MAX_TEXT - 1)),
            format!("a{}", "{1,2}".repeat(MAX_TEXT / 6)),
            format!("(?x)a{}", "+ ".repeat(MAX_TEXT / 3)),
            "[[".repeat(1000),
        ] {
            // Threads that answer requests have small stacks.
            let outcome = std::thread::Builder::new()
                .stack_size(512 * 1024)
                .spawn(move || compile(text.into_bytes()).is_err())
                .expect("a thread can be started")
                .join();
            assert!(outcome.expect("no panic"));
        }
    }
}
