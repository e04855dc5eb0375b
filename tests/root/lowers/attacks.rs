//! Labels that ask for forbidden directories. Each is refused as the caller's
//! mistake, and nothing is created anywhere.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use grpcio::RpcStatusCode;
use registered::registered;
use rustix::fs::{CWD, RenameFlags, renameat_with};

use super::{LABEL, Scene};
use crate::content::layer;
use crate::support::containerd::AtEnd;
use crate::support::daemon::{Daemon, Split, command};
use crate::support::{run, tree, unchanged};

/// Fails unless a label with this value is refused in every call that takes
/// one, for the given reason.
#[track_caller]
fn refused(scene: &Scene, value: &str, why: &str) {
    let client = scene.client();
    let with = [(LABEL, value)];
    let mask = format!("labels.{LABEL}");
    let calls = [
        client.prepare("refused", "base", &with).map(drop),
        client.prepare("refused", "", &with).map(drop),
        client.view("refused", "base", &with).map(drop),
        client.view("refused", "", &with).map(drop),
        client.update("there", &[&mask], &with).map(drop),
    ];
    for (number, call) in calls.into_iter().enumerate() {
        let (code, said) = call.expect_err(value);
        assert_eq!(code, RpcStatusCode::INVALID_ARGUMENT, "{number}: {said}");
        assert!(said.contains(why), "{number}: {value:?}: {said}");
        assert_eq!(said.lines().count(), 1, "{said}");
    }
}

#[registered(crate::Test)]
fn what_could_inject_or_lead_out_is_refused() {
    let scene = Scene::start(&[]);
    let client = scene.client();
    let good = scene.fill("good", &[]);
    client.prepare("there", "base", &[]).unwrap();
    // One request of each kind, so that the database has its pages.
    client.prepare("used", "base", &[(LABEL, &good)]).unwrap();
    let outside = scene.host.path().join("outside");
    fs::create_dir(&outside).unwrap();
    let outside = outside.to_str().unwrap();
    let link = |name: &str, target: &str| symlink(target, scene.at(name)).unwrap();
    link("up", "../outside");
    link("away", outside);
    link("top", "/");
    link("loop", "loop");
    link("dangling", "/nowhere/at/all");
    link("through", "good/../../outside");
    link("magic", "/proc/self/root");
    link("self", "/proc/self/cwd");
    fs::write(scene.at("file"), "").unwrap();
    fs::create_dir(format!("{}x", scene.host.path().join("cache").display())).unwrap();
    let host = tree(scene.host.path());
    let everything = tree(scene.split.root().join("snapshots"));
    let links = scene.links();

    let injected = "mean something in mount options";
    for sign in [
        ",", "\\", "\n", "\r", "\t", "\0", "\u{1b}", "\u{7f}", "\u{85}",
    ] {
        refused(&scene, &scene.at(&format!("new{sign}x")), injected);
    }
    let option = scene.at("new,upperdir=/etc,workdir=/var");
    refused(&scene, &option, injected);
    refused(&scene, &scene.at("new\\,upperdir=/etc"), injected);
    // A colon always begins another path.
    refused(&scene, &scene.at("new\\:/etc"), injected);
    refused(&scene, &format!("{}:etc", scene.at("new")), "not absolute");
    refused(
        &scene,
        &format!("{}:/etc", scene.at("new")),
        "--allow-lower",
    );
    refused(&scene, &scene.at("new/../../outside"), "..");
    refused(&scene, &scene.at(".."), "..");
    for relative in ["cache", "./cache", "~", " /", "../cache"] {
        refused(&scene, relative, "not absolute");
    }
    for path in [
        "/etc",
        "/nowhere",
        "/proc/self/root",
        outside,
        &scene.at("")[..2],
    ] {
        refused(&scene, path, "--allow-lower");
    }
    refused(&scene, "/", "root of all file systems");
    let beside = format!("{}x", scene.host.path().join("cache").display());
    refused(&scene, &beside, "--allow-lower");
    for name in [
        "up",
        "up/new",
        "away",
        "away/new",
        "top",
        "top/tmp",
        "top/new",
        "dangling",
        "through",
        "through/new",
        "magic",
        "magic/tmp",
        "self",
    ] {
        refused(&scene, &scene.at(name), "leads out");
    }
    refused(&scene, &scene.at("loop"), "too many links");
    refused(&scene, &scene.at("loop/new"), "too many links");
    refused(&scene, &scene.at("file"), "not a directory");
    refused(&scene, &scene.at("file/new"), "not a directory");
    refused(&scene, &scene.at(&"n".repeat(256)), "too long");
    let cache = scene.at("");
    refused(&scene, &format!("{good}:{cache}"), "holds the other");
    refused(
        &scene,
        &format!("{good}/new:{good}/new/in"),
        "holds the other",
    );
    refused(&scene, &"/a:".repeat(1000), "at most 32");
    refused(&scene, &"/".repeat(5000), "at most 4096");
    // The allowed path among the forbidden ones is not created either.
    refused(
        &scene,
        &format!("{}:{}", scene.at("new"), scene.at("up")),
        "leads out",
    );

    unchanged(scene.host.path(), &host);
    unchanged(scene.split.root().join("snapshots"), &everything);
    assert_eq!(scene.links(), links);
    let names: Vec<_> = client
        .list_pages(&[])
        .unwrap()
        .concat()
        .into_iter()
        .map(|info| info.name)
        .collect();
    assert_eq!(names, ["base", "there", "used"]);
    assert_eq!(client.stat("there").unwrap().labels.len(), 0);
}

#[registered(crate::Test)]
fn the_snapshotters_own_directories_are_refused() {
    let split = Split::start(&[]);
    let (image, writable) = (split.image.text(), split.writable.text());
    drop(split.daemon);
    let other = tempfile::tempdir().unwrap();
    let other_path = other.path().to_str().unwrap();
    let state = format!("{other_path}/state");
    let flags = [
        "--allow-lower",
        &image,
        "--allow-lower",
        &writable,
        "--allow-lower",
        other_path,
        "--state-dir",
        &state,
    ];
    fs::create_dir(&state).unwrap();
    let moved = format!("{image}/root");
    // A root within the allowed directory, as an administrator may configure by
    // mistake.
    fs::remove_dir_all(&moved).unwrap();
    fs::remove_dir_all(split.writable.path().join("writable")).unwrap();
    let arguments = command(&split.image, &split.writable, &flags);
    let split = Split {
        daemon: Daemon::start(&arguments),
        ..split
    };
    let client = split.client();
    layer(&client, "base", "", |_| {});
    client.prepare("there", "base", &[]).unwrap();
    let scene = Scene {
        split,
        host: tempfile::tempdir().unwrap(),
    };
    let root = scene.split.root().display().to_string();
    let upper = scene.split.writable().display().to_string();
    fs::create_dir_all(format!("{other_path}/in/root")).unwrap();
    fs::create_dir_all(format!("{other_path}/in/upper")).unwrap();
    // Other names: a link, and bind mounts of a directory and of one in it.
    symlink("root/snapshots/1", format!("{image}/alias")).unwrap();
    let bind = |from: &str, to: &str| {
        run(Command::new("mount").args(["--bind", from, to]));
        let to = to.to_owned();
        AtEnd(move || {
            let _ = Command::new("umount").args(["-l", &to]).status();
        })
    };
    let _root = bind(&root, &format!("{other_path}/in/root"));
    let _upper = bind(
        &format!("{upper}/snapshots/2/fs"),
        &format!("{other_path}/in/upper"),
    );
    let before = [tree(&root), tree(&upper)].map(|tree| tree.len());
    for path in [
        image.clone(),
        root.clone(),
        format!("{root}/lowers"),
        format!("{root}/empty"),
        format!("{root}/new"),
        format!("{root}/snapshots/1/fs"),
        format!("{image}/alias/fs"),
        writable.clone(),
        upper.clone(),
        format!("{upper}/snapshots/2/fs"),
        format!("{upper}/new/deep"),
        state.clone(),
        format!("{state}/new"),
        other_path.to_owned(),
        format!("{other_path}/in/root"),
        format!("{other_path}/in/root/snapshots/1/fs"),
        format!("{other_path}/in/root/new"),
        format!("{other_path}/in/upper"),
        format!("{other_path}/in/upper/new"),
    ] {
        refused(&scene, &path, "its own data");
    }
    assert_eq!([tree(&root), tree(&upper)].map(|tree| tree.len()), before);
    // A directory beside them belongs to another user.
    let beside = format!("{image}/beside/deep:{other_path}/in/beside");
    client
        .prepare("beside", "base", &[(LABEL, &beside)])
        .unwrap();
    assert!(Path::new(&format!("{image}/beside/deep")).is_dir());
}

/// A directory and a link out of it change places as fast as possible. The
/// answer is the directory or a refusal, and nothing is ever created outside,
/// not even for a moment.
#[registered(crate::Test)]
fn links_swapped_meanwhile_lead_nowhere() {
    let scene = Scene::start(&[]);
    scene.fill("real/sub", &[]);
    let outside = scene.host.path().join("outside");
    fs::create_dir_all(outside.join("sub")).unwrap();
    let changed = || {
        [outside.clone(), outside.join("sub")]
            .map(|path| fs::metadata(path).unwrap().modified().unwrap())
    };
    let before = changed();
    let name = format!("made-by-{}", std::process::id());
    for target in [Path::new("/"), &outside] {
        symlink(target, scene.at("evil")).unwrap();
        prepare_while_swapping(&scene, &name);
        let evil = ["evil", "real"].map(|name| scene.at(name));
        let link = evil
            .iter()
            .find(|path| fs::read_link(path).is_ok())
            .unwrap();
        fs::remove_file(link).unwrap();
        if link.ends_with("real") {
            fs::rename(scene.at("evil"), scene.at("real")).unwrap();
        }
    }
    assert_eq!(changed(), before);
    assert!(!Path::new("/").join(&name).exists());
    assert!(scene.links().is_empty());
}

fn prepare_while_swapping(scene: &Scene, name: &str) {
    let client = scene.client();
    let stop = AtomicBool::new(false);
    let (mut accepted, mut refused) = (0, 0);
    thread::scope(|scope| {
        let swapper = scope.spawn(|| {
            let mut swaps = 0_u64;
            while !stop.load(Ordering::Relaxed) {
                let flags = RenameFlags::EXCHANGE;
                renameat_with(CWD, scene.at("real"), CWD, scene.at("evil"), flags).unwrap();
                swaps += 1;
            }
            swaps
        });
        // Also runs if an assertion fails.
        let _stop = AtEnd(|| stop.store(true, Ordering::Relaxed));
        let cache = fs::canonicalize(scene.host.path().join("cache")).unwrap();
        for number in 0..450 {
            let key = format!("key-{number}");
            let path = match number % 3 {
                0 => format!("real/{name}/{number}"),
                1 => "real".to_owned(),
                _ => format!("real/sub/{number}"),
            };
            match client.prepare(&key, "base", &[(LABEL, &scene.at(&path))]) {
                Ok(_) => {
                    let links = scene.links();
                    assert_eq!(links.len(), 1);
                    let link = scene.split.root().join("lowers").join(&links[0]);
                    let target = fs::read_link(link).unwrap();
                    assert!(target.starts_with(&cache), "{}", target.display());
                    accepted += 1;
                    client.remove(&key).unwrap();
                }
                Err((code, said)) => {
                    // The directory may also be found to have moved during a
                    // look.
                    let expected = [RpcStatusCode::INVALID_ARGUMENT, RpcStatusCode::UNAVAILABLE];
                    assert!(expected.contains(&code), "{said}");
                    refused += 1;
                }
            }
        }
        stop.store(true, Ordering::Relaxed);
        assert!(swapper.join().unwrap() > 1000);
    });
    assert!(accepted > 0 && refused > 0, "{accepted} {refused}");
}

#[registered(crate::Test)]
fn refused_requests_leave_no_directory() {
    let scene = Scene::start(&[]);
    let client = scene.client();
    client.prepare("taken", "base", &[]).unwrap();
    let host = tree(scene.host.path());
    let asked = scene.at("new/deep");
    let with = [(LABEL, asked.as_str())];
    for (key, parent, expected) in [
        ("taken", "base", RpcStatusCode::ALREADY_EXISTS),
        ("new", "missing", RpcStatusCode::NOT_FOUND),
        ("new", "taken", RpcStatusCode::INVALID_ARGUMENT),
    ] {
        let (code, said) = client.prepare(key, parent, &with).unwrap_err();
        assert_eq!(code, expected, "{said}");
    }
    client
        .update("taken", &[&format!("labels.{LABEL}")], &with)
        .unwrap();
    unchanged(scene.host.path(), &host);
    assert!(scene.links().is_empty());
    client.mounts("taken").unwrap();
    assert!(Path::new(&asked).is_dir());
}

#[registered(crate::Test)]
fn directories_deeper_than_the_daemon_holds_open_are_refused() {
    let scene = Scene::start(&[]);
    let client = scene.client();
    client.prepare("there", "base", &[]).unwrap();
    let deep = |name: &str, levels: usize| scene.at(&vec![name; levels].join("/"));
    fs::create_dir_all(deep("made", 65)).unwrap();
    symlink(deep("made", 64), scene.at("link")).unwrap();
    let host = tree(scene.host.path());
    let why = "64 directories";
    refused(&scene, &deep("made", 65), why);
    refused(&scene, &deep("new", 65), why);
    refused(&scene, &scene.at("link/made"), why);
    // Both together.
    let two = format!("{}:{}", deep("one", 33), deep("two", 32));
    refused(&scene, &two, why);
    unchanged(scene.host.path(), &host);
    let most = format!("{}:{}", deep("made", 64), deep("new", 64));
    client.prepare("used", "base", &[(LABEL, &most)]).unwrap();
}
