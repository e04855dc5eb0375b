//! A damaged, incomplete or outdated database is refused at the start, and
//! there is a way back.

use std::fs;
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use registered::registered;

use crate::check::{check, is_clean};
use crate::content::layer;
use crate::support::client::Client;
use crate::support::daemon::{BINARY, Split, is_empty, refused};
use crate::support::mounted::Mounted;
use crate::support::tree;

fn database(split: &Split) -> PathBuf {
    split.root().join("metadata.db")
}

fn log_of(split: &Split) -> PathBuf {
    split.root().join("metadata.db-wal")
}

fn sample(client: &Client, round: &str) {
    layer(client, &format!("base-{round}"), "", |top| {
        fs::write(top.join("file"), round).unwrap();
    });
    let key = format!("web-{round}");
    client.prepare(&key, &format!("base-{round}"), &[]).unwrap();
}

#[track_caller]
fn holds(client: &Client, round: &str) {
    let mounted = Mounted::new(&client.mounts(&format!("web-{round}")).unwrap());
    assert_eq!(
        fs::read_to_string(mounted.path().join("file")).unwrap(),
        round
    );
}

/// Fails unless the start is refused with these words, and changes neither
/// volume.
#[track_caller]
fn is_refused(split: &Split, words: &[&str]) {
    let before = [split.root(), split.writable()].map(tree);
    let line = refused(split.daemon.arguments());
    for word in words {
        assert!(line.contains(word), "{word:?} is not in {line:?}");
    }
    let is_data = |path: &Path| !path.to_str().unwrap().contains("/metadata.db");
    for (top, mut before) in [split.root(), split.writable()].iter().zip(before) {
        let mut after = tree(top);
        after.retain(|path, _| is_data(path));
        before.retain(|path, _| is_data(path));
        assert_eq!(after, before);
    }
}

#[track_caller]
fn repair(split: &mut Split) -> Client {
    let (code, said, complaint) = check(split, &["--repair", "--yes"]);
    assert_eq!(code, 0, "{said}{complaint}");
    is_clean(split);
    split.daemon.restart();
    split.client()
}

/// A user has copied `metadata.db` alone, or deleted the log.
#[registered(crate::Test)]
fn a_missing_log() {
    let mut split = Split::start(&[]);
    sample(&split.client(), "first");
    split.daemon.kill();
    let kept = split.root().join("kept");
    fs::rename(log_of(&split), &kept).unwrap();
    is_refused(
        &split,
        &["metadata.db-wal", "put the log back", "check --repair"],
    );
    fs::write(log_of(&split), "").unwrap();
    is_refused(&split, &["missing or empty"]);
    let (code, said, complaint) = check(&split, &[]);
    assert_eq!(code, 1, "{said}{complaint}");
    assert!(said.contains("its log"), "{said}");

    fs::rename(&kept, log_of(&split)).unwrap();
    is_clean(&split);
    split.daemon.restart();
    let client = split.client();
    holds(&client, "first");
    // The repair gives up what the log had, and its directories.
    sample(&client, "lost");
    split.daemon.kill();
    fs::remove_file(log_of(&split)).unwrap();
    is_refused(&split, &["check --repair"]);
    let client = repair(&mut split);
    assert!(!client.exists("web-lost"));
    holds(&client, "first");
    sample(&client, "second");
    holds(&client, "second");
    client.cleanup().unwrap();
    is_clean(&split);
}

/// A log that ends early, because of a flipped byte: SQLite uses the part
/// before it. The directories, which are newer, show the loss.
#[registered(crate::Test)]
fn a_cut_off_log() {
    let mut split = Split::start(&[]);
    let client = split.client();
    for round in ["first", "second", "third"] {
        sample(&client, round);
    }
    split.daemon.kill();
    let length = fs::metadata(log_of(&split)).unwrap().len();
    // Behind the first transaction after the header; each frame has a page.
    let file = fs::File::options()
        .write(true)
        .open(log_of(&split))
        .unwrap();
    file.write_all_at(&[0xff; 64], 32 + 3 * (24 + 4096) + 100)
        .unwrap();
    assert!(length > 10 * 4096);
    is_refused(&split, &["the database is an old copy", "check --repair"]);
    let client = repair(&mut split);
    sample(&client, "fourth");
    holds(&client, "fourth");
}

/// Damage that SQLite can find is found at the start, not when containerd asks.
#[registered(crate::Test)]
fn flipped_bytes() {
    let mut split = Split::start(&[]);
    let client = split.client();
    for number in 0..60 {
        client
            .prepare(&format!("key-{number}"), "", &[("label", &"x".repeat(300))])
            .unwrap();
    }
    split.daemon.stop();
    let sound = fs::read(database(&split)).unwrap();
    let page = 4096;
    assert!(sound.len() > 6 * page);
    let mut refusals = 0;
    for at in (0..sound.len()).step_by(page) {
        let mut flipped = sound.clone();
        // The page's own header and the bytes after it.
        for byte in &mut flipped[at..at + 32] {
            *byte ^= 0x55;
        }
        fs::write(database(&split), &flipped).unwrap();
        let is_header = at == 0;
        // A page that is not in use may contain anything.
        if is_header || split_is_refused(&split) {
            is_refused(&split, &["metadata.db"]);
            refusals += 1;
        }
        assert!(refusals > 0);
    }
    assert!(refusals * 3 > sound.len() / page * 2, "{refusals} pages");
    fs::write(database(&split), &sound).unwrap();
    split.daemon.restart();
    assert_eq!(split.client().names(&[]).unwrap().len(), 60);
}

/// Whether a check reports that the database is damaged. A check starts
/// nothing.
fn split_is_refused(split: &Split) -> bool {
    let (code, said, complaint) = check(split, &[]);
    assert_ne!(code, 1, "{said}");
    if code == 2 {
        assert!(complaint.contains("metadata.db.copy"), "{complaint}");
    }
    code == 2
}

#[registered(crate::Test)]
fn a_truncated_database() {
    let mut split = Split::start(&[]);
    for number in 0..60 {
        let key = format!("key-{number}");
        let label = "x".repeat(300);
        split.client().prepare(&key, "", &[("l", &label)]).unwrap();
    }
    split.daemon.stop();
    let sound = fs::read(database(&split)).unwrap();
    for part in [1, 50, 99] {
        let length = sound.len() * part / 100;
        fs::write(database(&split), &sound[..length]).unwrap();
        is_refused(&split, &["metadata.db"]);
        let (code, ..) = check(&split, &[]);
        assert_eq!(code, 2);
    }
    // An empty file: no new database is created in its place.
    fs::write(database(&split), "").unwrap();
    is_refused(&split, &["is empty", "metadata.db.copy"]);
}

#[registered(crate::Test)]
fn a_copy_is_the_way_back() {
    let mut split = Split::start(&[]);
    sample(&split.client(), "first");
    split.daemon.stop();
    let copy = split.root().join("metadata.db.copy");
    let kept = fs::read(&copy).unwrap();
    split.daemon.restart();
    let client = split.client();
    sample(&client, "later");
    sample(&client, "latest");
    client.remove("web-latest").unwrap();
    split.daemon.kill();
    fs::write(&copy, kept).unwrap();

    // What the error about a damaged database says, except for the log.
    let sound = fs::read(database(&split)).unwrap();
    fs::write(database(&split), &sound[..sound.len() / 2]).unwrap();
    is_refused(&split, &["metadata.db.copy", "check --repair"]);
    fs::copy(&copy, database(&split)).unwrap();
    is_refused(&split, &["not its log"]);
    let (code, ..) = check(&split, &["--repair", "--yes"]);
    assert_eq!(code, 2);
    fs::remove_file(log_of(&split)).unwrap();
    is_refused(&split, &["a copy of an earlier state", "UTC"]);

    // A repair that is killed has begun a log.
    for _ in 0..2 {
        let killed = Command::new(BINARY)
            .args(["check", "--repair", "--yes"])
            .args(split.daemon.arguments())
            .env("SNAPSHOTTER_FAULT", "repair-recorded")
            .status()
            .unwrap();
        assert!(!killed.success());
        assert!(fs::metadata(log_of(&split)).unwrap().len() > 0);
    }
    let client = repair(&mut split);
    holds(&client, "first");
    assert_eq!(client.names(&[]).unwrap(), ["base-first", "web-first"]);
    client.prepare("new", "base-first", &[]).unwrap();
    client.cleanup().unwrap();
    assert!(is_empty(split.root().join("trash")));
    is_clean(&split);
}

/// A backup of the file itself is put back.
#[registered(crate::Test)]
fn an_older_database() {
    let mut split = Split::start(&[]);
    sample(&split.client(), "first");
    split.daemon.stop();
    let backup = fs::read(database(&split)).unwrap();
    split.daemon.restart();
    sample(&split.client(), "second");
    split.daemon.stop();
    fs::write(database(&split), backup).unwrap();
    is_refused(&split, &["ids from ", "the database is an old copy"]);
    // Nothing counts as a stray before the user has decided.
    let entries = fs::read_dir(split.writable().join("snapshots")).unwrap();
    let entries = entries.map(|entry| entry.unwrap().path().join("fs"));
    let upper = entries.max_by_key(|upper| upper.as_os_str().len()).unwrap();
    let client = repair(&mut split);
    holds(&client, "first");
    assert!(!upper.exists());
}

/// Interrupted requests leave empty directories whose ids were reserved. These do not
/// show that the database is older than the disks; other directories do.
#[registered(crate::Test)]
fn what_was_cut_off_is_no_sign() {
    let mut split = Split::start(&[]);
    sample(&split.client(), "first");
    split.daemon.stop();
    // The layer and the container have the first two ids.
    let next = 3..257;
    let directory = |top: &Path, id: u64| top.join(format!("snapshots/{id}"));
    for top in [split.root(), split.writable()] {
        for id in next.clone() {
            fs::create_dir_all(directory(&top, id).join("fs")).unwrap();
            fs::create_dir(directory(&top, id).join("work")).unwrap();
        }
        let file = directory(&top, 7).join("fs/file");
        fs::write(&file, "data").unwrap();
        is_refused(&split, &["snapshots/7", "the database is an old copy"]);
        fs::remove_file(file).unwrap();
        // Entries that are not an empty directory of a snapshot, such as a
        // layer's link, do.
        fs::rename(directory(&top, 8), top.join("aside")).unwrap();
        symlink("/elsewhere", directory(&top, 8)).unwrap();
        is_refused(&split, &["snapshots/8", "the database is an old copy"]);
        fs::remove_file(directory(&top, 8)).unwrap();
        fs::rename(top.join("aside"), directory(&top, 8)).unwrap();
        fs::write(directory(&top, 9).join("more"), "").unwrap();
        is_refused(&split, &["snapshots/9", "the database is an old copy"]);
        fs::remove_file(directory(&top, 9).join("more")).unwrap();
        let further = directory(&top, next.end);
        fs::create_dir(&further).unwrap();
        is_refused(&split, &["snapshots/257", "the database is an old copy"]);
        fs::remove_dir(further).unwrap();
    }
    split.daemon.restart();
    let client = split.client();
    holds(&client, "first");
    sample(&client, "second");
    holds(&client, "second");
    client.cleanup().unwrap();
    is_clean(&split);
}

#[registered(crate::Test)]
fn a_copy_is_made_at_a_stop() {
    let mut split = Split::start(&[]);
    let copy = split.root().join("metadata.db.copy");
    sample(&split.client(), "first");
    split.daemon.stop();
    split.daemon.restart();
    sample(&split.client(), "second");
    split.daemon.stop();
    let database = rusqlite::Connection::open(&copy).unwrap();
    let names: i64 = database
        .query_row("SELECT count(*) FROM snapshot", [], |row| row.get(0))
        .unwrap();
    assert_eq!(names, 4);
}
