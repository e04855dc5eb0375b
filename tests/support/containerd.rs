//! A containerd for one test, with its `ctr`.
//!
//! It shares nothing with another containerd on the machine: its directories
//! and sockets are in a temporary directory, and its namespace, which names
//! cgroups, is named after that.

use std::collections::{HashMap, HashSet};
use std::fmt::Debug;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::str::SplitWhitespace;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, Signal, kill_process};

use super::run;

/// The image's name in the archive.
pub const IMAGE: &str = "docker.io/library/split-test:latest";

/// containerd's name for the daemon under test.
pub const SNAPSHOTTER: &str = "rwsplit";

/// The longest wait for anything, far longer than it takes on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);

/// The archive of the five-layer image, made once for all tests.
pub fn archive() -> &'static str {
    static ARCHIVE: OnceLock<String> = OnceLock::new();
    ARCHIVE.get_or_init(|| {
        let archive = concat!(env!("CARGO_TARGET_TMPDIR"), "/five-layers.tar");
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/make-image.sh");
        run(Command::new("sh").args([script, archive, IMAGE]));
        archive.to_owned()
    })
}

/// Waits until `attempt` succeeds.
pub fn wait_for<T, E: Debug>(what: &str, mut attempt: impl FnMut() -> Result<T, E>) -> T {
    let begun = Instant::now();
    loop {
        match attempt() {
            Ok(value) => return value,
            Err(error) if begun.elapsed() > LIMIT => panic!("no {what}: {error:?}"),
            Err(_) => {}
        }
        sleep(Duration::from_millis(20));
    }
}

/// Runs a closure when dropped, also when a test fails.
pub struct AtEnd<F: FnMut()>(pub F);

impl<F: FnMut()> Drop for AtEnd<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

/// A line of `ctr snapshot ls`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    pub key: String,
    pub parent: String,
    pub kind: String,
}

/// The overlay that `ctr snapshot mounts` prints.
#[derive(Debug, PartialEq, Eq)]
pub struct Overlay {
    /// The upper directory of an active snapshot.
    pub upper: Option<PathBuf>,
    /// The lower directories, the newest first.
    pub lowers: Vec<PathBuf>,
}

/// A running containerd. It ends when dropped, with its containers and their
/// mounts.
pub struct Containerd {
    child: Child,
    namespace: String,
    /// How many outputs of containers were requested.
    outputs: AtomicU32,
    dir: tempfile::TempDir,
}

impl Containerd {
    /// Starts a containerd that knows the snapshotter at that socket.
    pub fn start(snapshotter: &str) -> Containerd {
        Containerd::start_with(None, &[(SNAPSHOTTER, snapshotter)])
    }

    /// Starts one with its root at `root` that knows these snapshotters by name and socket.
    pub fn start_at(root: &Path, snapshotters: &[(&str, &str)]) -> Containerd {
        Containerd::start_with(Some(root), snapshotters)
    }

    fn start_with(root: Option<&Path>, snapshotters: &[(&str, &str)]) -> Containerd {
        // The name becomes part of a namespace, which must not begin with a
        // dot.
        let dir = tempfile::Builder::new()
            .prefix("containerd-")
            .tempdir()
            .unwrap();
        let path = dir.path().to_str().unwrap();
        let root = root.map_or_else(|| format!("{path}/root"), |root| root.display().to_string());
        let proxies: String = snapshotters
            .iter()
            .map(|(name, address)| {
                format!("[proxy_plugins.{name}]\ntype = \"snapshot\"\naddress = \"{address}\"\n")
            })
            .collect();
        let config = format!(
            r#"version = 2
root = "{root}"
state = "{path}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[grpc]
address = "{path}/socket"
[ttrpc]
address = "{path}/socket.ttrpc"
{proxies}[plugins."io.containerd.internal.v1.opt"]
path = "{path}/opt"
"#
        );
        fs::write(dir.path().join("config.toml"), config).unwrap();
        let name = dir.path().file_name().unwrap().to_str().unwrap();
        let mut containerd = Containerd {
            child: spawn(dir.path()),
            namespace: name.to_owned(),
            outputs: AtomicU32::new(0),
            dir,
        };
        containerd.wait_until_serving();
        containerd
    }

    fn wait_until_serving(&mut self) {
        wait_for("containerd that serves", || {
            if let Some(status) = self.child.try_wait().unwrap() {
                panic!("containerd ended with {status}");
            }
            self.try_ctr(&["version"])
        });
    }

    /// Ends it by this signal and starts it again. Containers keep running.
    pub fn restart(&mut self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
        self.child.wait().unwrap();
        self.child = spawn(self.dir.path());
        self.wait_until_serving();
    }

    /// Stops its process while `work` runs, so that it notices nothing.
    pub fn freeze_while(&self, work: impl FnOnce()) {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, Signal::STOP).unwrap();
        let _thaw = AtEnd(|| {
            let _ = kill_process(pid, Signal::CONT);
        });
        work();
    }

    /// A directory for mounts of tests, which are unmounted with the rest.
    pub fn subdirectory(&self, name: &str) -> String {
        super::disk::subdirectory(self.dir.path(), name)
    }

    /// The address of its socket.
    pub fn address(&self) -> String {
        self.path("socket")
    }

    /// The file that has the content of a digest.
    pub fn blob(&self, digest: &str) -> String {
        let name = digest.replace(':', "/");
        self.path(&format!(
            "root/io.containerd.content.v1.content/blobs/{name}"
        ))
    }

    fn path(&self, name: &str) -> String {
        format!("{}/{name}", self.dir.path().display())
    }

    /// Runs `ctr` to its end, and kills it if that takes too long.
    pub fn ctr_output(&self, arguments: &[&str]) -> Output {
        Command::new("timeout")
            .args(["-k", "5", &LIMIT.as_secs().to_string(), "ctr"])
            .args(arguments)
            .env("CONTAINERD_ADDRESS", self.path("socket"))
            .env("CONTAINERD_NAMESPACE", &self.namespace)
            .env("CONTAINERD_SNAPSHOTTER", SNAPSHOTTER)
            .output()
            .unwrap()
    }

    /// What `ctr` prints, or its error.
    pub fn try_ctr(&self, arguments: &[&str]) -> Result<String, String> {
        let output = self.ctr_output(arguments);
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        Err(format!(
            "ctr {}: {}: {}{}",
            arguments.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        ))
    }

    /// What `ctr` prints; panics if `ctr` fails.
    pub fn ctr(&self, arguments: &[&str]) -> String {
        self.try_ctr(arguments)
            .unwrap_or_else(|said| panic!("{said}"))
    }

    /// Imports and unpacks the five-layer image.
    pub fn try_import(&self) -> Result<String, String> {
        self.try_ctr(&["image", "import", "--snapshotter", SNAPSHOTTER, archive()])
    }

    /// Like [`Containerd::try_import`]; panics if the import fails.
    pub fn import(&self) {
        self.try_import().unwrap_or_else(|said| panic!("{said}"));
    }

    /// Runs `ctr` and returns what a container has printed. The output goes to
    /// a file, because `ctr` sometimes prints nothing of a container that ends
    /// at once.
    fn try_ctr_in_container(&self, command: &[&str], what: &[&str]) -> Result<String, String> {
        let number = self.outputs.fetch_add(1, Ordering::Relaxed);
        let file = self.path(&format!("output-{number}"));
        let uri = format!("file://{file}");
        let result = self.try_ctr(&[command, &["--log-uri", &uri], what].concat());
        let printed = fs::read_to_string(file).unwrap_or_default();
        match result {
            Ok(_) => Ok(printed),
            Err(said) => Err(said + &printed),
        }
    }

    /// Runs a container of the image, removes it, and returns what it printed.
    pub fn try_run(&self, id: &str, script: &str) -> Result<String, String> {
        self.try_run_with(&[], id, script)
    }

    /// Like [`Containerd::try_run`], with further flags for `ctr run`.
    pub fn try_run_with(&self, flags: &[&str], id: &str, script: &str) -> Result<String, String> {
        let runc = self.path("runc");
        self.try_ctr_in_container(
            &[&["run", "--rm", "--runc-root", &runc], flags].concat(),
            &[IMAGE, id, "sh", "-ec", script],
        )
    }

    /// Like [`Containerd::try_run`]; panics if the run fails.
    pub fn run(&self, id: &str, script: &str) -> String {
        self.try_run(id, script)
            .unwrap_or_else(|said| panic!("{said}"))
    }

    /// Runs a container of the image in the background. SIGTERM ends it while
    /// it sleeps, for which the first process of a container has to set a trap.
    pub fn try_start(&self, id: &str, script: &str) -> Result<String, String> {
        self.try_ctr(&[
            "run",
            "--detach",
            "--null-io",
            "--runc-root",
            &self.path("runc"),
            IMAGE,
            id,
            "sh",
            "-ec",
            &format!("trap 'exit 0' TERM\n{script}\nwhile :; do sleep 0.05; done"),
        ])
    }

    /// Like [`Containerd::try_start`]; panics if the start fails.
    pub fn start_container(&self, id: &str, script: &str) {
        self.try_start(id, script)
            .unwrap_or_else(|said| panic!("{said}"));
    }

    /// Runs a container on a mounted directory, and returns what it printed.
    pub fn run_on(&self, directory: &str, id: &str, script: &str) -> String {
        let run = ["run", "--rm", "--runc-root", &self.path("runc")];
        // Without an image, there is no PATH to find sh with.
        let what = ["--rootfs", directory, id, "/bin/sh", "-ec", script];
        self.try_ctr_in_container(&run, &what)
            .unwrap_or_else(|said| panic!("{said}"))
    }

    /// Runs a script in a running container, and returns what it printed.
    pub fn try_exec(&self, id: &str, script: &str) -> Result<String, String> {
        let exec = ["task", "exec", "--exec-id", "exec"];
        self.try_ctr_in_container(&exec, &[id, "sh", "-ec", script])
    }

    /// Like [`Containerd::try_exec`]; panics if the script fails.
    pub fn exec(&self, id: &str, script: &str) -> String {
        self.try_exec(id, script)
            .unwrap_or_else(|said| panic!("{said}"))
    }

    /// Ends a container's processes by SIGTERM; the container stays.
    pub fn stop(&self, id: &str) {
        wait_for("end of the container", || {
            // Again and again: before the first process has asked for it, nothing ends it.
            let _ = self.try_ctr(&["task", "kill", id]);
            let tasks = self.ctr(&["task", "ls"]);
            let mut lines = tasks.lines().map(str::split_whitespace);
            let is_stopped = |mut line: SplitWhitespace| {
                line.next() == Some(id) && line.next_back() == Some("STOPPED")
            };
            lines.any(is_stopped).then_some(()).ok_or(tasks)
        });
        self.ctr(&["task", "rm", id]);
    }

    /// Removes a stopped container and its snapshot.
    pub fn remove(&self, id: &str) {
        self.ctr(&["container", "rm", id]);
    }

    /// All snapshots of the namespace.
    pub fn snapshots(&self) -> Vec<Listed> {
        let text = self.ctr(&["snapshot", "ls"]);
        let listed = |line: &str| {
            let fields: Vec<_> = line.split_whitespace().map(str::to_owned).collect();
            let (key, parent, kind) = match fields.as_slice() {
                [key, kind] => (key, "", kind),
                [key, parent, kind] => (key, parent.as_str(), kind),
                _ => panic!("not a line of a list: {line:?}"),
            };
            Listed {
                key: key.clone(),
                parent: parent.to_owned(),
                kind: kind.clone(),
            }
        };
        text.lines().skip(1).map(listed).collect()
    }

    /// The snapshot with that key; `None` if there is none.
    pub fn snapshot(&self, key: &str) -> Option<Listed> {
        self.snapshots()
            .into_iter()
            .find(|listed| listed.key == key)
    }

    /// The overlay that a snapshot is mounted as.
    pub fn overlay(&self, key: &str) -> Overlay {
        parse_overlay(&self.ctr(&["snapshot", "mounts", "/target", key]))
    }

    /// Makes containerd remove everything that nothing refers to, and waits for
    /// that. Its API has this only as a part of removing something else.
    pub fn try_collect_garbage(&self) -> Result<String, String> {
        // An earlier try may have ended after this step.
        let _ = self.try_ctr(&["leases", "create", "--id", "collect"]);
        self.try_ctr(&["leases", "rm", "--sync", "collect"])
    }

    /// Like [`Containerd::try_collect_garbage`]; panics if that fails.
    pub fn collect_garbage(&self) {
        self.try_collect_garbage()
            .unwrap_or_else(|said| panic!("{said}"));
    }

    /// The shims and the processes beneath them. Shims outlive their
    /// containerd, and have its address on their command line.
    fn processes(&self) -> Vec<Pid> {
        let address = self.path("socket");
        let mut parents = HashMap::new();
        let mut found = HashSet::new();
        for entry in fs::read_dir("/proc").unwrap() {
            let path = entry.unwrap().path();
            let Some(pid) = path
                .file_name()
                .and_then(|name| name.to_str()?.parse().ok())
            else {
                continue;
            };
            // Each process may end at any moment.
            let arguments = fs::read_to_string(path.join("cmdline")).unwrap_or_default();
            if arguments.contains("containerd-shim") && arguments.split('\0').any(|a| a == address)
            {
                found.insert(pid);
            }
            let status = fs::read_to_string(path.join("status")).unwrap_or_default();
            let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"));
            if let Some(parent) = parent.and_then(|parent| parent.trim().parse::<i32>().ok()) {
                parents.insert(pid, parent);
            }
        }
        loop {
            let is_new =
                |(pid, parent): &(&i32, &i32)| found.contains(*parent) && !found.contains(*pid);
            let more: Vec<i32> = parents.iter().filter(is_new).map(|(pid, _)| *pid).collect();
            if more.is_empty() {
                break;
            }
            found.extend(more);
        }
        found.into_iter().filter_map(Pid::from_raw).collect()
    }

    fn kill_processes(&self) {
        let begun = Instant::now();
        // Repeated until there is none, because one may have been starting
        // another. A zombie has no command line any more.
        while begun.elapsed() < LIMIT {
            let processes = self.processes();
            if processes.is_empty() {
                return;
            }
            for pid in processes {
                let _ = kill_process(pid, Signal::KILL);
            }
            sleep(Duration::from_millis(20));
        }
        eprintln!("{}: shims do not end", self.namespace);
    }

    /// The socket of a killed shim is in a directory of all containerds.
    fn remove_shim_sockets(&self) {
        let bundles = format!("state/io.containerd.runtime.v2.task/{}", self.namespace);
        let bundles = fs::read_dir(self.path(&bundles)).into_iter().flatten();
        for bundle in bundles.flatten() {
            let address = fs::read_to_string(bundle.path().join("address")).unwrap_or_default();
            if let Some(socket) = address.trim().strip_prefix("unix://") {
                let _ = fs::remove_file(socket);
            }
        }
    }

    fn unmount_all(&self) {
        let text = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let targets = text.lines().filter_map(|line| line.split(' ').nth(4));
        let ours: Vec<_> = targets
            .filter(|at| Path::new(at).starts_with(self.dir.path()))
            .collect();
        for target in ours.into_iter().rev() {
            let _ = unmount(target, UnmountFlags::DETACH);
        }
    }

    /// runc leaves the namespace's cgroup, and in it those of killed
    /// containers. With cgroups v1, there is one in each hierarchy.
    fn remove_cgroups(&self) {
        let base = Path::new("/sys/fs/cgroup");
        let hierarchies = fs::read_dir(base).into_iter().flatten().flatten();
        let tops = hierarchies
            .map(|entry| entry.path())
            .chain([base.to_owned()]);
        for top in tops.map(|top| top.join(&self.namespace)) {
            for container in fs::read_dir(&top).into_iter().flatten().flatten() {
                let begun = Instant::now();
                // The cgroup of a killed process can be removed a little later.
                while container.path().is_dir()
                    && fs::remove_dir(container.path()).is_err()
                    && begun.elapsed() < Duration::from_secs(5)
                {
                    sleep(Duration::from_millis(20));
                }
            }
            let _ = fs::remove_dir(top);
        }
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        self.kill_processes();
        self.remove_shim_sockets();
        self.unmount_all();
        self.remove_cgroups();
        if std::thread::panicking() {
            let log = fs::read_to_string(self.path("log")).unwrap_or_default();
            let told = log.lines().filter(|line| !line.contains("level=info"));
            eprintln!("--- containerd's warnings and errors");
            told.for_each(|line| eprintln!("{line}"));
            eprintln!("---");
        }
    }
}

fn spawn(dir: &Path) -> Child {
    let log = File::options()
        .append(true)
        .create(true)
        .open(dir.join("log"))
        .unwrap();
    Command::new("containerd")
        .arg("--config")
        .arg(dir.join("config.toml"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .unwrap_or_else(|error| panic!("containerd: {error}"))
}

/// Parses a command `mount -t overlay overlay <target> -o <options>`.
fn parse_overlay(text: &str) -> Overlay {
    let options = text
        .trim()
        .strip_prefix("mount -t overlay overlay ")
        .and_then(|rest| rest.split_once(" -o "))
        .unwrap_or_else(|| panic!("not an overlay: {text}"))
        .1;
    let value = |name: &str| {
        options
            .split(',')
            .find_map(|option| option.strip_prefix(name))
    };
    Overlay {
        upper: value("upperdir=").map(PathBuf::from),
        lowers: value("lowerdir=")
            .into_iter()
            .flat_map(|lowers| lowers.split(':'))
            .map(PathBuf::from)
            .collect(),
    }
}
