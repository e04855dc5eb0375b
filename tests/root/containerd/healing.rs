//! Layers that a disk has damaged are healed from containerd's content, and the
//! containers on them keep what they wrote.

mod beside;
mod damages;
mod digests;
mod failures;
mod hostile;
mod repair;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use registered::registered;
use rustix::mount::{UnmountFlags, mount_bind, unmount};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::check::check;
use crate::support::containerd::{AtEnd, Containerd, IMAGE, wait_for};
use crate::support::daemon::{BINARY, Split};
use crate::support::{run, tree, unchanged, until};
use damages::{DAMAGES, payload};

/// An image with a stopped container that has written something, and a stopped daemon.
struct Stage {
    split: Split,
    containerd: Containerd,
    /// The directories `fs` of the image's layers, the first one first.
    layers: Vec<PathBuf>,
}

impl Stage {
    fn begin() -> Stage {
        let mut split = Split::start(&[]);
        // Numbers that no other root on the machine has: the kernel shows some mounts without
        // the root that they are of.
        split.client().prepare("first", "", &[]).unwrap();
        split.client().remove("first").unwrap();
        split.daemon.stop();
        split.skip_ids_through(20_000 + 100 * (std::process::id() % 100));
        split.daemon.restart();
        let containerd = Containerd::start(split.daemon.address());
        containerd.import();
        containerd.start_container("web", "echo own >/own; echo changed >/etc/hostname");
        // The script may not have begun when `start` returns.
        wait_for("file of the container", || {
            containerd.try_exec("web", "grep own /own && grep changed /etc/hostname")
        });
        let lowers = containerd.overlay("web").lowers;
        containerd.stop("web");
        split.daemon.stop();
        Stage {
            split,
            containerd,
            layers: lowers.into_iter().rev().collect(),
        }
    }

    fn check(&self, flags: &[&str]) -> (i32, String, String) {
        let address = self.containerd.address();
        let flags = [flags, &["--containerd-address", &address]].concat();
        check(&self.split, &flags)
    }

    fn command(&self, flags: &[&str]) -> Command {
        let mut command = Command::new(BINARY);
        command.arg("check").args(self.split.daemon.arguments());
        command.args(flags).arg("--containerd-address");
        command.arg(self.containerd.address());
        command
    }

    /// Replaces the image by the same one with compressed layers, which are not unpacked.
    fn import_compressed(&self) {
        let dir = tempfile::tempdir().unwrap();
        let archive = dir.path().join("compressed.tar");
        let archive = archive.to_str().unwrap();
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/make-image.sh");
        let mut make = Command::new("sh");
        make.args([script, archive, IMAGE]).env("GZIP_LAYERS", "1");
        run(&mut make);
        self.containerd.ctr(&["images", "rm", IMAGE]);
        let import = ["images", "import", "--no-unpack", archive];
        self.containerd.ctr(&import);
    }

    fn begin_deep_check(&self) -> Child {
        let mut check = self.command(&["--deep"]);
        let check = check.stdout(Stdio::null()).stderr(Stdio::null());
        check.spawn().unwrap()
    }

    #[track_caller]
    fn is_sound(&self) {
        let (code, said, complaint) = self.check(&["--deep"]);
        assert_eq!(code, 0, "{said}{complaint}");
        assert!(said.contains("5 layers compared"), "{said}");
        assert!(said.contains("5 of them sound"), "{said}");
        until("end of the damaged directories", || {
            let left = self.left_of_checks();
            if !left.is_empty() && !said.contains("daemon running") {
                self.check(&["--heal"]);
            }
            left.is_empty()
        });
    }

    /// Nothing is left of a check in `snapshots/`, but for damaged directories: those stay
    /// while an overlay whose paths cannot be followed may have them mounted, as other tests
    /// have them.
    #[track_caller]
    fn is_tidy(&self) {
        let mut others = self.left_of_checks();
        others.retain(|name| !name.starts_with(".replaced-"));
        assert!(others.is_empty(), "{others:?}");
    }

    fn left_of_checks(&self) -> Vec<String> {
        let entries = fs::read_dir(self.split.root().join("snapshots")).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.starts_with('.')).collect()
    }

    fn start_web(&mut self) {
        self.split.daemon.restart();
        // containerd reconnects within a moment.
        wait_for("answer of the daemon", || {
            self.containerd.try_ctr(&["snapshot", "ls"])
        });
        let start = ["task", "start", "--detach", "--null-io", "web"];
        self.containerd.ctr(&start);
    }

    /// Starts the container again: it sees the right files, and its own are
    /// there.
    #[track_caller]
    fn web_is_whole(&mut self) {
        self.start_web();
        let seen = self.containerd.exec(
            "web",
            "cat /own /etc/hostname /etc/motd; cat /opt/tool/second; ls /opt/app
             ls -d /etc/obsolete.conf /srv/old 2>/dev/null | wc -l",
        );
        assert!(
            seen.starts_with("own\nchanged\nmotd of layer 5\n#!/bin/sh\n"),
            "{seen}"
        );
        assert!(seen.contains("only.txt\n0\n"), "{seen}");
        self.containerd.stop("web");
        self.split.daemon.stop();
    }
}

#[registered(crate::Test)]
fn every_kind_of_damage_heals() {
    let mut stage = Stage::begin();
    stage.is_sound();
    for (what, number, damage, word) in DAMAGES {
        let top = &stage.layers[number - 1];
        let before = tree(top);
        damage(top);
        let is_there = top.parent().unwrap().is_dir();
        let damaged = is_there.then(|| tree(top.parent().unwrap()));
        let (code, said, complaint) = stage.check(&["--deep"]);
        assert_eq!(code, 1, "{what}: {said}{complaint}");
        assert!(said.contains(word), "{what}: {word}: {said}");
        if let Some(damaged) = damaged {
            unchanged(top.parent().unwrap(), &damaged);
        }
        stage.is_tidy();

        let (code, said, complaint) = stage.check(&["--heal"]);
        assert_eq!(code, 0, "{what}: {said}{complaint}");
        assert!(said.contains("healed layer"), "{what}: {said}");

        unchanged(top, &before);
        stage.is_sound();
    }
    stage.web_is_whole();
}

/// All layers of an image at once. They heal from the first one to the last, here from
/// compressed content.
#[registered(crate::Test)]
fn all_layers_heal_at_once() {
    let mut stage = Stage::begin();
    stage.import_compressed();
    for top in &stage.layers {
        fs::remove_dir_all(top.parent().unwrap()).unwrap();
    }
    let (code, said, _) = stage.check(&["--deep", "--json"]);
    assert_eq!(code, 1, "{said}");
    let report: Value = serde_json::from_str(&said).unwrap();
    assert_eq!(report["findings"].as_array().unwrap().len(), 5, "{said}");
    assert_eq!(report["deep"]["compared"], 5);
    let (code, said, complaint) = stage.check(&["--heal", "--json"]);
    assert_eq!(code, 0, "{said}{complaint}");
    let report: Value = serde_json::from_str(&said).unwrap();
    assert_eq!(report["deep"]["healed"].as_array().unwrap().len(), 5);
    stage.is_sound();
    stage.web_is_whole();
}

#[registered(crate::Test)]
fn what_has_no_content_is_named() {
    let stage = Stage::begin();
    let (top, names) = (&stage.layers[1], blobs(&stage));
    payload(top).write_all_at(b"?", 5).unwrap();
    // containerd has lost the content of layer 2, and a disk has changed that of layer
    // 5.
    stage.containerd.ctr(&["content", "rm", &names[1]]);
    let blob = stage.containerd.blob(&names[4]);
    let sound = fs::read(&blob).unwrap();
    let mut changed = sound.clone();
    let at = changed
        .windows(5)
        .position(|part| part == b"motd ")
        .unwrap();
    changed[at] = b'M';
    fs::write(&blob, changed).unwrap();
    fs::write(stage.layers[4].join("etc/motd"), "").unwrap();
    let before = tree(stage.split.root().join("snapshots"));

    let (code, said, complaint) = stage.check(&["--heal"]);
    assert_eq!(code, 1, "the layer is shorter: {said}{complaint}");
    for words in [
        "has not kept the content",
        "content fetch docker.io/library/split-test:latest",
        "is damaged: its digest after unpacking is",
        "content rm sha256:",
        "3 layers compared",
    ] {
        assert!(said.contains(words), "{words}: {said}");
    }
    unchanged(stage.split.root().join("snapshots"), &before);
    stage.is_tidy();

    // Without containerd, or without the layer's image.
    let (code, _, complaint) = check(&stage.split, &["--deep", "--containerd-address", "/none"]);
    assert_eq!(code, 2);
    assert!(
        complaint.contains("check that containerd is running"),
        "{complaint}"
    );
    fs::write(&blob, sound).unwrap();
    stage.containerd.ctr(&["images", "rm", IMAGE]);
    let (code, said, _) = stage.check(&["--heal"]);
    assert_eq!(code, 1, "{said}");
    assert!(
        said.contains("no image in containerd's namespace"),
        "{said}"
    );
    unchanged(stage.split.root().join("snapshots"), &before);
}

/// The names of the image's layers, the first one first.
fn layer_names(stage: &Stage) -> Vec<String> {
    let id = |top: &PathBuf| {
        let name = top.parent().unwrap().file_name().unwrap();
        name.to_str().unwrap().to_owned()
    };
    let database = rusqlite::Connection::open(stage.split.root().join("metadata.db")).unwrap();
    let name_of = |top: &PathBuf| {
        let query = "SELECT name FROM snapshot WHERE id = ?1";
        database
            .query_row(query, [id(top)], |row| row.get(0))
            .unwrap()
    };
    stage.layers.iter().map(name_of).collect()
}

/// The digests of the image's layers in containerd's content.
fn blobs(stage: &Stage) -> Vec<String> {
    let json = |digest: &str| -> Value {
        let text = stage.containerd.ctr(&["content", "get", digest]);
        serde_json::from_str(&text).unwrap()
    };
    let images = stage.containerd.ctr(&["images", "ls"]);
    let target = images
        .split_whitespace()
        .find(|word| word.starts_with("sha256:"));
    let mut document = json(target.unwrap());
    if let Some(manifest) = document["manifests"][0]["digest"].as_str() {
        document = json(manifest);
    }
    let layers = document["layers"].as_array().unwrap().iter();
    layers
        .map(|layer| layer["digest"].as_str().unwrap().to_owned())
        .collect()
}

/// A running container goes on with its files, and sees the healed ones after its next
/// start.
#[registered(crate::Test)]
fn a_running_container_goes_on() {
    let mut stage = Stage::begin();
    stage.start_web();
    stage.split.daemon.stop();
    let top = stage.layers[4].clone();
    fs::write(top.join("etc/motd"), "damaged").unwrap();
    let (code, said, complaint) = stage.check(&["--heal"]);
    assert_eq!(code, 0, "{said}{complaint}");
    assert!(
        said.contains("/web\" is mounted with the damaged files"),
        "{said}"
    );
    assert_eq!(
        fs::read_to_string(top.join("etc/motd")).unwrap(),
        "motd of layer 5\n"
    );
    let seen = "cat /etc/motd; cat /opt/tool/first /own";
    let (found, right) = ("damaged#!/bin/sh", "motd of layer 5\n#!/bin/sh");
    assert!(stage.containerd.exec("web", seen).starts_with(found));
    // Neither a start nor another healing deletes the damaged directory.
    stage.split.daemon.restart();
    assert!(stage.containerd.exec("web", seen).starts_with(found));
    stage.split.daemon.stop();
    fs::write(top.join("etc/motd"), "again").unwrap();
    let (code, said, _) = stage.check(&["--heal"]);
    assert_eq!(code, 1, "{said}");
    assert!(said.contains("still mounted: restart"), "{said}");
    stage.containerd.stop("web");
    let (code, said, complaint) = stage.check(&["--heal"]);
    assert_eq!(code, 0, "{said}{complaint}");
    stage.is_sound();
    stage.start_web();
    assert!(stage.containerd.exec("web", seen).starts_with(right));
    stage.containerd.stop("web");
    stage.split.daemon.stop();
    stage.web_is_whole();
}

/// A view may be a bind mount, whose directory has another name after the
/// healing.
#[registered(crate::Test)]
fn a_mounted_view_goes_on() {
    let stage = Stage::begin();
    let top = &stage.layers[1];
    let view = tempfile::tempdir().unwrap();
    mount_bind(top, view.path()).unwrap();
    let _unmount = AtEnd(|| unmount(view.path(), UnmountFlags::DETACH).unwrap());
    payload(top).write_all_at(b"?", 5).unwrap();
    let before = tree(view.path());
    for expected in [0, 1] {
        let (code, said, complaint) = stage.check(&["--heal"]);
        assert_eq!(code, expected, "{said}{complaint}");
        unchanged(view.path(), &before);
        payload(top).write_all_at(b"?", 5).unwrap();
    }
}

/// Whenever the command is killed, the layer is healed or as it was, and the next start
/// tidies up.
#[registered(crate::Test)]
fn a_kill_leaves_the_old_or_the_new_layer() {
    let mut stage = Stage::begin();
    let top = stage.layers[1].clone();
    let whole = tree(&top);
    for step in [
        "unpacked",
        "handed-over",
        "durable",
        "exchanged",
        "recorded",
    ] {
        payload(&top).write_all_at(b"?", 5).unwrap();
        let damaged = tree(&top);
        let mut heal = stage.command(&["--heal"]);
        let output = heal
            .env("SNAPSHOTTER_FAULT", format!("heal-{step}"))
            .output()
            .unwrap();
        assert_eq!(output.status.code(), None, "{step}: {output:?}");
        let is_new = matches!(step, "exchanged" | "recorded");
        unchanged(&top, if is_new { &whole } else { &damaged });
        stage.split.daemon.restart();
        stage.split.daemon.stop();
        stage.is_tidy();
        unchanged(&top, if is_new { &whole } else { &damaged });
        let (code, said, complaint) = stage.check(&["--heal"]);
        assert_eq!(code, 0, "{step}: {said}{complaint}");
        unchanged(&top, &whole);
    }
    stage.is_sound();
    stage.web_is_whole();
}

/// One check at a time.
#[registered(crate::Test)]
fn a_check_works_beside_the_daemon_and_alone() {
    let mut stage = Stage::begin();
    stage.split.daemon.restart();
    stage.is_sound();
    let scratch = stage.split.root().join("snapshots/.unpacked");
    fs::create_dir(&scratch).unwrap();
    let lock = File::open(&scratch).unwrap();
    lock.lock().unwrap();
    let (code, _, complaint) = stage.check(&["--deep"]);
    assert_eq!(code, 2);
    assert!(complaint.contains("another `check --deep`"), "{complaint}");
    // A start leaves a locked directory alone, and drops one that is not
    // locked.
    fs::write(scratch.join("file"), "").unwrap();
    stage.split.daemon.kill();
    stage.split.daemon.restart();
    assert!(scratch.join("file").exists());
    drop(lock);
    stage.split.daemon.kill();
    stage.split.daemon.restart();
    stage.is_tidy();
    stage.is_sound();
}

#[registered(crate::Test)]
fn an_interrupted_check_leaves_no_trace() {
    let mut stage = Stage::begin();
    payload(&stage.layers[1]).write_all_at(b"?", 5).unwrap();
    let before = tree(stage.split.root().join("snapshots"));
    let (mut interrupted, mut ended) = (0, 0);
    for round in 0..30 {
        let mut check = stage.begin_deep_check();
        std::thread::sleep(Duration::from_millis(4 * round));
        let pid = Pid::from_child(&check);
        kill_process(pid, Signal::INT).unwrap();
        match check.wait().unwrap().code() {
            // The signal may have come before the command was ready for it.
            Some(2) | None => interrupted += 1,
            Some(1) => ended += 1,
            other => panic!("{other:?}"),
        }
        stage.is_tidy();
    }
    unchanged(stage.split.root().join("snapshots"), &before);
    assert!(interrupted > 0, "{ended}");
    // The next check, or the next start, tidies up after SIGKILL, which cannot
    // be caught.
    for round in 0..20 {
        let mut check = stage.begin_deep_check();
        std::thread::sleep(Duration::from_millis(6 * round));
        check.kill().unwrap();
        check.wait().unwrap();
    }
    stage.split.daemon.restart();
    stage.split.daemon.stop();
    stage.is_tidy();
    let (code, said, complaint) = stage.check(&["--heal"]);
    assert_eq!(code, 0, "{said}{complaint}");
    stage.web_is_whole();
}

#[registered(crate::Test)]
fn a_full_disk_leaves_all_as_it_was() {
    let stage = Stage::begin();
    payload(&stage.layers[1]).set_len(1000).unwrap();
    let before = tree(stage.split.root().join("snapshots"));
    stage.split.image.fill();
    let (code, said, complaint) = stage.check(&["--heal"]);
    assert_ne!(code, 0, "{said}{complaint}");
    // Room for the smaller layers only.
    let filler = stage.split.image.path().join("filler");
    let filler = File::options().write(true).open(filler).unwrap();
    let length = filler.metadata().unwrap().len();
    filler.set_len(length - (400 << 10)).unwrap();
    stage.split.image.sync();
    let (code, said, complaint) = stage.check(&["--heal"]);
    assert_eq!(code, 1, "{said}{complaint}");
    assert!(said.contains("no space left on device"), "{said}");
    assert!(said.contains("a layer below this one could not"), "{said}");
    assert!(!said.contains("content rm"), "{said}");
    unchanged(stage.split.root().join("snapshots"), &before);
}

/// An unmoved layer heals onto the image volume.
#[registered(crate::Test)]
fn an_unmoved_layer_heals() {
    let mut stage = Stage::begin();
    let top = stage.layers[4].clone();
    let (whole, home) = (tree(&top), top.parent().unwrap().to_owned());
    let away = stage.split.writable().join("snapshots");
    let away = away.join(home.file_name().unwrap());
    run(Command::new("cp").arg("-a").arg(&home).arg(&away));
    fs::remove_dir_all(&home).unwrap();
    std::os::unix::fs::symlink(&away, &home).unwrap();
    let database = rusqlite::Connection::open(stage.split.root().join("metadata.db")).unwrap();
    let id = home.file_name().unwrap().to_str().unwrap();
    let changed = database.execute("UPDATE snapshot SET volume = 1 WHERE id = ?1", [id]);
    assert_eq!(changed.unwrap(), 1);
    drop(database);
    stage.is_sound();

    fs::write(away.join("fs/etc/motd"), "damaged").unwrap();
    let (code, said, complaint) = stage.check(&["--deep"]);
    assert_eq!(code, 1, "{said}{complaint}");
    let (code, said, complaint) = stage.check(&["--heal"]);
    assert_eq!(code, 0, "{said}{complaint}");
    assert!(!home.is_symlink());
    unchanged(&top, &whole);
    stage.is_sound();
    stage.web_is_whole();
    stage.is_sound();
}
