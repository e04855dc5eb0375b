//! From the command line to one checked configuration.
//!
//! Owns: flags, defaults, and every check that needs no disk. Never: touches a
//! disk, except to ask for the working directory of a relative path. Paths
//! that leave here are absolute, UTF-8 and free of every character that means
//! something in a mount option.

use std::ffi::OsString;
use std::num::NonZeroUsize;
use std::path::{Component, Path};
use std::thread;
use std::time::Duration;

use argh::FromArgs;

use crate::error::{Error, ErrorKind, Result};
use crate::snapshotter::{Relocation, RemovalMode, SyncMode, UpperdirLabel};

/// The original's root, so that a drop-in replacement finds its place.
pub const DEFAULT_ROOT: &str =
    "/var/lib/containerd/tech.imvictor.containerd.overlay-read-write-splitting-snapshotter";

/// Serve containerd a snapshotter that keeps image layers on one disk and what
/// containers write on another.
#[derive(FromArgs)]
struct Flags {
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

    /// how many requests may wait for a disk at once (default: one for each
    /// processor, at least 4, at most 16)
    #[argh(option, arg_name = "number")]
    threads: Option<NonZeroUsize>,

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
    /// From `--async-remove`.
    pub removal: RemovalMode,
    /// From `--upperdir-label`.
    pub upperdir_label: UpperdirLabel,
    /// From `--mount-option`.
    pub mount_options: Vec<String>,
    /// From `--sync`.
    pub sync: SyncMode,
    /// From `--relocate` and `--relocate-after`.
    pub relocation: Relocation,
    /// How many workers.
    pub threads: usize,
}

/// What the command line asks for.
#[derive(Debug, PartialEq, Eq)]
pub enum Parsed {
    /// To serve.
    Run(Config),
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
        Ok(flags) => check(flags).map(Parsed::Run),
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
        let argument = argument.into_string().map_err(|argument| {
            invalid(format!("the argument {} is not UTF-8", argument.display()))
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

/// Names in `<root>` that are ours; the writable directory may be in the root,
/// but in none of them.
const ROOT_NAMES: &[&str] = &[
    "metadata.db",
    "metadata.db-wal",
    "metadata.db-shm",
    "state",
    "state.new",
    "lock",
    "grpc.socks",
    "snapshots",
    "lowers",
    "empty",
    "trash",
];
/// The same for `<writable>`.
const WRITABLE_NAMES: &[&str] = &[".volume", ".volume.new", ".probe", "snapshots", "trash"];

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
    Ok(Config {
        root,
        writable,
        state_dir,
        address,
        removal: match flags.async_remove {
            true => RemovalMode::OnCleanup,
            false => RemovalMode::AtOnce,
        },
        upperdir_label: match flags.upperdir_label {
            true => UpperdirLabel::Shown,
            false => UpperdirLabel::Hidden,
        },
        mount_options: flags.mount_option,
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
        threads: flags
            .threads
            .map_or_else(default_threads, NonZeroUsize::get),
    })
}

fn default_threads() -> usize {
    thread::available_parallelism()
        .map_or(4, NonZeroUsize::get)
        .clamp(4, 16)
}

/// Makes a path absolute and refuses what could not be written into a mount
/// option: a comma ends an option, a colon a lower directory, a backslash
/// escapes.
fn check_path(flag: &str, path: &str) -> Result<String> {
    let refuse = |why: &str| Err(invalid(format!("{flag} is {path:?}: {why}")));
    if path.is_empty() {
        return refuse("a path is needed");
    }
    let forbidden = |c: char| matches!(c, ',' | ':' | '\\') || c.is_control();
    let Ok(absolute) = std::path::absolute(path) else {
        return refuse("the working directory cannot be told, give an absolute path");
    };
    let Some(text) = absolute.to_str() else {
        return refuse("the working directory is not UTF-8, give an absolute path");
    };
    if text.contains(forbidden) {
        return refuse(
            "commas, colons, backslashes and control characters mean something to mount(8), \
             choose a path without them",
        );
    }
    let mut normal = String::new();
    for component in Path::new(text).components() {
        match component {
            Component::Normal(name) => {
                normal.push('/');
                normal.push_str(name.to_str().expect("a part of a UTF-8 path is UTF-8"));
            }
            Component::ParentDir => return refuse("write it without \"..\""),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    if normal.is_empty() {
        return refuse("the root of all file systems cannot be used");
    }
    Ok(normal)
}

/// Refuses `other` where it is `base` itself or in a directory that is ours.
fn check_apart(base: (&str, &str), names: &[&str], other: (&str, &str)) -> Result<()> {
    let Some(below) = other.1.strip_prefix(base.1) else {
        return Ok(());
    };
    let is_taken = match below.strip_prefix('/') {
        None => below.is_empty(),
        Some(below) => names.contains(&below.split('/').next().unwrap_or(below)),
    };
    if !is_taken {
        return Ok(());
    }
    Err(invalid(format!(
        "{} {} is used for {} already: choose another directory",
        other.0, other.1, base.0
    )))
}

/// Options that each mount gets from its snapshot (overlayfs.rst).
const OWN_OPTIONS: &[&str] = &[
    "lowerdir",
    "lowerdir+",
    "datadir+",
    "upperdir",
    "workdir",
    "uidmap",
    "gidmap",
];

fn check_mount_option(option: &str) -> Result<()> {
    let refuse = |why: &str| Err(invalid(format!("--mount-option is {option:?}: {why}")));
    let name = option.split('=').next().unwrap_or(option);
    if name.is_empty() {
        return refuse("an option of overlayfs is needed");
    }
    if OWN_OPTIONS.contains(&name) {
        return refuse("the snapshotter sets that one itself for each mount");
    }
    if option.contains(|c: char| c == ',' || c.is_control() || c.is_whitespace()) {
        return refuse("give one option at a time, without commas and blanks");
    }
    Ok(())
}

fn invalid(what: String) -> Error {
    Error::new(ErrorKind::InvalidArgument, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(arguments: &[&str]) -> Result<Config> {
        match parse(arguments.iter().map(OsString::from).collect())? {
            Parsed::Run(config) => Ok(config),
            Parsed::Print(text) => panic!("printed {text}"),
        }
    }

    fn refused(arguments: &[&str]) -> String {
        let error = run(arguments).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        let text = error.chain();
        assert_eq!(text.lines().count(), 1, "{text}");
        text
    }

    #[test]
    fn defaults_are_the_originals() {
        let config = run(&[]).unwrap();
        assert_eq!(config.root, DEFAULT_ROOT);
        assert_eq!(config.writable, format!("{DEFAULT_ROOT}/writable"));
        assert_eq!(config.state_dir, DEFAULT_ROOT);
        assert_eq!(config.address, format!("{DEFAULT_ROOT}/grpc.socks"));
        assert_eq!(config.removal, RemovalMode::OnCleanup);
        assert_eq!(config.upperdir_label, UpperdirLabel::Hidden);
        assert_eq!(config.sync, SyncMode::AtCommit);
        let after = Duration::from_secs(60);
        assert_eq!(config.relocation, Relocation::Background { after });
        assert!((4..=16).contains(&config.threads));
    }

    #[test]
    fn both_ways_to_give_a_value_mean_the_same() {
        let apart = run(&[
            "--root-dir",
            "/a/",
            "--async-remove",
            "false",
            "--upperdir-label",
            "true",
            "--mount-option",
            "xino=auto",
            "--mount-option",
            "metacopy=on",
            "--threads",
            "3",
        ]);
        let joined = run(&[
            "--root-dir=/a",
            "--async-remove=false",
            "--upperdir-label",
            "--mount-option=xino=auto",
            "--mount-option=metacopy=on",
            "--threads=3",
        ]);
        let apart = apart.unwrap();
        assert_eq!(apart.root, "/a");
        assert_eq!(apart.mount_options, ["xino=auto", "metacopy=on"]);
        assert_eq!(apart.upperdir_label, UpperdirLabel::Shown);
        assert_eq!(apart.removal, RemovalMode::AtOnce);
        assert_eq!(apart, joined.unwrap());
        let alone = run(&["--async-remove", "--root-dir", "/a"]).unwrap();
        assert_eq!(alone.removal, RemovalMode::OnCleanup);
    }

    #[test]
    fn paths_that_could_inject_mount_options_are_refused() {
        for path in ["/a,b", "/a:b", "/a\\b", "/a\nb", "", "/", "/a/../b"] {
            for flag in ["--root-dir", "--writable-dir", "--state-dir", "--address"] {
                let text = refused(&[flag, path]);
                assert!(text.contains(flag), "{text}");
            }
        }
        run(&["--root-dir", "/with blank/é"]).unwrap();
    }

    #[test]
    fn directories_do_not_lie_in_each_others_own() {
        for pair in [
            ["--root-dir=/a", "--writable-dir=/a"],
            ["--root-dir=/a", "--writable-dir=/a/snapshots"],
            ["--root-dir=/a", "--writable-dir=/a/trash/x"],
            ["--root-dir=/a/snapshots/x", "--writable-dir=/a"],
            ["--root-dir=/a", "--state-dir=/a/snapshots"],
        ] {
            let text = refused(&pair);
            assert!(text.contains("/a"), "{text}");
        }
        run(&["--root-dir=/a", "--writable-dir=/a/fast"]).unwrap();
        run(&["--root-dir=/a", "--writable-dir=/ab"]).unwrap();
        run(&["--root-dir=/a", "--writable-dir=/b", "--state-dir=/b"]).unwrap();
        run(&["--root-dir=/a", "--writable-dir=/b", "--state-dir=/b/db"]).unwrap();
    }

    #[test]
    fn options_that_are_not_ours_to_give_are_refused() {
        for option in [
            "lowerdir=/x",
            "upperdir=/x",
            "workdir",
            "a,b",
            "",
            "=x",
            "a b",
            "uidmap=0:0:1",
        ] {
            let text = refused(&["--mount-option", option]);
            assert!(text.contains("--mount-option"), "{text}");
        }
    }

    #[test]
    fn nonsense_is_refused_in_one_line() {
        refused(&["--threads", "0"]);
        refused(&["--threads", "many"]);
        refused(&["--async-remove=maybe"]);
        refused(&["--sync", "sometimes"]);
        refused(&["--relocate", "sometimes"]);
        refused(&["--mount-option", "index=on"]);
        run(&["--mount-option", "index=on", "--relocate", "never"]).unwrap();
        refused(&["--relocate-after", "-1"]);
        refused(&["--no-such-flag"]);
        refused(&["stray"]);
        refused(&["--address", &format!("/{}", "a".repeat(107))]);
    }

    #[test]
    fn version_and_help_are_printed() {
        for (flag, part) in [
            ("--version", env!("CARGO_PKG_VERSION")),
            ("--help", "--writable-dir"),
        ] {
            match parse(vec![flag.into()]).unwrap() {
                Parsed::Print(text) => assert!(text.contains(part), "{text}"),
                Parsed::Run(_) => panic!("{flag} ran"),
            }
        }
    }
}
