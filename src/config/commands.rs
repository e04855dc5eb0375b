//! The words of the command line, and the flags that belong to them.

use super::flags::{Flag, Flags, REPORTING};
use crate::error::{Error, Result};

/// How a command prints what it found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// In sentences.
    Human,
    /// As one JSON object.
    Json,
}

/// Whether `check` repairs what it finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mending {
    /// It does not.
    Never,
    /// It does if the user agrees.
    AfterAsking,
    /// It does, without asking.
    AtOnce,
}

/// Whether `check` compares layers with what they are unpacked from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    /// It counts files and their lengths.
    Counts,
    /// It compares everything in a layer.
    Content,
    /// It does that, and puts right what differs.
    Heal,
}

/// How to check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckOptions {
    /// From `--json`.
    pub format: Format,
    /// From `--deep` and `--heal`.
    pub depth: Depth,
    /// From `--containerd-address`.
    pub containerd_address: String,
    /// From `--repair` and `--yes`.
    pub mending: Mending,
    /// From `--reset-writable`: a missing writable volume is given up for a new one.
    pub resets_writable: bool,
}

/// How to look at a machine.
#[derive(Debug, PartialEq, Eq)]
pub struct DoctorOptions {
    /// From `--json`.
    pub format: Format,
    /// From `--containerd-config`.
    pub containerd_config: Option<String>,
}

/// What to mount.
#[derive(Debug, PartialEq, Eq)]
pub struct MountOptions {
    /// The snapshot, by its key or the last part of it.
    pub key: String,
    /// Where: a directory.
    pub target: String,
    /// From `--read-only`. Layers and views are read-only without it.
    pub is_read_only: bool,
}

/// What `import` is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImportTask {
    /// Take over the snapshots of the Go original.
    Import,
    /// Report what an import would do.
    Look,
    /// Put things back as they were before the import.
    Undo,
}

/// How to import.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImportOptions {
    /// From `--json`.
    pub format: Format,
    /// From `--dry-run` and `--undo`.
    pub task: ImportTask,
    /// From `--leave-out-missing`. Without it an import is refused if a snapshot's
    /// directory is on neither volume: a disk that is not mounted looks like that.
    pub leaves_out_missing: bool,
}

/// What the program is asked to do.
#[derive(Debug, PartialEq, Eq)]
pub enum Command {
    /// Serve containerd.
    Serve,
    /// Look whether database and disks agree.
    Check(CheckOptions),
    /// Report how things stand.
    Status(Format),
    /// Look whether this machine and its containerd will do.
    Doctor(DoctorOptions),
    /// Mount a snapshot for a person.
    Mount(MountOptions),
    /// Unmount what was mounted by [`Command::Mount`] on this directory.
    Unmount(String),
    /// Take over the snapshots of the Go original.
    Import(ImportOptions),
}

/// The commands, for messages.
const COMMANDS: &str =
    "\"status\", \"check\", \"doctor\", \"import\", \"mount KEY DIR\" and \"umount DIR\"";

/// Reads the command's words, with the flags that belong to them.
///
/// # Errors
///
/// [`crate::error::ErrorKind::InvalidArgument`] for a word that is no command, too
/// few or too many of them, and a flag of another command.
pub(super) fn parse(flags: &Flags, named: &[&Flag]) -> Result<Command> {
    let words: Vec<&str> = flags.command.iter().map(String::as_str).collect();
    let command = words.first().copied();
    require_its_flags(named, command)?;
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
            is_read_only: flags.read_only,
        })),
        ["umount", target] => Ok(Command::Unmount((*target).to_owned())),
        ["mount", ..] => Err(Error::invalid(format!(
            "mount takes two words, KEY and DIR: the snapshot and where to mount it, not {}",
            words.len() - 1
        ))),
        ["umount", ..] => Err(Error::invalid(format!(
            "umount takes one word, DIR, not {}",
            words.len() - 1
        ))),
        [word, extra, ..] if REPORTING.contains(word) => {
            Err(Error::invalid(format!("{word} takes no {extra:?}")))
        }
        [word, ..] => Err(Error::invalid(format!(
            "{word:?} is no command of this program: it knows {COMMANDS}, and serves without one"
        ))),
    }
}

/// Refuses a flag of another command.
fn require_its_flags(named: &[&Flag], command: Option<&str>) -> Result<()> {
    for flag in named {
        let is_its = || command.is_some_and(|command| flag.commands.contains(&command));
        if !flag.commands.is_empty() && !is_its() {
            let commands: Vec<_> = flag
                .commands
                .iter()
                .map(|word| format!("{word:?}"))
                .collect();
            return Err(Error::invalid(format!(
                "{} goes with the command {}",
                flag.name,
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

/// Where containerd listens if its configuration says nothing else.
const CONTAINERD_ADDRESS: &str = "/run/containerd/containerd.sock";

fn depth(flags: &Flags, mends: bool) -> Result<Depth> {
    let depth = match (flags.deep, flags.heal) {
        (_, true) => Depth::Heal,
        (true, false) => Depth::Content,
        (false, false) => Depth::Counts,
    };
    if depth != Depth::Counts && mends {
        return Err(Error::invalid(
            "--deep and --heal do not go with --repair or --reset-writable: heal first, and then \
             repair what is left",
        ));
    }
    if depth == Depth::Counts && flags.containerd_address.is_some() {
        return Err(Error::invalid(
            "--containerd-address goes with --deep or --heal",
        ));
    }
    Ok(depth)
}

fn check_options(flags: &Flags) -> Result<CheckOptions> {
    let mends = flags.repair || flags.reset_writable;
    if flags.yes && !mends {
        return Err(Error::invalid("--yes goes with --repair"));
    }
    if flags.json && mends && !flags.yes {
        return Err(Error::invalid(
            "--json leaves no room for questions: give --yes with --repair",
        ));
    }
    Ok(CheckOptions {
        format: format(flags),
        depth: depth(flags, mends)?,
        containerd_address: flags
            .containerd_address
            .clone()
            .unwrap_or_else(|| CONTAINERD_ADDRESS.to_owned()),
        mending: match (mends, flags.yes) {
            (false, _) => Mending::Never,
            (true, false) => Mending::AfterAsking,
            (true, true) => Mending::AtOnce,
        },
        resets_writable: flags.reset_writable,
    })
}

fn import_options(flags: &Flags) -> Result<ImportOptions> {
    let task = match (flags.dry_run, flags.undo) {
        (false, false) => ImportTask::Import,
        (true, false) => ImportTask::Look,
        (false, true) => ImportTask::Undo,
        (true, true) => {
            return Err(Error::invalid("--undo has no --dry-run"));
        }
    };
    if task == ImportTask::Undo && flags.leave_out_missing {
        return Err(Error::invalid(
            "--undo leaves nothing out: give no --leave-out-missing",
        ));
    }
    Ok(ImportOptions {
        format: format(flags),
        task,
        leaves_out_missing: flags.leave_out_missing,
    })
}
