//! Hostile inputs: nothing may panic, hang or exhaust the stack.

use super::*;

/// Parses `text`, matches with what comes out, and shows what does not.
fn exercise(text: &str) -> bool {
    let labels = labels(&[("a", "b"), ("", "c")]);
    let subject = Subject {
        name: "a",
        parent: "",
        kind: "view",
        labels: &labels,
    };
    match Filters::parse(&[text]) {
        Ok(filters) => {
            let _ = filters.matches(&subject);
            true
        }
        Err(error) => {
            let message = error.to_string();
            assert!(message.len() < 2000, "{} bytes", message.len());
            assert!(!message.contains(char::is_control), "{message:?}");
            false
        }
    }
}

#[test]
fn hostile_inputs() {
    const MEGABYTE: usize = 1 << 20;
    for piece in [
        "\0", ",", ".", "\"", "/", "|", "\\", "=", "~", " ", "\n", "\u{2003}", "a.", "a,,",
        "a==\"", "\"\\", "?", "é", "\u{fffd}", "'", "(", "a~=/", "a~=(,",
    ] {
        for prefix in ["", "a", "a==", "a~=", "a==\"", "a~=/", "a~=("] {
            let text = format!("{prefix}{}", piece.repeat(MEGABYTE / piece.len()));
            let _ = exercise(&text);
        }
        assert!(
            !exercise(&piece.repeat(MEGABYTE / piece.len())),
            "{piece:?}"
        );
    }
    for (piece, last) in [
        ("a", "a"),
        ("a,", "a"),
        ("labels.", "a"),
        ("a==b,", "a!=b"),
        ("a==\\", "a"),
        (" labels.\"\\x00\" != \"\\U0001f404\",", "name"),
    ] {
        let text = format!("{}{last}", piece.repeat(MEGABYTE / piece.len()));
        assert!(exercise(&text), "{piece:?}");
    }
}

/// A small deterministic generator (xorshift64*).
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let high = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33;
        usize::try_from(high).expect("31 bits fit") % bound
    }
}

#[test]
fn random_bytes_never_panic() {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for _ in 0..100_000 {
        let length = random.below(24);
        let bytes: Vec<u8> = (0..length)
            .map(|_| u8::try_from(random.below(256)).expect("below 256"))
            .collect();
        let _ = exercise(&String::from_utf8_lossy(&bytes));
        let text: String = bytes.into_iter().map(char::from).collect();
        let _ = exercise(&text);
    }
}

#[test]
fn random_pieces_of_filters_never_panic() {
    const PIECES: &[&str] = &[
        "a", "name", "labels", "kind", ".", ",", "==", "!=", "~=", "=", "\"", "/", "|", "\\", " ",
        "\n", "\0", "é", "牛", "\u{fffd}", "\u{200b}", "x41", "u0041", "U8000004", "1", "101", "(",
        ")", "[", "]", "*", "+", "?", "{2}", "{2,", "}", "^", "$", "|a|", "/a/", "\"a\"", "\\\"",
        "\\/", "\\x", "\\u", "\\U", "\\7", "(?i)", "\\d", "\\pL", "-", "'", "`",
    ];
    let mut random = Random(1);
    let mut legal = 0_u32;
    for _ in 0..150_000 {
        let count = 1 + random.below(10);
        let text: String = (0..count)
            .map(|_| PIECES[random.below(PIECES.len())])
            .collect();
        legal += u32::from(exercise(&text));
    }
    assert!(legal > 1000, "only {legal} legal filters");
}
