//! The flags: one table for the parser, the shells' completions and the tests that hold
//! the manual page to it.

use std::ffi::OsString;

use super::wrong;
use crate::error::{Error, Result};

/// What follows a flag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Takes {
    /// Nothing: to give it is enough.
    Nothing,
    /// "true" or "false", or nothing, which means "true". The Go original had such flags.
    Truth,
    /// One of these words.
    OneOf(&'static [&'static str]),
    /// A directory.
    Directory,
    /// A path.
    Path,
    /// A word of another kind.
    Word,
    /// The same; such a flag may be given several times.
    Words,
    /// A directory; such a flag may be given several times.
    Directories,
}

/// A flag.
pub(super) struct Flag {
    pub name: &'static str,
    pub takes: Takes,
    /// The commands that it goes with. Empty for the daemon's own flags, which say where
    /// the volumes are: every command takes those.
    pub commands: &'static [&'static str],
}

const fn daemons(name: &'static str, takes: Takes) -> Flag {
    commands(name, takes, &[])
}

const fn commands(name: &'static str, takes: Takes, commands: &'static [&'static str]) -> Flag {
    Flag {
        name,
        takes,
        commands,
    }
}

/// The commands that print a report, which can be JSON.
pub(super) const REPORTING: &[&str] = &["status", "check", "doctor", "import"];

/// All flags, but for `--help` and `--version`.
pub(super) const FLAGS: &[Flag] = &[
    daemons("--root-dir", Takes::Directory),
    daemons("--writable-dir", Takes::Directory),
    daemons("--state-dir", Takes::Directory),
    daemons("--address", Takes::Path),
    daemons("--require-mount", Takes::Nothing),
    daemons("--writable-volatile", Takes::Nothing),
    daemons("--reserve", Takes::Word),
    daemons("--async-remove", Takes::Truth),
    daemons("--upperdir-label", Takes::Truth),
    daemons("--mount-option", Takes::Words),
    daemons("--allow-lower", Takes::Directories),
    daemons("--lower-for", Takes::Words),
    daemons("--trust-labels-from", Takes::OneOf(&["k8s.io"])),
    daemons("--sync", Takes::OneOf(&["commit", "none"])),
    daemons("--relocate", Takes::OneOf(&["background", "never"])),
    daemons("--relocate-after", Takes::Word),
    daemons("--quota", Takes::OneOf(&["auto", "require", "off"])),
    daemons("--quota-ids", Takes::Word),
    daemons("--default-max-size", Takes::Word),
    daemons("--default-max-inodes", Takes::Word),
    daemons("--usage-max-age", Takes::Word),
    daemons("--threads", Takes::Word),
    daemons("--metrics-file", Takes::Path),
    commands("--json", Takes::Nothing, REPORTING),
    commands("--repair", Takes::Nothing, &["check"]),
    commands("--yes", Takes::Nothing, &["check"]),
    commands("--reset-writable", Takes::Nothing, &["check"]),
    commands("--containerd-config", Takes::Path, &["doctor"]),
    commands("--dry-run", Takes::Nothing, &["import"]),
    commands("--undo", Takes::Nothing, &["import"]),
    commands("--leave-out-missing", Takes::Nothing, &["import"]),
    commands("--read-only", Takes::Nothing, &["mount"]),
];

/// The arguments, taken apart.
pub(super) enum Arguments {
    Given(Flags),
    /// `--help` is among them.
    Help,
    /// `--version` is among them.
    Version,
}

/// What was given.
#[derive(Default)]
pub(super) struct Flags {
    /// A command with its words, or nothing.
    pub command: Vec<String>,
    values: Vec<(&'static Flag, String)>,
}

impl Flags {
    /// Takes arguments apart. `--flag value` and `--flag=value` mean the same.
    ///
    /// # Errors
    ///
    /// [`InvalidArgument`](crate::error::ErrorKind::InvalidArgument) for a flag that there
    /// is not, that is given twice, or whose value is missing or not one of its words.
    pub fn parse(arguments: Vec<OsString>) -> Result<Arguments> {
        let mut flags = Flags::default();
        let mut arguments = arguments.into_iter().map(text).peekable();
        while let Some(argument) = arguments.next() {
            let argument = argument?;
            let (name, mut value) = match argument.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (&*argument, None),
            };
            match name {
                "--help" | "-h" => return Ok(Arguments::Help),
                "help" if flags.command.is_empty() => return Ok(Arguments::Help),
                "--version" => return Ok(Arguments::Version),
                _ => {}
            }
            if !name.starts_with('-') {
                flags.command.push(argument);
                continue;
            }
            let flag = FLAGS.iter().find(|flag| flag.name == name).ok_or_else(|| {
                Error::invalid(format!(
                    "there is no flag {name}: --help lists the usual ones, the manual page all"
                ))
            })?;
            let follows = |next: &Result<String>| match (flag.takes, next) {
                (Takes::Nothing, _) => false,
                (Takes::Truth, Ok(next)) => next == "true" || next == "false",
                _ => true,
            };
            if value.is_none() {
                value = arguments.next_if(follows).transpose()?;
            }
            flags.push(flag, value)?;
        }
        Ok(Arguments::Given(flags))
    }

    fn push(&mut self, flag: &'static Flag, value: Option<String>) -> Result<()> {
        let name = flag.name;
        let value = match (flag.takes, value) {
            (Takes::Nothing, Some(value)) => {
                let text = format!("{name} takes no value, and is given {value:?}");
                return Err(Error::invalid(text));
            }
            (Takes::Nothing, None) => String::new(),
            (Takes::Truth, None) => "true".to_owned(),
            (_, Some(value)) => value,
            (_, None) => return Err(Error::invalid(format!("{name} needs a value"))),
        };
        let words: &[&str] = match flag.takes {
            Takes::Truth => &["true", "false"],
            Takes::OneOf(words) => words,
            _ => &[],
        };
        if !words.is_empty() && !words.contains(&value.as_str()) {
            return Err(wrong(name, &value, one_of(words)));
        }
        let repeats = matches!(flag.takes, Takes::Words | Takes::Directories);
        if !repeats && self.is_given(name) {
            return Err(Error::invalid(format!("{name} is given twice")));
        }
        self.values.push((flag, value));
        Ok(())
    }

    /// Every flag that was given.
    pub fn given(&self) -> impl Iterator<Item = &'static Flag> {
        self.values.iter().map(|(flag, _)| *flag)
    }

    pub fn is_given(&self, name: &str) -> bool {
        self.text(name).is_some()
    }

    /// The value of a flag.
    pub fn text(&self, name: &str) -> Option<&str> {
        self.all(name).next()
    }

    /// The values of a flag that may be given several times.
    pub fn all(&self, name: &str) -> impl Iterator<Item = &str> {
        debug_assert!(FLAGS.iter().any(|flag| flag.name == name), "{name}");
        let values = self.values.iter();
        values.filter_map(move |(flag, value)| (flag.name == name).then_some(value.as_str()))
    }

    /// The value of a flag that takes a number of seconds.
    pub fn seconds(&self, name: &str, default: u32) -> Result<std::time::Duration> {
        let seconds = match self.text(name) {
            None => default,
            Some(text) => text
                .parse()
                .map_err(|_| wrong(name, text, "a number of seconds"))?,
        };
        Ok(std::time::Duration::from_secs(seconds.into()))
    }
}

fn text(argument: OsString) -> Result<String> {
    argument
        .into_string()
        .map_err(|argument| Error::invalid(format!("the argument {argument:?} is not UTF-8")))
}

/// `"a", "b" or "c"`.
fn one_of(words: &[&str]) -> String {
    let quoted: Vec<_> = words.iter().map(|word| format!("{word:?}")).collect();
    match quoted.split_last() {
        Some((last, others)) if !others.is_empty() => format!("{} or {last}", others.join(", ")),
        _ => quoted.join(""),
    }
}
