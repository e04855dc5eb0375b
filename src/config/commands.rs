//! The words of the command line, and the flags that belong to them.

use super::{Flags, invalid};
use crate::error::Result;

/// How a command tells what it found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// In sentences.
    Human,
    /// As one JSON object.
    Json,
}

/// What `check` is to do about what it finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mending {
    /// Nothing.
    Never,
    /// Put it right if the user says so.
    AfterAsking,
    /// Put it right.
    AtOnce,
}

/// What becomes of a writable volume that is not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MissingVolume {
    /// It is waited for.
    AwaitIt,
    /// It is given up for the one at the writable directory.
    GiveItUp,
}

/// How to check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CheckOptions {
    /// From `--json`.
    pub format: Format,
    /// From `--repair` and `--yes`.
    pub mending: Mending,
    /// From `--reset-writable`.
    pub missing: MissingVolume,
}

/// How to look at a machine.
#[derive(Debug, PartialEq, Eq)]
pub struct DoctorOptions {
    /// From `--json`.
    pub format: Format,
    /// From `--containerd-config`.
    pub containerd_config: Option<String>,
}

/// Whether a person's mount may change a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Only what is read-only by its kind stays so.
    AsTheKindAllows,
    /// It may not.
    ReadOnly,
}

/// What to mount.
#[derive(Debug, PartialEq, Eq)]
pub struct MountOptions {
    /// The snapshot, by its key or the last part of it.
    pub key: String,
    /// Where: a directory.
    pub target: String,
    /// From `--read-only`.
    pub access: Access,
}

/// What `import` is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImportTask {
    /// To take over what the Go original has left.
    Import,
    /// To tell what that would be.
    Look,
    /// To put things back as they were.
    Undo,
}

/// What becomes of an import if a snapshot's directory is on neither volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MissingSnapshots {
    /// It is refused: a disk that is not mounted looks like that.
    Refuse,
    /// It goes on without them.
    LeaveOut,
}

/// How to import.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImportOptions {
    /// From `--json`.
    pub format: Format,
    /// From `--dry-run` and `--undo`.
    pub task: ImportTask,
    /// From `--leave-out-missing`.
    pub missing: MissingSnapshots,
}

/// What the words ask for.
pub(super) enum Command {
    Serve,
    Check(CheckOptions),
    Status(Format),
    Doctor(DoctorOptions),
    Mount(MountOptions),
    Unmount(String),
    Import(ImportOptions),
}

/// The commands, for messages.
const COMMANDS: &str =
    "\"status\", \"check\", \"doctor\", \"import\", \"mount KEY DIR\" and \"umount DIR\"";

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
        ["import"] => import_options(flags).map(Command::Import),
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
        [word @ ("check" | "status" | "doctor" | "import"), extra, ..] => {
            Err(invalid(format!("{word} takes no {extra:?}")))
        }
        [word, ..] => Err(invalid(format!(
            "{word:?} is no command of this program: it knows {COMMANDS}, and serves without one"
        ))),
    }
}

/// Refuses a flag that the command would not heed.
fn require_its_flags(flags: &Flags, command: Option<&str>) -> Result<()> {
    let given: [(&str, bool, &[&str]); 9] = [
        ("--repair", flags.repair, &["check"]),
        ("--yes", flags.yes, &["check"]),
        ("--reset-writable", flags.reset_writable, &["check"]),
        (
            "--json",
            flags.json,
            &["check", "status", "doctor", "import"],
        ),
        ("--dry-run", flags.dry_run, &["import"]),
        ("--undo", flags.undo, &["import"]),
        ("--leave-out-missing", flags.leave_out_missing, &["import"]),
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

fn import_options(flags: &Flags) -> Result<ImportOptions> {
    let task = match (flags.dry_run, flags.undo) {
        (false, false) => ImportTask::Import,
        (true, false) => ImportTask::Look,
        (false, true) => ImportTask::Undo,
        (true, true) => {
            return Err(invalid("--undo has no --dry-run".to_owned()));
        }
    };
    if task == ImportTask::Undo && flags.leave_out_missing {
        return Err(invalid(
            "--undo leaves nothing out: give no --leave-out-missing".to_owned(),
        ));
    }
    Ok(ImportOptions {
        format: format(flags),
        task,
        missing: match flags.leave_out_missing {
            true => MissingSnapshots::LeaveOut,
            false => MissingSnapshots::Refuse,
        },
    })
}
