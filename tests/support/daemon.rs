//! Running the real daemon.

use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use grpcio::RpcStatusCode;
use rustix::process::{Pid, Signal, kill_process};

use super::client::Client;
use super::disk::Disk;
use super::until;

/// The binary under test.
pub const BINARY: &str = env!("CARGO_BIN_EXE_overlay-read-write-splitting-snapshotter");

/// The longest wait for a start, which takes long in an emulated machine on a
/// busy host.
const LIMIT: Duration = Duration::from_secs(120);

/// Two disks and a daemon on them.
pub struct Split {
    pub image: Disk,
    pub writable: Disk,
    pub daemon: Daemon,
}

impl Split {
    /// Two ext4 disks of 256 MiB, and a daemon with its root on one of them and
    /// its writable directory on the other, both in a subdirectory.
    pub fn start(flags: &[&str]) -> Split {
        Split::on(Disk::ext4(256), Disk::ext4(256), flags)
    }

    /// A daemon on these disks.
    pub fn on(image: Disk, writable: Disk, flags: &[&str]) -> Split {
        Split::start_by(&[], image, writable, flags)
    }

    /// A daemon on these disks that is started through another command.
    pub fn start_by(starter: &[&str], image: Disk, writable: Disk, flags: &[&str]) -> Split {
        let daemon = Daemon::start_by(starter, &command(&image, &writable, flags), &[]);
        Split {
            image,
            writable,
            daemon,
        }
    }

    /// A daemon in a user namespace of its own, on two small disks.
    pub fn in_user_namespace() -> Split {
        let starter = ["unshare", "--user", "--map-root-user", "--mount", "--"];
        Split::start_by(&starter, Disk::ext4(64), Disk::ext4(64), &[])
    }

    /// Makes the database treat all ids up to `highest` as given out, as if
    /// there had been that many snapshots.
    pub fn skip_ids_through(&self, highest: u32) {
        skip_ids_through(&self.root(), highest);
    }

    /// Skips many ids and starts the daemon again. A snapshot that makes this possible is
    /// left behind. Tests with long chains do this: the kernel shows their layers without
    /// the path of the root, so every other root on the machine would treat its layers
    /// with the same ids as mounted.
    pub fn restart_at_far_ids(&mut self) {
        self.client().prepare("first", "", &[]).unwrap();
        self.daemon.stop();
        self.skip_ids_through(9000);
        self.daemon.restart();
    }

    /// `<root>`.
    pub fn root(&self) -> PathBuf {
        self.image.path().join("root")
    }

    /// `<writable>`.
    pub fn writable(&self) -> PathBuf {
        self.writable.path().join("writable")
    }

    /// A client of the daemon.
    pub fn client(&self) -> Client {
        self.daemon.client()
    }

    /// Removes every snapshot, and waits until nothing of any is on the disks.
    pub fn remove_everything(&self) {
        let client = self.client();
        // Children are removed first, because a snapshot with children is
        // refused.
        until("all is removed", || {
            for name in client.names(&[]).unwrap() {
                match client.remove(&name) {
                    Ok(()) | Err((RpcStatusCode::FAILED_PRECONDITION, _)) => {}
                    Err(refusal) => panic!("{refusal:?}"),
                }
            }
            client.names(&[]).unwrap().is_empty()
        });
        // A move that was under way may add to the trash once more.
        until("nothing is left", || {
            client.cleanup().unwrap();
            let volumes = [self.root(), self.writable()];
            volumes
                .iter()
                .all(|volume| is_empty(volume.join("snapshots")) && is_empty(volume.join("trash")))
        });
    }
}

/// Makes the database of that root, which must have had a snapshot, treat all
/// ids up to `highest` as given out.
pub fn skip_ids_through(root: &Path, highest: u32) {
    let database = rusqlite::Connection::open(root.join("metadata.db")).unwrap();
    let changed = database
        .execute("UPDATE sqlite_sequence SET seq = ?1", [highest])
        .unwrap();
    assert_eq!(changed, 1);
}

/// The arguments for a daemon on two disks.
pub fn command(image: &Disk, writable: &Disk, flags: &[&str]) -> Vec<String> {
    let mut arguments = vec![
        "--root-dir".to_owned(),
        format!("{}/root", image.text()),
        "--writable-dir".to_owned(),
        format!("{}/writable", writable.text()),
    ];
    arguments.extend(flags.iter().map(|flag| (*flag).to_owned()));
    arguments
}

/// A running daemon; killed when dropped.
pub struct Daemon {
    child: Child,
    command: Vec<String>,
    arguments: Vec<String>,
    environment: Vec<(String, String)>,
    address: String,
    log: tempfile::NamedTempFile,
}

impl Daemon {
    /// Starts a daemon with these arguments, which contain `--root-dir` (and
    /// perhaps `--address`), and waits until it serves.
    pub fn start(arguments: &[String]) -> Daemon {
        Daemon::start_in(arguments, &[])
    }

    /// Like [`Daemon::start`], with these environment variables.
    pub fn start_in(arguments: &[String], environment: &[(&str, &str)]) -> Daemon {
        Daemon::start_by(&[], arguments, environment)
    }

    /// Like [`Daemon::start`], through a command that runs the words after it.
    pub fn start_by(
        starter: &[&str],
        arguments: &[String],
        environment: &[(&str, &str)],
    ) -> Daemon {
        let mut daemon = Daemon::begin(starter, arguments, environment);
        daemon.wait_until_serving();
        daemon
    }

    /// Starts a daemon; returns an error with its output if it ends instead of
    /// serving.
    pub fn try_start(arguments: &[String]) -> Result<Daemon, String> {
        let mut daemon = Daemon::begin(&[], arguments, &[]);
        match daemon.is_serving_before_its_end() {
            Ok(()) => Ok(daemon),
            Err(status) => Err(format!("the daemon ended with {status}: {}", daemon.log())),
        }
    }

    fn begin(starter: &[&str], arguments: &[String], environment: &[(&str, &str)]) -> Daemon {
        let value = |flag: &str| {
            let at = arguments.iter().position(|argument| argument == flag)?;
            arguments.get(at + 1).cloned()
        };
        let root = value("--root-dir").expect("a root");
        let address = value("--address").unwrap_or_else(|| format!("{root}/grpc.socks"));
        let log = tempfile::NamedTempFile::new().unwrap();
        let environment: Vec<_> = environment
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect();
        let mut command: Vec<_> = starter.iter().map(ToString::to_string).collect();
        command.push(BINARY.to_owned());
        command.extend_from_slice(arguments);
        let child = spawn(&command, &environment, log.as_file(), None);
        Daemon {
            child,
            command,
            arguments: arguments.to_vec(),
            environment,
            address,
            log,
        }
    }

    /// Starts it again after its end. It will be killed at this step.
    pub fn restart_to_die_at(&mut self, step: &str) {
        self.launch(Some(step));
        self.wait_until_serving();
    }

    /// Starts it again after its end, and waits until it is killed at a step
    /// that it reaches by itself, perhaps before it serves.
    pub fn restart_until_dead_at(&mut self, step: &str) {
        self.launch(Some(step));
        assert!(!self.wait().success());
    }

    /// Changes the arguments for the next start.
    pub fn set_arguments(&mut self, arguments: Vec<String>) {
        let before = self.command.len() - self.arguments.len();
        self.command.truncate(before);
        self.command.extend_from_slice(&arguments);
        self.arguments = arguments;
    }

    /// Starts it again after its end. It will be killed at this step. Returns
    /// `false` if it reaches the step before it serves.
    pub fn restart_perhaps_to_die_at(&mut self, step: &str) -> bool {
        self.launch(Some(step));
        self.is_serving_before_its_end().is_ok()
    }

    /// Waits until it serves, and fails if it ends instead.
    pub fn wait_until_serving(&mut self) {
        if let Err(status) = self.is_serving_before_its_end() {
            panic!("the daemon ended with {status}:\n{}", self.log());
        }
    }

    fn is_serving_before_its_end(&mut self) -> Result<(), ExitStatus> {
        let begun = Instant::now();
        while UnixStream::connect(&self.address).is_err() {
            if let Some(status) = self.child.try_wait().unwrap() {
                return Err(status);
            }
            assert!(
                begun.elapsed() < LIMIT,
                "the daemon does not serve:\n{}",
                self.log()
            );
            sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Starts it again, with the same arguments, after its end.
    pub fn restart(&mut self) {
        self.begin_restart();
        self.wait_until_serving();
    }

    /// Starts it again, without waiting until it serves.
    pub fn begin_restart(&mut self) {
        self.launch(None);
    }

    fn launch(&mut self, fault: Option<&str>) {
        assert!(!self.is_running(), "the daemon has not ended yet");
        self.child = spawn(&self.command, &self.environment, self.log.as_file(), fault);
    }

    /// Its arguments.
    pub fn arguments(&self) -> &[String] {
        &self.arguments
    }

    /// Whether it has not ended.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// How much of the machine's memory it takes (`VmRSS`, proc_pid_status(5)).
    pub fn resident_bytes(&self) -> u64 {
        let path = format!("/proc/{}/status", self.child.id());
        let status = fs::read_to_string(path).unwrap();
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:"))
            .unwrap();
        let kibibytes: u64 = line.trim().trim_end_matches(" kB").parse().unwrap();
        kibibytes << 10
    }

    /// Sends SIGKILL, and waits for the end.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Sends SIGTERM.
    pub fn terminate(&self) {
        self.signal(Signal::TERM);
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).unwrap();
    }

    /// Waits for the end.
    pub fn wait(&mut self) -> ExitStatus {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(
                begun.elapsed() < LIMIT,
                "the daemon does not end:\n{}",
                self.log()
            );
            sleep(Duration::from_millis(5));
        }
    }

    /// Sends SIGTERM, waits for the end, and panics unless the exit code is 0.
    pub fn stop(&mut self) {
        self.terminate();
        let status = self.wait();
        assert!(
            status.success(),
            "the daemon ended with {status}:\n{}",
            self.log()
        );
    }

    /// Its process id.
    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// Its socket.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// All it has logged so far.
    pub fn log(&self) -> String {
        fs::read_to_string(self.log.path()).unwrap()
    }

    /// A new client with a connection of its own.
    pub fn client(&self) -> Client {
        Client::connect(&self.address)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- the daemon's log\n{}---", self.log());
        }
    }
}

fn spawn(
    command: &[String],
    environment: &[(String, String)],
    log: &File,
    fault: Option<&str>,
) -> Child {
    Command::new(&command[0])
        .args(&command[1..])
        .envs(fault.map(|step| ("SNAPSHOTTER_FAULT", step)))
        .env("RUST_LOG", "debug")
        .envs(environment.iter().cloned())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log.try_clone().unwrap())
        .spawn()
        .unwrap()
}

/// Runs a daemon that should not start, and returns its line. Panics unless it
/// prints exactly one line and ends with exit code 1.
pub fn refused(arguments: &[String]) -> String {
    let mut child = Command::new(BINARY)
        .args(arguments)
        .env("RUST_LOG", "error")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let begun = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if begun.elapsed() > LIMIT {
            child.kill().unwrap();
            panic!("{arguments:?}: it started");
        }
        sleep(Duration::from_millis(5));
    }
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{arguments:?}: {text}");
    assert_eq!(text.lines().count(), 1, "{arguments:?}: {text}");
    text
}

/// Whether a directory holds nothing.
pub fn is_empty(path: impl AsRef<Path>) -> bool {
    fs::read_dir(path).unwrap().next().is_none()
}
