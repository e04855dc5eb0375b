//! Foreign files in the places of the daemon's own directories: they are moved
//! away, and never used or followed.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use grpcio::RpcStatusCode;
use registered::registered;

use crate::content::layer;
use crate::input::{refused_as, unharmed};
use crate::support::daemon::{Split, is_empty, refused};
use crate::support::mounted::Mounted;
use crate::support::{Tree, tree, unchanged};

/// A directory that looks like a snapshot's, and must not change.
struct Victim {
    path: PathBuf,
    before: Tree,
}

impl Victim {
    fn below(top: &Path) -> Victim {
        let path = top.join("victim");
        for name in ["fs/below", "work", "1/fs", "2/fs", "3/fs"] {
            fs::create_dir_all(path.join(name)).unwrap();
        }
        fs::write(path.join("fs/secret"), "not ours").unwrap();
        let before = tree(&path);
        Victim { path, before }
    }

    #[track_caller]
    fn is_untouched(&self) {
        unchanged(&self.path, &self.before);
    }
}

/// Creates something at a path.
type Put<'a> = Box<dyn Fn(&Path) + 'a>;

fn intruders(victim: &Victim) -> [Put<'_>; 5] {
    [
        Box::new(|path| fs::write(path, "a file").unwrap()),
        Box::new(|path| symlink("/etc", path).unwrap()),
        Box::new(|path| symlink(&victim.path, path).unwrap()),
        Box::new(|path| symlink("nowhere", path).unwrap()),
        Box::new(|path| {
            fs::create_dir_all(path.join("fs/etc")).unwrap();
            fs::write(path.join("fs/etc/passwd"), "intruder").unwrap();
            fs::create_dir(path.join("work")).unwrap();
            symlink(&victim.path, path.join("fs/link")).unwrap();
        }),
    ]
}

#[registered(crate::Test)]
fn at_the_next_id() {
    let mut split = Split::start(&["--sync", "none"]);
    let pid = split.daemon.pid();
    let client = split.client();
    let victim = Victim::below(split.image.path().as_path());
    let etc = fs::read_dir("/etc").unwrap().count();
    let mut next = 1;
    let mut left = BTreeMap::new();
    for put in intruders(&victim) {
        for (volume, key) in [
            (split.writable(), "web"),
            (split.root(), "extract-1"),
            (split.root(), "view"),
        ] {
            let path = volume.join(format!("snapshots/{next}"));
            put(&path);
            *left.entry(volume.clone()).or_insert(0) += 1;
            // The next id is used: what is there belongs to no snapshot, and is no
            // trash.
            let path = volume.join(format!("snapshots/{}", next + 1));
            let mounts = match key {
                "view" => client.view(key, "", &[]),
                _ => client.prepare(key, "", &[]),
            }
            .unwrap();
            let top = fs::symlink_metadata(&path).unwrap();
            assert!(top.is_dir(), "{}", path.display());
            assert!(is_empty(path.join("fs")));
            let mounted = Mounted::new(&mounts);
            assert!(is_empty(mounted.path()));
            if key != "view" {
                fs::write(mounted.path().join("file"), "x").unwrap();
            }
            drop(mounted);
            client.remove(key).unwrap();
            next += 2;
        }
    }
    client.cleanup().unwrap();
    for (volume, left) in left {
        let set_aside = fs::read_dir(volume.join("left-out")).unwrap().count();
        assert_eq!(set_aside, left, "{}", volume.display());
        assert!(is_empty(volume.join("snapshots")) && is_empty(volume.join("trash")));
    }
    victim.is_untouched();
    assert_eq!(fs::read_dir("/etc").unwrap().count(), etc);
    unharmed(&mut split, pid);
}

#[registered(crate::Test)]
fn where_a_commit_links() {
    let mut split = Split::start(&["--sync", "none", "--relocate", "never"]);
    let pid = split.daemon.pid();
    let client = split.client();
    let victim = Victim::below(split.image.path().as_path());
    for (number, put) in intruders(&victim).into_iter().enumerate() {
        // A view uses an id, but no directory.
        let id = 2 * number + 1;
        let mounts = client.prepare("key", "", &[]).unwrap();
        fs::write(Mounted::new(&mounts).path().join("own"), "x").unwrap();
        let link = split.root().join(format!("snapshots/{id}"));
        put(&link);
        // A refused commit leaves the entry as it is, or removes it, but leaves
        // no link.
        refused_as(
            client.commit_onto("key", "layer", "nobody", &[]),
            RpcStatusCode::NOT_FOUND,
        );
        client.commit("key", &format!("layer-{id}"), &[]).unwrap();
        let target = split.writable().join(format!("snapshots/{id}"));
        assert_eq!(fs::read_link(&link).unwrap(), target);
        client.view("view", &format!("layer-{id}"), &[]).unwrap();
        let mounted = Mounted::new(&client.mounts("view").unwrap());
        let names: Vec<_> = fs::read_dir(mounted.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert_eq!(names, ["own"]);
        drop(mounted);
        client.remove("view").unwrap();
        client.remove(&format!("layer-{id}")).unwrap();
        assert!(fs::symlink_metadata(&link).is_err());
    }
    client.cleanup().unwrap();
    victim.is_untouched();
    unharmed(&mut split, pid);
}

#[registered(crate::Test)]
fn instead_of_snapshots() {
    let mut split = Split::start(&["--sync", "none"]);
    let pid = split.daemon.pid();
    let client = split.client();
    layer(&client, "base", "", |_| ());
    client.prepare("web", "base", &[]).unwrap();
    let victim = Victim::below(split.image.path().as_path());
    let code = RpcStatusCode::FAILED_PRECONDITION;
    for name in ["snapshots", "trash"] {
        let (own, aside) = (split.writable().join(name), split.writable().join("aside"));
        fs::rename(&own, &aside).unwrap();
        for is_link in [true, false] {
            if is_link {
                symlink(&victim.path, &own).unwrap();
            } else {
                fs::write(&own, "a file").unwrap();
            }
            let mut refused = vec![client.cleanup()];
            // Only removed snapshots need the trash.
            if name == "snapshots" {
                refused.push(client.prepare("new", "base", &[]).map(drop));
                refused.push(client.commit("web", "layer", &[]));
                refused.push(client.usage("web").map(drop));
            }
            for refused in refused {
                let text = refused_as(refused, code);
                assert!(text.contains(own.to_str().unwrap()), "{text}");
            }
            fs::remove_file(&own).unwrap();
        }
        fs::rename(&aside, &own).unwrap();
        client.usage("web").unwrap();
    }
    assert_eq!(client.names(&[]).unwrap(), ["base", "web"]);
    // The mark: a link to a file with the same content is not a mark.
    let (mark, aside) = (
        split.writable().join(".volume"),
        split.writable().join("aside"),
    );
    fs::rename(&mark, &aside).unwrap();
    symlink(&aside, &mark).unwrap();
    client.prepare("new", "base", &[]).unwrap_err();
    fs::remove_file(&mark).unwrap();
    fs::rename(&aside, &mark).unwrap();
    // The image volume is opened once. A later change there is not noticed, and
    // is refused by the next start.
    let own = split.root().join("snapshots");
    fs::rename(&own, split.root().join("aside")).unwrap();
    symlink(&victim.path, &own).unwrap();
    client.prepare("extract-1", "", &[]).unwrap();
    client.remove("extract-1").unwrap();
    victim.is_untouched();
    assert!(split.daemon.is_running() && split.daemon.pid() == pid);
    split.daemon.stop();
    let line = refused(split.daemon.arguments());
    assert!(line.contains(own.to_str().unwrap()), "{line}");
    victim.is_untouched();
    fs::remove_file(&own).unwrap();
    fs::rename(split.root().join("aside"), &own).unwrap();
    split.daemon.restart();
    let client = split.client();
    client.mounts("web").unwrap();
    client.remove("web").unwrap();
    client.remove("base").unwrap();
    victim.is_untouched();
    let pid = split.daemon.pid();
    unharmed(&mut split, pid);
}

#[registered(crate::Test)]
fn within_a_snapshot() {
    let mut split = Split::start(&["--sync", "none"]);
    let pid = split.daemon.pid();
    let client = split.client();
    let victim = Victim::below(split.writable.path().as_path());
    client.prepare("web", "", &[]).unwrap();
    let top = split.writable().join("snapshots/1");
    // A container's own links are counted, not followed.
    symlink(&victim.path, top.join("fs/link")).unwrap();
    symlink("/", top.join("fs/root")).unwrap();
    assert_eq!(client.usage("web").unwrap().inodes, 3);
    // Its upper directory is none of the container's to replace.
    for of in ["fs", ""] {
        let (own, aside) = (top.join(of), split.writable().join("aside"));
        let own = PathBuf::from(own.to_str().unwrap().trim_end_matches('/'));
        fs::rename(&own, &aside).unwrap();
        symlink(&victim.path, &own).unwrap();
        refused_as(client.usage("web"), RpcStatusCode::DATA_LOSS);
        refused_as(client.commit("web", "layer", &[]), RpcStatusCode::DATA_LOSS);
        fs::remove_file(&own).unwrap();
        fs::rename(&aside, &own).unwrap();
    }
    // If there is a link in the place of the removed snapshot's directory, the
    // link goes to the trash.
    fs::rename(&top, split.writable().join("aside")).unwrap();
    symlink(&victim.path, &top).unwrap();
    client.remove("web").unwrap();
    client.cleanup().unwrap();
    victim.is_untouched();
    unharmed(&mut split, pid);
}

#[registered(crate::Test)]
fn in_the_trash() {
    let mut split = Split::start(&["--sync", "none"]);
    let pid = split.daemon.pid();
    let client = split.client();
    let victim = Victim::below(split.image.path().as_path());
    for (volume, key) in [(split.root(), "extract-1"), (split.writable(), "web")] {
        let id = client.names(&[]).unwrap().len() + 1;
        client.prepare(key, "", &[]).unwrap();
        let trash = volume.join("trash");
        // The name for the removed directory is taken.
        symlink(&victim.path, trash.join(id.to_string())).unwrap();
        fs::create_dir_all(trash.join("other/deep")).unwrap();
        symlink(&victim.path, trash.join("other/deep/link")).unwrap();
        // As deep as a path may be.
        let mut path = volume.join(format!("snapshots/{id}/fs"));
        while fs::create_dir(&path).is_ok() || path.is_dir() {
            path.push("d".repeat(20));
        }
    }
    client.remove("extract-1").unwrap();
    client.remove("web").unwrap();
    client.cleanup().unwrap();
    victim.is_untouched();
    unharmed(&mut split, pid);
}
