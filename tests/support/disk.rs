//! A file system on a loop device, for one test.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process_group};

use super::run;

/// A mounted file system, unmounted and deleted when dropped.
pub struct Disk {
    dir: tempfile::TempDir,
    device: String,
}

/// A frozen file system, on which all writes wait.
pub struct Frozen {
    path: PathBuf,
    thaw: Child,
}

impl Drop for Frozen {
    fn drop(&mut self) {
        // With the sleep that it runs: setsid(1) has made it the leader of a group.
        let _ = kill_process_group(Pid::from_child(&self.thaw), Signal::KILL);
        let _ = self.thaw.wait();
        // Errors are ignored, because it may have been thawed already.
        let _ = Command::new("fsfreeze")
            .arg("--unfreeze")
            .arg(&self.path)
            .status();
    }
}

impl Disk {
    /// An empty ext4 of that size, mounted with `noatime`.
    pub fn ext4(mebibytes: u64) -> Disk {
        // The block size of larger disks; small ones get 1024 by default.
        Disk::make(mebibytes, "ext4", &["-q", "-F", "-m", "0", "-b", "4096"])
    }

    /// An empty file system made by `mkfs.<kind>` with these arguments.
    pub fn make(mebibytes: u64, kind: &str, arguments: &[&str]) -> Disk {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        File::create(&image)
            .unwrap()
            .set_len(mebibytes << 20)
            .unwrap();
        Disk::in_directory(dir, &image, kind, arguments)
    }

    /// A file system on an existing file.
    pub fn on(image: &Path, kind: &str, arguments: &[&str]) -> Disk {
        Disk::in_directory(tempfile::tempdir().unwrap(), image, kind, arguments)
    }

    fn in_directory(dir: tempfile::TempDir, image: &Path, kind: &str, arguments: &[&str]) -> Disk {
        run(Command::new(format!("mkfs.{kind}"))
            .args(arguments)
            .arg(image));
        let device = run(Command::new("losetup")
            .args(["--find", "--show"])
            .arg(image));
        let disk = Disk {
            dir,
            device: device.trim().to_owned(),
        };
        fs::create_dir(disk.path()).unwrap();
        disk.mount();
        disk
    }

    /// Where it is mounted.
    pub fn path(&self) -> PathBuf {
        self.dir.path().join("mnt")
    }

    /// The path as text.
    pub fn text(&self) -> String {
        self.path().to_str().unwrap().to_owned()
    }

    /// The loop device's name below `/sys/block`.
    pub fn block_name(&self) -> &str {
        self.device.trim_start_matches("/dev/")
    }

    /// Mounts it again after [`Disk::unmount`].
    pub fn mount(&self) {
        run(Command::new("mount")
            .args(["-o", "noatime"])
            .arg(&self.device)
            .arg(self.path()));
    }

    /// Makes every change of it wait until the value is dropped, but at most for
    /// 90 seconds, even if the test is killed, because the processes that wait
    /// cannot be killed.
    pub fn freeze(&self) -> Frozen {
        let path = self.path();
        let thaw = Command::new("setsid")
            .args(["sh", "-c", "sleep 90; fsfreeze --unfreeze \"$0\""])
            .arg(&path)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let frozen = Frozen { path, thaw };
        run(Command::new("fsfreeze").arg("--freeze").arg(&frozen.path));
        frozen
    }

    /// Unmounts it; fails if it is busy.
    pub fn unmount(&self) {
        run(Command::new("umount").arg(self.path()));
    }

    /// Mounts it again with these options, for example `ro`.
    pub fn remount(&self, options: &str) {
        run(Command::new("mount")
            .arg("-o")
            .arg(format!("remount,{options}"))
            .arg(self.path()));
    }

    /// How many writes the block device has done (`stat` in sysfs, field 5;
    /// Documentation/block/stat.rst).
    pub fn writes(&self) -> u64 {
        self.figure(5)
    }

    /// How many flushes of its cache the block device has done.
    pub fn flushes(&self) -> u64 {
        self.figure(16)
    }

    fn figure(&self, field: usize) -> u64 {
        let text = fs::read_to_string(format!("/sys/block/{}/stat", self.block_name())).unwrap();
        let field = text.split_ascii_whitespace().nth(field - 1);
        field.unwrap().parse().unwrap()
    }

    /// Flushes it.
    pub fn sync(&self) {
        run(Command::new("sync").arg("-f").arg(self.path()));
    }

    /// Fills every free block, with a file of its own.
    pub fn fill(&self) {
        let mut options = OpenOptions::new();
        options.create(true).append(true);
        let mut filler = options.open(self.filler()).unwrap();
        let bytes = vec![1; 1 << 20];
        loop {
            let mut taken = 0;
            // Down to the rest of the last block.
            for size in [1 << 20, 4096, 1] {
                while let Ok(written @ 1..) = filler.write(&bytes[..size]) {
                    taken += written;
                }
            }
            // The file system reserves more for data that is not on the disk
            // yet than the data takes there.
            self.sync();
            if taken == 0 {
                return;
            }
        }
    }

    /// Frees what [`Disk::fill`] has filled.
    pub fn make_room(&self) {
        fs::remove_file(self.filler()).unwrap();
        // ext4 has the blocks free after its journal's next commit.
        self.sync();
    }

    fn filler(&self) -> PathBuf {
        self.path().join("filler")
    }

    /// Uses every free inode, with files of its own.
    pub fn fill_inodes(&self) {
        let fillers = subdirectory(&self.path(), "fillers");
        for number in 0_u64.. {
            match File::create_new(format!("{fillers}/{number}")) {
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                Err(_) => return,
                Ok(_) => {}
            }
        }
    }

    /// The free bytes.
    pub fn free(&self) -> u64 {
        let stat = rustix::fs::statvfs(self.path()).unwrap();
        stat.f_bfree * stat.f_frsize
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // A failed test may have left mounts beneath it, and it may be
        // unmounted already.
        let _ = Command::new("umount")
            .args(["-R", "-l", "-q"])
            .arg(self.path())
            .status();
        let _ = Command::new("losetup").arg("-d").arg(&self.device).status();
    }
}

/// An empty directory below `base`, made if it is missing.
pub fn subdirectory(base: &Path, name: &str) -> String {
    let path = base.join(name);
    fs::create_dir_all(&path).unwrap();
    path.to_str().unwrap().to_owned()
}
