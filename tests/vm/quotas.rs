//! Project quotas, which need a kernel with support for them. On ext4 and on XFS,
//! limits have to be enforced, usage has to be what a walk finds, and no project
//! may be left behind.
//!
//! The tests of one topic on one file system run in one machine, one after
//! another, each with new directories on the same disks and project ids of its
//! own.

mod crashes;
mod figures;
mod lacking;
mod layers;
mod life;
mod limits;
mod loans;
mod restored;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use grpcio::RpcStatusCode;
use overlay_read_write_splitting_snapshotter::quota::{
    Held, ProjectRange, Quotas, project_of, set_project,
};
use overlay_read_write_splitting_snapshotter::types::ProjectId;
use rustix::fd::AsFd;
use rustix::fs::StatVfs;
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::Options;
use crate::guest::{IMAGE_DEVICE, Outlet, WRITABLE_DEVICE, setting};
use crate::machine::{Disks, Format};
use crate::support::client::{Client, Refusal};
use crate::support::daemon::Daemon;
use crate::support::mounted::{Mounted, upper_of};
use crate::support::until;

/// The tested file systems, by the names with which they are mounted.
const FILE_SYSTEMS: &[&str] = &["ext4", "xfs"];

/// A test: its module, its name, and its function.
pub struct Test(&'static str, &'static str, fn(&mut Rig));
inventory::collect!(Test);

impl Test {
    /// The last part of its module.
    fn topic(&self) -> &'static str {
        self.0.rsplit("::").next().unwrap_or_default()
    }
}

/// Topics that depend only on the daemon, and have succeeded on XFS too.
const ON_EXT4_ONLY: &[&str] = &["crashes", "figures"];

/// Each file system with each of its topics.
pub fn all() -> impl Iterator<Item = (&'static str, &'static str)> {
    let topics: BTreeSet<_> = inventory::iter::<Test>().map(Test::topic).collect();
    let pairs = FILE_SYSTEMS.iter().flat_map(move |file_system| {
        let topics = topics.clone().into_iter();
        topics.map(move |topic| (*file_system, topic))
    });
    pairs.filter(|(file_system, topic)| *file_system == "ext4" || !ON_EXT4_ONLY.contains(topic))
}

/// The smallest size for mkfs.xfs.
const MEBIBYTES: u64 = 320;

/// A project of the administrator.
const THEIRS: u32 = 4711;

pub const MIB: u64 = 1 << 20;
/// The labels.
pub const MAX_SIZE: &str = "containerd.io/snapshot/max-size";
pub const OWN_MAX_SIZE: &str = "containerd.io/snapshot/overlay-read-write-splitting.max-size";
pub const MAX_INODES: &str = "containerd.io/snapshot/overlay-read-write-splitting.max-inodes";

/// On the host: runs the tests of a topic in a machine.
pub fn run_in_machine(file_system: &str, topic: &str, options: Options) {
    let format = match file_system {
        "ext4" => Format::Ext4WithQuotas,
        _ => Format::Xfs,
    };
    // mkfs.ext4 makes an inode for each 16 KiB.
    let mebibytes = MEBIBYTES + u64::from(options.files) / 50;
    let disks = Disks::formatted(mebibytes, format);
    let settings = [
        ("VM_WORK", "quotas".to_owned()),
        ("VM_FILE_SYSTEM", file_system.to_owned()),
        ("VM_TOPIC", topic.to_owned()),
        ("VM_FILES", options.files.to_string()),
    ];
    // As much time as a hundred files take to be created, counted and walked over.
    let longer = Duration::from_secs(u64::from(options.files) / 100);
    for told in disks.boot(&settings).give_longer(longer).finish() {
        println!("quotas::{file_system}::{topic}: {told}");
    }
}

/// In the machine: runs the tests of a topic.
pub fn run(outlet: &Outlet) {
    let at = |name| PathBuf::from(setting::<String>(name));
    let mut rig = Rig {
        file_system: setting("VM_FILE_SYSTEM"),
        image: at("VM_IMAGE"),
        writable: at("VM_WRITABLE"),
        number: 0,
        figures: Vec::new(),
    };
    rig.mount(IMAGE_DEVICE, &rig.image, rig.option());
    rig.mount(WRITABLE_DEVICE, &rig.writable, rig.option());
    let wanted: String = setting("VM_TOPIC");
    let of_topic = inventory::iter::<Test>().filter(|test| test.topic() == wanted);
    let mut tests: Vec<_> = of_topic.collect();
    tests.sort_by_key(|Test(_, name, _)| *name);
    assert!(!tests.is_empty(), "no test of {wanted}");
    for Test(_, name, test) in tests {
        let begun = Instant::now();
        rig.number += 1;
        test(&mut rig);
        let seconds = begun.elapsed().as_secs_f64();
        // For a person who looks at the console.
        println!("{name}: {seconds:.1} s");
        rig.figures
            .drain(..)
            .for_each(|figure| outlet.line(&figure));
    }
}

/// The disks, and the directories of one test on them.
pub struct Rig {
    file_system: String,
    image: PathBuf,
    writable: PathBuf,
    number: u32,
    /// Figures to be printed on the host.
    figures: Vec<String>,
}

impl Rig {
    pub fn is_xfs(&self) -> bool {
        self.file_system == "xfs"
    }

    /// The mount option for project quotas.
    pub fn option(&self) -> &'static str {
        if self.is_xfs() { "pquota" } else { "prjquota" }
    }

    pub fn mount(&self, device: &str, at: &Path, options: &str) {
        fs::create_dir_all(at).unwrap();
        let options = std::ffi::CString::new(options).unwrap();
        mount(
            device,
            at,
            self.file_system.as_str(),
            MountFlags::NOATIME,
            options.as_c_str(),
        )
        .unwrap_or_else(|errno| panic!("mount {device} with {options:?}: {errno}"));
    }

    /// Mounts the writable volume with other options.
    pub fn remount_writable(&self, options: &str) {
        unmount(&self.writable, UnmountFlags::empty()).unwrap();
        self.mount(WRITABLE_DEVICE, &self.writable, options);
    }

    pub fn root(&self) -> PathBuf {
        self.image.join(self.number.to_string())
    }

    pub fn writable(&self) -> PathBuf {
        self.writable.join(self.number.to_string())
    }

    /// The project ids of this test.
    pub fn ids(&self) -> ProjectRange {
        let first = 2_000_000_000 + self.number * 1_000_000;
        ProjectRange::new(first, first + 999_999).unwrap()
    }

    pub fn arguments(&self, flags: &[&str]) -> Vec<String> {
        let mut arguments = vec![
            "--root-dir".to_owned(),
            self.root().display().to_string(),
            "--writable-dir".to_owned(),
            self.writable().display().to_string(),
        ];
        if !flags.contains(&"--quota-ids") {
            arguments.extend(["--quota-ids".to_owned(), self.ids().to_string()]);
        }
        arguments.extend(flags.iter().map(|flag| (*flag).to_owned()));
        arguments
    }

    pub fn start(&self, flags: &[&str]) -> Daemon {
        let daemon = Daemon::start(&self.arguments(flags));
        let client = daemon.client();
        client
            .prepare(
                "extract-base",
                "",
                &[("containerd.io/snapshot.ref", "base")],
            )
            .unwrap();
        client.commit("extract-base", "base", &[]).unwrap();
        daemon
    }

    /// The projects of this test in the file system, as repquota(8) lists them.
    pub fn projects(&self) -> Vec<(ProjectId, Held)> {
        self.projects_of(self.ids())
    }

    /// The projects of a range in the file system.
    pub fn projects_of(&self, ids: ProjectRange) -> Vec<(ProjectId, Held)> {
        let directory = File::open(&self.writable).unwrap();
        let quotas = Quotas::probe(directory.as_fd()).unwrap().unwrap();
        quotas.settle();
        let mut found = Vec::new();
        let mut from = ids.first().number();
        while let Some((project, held)) = quotas.next_in_use(from).unwrap()
            && ids.contains(project)
        {
            if !held.is_nothing() {
                found.push((project, held));
            }
            from = project.number() + 1;
        }
        found
    }

    /// The directories of the newest snapshot.
    pub fn newest(&self) -> PathBuf {
        let entries = fs::read_dir(self.writable().join("snapshots")).unwrap();
        let number = |path: &PathBuf| -> u64 {
            path.file_name().unwrap().to_str().unwrap().parse().unwrap()
        };
        let paths = entries.map(|entry| entry.unwrap().path());
        paths.max_by_key(number).unwrap()
    }

    /// Removes everything that this test has created, and fails unless no
    /// project is left.
    #[track_caller]
    pub fn clear(&self, client: &Client) {
        while let names = client.names(&["kind!=committed"]).unwrap()
            && !names.is_empty()
        {
            names.iter().for_each(|name| client.remove(name).unwrap());
        }
        self.no_project_is_left(client);
    }

    /// XFS counts deleted files for a moment.
    #[track_caller]
    pub fn no_project_is_left(&self, client: &Client) {
        until("no project is left", || {
            client.cleanup().unwrap();
            self.projects().is_empty()
        });
    }

    /// Waits until this number of projects is left.
    pub fn projects_are_left(&self, client: &Client, count: usize) {
        until("the others are given back", || {
            client.cleanup().unwrap();
            self.projects().len() <= count
        });
        assert_eq!(self.projects().len(), count);
    }
}

/// The project that a directory gives to its entries; 0 for none.
pub fn project(path: &Path) -> u32 {
    project_of(File::open(path).unwrap()).unwrap().number()
}

#[track_caller]
pub fn is_refused<T: std::fmt::Debug>(
    result: Result<T, Refusal>,
    code: RpcStatusCode,
    words: &[&str],
) {
    let (found, text) = result.unwrap_err();
    assert_eq!(found, code, "{text}");
    for word in words {
        assert!(text.contains(word), "{word}: {text}");
    }
}

pub fn prepare(client: &Client, key: &str, labels: &[(&str, &str)]) -> Mounted {
    Mounted::new(&client.prepare(key, "base", labels).unwrap())
}

pub fn disk(mounted: &Mounted) -> StatVfs {
    rustix::fs::statvfs(mounted.path()).unwrap()
}

pub fn size_of_disk(mounted: &Mounted) -> u64 {
    let disk = disk(mounted);
    disk.f_blocks * disk.f_frsize
}

/// Writes a file until it has `most` bytes or is refused. Returns its size, and
/// whether a quota has refused it.
pub fn fill(path: &Path, most: u64) -> (u64, bool) {
    // XFS returns another error for a full project (xfs_trans_dqresv).
    let is_full = |errno| {
        assert!(matches!(errno, Errno::DQUOT | Errno::NOSPC), "{errno}");
        true
    };
    let file = match File::create(path) {
        Ok(file) => file,
        Err(error) => return (0, is_full(Errno::from_io_error(&error).unwrap())),
    };
    let block = vec![7; 64 << 10];
    let mut written = 0;
    while written < most {
        match rustix::io::write(&file, &block) {
            Ok(count) => written += count as u64,
            Err(errno) => return (written, is_full(errno)),
        }
    }
    (written, false)
}

/// The result of a walk over a directory, as `du` counts: bytes and inodes.
pub fn walk(path: &Path) -> (u64, u64) {
    let mut seen = std::collections::BTreeMap::new();
    let mut ahead = vec![path.to_owned()];
    while let Some(path) = ahead.pop() {
        let found = fs::symlink_metadata(&path).unwrap();
        seen.insert(found.ino(), found.blocks() * 512);
        if found.is_dir() {
            ahead.extend(
                fs::read_dir(&path)
                    .unwrap()
                    .map(|entry| entry.unwrap().path()),
            );
        }
    }
    (seen.values().sum(), seen.len() as u64)
}

pub fn upper(client: &Client, key: &str) -> PathBuf {
    upper_of(&client.mounts(key).unwrap())
}

pub fn usage(client: &Client, key: &str) -> (u64, u64) {
    let usage = client.usage(key).unwrap();
    (
        usage.size.try_into().unwrap(),
        usage.inodes.try_into().unwrap(),
    )
}

/// Puts a directory into a project, as an administrator does.
fn put_into(directory: &Path, project: u32) {
    let directory = File::open(directory).unwrap();
    set_project(directory, ProjectId::new(project)).unwrap();
}
