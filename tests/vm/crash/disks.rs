//! The two disks. During a load, everything that reaches them is recorded, in one
//! order for both. Afterwards, they are given the contents that they may have had
//! after a crash, again and again.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::machine::until_free;
use crate::model::Record;
use crate::support::fuse::{DISKS, Devices, Served};
use crate::support::run;

pub const IMAGE: usize = 0;
pub const WRITABLE: usize = 1;

pub const BYTES: usize = 96 << 20;
/// The unit that is saved before it is overwritten.
const BLOCK: usize = 4096;

/// An event on the disks or around them.
pub enum Event {
    Write {
        disk: usize,
        offset: usize,
        bytes: Vec<u8>,
    },
    /// Everything written to this disk before is durable.
    Flush { disk: usize },
    /// A request was sent, or was answered.
    Mark(Record),
}

/// The contents of both disks, and how writes are recorded.
pub struct Content {
    disks: [Vec<u8>; DISKS],
    use_of: Use,
}

enum Use {
    Recorded {
        events: Vec<Event>,
        flushes: usize,
    },
    /// The earlier contents of each block that was written.
    Undone([HashMap<usize, Vec<u8>>; DISKS]),
}

impl Content {
    /// The contents of new file systems.
    fn new(files: &[PathBuf; DISKS]) -> Content {
        Content {
            disks: files.each_ref().map(|file| load(file)),
            use_of: Use::Recorded {
                events: Vec::new(),
                flushes: 0,
            },
        }
    }

    /// Writes in a way that can be reverted.
    pub fn write(&mut self, disk: usize, offset: usize, bytes: &[u8]) {
        let content = &mut self.disks[disk];
        match &mut self.use_of {
            Use::Recorded { events, .. } => events.push(Event::Write {
                disk,
                offset,
                bytes: bytes.to_vec(),
            }),
            Use::Undone(before) => {
                for block in offset / BLOCK..(offset + bytes.len()).div_ceil(BLOCK) {
                    let save = || content[block * BLOCK..][..BLOCK].to_vec();
                    before[disk].entry(block).or_insert_with(save);
                }
            }
        }
        self.write_for_good(disk, offset, bytes);
    }

    /// Writes for good.
    pub fn write_for_good(&mut self, disk: usize, offset: usize, bytes: &[u8]) {
        self.disks[disk][offset..][..bytes.len()].copy_from_slice(bytes);
    }

    /// Reverts what was written since the last call.
    pub fn revert(&mut self) {
        if let Use::Undone(before) = &mut self.use_of {
            for (disk, blocks) in before.iter_mut().enumerate() {
                for (block, bytes) in blocks.drain() {
                    self.disks[disk][block * BLOCK..][..BLOCK].copy_from_slice(&bytes);
                }
            }
        }
    }

    /// Writes the disks to files.
    pub fn save(&self, files: [&Path; DISKS]) {
        for (file, bytes) in files.iter().zip(&self.disks) {
            fs::write(file, bytes).unwrap();
        }
    }
}

/// Reads a file without taking memory for its zeros.
fn load(path: &Path) -> Vec<u8> {
    let mut file = File::open(path).unwrap();
    let mut bytes = vec![0; BYTES];
    let mut block = [0; BLOCK];
    for at in (0..BYTES).step_by(BLOCK) {
        file.read_exact(&mut block).unwrap();
        if block.iter().any(|byte| *byte != 0) {
            bytes[at..at + BLOCK].copy_from_slice(&block);
        }
    }
    bytes
}

/// The contents, shared by the server and the test.
#[derive(Clone)]
pub struct Shared(Arc<Mutex<Content>>);

impl Shared {
    pub fn lock(&self) -> MutexGuard<'_, Content> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn mark(&self, record: Record) {
        if let Use::Recorded { events, .. } = &mut self.lock().use_of {
            events.push(Event::Mark(record));
        }
    }

    /// How many flushes have been recorded.
    pub fn flushes(&self) -> usize {
        match &self.lock().use_of {
            Use::Recorded { flushes, .. } => *flushes,
            Use::Undone(_) => 0,
        }
    }
}

impl Devices for Shared {
    fn size(&self) -> u64 {
        BYTES as u64
    }

    fn read(&self, disk: usize, offset: usize, length: usize) -> Vec<u8> {
        let content = self.lock();
        let end = BYTES.min(offset + length);
        content.disks[disk][offset.min(end)..end].to_vec()
    }

    fn write(&self, disk: usize, offset: usize, bytes: &[u8]) {
        self.lock().write(disk, offset, bytes);
    }

    fn flush(&self, disk: usize) {
        if let Use::Recorded { events, flushes } = &mut self.lock().use_of {
            events.push(Event::Flush { disk });
            *flushes += 1;
        }
    }
}

/// How the file systems are made and mounted.
pub struct Format {
    mkfs: &'static [&'static str],
    options: &'static str,
}

pub const EXT4: Format = Format {
    mkfs: &[],
    options: "",
};
pub const EXT4_WITH_QUOTAS: Format = Format {
    mkfs: &["-O", "quota,project", "-E", "quotatype=prjquota"],
    options: "prjquota",
};

impl Format {
    pub fn has_quotas(&self) -> bool {
        !self.options.is_empty()
    }
}

/// The disks as block devices with file systems. Everything ends when the value
/// is dropped.
pub struct Disks {
    dir: tempfile::TempDir,
    pub format: &'static Format,
    pub content: Shared,
    devices: Vec<String>,
    served: Option<Served>,
}

impl Disks {
    pub fn new(format: &'static Format) -> Disks {
        let dir = tempfile::tempdir().unwrap();
        let files = ["image.new", "writable.new"].map(|name| dir.path().join(name));
        for file in &files {
            File::create(file).unwrap().set_len(BYTES as u64).unwrap();
            // A thread of the kernel must have nothing left to write later.
            let lazy = "lazy_itable_init=0,lazy_journal_init=0,nodiscard";
            run(Command::new("mkfs.ext4")
                .args([
                    "-q", "-F", "-m", "0", "-b", "4096", "-J", "size=4", "-E", lazy,
                ])
                .args(format.mkfs)
                .arg(file));
        }
        let content = Shared(Arc::new(Mutex::new(Content::new(&files))));
        for name in ["served", "image", "writable"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        let served = Served::mount(Arc::new(content.clone()), &dir.path().join("served"));
        let attach = |disk| {
            let mut command = Command::new("losetup");
            let device = run(command.args(["--find", "--show"]).arg(served.file(disk)));
            device.trim().to_owned()
        };
        Disks {
            devices: (0..DISKS).map(attach).collect(),
            served: Some(served),
            content,
            format,
            dir,
        }
    }

    /// The mount point of a disk.
    pub fn path(&self, disk: usize) -> PathBuf {
        self.dir.path().join(["image", "writable"][disk])
    }

    /// Mounts both disks. The last unmount has dropped the kernel's cache of the
    /// devices.
    ///
    /// # Errors
    ///
    /// If one of them has no sound file system.
    pub fn mount(&self) -> Result<(), String> {
        for (disk, device) in self.devices.iter().enumerate() {
            let options = std::ffi::CString::new(self.format.options).unwrap();
            let at = self.path(disk);
            mount(device, at, "ext4", MountFlags::NOATIME, options.as_c_str())
                .map_err(|errno| format!("mount disk {disk}: {errno}"))?;
        }
        Ok(())
    }

    /// Unmounts both disks, and waits until nothing uses their file systems, because
    /// a process that was just killed may still have files open.
    pub fn unmount(&self) {
        for (disk, device) in self.devices.iter().enumerate() {
            let _ = unmount(self.path(disk), UnmountFlags::DETACH);
            until_free(device);
        }
    }

    /// Writes out everything that their file systems have in memory.
    pub fn flush(&self) {
        for disk in 0..DISKS {
            rustix::fs::syncfs(File::open(self.path(disk)).unwrap()).unwrap();
        }
    }

    /// Ends the recording: the disks are again as they were before it. Returns
    /// the recorded events.
    pub fn rewind(&self) -> Vec<Event> {
        let files = ["image.new", "writable.new"].map(|name| self.dir.path().join(name));
        let mut content = self.content.lock();
        let Use::Recorded { events, .. } = &mut content.use_of else {
            panic!("the recording has ended already");
        };
        let events = std::mem::take(events);
        *content = Content::new(&files);
        content.use_of = Use::Undone(Default::default());
        events
    }
}

impl Drop for Disks {
    fn drop(&mut self) {
        for disk in 0..DISKS {
            let _ = unmount(self.path(disk), UnmountFlags::DETACH);
        }
        for device in &self.devices {
            let _ = Command::new("losetup").arg("--detach").arg(device).status();
        }
        self.served = None;
    }
}
