//! Host directories beneath what a container writes: what containers see of
//! them, which are refused, and the links that lead to them.

mod attacks;
mod images;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use grpcio::RpcStatusCode;
use registered::registered;

use crate::check::is_clean;
use crate::content::layer;
use crate::support::client::Client;
use crate::support::daemon::{Split, command};
use crate::support::mounted::Mounted;
use crate::support::{tree, unchanged};

const LABEL: &str = "containerd.io/snapshot/overlay-custom-add-lower.paths";

/// A daemon that allows the host directory `cache`, and has a layer `base`.
struct Scene {
    split: Split,
    host: tempfile::TempDir,
}

impl Scene {
    fn start(flags: &[&str]) -> Scene {
        let host = tempfile::tempdir().unwrap();
        fs::create_dir(host.path().join("cache")).unwrap();
        let allowed = host.path().join("cache");
        let flags = [&["--allow-lower", allowed.to_str().unwrap()], flags].concat();
        let split = Split::start(&flags);
        layer(&split.client(), "base", "", |top| {
            fs::write(top.join("from-image"), "image").unwrap();
            fs::write(top.join("both"), "image").unwrap();
        });
        Scene { split, host }
    }

    fn client(&self) -> Client {
        self.split.client()
    }

    /// A path in the allowed directory, as text.
    fn at(&self, name: &str) -> String {
        let path = self.host.path().join("cache").join(name);
        path.to_str().unwrap().to_owned()
    }

    /// Makes a host directory with these files.
    fn fill(&self, name: &str, files: &[(&str, &str)]) -> String {
        let path = self.at(name);
        fs::create_dir_all(&path).unwrap();
        for (file, content) in files {
            fs::write(Path::new(&path).join(file), content).unwrap();
        }
        path
    }

    /// The names of all links.
    fn links(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.split.root().join("lowers")) else {
            return Vec::new();
        };
        let name = |entry: std::io::Result<fs::DirEntry>| {
            entry.unwrap().file_name().into_string().unwrap()
        };
        let mut names: Vec<_> = entries.map(name).collect();
        names.sort();
        names
    }
}

fn read(path: PathBuf) -> String {
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[registered(crate::Test)]
fn containers_see_host_directories_and_leave_them_alone() {
    let scene = Scene::start(&[]);
    let client = scene.client();
    let top = scene.fill("top", &[("both", "top"), ("one", "top"), ("deleted", "x")]);
    let under = scene.fill("under", &[("one", "under"), ("two", "under")]);
    fs::create_dir(format!("{under}/dir")).unwrap();
    fs::write(format!("{under}/dir/file"), "host").unwrap();
    let host = tree(scene.host.path());

    let asked = format!(":{top}::{under}/:{}/new/deep:", scene.at("made"));
    let mounts = client.prepare("web", "base", &[(LABEL, &asked)]).unwrap();
    assert_eq!(client.mounts("web").unwrap(), mounts);
    // The missing directory was created, with its parents, 0755.
    for name in ["made", "made/new", "made/new/deep"] {
        let mode = fs::metadata(scene.at(name)).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o755, "{name}");
    }
    fs::remove_dir_all(scene.at("made")).unwrap();
    let web = Mounted::new(&client.mounts("web").unwrap());
    assert!(Path::new(&scene.at("made/new/deep")).is_dir(), "made again");
    fs::remove_dir_all(scene.at("made")).unwrap();

    let at = |name: &str| web.path().join(name);
    assert_eq!(read(at("from-image")), "image");
    assert_eq!(read(at("both")), "top", "above the image");
    assert_eq!(read(at("one")), "top", "the first is the topmost");
    assert_eq!(read(at("two")), "under");
    assert_eq!(read(at("dir/file")), "host");
    fs::write(at("one"), "changed").unwrap();
    fs::write(at("dir/file"), "changed").unwrap();
    fs::write(at("dir/new"), "new").unwrap();
    fs::remove_file(at("deleted")).unwrap();
    fs::set_permissions(at("two"), fs::Permissions::from_mode(0o600)).unwrap();
    assert!(!at("deleted").exists());
    unchanged(scene.host.path(), &host);
    let upper = scene.split.writable().join("snapshots/2/fs");
    assert_eq!(read(upper.join("dir/new")), "new");

    // Another container starts with what the host has, and sees its changes.
    let asked = format!("{top}:{under}");
    let mounts = client.prepare("next", "base", &[(LABEL, &asked)]).unwrap();
    let next = Mounted::new(&mounts);
    assert_eq!(read(next.path().join("deleted")), "x");
    assert_eq!(read(next.path().join("dir/file")), "host");
    fs::write(format!("{under}/later"), "later").unwrap();
    for mounted in [&web, &next] {
        assert_eq!(read(mounted.path().join("later")), "later");
    }
    // A container without the label does not see the directories.
    let plain = Mounted::new(&client.prepare("plain", "base", &[]).unwrap());
    assert_eq!(read(plain.path().join("both")), "image");
    assert!(!plain.path().join("two").exists());
}

#[registered(crate::Test)]
fn snapshots_of_every_shape_get_them() {
    let scene = Scene::start(&[]);
    let client = scene.client();
    layer(&client, "second", "base", |top| {
        fs::write(top.join("second"), "").unwrap();
    });
    let extra = scene.fill("extra", &[("both", "host"), ("extra", "")]);
    let with = [(LABEL, extra.as_str())];
    for (key, parent, image) in [
        ("on-nothing", "", 0),
        ("on-one", "base", 1),
        ("on-two", "second", 2),
    ] {
        for is_view in [false, true] {
            let key = format!("{key}-{is_view}");
            let mounts = match is_view {
                true => client.view(&key, parent, &with),
                false => client.prepare(&key, parent, &with),
            };
            let mounts = mounts.unwrap();
            assert_eq!(mounts[0].type_, "overlay", "{key}");
            assert_eq!(client.mounts(&key).unwrap(), mounts);
            let mounted = Mounted::new(&mounts);
            assert_eq!(read(mounted.path().join("both")), "host", "{key}");
            assert_eq!(mounted.path().join("from-image").exists(), image > 0);
            assert_eq!(mounted.path().join("second").exists(), image > 1);
            let written = fs::write(mounted.path().join("written"), "");
            assert_eq!(written.is_ok(), !is_view, "{key}");
        }
    }
    assert!(!Path::new(&format!("{extra}/written")).exists());
}

#[registered(crate::Test)]
fn a_changed_label_counts_at_the_next_mount() {
    let scene = Scene::start(&[]);
    let client = scene.client();
    let one = scene.fill("one", &[("name", "one")]);
    let two = scene.fill("two", &[("name", "two")]);
    let both = format!("{two}:{one}");
    let mask = format!("labels.{LABEL}");
    let name = || {
        let mounted = Mounted::new(&client.mounts("web").unwrap());
        fs::read_to_string(mounted.path().join("name")).ok()
    };
    client.prepare("web", "base", &[]).unwrap();
    assert_eq!(name(), None);
    for (asked, expected, links) in [
        (one.as_str(), Some("one"), 1),
        (&both, Some("two"), 2),
        (&one, Some("one"), 1),
        ("", None, 0),
        (&both, Some("two"), 2),
    ] {
        client.update("web", &[&mask], &[(LABEL, asked)]).unwrap();
        assert_eq!(name().as_deref(), expected, "{asked}");
        assert_eq!(scene.links().len(), links, "{asked}");
    }
    // An unusable label is refused, and nothing of it stays.
    let before = client.stat("web").unwrap();
    let everything = tree(scene.host.path());
    let outside = scene.host.path().join("outside").display().to_string();
    for wrong in [
        "relative",
        "/a,b",
        "/",
        &outside,
        &format!("{one}:{one}/in"),
    ] {
        for mask in [&[mask.as_str()][..], &["labels"], &[]] {
            let (code, _) = client.update("web", mask, &[(LABEL, wrong)]).unwrap_err();
            assert_eq!(code, RpcStatusCode::INVALID_ARGUMENT, "{wrong}");
        }
    }
    assert_eq!(client.stat("web").unwrap(), before);
    unchanged(scene.host.path(), &everything);
    assert_eq!(name().as_deref(), Some("two"));

    // Once stored, a label blocks no change of other labels, and neither does
    // what is at its path later.
    fs::remove_dir_all(&two).unwrap();
    fs::write(&two, "").unwrap();
    client
        .update("web", &["labels.other"], &[("other", "1")])
        .unwrap();
    let (code, said) = client.mounts("web").unwrap_err();
    assert_eq!(code, RpcStatusCode::INVALID_ARGUMENT, "{said}");
    assert!(said.contains(&two), "{said}");
    client.remove("web").unwrap();
    assert!(scene.links().is_empty());
}

#[registered(crate::Test)]
fn links_go_with_their_snapshot() {
    let scene = Scene::start(&[]);
    let client = scene.client();
    assert!(
        !scene.split.root().join("lowers").exists(),
        "not before its use"
    );
    let one = scene.fill("one", &[]);
    let both = format!("{one}:{}", scene.fill("two", &[]));
    client.prepare("a", "base", &[(LABEL, &one)]).unwrap();
    client.prepare("b", "base", &[(LABEL, &both)]).unwrap();
    client.view("c", "base", &[(LABEL, &one)]).unwrap();
    client.prepare("plain", "base", &[]).unwrap();
    assert_eq!(scene.links(), ["2.0", "3.0", "3.1", "4.0"]);
    let target = fs::read_link(scene.split.root().join("lowers/3.0")).unwrap();
    assert_eq!(target, fs::canonicalize(&one).unwrap());
    client.remove("plain").unwrap();
    client.remove("a").unwrap();
    assert_eq!(scene.links(), ["3.0", "3.1", "4.0"]);
    client.commit("b", "layer", &[]).unwrap();
    assert_eq!(
        scene.links(),
        ["4.0"],
        "a layer is what was written, and no more"
    );
    client.remove("c").unwrap();
    assert!(scene.links().is_empty());
    client.prepare("on-layer", "layer", &[]).unwrap();
    assert!(scene.links().is_empty());
    is_clean(&scene.split);
}

#[registered(crate::Test)]
fn stale_links_are_swept_at_start() {
    let mut scene = Scene::start(&[]);
    let client = scene.client();
    let one = scene.fill("one", &[("name", "one")]);
    for key in ["kept", "removed"] {
        client.prepare(key, "base", &[(LABEL, &one)]).unwrap();
    }
    let mounts = client.mounts("kept").unwrap();
    let kept = scene.links()[0].clone();
    client.remove("removed").unwrap();
    scene.split.daemon.kill();
    let lowers = scene.split.root().join("lowers");
    // Links as a kill may leave them: of removed snapshots, of one that was
    // never entered, of a layer, and one before its rename.
    for stale in ["3.0", "3.1", "900.0", "1.0", ".new"] {
        std::os::unix::fs::symlink("/nowhere", lowers.join(stale)).unwrap();
    }
    fs::write(lowers.join("not ours"), "").unwrap();
    scene.split.daemon.restart();
    assert_eq!(scene.links(), [kept.clone(), "not ours".to_owned()]);
    is_clean(&scene.split);
    // Mounts that were returned before the kill still work.
    assert_eq!(read(Mounted::new(&mounts).path().join("name")), "one");
    // A missing or wrong link is corrected when the mounts are requested.
    scene.split.daemon.kill();
    fs::remove_file(lowers.join(&kept)).unwrap();
    scene.split.daemon.restart();
    let client = scene.client();
    for _ in 0..2 {
        let mounted = Mounted::new(&client.mounts("kept").unwrap());
        assert_eq!(read(mounted.path().join("name")), "one");
        fs::remove_file(lowers.join(&kept)).unwrap();
        std::os::unix::fs::symlink("/", lowers.join(&kept)).unwrap();
    }

    // The daemon is killed while snapshots come and go.
    for _ in 0..5 {
        let client = scene.client();
        let asked = format!("{one}:{}", scene.at("two"));
        let busy = std::thread::spawn(move || {
            for number in 0.. {
                let key = format!("busy-{number}");
                if client.prepare(&key, "base", &[(LABEL, &asked)]).is_err()
                    || client.remove(&key).is_err()
                {
                    return;
                }
            }
        });
        std::thread::sleep(std::time::Duration::from_millis(70));
        scene.split.daemon.kill();
        busy.join().unwrap();
        scene.split.daemon.restart();
        let client = scene.client();
        client.mounts("kept").unwrap();
        for info in client.list_pages(&[]).unwrap().concat() {
            if info.name.starts_with("busy-") {
                client.remove(&info.name).unwrap();
            }
        }
        assert_eq!(scene.links(), [kept.clone(), "not ours".to_owned()]);
    }
    is_clean(&scene.split);
}

#[registered(crate::Test)]
fn many_layers_and_directories_mount() {
    let mut scene = Scene::start(&[]);
    scene.split.restart_at_far_ids();
    let client = scene.client();
    let mut parent = "base".to_owned();
    for number in 2..=128 {
        let name = format!("layer-{number}");
        layer(&client, &name, &parent, |top| {
            fs::write(top.join(&name), "").unwrap();
        });
        parent = name;
    }
    let asked: Vec<_> = (0..8)
        .map(|number| {
            let name = format!("{}-{number}", "long".repeat(60));
            scene.fill(&name, &[(&format!("extra-{number}"), "")])
        })
        .collect();
    let mounts = client
        .prepare("web", &parent, &[(LABEL, &asked.join(":"))])
        .unwrap();
    let mounted = Mounted::new(&mounts);
    let names = fs::read_dir(mounted.path()).unwrap().count();
    assert_eq!(names, 2 + 127 + 8);
}

#[registered(crate::Test)]
fn what_is_not_allowed_any_more_is_not_shown() {
    let mut scene = Scene::start(&[]);
    let one = scene.fill("one", &[]);
    let client = scene.client();
    client.prepare("web", "base", &[(LABEL, &one)]).unwrap();
    client.prepare("plain", "base", &[]).unwrap();
    scene.split.daemon.stop();
    let arguments = command(&scene.split.image, &scene.split.writable, &[]);
    scene.split.daemon.set_arguments(arguments);
    scene.split.daemon.restart();
    let client = scene.client();
    let (code, said) = client.mounts("web").unwrap_err();
    assert_eq!(code, RpcStatusCode::INVALID_ARGUMENT);
    assert!(said.contains("--allow-lower"), "{said}");
    let (code, said) = client.prepare("new", "base", &[(LABEL, &one)]).unwrap_err();
    assert_eq!(code, RpcStatusCode::INVALID_ARGUMENT);
    assert!(said.contains("--allow-lower"), "{said}");
    client.mounts("plain").unwrap();
    client.usage("web").unwrap();
    client.remove("web").unwrap();
    assert!(scene.links().is_empty());
}

#[registered(crate::Test)]
fn nothing_is_baked_into_a_layer() {
    let scene = Scene::start(&[]);
    let client = scene.client();
    let one = scene.fill("one", &[]);
    let reference = ("containerd.io/snapshot.ref", "sha256:1");
    for (key, with) in [
        ("1/extract-1 sha256:1", &[(LABEL, one.as_str())][..]),
        ("1/web", &[(LABEL, &one), reference]),
    ] {
        for parent in ["", "base"] {
            let key = format!("{key} on {parent:?}");
            let mounts = client.prepare(&key, parent, with).unwrap();
            assert!(!format!("{mounts:?}").contains("lowers/"), "{mounts:?}");
        }
    }
    client.prepare("1/extract-2", "base", &[]).unwrap();
    let mask = format!("labels.{LABEL}");
    let (code, _) = client
        .update("1/extract-2", &[&mask], &[(LABEL, &one)])
        .unwrap_err();
    assert_eq!(code, RpcStatusCode::FAILED_PRECONDITION);
    // On a layer the label has no meaning, and is not stored.
    client
        .commit("1/extract-2", "layer", &[(LABEL, "/a,b")])
        .unwrap();
    assert!(client.stat("layer").unwrap().labels.is_empty());
    let mounts = client.prepare("web", "layer", &[]).unwrap();
    assert!(!format!("{mounts:?}").contains("lowers/"), "{mounts:?}");
    assert!(scene.links().is_empty());
}

#[registered(crate::Test)]
fn mapped_ids_and_host_directories_exclude_each_other() {
    let scene = Scene::start(&[]);
    let client = scene.client();
    let one = scene.fill("one", &[]);
    let ids = [
        ("containerd.io/snapshot/uidmapping", "0:1000:65536"),
        ("containerd.io/snapshot/gidmapping", "0:1000:65536"),
    ];
    let with = [&ids[..], &[(LABEL, &one)]].concat();
    let (code, said) = client.prepare("both", "base", &with).unwrap_err();
    assert_eq!(code, RpcStatusCode::INVALID_ARGUMENT);
    assert!(said.contains("mapped ids"), "{said}");
    client.prepare("lower", "base", &[(LABEL, &one)]).unwrap();
    let masks = ids.map(|(label, _)| format!("labels.{label}"));
    let masks: Vec<_> = masks.iter().map(String::as_str).collect();
    let (code, _) = client.update("lower", &masks, &ids).unwrap_err();
    assert_eq!(code, RpcStatusCode::INVALID_ARGUMENT);
    client.mounts("lower").unwrap();
}
