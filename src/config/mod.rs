//! From the command line to one checked configuration.
//!
//! Owns: flags, defaults, and every check that needs no disk. Never: touches a
//! disk, except to ask for the working directory of a relative path. Paths
//! that leave here are absolute, UTF-8 and free of every character that means
//! something in a mount option.

mod commands;
mod host_dirs;
mod paths;
mod quota;
mod size;
#[cfg(test)]
mod tests;

use std::ffi::OsString;
use std::num::NonZeroUsize;
use std::thread;
use std::time::Duration;

use argh::FromArgs;

use crate::error::{Error, ErrorKind, Result};
use crate::host_dirs::ImageRule;
use crate::snapshotter::{QuotaOptions, Relocation, RemovalMode, SyncMode, UpperdirLabel};
use crate::volume::{Lifetime, MountPoints, Reserve};
use commands::Command;
pub use commands::{
    Access, CheckOptions, DoctorOptions, Format, ImportOptions, ImportTask, Mending,
    MissingSnapshots, MissingVolume, MountOptions,
};
use paths::{ROOT_NAMES, WRITABLE_NAMES, check_apart, check_mount_option, check_path};

/// The original's root, so that a drop-in replacement finds its place.
pub const DEFAULT_ROOT: &str =
    "/var/lib/containerd/tech.imvictor.containerd.overlay-read-write-splitting-snapshotter";

/// Serve containerd a snapshotter that keeps image layers on one disk and what
/// containers write on another. With a command, do that instead: `status` tells
/// how things stand, `check` whether database and disks agree, `doctor` whether
/// this machine will do; `import` takes over the
/// snapshots of the Go original; `mount KEY DIR` mounts a snapshot to look into or to
/// rescue from, `umount DIR` ends that.
#[derive(FromArgs)]
struct Flags {
    /// nothing, to serve; or a command with its words
    #[argh(positional)]
    command: Vec<String>,

    /// directory of the image volume: layers, database, socket (default
    /// /var/lib/containerd/tech.imvictor.containerd.overlay-read-write-splitting-snapshotter)
    #[argh(option, arg_name = "dir")]
    root_dir: Option<String>,

    /// directory of the writable volume: what containers write (default
    /// `writable` in the root)
    #[argh(option, arg_name = "dir")]
    writable_dir: Option<String>,

    /// directory of metadata.db (default the root); on the fast disk it lets
    /// the big one sleep
    #[argh(option, arg_name = "dir")]
    state_dir: Option<String>,

    /// path of the socket (default `grpc.socks` in the root)
    #[argh(option, arg_name = "path")]
    address: Option<String>,

    /// refuse to start unless the root and the writable directory are mount
    /// points themselves
    #[argh(switch)]
    require_mount: bool,

    /// the writable volume is meant to be lost at a reboot (tmpfs): begin anew
    /// on an empty one
    #[argh(switch)]
    writable_volatile: bool,

    /// refuse new containers when less than this is free on the writable volume:
    /// bytes, with K, M, G or T, or a percentage as in 5% (default 0)
    #[argh(option, arg_name = "size", default = "String::from(\"0\")")]
    reserve: String,

    /// true: space is given back by containerd's garbage collection; false:
    /// before each removal answers (default true)
    #[argh(option, arg_name = "bool", default = "true")]
    async_remove: bool,

    /// tell each snapshot's own directory in the label
    /// containerd.io/snapshot/overlay.upperdir (default false)
    #[argh(option, arg_name = "bool", default = "false")]
    upperdir_label: bool,

    /// option for every overlay mount; may be given several times
    #[argh(option, arg_name = "option")]
    mount_option: Vec<String>,

    /// host directory; it and all beneath may be shown to containers that ask for
    /// it by label; may be given several times (default none)
    #[argh(option, arg_name = "dir")]
    allow_lower: Vec<String>,

    /// IMAGE_PATTERN=DIR[:DIR...]: host directories for the containers of images
    /// that CRI has pulled; may be given several times
    #[argh(option, arg_name = "rule")]
    lower_for: Vec<String>,

    /// commit: a layer's data is on its disk before its commit is answered;
    /// none: when the kernel sees fit (default commit)
    #[argh(option, arg_name = "when", default = "String::from(\"commit\")")]
    sync: String,

    /// background: layers committed on the writable volume move to the image
    /// volume; never: they stay (default background)
    #[argh(option, arg_name = "when", default = "String::from(\"background\")")]
    relocate: String,

    /// how many seconds after its commit a layer may move (default 60)
    #[argh(option, arg_name = "seconds", default = "60")]
    relocate_after: u32,

    /// auto: containers on the writable volume get project quotas where its file
    /// system has them; require: nothing is written there without; off (default
    /// auto)
    #[argh(option, arg_name = "mode", default = "String::from(\"auto\")")]
    quota: String,

    /// FIRST-LAST: project ids to give out; other users of the same file system
    /// need others (default 1000000000-1999999999)
    #[argh(option, arg_name = "range")]
    quota_ids: Option<String>,

    /// how much a container may write if its labels do not say: bytes, with K, M,
    /// G or T (default no limit)
    #[argh(option, arg_name = "size")]
    default_max_size: Option<String>,

    /// how many files and directories, likewise (default no limit)
    #[argh(option, arg_name = "number")]
    default_max_inodes: Option<String>,

    /// without quotas: how many seconds a usage that was counted may be told
    /// again (default 0)
    #[argh(option, arg_name = "seconds", default = "0")]
    usage_max_age: u32,

    /// how many requests may wait for a disk at once (default: one for each
    /// processor, at least 8, at most 16)
    #[argh(option, arg_name = "number")]
    threads: Option<NonZeroUsize>,

    /// write figures there, for the textfile collector of Prometheus' node
    /// exporter (default none)
    #[argh(option, arg_name = "path")]
    metrics_file: Option<String>,

    /// check, status, doctor and import: answer in JSON
    #[argh(switch)]
    json: bool,

    /// mount: without writing, which a running container's snapshot needs
    #[argh(switch)]
    read_only: bool,

    /// doctor: containerd's configuration file (default containerd's default)
    #[argh(option, arg_name = "path")]
    containerd_config: Option<String>,

    /// check: put right what can be, after asking; the daemon has to be stopped
    #[argh(switch)]
    repair: bool,

    /// check: repair without asking
    #[argh(switch)]
    yes: bool,

    /// check: give up the writable volume that was there, take the writable
    /// directory as a new one, and repair
    #[argh(switch)]
    reset_writable: bool,

    /// import: tell what would be imported, and do nothing
    #[argh(switch)]
    dry_run: bool,

    /// import: put the original's database back, if nothing was written since
    #[argh(switch)]
    undo: bool,

    /// import: leave out the snapshots that have no directory on either volume,
    /// instead of refusing
    #[argh(switch)]
    leave_out_missing: bool,

    /// print the version
    #[argh(switch)]
    version: bool,
}

/// A checked configuration.
#[derive(Debug, PartialEq, Eq)]
pub struct Config {
    /// `<root>`.
    pub root: String,
    /// `<writable>`.
    pub writable: String,
    /// Where `metadata.db` is.
    pub state_dir: String,
    /// The socket.
    pub address: String,
    /// From `--require-mount`.
    pub mount_points: MountPoints,
    /// From `--writable-volatile`.
    pub writable_lifetime: Lifetime,
    /// From `--reserve`.
    pub reserve: Reserve,
    /// From `--async-remove`.
    pub removal: RemovalMode,
    /// From `--upperdir-label`.
    pub upperdir_label: UpperdirLabel,
    /// From `--mount-option`.
    pub mount_options: Vec<String>,
    /// From `--allow-lower`.
    pub allowed_lowers: Vec<String>,
    /// From `--lower-for`.
    pub lower_rules: Vec<ImageRule>,
    /// From `--sync`.
    pub sync: SyncMode,
    /// From `--relocate` and `--relocate-after`.
    pub relocation: Relocation,
    /// From `--quota`, `--quota-ids`, `--default-max-size`, `--default-max-inodes`
    /// and `--usage-max-age`.
    pub quota: QuotaOptions,
    /// How many workers.
    pub threads: usize,
    /// From `--metrics-file`.
    pub metrics_file: Option<String>,
}

/// What the command line asks for.
#[derive(Debug, PartialEq, Eq)]
pub enum Parsed {
    /// To serve.
    Run(Config),
    /// To look whether database and disks agree.
    Check(Config, CheckOptions),
    /// To tell how things stand.
    Status(Config, Format),
    /// To look whether this machine and its containerd will do.
    Doctor(Config, DoctorOptions),
    /// To mount a snapshot for a person.
    Mount(Config, MountOptions),
    /// To end such a mount, on this directory.
    Unmount(String),
    /// To take over what the Go original has left.
    Import(Config, ImportOptions),
    /// To print this and be done.
    Print(String),
}

/// Reads the arguments after the program's name.
///
/// # Errors
///
/// [`ErrorKind::InvalidArgument`] naming the flag, the value and what would be
/// right.
pub fn parse(arguments: Vec<OsString>) -> Result<Parsed> {
    let arguments = normalize(arguments)?;
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match Flags::from_args(&["overlay-read-write-splitting-snapshotter"], &arguments) {
        Ok(flags) if flags.version => Ok(Parsed::Print(format!(
            "overlay-read-write-splitting-snapshotter {}\n",
            env!("CARGO_PKG_VERSION")
        ))),
        Ok(flags) => {
            let command = commands::parse(&flags)?;
            let config = check(flags)?;
            Ok(match command {
                Command::Serve => Parsed::Run(config),
                Command::Check(options) => Parsed::Check(config, options),
                Command::Status(format) => Parsed::Status(config, format),
                Command::Doctor(options) => Parsed::Doctor(config, options),
                Command::Mount(options) => Parsed::Mount(config, options),
                Command::Unmount(target) => Parsed::Unmount(target),
                Command::Import(options) => Parsed::Import(config, options),
            })
        }
        Err(exit) if exit.status.is_ok() => Ok(Parsed::Print(exit.output)),
        Err(exit) => Err(invalid(exit.output.trim().replace('\n', " "))),
    }
}

/// The flags that the Go original knew as booleans: those may stand alone.
const BOOLEANS: &[&str] = &["--async-remove", "--upperdir-label"];

/// Brings the original's ways to write a flag into the one that argh reads:
/// `--flag=value` becomes two arguments, a boolean flag alone means true.
fn normalize(arguments: Vec<OsString>) -> Result<Vec<String>> {
    let mut normal = Vec::with_capacity(arguments.len() + 4);
    let mut waiting_boolean = false;
    for argument in arguments {
        let argument = argument
            .into_string()
            .map_err(|argument| invalid(format!("the argument {argument:?} is not UTF-8")))?;
        if waiting_boolean && argument != "true" && argument != "false" {
            normal.push("true".to_owned());
        }
        waiting_boolean = false;
        match argument.split_once('=') {
            Some((flag, value)) if flag.starts_with("--") => {
                normal.extend([flag.to_owned(), value.to_owned()]);
            }
            _ => {
                waiting_boolean = BOOLEANS.contains(&argument.as_str());
                normal.push(argument);
            }
        }
    }
    if waiting_boolean {
        normal.push("true".to_owned());
    }
    Ok(normal)
}

/// sockaddr_un's `sun_path` has 108 bytes with the final NUL (unix(7)).
const MAX_ADDRESS_BYTES: usize = 107;

fn check(flags: Flags) -> Result<Config> {
    let root = check_path(
        "--root-dir",
        flags.root_dir.as_deref().unwrap_or(DEFAULT_ROOT),
    )?;
    let writable = match flags.writable_dir {
        Some(path) => check_path("--writable-dir", &path)?,
        None => format!("{root}/writable"),
    };
    let state_dir = match flags.state_dir {
        Some(path) => check_path("--state-dir", &path)?,
        None => root.clone(),
    };
    let address = match flags.address {
        Some(path) => check_path("--address", &path)?,
        None => format!("{root}/grpc.socks"),
    };
    if address.len() > MAX_ADDRESS_BYTES {
        return Err(invalid(format!(
            "the socket's path {address} has {} bytes, the system allows {MAX_ADDRESS_BYTES}: \
             give a shorter --address",
            address.len()
        )));
    }
    check_apart(
        ("--root-dir", &root),
        ROOT_NAMES,
        ("--writable-dir", &writable),
    )?;
    check_apart(
        ("--writable-dir", &writable),
        WRITABLE_NAMES,
        ("--root-dir", &root),
    )?;
    if state_dir != root {
        check_apart(
            ("--root-dir", &root),
            ROOT_NAMES,
            ("--state-dir", &state_dir),
        )?;
    }
    if state_dir != writable {
        check_apart(
            ("--writable-dir", &writable),
            WRITABLE_NAMES,
            ("--state-dir", &state_dir),
        )?;
    }
    for option in &flags.mount_option {
        check_mount_option(option)?;
        // overlayfs then keeps a handle of the topmost layer in the upper
        // directory, and refuses the upper once that layer has moved (ESTALE).
        if flags.relocate != "never" && matches!(option.as_str(), "index=on" | "nfs_export=on") {
            return Err(invalid(format!(
                "--mount-option {option} ties containers to the place of their layers: \
                 it needs --relocate never"
            )));
        }
    }
    let (allowed_lowers, lower_rules) =
        host_dirs::check(&flags.allow_lower, &flags.lower_for, &flags.mount_option)?;
    let metrics_file = flags
        .metrics_file
        .map(|path| check_path("--metrics-file", &path))
        .transpose()?;
    if let Some(path) = &metrics_file {
        let file = ("--metrics-file", path.as_str());
        check_apart(("--root-dir", &root), ROOT_NAMES, file)?;
        check_apart(("--writable-dir", &writable), WRITABLE_NAMES, file)?;
        check_apart(("--state-dir", &state_dir), ROOT_NAMES, file)?;
        check_apart(("--address", &address), &[], file)?;
    }
    let quota = quota::check(&quota::Given {
        mode: &flags.quota,
        ids: flags.quota_ids.as_deref(),
        max_size: flags.default_max_size.as_deref(),
        max_inodes: flags.default_max_inodes.as_deref(),
        usage_max_age: flags.usage_max_age,
    })?;
    Ok(Config {
        root,
        writable,
        state_dir,
        address,
        mount_points: match flags.require_mount {
            true => MountPoints::Required,
            false => MountPoints::Optional,
        },
        writable_lifetime: match flags.writable_volatile {
            true => Lifetime::UntilReboot,
            false => Lifetime::Lasting,
        },
        reserve: size::parse_reserve("--reserve", &flags.reserve)?,
        removal: match flags.async_remove {
            true => RemovalMode::OnCleanup,
            false => RemovalMode::AtOnce,
        },
        upperdir_label: match flags.upperdir_label {
            true => UpperdirLabel::Shown,
            false => UpperdirLabel::Hidden,
        },
        mount_options: flags.mount_option,
        allowed_lowers,
        lower_rules,
        sync: match flags.sync.as_str() {
            "commit" => SyncMode::AtCommit,
            "none" => SyncMode::Never,
            other => {
                return Err(invalid(format!(
                    "--sync is {other:?}, it has to be \"commit\" or \"none\""
                )));
            }
        },
        relocation: match flags.relocate.as_str() {
            "background" => Relocation::Background {
                after: Duration::from_secs(flags.relocate_after.into()),
            },
            "never" => Relocation::Never,
            other => {
                return Err(invalid(format!(
                    "--relocate is {other:?}, it has to be \"background\" or \"never\""
                )));
            }
        },
        quota,
        threads: flags
            .threads
            .map_or_else(default_threads, NonZeroUsize::get),
        metrics_file,
    })
}

/// More than there are processors: most of them wait for a disk, and those that wait
/// at the same time become durable together.
fn default_threads() -> usize {
    thread::available_parallelism()
        .map_or(8, NonZeroUsize::get)
        .clamp(8, 16)
}

fn invalid(what: String) -> Error {
    Error::new(ErrorKind::InvalidArgument, what)
}
