//! In the machine: a disk that fails to write on request, by the kernel's
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
    /// The first sector behind ext4's journal.
    behind_journal: u64,
    /// The mapper's device, under the kernel's name, because there is no udev
    /// to make other names.
    mapped: String,
    at: PathBuf,
}

impl FaultyDisk {
    /// Sets up the mapper on a disk with an ext4, and mounts it.
    pub fn new(name: &'static str, device: &'static str, at: PathBuf) -> FaultyDisk {
        let block = fs::canonicalize(device).unwrap();
        let size = Path::new("/sys/class/block").join(block.file_name().unwrap());
        let sectors = fs::read_to_string(size.join("size")).unwrap();
        let mut disk = FaultyDisk {
            name,
            device,
            sectors: sectors.trim().parse().unwrap(),
            behind_journal: behind_journal(device),
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

    /// The name of the volume.
    pub fn name(&self) -> &str {
        self.name
    }

    /// The mount point.
    pub fn path(&self) -> &Path {
        &self.at
    }

    /// From now on all writes fail, so that ext4 aborts its journal.
    pub fn fail(&self) {
        self.set(&[self.bad(0, self.sectors)]);
    }

    /// From now on, writes of file data fail, and ext4 goes on.
    ///
    /// On a disk of this size, mkfs puts the journal at the beginning of the second
    /// block group. ext4 puts the data of regular files into that group, after the
    /// journal, and uses the first group for directories (ext4_inode_to_goal_block);
    /// its own tables are there, too. If a write to one of these failed, newer
    /// kernels would abort the journal (jbd2_check_fs_dev_write_error).
    pub fn fail_data(&self) {
        let start = self.behind_journal;
        self.set(&[self.good(0, start), self.bad(start, self.sectors - start)]);
    }

    /// The file system finds an error in itself, and makes itself read-only
    /// (admin-guide/ext4.rst, `errors=remount-ro`).
    pub fn give_up(&self) {
        mount_remount(&self.at, MountFlags::NOATIME, c"errors=remount-ro").unwrap();
        let device = self.mapped.trim_start_matches("/dev/");
        fs::write(format!("/sys/fs/ext4/{device}/trigger_fs_error"), "1").unwrap();
    }

    /// From now on, writes succeed again.
    pub fn heal(&self) {
        self.set(&[self.good(0, self.sectors)]);
    }

    pub fn mount(&self) {
        mount_ext4(&self.mapped, &self.at);
    }

    /// Unmounts the disk; panics if it is in use.
    pub fn unmount(&self) {
        unmount(&self.at, UnmountFlags::empty())
            .unwrap_or_else(|errno| panic!("unmount {}: {errno}", self.at.display()));
    }

    /// Repairs the unmounted file system.
    pub fn repair(&self) {
        let status = Command::new("e2fsck")
            .args(["-f", "-y", &self.mapped])
            .status()
            .unwrap();
        // e2fsck(8): 1 means that errors were corrected.
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

    /// A mapping on which reads succeed and writes fail
    /// (admin-guide/device-mapper/dm-flakey.rst).
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
        // The file system is not frozen, because that would flush it.
        run(Command::new("dmsetup").args(["suspend", "--noflush", "--nolockfs", self.name]));
        run(Command::new("dmsetup").args(["resume", self.name]));
    }
}

/// The end of ext4's journal, inode 8, which mkfs makes in one piece.
fn behind_journal(device: &str) -> u64 {
    const SECTORS_OF_BLOCK: u64 = 8;
    let text = run(Command::new("debugfs").args(["-R", "stat <8>", device]));
    let line = text.lines().last().unwrap_or_default();
    // (0-16383):262144-278527
    let range = line
        .split_once("):")
        .and_then(|(_, blocks)| blocks.split_once('-'));
    let (_, last) = range.unwrap_or_else(|| panic!("the journal's place: {text}"));
    let last: u64 = last.parse().unwrap();
    (last + 1) * SECTORS_OF_BLOCK
}
