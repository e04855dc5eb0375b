//! Imports that are refused, and leave everything as it was.

use std::fs;
use std::os::unix::net::UnixListener;
use std::process::Command;

use registered::registered;
use rustix::mount::{UnmountFlags, mount_bind, unmount};

use super::original::Original;
use super::{reads, sample, sample_works};
use crate::check::is_clean;
use crate::program;
use crate::support::daemon::is_empty;
use crate::support::disk::Disk;
use crate::support::mounted::Mounted;
use crate::support::run;

#[registered(crate::Test)]
fn what_is_refused() {
    let mut original = sample();
    original.is_refused(&[], &["no metadata.db of the Go original"]);
    original.is_refused(&["--undo"], &["nothing was imported"]);
    original.finish();
    let holder = program::hold(&original.database());
    original.is_refused(&[], &["in use", "stop the Go snapshotter"]);
    original.is_refused(&["--dry-run"], &["in use"]);
    drop(holder);
    let socket = original.root().join("grpc.socks");
    let listener = UnixListener::bind(&socket).unwrap();
    let (code, _, complaint) = original.import(&[]);
    assert_eq!(code, 2);
    assert!(complaint.contains("answers on"), "{complaint}");
    drop(listener);
    fs::remove_file(&socket).unwrap();

    let whole = fs::read(original.database()).unwrap();
    fs::write(original.database(), &whole[..whole.len() / 2]).unwrap();
    original.is_refused(&[], &["metadata.db", "damaged", "cut short"]);
    fs::write(original.database(), "some notes").unwrap();
    original.is_refused(&[], &["not a database of the Go original"]);
    fs::write(original.database(), &whole).unwrap();
    let kept = original.root().join("metadata.db.bbolt");
    fs::write(&kept, "older").unwrap();
    original.is_refused(&[], &["metadata.db.bbolt", "move it away"]);
    fs::remove_file(&kept).unwrap();
    // Another root's volume is noticed late, and all steps are undone.
    let mark = original.writable().join(".volume");
    fs::write(&mark, "0123456789abcdef0123456789abcdef\n").unwrap();
    original.is_refused(&[], &["of another root"]);
    fs::remove_file(&mark).unwrap();
    original.import_all();
    original.is_refused(&[], &["already"]);
    fs::rename(&kept, original.root().join("away")).unwrap();
    original.is_refused(&["--undo"], &["metadata.db.bbolt is not there"]);
    fs::rename(original.root().join("away"), &kept).unwrap();

    let mut split = original.serve();
    split.client().prepare("own", "", &[]).unwrap();
    let refused = |flags: &[&str]| {
        let output = Command::new(crate::support::daemon::BINARY)
            .arg("import")
            .args(split.daemon.arguments())
            .args(flags)
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(2));
        String::from_utf8(output.stderr).unwrap()
    };
    assert!(refused(&[]).contains("another snapshotter"));
    assert!(refused(&["--dry-run"]).contains("another snapshotter"));
    assert!(refused(&["--undo"]).contains("another snapshotter"));
    split.daemon.stop();

    // A database of this program that was never another's.
    let fresh = Original::new();
    let mut split = fresh.serve();
    split.daemon.stop();
    let fresh = Original::again(split);
    fresh.is_refused(&[], &["already"]);
    fresh.is_refused(
        &["--undo"],
        &["no database of the Go original to go back to"],
    );
    fs::write(fresh.root().join("metadata.db.bbolt"), &whole).unwrap();
    fresh.is_refused(&["--undo"], &["not created by an import"]);
}

#[registered(crate::Test)]
fn disks_that_are_not_there() {
    let mut original = sample();
    original.finish();
    let before = original.trees();
    original.writable.unmount();
    let (code, _, complaint) = original.import(&[]);
    assert_eq!(code, 2);
    for words in [
        "mount the writable volume's disk",
        "none of the 2 snapshots",
        "--writable-volatile",
    ] {
        assert!(complaint.contains(words), "{complaint}");
    }
    assert!(
        is_empty(original.writable.path()),
        "the mount point is bare"
    );
    // The original creates directories on a bare mount point.
    fs::create_dir_all(original.writable().join("snapshots")).unwrap();
    let (code, _, complaint) = original.import(&[]);
    assert_eq!(code, 2, "{complaint}");
    assert!(is_empty(original.writable().join("snapshots")));
    assert!(!original.writable().join(".volume").exists());
    fs::remove_dir_all(original.writable()).unwrap();
    original.writable.mount();
    original.is_as(&before);

    // A bare mount point in the place of `snapshots`.
    let (snapshots, away) = (
        original.root().join("snapshots"),
        original.root().join("away"),
    );
    fs::rename(&snapshots, &away).unwrap();
    fs::create_dir(&snapshots).unwrap();
    original.is_refused(
        &[],
        &["none of the 3 snapshots", "mount the image volume's disk"],
    );
    fs::remove_dir(&snapshots).unwrap();
    fs::rename(&away, &snapshots).unwrap();

    original.import_all();
    original.writable.unmount();
    let (code, _, complaint) = original.import(&["--undo"]);
    assert_eq!(code, 2);
    assert!(complaint.contains("mount the disk"), "{complaint}");
    original.writable.mount();
    original.undo();
    original.is_as(&before);

    // The files are gone for good.
    fs::remove_dir_all(original.writable().join("snapshots")).unwrap();
    original.flags = vec!["--writable-volatile".to_owned()];
    original.import_all();
    let split = original.serve();
    let client = split.client();
    reads(&client, "default/4/web", "top", "upper");
    let mounted = Mounted::new(&client.mounts("default/4/web").unwrap());
    assert!(!mounted.path().join("own").exists());
    is_clean(&split);
}

/// The original has run without its disk: the mount point has the directories
/// of requests from that time only.
#[registered(crate::Test)]
fn a_mount_point_that_is_not_quite_bare() {
    let mut original = sample();
    original.finish();
    let before = original.trees();
    original.writable.unmount();
    let bare = original.writable().join("snapshots");
    fs::create_dir_all(bare.join("6/fs")).unwrap();
    for flags in [&[][..], &["--dry-run"]] {
        original.is_refused(
            flags,
            &["5/fs of the snapshot \"default/4/web\"", "mount both disks"],
        );
    }
    assert!(!original.writable().join(".volume").exists());
    fs::remove_dir_all(original.writable()).unwrap();
    original.writable.mount();
    original.is_as(&before);
    original.import_all();
    sample_works(&original.serve().client());
}

/// There are too few descriptors to walk through a deep layer. The layer is whole, so
/// nothing is imported without it.
#[registered(crate::Test)]
fn layers_that_cannot_be_read_now() {
    let mut original = sample();
    original.layer("default/9/deep", "", "deep");
    let deep = original.last_on_image().join("d/".repeat(300));
    original.finish();
    fs::create_dir_all(deep).unwrap();
    let with_limit = |limit: &str| {
        let output = Command::new("sh")
            .args(["-c", &format!("ulimit {limit}; exec \"$@\""), "sh"])
            .args([crate::support::daemon::BINARY, "import"])
            .args(original.arguments())
            .output()
            .unwrap();
        let complaint = String::from_utf8(output.stderr).unwrap();
        (output.status.code(), complaint)
    };
    let before = original.trees();
    let (code, complaint) = with_limit("-n 30");
    assert_eq!(code, Some(2), "{complaint}");
    for words in [
        "\"default/9/deep\"",
        "snapshots/9/fs",
        "Too many open files",
    ] {
        assert!(complaint.contains(words), "{words}: {complaint}");
    }
    original.is_as(&before);
    // The soft limit of a shell or a service manager is raised.
    let (code, complaint) = with_limit("-S -n 30");
    assert_eq!(code, Some(0), "{complaint}");
    let split = original.serve();
    is_clean(&split);
}

/// Layers that the original had committed in place are on a disk that is not
/// mounted. No container needs them, so none would show their loss.
#[registered(crate::Test)]
fn layers_on_a_disk_that_is_not_there() {
    for has_other_layers in [true, false] {
        let mut original = Original::new();
        let parent = match has_other_layers {
            true => "default/1/base",
            false => "",
        };
        if has_other_layers {
            original.layer("default/1/base", "", "base");
        }
        original.broken("default/2/built", parent, "built");
        original.finish();
        let before = original.trees();
        original.writable.unmount();
        let is_refused = || {
            let (code, _, complaint) = original.import(&[]);
            assert_eq!(code, 2, "{complaint}");
            for words in [
                "writable/snapshots has none",
                "1 snapshots",
                "mount the writable volume's disk",
            ] {
                assert!(complaint.contains(words), "{words}: {complaint}");
            }
        };
        is_refused();
        fs::create_dir_all(original.writable().join("snapshots")).unwrap();
        is_refused();
        fs::remove_dir_all(original.writable()).unwrap();
        original.writable.mount();
        original.is_as(&before);
        original.import_all();
        let split = original.serve();
        let client = split.client();
        client
            .prepare("default/3/run", "default/2/built", &[])
            .unwrap();
        reads(&client, "default/3/run", "own", "built");
        is_clean(&split);
    }
}

/// An older state of the database, or a database of other disks.
#[registered(crate::Test)]
fn a_wrong_database() {
    let mut original = sample();
    original.finish();
    let older = fs::read(original.database()).unwrap();
    for number in 9..12 {
        let name = format!("default/{number}/late");
        original.container(&name, "default/1/base", "late");
    }
    original.finish();
    let latest = fs::read(original.database()).unwrap();
    fs::write(original.database(), &older).unwrap();
    for flags in [&["--dry-run"][..], &[]] {
        original.is_refused(
            flags,
            &["snapshots/11", "the highest id in the database is 8"],
        );
    }
    fs::write(original.database(), &latest).unwrap();
    // A directory is made before its snapshot is entered.
    fs::create_dir_all(original.root().join("snapshots/12/fs")).unwrap();
    original.import_all();
    original.undo();
    fs::rename(
        original.root().join("snapshots/12"),
        original.root().join("snapshots/13"),
    )
    .unwrap();
    original.is_refused(
        &[],
        &["snapshots/13", "the highest id in the database is 11"],
    );
    fs::remove_dir_all(original.root().join("snapshots/13")).unwrap();

    // What an earlier import has left out, with ids that are given out again.
    fs::create_dir_all(original.writable().join("left-out/5")).unwrap();
    original.is_refused(&[], &["left-out/5", "move"]);
    fs::remove_dir_all(original.writable().join("left-out")).unwrap();
    // There was another database of this program.
    fs::write(
        original.root().join("state"),
        "database /nowhere/metadata.db\nidentity 0123456789abcdef0123456789abcdef\n",
    )
    .unwrap();
    original.is_refused(&[], &["/state", "/nowhere/metadata.db"]);
    fs::remove_file(original.root().join("state")).unwrap();
    // One directory with two names.
    fs::remove_dir_all(original.writable().join("snapshots")).unwrap();
    mount_bind(original.root(), original.writable()).unwrap();
    original.is_refused(&["--dry-run"], &["under another path"]);
    unmount(original.writable(), UnmountFlags::empty()).unwrap();
}

#[registered(crate::Test)]
fn what_is_in_use() {
    let mut original = sample();
    original.container("default/9/alone", "", "alone");
    original.finish();
    original.import_all();
    let mut split = original.serve();
    let client = split.client();
    let mounts = ["default/4/web", "default/9/alone", "default/6/look"]
        .map(|key| client.mounts(key).unwrap());
    split.daemon.stop();
    let original = Original::again(split);
    for mounts in &mounts {
        let mounted = Mounted::new(mounts);
        let at = mounted.path();
        original.is_refused(&["--undo"], &["stop the containers", at.to_str().unwrap()]);
    }
    original.undo();
    for mounts in &mounts {
        let _mounted = Mounted::new(mounts);
        original.is_refused(&[], &["is mounted at", "stop the containers"]);
        original.is_refused(&["--dry-run"], &["stop the containers"]);
    }
    original.import_all();
    sample_works(&original.serve().client());
}

#[registered(crate::Test)]
fn what_is_no_undoing_is_refused() {
    let mut original = sample();
    original.broken("default/7/broken", "default/1/base", "small");
    let state = original.writable.path().join("state");
    original.flags = vec!["--state-dir".to_owned(), state.to_str().unwrap().to_owned()];
    original.finish();
    let before = original.trees();
    original.import_all();
    // The file in the place of the original's database belongs to neither
    // program.
    for (content, words) in [
        (
            "some notes, and nothing else",
            "not a database of this program",
        ),
        ("SQLite format 3\0", "not a database of this program"),
    ] {
        fs::write(original.database(), content).unwrap();
        original.is_refused(&["--undo"], &[words, "move it away"]);
        assert_eq!(fs::read_to_string(original.database()).unwrap(), content);
    }
    fs::copy(state.join("metadata.db"), original.database()).unwrap();
    original.is_refused(&["--undo"], &["--state-dir"]);
    fs::remove_file(original.database()).unwrap();

    // A copy of an earlier state may lack what was written since.
    let change = |statement: &str| {
        let database = rusqlite::Connection::open(state.join("metadata.db")).unwrap();
        database.execute(statement, []).unwrap();
    };
    change("INSERT INTO fact (name, value) VALUES ('copied', 'yesterday')");
    original.is_refused(&["--undo"], &["latest changes are missing"]);
    change("DELETE FROM fact WHERE name = 'copied'");

    // A volume that has lost its mark is not the volume of this import.
    let mark = original.writable().join(".volume");
    let marked = fs::read(&mark).unwrap();
    fs::remove_file(&mark).unwrap();
    original.is_refused(&["--undo"], &["not the writable volume of this import"]);
    fs::write(&mark, &marked).unwrap();
    original.undo();
    original.is_as(&before);
}

#[registered(crate::Test)]
fn a_disk_that_does_not_tell_what_is_a_directory() {
    let mut original = sample();
    original.finish();
    let arguments = ["-q", "-F", "-m", "0", "-b", "4096", "-O", "^filetype"];
    let untelling = Disk::make(256, "ext4", &arguments);
    run(Command::new("cp")
        .arg("-a")
        .arg(original.writable())
        .arg(untelling.path()));
    original.writable = untelling;
    original.is_refused(&[], &["d_type", original.writable().to_str().unwrap()]);
}
