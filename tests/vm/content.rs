//! The content of a layer, which a seed and the layer's name determine. It is
//! written in the machine, and compared outside.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, Permissions};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, Write};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use rustix::buffer::spare_capacity;
use rustix::fs::{XattrFlags, lgetxattr, setxattr};
use rustix::io::Errno;

use crate::support::random::Random;

const ATTRIBUTE: &str = "user.layer";
const PAGE: usize = 4096;
const LARGEST_FILE: usize = 300 << 10;

/// Each path below a layer's top, a directory before its entries.
pub type Tree = BTreeMap<PathBuf, Node>;

#[derive(Debug, PartialEq, Eq)]
pub struct Node {
    /// Type and permissions, as `st_mode` has them.
    mode: u32,
    /// A file's bytes, a link's target.
    bytes: Vec<u8>,
    attribute: Option<Vec<u8>>,
    /// The first path of the same inode: this path, unless it is a hard link.
    first: PathBuf,
}

/// The random numbers for a name.
pub fn random(seed: u64, name: &str) -> Random {
    let mut hasher = DefaultHasher::new();
    (seed, name).hash(&mut hasher);
    Random::new(hasher.finish())
}

/// The content of a layer.
pub fn of_layer(seed: u64, name: &str) -> Tree {
    let mut random = random(seed, name);
    let mut tree = Tree::new();
    let mut directories = vec![PathBuf::new()];
    for number in 0..1 + random.below(4) {
        let path = random.pick(&directories).join(format!("dir{number}"));
        let mode = [0o755, 0o700, 0o2775, 0o1777][random.index(4)];
        add(&mut tree, &path, 0o040_000 | mode, Vec::new(), None);
        directories.push(path);
    }
    let mut files = Vec::new();
    for number in 0..3 + random.below(6) {
        let path = random.pick(&directories).join(format!("file{number}"));
        let size = match random.below(8) {
            0 => 0,
            1..=4 => random.index(2 * PAGE),
            _ => random.index(LARGEST_FILE + 1),
        };
        let bytes = pages(&mut random, size);
        let attribute = random.is_one_in(3).then(|| pages(&mut random, 20));
        let mode = [0o644, 0o755, 0o600, 0o4755][random.index(4)];
        add(&mut tree, &path, 0o100_000 | mode, bytes, attribute);
        files.push(path);
    }
    for number in 0..random.below(3) {
        let path = random.pick(&directories).join(format!("link{number}"));
        // Short targets are stored in the inode, long ones in a block.
        let target = "../somewhere/".repeat(1 + random.index(12));
        add(&mut tree, &path, 0o120_777, target.into_bytes(), None);
    }
    if random.is_one_in(2) {
        // After all others in the order of paths, so that it is the later one.
        let first = &tree[random.pick(&files)];
        let hard_link = Node {
            bytes: first.bytes.clone(),
            attribute: first.attribute.clone(),
            first: first.first.clone(),
            mode: first.mode,
        };
        tree.insert(PathBuf::from("same"), hard_link);
    }
    tree
}

fn add(tree: &mut Tree, path: &Path, mode: u32, bytes: Vec<u8>, attribute: Option<Vec<u8>>) {
    let node = Node {
        mode,
        bytes,
        attribute,
        first: path.to_owned(),
    };
    tree.insert(path.to_owned(), node);
}

/// Bytes in which no two pages are the same, so that a page of zeros, or of
/// another file, is noticed.
fn pages(random: &mut Random, size: usize) -> Vec<u8> {
    let mut page: Vec<u8> = (0..PAGE / 8)
        .flat_map(|_| random.number().to_ne_bytes())
        .collect();
    let mut bytes = Vec::with_capacity(size + PAGE);
    while bytes.len() < size {
        page[..8].copy_from_slice(&(bytes.len() as u64).to_ne_bytes());
        bytes.extend_from_slice(&page);
    }
    bytes.truncate(size);
    bytes
}

/// Writes a layer into a directory, as containerd does when it unpacks: without
/// a flush.
pub fn write(tree: &Tree, top: &Path) -> io::Result<()> {
    for (path, node) in tree {
        let full = top.join(path);
        if node.first != *path {
            fs::hard_link(top.join(&node.first), &full)?;
            continue;
        }
        match node.mode & 0o170_000 {
            0o040_000 => DirBuilder::new().create(&full)?,
            0o120_000 => {
                symlink(OsString::from_vec(node.bytes.clone()), &full)?;
                continue;
            }
            _ => File::create(&full)?.write_all(&node.bytes)?,
        }
        if let Some(value) = &node.attribute {
            setxattr(&full, ATTRIBUTE, value, XattrFlags::CREATE)?;
        }
        fs::set_permissions(&full, Permissions::from_mode(node.mode & 0o7777))?;
    }
    Ok(())
}

/// Reads the content of a directory.
pub fn read(top: &Path) -> io::Result<Tree> {
    let mut paths = Vec::new();
    let mut pending = vec![PathBuf::new()];
    while let Some(directory) = pending.pop() {
        for entry in fs::read_dir(top.join(&directory))? {
            let entry = entry?;
            let path = directory.join(entry.file_name());
            if entry.file_type()?.is_dir() {
                pending.push(path.clone());
            }
            paths.push(path);
        }
    }
    paths.sort();
    let mut tree = Tree::new();
    let mut inodes = BTreeMap::new();
    for path in paths {
        let full = top.join(&path);
        let metadata = fs::symlink_metadata(&full)?;
        let bytes = if metadata.is_file() {
            fs::read(&full)?
        } else if metadata.is_symlink() {
            fs::read_link(&full)?.into_os_string().into_vec()
        } else {
            Vec::new()
        };
        let first = inodes.entry(metadata.ino()).or_insert_with(|| path.clone());
        let node = Node {
            mode: metadata.mode(),
            bytes,
            attribute: attribute(&full)?,
            first: first.clone(),
        };
        tree.insert(path, node);
    }
    Ok(tree)
}

fn attribute(path: &Path) -> io::Result<Option<Vec<u8>>> {
    let mut value = Vec::with_capacity(PAGE);
    match lgetxattr(path, ATTRIBUTE, spare_capacity(&mut value)) {
        Ok(_) => Ok(Some(value)),
        // A symbolic link cannot have a user attribute.
        Err(Errno::NODATA | Errno::PERM) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

/// The number of inodes in a layer, including its top.
pub fn inodes(tree: &Tree) -> usize {
    1 + tree
        .iter()
        .filter(|(path, node)| node.first == **path)
        .count()
}

/// A short description of how a tree differs from the wanted one; `None` if it
/// does not.
pub fn difference(wanted: &Tree, found: &Tree) -> Option<String> {
    let mut differences = Vec::new();
    for (path, node) in wanted {
        let name = path.display();
        match found.get(path) {
            None => differences.push(format!("{name} is missing")),
            Some(other) if other != node => {
                differences.push(format!("{name}: {}", node_difference(node, other)));
            }
            Some(_) => {}
        }
    }
    let strangers = found.keys().filter(|path| !wanted.contains_key(*path));
    differences.extend(strangers.map(|path| format!("{} does not belong there", path.display())));
    let (first, more) = (differences.first()?, differences.len() - 1);
    Some(format!("{first} (and {more} more)"))
}

fn node_difference(wanted: &Node, found: &Node) -> String {
    if wanted.bytes != found.bytes {
        let same = wanted.bytes.iter().zip(&found.bytes);
        let at = same.take_while(|(one, other)| one == other).count();
        return format!(
            "{} bytes, wanted {}, different from byte {at}",
            found.bytes.len(),
            wanted.bytes.len()
        );
    }
    if wanted.mode != found.mode {
        return format!("mode {:o}, wanted {:o}", found.mode, wanted.mode);
    }
    if wanted.first != found.first {
        return format!(
            "the inode of {}, wanted that of {}",
            found.first.display(),
            wanted.first.display()
        );
    }
    "its extended attribute differs".to_owned()
}
