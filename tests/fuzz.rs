//! Random text for code that parses text without a disk: filters and the
//! command line. `FUZZ_SEED` repeats a run, and `FUZZ_SECONDS` sets how long
//! each test runs.

// A test fails by a panic.
#![allow(clippy::unwrap_used)]

// Shared with the tests that need root. Each binary uses a part of it.
#[path = "support/fuzzing.rs"]
mod fuzzing;
#[allow(dead_code)]
#[path = "support/random.rs"]
mod random;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use overlay_read_write_splitting_snapshotter::config::{self, Command, Config, Parsed};
use overlay_read_write_splitting_snapshotter::text::filter::{Filters, Subject};

use fuzzing::{cases, spoil};
use random::{Random, Seed};

const CASES: u64 = 5_000;

/// Pieces of filters, valid and invalid.
const PIECES: &[&str] = &[
    "name",
    "parent",
    "kind",
    "labels",
    "labels.a",
    "labels.\"a.b\"",
    "nonsense",
    ".",
    ",",
    "==",
    "!=",
    "~=",
    "=",
    "!",
    "~",
    "\"",
    "/",
    "|",
    "\\",
    "web",
    "\"web\"",
    "/^w.b$/",
    "|(a+)+|",
    "\"\\x77\\u0065\\142\"",
    "\\U0010ffff",
    "active",
    "(",
    "[a-z]",
    "*",
    "{1000}",
    " ",
    "\t",
    "\n",
    "\0",
    "\u{fffd}",
    "é",
    "牛",
    "\u{1f404}",
];

/// Characters that have a meaning in some place.
const CHARACTERS: &[char] = &[
    'a',
    '0',
    '7',
    'x',
    'u',
    'U',
    '"',
    '/',
    '|',
    '\\',
    '.',
    ',',
    '=',
    '!',
    '~',
    '(',
    ')',
    '[',
    '*',
    '{',
    '^',
    '$',
    ' ',
    '\n',
    '\r',
    '\0',
    '\u{7f}',
    '\u{fffd}',
    'é',
    '\u{1f404}',
];

fn selector(random: &mut Random) -> String {
    let field = *random.pick(&PIECES[..7]);
    let operator = *random.pick(&["", "==", "!=", "~="]);
    let value = match operator {
        "" => "",
        "~=" => *random.pick(&["web", "\"web\"", "/^w.b$/", "|(a+)+|"]),
        _ => *random.pick(&["web", "\"web\"", "active", "\"\\x77\\u0065\\142\""]),
    };
    format!("{field}{operator}{value}")
}

fn filter(random: &mut Random) -> String {
    let mut text = if random.is_one_in(2) {
        let selectors: Vec<_> = (0..=random.below(3)).map(|_| selector(random)).collect();
        selectors.join(",")
    } else {
        (0..random.below(12))
            .map(|_| *random.pick(PIECES))
            .collect()
    };
    if random.is_one_in(2) {
        let mut characters: Vec<char> = text.chars().collect();
        spoil(&mut characters, random, |random| *random.pick(CHARACTERS));
        text = characters.into_iter().collect();
    }
    text
}

fn named<'a>(name: &'a str, labels: &'a BTreeMap<String, String>) -> Subject<'a> {
    Subject {
        name,
        parent: "web",
        kind: "active",
        labels,
    }
}

/// A list of filters is refused if one of them is, and matches what one of them
/// matches.
#[test]
fn filters_are_understood_or_refused() {
    let seed = Seed::of("FUZZ_SEED");
    let mut random = seed.random(1);
    let labels = [("a", "web"), ("a.b", ""), ("", "x")];
    let labels = labels.map(|(key, value)| (key.to_owned(), value.to_owned()));
    let labels = BTreeMap::from(labels);
    let (mut taken, mut refused) = (0_u64, 0_u64);
    for case in cases(CASES) {
        let texts: Vec<_> = (0..=random.below(2)).map(|_| filter(&mut random)).collect();
        let all = Filters::parse(&texts);
        let each: Vec<_> = texts.iter().map(|text| Filters::parse(&[text])).collect();
        assert_eq!(
            all.is_ok(),
            each.iter().all(Result::is_ok),
            "case {case}: {texts:?}"
        );
        let Ok(all) = all else {
            refused += 1;
            continue;
        };
        taken += 1;
        for name in ["", "web", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!", "牛\n"] {
            let subject = named(name, &labels);
            let one = each.iter().flatten().any(|filter| filter.matches(&subject));
            assert_eq!(
                all.matches(&subject),
                one,
                "case {case}: {texts:?} {name:?}"
            );
        }
    }
    let share = (taken + refused) / 10;
    assert!(share < taken && share < refused, "{taken}, {refused}");
}

/// A random one of the spellings of a text in double quotes.
fn quoted(text: &str, random: &mut Random) -> String {
    let mut quoted = String::from("\"");
    for character in text.chars() {
        let number = u32::from(character);
        let is_plain = !matches!(character, '"' | '\\' | '\n' | '\0' | '\u{fffd}');
        match random.below(5) {
            0 if number <= 0xffff => quoted += &format!("\\u{number:04x}"),
            1 => quoted += &format!("\\U{number:08X}"),
            2 => {
                for byte in character.encode_utf8(&mut [0; 4]).bytes() {
                    quoted += &match random.is_one_in(2) {
                        true => format!("\\x{byte:02x}"),
                        false => format!("\\{byte:03o}"),
                    };
                }
            }
            _ if is_plain => quoted.push(character),
            _ => quoted += &format!("\\U{number:08x}"),
        }
    }
    quoted + "\""
}

/// Whatever name a snapshot or a label has, a filter can match it.
#[test]
fn quoted_text_is_matched_as_it_is() {
    let seed = Seed::of("FUZZ_SEED");
    let mut random = seed.random(2);
    for case in cases(CASES) {
        let text = |random: &mut Random| -> String {
            let length = random.below(20);
            (0..length)
                .map(|_| match random.is_one_in(3) {
                    true => char::from_u32(u32::try_from(random.below(0x11_0000)).unwrap()),
                    false => Some(*random.pick(CHARACTERS)),
                })
                .map(|character| character.unwrap_or('\u{d7ff}'))
                .collect()
        };
        let (name, key) = (text(&mut random), text(&mut random));
        let labels = BTreeMap::from([(key.clone(), name.clone())]);
        let longer = format!("{name}x");
        for (field, is_name) in [
            ("name".to_owned(), true),
            (format!("labels.{}", quoted(&key, &mut random)), false),
        ] {
            for (operator, is_equal) in [("==", true), ("!=", false)] {
                let filter = format!("{field}{operator}{}", quoted(&name, &mut random));
                let parsed = Filters::parse(&[&filter])
                    .unwrap_or_else(|error| panic!("case {case}: {filter:?}: {error}"));
                let same = named(&name, &labels);
                assert_eq!(parsed.matches(&same), is_equal, "case {case}: {filter:?}");
                let other = BTreeMap::from([(key.clone(), longer.clone())]);
                let other = match is_name {
                    true => named(&longer, &labels),
                    false => named(&name, &other),
                };
                assert_ne!(parsed.matches(&other), is_equal, "case {case}: {filter:?}");
            }
        }
    }
}

const ARGUMENTS: &[&str] = &[
    "--root-dir",
    "--writable-dir",
    "--state-dir",
    "--address",
    "--async-remove",
    "--upperdir-label",
    "--mount-option",
    "--sync",
    "--relocate",
    "--relocate-after",
    "--threads",
    "--version",
    "--help",
    "help",
    "--",
    "-",
    "",
    "/a",
    "/a/b",
    "/a/writable",
    "/",
    "//",
    "..",
    "relative",
    "/a,b",
    "/é",
    "true",
    "false",
    "commit",
    "none",
    "never",
    "background",
    "index=on",
    "volatile",
    "0",
    "7",
    "-1",
    "18446744073709551616",
];

fn arguments(random: &mut Random) -> Vec<OsString> {
    let mut arguments: Vec<_> = (0..random.below(8))
        .map(|_| match random.is_one_in(3) {
            true => format!("{}={}", random.pick(ARGUMENTS), random.pick(ARGUMENTS)),
            false => (*random.pick(ARGUMENTS)).to_owned(),
        })
        .map(String::into_bytes)
        .collect();
    for argument in &mut arguments {
        if random.is_one_in(8) {
            spoil(argument, random, |random| random.number().to_le_bytes()[0]);
        }
    }
    arguments.into_iter().map(OsString::from_vec).collect()
}

/// What the rest of the program relies on.
fn assert_checked(config: &Config, said: &str) {
    let paths: [&str; 4] = [
        &config.root,
        &config.writable,
        &config.state_dir,
        &config.address,
    ];
    for path in paths {
        assert!(path.starts_with('/') && path.len() > 1, "{said}");
        assert!(!path.ends_with('/') && !path.contains("//"), "{said}");
        let forbidden = |c: char| matches!(c, ',' | ':' | '\\') || c.is_control();
        assert!(!path.contains(forbidden), "{said}");
    }
    assert_ne!(config.root, config.writable, "{said}");
    assert!(config.threads > 0 && config.address.len() < 108, "{said}");
}

#[test]
fn arguments_are_understood_or_refused() {
    let seed = Seed::of("FUZZ_SEED");
    let mut random = seed.random(3);
    let (mut taken, mut refused) = (0_u64, 0_u64);
    for case in cases(CASES) {
        let arguments = arguments(&mut random);
        let said = format!("case {case}: {arguments:?}");
        match config::parse(arguments) {
            Ok(Parsed::Run(config, Command::Serve)) => {
                taken += 1;
                assert_checked(&config, &said);
            }
            // The command line does not ask to serve, but for the version, say.
            Ok(_) => {}
            Err(error) => {
                refused += 1;
                let line = error.chain();
                assert!(!line.is_empty() && !line.contains('\n'), "{said}: {line:?}");
            }
        }
    }
    assert!(taken > 0 && refused > 0, "{taken}, {refused}");
}
