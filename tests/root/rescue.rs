//! The commands `mount` and `umount`.

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use grpcio::RpcStatusCode;
use registered::registered;
use rustix::fs::{FlockOperation, StatVfsMountFlags, flock};
use rustix::mount::{UnmountFlags, unmount};
use tempfile::TempDir;

use crate::content::layer;
use crate::support::daemon::{BINARY, Daemon, Split, is_empty};
use crate::support::disk::{Disk, subdirectory};
use crate::support::mounted::{Mounted, upper_of};
use crate::support::{tree, unchanged, until};

/// The target directory of a command, unmounted at the end in any case.
pub struct Target(TempDir);

impl Target {
    pub fn new() -> Target {
        Target(tempfile::tempdir().unwrap())
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    fn text(&self) -> &str {
        self.path().to_str().unwrap()
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        let _ = unmount(self.path(), UnmountFlags::DETACH);
    }
}

fn command(daemon: &Daemon, words: &[&str]) -> Output {
    Command::new(BINARY)
        .args(words)
        .args(daemon.arguments())
        .output()
        .unwrap()
}

fn done(daemon: &Daemon, words: &[&str]) -> String {
    let output = command(daemon, words);
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{words:?}: {complaint}");
    String::from_utf8(output.stdout).unwrap()
}

/// The error of a refused command.
fn refused(daemon: &Daemon, words: &[&str]) -> String {
    let output = command(daemon, words);
    assert_eq!(output.status.code(), Some(1), "{words:?}");
    assert!(output.stdout.is_empty(), "{output:?}");
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(text.lines().count(), 1, "{text}");
    text
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Makes two layers, and on them an active snapshot and a view.
fn fill(split: &Split) {
    let client = split.client();
    layer(&client, "base", "", |top| {
        fs::write(top.join("file"), "base").unwrap();
        fs::write(top.join("deleted"), "base").unwrap();
    });
    layer(&client, "top", "base", |top| {
        fs::write(top.join("file"), "top").unwrap();
        fs::remove_file(top.join("deleted")).unwrap();
    });
    let mounts = client.prepare("default/7/web", "top", &[]).unwrap();
    let mounted = Mounted::new(&mounts);
    fs::write(mounted.path().join("own"), "written").unwrap();
    client.view("default/8/view", "top", &[]).unwrap();
}

#[registered(crate::Test)]
fn every_kind_is_mounted_as_it_allows() {
    let mut split = Split::start(&[]);
    fill(&split);
    let client = split.client();
    client.view("default/9/lowest", "base", &[]).unwrap();
    client.prepare("default/10/alone", "", &[]).unwrap();
    for is_running in [true, false] {
        if !is_running {
            split.daemon.stop();
        }
        let target = Target::new();
        let at = |name: &str| target.path().join(name);

        let said = done(&split.daemon, &["mount", "web", target.text()]);
        assert!(said.contains("\"default/7/web\""), "{said}");
        assert_eq!(read(&at("file")), "top");
        assert_eq!(read(&at("own")), "written");
        assert!(!at("deleted").exists());
        let name = format!("rescued-{is_running}");
        fs::write(at(&name), "rescued").unwrap();
        done(&split.daemon, &["umount", target.text()]);
        assert!(!at("file").exists(), "it is still mounted");
        let upper = split.writable().join("snapshots/3/fs");
        assert_eq!(read(&upper.join(&name)), "rescued");

        // Without parent.
        done(&split.daemon, &["mount", "alone", target.text()]);
        fs::write(at("first"), "x").unwrap();
        done(&split.daemon, &["umount", target.text()]);

        // A view, a layer in the middle of a chain, and one at its end.
        for (key, content, is_deleted) in [
            ("view", "top", true),
            ("lowest", "base", false),
            ("top", "top", true),
            ("base", "base", false),
        ] {
            let said = done(&split.daemon, &["mount", key, target.text()]);
            assert!(said.contains("read-only"), "{key}: {said}");
            assert_eq!(read(&at("file")), content, "{key}");
            assert_eq!(at("deleted").exists(), !is_deleted, "{key}");
            let written = fs::write(at("new"), "x").unwrap_err();
            assert_eq!(
                written.kind(),
                std::io::ErrorKind::ReadOnlyFilesystem,
                "{key}"
            );
            done(&split.daemon, &["umount", target.text()]);
        }
    }
}

#[registered(crate::Test)]
fn what_is_mounted_already_is_only_looked_at() {
    let split = Split::start(&[]);
    fill(&split);
    let container = Mounted::new(&split.client().mounts("default/7/web").unwrap());
    let target = Target::new();
    let said = refused(&split.daemon, &["mount", "web", target.text()]);
    assert!(
        said.contains("mounted already") && said.contains("--read-only"),
        "{said}"
    );
    done(
        &split.daemon,
        &["mount", "--read-only", "web", target.text()],
    );
    assert_eq!(read(&target.path().join("own")), "written");
    assert!(fs::write(target.path().join("own"), "x").is_err());
    assert_eq!(read(&container.path().join("own")), "written");
    done(&split.daemon, &["umount", target.text()]);
    drop(container);
    // A mount by hand prevents a second one.
    done(&split.daemon, &["mount", "web", target.text()]);
    let second = Target::new();
    let said = refused(&split.daemon, &["mount", "web", second.text()]);
    assert!(said.contains("mounted already"), "{said}");
}

/// What a person has mounted to write to it stays whole, also if its row goes.
#[registered(crate::Test)]
fn the_files_of_a_removed_one_stay_until_they_are_unmounted() {
    let split = Split::start(&[]);
    fill(&split);
    let client = split.client();
    let target = Target::new();
    done(&split.daemon, &["mount", "web", target.text()]);
    client.remove("default/7/web").unwrap();
    let (code, said) = client.cleanup().unwrap_err();
    assert_eq!(code, RpcStatusCode::FAILED_PRECONDITION, "{said}");
    assert!(said.contains("mounted by hand at"), "{said}");
    assert_eq!(read(&target.path().join("own")), "written");
    fs::write(target.path().join("more"), "x").unwrap();
    done(&split.daemon, &["umount", target.text()]);
    client.cleanup().unwrap();
    assert!(is_empty(split.writable().join("trash")));
    assert!(is_empty(split.writable().join("snapshots")));
}

/// Removed at the worst moment: the command has found the snapshot, and not mounted it yet.
#[registered(crate::Test)]
fn one_that_is_removed_before_it_is_mounted() {
    let split = Split::start(&[]);
    fill(&split);
    let client = split.client();
    let target = Target::new();
    // As another command that is about to mount it.
    let marks = split.root().join("mounted");
    fs::create_dir_all(&marks).unwrap();
    let mark = fs::File::create(marks.join("3")).unwrap();
    flock(&mark, FlockOperation::NonBlockingLockExclusive).unwrap();
    let (code, said) = client.mounts("default/7/web").unwrap_err();
    assert_eq!(code, RpcStatusCode::UNAVAILABLE, "{said}");
    let waiting = Command::new(BINARY)
        .args(["mount", "web", target.text()])
        .args(split.daemon.arguments())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A process that waits for a lock is listed with an arrow (proc_locks(5)).
    let waits = format!(" {} ", waiting.id());
    until("the command waits for the mark", || {
        let locks = read(Path::new("/proc/locks"));
        let mut lines = locks.lines().filter(|line| line.contains("->"));
        lines.any(|line| line.contains(&waits))
    });
    client.remove("default/7/web").unwrap();
    drop(mark);
    let output = waiting.wait_with_output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("was removed meanwhile"), "{said}");
    assert!(is_empty(target.path()), "it is still mounted");
    client.cleanup().unwrap();
    assert!(is_empty(split.writable().join("trash")));
    assert!(is_empty(split.writable().join("snapshots")));
    assert!(is_empty(&marks));
}

#[registered(crate::Test)]
fn a_name_is_a_key_or_its_end() {
    let split = Split::start(&[]);
    let client = split.client();
    for key in ["default/1/web", "k8s.io/2/web", "web2", "odd \"key\"/\n"] {
        client.prepare(key, "", &[]).unwrap();
    }
    let target = Target::new();
    let said = refused(&split.daemon, &["mount", "web", target.text()]);
    for words in ["2 snapshots", "\"default/1/web\"", "\"k8s.io/2/web\""] {
        assert!(said.contains(words), "{said}");
    }
    for unknown in ["we", "eb2", "", "default/1", "nothing"] {
        let said = refused(&split.daemon, &["mount", unknown, target.text()]);
        assert!(said.contains("no snapshot's key is"), "{unknown:?}: {said}");
    }
    for known in ["k8s.io/2/web", "2/web", "web2", "odd \"key\"/\n"] {
        done(&split.daemon, &["mount", known, target.text()]);
        done(&split.daemon, &["umount", target.text()]);
    }
    for (words, expected) in [
        (&["mount"][..], "two words"),
        (&["mount", "web"][..], "two words"),
        (&["mount", "a", "b", "c"][..], "two words"),
        (&["umount"][..], "one word"),
        (&["umount", "a", "b"][..], "one word"),
        (
            &["status", "--read-only"][..],
            "works only with the command \"mount\"",
        ),
    ] {
        let said = refused(&split.daemon, words);
        assert!(said.contains(expected), "{words:?}: {said}");
    }
}

#[registered(crate::Test)]
fn directories_that_will_not_do_are_refused() {
    let split = Split::start(&[]);
    fill(&split);
    let outside = tempfile::tempdir().unwrap();
    let file = outside.path().join("file");
    fs::write(&file, "x").unwrap();
    let inside = split.root().join("mine");
    fs::create_dir(&inside).unwrap();
    let link = outside.path().join("link");
    std::os::unix::fs::symlink(&inside, &link).unwrap();
    let beside = split.writable().join("mine");
    fs::create_dir(&beside).unwrap();
    let before = tree(outside.path());
    for (directory, expected) in [
        (outside.path().to_owned(), "is not empty"),
        (file, "open the directory"),
        (outside.path().join("missing"), "open the directory"),
        (inside, "where snapshots are kept"),
        (link, "where snapshots are kept"),
        (beside, "where snapshots are kept"),
    ] {
        let said = refused(
            &split.daemon,
            &["mount", "web", directory.to_str().unwrap()],
        );
        assert!(said.contains(expected), "{}: {said}", directory.display());
    }
    unchanged(outside.path(), &before);
}

#[registered(crate::Test)]
fn only_its_own_mounts_are_unmounted() {
    let split = Split::start(&[]);
    fill(&split);
    let container = Mounted::new(&split.client().mounts("default/7/web").unwrap());
    let empty = Target::new();
    for other in [
        container.path(),
        split.image.path(),
        empty.path().to_owned(),
    ] {
        let said = refused(&split.daemon, &["umount", other.to_str().unwrap()]);
        assert!(said.contains("no snapshot was mounted there"), "{said}");
    }
    assert_eq!(read(&container.path().join("own")), "written");

    done(&split.daemon, &["mount", "view", empty.text()]);
    let held = fs::File::open(empty.path().join("file")).unwrap();
    let said = refused(&split.daemon, &["umount", empty.text()]);
    assert!(said.contains("in use"), "{said}");
    drop(held);
    done(&split.daemon, &["umount", empty.text()]);
}

#[registered(crate::Test)]
fn four_hundred_layers_mount() {
    let mut split = Split::start(&["--sync", "none"]);
    split.restart_at_far_ids();
    let client = split.client();
    let mut parent = String::new();
    for number in 1..=400 {
        let name = format!("layer-{number}");
        layer(&client, &name, &parent, |top| {
            fs::write(top.join(format!("file-{number}")), "x").unwrap();
        });
        parent = name;
    }
    client.prepare("default/1/web", &parent, &[]).unwrap();
    let target = Target::new();
    done(&split.daemon, &["mount", "web", target.text()]);
    assert_eq!(fs::read_dir(target.path()).unwrap().count(), 400);
    fs::write(target.path().join("own"), "x").unwrap();
    done(&split.daemon, &["umount", target.text()]);
}

/// The options for older kernels, which are too long for fsconfig(2).
#[registered(crate::Test)]
fn long_paths_mount_in_one_string() {
    let (image, writable) = (Disk::ext4(64), Disk::ext4(64));
    let long = subdirectory(&writable.path(), &"w".repeat(240));
    let arguments = [
        "--root-dir",
        &subdirectory(&image.path(), "root"),
        "--writable-dir",
        &subdirectory(Path::new(&long), "writable"),
    ];
    let mut split = Split {
        daemon: Daemon::start(&arguments.map(str::to_owned)),
        image,
        writable,
    };
    split.restart_at_far_ids();
    let (client, daemon) = (split.client(), &split.daemon);
    let mut parent = String::new();
    for number in 1..=150 {
        let name = format!("layer-{number}");
        layer(&client, &name, &parent, |top| {
            fs::write(top.join(format!("file-{number}")), "x").unwrap();
        });
        parent = name;
    }
    let upper = upper_of(&client.prepare("web", &parent, &[]).unwrap());
    let target = Target::new();
    done(daemon, &["mount", "web", target.text()]);
    assert_eq!(fs::read_dir(target.path()).unwrap().count(), 150);
    fs::write(target.path().join("own"), "x").unwrap();
    let said = refused(daemon, &["mount", "web", Target::new().text()]);
    assert!(said.contains("mounted already"), "{said}");
    done(daemon, &["umount", target.text()]);
    assert_eq!(read(&upper.join("own")), "x");
}

#[registered(crate::Test)]
fn host_directories_are_left_out() {
    const LABEL: &str = "containerd.io/snapshot/overlay-custom-add-lower.paths";
    let host = tempfile::tempdir().unwrap();
    fs::write(host.path().join("cache"), "host").unwrap();
    let path = host.path().to_str().unwrap();
    let mut split = Split::start(&["--allow-lower", path]);
    let client = split.client();
    layer(&client, "base", "", |top| {
        fs::write(top.join("file"), "base").unwrap();
    });
    let mounts = client.prepare("web", "base", &[(LABEL, path)]).unwrap();
    let mounted = Mounted::new(&mounts);
    assert_eq!(read(&mounted.path().join("cache")), "host");
    fs::write(mounted.path().join("cache"), "changed").unwrap();
    drop(mounted);
    // The host directories need not exist, or be allowed.
    let arguments = split.daemon.arguments()[..4].to_vec();
    split.daemon.set_arguments(arguments);
    fs::remove_dir_all(host.path()).unwrap();
    let target = Target::new();
    let said = done(&split.daemon, &["mount", "web", target.text()]);
    assert!(said.contains("host directories"), "{said}");
    assert_eq!(read(&target.path().join("cache")), "changed");
    assert_eq!(read(&target.path().join("file")), "base");
    done(&split.daemon, &["umount", target.text()]);
    assert!(!host.path().exists(), "a look has made a directory");
}

#[registered(crate::Test)]
fn nobody_else_writes_meanwhile() {
    let mut split = Split::start(&[]);
    fill(&split);
    let client = split.client();
    let target = Target::new();
    done(&split.daemon, &["mount", "web", target.text()]);
    let (code, said) = client.mounts("default/7/web").unwrap_err();
    assert_eq!(code, RpcStatusCode::FAILED_PRECONDITION);
    assert!(said.contains(target.text()), "{said}");
    // Others are served.
    client.mounts("default/8/view").unwrap();
    split.daemon.kill();
    split.daemon.restart();
    client.mounts("default/7/web").unwrap_err();
    split.daemon.stop();
    let said = Command::new(BINARY)
        .args(["check", "--repair", "--yes"])
        .args(split.daemon.arguments())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&said.stderr);
    assert_eq!(said.status.code(), Some(2), "{text}");
    assert!(text.contains("is mounted by hand at"), "{text}");
    split.daemon.restart();
    done(&split.daemon, &["umount", target.text()]);
    let mounts = client.mounts("default/7/web").unwrap();
    let container = Mounted::new(&mounts);
    assert_eq!(read(&container.path().join("own")), "written");

    // The same disk by another name.
    let alias = tempfile::tempdir().unwrap();
    let link = alias.path().join("link");
    std::os::unix::fs::symlink(split.writable.path(), &link).unwrap();
    let mut arguments = split.daemon.arguments().to_vec();
    let writable = arguments.get_mut(3).unwrap();
    *writable = link.join("writable").to_str().unwrap().to_owned();
    let output = Command::new(BINARY)
        .args(["mount", "web", target.text()])
        .args(&arguments)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("is mounted already"), "{text}");
    drop(container);

    // A snapshot without parent is bound, not overlaid.
    let bound = Mounted::new(&client.prepare("alone", "", &[]).unwrap());
    let said = refused(&split.daemon, &["mount", "alone", target.text()]);
    assert!(said.contains("is mounted already"), "{said}");
    drop(bound);
    done(&split.daemon, &["mount", "alone", target.text()]);
}

#[registered(crate::Test)]
fn programs_and_devices_are_for_containers() {
    let split = Split::start(&[]);
    fill(&split);
    let target = Target::new();
    for key in ["web", "top"] {
        done(&split.daemon, &["mount", key, target.text()]);
        let flags = rustix::fs::statvfs(target.path()).unwrap().f_flag;
        let wanted = StatVfsMountFlags::NOSUID | StatVfsMountFlags::NODEV;
        assert!(flags.contains(wanted), "{key}: {flags:?}");
        done(&split.daemon, &["umount", target.text()]);
    }
}

#[registered(crate::Test)]
fn a_layer_that_is_looked_at_stays() {
    let split = Split::start(&["--relocate-after", "0"]);
    let client = split.client();
    let mounts = client.prepare("init", "", &[]).unwrap();
    // A small layer would wait for its containers.
    fs::write(upper_of(&mounts).join("large"), vec![1; 2 << 20]).unwrap();
    client.prepare("holder", "", &[]).unwrap();
    let home = split.root().join("snapshots/1");
    let target = Target::new();
    // The snapshot is recognised by its id, whatever its kind is by now.
    done(
        &split.daemon,
        &["mount", "--read-only", "init", target.text()],
    );
    client.commit("init", "layer", &[]).unwrap();
    std::thread::sleep(std::time::Duration::from_secs(2));
    assert!(home.is_symlink(), "it has moved");
    assert_eq!(
        fs::read(target.path().join("large")).unwrap().len(),
        2 << 20
    );
    done(&split.daemon, &["umount", target.text()]);
    client.remove("holder").unwrap();
    until("the layer is home", || !home.is_symlink() && home.is_dir());
}

#[registered(crate::Test)]
fn what_is_missing_is_named() {
    let mut split = Split::start(&[]);
    fill(&split);
    split.daemon.stop();
    let target = Target::new();
    fs::rename(
        split.root().join("snapshots/1"),
        split.root().join("snapshots/gone"),
    )
    .unwrap();
    let said = refused(&split.daemon, &["mount", "web", target.text()]);
    assert!(said.contains("snapshots/1/fs, which is missing"), "{said}");
    fs::rename(
        split.root().join("snapshots/gone"),
        split.root().join("snapshots/1"),
    )
    .unwrap();

    split.writable.unmount();
    let said = refused(&split.daemon, &["mount", "web", target.text()]);
    assert!(said.contains("writable"), "{said}");
    // Layers need no writable volume.
    done(&split.daemon, &["mount", "top", target.text()]);
    assert_eq!(read(&target.path().join("file")), "top");
    done(&split.daemon, &["umount", target.text()]);
    split.writable.mount();
    done(&split.daemon, &["mount", "web", target.text()]);
    done(&split.daemon, &["umount", target.text()]);
}
