//! In the machine: a disk that fails to write when told to, by the kernel's
//! device mapper.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::mount::{MountFlags, UnmountFlags, mount_remount, unmount};

use crate::guest::mount_ext4;
use crate::support::run;

/// A mounted ext4 on such a disk.
pub struct FaultyDisk {
    name: &'static str,
    device: &'static str,
    sectors: u64,
    /// First sector and number of sectors of ext4's journal.
    journal: (u64, u64),
    /// The mapper's device, as the kernel names it: no udev makes other names.
    mapped: String,
    at: PathBuf,
}

impl FaultyDisk {
    /// Puts the mapper upon a disk that has an ext4, and mounts it.
    pub fn new(name: &'static str, device: &'static str, at: PathBuf) -> FaultyDisk {
        let block = device.trim_start_matches("/dev/");
        let sectors = fs::read_to_string(format!("/sys/class/block/{block}/size")).unwrap();
        let mut disk = FaultyDisk {
            name,
            device,
            sectors: sectors.trim().parse().unwrap(),
            journal: journal(device),
            mapped: String::new(),
            at,
        };
        let table = disk.good(0, disk.sectors);
        run(Command::new("dmsetup").args(["create", name, "--table", &table]));
        let info = ["info", "--columns", "--noheadings", "-o", "minor", name];
        let minor = run(Command::new("dmsetup").args(info));
        disk.mapped = format!("/dev/dm-{}", minor.trim());
        disk.mount();
        disk
    }

    /// Which of the two it is.
    pub fn name(&self) -> &str {
        self.name
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.at
    }

    /// From now on all writes fail, so that ext4 gives its journal up.
    pub fn fail(&self) {
        self.set(&[self.bad(0, self.sectors)]);
    }

    /// From now on all writes but those of the journal fail: ext4 goes on, and
    /// what fails is the data of files.
    pub fn fail_data(&self) {
        let (start, length) = self.journal;
        let end = start + length;
        self.set(&[
            self.bad(0, start),
            self.good(start, length),
            self.bad(end, self.sectors - end),
        ]);
    }

    /// The file system finds an error in itself, and makes itself read-only
    /// (admin-guide/ext4.rst, `errors=remount-ro`).
    pub fn give_up(&self) {
        mount_remount(&self.at, MountFlags::NOATIME, c"errors=remount-ro").unwrap();
        let device = self.mapped.trim_start_matches("/dev/");
        fs::write(format!("/sys/fs/ext4/{device}/trigger_fs_error"), "1").unwrap();
    }

    /// Writes go well again.
    pub fn heal(&self) {
        self.set(&[self.good(0, self.sectors)]);
    }

    pub fn mount(&self) {
        mount_ext4(&self.mapped, &self.at);
    }

    /// Fails if it is in use.
    pub fn unmount(&self) {
        unmount(&self.at, UnmountFlags::empty())
            .unwrap_or_else(|errno| panic!("unmount {}: {errno}", self.at.display()));
    }

    /// Repairs the file system, unmounted.
    pub fn repair(&self) {
        let status = Command::new("e2fsck")
            .args(["-f", "-y", &self.mapped])
            .status()
            .unwrap();
        // e2fsck(8): 1 is that errors were corrected.
        assert!(matches!(status.code(), Some(0 | 1)), "e2fsck: {status}");
    }

    pub fn make_read_only(&self) {
        let flags = MountFlags::RDONLY | MountFlags::NOATIME;
        mount_remount(&self.at, flags, c"").unwrap();
    }

    pub fn make_writable(&self) {
        mount_remount(&self.at, MountFlags::NOATIME, c"").unwrap();
    }

    pub fn is_read_only(&self) -> bool {
        let flags = rustix::fs::statvfs(&self.at).unwrap().f_flag;
        flags.contains(rustix::fs::StatVfsMountFlags::RDONLY)
    }

    fn good(&self, start: u64, length: u64) -> String {
        format!("{start} {length} linear {} {start}", self.device)
    }

    /// Reads go well, writes never (admin-guide/device-mapper/dm-flakey.rst).
    fn bad(&self, start: u64, length: u64) -> String {
        format!(
            "{start} {length} flakey {} {start} 0 1 1 error_writes",
            self.device
        )
    }

    fn set(&self, table: &[String]) {
        let file = Path::new("/tmp/table");
        fs::write(file, table.join("\n")).unwrap();
        run(Command::new("dmsetup").args(["load", self.name]).arg(file));
        // Without freezing the file system, which would flush it.
        run(Command::new("dmsetup").args(["suspend", "--noflush", "--nolockfs", self.name]));
        run(Command::new("dmsetup").args(["resume", self.name]));
    }
}

/// Where ext4 has its journal, inode 8: in one piece, as mkfs makes it.
fn journal(device: &str) -> (u64, u64) {
    const SECTORS_OF_BLOCK: u64 = 8;
    let text = run(Command::new("debugfs").args(["-R", "stat <8>", device]));
    let line = text.lines().last().unwrap_or_default();
    // (0-16383):262144-278527
    let range = line
        .split_once("):")
        .and_then(|(_, blocks)| blocks.split_once('-'));
    let (first, last) = range.unwrap_or_else(|| panic!("the journal's place: {text}"));
    let (first, last): (u64, u64) = (first.parse().unwrap(), last.parse().unwrap());
    (
        first * SECTORS_OF_BLOCK,
        (last + 1 - first) * SECTORS_OF_BLOCK,
    )
}
