//! Reads the words of the command line that are not flags, and checks which flags belong to
//! them.

use super::flags::{Flag, Flags, REPORTING};
use crate::error::{Error, Result};

/// How a command prints what it found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// In sentences, for people.
    Human,
    /// As one JSON object, for programs.
    Json,
}

/// Whether `check` repairs what it finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mending {
    /// `check` repairs nothing.
    Never,
    /// `check` asks, and repairs if the user agrees.
    AfterAsking,
    /// `check` repairs without asking.
    AtOnce,
}

/// How `check` looks at layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    /// `check` counts files and their lengths.
    Counts,
    /// `check` compares everything in a layer with the content from which the layer was
    /// unpacked.
    Content,
    /// `check` compares like [`Depth::Content`], and replaces layers that differ.
    Heal,
}

/// The options of the command `check`.
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

/// The options of the command `doctor`.
#[derive(Debug, PartialEq, Eq)]
pub struct DoctorOptions {
    /// From `--json`.
    pub format: Format,
    /// From `--containerd-config`.
    pub containerd_config: Option<String>,
}

/// The options of the command `mount`.
#[derive(Debug, PartialEq, Eq)]
pub struct MountOptions {
    /// The snapshot, by its key or the last part of it.
    pub key: String,
    /// The directory to mount on.
    pub target: String,
    /// From `--read-only`. Layers and views are read-only without it.
    pub is_read_only: bool,
}

/// What `import` should do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImportTask {
    /// Take over the snapshots of the Go snapshotter that this program replaces.
    Import,
    /// Report what an import would do.
    Look,
    /// Undo the import.
    Undo,
}

/// The options of the command `import`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImportOptions {
    /// From `--json`.
    pub format: Format,
    /// From `--dry-run` and `--undo`.
    pub task: ImportTask,
    /// From `--leave-out-missing`. Without it, an import is refused if a
    /// snapshot's directory is on neither volume, because the reason may be a disk
    /// that is not mounted.
    pub leaves_out_missing: bool,
}

/// What the program should do.
#[derive(Debug, PartialEq, Eq)]
pub enum Command {
    /// Serve containerd.
    Serve,
    /// Check whether the database and the disks agree.
    Check(CheckOptions),
    /// Report the present state.
    Status(Format),
    /// Check whether this machine and its containerd are suitable.
    Doctor(DoctorOptions),
    /// Mount a snapshot for a person.
    Mount(MountOptions),
    /// Unmount what [`Command::Mount`] has mounted on this directory.
    Unmount(String),
    /// Take over the snapshots of the Go snapshotter that this program replaces.
    Import(ImportOptions),
}

/// The commands, as error messages list them.
const COMMANDS: &str =
    "\"status\", \"check\", \"doctor\", \"import\", \"mount KEY DIR\" and \"umount DIR\"";

/// Reads the command's words, and the flags that belong to the command.
///
/// # Errors
///
/// [`crate::error::ErrorKind::InvalidArgument`] for an unknown command, for too
/// few or too many words, and for a flag of another command.
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
            "mount takes two words, KEY and DIR (the snapshot and where to mount it), and not {}",
            words.len() - 1
        ))),
        ["umount", ..] => Err(Error::invalid(format!(
            "umount takes one word, DIR (where a snapshot is mounted), and not {}",
            words.len() - 1
        ))),
        [word, extra, ..] if REPORTING.contains(word) => {
            Err(Error::invalid(format!("{word} takes no {extra:?}")))
        }
        [word, ..] => Err(Error::invalid(format!(
            "{word:?} is not a command of this program: the commands are {COMMANDS}; without a \
             command, the daemon starts"
        ))),
    }
}

/// Returns an error if a given flag belongs to another command.
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
                "{} works only with the command {}",
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

/// The address of containerd, unless its configuration sets another one. Used without
/// `--containerd-address`.
const CONTAINERD_ADDRESS: &str = "/run/containerd/containerd.sock";

fn depth(flags: &Flags, mends: bool) -> Result<Depth> {
    let depth = match (flags.deep, flags.heal) {
        (_, true) => Depth::Heal,
        (true, false) => Depth::Content,
        (false, false) => Depth::Counts,
    };
    if depth != Depth::Counts && mends {
        return Err(Error::invalid(
            "--deep and --heal cannot be given with --repair or --reset-writable, which first \
             heal the layers that can be healed",
        ));
    }
    if depth == Depth::Counts && !mends && flags.containerd_address.is_some() {
        return Err(Error::invalid(
            "--containerd-address needs --deep, --heal, --repair or --reset-writable",
        ));
    }
    Ok(depth)
}

fn check_options(flags: &Flags) -> Result<CheckOptions> {
    let mends = flags.repair || flags.reset_writable;
    if flags.yes && !mends {
        return Err(Error::invalid("--yes needs --repair or --reset-writable"));
    }
    if flags.json && mends && !flags.yes {
        return Err(Error::invalid(
            "with --json, check asks no questions: give --yes with --repair or --reset-writable",
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
            return Err(Error::invalid(
                "--undo and --dry-run cannot be given together",
            ));
        }
    };
    if task == ImportTask::Undo && flags.leave_out_missing {
        return Err(Error::invalid(
            "--undo and --leave-out-missing cannot be given together",
        ));
    }
    Ok(ImportOptions {
        format: format(flags),
        task,
        leaves_out_missing: flags.leave_out_missing,
    })
}
