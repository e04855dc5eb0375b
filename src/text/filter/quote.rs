//! Quoted literals: from the opening quote to the bytes they stand for.
//!
//! Owns the escapes of the filter language, which are those of Go's string literals plus the
//! escaped delimiter. It never decides where a literal is allowed, or which delimiters are
//! allowed there: the parser does.
//!
//! Accepts in one pass the literals that containerd's `filters/scanner.go` and
//! `filters/quote.go` accept in two.

use super::error::Fault;
use super::scanner::readable;

/// A decoded literal.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Literal {
    /// The bytes that the literal stands for. They need not be UTF-8, because `\x`
    /// and octal escapes can spell any byte.
    pub(super) content: Vec<u8>,
    /// The byte offset just after the closing quote.
    pub(super) end: usize,
}

/// Decodes the literal of `text` whose opening quote is at the byte offset
/// `start`. The character there, whatever it is, is the delimiter.
///
/// # Errors
///
/// Fails at the opening quote if the literal is not closed on the same line,
/// and otherwise at the first backslash whose escape is not legal or at a
/// character that no filter may contain.
pub(super) fn decode(text: &str, start: usize) -> Result<Literal, Fault> {
    let mut rest = text[start..].chars();
    let unterminated = |quote: char| {
        Fault::new(
            start,
            format!("a closing {quote} on the same line for the quote opened here"),
        )
    };
    let quote = rest
        .next()
        .ok_or_else(|| Fault::new(start, "a quoted text"))?;

    let mut content = Vec::new();
    loop {
        let at = text.len() - rest.as_str().len();
        let character = rest.next().ok_or_else(|| unterminated(quote))?;
        match readable(character, at)? {
            '\n' => return Err(unterminated(quote)),
            '\\' => {
                if rest.as_str().is_empty() {
                    return Err(unterminated(quote));
                }
                let (spelled, length) = escape(rest.as_str(), quote)
                    .ok_or_else(|| Fault::new(at, "a legal escape sequence"))?;
                spelled.append_to(&mut content);
                rest = rest.as_str()[length..].chars();
            }
            end if end == quote => {
                let end = text.len() - rest.as_str().len();
                return Ok(Literal { content, end });
            }
            plain => append(&mut content, plain),
        }
    }
}

/// What an escape sequence stands for.
enum Spelled {
    Byte(u8),
    Character(char),
}

impl Spelled {
    fn append_to(self, content: &mut Vec<u8>) {
        match self {
            Spelled::Byte(byte) => content.push(byte),
            Spelled::Character(character) => append(content, character),
        }
    }
}

fn append(content: &mut Vec<u8>, character: char) {
    content.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes());
}

/// Decodes the escape whose backslash comes just before `rest`; also returns
/// how many bytes of `rest` belong to it.
fn escape(rest: &str, quote: char) -> Option<(Spelled, usize)> {
    let kind = rest.chars().next()?;
    let simple = |byte| Some((Spelled::Byte(byte), 1));
    match kind {
        'a' => simple(0x07),
        'b' => simple(0x08),
        'f' => simple(0x0c),
        'n' => simple(b'\n'),
        'r' => simple(b'\r'),
        't' => simple(b'\t'),
        'v' => simple(0x0b),
        '\\' => simple(b'\\'),
        '0'..='7' => {
            let value = number(rest, 0..3, 8)?;
            Some((Spelled::Byte(u8::try_from(value).ok()?), 3))
        }
        'x' => {
            let value = number(rest, 1..3, 16)?;
            Some((Spelled::Byte(u8::try_from(value).ok()?), 3))
        }
        'u' => Some((code_point(number(rest, 1..5, 16)?)?, 5)),
        'U' => Some((code_point(number(rest, 1..9, 16)?)?, 9)),
        delimiter if delimiter == quote => Some((Spelled::Character(quote), quote.len_utf8())),
        _ => None,
    }
}

/// The number whose digits are exactly the bytes `digits` of `rest`.
fn number(rest: &str, digits: std::ops::Range<usize>, radix: u32) -> Option<u32> {
    let digits = rest.get(digits)?;
    // `from_str_radix` alone would also take a sign.
    if !digits.chars().all(|digit| digit.is_digit(radix)) {
        return None;
    }
    u32::from_str_radix(digits, radix).ok()
}

/// The character with the number `value`, as containerd decodes it.
fn code_point(value: u32) -> Option<Spelled> {
    match value {
        // A Go rune is signed: with the top bit set the number is negative,
        // passes the check against the largest code point, and ends up cut
        // down to a byte.
        0x8000_0000.. => Some(Spelled::Byte(value.to_le_bytes()[0])),
        // Surrogates cannot be encoded; Go's encoder writes U+FFFD instead.
        0xd800..=0xdfff => Some(Spelled::Character(char::REPLACEMENT_CHARACTER)),
        _ => char::from_u32(value).map(Spelled::Character),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn content(text: &str) -> Vec<u8> {
        let literal = decode(text, 0).expect("the literal is legal");
        assert_eq!(literal.end, text.len(), "{text}");
        literal.content
    }

    fn position(text: &str) -> usize {
        decode(text, 0)
            .expect_err("the literal is illegal")
            .position
    }

    #[test]
    fn legal_literals() {
        let cases: &[(&str, &[u8])] = &[
            (r#""""#, b""),
            ("||", b""),
            (r#""plain, text/|'""#, b"plain, text/|'"),
            (r#"/"|,/"#, b"\"|,"),
            ("|牛/\"|", "牛/\"".as_bytes()),
            (r#""\a\b\f\n\r\t\v\\\"""#, b"\x07\x08\x0c\n\r\t\x0b\\\""),
            (r"/\//", b"/"),
            (r"|\||", b"|"),
            ("\"tab\tand\rreturn\u{1}\"", b"tab\tand\rreturn\x01"),
            (r#""\000\101\377""#, b"\0A\xff"),
            (r#""\x00\x41\x7f\x80\xfF""#, b"\0A\x7f\x80\xff"),
            (r#""\x414""#, b"A4"),
            (r#""\1014""#, b"A4"),
            (r#""\xe7\x89\x9b""#, "牛".as_bytes()),
            (r#""\u0000\u0041\u0080\u725B""#, "\0A\u{80}牛".as_bytes()),
            (
                r#""\U00000041\U0001F404\U0010ffff""#,
                "A🐄\u{10ffff}".as_bytes(),
            ),
            (
                r#""\ud800\uDFFF\U0000dabc""#,
                "\u{fffd}\u{fffd}\u{fffd}".as_bytes(),
            ),
            (r#""\UFFFFFFFF\U80000041\UffffFF80""#, b"\xffA\x80"),
            (r#""\ufffd""#, "\u{fffd}".as_bytes()),
        ];
        for (text, expected) in cases {
            assert_eq!(content(text), *expected, "{text}");
        }
    }

    #[test]
    fn a_literal_ends_at_its_own_quote() {
        let literal = decode("a=|b\"/|c|", 2).expect("the literal is legal");
        assert_eq!(literal.content, b"b\"/");
        assert_eq!(literal.end, 7);
    }

    #[test]
    fn unterminated_literals_are_faults_at_the_opening_quote() {
        for text in [
            "\"",
            "/",
            "|",
            "\"abc",
            "\"abc/|'",
            "\"abc\n\"",
            "\"\n",
            "\"\\",
            "\"\\\"",
            "\"\\\\",
            "\"\\\\\\\"",
            "\"\\x41",
            "\"\\u0041\n",
        ] {
            assert_eq!(position(text), 0, "{text:?}");
        }
    }

    #[test]
    fn illegal_escapes_are_faults_at_their_backslash() {
        for escape in [
            r"\g",
            r"\ ",
            r"\'",
            r"\/",
            r"\|",
            r"\`",
            r"\?",
            "\\\n",
            r"\牛",
            r"\8",
            r"\9",
            r"\0",
            r"\00",
            r"\08",
            r"\018",
            r"\400",
            r"\777",
            r"\x",
            r"\x4",
            r"\xg0",
            r"\x0g",
            r"\x+1",
            r"\x-1",
            r"\x 1",
            r"\x牛",
            r"\X41",
            r"\u",
            r"\u004",
            r"\u+041",
            r"\u004g",
            r"\U0000004",
            r"\U0000004g",
            r"\U00110000",
            r"\U7fffffff",
            "\\\0",
            "\\\u{fffd}",
        ] {
            assert_eq!(position(&format!("\"é{escape}\"")), 3, "{escape:?}");
        }
        assert_eq!(position("/\\\"/"), 1);
        assert_eq!(position("|\\/|"), 1);
    }

    #[test]
    fn unreadable_characters_are_faults_where_they_are() {
        assert_eq!(position("\"ab\0c\""), 3);
        assert_eq!(position("\"ab\u{fffd}c\""), 3);
    }
}
