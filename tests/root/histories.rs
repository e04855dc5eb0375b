//! A database and volumes of different moments, or of different daemons: no files are
//! deleted, and nothing of another daemon is used.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use grpcio::RpcStatusCode;
use registered::registered;

use crate::check::{check, is_clean};
use crate::content::layer;
use crate::support::client::{Client, finish};
use crate::support::daemon::{Daemon, Split, command, is_empty, refused};
use crate::support::disk::Disk;
use crate::support::{run, until};

/// A container that has written its own name.
fn container(client: &Client, split: &Split, key: &str) {
    let mounts = client.prepare(key, "", &[]).unwrap();
    assert_eq!(mounts[0].type_, "bind");
    assert!(
        mounts[0]
            .source
            .starts_with(split.writable().to_str().unwrap())
    );
    fs::write(Path::new(&mounts[0].source).join("own"), key).unwrap();
}

/// The files that containers have written, wherever they are on the volume.
fn written(split: &Split) -> Vec<String> {
    let found = run(std::process::Command::new("find")
        .arg(split.writable())
        .args(["-name", "own", "-exec", "cat", "{}", ";", "-printf", "\n"]));
    let mut names: Vec<_> = found.lines().map(str::to_owned).collect();
    names.sort();
    names
}

/// The database with its log, and the record of ids that were used on the image volume,
/// as in a snapshot of the image disk.
fn copied(split: &Split) -> Vec<(PathBuf, Vec<u8>)> {
    ["metadata.db", "metadata.db-wal", ".ids"]
        .map(|name| split.root().join(name))
        .into_iter()
        .filter(|path| path.exists())
        .map(|path| (path.clone(), fs::read(path).unwrap()))
        .collect()
}

fn put_back(split: &Split, database: &[(PathBuf, Vec<u8>)]) {
    for name in ["metadata.db", "metadata.db-wal", "metadata.db-shm"] {
        let _ = fs::remove_file(split.root().join(name));
    }
    for (path, bytes) in database {
        fs::write(path, bytes).unwrap();
    }
}

/// A database of an earlier day is started while the writable disk is away. The
/// disk comes back with containers that this database does not know.
#[registered(crate::Test)]
fn a_disk_comes_back_to_an_older_database() {
    let mut split = Split::start(&[]);
    container(&split.client(), &split, "old");
    split.daemon.stop();
    let database = copied(&split);
    split.daemon.restart();
    let names = ["a", "b", "c", "d", "e"];
    for name in names {
        container(&split.client(), &split, name);
    }
    split.daemon.stop();
    put_back(&split, &database);
    split.writable.unmount();
    split.daemon.restart();
    let client = split.client();
    for number in 0..6 {
        layer(&client, &format!("layer-{number}"), "", |_| ());
    }
    split.writable.mount();
    client.cleanup().unwrap_err();
    client.prepare("new", "layer-0", &[]).unwrap_err();
    assert_eq!(written(&split), ["a", "b", "c", "d", "e", "old"]);
    split.daemon.stop();
    let (code, said, complaint) = check(&split, &["--repair", "--yes"]);
    assert_eq!(code, 0, "{said}{complaint}");
    let left_out = split.writable().join("left-out");
    assert!(said.contains(&format!("{}/", left_out.display())), "{said}");
    split.daemon.restart();
    let client = split.client();
    client.prepare("new", "layer-0", &[]).unwrap();
    client.cleanup().unwrap();
    assert_eq!(written(&split), ["a", "b", "c", "d", "e", "old"]);
}

/// The volumes use blocks of ids that the older database does not know, and so are
/// refused.
#[registered(crate::Test)]
fn a_volume_of_a_later_day_is_refused_until_a_repair() {
    let mut split = Split::start(&[]);
    container(&split.client(), &split, "old");
    split.daemon.stop();
    let database = copied(&split);
    split.skip_ids_through(300);
    split.daemon.restart();
    container(&split.client(), &split, "new");
    split.client().remove("old").unwrap();
    split.client().cleanup().unwrap();
    split.daemon.stop();
    put_back(&split, &database);
    // Ids that were given out since hide the missing ones.
    split.skip_ids_through(400);
    let words = ["ids from ", "the database is an old copy"];
    let line = refused(split.daemon.arguments());
    assert!(words.iter().all(|word| line.contains(word)), "{line}");

    // The writable disk comes later.
    split.writable.unmount();
    split.daemon.restart();
    split.writable.mount();
    let client = split.client();
    let (code, text) = client.prepare("web", "", &[]).unwrap_err();
    assert_eq!(code, RpcStatusCode::DATA_LOSS);
    assert!(text.contains("ids from "), "{text}");
    client.cleanup().unwrap_err();
    split.daemon.stop();

    let (code, said, _) = check(&split, &["--json"]);
    assert_eq!(code, 1);
    assert!(said.contains("\"other-history\""), "{said}");
    let (code, said, complaint) = check(&split, &["--repair", "--yes"]);
    assert_eq!(code, 0, "{said}{complaint}");
    assert!(
        said.contains("sets the directory aside in left-out/"),
        "{said}"
    );
    split.daemon.restart();
    container(&split.client(), &split, "web");
    assert_eq!(written(&split), ["new", "web"]);
}

/// Two branches of one history, which have ids in common.
#[registered(crate::Test)]
fn a_database_does_not_take_the_directories_of_another_branch() {
    let mut split = Split::start(&[]);
    split.daemon.stop();
    let first = copied(&split);
    split.daemon.restart();
    container(&split.client(), &split, "mailserver");
    split.daemon.stop();
    let second = copied(&split);
    split.daemon.restart();
    split.client().remove("mailserver").unwrap();
    split.client().cleanup().unwrap();
    split.daemon.stop();
    // The writable volume is empty, so nothing on it shows the difference.
    put_back(&split, &first);
    split.daemon.restart();
    container(&split.client(), &split, "guest");
    split.daemon.stop();
    put_back(&split, &second);
    refused(split.daemon.arguments());
    let (_, said, _) = check(&split, &["--repair", "--yes"]);
    assert!(
        said.contains("a container may show another container's files"),
        "{said}"
    );
    assert!(written(&split).contains(&"guest".to_owned()));
}

/// The writable disk in an earlier state, as after an LVM snapshot was mounted in its
/// place.
#[registered(crate::Test)]
fn a_volume_of_an_earlier_day_is_refused() {
    let mut split = Split::start(&[]);
    container(&split.client(), &split, "web");
    split.daemon.stop();
    let ids = split.writable().join(".ids");
    let earlier = fs::read(&ids).unwrap();
    split.daemon.restart();
    container(&split.client(), &split, "later");
    split.daemon.stop();
    let latest = fs::read(&ids).unwrap();
    fs::write(&ids, &earlier).unwrap();
    let line = refused(split.daemon.arguments());
    assert!(line.contains("in an older state than"), "{line}");
    fs::remove_file(&ids).unwrap();
    let line = refused(split.daemon.arguments());
    assert!(line.contains("in an older state than"), "{line}");
    fs::write(&ids, &latest).unwrap();
    split.daemon.restart();
    is_clean(&split);
}

/// Whatever is in the place of `.ids`, a repair or an error that says what to
/// do solves it.
#[registered(crate::Test)]
fn a_damaged_record_of_ids_is_written_again() {
    let mut split = Split::start(&[]);
    container(&split.client(), &split, "web");
    for volume in [split.root(), split.writable()] {
        split.daemon.stop();
        let ids = volume.join(".ids");
        fs::write(&ids, "nonsense").unwrap();
        let line = refused(split.daemon.arguments());
        assert!(line.contains("check --repair"), "{line}");
        let (_, said, complaint) = check(&split, &["--repair", "--yes"]);
        assert!(said.contains("repaired"), "{said}{complaint}");
        split.daemon.restart();
        is_clean(&split);
    }
    assert_eq!(written(&split), ["web"]);
}

/// `--writable-dir` names the directory of another snapshotter, whose ids also begin
/// with 1.
#[registered(crate::Test)]
fn a_directory_of_another_program_is_never_marked() {
    let mut split = Split::start(&[]);
    for key in ["a", "b", "c"] {
        container(&split.client(), &split, key);
    }
    split.daemon.stop();
    let others = split.writable.path().join("other");
    for number in 1..=25 {
        let directory = others.join(format!("snapshots/{number}"));
        fs::create_dir_all(directory.join("fs")).unwrap();
        fs::create_dir(directory.join("work")).unwrap();
        fs::write(directory.join("fs/own"), "theirs").unwrap();
    }
    let arguments = split.daemon.arguments().to_vec();
    let ours = split.writable().to_str().unwrap().to_owned();
    let moved = |argument: &String| match *argument == ours {
        true => others.to_str().unwrap().to_owned(),
        false => argument.clone(),
    };
    split
        .daemon
        .set_arguments(arguments.iter().map(moved).collect());
    let (code, said, _) = check(&split, &["--json"]);
    assert_eq!(code, 1);
    assert!(said.contains("\"volume-missing\""), "{said}");
    let (code, said, _) = check(&split, &["--repair", "--yes"]);
    assert_eq!(code, 1, "{said}");
    assert!(!others.join(".volume").exists());
    assert_eq!(fs::read_dir(others.join("snapshots")).unwrap().count(), 25);
    split.daemon.set_arguments(arguments);
    is_clean(&split);
}

/// A volume that has only lost its mark is recognised by the ids used on it.
#[registered(crate::Test)]
fn a_lost_mark_is_written_again_and_nothing_else_is_done() {
    let mut split = Split::start(&[]);
    container(&split.client(), &split, "web");
    split.daemon.stop();
    fs::remove_file(split.writable().join(".volume")).unwrap();
    let stray = split.writable().join("snapshots/200/fs");
    fs::create_dir_all(&stray).unwrap();
    fs::write(stray.join("own"), "stray").unwrap();
    let (code, said, complaint) = check(&split, &["--repair", "--yes"]);
    assert_eq!(code, 1, "{said}{complaint}");
    assert!(split.writable().join(".volume").exists());
    assert!(stray.exists(), "moved in the run that marked");
    assert!(
        said.contains("snapshots/200 belongs to no snapshot, and holds files"),
        "{said}"
    );
}

/// Requests that need only the other volume are answered as usual.
#[registered(crate::Test)]
fn a_disk_that_hangs_holds_up_its_own_requests_only() {
    let state = Disk::ext4(64);
    let directory = state.path().join("state").to_str().unwrap().to_owned();
    let mut split = Split::start(&["--state-dir", &directory, "--relocate", "never"]);
    let client = split.client();
    layer(&client, "base", "", |_| ());
    for key in ["web", "committed", "removed"] {
        client.prepare(key, "base", &[]).unwrap();
    }
    for key in ["extract-committed", "extract-removed"] {
        client.prepare(key, "", &[]).unwrap();
    }
    client.view("view", "base", &[]).unwrap();
    let answered = |what: &str, work: &dyn Fn()| {
        let begun = Instant::now();
        work();
        assert!(
            begun.elapsed() < Duration::from_secs(10),
            "{what} has waited"
        );
    };

    let frozen = split.writable.freeze();
    // More requests than there are workers.
    let waiting: Vec<_> = (0..40)
        .map(|number| client.begin_prepare(&format!("waits-{number}"), "base", &[]))
        .collect();
    answered("an unpack", &|| {
        client.prepare("extract-new", "base", &[]).unwrap();
        client.commit("extract-committed", "unpacked", &[]).unwrap();
        client.remove("extract-removed").unwrap();
    });
    answered("what has no directory", &|| {
        client.view("another-view", "base", &[]).unwrap();
        client.remove("view").unwrap();
        client.update("base", &["labels.x"], &[("x", "y")]).unwrap();
        assert!(!client.exists("waits-0"), "the disk did not hang");
    });
    drop(frozen);
    for prepared in waiting {
        finish(prepared).unwrap();
    }

    let frozen = split.image.freeze();
    let waiting = client.begin_prepare("extract-waits", "base", &[]);
    answered("a container", &|| {
        client.prepare("new", "base", &[]).unwrap();
        client.commit("committed", "layer", &[]).unwrap();
        client.remove("removed").unwrap();
        client.update("base", &["labels.x"], &[("x", "z")]).unwrap();
        client.view("third-view", "base", &[]).unwrap();
        assert!(!client.exists("extract-waits"), "the disk did not hang");
    });
    // The layer is reached through a link on the image volume.
    let upon = client.begin_prepare("upon", "layer", &[]);
    drop(frozen);
    finish(waiting).unwrap();
    finish(upon).unwrap();
    split.daemon.stop();
    split.daemon.restart();
    is_clean(&split);
}

/// A first start before the disk of a mount unit is mounted.
#[registered(crate::Test)]
fn the_bare_mount_point_of_a_disk_is_not_taken() {
    let (image, later) = (Disk::ext4(64), Disk::ext4(64));
    let point = later.path();
    let name = point.to_str().unwrap().trim_matches('/').replace('/', "-");
    let unit = Path::new("/run/systemd/system").join(format!("{name}.mount"));
    fs::create_dir_all(unit.parent().unwrap()).unwrap();
    fs::write(&unit, "[Mount]\n").unwrap();
    later.unmount();
    let flags = command(&image, &later, &[]);
    let line = refused(&flags);
    assert!(line.contains("is not mounted, and "), "{line}");
    assert!(is_empty(&point));
    later.mount();
    let mut daemon = Daemon::start(&flags);
    daemon.client().prepare("web", "", &[]).unwrap();
    daemon.stop();
    fs::remove_file(&unit).unwrap();
}

/// The directory of a layer on a volume of an earlier day does not replace the
/// layer.
#[registered(crate::Test)]
fn a_layer_that_holds_less_than_at_its_commit_does_not_move() {
    let mut split = Split::start(&["--relocate", "never"]);
    let client = split.client();
    container(&client, &split, "web");
    client.commit("web", "layer", &[]).unwrap();
    let id = fs::read_dir(split.writable().join("snapshots")).unwrap();
    let upper = id.last().unwrap().unwrap().path().join("fs");
    split.daemon.stop();
    fs::write(upper.join("own"), "").unwrap();
    let mut arguments = split.daemon.arguments().to_vec();
    arguments.retain(|argument| argument != "--relocate" && argument != "never");
    arguments.extend(["--relocate-after", "0"].map(str::to_owned));
    split.daemon.set_arguments(arguments);
    split.daemon.restart();
    until("the move is refused", || {
        split
            .daemon
            .log()
            .contains("holds less than when it was committed")
    });
    assert!(upper.exists());
}

/// A kill between the two renames of a move, and a database that does not know the layer.
#[registered(crate::Test)]
fn a_layer_that_was_renamed_and_is_not_known_stays() {
    let mut split = Split::start(&[]);
    split.daemon.stop();
    let moving = split.root().join("snapshots/.moving-7");
    fs::create_dir_all(moving.join("work")).unwrap();
    fs::create_dir(moving.join("fs")).unwrap();
    fs::write(moving.join("fs/own"), "all there is").unwrap();
    for _ in 0..2 {
        split.daemon.restart();
        split.client().cleanup().unwrap();
        assert!(moving.join("fs/own").exists());
        split.daemon.stop();
    }
}
