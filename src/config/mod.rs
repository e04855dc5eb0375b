//! Turns the command line into one checked configuration.
//!
//! Owns: flags, defaults, and every check that needs no disk. Never: touches a
//! disk, except to ask for the working directory if a path is relative. All
//! resulting paths are absolute, UTF-8 and free of characters with a meaning in
//! mount options.

mod commands;
#[cfg(test)]
mod completions;
mod flags;
mod host_dirs;
mod paths;
mod quota;
#[cfg(test)]
mod tests;

use std::ffi::OsString;
use std::fmt::Display;
use std::num::NonZeroUsize;
use std::thread;

use crate::error::{Error, Result};
use crate::host_dirs::Policy;
use crate::snapshotter::{Options, PodLabels, Relocation, SyncMode};
use crate::types::MountPath;
use crate::volume::Lifetime;
pub use commands::{
    CheckOptions, Command, Depth, DoctorOptions, Format, ImportOptions, ImportTask, Mending,
    MountOptions,
};
use flags::{Arguments, FLAGS, Flags, seconds};
use paths::{check_all_apart, check_mount_options, check_path};

/// The root directory of the Go snapshotter that this program replaces, so that the change
/// needs no configuration.
pub const DEFAULT_ROOT: &str =
    "/var/lib/containerd/tech.imvictor.containerd.overlay-read-write-splitting-snapshotter";

/// The text of `--help`.
const HELP: &str = include_str!("help.txt");

/// A checked configuration.
#[derive(Debug, PartialEq, Eq)]
pub struct Config {
    /// The root directory, from `--root-dir`.
    pub root: MountPath,
    /// The writable directory, from `--writable-dir`.
    pub writable: MountPath,
    /// The directory of `metadata.db`, from `--state-dir`.
    pub state_dir: String,
    /// The path of the socket, from `--address`.
    pub address: String,
    /// From `--require-mount`: the directories of both volumes have to be mount points,
    /// so that a missing disk is noticed before anything is written.
    pub requires_mounts: bool,
    /// Whether a reboot empties the writable volume, from `--writable-volatile`.
    pub writable_lifetime: Lifetime,
    /// The snapshotter's options, not yet adapted by `Options::for_this_kernel`.
    pub options: Options,
    /// The number of workers.
    pub threads: usize,
    /// The file with figures for Prometheus, from `--metrics-file`.
    pub metrics_file: Option<String>,
}

/// What the command line asks for.
#[derive(Debug, PartialEq, Eq)]
pub enum Parsed {
    /// Run the daemon or a command.
    Run(Box<Config>, Command),
    /// Print this text.
    Print(String),
}

/// Reads the arguments after the program's name.
///
/// # Errors
///
/// [`InvalidArgument`](crate::error::ErrorKind::InvalidArgument) with the flag, its
/// value and what would be right.
pub fn parse(arguments: Vec<OsString>) -> Result<Parsed> {
    let (flags, named) = match Arguments::parse(arguments)? {
        Arguments::Help => return Ok(Parsed::Print(HELP.to_owned())),
        Arguments::Version => {
            let (name, version) = (env!("CARGO_PKG_NAME"), env!("CARGO_PKG_VERSION"));
            return Ok(Parsed::Print(format!("{name} {version}\n")));
        }
        Arguments::Given { flags, named } => (flags, named),
    };
    let command = commands::parse(&flags, &named)?;
    let config = check(&flags)?;
    // Only the daemon needs a socket.
    if command == Command::Serve {
        require_short_address(&config.address)?;
    }
    Ok(Parsed::Run(Box::new(config), command))
}

/// Whether the arguments contain a flag of the daemon. If so, a command takes its whole
/// configuration from the arguments.
pub fn have_daemon_flags(arguments: &[OsString]) -> bool {
    let names: Vec<_> = arguments
        .iter()
        .filter_map(|argument| argument.to_str())
        .collect();
    let mut daemons = FLAGS.iter().filter(|flag| flag.commands.is_empty());
    daemons.any(|flag| {
        let is_it = |name: &&str| name.split('=').next() == Some(flag.name);
        names.iter().any(is_it)
    })
}

/// `sun_path` of sockaddr_un has 108 bytes, including the final NUL (unix(7)).
const MAX_ADDRESS_BYTES: usize = 107;

/// Returns an error for a path that is too long for a socket.
pub fn require_short_address(address: &str) -> Result<()> {
    if address.len() <= MAX_ADDRESS_BYTES {
        return Ok(());
    }
    Err(Error::invalid(format!(
        "the socket's path {address} has {} bytes, the system allows {MAX_ADDRESS_BYTES}: give a \
         shorter --address",
        address.len()
    )))
}

fn check(flags: &Flags) -> Result<Config> {
    let path_or = |flag: &str, given: &Option<String>, default: &str| {
        check_path(flag, given.as_deref().unwrap_or(default))
    };
    let root = path_or("--root-dir", &flags.root_dir, DEFAULT_ROOT)?;
    let in_root = |name| format!("{root}/{name}");
    let writable = path_or("--writable-dir", &flags.writable_dir, &in_root("writable"))?;
    let state_dir = path_or("--state-dir", &flags.state_dir, &root)?.to_string();
    let address = path_or("--address", &flags.address, &in_root("grpc.socks"))?.to_string();
    let metrics_file = flags.metrics_file.as_deref();
    let metrics_file =
        metrics_file.map(|path| check_path("--metrics-file", path).map(|path| path.to_string()));
    let metrics_file = metrics_file.transpose()?;
    check_all_apart(
        &root,
        &writable,
        &state_dir,
        &address,
        metrics_file.as_deref(),
    )?;
    let mount_options = flags.mount_option.clone();
    let relocation = match flags.relocate.as_deref() {
        Some("never") => Relocation::Never,
        _ => Relocation::Background {
            after: seconds("--relocate-after", flags.relocate_after.as_deref(), 60)?,
            // A reboot empties a volatile volume. The containers on a small layer still
            // exist after it, so the layer has to move to the image volume.
            keeps_small: !flags.writable_volatile,
        },
    };
    check_mount_options(&mount_options, relocation)?;
    let (allowed, lower_rules) =
        host_dirs::check(&flags.allow_lower, &flags.lower_for, &mount_options)?;
    let quota = quota::check(flags)?;
    let threads = match flags.threads.as_deref() {
        None => default_threads(),
        Some(text) => text
            .parse::<NonZeroUsize>()
            .map_err(|_| wrong("--threads", text, "a number from 1"))?
            .get(),
    };
    let options = Options {
        mount_options,
        removes_at_once: flags.async_remove.as_deref() == Some("false"),
        sync: match flags.sync.as_deref() {
            Some("none") => SyncMode::Never,
            _ => SyncMode::AtCommit,
        },
        records_digests: flags.record_digests,
        relocation,
        reserve: quota::parse_reserve(flags.reserve.as_deref().unwrap_or("0"))?,
        shows_upperdir: flags.upperdir_label.as_deref() == Some("true"),
        quota,
        lowers: Policy {
            allowed,
            kept_apart: vec![root.to_string(), writable.to_string(), state_dir.clone()],
        },
        lower_rules,
        pod_labels: match flags.trust_labels_from {
            // The table of flags permits only one value, the namespace of pods.
            Some(_) => PodLabels::Trusted,
            None => PodLabels::Ignored,
        },
    };
    Ok(Config {
        root,
        writable,
        state_dir,
        address,
        requires_mounts: flags.require_mount,
        writable_lifetime: match flags.writable_volatile {
            true => Lifetime::UntilReboot,
            false => Lifetime::Lasting,
        },
        options,
        threads,
        metrics_file,
    })
}

/// The default number of workers, which is higher than the number of processors:
/// most workers wait for a disk, and the changes of those that wait at the same time
/// become durable together.
fn default_threads() -> usize {
    thread::available_parallelism()
        .map_or(8, NonZeroUsize::get)
        .clamp(8, 16)
}

/// The error for a wrong value of a flag.
fn wrong(flag: &str, value: &str, right: impl Display) -> Error {
    Error::invalid(format!("{flag} is {value:?}, it has to be {right}"))
}
