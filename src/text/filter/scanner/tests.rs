//! The tokens of filters: the cases of containerd's own tests, and more.

use super::*;

/// Every token of `text` in a compact notation, `position:kind text`, and
/// the position of the fault that ended the scan early.
fn scan(text: &str) -> (Vec<String>, Option<usize>) {
    let mut scanner = Scanner::new(text);
    let mut tokens = Vec::new();
    loop {
        let (start, token) = match scanner.token() {
            Ok(found) => found,
            Err(fault) => return (tokens, Some(fault.position)),
        };
        let shown = match token {
            Token::Field(run) => format!("f {run}"),
            Token::Operator(run) => format!("o {run}"),
            Token::Value(run) => format!("v {run}"),
            Token::Quoted { quote, content } => {
                format!("q{quote} {}", content.escape_ascii())
            }
            Token::Separator(character) => format!("s {character}"),
            Token::Stray(character) => format!("? {character}"),
            Token::End => {
                tokens.push(format!("{start}:end"));
                // Each further call returns the end again.
                assert_eq!(scanner.token().expect("no fault"), (start, Token::End));
                assert_eq!(scanner.peek(), None);
                return (tokens, None);
            }
        };
        tokens.push(format!("{start}:{shown}"));
    }
}

#[track_caller]
fn check(text: &str, tokens: &[&str]) {
    let (found, fault) = scan(text);
    assert_eq!(found, tokens, "{text:?}");
    assert_eq!(fault, None, "{text:?}");
}

#[track_caller]
fn check_fault(text: &str, tokens: &[&str], position: usize) {
    let (found, fault) = scan(text);
    assert_eq!(found, tokens, "{text:?}");
    assert_eq!(fault, Some(position), "{text:?}");
}

#[test]
fn fields_operators_and_values() {
    check("", &["0:end"]);
    check("name", &["0:f name", "4:end"]);
    check(
        "name==value,foo!=bar",
        &[
            "0:f name",
            "4:o ==",
            "6:v value",
            "11:s ,",
            "12:f foo",
            "15:o !=",
            "17:v bar",
            "20:end",
        ],
    );
    check(
        "name==value,labels.foo=value,other.bar~=match",
        &[
            "0:f name",
            "4:o ==",
            "6:v value",
            "11:s ,",
            "12:f labels",
            "18:s .",
            "19:f foo",
            "22:o =",
            "23:v value",
            "28:s ,",
            "29:f other",
            "34:s .",
            "35:f bar",
            "38:o ~=",
            "40:v match",
            "45:end",
        ],
    );
    check("interrupted=", &["0:f interrupted", "11:o =", "12:end"]);
    check(
        "input==,id!=ff",
        &[
            "0:f input",
            "5:o ==",
            "7:s ,",
            "8:f id",
            "10:o !=",
            "12:v ff",
            "14:end",
        ],
    );
    check("a=!~==b", &["0:f a", "1:o =!~==", "6:v b", "7:end"]);
}

#[test]
fn values() {
    check(
        "name~=[abc]+,foo=test",
        &[
            "0:f name",
            "4:o ~=",
            "6:v [abc]+",
            "12:s ,",
            "13:f foo",
            "16:o =",
            "17:v test",
            "21:end",
        ],
    );
    check(
        r"name~=[abc]\+,foo=test",
        &[
            "0:f name",
            "4:o ~=",
            r"6:v [abc]\+",
            "13:s ,",
            "14:f foo",
            "17:o =",
            "18:v test",
            "22:end",
        ],
    );
    check(
        "name~=牛,labels.moo=true",
        &[
            "0:f name",
            "4:o ~=",
            "6:v 牛",
            "9:s ,",
            "10:f labels",
            "16:s .",
            "17:f moo",
            "20:o =",
            "21:v true",
            "25:end",
        ],
    );
    check(
        "compound.labels==punctuated_value.foo-bar",
        &[
            "0:f compound",
            "8:s .",
            "9:f labels",
            "15:o ==",
            "17:v punctuated_value.foo-bar",
            "41:end",
        ],
    );
    // Quotes and operators only matter at the start of a value, and only
    // the start may be invisible.
    check("a=b\"/|=!", &["0:f a", "1:o =", "2:v b\"/|=!", "8:end"]);
    check(
        "a=\u{1}b\u{1}c",
        &[
            "0:f a",
            "1:o =",
            "2:v \u{1}b",
            "4:? \u{1}",
            "5:f c",
            "6:end",
        ],
    );
    check(
        "doublevalue=value value",
        &[
            "0:f doublevalue",
            "11:o =",
            "12:v value",
            "18:f value",
            "23:end",
        ],
    );
}

#[test]
fn white_space() {
    check("foo = bar    ", &["0:f foo", "4:o =", "6:v bar", "13:end"]);
    check(
        "\u{2003}\ta\u{a0}=\u{85}\u{3000}b\r\n",
        &["4:f a", "7:o =", "13:v b", "16:end"],
    );
    let scanner = Scanner::new(" a");
    assert_eq!(scanner.peek(), Some(' '));
    assert_eq!(scanner.position(), 0);
}

#[test]
fn quoted_literals() {
    check(
        "name~=/[abc]{0,2}/,foo=test",
        &[
            "0:f name",
            "4:o ~=",
            "6:q/ [abc]{0,2}",
            "18:s ,",
            "19:f foo",
            "22:o =",
            "23:v test",
            "27:end",
        ],
    );
    check(
        "name~=|牛|,labels.moo=true",
        &[
            "0:f name",
            "4:o ~=",
            r"6:q| \xe7\x89\x9b",
            "11:s ,",
            "12:f labels",
            "18:s .",
            "19:f moo",
            "22:o =",
            "23:v true",
            "27:end",
        ],
    );
    check(
        r#"name~="asdf\n\tfooo""#,
        &["0:f name", "4:o ~=", r#"6:q" asdf\n\tfooo"#, "20:end"],
    );
    check(
        r#""leading quote".postquote==value"#,
        &[
            "0:q\" leading quote",
            "15:s .",
            "16:f postquote",
            "25:o ==",
            "27:v value",
            "32:end",
        ],
    );
    check(
        r"input~=/foo\/bar/,id!=ff",
        &[
            "0:f input",
            "5:o ~=",
            "7:q/ foo/bar",
            "17:s ,",
            "18:f id",
            "20:o !=",
            "22:v ff",
            "24:end",
        ],
    );
    check(
        "input~=|foo/bar|,id!=ff",
        &[
            "0:f input",
            "5:o ~=",
            "7:q| foo/bar",
            "16:s ,",
            "17:f id",
            "19:o !=",
            "21:v ff",
            "23:end",
        ],
    );
}

#[test]
fn faults() {
    check_fault("foo\0bar", &["0:f foo"], 3);
    check_fault("foo\u{fffd}bar", &["0:f foo"], 3);
    check_fault("a=b\u{fffd}", &["0:f a", "1:o =", "2:v b"], 3);
    check_fault("a=\0", &["0:f a", "1:o ="], 2);
    check_fault(
        "labels.containerd.io/key==value",
        &["0:f labels", "6:s .", "7:f containerd", "17:s .", "18:f io"],
        20,
    );
    check_fault(
        "labels.\"containerd.io\nkey\"==value",
        &["0:f labels", "6:s ."],
        7,
    );
    // The position is that of the backslash.
    check_fault(r#"labels."\g""#, &["0:f labels", "6:s ."], 8);
    check_fault(r#"labels."\xaz""#, &["0:f labels", "6:s ."], 8);
}

#[test]
fn stray_characters() {
    check("?'é`", &["0:? ?", "1:? '", "2:? é", "4:? `", "5:end"]);
}

#[test]
fn characters_of_a_value() {
    for accepted in "azAZ09_-.:/|\"'`!=~^$[](){}<>+*?\\@#%&;éß牛٣½§€🐄\u{301}\u{20dd}".chars()
    {
        assert!(is_value(accepted), "{accepted:?}");
    }
    for refused in ", \t\n\0\u{7f}\u{85}\u{a0}\u{ad}\u{2003}\u{200b}\u{200d}\u{2028}\u{2029}\
        \u{202e}\u{2066}\u{3000}\u{e000}\u{feff}\u{fdd0}\u{fffd}\u{fffe}\u{ffff}\u{1ffff}\
        \u{e0001}\u{e0041}\u{f0000}\u{10fffd}\u{10ffff}"
        .chars()
    {
        assert!(!is_value(refused), "{refused:?}");
    }
}
