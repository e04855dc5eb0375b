//! What a start finds after a crash, a lost file or a move, and what it does
//! about it.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use grpcio::RpcStatusCode;
use registered::registered;

use crate::check::check;
use crate::content::layer;
use crate::support::daemon::{Split, command, is_empty};
use crate::support::mounted::{Mounted, upper_of};
use crate::support::{tree, unchanged};

/// The names in a directory, sorted.
fn names(path: impl AsRef<Path>) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(path)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[registered(crate::Test)]
fn strays_are_kept_unless_they_are_empty() {
    let mut split = Split::start(&[]);
    let client = split.client();
    layer(&client, "base", "", |top| {
        fs::write(top.join("file"), "base").unwrap();
    });
    client.prepare("web", "base", &[]).unwrap();
    split.skip_ids_through(80);
    split.daemon.kill();
    let victim = split.image.path().join("victim");
    fs::create_dir_all(victim.join("fs/below")).unwrap();
    fs::write(victim.join("fs/file"), "not ours to delete").unwrap();
    let before = tree(&victim);
    for volume in [split.root(), split.writable()] {
        let snapshots = volume.join("snapshots");
        fs::create_dir_all(snapshots.join("77/fs/deep/deeper")).unwrap();
        fs::write(snapshots.join("77/fs/file"), "x").unwrap();
        fs::write(snapshots.join("78"), "x").unwrap();
        symlink(&victim, snapshots.join("79")).unwrap();
        // The name is in the trash already, from an earlier crash.
        fs::create_dir(volume.join("trash/77")).unwrap();
        // The daemon makes no such names.
        for other in ["notes", "007", "80.bak", "-1"] {
            fs::create_dir(snapshots.join(other)).unwrap();
        }
    }
    // Ids that rows know, each on the wrong volume.
    fs::create_dir(split.root().join("snapshots/2")).unwrap();
    fs::create_dir(split.writable().join("snapshots/1")).unwrap();

    split.daemon.restart();
    let client = split.client();
    let kept = |own: &str| ["-1", "007", own, "80.bak", "notes"].map(str::to_owned);
    let sorted = |mut names: [String; 5]| {
        names.sort();
        names
    };
    assert_eq!(names(split.root().join("snapshots")), sorted(kept("1")));
    assert_eq!(names(split.writable().join("snapshots")), sorted(kept("2")));
    for (volume, empty) in [(split.root(), "2"), (split.writable(), "1")] {
        assert_eq!(names(volume.join("trash")), [empty, "77"]);
        assert_eq!(names(volume.join("left-out")), ["77", "78", "79"]);
        assert_eq!(
            fs::read_to_string(volume.join("left-out/77/fs/file")).unwrap(),
            "x"
        );
    }
    let log = split.daemon.log();
    assert!(log.contains("image volume: snapshots/77"), "{log}");
    assert!(log.contains("writable volume: snapshots/77"), "{log}");
    assert!(log.contains("\"notes\""), "{log}");

    client.cleanup().unwrap();
    assert!(is_empty(split.root().join("trash")));
    assert!(is_empty(split.writable().join("trash")));
    unchanged(&victim, &before);
    let mounted = Mounted::new(&client.mounts("web").unwrap());
    assert_eq!(
        fs::read_to_string(mounted.path().join("file")).unwrap(),
        "base"
    );
}

#[registered(crate::Test)]
fn missing_uppers_are_made_anew() {
    let mut split = Split::start(&[]);
    let client = split.client();
    layer(&client, "base", "", |top| {
        fs::write(top.join("file"), "base").unwrap();
    });
    client.prepare("whole", "base", &[]).unwrap(); // 2
    client.prepare("half", "base", &[]).unwrap(); // 3
    client.prepare("no work", "base", &[]).unwrap(); // 4
    client.prepare("a file", "base", &[]).unwrap(); // 5
    client.prepare("extract-1", "base", &[]).unwrap(); // 6
    client.view("view", "", &[]).unwrap(); // 7
    client.prepare("sound", "base", &[]).unwrap(); // 8
    let sound = split.writable().join("snapshots/8/fs/written");
    fs::write(&sound, "kept").unwrap();
    split.daemon.kill();
    let (image, writable) = (
        split.root().join("snapshots"),
        split.writable().join("snapshots"),
    );
    // A power cut may leave any part of what one request makes.
    fs::remove_dir_all(writable.join("2")).unwrap();
    fs::remove_dir(writable.join("3/fs")).unwrap();
    fs::remove_dir(writable.join("4/work")).unwrap();
    fs::remove_dir_all(writable.join("5")).unwrap();
    fs::write(writable.join("5"), "no directory").unwrap();
    fs::remove_dir_all(image.join("6")).unwrap();
    fs::remove_dir_all(image.join("7")).unwrap();

    split.daemon.restart();
    let client = split.client();
    for key in ["whole", "half", "no work", "a file", "extract-1", "sound"] {
        let mounted = Mounted::new(&client.mounts(key).unwrap());
        let file = mounted.path().join("file");
        assert_eq!(fs::read_to_string(&file).unwrap(), "base", "{key}");
        fs::write(&file, "changed").unwrap();
        client.usage(key).unwrap();
    }
    assert!(is_empty(
        Mounted::new(&client.mounts("view").unwrap()).path()
    ));
    assert_eq!(fs::read_to_string(&sound).unwrap(), "kept");
    let log = split.daemon.log();
    for key in ["whole", "half", "no work", "a file", "extract-1", "view"] {
        let line = format!("snapshot \"{key}\" had no");
        assert!(log.contains(&line), "{key}: {log}");
    }
    assert!(!log.contains("snapshot \"sound\""), "{log}");
    client.commit("extract-1", "upper", &[]).unwrap();
    client.commit("whole", "layer", &[]).unwrap();
    for name in client.names(&[]).unwrap().iter().rev() {
        if name != "base" {
            client.remove(name).unwrap();
        }
    }
    client.cleanup().unwrap();
    assert!(is_empty(&writable) && names(&image) == ["1"]);
}

#[registered(crate::Test)]
fn a_moved_writable_directory() {
    let mut split = Split::start(&["--relocate", "never"]);
    let client = split.client();
    layer(&client, "base", "", |_| ());
    let mounts = client.prepare("init-key", "base", &[]).unwrap();
    fs::write(Mounted::new(&mounts).path().join("hosts"), "init").unwrap();
    client.commit("init-key", "init", &[]).unwrap();
    let mounts = client.prepare("web", "init", &[]).unwrap();
    fs::write(Mounted::new(&mounts).path().join("written"), "web").unwrap();
    split.daemon.stop();

    let old = split.writable();
    let new = split.writable.path().join("elsewhere/fast");
    fs::create_dir(new.parent().unwrap()).unwrap();
    fs::rename(&old, &new).unwrap();
    let mut arguments = split.daemon.arguments().to_vec();
    let at = arguments
        .iter()
        .position(|argument| argument == "--writable-dir");
    arguments[at.unwrap() + 1] = new.to_str().unwrap().to_owned();
    split.daemon.set_arguments(arguments);
    split.daemon.restart();

    let client = split.client();
    let link = split.root().join("snapshots/2");
    assert_eq!(fs::read_link(&link).unwrap(), new.join("snapshots/2"));
    assert!(
        split
            .daemon
            .log()
            .contains("layer \"init\": created its link")
    );
    let mounts = client.mounts("web").unwrap();
    let upper = format!("upperdir={}/snapshots/3/fs", new.display());
    assert!(mounts[0].options.contains(&upper), "{mounts:?}");
    let mounted = Mounted::new(&mounts);
    for (name, content) in [("hosts", "init"), ("written", "web")] {
        assert_eq!(
            fs::read_to_string(mounted.path().join(name)).unwrap(),
            content
        );
    }
    assert!(!old.exists());
    drop(mounted);
    // There is nothing to repair any more.
    split.daemon.stop();
    let told = split.daemon.log().matches("created its link").count();
    split.daemon.restart();
    assert_eq!(split.daemon.log().matches("created its link").count(), told);
    client.remove("web").unwrap();
    client.remove("init").unwrap();
    assert!(link.symlink_metadata().is_err());
}

#[registered(crate::Test)]
fn a_moved_root() {
    let split = Split::start(&[]);
    layer(&split.client(), "base", "", |top| {
        fs::write(top.join("file"), "base").unwrap();
    });
    split.client().prepare("web", "base", &[]).unwrap();
    let (old, new) = (split.root(), split.image.path().join("new"));
    let Split {
        image,
        writable,
        mut daemon,
    } = split;
    daemon.stop();
    fs::rename(&old, &new).unwrap();
    let mut arguments = command(&image, &writable, &[]);
    arguments[1] = new.to_str().unwrap().to_owned();
    let daemon = crate::support::daemon::Daemon::start(&arguments);
    let mounted = Mounted::new(&daemon.client().mounts("web").unwrap());
    assert_eq!(
        fs::read_to_string(mounted.path().join("file")).unwrap(),
        "base"
    );
    assert!(!old.exists());
}

#[registered(crate::Test)]
fn links_are_healed() {
    let mut split = Split::start(&["--relocate", "never"]);
    let client = split.client();
    layer(&client, "base", "", |_| ());
    for number in 2..=4 {
        client.prepare("key", "base", &[]).unwrap();
        client
            .commit("key", &format!("layer-{number}"), &[])
            .unwrap();
    }
    client.prepare("web", "base", &[]).unwrap(); // 5
    let written = split.writable().join("snapshots/5/fs/written");
    fs::write(&written, "kept").unwrap();
    split.daemon.kill();
    let snapshots = split.root().join("snapshots");
    // A missing link, a wrong one, and something else.
    for name in ["2", "3", "4"] {
        fs::remove_file(snapshots.join(name)).unwrap();
    }
    symlink("/etc", snapshots.join("3")).unwrap();
    fs::write(snapshots.join("4"), "a file").unwrap();
    // A Commit that was interrupted after its link.
    symlink(split.writable().join("snapshots/5"), snapshots.join("5")).unwrap();

    split.daemon.restart();
    let client = split.client();
    for name in ["2", "3", "4"] {
        let target = split.writable().join("snapshots").join(name);
        assert_eq!(fs::read_link(snapshots.join(name)).unwrap(), target);
    }
    assert!(snapshots.join("5").symlink_metadata().is_err());
    client.cleanup().unwrap();
    assert_eq!(fs::read_to_string(&written).unwrap(), "kept");
    assert!(Path::new("/etc/passwd").exists(), "links are not followed");
    client.mounts("web").unwrap();
    client.commit("web", "layer-5", &[]).unwrap();
    let view = client.view("view", "layer-5", &[]).unwrap();
    assert!(Mounted::new(&view).path().join("written").exists());
}

#[registered(crate::Test)]
fn lost_layers_are_reported() {
    let mut split = Split::start(&["--relocate", "never"]);
    let client = split.client();
    layer(&client, "lost", "", |top| {
        fs::write(top.join("file"), "lost").unwrap();
    });
    layer(&client, "sound", "", |_| ());
    client.prepare("key", "sound", &[]).unwrap();
    fs::write(split.writable().join("snapshots/3/fs/file"), "lost").unwrap();
    client.commit("key", "lost too", &[]).unwrap();
    layer(&client, "on the lost", "lost", |_| ());
    client.prepare("old", "on the lost", &[]).unwrap();
    split.daemon.kill();
    fs::remove_dir_all(split.root().join("snapshots/1")).unwrap();
    fs::remove_dir_all(split.writable().join("snapshots/3")).unwrap();

    split.daemon.restart();
    let log = split.daemon.log();
    for name in ["lost", "lost too"] {
        let line = format!("layer \"{name}\" is lost");
        assert!(
            log.lines()
                .any(|told| told.contains("ERROR") && told.contains(&line)),
            "{log}"
        );
        assert!(split.client().exists(name));
    }
    assert!(!log.contains("layer \"sound\" is"), "{log}");
    let client = split.client();
    for name in ["lost", "lost too", "on the lost"] {
        for refused in [
            client.prepare("new", name, &[]),
            client.prepare("extract-new", name, &[]),
            client.view("new", name, &[]),
        ] {
            let (code, text) = refused.unwrap_err();
            assert_eq!(code, RpcStatusCode::DATA_LOSS, "{text}");
        }
        assert!(!client.exists("new") && !client.exists("extract-new"));
    }
    // Repeated, because the kernel then has the answers in memory.
    for _ in 0..3 {
        let (code, text) = client.mounts("old").unwrap_err();
        assert_eq!(code, RpcStatusCode::DATA_LOSS, "{text}");
    }
    client.prepare("web", "sound", &[]).unwrap();
    // The remedy that the log names.
    client.remove("old").unwrap();
    client.remove("on the lost").unwrap();
    client.remove("lost").unwrap();
    client.remove("lost too").unwrap();
    layer(&client, "lost", "", |_| ());
    client.prepare("other", "lost", &[]).unwrap();
    client.cleanup().unwrap();
}

/// Names, owners and modes of empty files are content. A layer that holds nothing else, and
/// is lost, is not replaced by an empty one.
#[registered(crate::Test)]
fn a_lost_layer_of_directories_is_named() {
    let mut split = Split::start(&["--relocate", "never"]);
    let client = split.client();
    let fill = |top: &Path| fs::create_dir_all(top.join("srv/data")).unwrap();
    layer(&client, "unpacked-init", "", fill);
    fill(Path::new(
        &client.prepare("web", "", &[]).unwrap()[0].source,
    ));
    client.commit("web", "committed", &[]).unwrap();
    split.daemon.stop();
    fs::remove_dir_all(split.root().join("snapshots/1")).unwrap();
    fs::remove_dir_all(split.writable().join("snapshots/2")).unwrap();
    split.daemon.restart();
    assert_eq!(split.daemon.log().matches("is lost").count(), 2);
    split.daemon.stop();
    let (code, said, _) = check(&split, &["--json"]);
    assert_eq!(code, 1);
    assert_eq!(said.matches("\"layer-missing\"").count(), 2, "{said}");
}

/// The directory of an unpack gets the owner of the layer below it, which may be on the
/// writable volume.
#[registered(crate::Test)]
fn the_directory_of_an_unpack_on_an_unmoved_layer_is_made_again() {
    let mut split = Split::start(&["--relocate", "never"]);
    let client = split.client();
    layer(&client, "base", "", |top| {
        fs::write(top.join("file"), "base").unwrap();
    });
    client.prepare("web", "base", &[]).unwrap();
    client.commit("web", "unmoved", &[]).unwrap();
    let mounts = client.prepare("default/1/extract-1 x", "unmoved", &[]);
    let upper = upper_of(&mounts.unwrap());
    split.daemon.kill();
    fs::remove_dir_all(upper.parent().unwrap()).unwrap();
    split.daemon.restart();
    assert!(upper.is_dir());
    assert!(!split.daemon.log().contains("has no directory"));
}
