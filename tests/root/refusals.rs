//! Cases in which the daemon refuses to start: one line says what is wrong and
//! what to do, the exit code is 1, and everything is as before.

use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;

use registered::registered;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::content::layer;
use crate::support::daemon::{Daemon, Split, command, refused};
use crate::support::disk::Disk;
use crate::support::{run, tree, unchanged, until};

/// Fails unless the line contains each of `parts`.
#[track_caller]
fn says(line: &str, parts: &[&str]) {
    for part in parts {
        assert!(line.contains(part), "{part:?} is not in {line:?}");
    }
}

/// Fails unless the start is refused and leaves these trees as they are.
/// Returns the line.
#[track_caller]
fn refused_untouched(arguments: &[String], trees: &[&Path]) -> String {
    let before: Vec<_> = trees.iter().map(tree).collect();
    let line = refused(arguments);
    for (top, before) in trees.iter().zip(before) {
        unchanged(top, &before);
    }
    line
}

/// The arguments for a daemon on these directories.
fn arguments(root: &Path, writable: &Path) -> Vec<String> {
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    vec![
        "--root-dir".to_owned(),
        text(root),
        "--writable-dir".to_owned(),
        text(writable),
    ]
}

fn with(mut arguments: Vec<String>, flag: &str, value: &Path) -> Vec<String> {
    arguments.extend([flag.to_owned(), value.to_str().unwrap().to_owned()]);
    arguments
}

#[registered(crate::Test)]
fn a_second_daemon() {
    let mut split = Split::start(&[]);
    let client = split.client();
    layer(&client, "base", "", |_| ());
    let running = split.daemon.pid();
    let number = running.as_raw_nonzero().to_string();
    let root = split.root().display().to_string();
    // At the same address, and at another one.
    let same = split.daemon.arguments().to_vec();
    let other = with(
        same.clone(),
        "--address",
        &split.image.path().join("socket"),
    );
    for arguments in [same, other] {
        let line = refused(&arguments);
        says(
            &line,
            &["another snapshotter", &number, &root, "--root-dir"],
        );
        assert!(!split.image.path().join("socket").exists());
        // On the existing connection, and on a new one.
        client.stat("base").unwrap();
        split.client().prepare("web", "base", &[]).unwrap();
        client.remove("web").unwrap();
    }
    assert!(split.daemon.is_running() && split.daemon.pid() == running);
}

#[registered(crate::Test)]
fn roots_that_are_no_directories() {
    let disk = Disk::ext4(64);
    let top = disk.path();
    fs::write(top.join("file"), "mine").unwrap();
    symlink("nowhere", top.join("dangling")).unwrap();
    let writable = top.join("writable");
    for name in ["file", "file/below", "dangling"] {
        let line = refused_untouched(&arguments(&top.join(name), &writable), &[&top]);
        says(&line, &[name, "not a directory", "--root-dir"]);
    }
    let root = top.join("root");
    let line = refused(&arguments(&root, &top.join("file")));
    says(&line, &["file", "not a directory", "--writable-dir"]);
    assert_eq!(fs::read_to_string(top.join("file")).unwrap(), "mine");
    // The entry within the root that is in the way is named.
    for name in ["snapshots", "trash", "empty"] {
        let root = top.join(format!("root-{name}"));
        fs::create_dir_all(&root).unwrap();
        symlink("/etc", root.join(name)).unwrap();
        let line = refused(&arguments(&root, &writable));
        says(&line, &[name, root.to_str().unwrap()]);
        assert_eq!(fs::read_link(root.join(name)).unwrap(), Path::new("/etc"));
    }
    assert!(!writable.exists());
}

/// ext4 made without `filetype` returns DT_UNKNOWN for every entry.
fn without_entry_types() -> Disk {
    Disk::make(64, "ext4", &["-q", "-F", "-O", "^filetype"])
}

#[registered(crate::Test)]
fn roots_without_entry_types() {
    let (image, writable) = (without_entry_types(), Disk::ext4(64));
    let root = image.path().join("root");
    fs::create_dir(&root).unwrap();
    let tops = [image.path(), writable.path()];
    let trees: Vec<&Path> = tops.iter().map(AsRef::as_ref).collect();
    let line = refused_untouched(&command(&image, &writable, &[]), &trees);
    says(
        &line,
        &[root.to_str().unwrap(), "d_type", "mkfs.ext4 -O filetype"],
    );
}

#[registered(crate::Test)]
fn writable_directories_that_hold_no_upper() {
    let image = Disk::ext4(64);
    let no_types = without_entry_types();

    // An overlay cannot be the upper directory of an overlay.
    let layers = Disk::ext4(64);
    let of = |name: &str| {
        let path = layers.path().join(name);
        fs::create_dir(&path).unwrap();
        path
    };
    let (lower, upper, work, merged) = (of("lower"), of("upper"), of("work"), of("merged"));
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        lower.display(),
        upper.display(),
        work.display()
    );
    run(Command::new("mount")
        .args(["-t", "overlay", "overlay", "-o", &options])
        .arg(&merged));

    // ramfs can be mounted as an upper directory, but cannot rename with a
    // whiteout.
    let ramfs = of("ramfs");
    mount("ramfs", &ramfs, "ramfs", MountFlags::empty(), c"").unwrap();

    let cases = [
        (merged.clone(), "cannot mount an overlay"),
        (ramfs.clone(), "cannot rename a file"),
        (no_types.path(), "d_type"),
    ];
    for (number, (top, why)) in cases.into_iter().enumerate() {
        let root = image.path().join(format!("root-{number}"));
        let writable = top.join("writable");
        fs::create_dir(&writable).unwrap();
        let line = refused_untouched(&arguments(&root, &writable), &[&top]);
        says(
            &line,
            &[writable.to_str().unwrap(), "overlayfs", "ext4", why],
        );
        // The refused first start leaves nothing that binds the root to an
        // unusable directory.
        let better = image.path().join(format!("writable-{number}"));
        let daemon = Daemon::start(&arguments(&root, &better));
        daemon.client().prepare("web", "", &[]).unwrap();
    }
    for path in [merged, ramfs] {
        unmount(&path, UnmountFlags::empty()).unwrap();
    }
}

#[registered(crate::Test)]
fn a_writable_directory_of_another_root() {
    let mut split = Split::start(&[]);
    split.client().prepare("web", "", &[]).unwrap();
    let fresh = split.image.path().join("fresh");
    let its_own = split.image.path().join("its-own");
    let writable = split.writable();
    for _ in 0..2 {
        // While the other root's daemon runs, and after its end.
        let line = refused_untouched(&arguments(&fresh, &writable), &[&writable]);
        says(
            &line,
            &[writable.to_str().unwrap(), "another root", "--writable-dir"],
        );
        if split.daemon.is_running() {
            split.daemon.stop();
        }
    }
    Daemon::start(&arguments(&fresh, &its_own));
    split.daemon.restart();
    split.client().mounts("web").unwrap();

    // A file of that name that is not a mark is not replaced.
    let odd = split.image.path().join("odd");
    fs::create_dir(&odd).unwrap();
    fs::write(odd.join(".volume"), "some program's own").unwrap();
    let another = split.image.path().join("another");
    let line = refused_untouched(&arguments(&another, &odd), &[&odd]);
    says(&line, &[".volume", "choose another --writable-dir"]);
}

/// The beginning of a bbolt database: two meta pages (a page header, then
/// magic, version, page size, root bucket, free list, high-water mark,
/// transaction, FNV-1a checksum), as in a database of containerd's
/// `storage.MetaStore`.
fn bolt_database() -> Vec<u8> {
    let metas: [[u64; 8]; 2] = [
        [6, 0, 7, 8, 2, 0x6d38_b867_d6b9_b7e0, 0, 0],
        [3, 0, 2, 4, 1, 0x264c_351a_5179_480f, 0, 0],
    ];
    let mut bytes = vec![0; 16 * 4096];
    for (number, meta) in metas.into_iter().enumerate() {
        let page = &mut bytes[number * 4096..];
        page[0] = number.try_into().unwrap();
        page[8] = 4; // a meta page
        page[16..20].copy_from_slice(&0xED0C_DAED_u32.to_le_bytes());
        page[20..24].copy_from_slice(&2_u32.to_le_bytes());
        page[24..28].copy_from_slice(&4096_u32.to_le_bytes());
        for (field, value) in meta.into_iter().enumerate() {
            let at = 32 + 8 * field;
            page[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
    }
    bytes
}

#[registered(crate::Test)]
fn databases_of_other_programs() {
    let disk = Disk::ext4(64);
    let top = disk.path();
    let writable = top.join("writable");
    let foreign = top.join("foreign.db");
    let connection = rusqlite::Connection::open(&foreign).unwrap();
    connection
        .execute_batch("CREATE TABLE snapshot (name TEXT); INSERT INTO snapshot VALUES ('x')")
        .unwrap();
    connection.close().unwrap();
    let cases: [(&str, Vec<u8>, &[&str]); 3] = [
        ("bolt", bolt_database(), &["Go snapshotter", "bbolt"]),
        ("sqlite", fs::read(&foreign).unwrap(), &["another program"]),
        ("text", b"some notes".to_vec(), &["not a database of this"]),
    ];
    for (name, content, parts) in cases {
        let root = top.join(name);
        fs::create_dir_all(root.join("snapshots/1/fs")).unwrap();
        fs::write(root.join("snapshots/1/fs/file"), "kept").unwrap();
        let database = root.join("metadata.db");
        fs::write(&database, &content).unwrap();
        let line = refused_untouched(&arguments(&root, &writable), &[&top]);
        says(&line, &[database.to_str().unwrap(), "--root-dir"]);
        says(&line, parts);
        // With a state directory elsewhere, the root still does not count as
        // empty.
        let elsewhere = with(
            arguments(&root, &writable),
            "--state-dir",
            &top.join("state"),
        );
        let line = refused_untouched(&elsewhere, &[&top]);
        says(&line, &[database.to_str().unwrap()]);
        says(&line, parts);
    }
}

#[registered(crate::Test)]
fn a_missing_database() {
    // The database is on a disk of its own, which is not mounted.
    let (image, state) = (Disk::ext4(64), Disk::ext4(64));
    let (root, writable) = (image.path().join("root"), image.path().join("writable"));
    let state_dir = state.path().join("state");
    let arguments = with(arguments(&root, &writable), "--state-dir", &state_dir);
    let mut daemon = Daemon::start(&arguments);
    layer(&daemon.client(), "base", "", |_| ());
    daemon.stop();
    state.unmount();
    let tops = [image.path(), state.path()];
    let trees: Vec<&Path> = tops.iter().map(AsRef::as_ref).collect();
    let line = refused_untouched(&arguments, &trees);
    let database = state_dir.join("metadata.db");
    says(
        &line,
        &[database.to_str().unwrap(), "missing", "mount the disk"],
    );
    state.mount();
    daemon.restart();
    daemon.client().stat("base").unwrap();
    daemon.stop();

    // Truncated to nothing, as on a full disk.
    let kept = fs::read(&database).unwrap();
    fs::write(&database, "").unwrap();
    says(
        &refused_untouched(&arguments, &trees),
        &["is empty", "metadata.db.copy"],
    );
    fs::write(&database, kept).unwrap();

    // Layers, without the file that names their database.
    fs::remove_file(root.join("state")).unwrap();
    state.unmount();
    let line = refused_untouched(&arguments, &trees);
    says(
        &line,
        &[root.to_str().unwrap(), "holds layers", "--state-dir"],
    );
    state.mount();
    let line = refused_untouched(&arguments, &trees);
    says(&line, &["has been in use", "mount the image disk"]);
}

#[registered(crate::Test)]
fn a_state_directory_that_moved() {
    let disk = Disk::ext4(64);
    let top = disk.path();
    let usual = arguments(&top.join("root"), &top.join("writable"));
    let moved = with(usual.clone(), "--state-dir", &top.join("state"));
    let mut daemon = Daemon::start(&usual);
    layer(&daemon.client(), "base", "", |_| ());
    let base = daemon.client().stat("base").unwrap();
    daemon.stop();

    let line = refused_untouched(&moved, &[&top]);
    let old = top.join("root/metadata.db");
    says(&line, &[old.to_str().unwrap(), "--state-dir", " to "]);
    // The old place still works.
    daemon.restart();
    daemon.stop();
    // With its file, the new place works, and the old one does not any more.
    fs::create_dir(top.join("state")).unwrap();
    fs::rename(&old, top.join("state/metadata.db")).unwrap();
    daemon.set_arguments(moved);
    daemon.restart();
    assert_eq!(daemon.client().stat("base").unwrap(), base);
    daemon.stop();
    daemon.restart();
    daemon.stop();
    let line = refused_untouched(&usual, &[&top]);
    let new = top.join("state/metadata.db");
    says(&line, &[new.to_str().unwrap(), "--state-dir"]);
}

#[registered(crate::Test)]
fn a_root_and_a_database_of_different_origin() {
    let disk = Disk::ext4(64);
    let top = disk.path();
    let place = |name: &str| {
        let usual = arguments(&top.join(name), &top.join(format!("{name}-writable")));
        let mut daemon = Daemon::start(&usual);
        layer(&daemon.client(), name, "", |_| ());
        daemon.stop();
        usual
    };
    let (one, _) = (place("one"), place("two"));
    let mixed = with(one.clone(), "--state-dir", &top.join("two"));
    let line = refused_untouched(&mixed, &[&top]);
    let database = top.join("two/metadata.db");
    says(
        &line,
        &[database.to_str().unwrap(), "another root", "--state-dir"],
    );
    Daemon::start(&one).client().stat("one").unwrap();

    // A `state` without contents.
    let state = top.join("one/state");
    for damaged in ["", "database /x\n", "identity 7\n"] {
        fs::write(&state, damaged).unwrap();
        let line = refused_untouched(&one, &[&top]);
        says(&line, &[state.to_str().unwrap(), "damaged"]);
    }
    // A database that is damaged behind its first page. Its log, which holds nothing,
    // exists if the daemon ran long enough to make it.
    let _ = fs::remove_file(top.join("two/metadata.db-wal"));
    let two = arguments(&top.join("two"), &top.join("two-writable"));
    let mut bytes = fs::read(&database).unwrap();
    bytes[100..].fill(0xA5);
    fs::write(&database, bytes).unwrap();
    let line = refused_untouched(&two, &[&top]);
    says(&line, &[database.to_str().unwrap(), "malformed"]);
}

#[registered(crate::Test)]
fn addresses_that_are_taken() {
    let disk = Disk::ext4(64);
    let top = disk.path();
    let address = top.join("socket");
    let usual = arguments(&top.join("root"), &top.join("writable"));
    let arguments = with(usual, "--address", &address);
    let text = address.to_str().unwrap();

    fs::write(&address, "mine").unwrap();
    says(
        &refused(&arguments),
        &[text, "not a socket", "move it away"],
    );
    assert_eq!(fs::read_to_string(&address).unwrap(), "mine");
    fs::remove_file(&address).unwrap();

    let target = top.join("target");
    symlink(&target, &address).unwrap();
    says(&refused(&arguments), &[text, "not a socket"]);
    assert_eq!(fs::read_link(&address).unwrap(), target);
    assert!(!target.exists());
    fs::remove_file(&address).unwrap();

    // Another running program.
    let listener = UnixListener::bind(&address).unwrap();
    says(
        &refused(&arguments),
        &[text, "another program", "--address"],
    );
    assert!(std::os::unix::net::UnixStream::connect(&address).is_ok());
    // It ends and leaves its socket: a stale socket is replaced.
    drop(listener);
    // A process that another test has forked has the listener until its exec.
    until("the socket is stale", || {
        std::os::unix::net::UnixStream::connect(&address).is_err()
    });
    let daemon = Daemon::start(&arguments);
    daemon.client().prepare("web", "", &[]).unwrap();
}

#[registered(crate::Test)]
fn a_path_that_is_too_long_for_the_database_is_said_as_such() {
    let disk = Disk::ext4(64);
    let long = disk.path().join("a".repeat(250)).join("b".repeat(250));
    let arguments = arguments(&long, &disk.path().join("writable"));
    let mut arguments = with(arguments, "--address", &disk.path().join("socket"));
    let words = [
        "limit of SQLite",
        "bytes long",
        "give a shorter --state-dir",
    ];
    says(&refused_untouched(&arguments, &[&disk.path()]), &words);
    // The link itself is short.
    fs::create_dir_all(&long).unwrap();
    symlink(&long, disk.path().join("link")).unwrap();
    arguments[1] = format!("{}/link", disk.text());
    says(&refused_untouched(&arguments, &[&disk.path()]), &words);
    // Only the database's path is too long; commands need no socket.
    arguments[1] = long.to_str().unwrap().to_owned();
    arguments = with(arguments, "--state-dir", &disk.path().join("state"));
    let mut daemon = Daemon::start(&arguments);
    arguments.drain(4..6);
    let mut check = Command::new(crate::support::daemon::BINARY);
    run(check.arg("check").args(&arguments));
    daemon.stop();
}
