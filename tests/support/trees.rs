//! Comparing two directory trees, attribute by attribute.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::buffer::spare_capacity;
use rustix::fs::{SeekFrom, lgetxattr, llistxattr, seek};
use rustix::io::Errno;

/// Everything that a copy has to keep of one inode.
#[derive(Debug, PartialEq, Eq)]
pub struct Node {
    mode: u32,
    owner: (u32, u32),
    device: u64,
    links: u64,
    size: u64,
    times: [(i64, i64); 2],
    attributes: BTreeMap<Vec<u8>, Vec<u8>>,
    /// A file's content or a link's target.
    content: Vec<u8>,
    /// The start and end of each of a file's data ranges.
    data: Vec<(u64, u64)>,
    /// The first name of the same inode.
    first_name: PathBuf,
}

/// Describes a tree, by path below its top.
pub fn describe(top: &Path) -> BTreeMap<PathBuf, Node> {
    let mut nodes = BTreeMap::new();
    let mut names = BTreeMap::new();
    let mut pending = vec![PathBuf::new()];
    let mut all = Vec::new();
    while let Some(path) = pending.pop() {
        let full = top.join(&path);
        let metadata = fs::symlink_metadata(&full).unwrap();
        if metadata.is_dir() {
            let mut entries: Vec<OsString> = fs::read_dir(&full)
                .unwrap()
                .map(|entry| entry.unwrap().file_name())
                .collect();
            entries.sort();
            pending.extend(entries.into_iter().map(|name| path.join(name)));
        }
        all.push((path, metadata));
    }
    all.sort_by(|one, other| one.0.cmp(&other.0));
    for (path, metadata) in all {
        let full = top.join(&path);
        let is_directory = metadata.is_dir();
        let first_name = names
            .entry(metadata.ino())
            .or_insert_with(|| path.clone())
            .clone();
        let (content, data) = if metadata.is_file() {
            (fs::read(&full).unwrap(), data_of(&full))
        } else if metadata.is_symlink() {
            let target = fs::read_link(&full).unwrap();
            (target.as_os_str().as_bytes().to_vec(), Vec::new())
        } else {
            (Vec::new(), Vec::new())
        };
        let node = Node {
            mode: metadata.mode(),
            owner: (metadata.uid(), metadata.gid()),
            device: metadata.rdev(),
            links: metadata.nlink(),
            // The size of a directory depends on its file system.
            size: if is_directory { 0 } else { metadata.size() },
            times: [
                // Reading a directory to compare it may change its access time.
                if is_directory {
                    (0, 0)
                } else {
                    (metadata.atime(), metadata.atime_nsec())
                },
                (metadata.mtime(), metadata.mtime_nsec()),
            ],
            attributes: attributes_of(&full),
            content,
            data,
            first_name,
        };
        nodes.insert(path, node);
    }
    nodes
}

/// What a user sees of an inode: mode, owner and content, but no times.
type Seen = (u32, (u32, u32), Vec<u8>);

/// What a user sees of a tree, by path below its top.
pub fn files(top: &Path) -> BTreeMap<PathBuf, Seen> {
    describe(top)
        .into_iter()
        .map(|(path, node)| (path, (node.mode, node.owner, node.content)))
        .collect()
}

fn attributes_of(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut names = Vec::with_capacity(65536);
    llistxattr(path, spare_capacity(&mut names)).unwrap();
    names
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
        .map(|name| {
            let mut value = Vec::with_capacity(65536);
            lgetxattr(path, name, spare_capacity(&mut value)).unwrap();
            (name.to_vec(), value)
        })
        .collect()
}

fn data_of(path: &Path) -> Vec<(u64, u64)> {
    let file = fs::File::open(path).unwrap();
    let mut data = Vec::new();
    let mut at = 0;
    loop {
        let start = match seek(&file, SeekFrom::Data(at)) {
            Err(Errno::NXIO) => return data,
            start => start.unwrap(),
        };
        at = seek(&file, SeekFrom::Hole(start)).unwrap();
        data.push((start, at));
    }
}
