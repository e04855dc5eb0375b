//! Directories that came back from a backup, or from another disk, which know no
//! projects.

use std::fs::{self, File};
use std::path::Path;

use overlay_read_write_splitting_snapshotter::quota::{charge_file, set_project};
use overlay_read_write_splitting_snapshotter::tree;
use overlay_read_write_splitting_snapshotter::types::ProjectId;
use rustix::fs::FileType;

use super::{OWN_MAX_SIZE, Rig, Test, project, usage, walk};
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
