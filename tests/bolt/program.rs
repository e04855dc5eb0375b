//! The Go program beside this file: bbolt databases from containerd's own
//! package, and what that package finds in them.

// Each test binary uses only a part of it.
#![allow(dead_code)]

use std::fs;
use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;

use serde_json::{Value, json};

/// The directory of Go sources from Debian's packages.
const SOURCES: &str = "/usr/share/gocode";

/// Whether the program can be built here. With `CI` set, it has to be.
pub fn is_available() -> bool {
    let package = Path::new(SOURCES).join("src/github.com/containerd/containerd/snapshots/storage");
    let has_go = Command::new("go").arg("version").output().is_ok();
    if has_go && package.exists() {
        return true;
    }
    assert!(
        std::env::var_os("CI").is_none(),
        "golang-go and golang-github-containerd-containerd-dev have to be installed"
    );
    eprintln!("left out: needs golang-go and golang-github-containerd-containerd-dev");
    false
}

/// The program, built at the first use.
fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let target = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let path = tempfile::tempdir_in(target).unwrap();
        let within = path.path().join("src");
        fs::create_dir(&within).unwrap();
        let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/bolt");
        symlink(sources, within.join("bolt")).unwrap();
        let program = target.join("bolt");
        let output = Command::new("go")
            .args(["build", "-o"])
            .arg(&program)
            .arg(".")
            .current_dir(within.join("bolt"))
            // PWD has to be set, because Go finds its path by it.
            .env("PWD", within.join("bolt"))
            .env("GO111MODULE", "off")
            .env("GOFLAGS", "")
            .env("GOPATH", format!("{}:{SOURCES}", path.path().display()))
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        program
    })
}

fn start(path: &Path, steps: &[Value], flags: &[&str]) -> Child {
    let mut child = Command::new(program())
        .args(flags)
        .arg(path)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = child.stdin.take().unwrap();
    for step in steps {
        writeln!(input, "{step}").unwrap();
    }
    child
}

/// Takes these steps in a database, which is created if it is missing, and
/// returns what containerd's package then finds in it.
pub fn write(path: &Path, steps: &[Value], flags: &[&str]) -> Value {
    let output = start(path, steps, flags).wait_with_output().unwrap();
    assert!(output.status.success(), "{}", output.status);
    serde_json::from_slice(&output.stdout).unwrap()
}

/// A Go program that has a database open. It ends when dropped.
pub struct Holder(Child);

/// Opens a database, as the running Go snapshotter does.
pub fn hold(path: &Path) -> Holder {
    let mut child = start(path, &[], &["-hold"]);
    let mut first = [0];
    std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut first).unwrap();
    Holder(child)
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A step that prepares an active snapshot.
pub fn prepare(key: &str, parent: &str, labels: Value) -> Value {
    json!({"do": "prepare", "key": key, "parent": parent, "labels": labels})
}

/// A step that makes a view.
pub fn view(key: &str, parent: &str) -> Value {
    json!({"do": "view", "key": key, "parent": parent})
}

/// A step that commits an active snapshot.
pub fn commit(key: &str, name: &str, size: u64, inodes: u64, labels: Value) -> Value {
    json!({"do": "commit", "key": key, "name": name, "size": size, "inodes": inodes,
        "labels": labels})
}

/// A step that replaces labels.
pub fn update(key: &str, labels: Value) -> Value {
    json!({"do": "update", "key": key, "labels": labels})
}

/// A step that removes a snapshot.
pub fn remove(key: &str) -> Value {
    json!({"do": "remove", "key": key})
}
