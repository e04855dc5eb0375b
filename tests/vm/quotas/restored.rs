//! Directories that came back from a backup, or from another disk, neither of
//! which keeps projects.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;
use std::sync::atomic::AtomicBool;

use overlay_read_write_splitting_snapshotter::quota::{Quotas, charge_file, set_project};
use overlay_read_write_splitting_snapshotter::tree::{self, Visited};
use overlay_read_write_splitting_snapshotter::types::{Limits, ProjectId};
use registered::registered;
use rustix::fd::AsFd;
use rustix::fs::{IFlags, ioctl_getflags, ioctl_setflags};

use super::{MIB, Mounted, OWN_MAX_SIZE, Rig, prepare, project, size_of_disk, usage, walk};
use crate::support::until;

/// The state after a restore from a backup without projects.
fn forget_projects(top: &Path) {
    tree::visit_open(File::open(top).unwrap(), |visited| match visited {
        Visited::Directory(fd) => set_project(fd, ProjectId::NONE),
        Visited::File(fd) => charge_file(fd, ProjectId::NONE),
        Visited::Node(..) => Ok(()),
    })
    .unwrap();
}

fn await_charged(top: &Path, number: u32) {
    until("the tree is charged", || project(top) == number);
}

/// XFS counts deleted files for a moment.
fn await_counted(rig: &Rig, top: &Path) {
    until("the only project takes what a walk finds", || {
        let held = rig.projects();
        let usage = held[0].1.usage;
        held.len() == 1 && (usage.size_bytes, usage.inodes) == walk(top)
    });
}

#[registered(crate::quotas::Test)]
fn a_restored_directory_is_charged_again(rig: &mut Rig) {
    let mut daemon = rig.start(&[]);
    let client = daemon.client();
    let limited = [(OWN_MAX_SIZE, "8M")];
    client.prepare("web", "base", &limited).unwrap();
    let top = rig.newest();
    fs::create_dir(top.join("fs/below")).unwrap();
    fs::write(top.join("fs/below/file"), vec![1; 3 << 20]).unwrap();
    daemon.stop();
    forget_projects(&top);
    daemon.restart();
    let client = daemon.client();
    // The usage is never that of a part, even while the tree is being charged.
    assert!(usage(&client, "web").0 >= 3 << 20);
    await_charged(&top, rig.ids().first().number());
    await_counted(rig, &top);
    assert_eq!(usage(&client, "web"), walk(&top));
    // The line follows the last change of the tree.
    until("the log says so", || {
        let log = daemon.log();
        let (_, last) = log.rsplit_once("serving on").unwrap();
        last.contains("; now they are")
    });
    rig.clear(&client);
}

#[registered(crate::quotas::Test)]
fn cut_off_while_a_tree_is_charged_again(rig: &mut Rig) {
    let mut daemon = rig.start(&[]);
    let client = daemon.client();
    client.prepare("web", "base", &[]).unwrap();
    let top = rig.newest();
    for number in 0..20 {
        fs::write(top.join(format!("fs/{number}")), vec![1; 50_000]).unwrap();
    }
    daemon.stop();
    forget_projects(&top);
    daemon.restart_until_dead_at("file-charged");
    let number = rig.ids().first().number();
    assert_eq!(project(&top.join("fs")), number);
    assert_eq!(project(&top), 0, "there is something left to do");
    daemon.restart();
    await_charged(&top, number);
    await_counted(rig, &top);
    assert!(!top.join("scratch").exists());
    rig.clear(&daemon.client());
}

/// A file that cannot be changed; on ext4, neither can its project.
#[registered(crate::quotas::Test)]
fn a_file_that_stays_out_stops_nothing(rig: &mut Rig) {
    if rig.is_xfs() {
        return;
    }
    let mut daemon = rig.start(&[]);
    daemon.client().prepare("web", "base", &[]).unwrap();
    let top = rig.newest();
    for name in ["fixed", "other"] {
        fs::write(top.join("fs").join(name), vec![1; 50_000]).unwrap();
    }
    daemon.stop();
    forget_projects(&top);
    let fixed = File::open(top.join("fs/fixed")).unwrap();
    let flags = ioctl_getflags(&fixed).unwrap();
    ioctl_setflags(&fixed, flags | IFlags::IMMUTABLE).unwrap();
    daemon.restart();
    await_charged(&top, rig.ids().first().number());
    assert_eq!(rig.projects()[0].1.usage.inodes, walk(&top).1 - 1);
    assert!(daemon.log().contains("snapshot 2 does not count 1 files"));
    ioctl_setflags(&fixed, flags).unwrap();
    drop(fixed);
    rig.clear(&daemon.client());
}

/// On the disk that the directories came to, another program uses two ids: it has
/// charged files to one, and limited the other.
#[registered(crate::quotas::Test)]
fn ids_of_others_are_left_to_them(rig: &mut Rig) {
    let mut daemon = rig.start(&[]);
    let client = daemon.client();
    let tops = ["one", "two"].map(|key| {
        client
            .prepare(key, "base", &[(OWN_MAX_SIZE, "8M")])
            .unwrap();
        let top = rig.newest();
        fs::write(top.join("fs/file"), vec![1; 100_000]).unwrap();
        top
    });
    daemon.stop();
    tops.iter().for_each(|top| forget_projects(top));
    let ids = rig.ids();
    let used = ids.first();
    let limited = ids.after(used);
    let unknown = ProjectId::new(used.number() + 1000);
    let theirs = rig.writable().join("theirs");
    fs::create_dir(&theirs).unwrap();
    set_project(File::open(&theirs).unwrap(), used).unwrap();
    fs::write(theirs.join("file"), vec![1; 3 << 20]).unwrap();
    let limits = Limits {
        max_bytes: Some(64 * MIB),
        max_inodes: None,
    };
    let set_theirs = |limits| {
        let directory = File::open(rig.writable()).unwrap();
        let quotas = Quotas::probe(directory.as_fd()).unwrap().unwrap();
        for id in [used, limited, unknown] {
            quotas.set_limits(id, limits).unwrap();
        }
    };
    set_theirs(limits);

    daemon.restart();
    let client = daemon.client();
    for (key, top) in ["one", "two"].iter().zip(&tops) {
        until("it is charged", || project(top) != 0);
        assert!(project(top) > limited.number());
        until("it is counted", || usage(&client, key) == walk(top));
        let mounted = Mounted::new(&client.mounts(key).unwrap());
        assert_eq!(size_of_disk(&mounted), 8 * MIB);
        drop(mounted);
        // XFS counts the deleted files of the mount for a moment.
        until("the mount's files are gone", || {
            usage(&client, key) == walk(top)
        });
    }
    assert_ne!(project(&tops[0]), project(&tops[1]));
    let held: BTreeMap<_, _> = rig.projects().into_iter().collect();
    for id in [used, limited, unknown] {
        assert_eq!(held[&id].limits, limits, "{id}");
    }
    assert_eq!(held[&used].usage.inodes, 2);
    daemon.stop();
    daemon.restart();
    let after: BTreeMap<_, _> = rig.projects().into_iter().collect();
    assert_eq!(after, held);

    fs::remove_dir_all(&theirs).unwrap();
    set_theirs(Limits::NONE);
    rig.clear(&daemon.client());
}

/// A restored container can use links and nodes that cannot be charged as they
/// are.
#[registered(crate::quotas::Test)]
fn links_and_nodes_can_be_renamed(rig: &mut Rig) {
    let mut daemon = rig.start(&[]);
    let client = daemon.client();
    let layer = prepare(&client, "layer-key", &[]);
    for name in ["one", "two"] {
        fs::create_dir(layer.path().join(name)).unwrap();
    }
    drop(layer);
    client.commit("layer-key", "layer", &[]).unwrap();
    let web = Mounted::new(&client.prepare("web", "layer", &[]).unwrap());
    let at = |web: &Mounted, name: &str| web.path().join(name);
    for name in ["one", "two"] {
        fs::remove_dir(at(&web, name)).unwrap();
    }
    for name in ["link", "linked"] {
        symlink("target", at(&web, name)).unwrap();
    }
    fs::hard_link(at(&web, "linked"), at(&web, "again")).unwrap();
    drop(web);
    let top = rig.newest();
    let number = project(&top);
    daemon.stop();
    copy_as_a_backup(&top);
    assert_eq!(project(&top.join("fs")), 0);

    daemon.restart();
    await_charged(&top, number);
    let client = daemon.client();
    let web = Mounted::new(&client.mounts("web").unwrap());
    fs::rename(at(&web, "link"), at(&web, "renamed")).unwrap();
    fs::hard_link(at(&web, "renamed"), at(&web, "link")).unwrap();
    assert_eq!(
        fs::read_link(at(&web, "link")).unwrap(),
        Path::new("target")
    );
    for name in ["one", "two"] {
        assert!(!at(&web, name).exists());
        fs::create_dir(at(&web, name)).unwrap();
    }
    // Two inodes would not be linked any more.
    assert_eq!(at(&web, "linked").symlink_metadata().unwrap().nlink(), 2);
    drop(web);
    assert!(daemon.log().contains("because they have several names"));
    assert!(!top.join("scratch").exists());
    client.remove("web").unwrap();
    client.remove("layer").unwrap();
    rig.clear(&client);
}

/// Replaces a snapshot's directories by a copy.
fn copy_as_a_backup(top: &Path) {
    let snapshots = top.parent().unwrap();
    let volume = snapshots.parent().unwrap();
    let [away, scratch] = ["away", "scratch"].map(|name| volume.join(name));
    fs::create_dir(&away).unwrap();
    fs::create_dir(&scratch).unwrap();
    let name = top.file_name().unwrap();
    tree::copy_tree(
        File::open(snapshots).unwrap(),
        File::open(&away).unwrap(),
        &CString::new(name.to_str().unwrap()).unwrap(),
        File::open(&scratch).unwrap(),
        &AtomicBool::new(false),
    )
    .unwrap();
    fs::remove_dir_all(top).unwrap();
    fs::rename(away.join(name), top).unwrap();
    fs::remove_dir(away).unwrap();
    fs::remove_dir(scratch).unwrap();
}
