//! Prints the results of a command: sentences or JSON, sizes, lines that fit a terminal, and a
//! little colour.

use std::io::{IsTerminal, Write};

use serde_json::Value;

use crate::config::Format;
use crate::types::{is_obeyed, write_escaped};

/// The most columns that a line has, unless it is a single longer word.
pub const COLUMNS: usize = 80;

/// Prints a report in the format that the user asked for.
pub fn show(format: Format, sentences: impl FnOnce() -> String, json: impl FnOnce() -> Value) {
    match format {
        Format::Human => print(&sentences()),
        Format::Json => write(&harmless_json(&format!("{:#}\n", json()))),
    }
}

/// Prints on standard output. Ignores a closed pipe, as in `status | head`.
pub fn print(text: &str) {
    write(&harmless(text));
}

fn write(text: &str) {
    let _ = std::io::stdout().write_all(text.as_bytes());
}

/// Escapes the characters in JSON that a terminal obeys. All of them are below U+10000, so
/// one `\u` is enough.
fn harmless_json(json: &str) -> String {
    let mut out = String::with_capacity(json.len());
    for c in json.chars() {
        match is_obeyed(c) && c != '\n' {
            true => out.push_str(&format!("\\u{:04x}", u32::from(c))),
            false => out.push(c),
        }
    }
    out
}

/// Escapes the characters in a text that a terminal obeys, because parts of the text may come
/// from untrusted sources. Line ends, tabs and this program's own colours stay as they are.
pub fn harmless(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let own = COLOUR_CODES.iter().find(|own| rest.starts_with(**own));
        match own {
            Some(own) => out.push_str(own),
            None if c == '\n' || c == '\t' => out.push(c),
            // Writing to a string does not fail.
            None => drop(write_escaped(&mut out, c)),
        }
        rest = &rest[own.map_or(c.len_utf8(), |own| own.len())..];
    }
    out
}

const COLOUR_CODES: [&str; 4] = ["\x1b[31m", "\x1b[32m", "\x1b[33m", "\x1b[0m"];

/// The word for the state of the daemon in reports.
pub fn daemon_state(is_running: bool) -> &'static str {
    match is_running {
        true => "running",
        false => "stopped",
    }
}

/// Formats a number of bytes in powers of 1024, as `df -h` and `du -h` do.
pub fn bytes(bytes: u64) -> String {
    let mut size = bytes as f64;
    for unit in ["B", "K", "M", "G", "T"] {
        if size < 1024.0 {
            let digits = usize::from(unit != "B" && size < 10.0);
            return format!("{size:.digits$}{unit}");
        }
        size /= 1024.0;
    }
    format!("{size:.0}P")
}

/// Formats `text` after `head`, in lines of at most [`COLUMNS`]. Further lines begin below the
/// text of the first line.
pub fn paragraph(head: &str, text: &str) -> String {
    let indent = head.chars().count();
    let mut lines = head.to_owned();
    let mut column = indent;
    for word in text.split_whitespace() {
        let length = word.chars().count();
        if column > indent && column + 1 + length > COLUMNS {
            lines.push('\n');
            lines.push_str(&" ".repeat(indent));
            column = indent;
        }
        if column > indent {
            lines.push(' ');
            column += 1;
        }
        lines.push_str(word);
        column += length;
    }
    lines.push('\n');
    lines
}

/// What a coloured word means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Colour {
    /// All is well.
    Green,
    /// The user should read this.
    Yellow,
    /// Something is wrong.
    Red,
}

/// Colours a word, if standard output is a terminal with colours (<https://no-color.org>).
pub fn coloured(colour: Colour, word: &str) -> String {
    let is_set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    let is_dumb = std::env::var_os("TERM").is_some_and(|terminal| terminal == "dumb");
    if !std::io::stdout().is_terminal() || is_set("NO_COLOR") || is_dumb {
        return word.to_owned();
    }
    let code = match colour {
        Colour::Green => 32,
        Colour::Yellow => 33,
        Colour::Red => 31,
    };
    format!("\x1b[{code}m{word}\x1b[0m")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_short() {
        for (number, text) in [
            (0, "0B"),
            (1023, "1023B"),
            (1024, "1.0K"),
            (10 << 10, "10K"),
            (3 << 29, "1.5G"),
            (u64::MAX, "16384P"),
        ] {
            assert_eq!(bytes(number), text);
        }
    }

    #[test]
    fn a_terminal_obeys_only_the_own_colours() {
        let red = "\x1b[31mRED\x1b[0m\n";
        assert_eq!(harmless(red), red);
        let hostile = "a\x1b]0;x\x07\u{9b}2J\x1b[35m\r\u{202e}é\n";
        let shown = "a\\u{1b}]0;x\\u{7}\\u{9b}2J\\u{1b}[35m\\r\\u{202e}é\n";
        assert_eq!(harmless(hostile), shown);
        let value = Value::from(hostile);
        let json = harmless_json(&format!("{value:#}\n"));
        assert!(!json.trim_end().contains(is_obeyed), "{json}");
        assert_eq!(serde_json::from_str::<Value>(&json).unwrap(), value);
    }

    #[test]
    fn paragraphs_fit() {
        let text = "word ".repeat(40);
        let told = paragraph("head  ", &text);
        assert!(told.lines().all(|line| line.len() <= COLUMNS), "{told}");
        assert!(
            told.lines()
                .skip(1)
                .all(|line| line.starts_with("      word"))
        );
        assert_eq!(told.split_whitespace().count(), 41);
        let long = "x".repeat(100);
        assert_eq!(
            paragraph("a ", &format!("b {long} c")),
            format!("a b\n  {long}\n  c\n")
        );
    }
}
