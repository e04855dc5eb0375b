//! The damage that a disk, or an incomplete copy, does to a layer.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt, chown};
use std::path::Path;
use std::process::Command;

use rustix::fs::{CWD, FileType, Mode, XattrFlags, mknodat, removexattr, setxattr};

use crate::support::run;

/// The name of a damage, the number of the damaged layer in the image, the
/// damage, and the words of the finding.
pub type Damage = (&'static str, usize, fn(&Path), &'static str);

/// One damage of each kind.
pub const DAMAGES: &[Damage] = &[
    (
        "emptied",
        1,
        |top| drop(File::create(top.join("bin/busybox")).unwrap()),
        "has 0 bytes",
    ),
    (
        "shortened",
        2,
        |top| payload(top).set_len(1000).unwrap(),
        "has 1000 bytes",
    ),
    (
        "other bytes",
        2,
        |top| payload(top).write_all_at(b"?", 777_777).unwrap(),
        "from 777777 on",
    ),
    (
        "mode",
        5,
        |top| set_mode(&top.join("opt/tool/setuid"), 0o755),
        "mode 755 in place of 4755",
    ),
    (
        "owner",
        1,
        |top| chown(top.join("etc/shadow"), Some(0), Some(0)).unwrap(),
        "belongs to 0:0",
    ),
    (
        "time",
        1,
        |top| later(&top.join("etc/group")),
        "has another modification time",
    ),
    (
        "attribute",
        1,
        |top| attribute(&top.join("etc")),
        "additional attribute \"user.x\"",
    ),
    (
        "opaque mark",
        4,
        |top| not_opaque(&top.join("opt/app")),
        "lacks the attribute",
    ),
    (
        "hard link",
        5,
        |top| split_link(&top.join("opt/tool")),
        "is a separate file in place of a hard link",
    ),
    (
        "whiteout",
        3,
        |top| fs::remove_file(top.join("etc/obsolete.conf")).unwrap(),
        "is missing",
    ),
    (
        "more",
        5,
        |top| fs::write(top.join("opt/more"), "").unwrap(),
        "should not be there",
    ),
    (
        "kind",
        2,
        |top| no_directory(&top.join("opt/app")),
        "is a file in the place of a directory",
    ),
    (
        "link",
        1,
        |top| link(&top.join("usr/bin/env")),
        "is a link to another target",
    ),
    (
        "device",
        3,
        |top| device_node(&top.join("srv/old")),
        "is a character device in the place",
    ),
    (
        "gone",
        1,
        |top| fs::remove_dir_all(top.parent().unwrap()).unwrap(),
        "No such file",
    ),
    (
        "fs gone",
        5,
        |top| fs::remove_dir_all(top).unwrap(),
        "No such file",
    ),
    (
        "a file",
        4,
        |top| no_directory(top.parent().unwrap()),
        "layer",
    ),
];

/// The large file of layer 2, opened for writing.
pub fn payload(top: &Path) -> File {
    let payload = top.join("opt/data/payload");
    File::options().write(true).open(payload).unwrap()
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

fn later(path: &Path) {
    run(Command::new("touch").args(["-d", "2025-01-01"]).arg(path));
}

fn attribute(path: &Path) {
    setxattr(path, "user.x", b"1", XattrFlags::empty()).unwrap();
}

fn not_opaque(path: &Path) {
    removexattr(path, "trusted.overlay.opaque").unwrap();
}

fn split_link(directory: &Path) {
    let (first, copy) = (directory.join("first"), directory.join("copy"));
    run(Command::new("cp").arg("-a").arg(&first).arg(&copy));
    fs::rename(copy, first).unwrap();
    run(Command::new("touch")
        .args(["-d", "@1704067200"])
        .arg(directory));
}

fn no_directory(path: &Path) {
    fs::remove_dir_all(path).unwrap();
    fs::write(path, "").unwrap();
}

fn link(path: &Path) {
    fs::remove_file(path).unwrap();
    std::os::unix::fs::symlink("/bin/sh", path).unwrap();
}

fn device_node(path: &Path) {
    fs::remove_file(path).unwrap();
    mknodat(CWD, path, FileType::CharacterDevice, Mode::RUSR, 0x103).unwrap();
}
