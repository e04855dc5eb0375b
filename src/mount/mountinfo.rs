//! The kernel's list of what is mounted in this process's mount namespace
//! (proc_pid_mountinfo(5)).

use std::collections::HashSet;
use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use rustix::fd::{AsFd, AsRawFd};

use crate::error::{Context, Error, ErrorKind, Result};

/// One mount.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mounted {
    /// Its number.
    pub id: Vec<u8>,
    /// The device of its file system, as `major:minor`.
    pub device: String,
    /// Which directory of that file system is mounted.
    pub root: PathBuf,
    /// Where.
    pub point: PathBuf,
    /// `ext4`, for one.
    pub file_system: String,
    /// What was mounted: `/dev/sda1`, for one.
    pub source: String,
    /// The file system's own options, separated by commas.
    pub options: String,
}

/// All mounts, in the kernel's order.
///
/// # Errors
///
/// [`ErrorKind::Unavailable`] if they change all the time.
pub fn read() -> Result<Vec<Mounted>> {
    let path = "/proc/self/mountinfo";
    read_until_settled(|| fs::read(path).context(|| format!("read {path}")))
        .map(|text| parse(&text))
}

/// All mounts of all mount namespaces that a process is in: a container has its own, and
/// so may containerd. A process that ends meanwhile is left out.
pub fn read_everywhere() -> Result<Vec<Mounted>> {
    let mut namespaces = HashSet::new();
    let mut mounts = Vec::new();
    for entry in fs::read_dir("/proc").context(|| "list the processes")? {
        let process = entry.context(|| "list the processes")?.path();
        let Ok(namespace) = fs::read_link(process.join("ns/mnt")) else {
            continue;
        };
        if namespaces.contains(&namespace) {
            continue;
        }
        let path = process.join("mountinfo");
        let read = || fs::read(&path).context(|| format!("read {}", path.display()));
        match read_until_settled(read) {
            Ok(text) => {
                mounts.extend(parse(&text));
                namespaces.insert(namespace);
            }
            Err(_) if !process.join("ns/mnt").exists() => {}
            Err(error) => return Err(error),
        }
    }
    Ok(mounts)
}

/// Reads until two readings are the same. The kernel writes the list piece by piece, and
/// before Linux 5.8 a mount that goes away meanwhile takes the next one out of the reading:
/// what is mounted would look as if it were not, and be moved or deleted.
fn read_until_settled(mut read: impl FnMut() -> Result<Vec<u8>>) -> Result<Vec<u8>> {
    const MOST: u32 = 100;
    let mut last = read()?;
    for _ in 1..MOST {
        let next = read()?;
        if next == last {
            return Ok(next);
        }
        last = next;
    }
    Err(Error::new(
        ErrorKind::Unavailable,
        format!("what is mounted has changed {MOST} times while it was read: try again"),
    ))
}

/// The mount that an open file is on; `None` if it has gone since `mounts` were
/// read.
pub fn mount_of(fd: impl AsFd, mounts: &[Mounted]) -> Result<Option<&Mounted>> {
    let number = fd.as_fd().as_raw_fd();
    let said = fs::read(format!("/proc/self/fdinfo/{number}"))
        .context(|| "ask on which mount a file is")?;
    let id = said
        .split(|byte| *byte == b'\n')
        .find_map(|line| line.strip_prefix(b"mnt_id:"))
        .map(<[u8]>::trim_ascii);
    Ok(mounts.iter().find(|mounted| Some(&*mounted.id) == id))
}

/// The mount that an open file is on; `None` if it has just gone.
pub fn of_file(fd: impl AsFd) -> Result<Option<Mounted>> {
    Ok(mount_of(fd, &read()?)?.cloned())
}

/// The mount that a path is on; `None` if there is nothing of that name.
pub fn of_path(path: &str) -> Result<Option<Mounted>> {
    let file = match fs::File::open(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        file => file.context(|| format!("open {path}"))?,
    };
    of_file(file)
}

fn parse(text: &[u8]) -> Vec<Mounted> {
    let lines = text.split(|byte| *byte == b'\n');
    lines.filter_map(parse_line).collect()
}

fn parse_line(line: &[u8]) -> Option<Mounted> {
    let mut fields = line.split(|byte| *byte == b' ');
    let id = fields.next()?.to_vec();
    let device = fields.nth(1)?;
    let (root, point) = (fields.next()?, fields.next()?);
    // Behind the mount's options, as many fields as the kernel has to tell.
    let mut fields = fields.skip_while(|field| *field != b"-").skip(1);
    let text = |field: &[u8]| String::from_utf8_lossy(&unescape(field)).into_owned();
    Some(Mounted {
        id,
        device: text(device),
        root: path(root),
        point: path(point),
        file_system: text(fields.next()?),
        source: text(fields.next()?),
        options: text(fields.next()?),
    })
}

fn path(field: &[u8]) -> PathBuf {
    PathBuf::from(OsString::from_vec(unescape(field)))
}

/// The kernel writes blanks and backslashes as three octal digits.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, after @ ..] = rest {
        match after {
            [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', left @ ..] if *first == b'\\' => {
                bytes.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
                rest = left;
            }
            _ => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_with_and_without_optional_fields() {
        let mounts = parse(
            b"22 1 8:1 / / rw - ext4 /dev/a rw,errors=remount-ro\n\
              35 22 8:2 /snap\\040shots/5 /cache\\134x rw shared:1 master:2 - xfs /dev/b ro\n\
              not a line\n",
        );
        assert_eq!(mounts.len(), 2);
        let [first, second] = mounts.as_slice() else {
            panic!("{mounts:?}");
        };
        assert_eq!(first.options, "rw,errors=remount-ro");
        assert_eq!(first.source, "/dev/a");
        assert_eq!(second.device, "8:2");
        assert_eq!(second.root, PathBuf::from("/snap shots/5"));
        assert_eq!(second.point, PathBuf::from("/cache\\x"));
        assert_eq!(second.file_system, "xfs");
        assert_eq!(unescape(b"a\\134b\\"), b"a\\b\\");
    }

    #[test]
    fn a_reading_counts_once_the_next_one_is_the_same() {
        let settled = |readings: &[&str]| {
            let mut readings = readings.iter().map(|text| text.as_bytes().to_vec());
            read_until_settled(|| Ok(readings.next().unwrap())).unwrap()
        };
        assert_eq!(settled(&["a b", "a b"]), b"a b");
        // The second reading has missed "b", because "a" went away.
        assert_eq!(settled(&["a b c", "c", "b c", "b c"]), b"b c");
        let mut count = 0;
        let error = read_until_settled(|| {
            count += 1;
            Ok(vec![count])
        });
        assert_eq!(error.unwrap_err().kind(), ErrorKind::Unavailable);
    }

    #[test]
    fn an_open_file_is_found_on_its_mount() {
        let mounts = read().unwrap();
        let file = fs::File::open("/proc/self/status").unwrap();
        let found = mount_of(&file, &mounts).unwrap().unwrap();
        assert_eq!(found.file_system, "proc");
        assert_eq!(found.point, PathBuf::from("/proc"));
        assert_eq!(mount_of(&file, &[]).unwrap(), None);
    }
}
