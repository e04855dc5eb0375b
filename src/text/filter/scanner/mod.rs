//! Splits a filter into tokens.
//!
//! Owns which characters make up which token. It never judges the order of
//! tokens, and it never goes on after a fault. Work is linear in the text.
//!
//! Follows containerd's `filters/scanner.go`: white space before a token is skipped
//! when the token is read, but the parser sees the white space when it peeks.

use super::error::Fault;
use super::quote;

/// One token. All but a quoted literal borrow their text from the filter.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Token<'a> {
    /// A run of ASCII letters, digits and underscores.
    Field(&'a str),
    /// A run of `=`, `!` and `~`, not necessarily one that is an operator.
    Operator(&'a str),
    /// An unquoted value, which follows an operator.
    Value(&'a str),
    /// A quoted literal, decoded.
    Quoted {
        /// The delimiter: `"`, `/` or `|`.
        quote: char,
        /// The bytes that the literal stands for.
        content: Vec<u8>,
    },
    /// `,` or `.`.
    Separator(char),
    /// A character that cannot start any token.
    Stray(char),
    /// The end of the filter.
    End,
}

/// The scanner's place in a filter.
pub(super) struct Scanner<'a> {
    text: &'a str,
    position: usize,
    /// Whether the last token was an operator, so that an unquoted word is a value.
    value_follows: bool,
}

impl<'a> Scanner<'a> {
    /// A scanner at the start of `text`.
    pub(super) fn new(text: &'a str) -> Scanner<'a> {
        Scanner {
            text,
            position: 0,
            value_follows: false,
        }
    }

    /// The byte offset of the next character.
    pub(super) fn position(&self) -> usize {
        self.position
    }

    /// The next character, white space included, without consuming it.
    pub(super) fn peek(&self) -> Option<char> {
        self.text[self.position..].chars().next()
    }

    /// Skips white space and consumes the next token; also returns the byte
    /// offset it starts at.
    ///
    /// # Errors
    ///
    /// Fails on a character that no filter may contain and on a quoted literal
    /// that is not legal.
    pub(super) fn token(&mut self) -> Result<(usize, Token<'a>), Fault> {
        let rest = self.text[self.position..].trim_start();
        let start = self.text.len() - rest.len();
        let mut characters = rest.chars();
        let Some(first) = characters.next() else {
            self.position = start;
            return Ok((start, Token::End));
        };
        let after_first = characters.as_str();

        let expects_value = std::mem::take(&mut self.value_follows);
        let (token, end) = match readable(first, start)? {
            '"' | '/' | '|' => {
                let literal = quote::decode(self.text, start)?;
                let token = Token::Quoted {
                    quote: first,
                    content: literal.content,
                };
                (token, literal.end)
            }
            ',' | '.' => (Token::Separator(first), start + 1),
            '=' | '!' | '~' => {
                self.value_follows = true;
                let run = leading(rest, |c| matches!(c, '=' | '!' | '~'));
                (Token::Operator(run), start + run.len())
            }
            // Only what comes after the first character of a value is
            // restricted; the first may even be a control character.
            _ if expects_value => {
                let tail = leading(after_first, is_value);
                let length = first.len_utf8() + tail.len();
                (Token::Value(&rest[..length]), start + length)
            }
            c if is_field(c) => {
                let run = leading(rest, is_field);
                (Token::Field(run), start + run.len())
            }
            _ => (Token::Stray(first), start + first.len_utf8()),
        };
        self.position = end;
        Ok((start, token))
    }
}

/// Returns `character`, found at the byte offset `position`, if a filter may contain
/// it.
///
/// # Errors
///
/// Fails at `position` for NUL and for U+FFFD. containerd refuses both: it takes
/// U+FFFD for a sign of invalid UTF-8, even if the filter contains this character.
pub(super) fn readable(character: char, position: usize) -> Result<char, Fault> {
    match character {
        '\0' => Err(Fault::new(position, "text without NUL characters")),
        char::REPLACEMENT_CHARACTER => Err(Fault::new(
            position,
            "text without the replacement character U+FFFD",
        )),
        _ => Ok(character),
    }
}

/// The longest prefix of `text` whose characters are all `accepted`.
fn leading(text: &str, accepted: fn(char) -> bool) -> &str {
    let end = text.find(|c| !accepted(c)).unwrap_or(text.len());
    &text[..end]
}

fn is_field(character: char) -> bool {
    character == '_' || character.is_ascii_alphanumeric()
}

/// Whether an unquoted value can continue with `character`.
///
/// containerd accepts what Go calls graphic characters: the Unicode categories L, M,
/// N, P, S and Zs. White space ends a value. So controls (Cc), formatting characters
/// (Cf), private use (Co) and unassigned characters (Cn) are refused. Rust's `char`
/// knows only the controls; Cf and Co are small, and are listed here as of Unicode
/// 17.
///
/// Unassigned characters are accepted here, except the noncharacters that will never
/// be assigned. Newer versions of Unicode turn unassigned characters into letters,
/// and containerd accepts them according to the version of Unicode in its Go.
fn is_value(character: char) -> bool {
    let is_format = matches!(character,
        '\u{ad}' | '\u{600}'..='\u{605}' | '\u{61c}' | '\u{6dd}' | '\u{70f}'
        | '\u{890}' | '\u{891}' | '\u{8e2}' | '\u{180e}'
        | '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}'
        | '\u{2060}'..='\u{2064}' | '\u{2066}'..='\u{206f}'
        | '\u{feff}' | '\u{fff9}'..='\u{fffb}'
        | '\u{110bd}' | '\u{110cd}' | '\u{13430}'..='\u{1343f}'
        | '\u{1bca0}'..='\u{1bca3}' | '\u{1d173}'..='\u{1d17a}'
        | '\u{e0001}' | '\u{e0020}'..='\u{e007f}');
    let is_private = matches!(character, '\u{e000}'..='\u{f8ff}' | '\u{f0000}'..);
    let is_noncharacter =
        matches!(character, '\u{fdd0}'..='\u{fdef}') || u32::from(character) & 0xfffe == 0xfffe;

    character != ','
        && character != char::REPLACEMENT_CHARACTER
        && !character.is_whitespace()
        && !character.is_control()
        && !is_format
        && !is_private
        && !is_noncharacter
}

#[cfg(test)]
mod tests;
