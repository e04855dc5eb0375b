//! The configuration that a command uses if its command line has no flag of the daemon.
//!
//! Owns: finding the running daemon, and reading the service's settings. The kernel's table of
//! locks proves that a process is a daemon: the process holds the lock of the root directory
//! that its own command line names.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::fs::{Mode, OFlags, open};
use rustix::process::{chdir, fchdir};

use crate::config::{Command, Config, Parsed, have_daemon_flags, parse};
use crate::error::{Context, Error, Result};

const PROGRAM: &str = env!("CARGO_PKG_NAME");
/// The length to which the kernel shortens the names of processes (proc(5),
/// `comm`).
const COMM_BYTES: usize = 15;
/// The second name under which the program is installed.
const SHORT_NAME: &str = "rwsplit";

/// For each service manager: a path that exists if this service manager is in charge, and the
/// file with the service's settings.
const SETTINGS: [(&str, &str); 2] = [
    (
        "/run/systemd/system",
        concat!("/etc/default/", env!("CARGO_PKG_NAME")),
    ),
    (
        "/run/openrc",
        concat!("/etc/conf.d/", env!("CARGO_PKG_NAME")),
    ),
];

/// Reads the arguments after the program's name. A command without a flag of the daemon gets
/// the configuration of the running daemon or, if no daemon runs, that of the service. A line
/// on standard error says which configuration is used.
///
/// # Errors
///
/// [`FailedPrecondition`](crate::error::ErrorKind::FailedPrecondition) if several daemons
/// are running, or the service's settings cannot be parsed.
pub fn read(arguments: Vec<OsString>) -> Result<Parsed> {
    let is_complete = have_daemon_flags(&arguments);
    match parse(arguments)? {
        Parsed::Run(default, command) if !is_complete && needs_configuration(&command) => {
            Ok(Parsed::Run(find(default)?, command))
        }
        parsed => Ok(parsed),
    }
}

fn needs_configuration(command: &Command) -> bool {
    !matches!(command, Command::Serve | Command::Unmount(_))
}

fn find(default: Box<Config>) -> Result<Box<Config>> {
    let mut daemons = running_daemons()?;
    if daemons.len() > 1 {
        let each = daemons.iter().map(|daemon| format!("process {daemon}"));
        return Err(Error::refused(format!(
            "{} daemons are running ({}): give the flags of the daemon that you mean",
            daemons.len(),
            each.collect::<Vec<_>>().join("; ")
        )));
    }
    if let Some(daemon) = daemons.pop() {
        eprintln!("using the configuration of the running daemon, process {daemon}");
        return Ok(daemon.config);
    }
    for (_, path) in settings_files() {
        match fs::read_to_string(path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            text => {
                let text = text.context(|| format!("read the service's settings {path}"))?;
                let words = service_options(&text).ok_or_else(|| unreadable(path))?;
                let config = daemon_config(words.iter().map(OsString::from).collect())
                    .context(|| format!("read OPTIONS in {path}"))?
                    .ok_or_else(|| unreadable(path))?;
                let shown = words.join(" ");
                eprintln!("no daemon is running; using {path}: OPTIONS=\"{shown}\"");
                return Ok(config);
            }
        }
    }
    eprintln!("no daemon is running and no service is set up; using the default directories");
    Ok(default)
}

fn unreadable(path: &str) -> Error {
    Error::refused(format!(
        "OPTIONS in {path} cannot be read, because it is not one pair of quotes with flags of the \
         daemon, separated by blanks: give the daemon's flags to the command"
    ))
}

/// The files with the service's settings. The file of the service manager in charge comes
/// first.
fn settings_files() -> [(&'static str, &'static str); 2] {
    let mut files = SETTINGS;
    files.sort_by_key(|(manager, _)| !Path::new(manager).exists());
    files
}

/// A running daemon.
struct Daemon {
    process: u32,
    config: Box<Config>,
    arguments: Vec<OsString>,
}

impl std::fmt::Display for Daemon {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{}:", self.process)?;
        if self.arguments.is_empty() {
            write!(formatter, " all flags have their defaults")?;
        }
        for argument in &self.arguments {
            write!(formatter, " {}", argument.to_string_lossy())?;
        }
        Ok(())
    }
}

/// All processes of this program that hold the lock of the root that they
/// serve.
fn running_daemons() -> Result<Vec<Daemon>> {
    let locks = fs::read_to_string("/proc/locks").context(|| "read /proc/locks")?;
    let mut daemons: Vec<Daemon> = Vec::new();
    for (process, inode) in locks.lines().filter_map(lock) {
        let is_known = daemons.iter().any(|daemon| daemon.process == process);
        // A process that has ended since /proc/locks was read is ignored.
        if !is_known && let Some(daemon) = daemon_with_lock(process, inode) {
            daemons.push(daemon);
        }
    }
    daemons.sort_by_key(|daemon| daemon.process);
    Ok(daemons)
}

/// The process and the inode in a line about an flock(2) (proc_locks(5)), such as
/// `1: FLOCK ADVISORY WRITE 749 fe:00:2384799 0 EOF`.
fn lock(line: &str) -> Option<(u32, u64)> {
    let words: Vec<_> = line.split_whitespace().collect();
    match words.as_slice() {
        [_, "FLOCK", _, "WRITE", process, place, ..] => {
            let inode = place.rsplit(':').next()?;
            Some((process.parse().ok()?, inode.parse().ok()?))
        }
        _ => None,
    }
}

/// The daemon that runs as this process. `None` if the process was not started by root in this
/// user and mount namespace, if its command line is not a daemon's, or if `inode` is not the
/// lock of the root that the command line names.
fn daemon_with_lock(process: u32, inode: u64) -> Option<Daemon> {
    // A process can choose its name and command line freely, and a container can lock a
    // file of its own with any inode number.
    if !is_an_administrators(process) {
        return None;
    }
    let of_process = |name: &str| fs::read(format!("/proc/{process}/{name}")).ok();
    let name = of_process("comm")?;
    let name = name.trim_ascii_end();
    if name != &PROGRAM.as_bytes()[..COMM_BYTES] && name != SHORT_NAME.as_bytes() {
        return None;
    }
    let words = of_process("cmdline")?;
    let words = words.strip_suffix(b"\0").unwrap_or(&words);
    let words = words.split(|byte| *byte == 0).skip(1);
    let arguments: Vec<_> = words
        .map(|word| OsStr::from_bytes(word).to_owned())
        .collect();
    // Relative paths in the daemon's arguments start at the daemon's working directory.
    let own = open(".", OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).ok()?;
    chdir(format!("/proc/{process}/cwd")).ok()?;
    let config = daemon_config(arguments.clone());
    fchdir(own).ok()?;
    let config = config.ok()??;
    let lock = fs::metadata(format!("{}/lock", config.root)).ok()?;
    (lock.ino() == inode).then_some(Daemon {
        process,
        config,
        arguments,
    })
}

/// Whether root has started a process, and the process is in the same user and mount
/// namespaces as this one.
fn is_an_administrators(process: u32) -> bool {
    // A set-user-ID program has the real user ID of the user who has started it, and the
    // name and the arguments that this user has chosen.
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let ids = status.lines().find_map(|line| line.strip_prefix("Uid:"));
    let is_roots = ids.is_some_and(|ids| ids.split_whitespace().all(|id| id == "0"));
    let is_here = |name: &str| {
        let of = |process: &str| fs::read_link(format!("/proc/{process}/ns/{name}")).ok();
        let theirs = of(&process.to_string());
        theirs.is_some() && theirs == of("self")
    };
    is_roots && is_here("user") && is_here("mnt")
}

/// The configuration of a daemon with these arguments; `None` if they are the
/// arguments of a command.
fn daemon_config(arguments: Vec<OsString>) -> Result<Option<Box<Config>>> {
    Ok(match parse(arguments)? {
        Parsed::Run(config, Command::Serve) => Some(config),
        _ => None,
    })
}

/// The words of the last line that sets OPTIONS, as systemd and OpenRC pass them to the
/// daemon; `None` if a shell would read them in another way.
fn service_options(text: &str) -> Option<Vec<String>> {
    let lines = text.lines().map(str::trim);
    let lines = lines.filter(|line| line.contains("OPTIONS") && !line.starts_with('#'));
    let mut value = "";
    for line in lines {
        value = line.strip_prefix("OPTIONS=")?;
    }
    let quote = |quote| value.strip_prefix(quote)?.strip_suffix(quote);
    let value = quote('"').or_else(|| quote('\'')).unwrap_or(value);
    let means_more = |c: char| matches!(c, '"' | '\'' | '\\' | '$' | '`' | '#' | ';');
    if value.contains(means_more) {
        return None;
    }
    Some(value.split_whitespace().map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::process::CommandExt;
    use std::process;

    use super::*;

    #[test]
    fn another_users_process_is_no_daemon() {
        let own = is_an_administrators(process::id());
        assert_eq!(own, rustix::process::geteuid().is_root());
        if !own {
            return;
        }
        // In a directory that every user may enter.
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
        let copy = dir.path().join("sleep");
        fs::copy("/bin/sleep", &copy).unwrap();
        for (mode, effective) in [(0o755, 65534), (0o4755, 0)] {
            fs::set_permissions(&copy, Permissions::from_mode(mode)).unwrap();
            let mut other = process::Command::new(&copy);
            let mut other = other.uid(65534).arg("60").spawn().unwrap();
            let found = fs::metadata(format!("/proc/{}", other.id())).unwrap();
            let is_found = is_an_administrators(other.id());
            other.kill().unwrap();
            other.wait().unwrap();
            assert_eq!(found.uid(), effective, "{mode:o}");
            assert!(!is_found, "{mode:o}");
        }
    }

    #[test]
    fn locks_are_read() {
        let line = "1: FLOCK  ADVISORY  WRITE 749 fe:00:2384799 0 EOF";
        assert_eq!(lock(line), Some((749, 2_384_799)));
        for other in [
            "",
            "1: POSIX  ADVISORY  WRITE 749 fe:00:2384799 0 EOF",
            "1: FLOCK  ADVISORY  READ 749 fe:00:2384799 0 EOF",
            "1: -> FLOCK  ADVISORY  WRITE 749 fe:00:2384799 0 EOF",
            "1: FLOCK  ADVISORY  WRITE -1 fe:00:2384799 0 EOF",
        ] {
            assert_eq!(lock(other), None, "{other}");
        }
    }

    #[test]
    fn the_service_s_options_are_plain_words() {
        let words = |text| service_options(text).map(|words| words.join("|"));
        for (text, expected) in [
            ("", Some("")),
            ("OPTIONS=\"\"\n", Some("")),
            ("# OPTIONS=\"--x\"\n", Some("")),
            (
                "OPTIONS=\"--root-dir /a  --reserve=1G\"\n",
                Some("--root-dir|/a|--reserve=1G"),
            ),
            ("OPTIONS='--root-dir /a'\n", Some("--root-dir|/a")),
            ("OPTIONS=--sync=none\n", Some("--sync=none")),
            (
                "OPTIONS=\"--a\"\nRUST_LOG=info\n  OPTIONS=\"--b\"\n",
                Some("--b"),
            ),
            ("OPTIONS=\"--root-dir $HOME\"\n", None),
            ("OPTIONS=\"--root-dir /a\" # why\n", None),
            ("OPTIONS=\"--root-dir \\\n/a\"\n", None),
            ("OPTIONS=\"--root-dir '/a b'\"\n", None),
            ("OPTIONS=\"--root-dir\n", None),
            ("export OPTIONS=\"--a\"\n", None),
            ("OPTIONS=\"--a\"\n: \"${OPTIONS:=--b}\"\n", None),
        ] {
            assert_eq!(words(text).as_deref(), expected, "{text}");
        }
    }
}
