//! The flags, in one list. The struct that argh fills is generated from it, and so is
//! the table for the shells' completions and for the tests that compare the manual page
//! with it.

use std::ffi::OsString;
use std::time::Duration;

use argh::FromArgs;

use super::wrong;
use crate::error::{Error, Result};

/// The value that follows a flag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Takes {
    /// No value.
    Nothing,
    /// "true" or "false", or no value, which means "true". The Go original had such
    /// flags.
    Truth,
    /// One of these words.
    OneOf(&'static [&'static str]),
    /// A directory.
    Directory,
    /// A path.
    Path,
    /// A word of another kind.
    Word,
    /// Any other word; such a flag may be given several times.
    Words,
    /// A directory; such a flag may be given several times.
    Directories,
}

/// A flag.
pub(super) struct Flag {
    pub name: &'static str,
    pub takes: Takes,
    /// The commands that accept the flag. Empty for the daemon's own flags: they set
    /// where the volumes are, so every command accepts them.
    pub commands: &'static [&'static str],
}

/// Generates the struct that argh fills and the table of flags from one list.
macro_rules! flags {
    ($(
        $name:tt $kind:ident $field:ident: $type:ident $(<$of:ident>)? =
            $takes:expr, $goes_with:expr;
    )*) => {
        /// The values that were given.
        #[derive(FromArgs)]
        #[argh(help_triggers("--help"))]
        pub(super) struct Flags {
            // The words of a command. (argh reads doc comments, and refuses one that
            // begins with a capital letter.)
            #[argh(positional)]
            pub command: Vec<String>,
            $(#[argh($kind, long = $name)] pub $field: $type $(<$of>)?,)*
        }

        /// All flags except `--help` and `--version`.
        pub(super) const FLAGS: &[Flag] = &[
            $(Flag { name: concat!("--", $name), takes: $takes, commands: $goes_with },)*
        ];
    };
}

/// The commands that print a report, which can be JSON.
pub(super) const REPORTING: &[&str] = &["status", "check", "doctor", "import"];
/// A flag of the daemon, which belongs to no command.
const DAEMON: &[&str] = &[];

flags! {
    "root-dir" option root_dir: Option<String> = Takes::Directory, DAEMON;
    "writable-dir" option writable_dir: Option<String> = Takes::Directory, DAEMON;
    "state-dir" option state_dir: Option<String> = Takes::Directory, DAEMON;
    "address" option address: Option<String> = Takes::Path, DAEMON;
    "require-mount" switch require_mount: bool = Takes::Nothing, DAEMON;
    "writable-volatile" switch writable_volatile: bool = Takes::Nothing, DAEMON;
    "reserve" option reserve: Option<String> = Takes::Word, DAEMON;
    "async-remove" option async_remove: Option<String> = Takes::Truth, DAEMON;
    "upperdir-label" option upperdir_label: Option<String> = Takes::Truth, DAEMON;
    "mount-option" option mount_option: Vec<String> = Takes::Words, DAEMON;
    "allow-lower" option allow_lower: Vec<String> = Takes::Directories, DAEMON;
    "lower-for" option lower_for: Vec<String> = Takes::Words, DAEMON;
    "trust-labels-from" option trust_labels_from: Option<String> =
        Takes::OneOf(&["k8s.io"]), DAEMON;
    "sync" option sync: Option<String> = Takes::OneOf(&["commit", "none"]), DAEMON;
    "record-digests" switch record_digests: bool = Takes::Nothing, DAEMON;
    "relocate" option relocate: Option<String> = Takes::OneOf(&["background", "never"]), DAEMON;
    "relocate-after" option relocate_after: Option<String> = Takes::Word, DAEMON;
    "quota" option quota: Option<String> = Takes::OneOf(&["auto", "require", "off"]), DAEMON;
    "quota-ids" option quota_ids: Option<String> = Takes::Word, DAEMON;
    "default-max-size" option default_max_size: Option<String> = Takes::Word, DAEMON;
    "default-max-inodes" option default_max_inodes: Option<String> = Takes::Word, DAEMON;
    "usage-max-age" option usage_max_age: Option<String> = Takes::Word, DAEMON;
    "threads" option threads: Option<String> = Takes::Word, DAEMON;
    "metrics-file" option metrics_file: Option<String> = Takes::Path, DAEMON;
    "json" switch json: bool = Takes::Nothing, REPORTING;
    "deep" switch deep: bool = Takes::Nothing, &["check"];
    "heal" switch heal: bool = Takes::Nothing, &["check"];
    "containerd-address" option containerd_address: Option<String> = Takes::Path, &["check"];
    "repair" switch repair: bool = Takes::Nothing, &["check"];
    "yes" switch yes: bool = Takes::Nothing, &["check"];
    "reset-writable" switch reset_writable: bool = Takes::Nothing, &["check"];
    "containerd-config" option containerd_config: Option<String> = Takes::Path, &["doctor"];
    "dry-run" switch dry_run: bool = Takes::Nothing, &["import"];
    "undo" switch undo: bool = Takes::Nothing, &["import"];
    "leave-out-missing" switch leave_out_missing: bool = Takes::Nothing, &["import"];
    "read-only" switch read_only: bool = Takes::Nothing, &["mount"];
}

/// The arguments after splitting.
pub(super) enum Arguments {
    Given {
        flags: Box<Flags>,
        /// The given flags, by name.
        named: Vec<&'static Flag>,
    },
    /// The arguments contain `--help`.
    Help,
    /// The arguments contain `--version`.
    Version,
}

impl Arguments {
    /// Splits arguments. `--flag value` and `--flag=value` mean the same.
    ///
    /// # Errors
    ///
    /// [`InvalidArgument`](crate::error::ErrorKind::InvalidArgument) for an unknown flag,
    /// a flag that is given twice, and a missing or wrong value.
    pub fn parse(arguments: Vec<OsString>) -> Result<Arguments> {
        let (mut plain, mut named) = (Vec::new(), Vec::<&Flag>::new());
        let mut has_command = false;
        let mut arguments = arguments.into_iter().map(text).peekable();
        while let Some(argument) = arguments.next() {
            let argument = argument?;
            let (name, value) = match argument.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (&*argument, None),
            };
            match name {
                "--help" | "-h" => return Ok(Arguments::Help),
                "help" if !has_command => return Ok(Arguments::Help),
                "--version" => return Ok(Arguments::Version),
                _ => {}
            }
            if !name.starts_with('-') {
                has_command = true;
                plain.push(argument);
                continue;
            }
            let flag = FLAGS.iter().find(|flag| flag.name == name).ok_or_else(|| {
                let name = name.escape_debug();
                Error::invalid(format!(
                    "there is no flag {name}: --help lists the usual ones, the manual page all"
                ))
            })?;
            let repeats = matches!(flag.takes, Takes::Words | Takes::Directories);
            if !repeats && named.iter().any(|other| other.name == name) {
                return Err(Error::invalid(format!("{name} is given twice")));
            }
            let next = |is_value: fn(&str) -> bool| {
                let is_value = |next: &Result<String>| next.as_deref().map_or(true, is_value);
                arguments.next_if(is_value).transpose()
            };
            named.push(flag);
            plain.push(flag.name.to_owned());
            plain.extend(flag.value(value, next)?);
        }
        let plain: Vec<_> = plain.iter().map(String::as_str).collect();
        let flags = Flags::from_args(&[env!("CARGO_PKG_NAME")], &plain);
        let flags = flags
            .map(Box::new)
            .map_err(|exit| Error::invalid(exit.output.trim().replace('\n', " ")))?;
        Ok(Arguments::Given { flags, named })
    }
}

impl Flag {
    /// The value of this flag for argh. `joined` is the value after an equals sign, if
    /// there is one; `next` takes the next argument if it can be the value.
    fn value(
        &self,
        joined: Option<String>,
        next: impl FnOnce(fn(&str) -> bool) -> Result<Option<String>>,
    ) -> Result<Option<String>> {
        let name = self.name;
        let value = match (self.takes, joined) {
            (Takes::Nothing, None) => return Ok(None),
            (Takes::Nothing, Some(value)) => {
                let text = format!("{name} takes no value, and is given {value:?}");
                return Err(Error::invalid(text));
            }
            (_, Some(value)) => value,
            (Takes::Truth, None) => {
                let word = next(|word| word == "true" || word == "false")?;
                word.unwrap_or_else(|| "true".to_owned())
            }
            (_, None) => {
                let missing = || Error::invalid(format!("{name} needs a value"));
                next(|_| true)?.ok_or_else(missing)?
            }
        };
        let words: &[&str] = match self.takes {
            Takes::Truth => &["true", "false"],
            Takes::OneOf(words) => words,
            _ => &[],
        };
        if !words.is_empty() && !words.contains(&value.as_str()) {
            return Err(wrong(name, &value, one_of(words)));
        }
        Ok(Some(value))
    }
}

/// The value of a flag that takes a number of seconds.
pub(super) fn seconds(name: &str, value: Option<&str>, default: u32) -> Result<Duration> {
    let seconds = match value {
        None => default,
        Some(text) => text
            .parse()
            .map_err(|_| wrong(name, text, "a number of seconds"))?,
    };
    Ok(Duration::from_secs(seconds.into()))
}

fn text(argument: OsString) -> Result<String> {
    argument
        .into_string()
        .map_err(|argument| Error::invalid(format!("the argument {argument:?} is not UTF-8")))
}

/// Formats words as `"a", "b" or "c"`.
fn one_of(words: &[&str]) -> String {
    let quoted: Vec<_> = words.iter().map(|word| format!("{word:?}")).collect();
    match quoted.split_last() {
        Some((last, others)) if !others.is_empty() => format!("{} or {last}", others.join(", ")),
        _ => quoted.join(""),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// argh treats each field as the table says of its flag.
    #[test]
    fn argh_reads_every_flag_of_the_table() {
        for flag in FLAGS {
            let (value, times) = match flag.takes {
                Takes::Nothing => (None, 1),
                Takes::Truth => (Some("false"), 1),
                Takes::OneOf(words) => (Some(words[0]), 1),
                Takes::Words | Takes::Directories => (Some("--yes"), 2),
                _ => (Some("--yes"), 1),
            };
            let mut arguments = Vec::new();
            for _ in 0..times {
                arguments.push(flag.name.into());
                arguments.extend(value.map(Into::into));
            }
            arguments.push("key".into());
            match Arguments::parse(arguments) {
                Ok(Arguments::Given { flags, named }) => {
                    assert!(named.iter().all(|named| named.name == flag.name));
                    assert_eq!(named.len(), times, "{}", flag.name);
                    assert_eq!(flags.command, ["key"], "{}", flag.name);
                }
                Ok(_) => panic!("{} asks for help or the version", flag.name),
                Err(error) => panic!("{}", error.chain()),
            }
        }
    }

    /// Every word after the command is a snapshot's key or a directory, whatever it looks
    /// like.
    #[test]
    fn words_of_a_command_stay_whole() {
        let words = ["mount", "help", "a=b"];
        match Arguments::parse(words.iter().map(Into::into).collect()) {
            Ok(Arguments::Given { flags, .. }) => assert_eq!(flags.command, words),
            _ => panic!("words are words"),
        }
    }
}
