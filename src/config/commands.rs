//! The words after the program's name: which command, and the flags that are for
//! some commands only.

use super::{
    Access, CheckOptions, DoctorOptions, Flags, Format, Mending, MissingVolume, MountOptions,
    invalid,
};
use crate::error::Result;

/// What the words ask for.
pub(super) enum Command {
    Serve,
    Check(CheckOptions),
    Status(Format),
    Doctor(DoctorOptions),
    Mount(MountOptions),
    Unmount(String),
}

/// The commands, for messages.
const COMMANDS: &str = "\"status\", \"check\", \"doctor\", \"mount KEY DIR\" and \"umount DIR\"";

/// Reads the words, with the flags that belong to them.
///
/// # Errors
///
/// [`crate::error::ErrorKind::InvalidArgument`] for a word that is no command, too
/// few or too many of them, and a flag of another command.
pub(super) fn parse(flags: &Flags) -> Result<Command> {
    let words: Vec<&str> = flags.command.iter().map(String::as_str).collect();
    let command = words.first().copied();
    require_its_flags(flags, command)?;
    match words.as_slice() {
        [] => Ok(Command::Serve),
        ["check"] => check_options(flags).map(Command::Check),
        ["status"] => Ok(Command::Status(format(flags))),
        ["doctor"] => Ok(Command::Doctor(DoctorOptions {
            format: format(flags),
            containerd_config: flags.containerd_config.clone(),
        })),
        ["mount", key, target] => Ok(Command::Mount(MountOptions {
            key: (*key).to_owned(),
            target: (*target).to_owned(),
            access: match flags.read_only {
                true => Access::ReadOnly,
                false => Access::AsTheKindAllows,
            },
        })),
        ["umount", target] => Ok(Command::Unmount((*target).to_owned())),
        ["mount", ..] => Err(invalid(format!(
            "mount takes two words, KEY and DIR: the snapshot and where to mount it, not {}",
            words.len() - 1
        ))),
        ["umount", ..] => Err(invalid(format!(
            "umount takes one word, DIR, not {}",
            words.len() - 1
        ))),
        [word @ ("check" | "status" | "doctor"), extra, ..] => {
            Err(invalid(format!("{word} takes no {extra:?}")))
        }
        [word, ..] => Err(invalid(format!(
            "{word:?} is no command of this program: it knows {COMMANDS}, and serves without one"
        ))),
    }
}

/// Refuses a flag that the command would not heed.
fn require_its_flags(flags: &Flags, command: Option<&str>) -> Result<()> {
    let given: [(&str, bool, &[&str]); 6] = [
        ("--repair", flags.repair, &["check"]),
        ("--yes", flags.yes, &["check"]),
        ("--reset-writable", flags.reset_writable, &["check"]),
        ("--json", flags.json, &["check", "status", "doctor"]),
        (
            "--containerd-config",
            flags.containerd_config.is_some(),
            &["doctor"],
        ),
        ("--read-only", flags.read_only, &["mount"]),
    ];
    for (flag, is_given, commands) in given {
        if is_given && !command.is_some_and(|command| commands.contains(&command)) {
            let commands: Vec<_> = commands.iter().map(|word| format!("{word:?}")).collect();
            return Err(invalid(format!(
                "{flag} goes with the command {}",
                commands.join(" or ")
            )));
        }
    }
    Ok(())
}

fn format(flags: &Flags) -> Format {
    match flags.json {
        true => Format::Json,
        false => Format::Human,
    }
}

fn check_options(flags: &Flags) -> Result<CheckOptions> {
    let mends = flags.repair || flags.reset_writable;
    if flags.yes && !mends {
        return Err(invalid("--yes goes with --repair".to_owned()));
    }
    if flags.json && mends && !flags.yes {
        return Err(invalid(
            "--json leaves no room for questions: give --yes with --repair".to_owned(),
        ));
    }
    Ok(CheckOptions {
        format: format(flags),
        mending: match (mends, flags.yes) {
            (false, _) => Mending::Never,
            (true, false) => Mending::AfterAsking,
            (true, true) => Mending::AtOnce,
        },
        missing: match flags.reset_writable {
            true => MissingVolume::GiveItUp,
            false => MissingVolume::AwaitIt,
        },
    })
}
