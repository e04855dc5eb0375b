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
#[cfg(test)]
mod tests;

use std::ffi::OsString;
use std::fmt::Display;
use std::num::NonZeroUsize;
use std::thread;
use std::time::Duration;

use argh::FromArgs;

use crate::error::{Error, Result};
use crate::host_dirs::Policy;
use crate::snapshotter::{Options, PodLabels, Relocation, SyncMode};
use crate::types::MountPath;
use crate::volume::Lifetime;
pub use commands::{
    CheckOptions, Command, DoctorOptions, Format, ImportOptions, ImportTask, Mending, MountOptions,
};
use paths::{check_all_apart, check_mount_options, check_path};

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

    /// k8s.io: labels in that namespace, which may be annotations of pods, choose
    /// host directories, volume and limits as an administrator's do (default none)
    #[argh(option, arg_name = "namespace")]
    trust_labels_from: Option<String>,

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
    pub root: MountPath,
    /// `<writable>`.
    pub writable: MountPath,
    /// Where `metadata.db` is.
    pub state_dir: String,
    /// The socket.
    pub address: String,
    /// From `--require-mount`: the directories of both volumes have to be mount points,
    /// so that a disk that is not mounted is noticed before anything else.
    pub requires_mounts: bool,
    /// From `--writable-volatile`.
    pub writable_lifetime: Lifetime,
    /// How snapshots are kept, before `Options::for_this_kernel`.
    pub options: Options,
    /// How many workers.
    pub threads: usize,
    /// From `--metrics-file`.
    pub metrics_file: Option<String>,
}

/// What the command line asks for.
#[derive(Debug, PartialEq, Eq)]
pub enum Parsed {
    /// Run a command.
    Run(Box<Config>, Command),
    /// Print this text.
    Print(String),
}

/// Reads the arguments after the program's name.
///
/// # Errors
///
/// [`InvalidArgument`](crate::error::ErrorKind::InvalidArgument) naming the flag, the
/// value and what would be right.
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
            Ok(Parsed::Run(Box::new(check(flags)?), command))
        }
        Err(exit) if exit.status.is_ok() => Ok(Parsed::Print(exit.output)),
        Err(exit) => Err(Error::invalid(exit.output.trim().replace('\n', " "))),
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
        let argument = argument.into_string().map_err(|argument| {
            Error::invalid(format!("the argument {argument:?} is not UTF-8"))
        })?;
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
    let path_or = |flag: &str, given: &Option<String>, default: String| {
        check_path(flag, given.as_ref().unwrap_or(&default))
    };
    let root = path_or("--root-dir", &flags.root_dir, DEFAULT_ROOT.to_owned())?;
    let in_root = |name| format!("{root}/{name}");
    let writable = path_or("--writable-dir", &flags.writable_dir, in_root("writable"))?;
    let state_dir = path_or("--state-dir", &flags.state_dir, root.to_string())?.to_string();
    let address = path_or("--address", &flags.address, in_root("grpc.socks"))?.to_string();
    if address.len() > MAX_ADDRESS_BYTES {
        return Err(Error::invalid(format!(
            "the socket's path {address} has {} bytes, the system allows {MAX_ADDRESS_BYTES}: \
             give a shorter --address",
            address.len()
        )));
    }
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
    check_mount_options(&flags.mount_option, &flags.relocate)?;
    let (allowed, lower_rules) =
        host_dirs::check(&flags.allow_lower, &flags.lower_for, &flags.mount_option)?;
    let quota = quota::check(&flags)?;
    let options = Options {
        mount_options: flags.mount_option,
        removes_at_once: !flags.async_remove,
        sync: match flags.sync.as_str() {
            "commit" => SyncMode::AtCommit,
            "none" => SyncMode::Never,
            other => return Err(wrong("--sync", other, "\"commit\" or \"none\"")),
        },
        relocation: match flags.relocate.as_str() {
            "background" => Relocation::Background {
                after: Duration::from_secs(flags.relocate_after.into()),
            },
            "never" => Relocation::Never,
            other => return Err(wrong("--relocate", other, "\"background\" or \"never\"")),
        },
        reserve: quota::parse_reserve(&flags.reserve)?,
        shows_upperdir: flags.upperdir_label,
        quota,
        lowers: Policy {
            allowed,
            kept_apart: vec![root.to_string(), writable.to_string(), state_dir.clone()],
        },
        lower_rules,
        pod_labels: check_trusted(flags.trust_labels_from.as_deref())?,
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
        threads: flags
            .threads
            .map_or_else(default_threads, NonZeroUsize::get),
        metrics_file,
    })
}

fn check_trusted(namespace: Option<&str>) -> Result<PodLabels> {
    match namespace {
        None => Ok(PodLabels::Ignored),
        Some("k8s.io") => Ok(PodLabels::Trusted),
        Some(other) => Err(wrong(
            "--trust-labels-from",
            other,
            "\"k8s.io\"; labels in other namespaces are the administrator's always",
        )),
    }
}

/// More than there are processors: most of them wait for a disk, and those that wait
/// at the same time become durable together.
fn default_threads() -> usize {
    thread::available_parallelism()
        .map_or(8, NonZeroUsize::get)
        .clamp(8, 16)
}

/// The error for a flag's value that is not one of those it can have.
fn wrong(flag: &str, value: &str, right: impl Display) -> Error {
    Error::invalid(format!("{flag} is {value:?}, it has to be {right}"))
}
