//! Directories that came back from a backup, or from another disk, which know no
//! projects.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::Path;

use overlay_read_write_splitting_snapshotter::quota::{Quotas, charge_file, set_project};
use overlay_read_write_splitting_snapshotter::tree;
use overlay_read_write_splitting_snapshotter::types::{Limits, ProjectId};
use rustix::fd::AsFd;
use rustix::fs::FileType;

use super::{MIB, Mounted, OWN_MAX_SIZE, Rig, Test, project, size_of_disk, usage, walk};
use crate::support::until;

pub const TESTS: &[Test] = &[
    (
        "a_restored_directory_is_charged_again",
        a_restored_directory_is_charged_again,
    ),
    (
        "cut_off_while_a_tree_is_charged_again",
        cut_off_while_a_tree_is_charged_again,
    ),
    (
        "ids_of_others_are_left_to_them",
        ids_of_others_are_left_to_them,
    ),
];

/// As from a backup that knows no projects.
fn forget_projects(top: &Path) {
    tree::visit_open(File::open(top).unwrap(), |fd, file_type| match file_type {
        FileType::Directory => set_project(fd, ProjectId::NONE),
        _ => charge_file(fd, ProjectId::NONE),
    })
    .unwrap();
}

fn await_charged(top: &Path, number: u32) {
    until("the tree is charged", || project(top) == number);
}

/// The only project takes what a walk finds.
fn is_charged(rig: &Rig, top: &Path) {
    let held = rig.projects();
    let usage = held[0].1.usage;
    assert_eq!((usage.size_bytes, usage.inodes), walk(top));
    assert_eq!(held.len(), 1);
}

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
    // Whether that is done or not.
    assert_eq!(usage(&client, "web"), walk(&top));
    await_charged(&top, rig.ids().first().number());
    assert_eq!(usage(&client, "web"), walk(&top));
    is_charged(rig, &top);
    let log = daemon.log();
    let (_, last) = log.rsplit_once("serving on").unwrap();
    assert!(last.contains("and is now"), "nobody waits for it: {log}");
    rig.clear(&client);
}

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
    is_charged(rig, &top);
    rig.clear(&daemon.client());
}

/// On the disk that the directories came to, two ids are somebody else's: something is
/// charged to the one, and the other one is limited.
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
        assert_eq!(usage(&client, key), walk(top));
        let mounted = Mounted::new(&client.mounts(key).unwrap());
        assert_eq!(size_of_disk(&mounted), 8 * MIB);
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
