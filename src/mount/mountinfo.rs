//! The kernel's list of the mounts in this process's mount namespace
//! (proc_pid_mountinfo(5)).

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use rustix::fd::{AsFd, AsRawFd};

use crate::error::{Context, Error, ErrorKind, Result};

/// One mount.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mounted {
    /// The mount's number.
    pub id: Vec<u8>,
    /// The device of the mounted file system, as `major:minor`.
    pub device: String,
    /// The directory of the file system that is visible at the mount point.
    pub root: PathBuf,
    /// The mount point.
    pub point: PathBuf,
    /// Whether this mount is read-only. Another mount of the same file system may be
    /// writable.
    pub is_read_only: bool,
    /// The type of the file system, such as `ext4`.
    pub file_system: String,
    /// The source of the mount, such as `/dev/sda1`.
    pub source: String,
    /// The file system's own options, separated by commas.
    pub options: String,
    /// The directories of an overlay, as they were given to the kernel. A path may be
    /// relative to a directory that only the mounting program knew, or may not exist any
    /// more.
    pub overlay: Vec<(Part, PathBuf)>,
}

/// The role of a directory in an overlay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The directory that receives all writes.
    Upper,
    /// A directory beneath the upper one.
    Lower,
}

/// Reads all mounts, in the kernel's order.
///
/// # Errors
///
/// [`ErrorKind::Unavailable`] if the list changes each time it is read.
pub fn read() -> Result<Vec<Mounted>> {
    let path = "/proc/self/mountinfo";
    read_until_settled(|| fs::read(path).context(|| format!("read {path}")))
        .map(|text| parse(&text))
}

/// Reads the mounts of another process's mount namespace; `None` if the process has ended,
/// or the caller may not read its list.
///
/// # Errors
///
/// The same as in [`read`].
pub(super) fn read_of(process: &str) -> Result<Option<Vec<Mounted>>> {
    let path = format!("/proc/{process}/mountinfo");
    if fs::File::open(&path).is_err() {
        return Ok(None);
    }
    let list = || match fs::read(&path) {
        // The process has ended since the first reading.
        Err(_) => Ok(Vec::new()),
        Ok(text) => Ok(text),
    };
    let text = read_until_settled(list)?;
    Ok((!text.is_empty()).then(|| parse(&text)))
}

/// Reads the list of mounts until two readings are the same. The kernel returns the list
/// piece by piece, and before Linux 5.8 an unmount in between makes the next mount missing
/// in the reading. With one reading only, a mounted directory could be taken for an
/// unmounted one, and be moved or deleted.
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
        format!("the list of mounts has changed {MOST} times while it was read: try again"),
    ))
}

/// The mount that an open file is on; `None` if this mount is not in `mounts`, because it
/// was unmounted before they were read.
pub fn mount_of(fd: impl AsFd, mounts: &[Mounted]) -> Result<Option<&Mounted>> {
    let number = fd.as_fd().as_raw_fd();
    let said = fs::read(format!("/proc/self/fdinfo/{number}"))
        .context(|| format!("read /proc/self/fdinfo/{number}"))?;
    let id = said
        .split(|byte| *byte == b'\n')
        .find_map(|line| line.strip_prefix(b"mnt_id:"))
        .map(<[u8]>::trim_ascii);
    Ok(mounts.iter().find(|mounted| Some(&*mounted.id) == id))
}

/// The mount that an open file is on; `None` if it was just unmounted.
pub fn of_file(fd: impl AsFd) -> Result<Option<Mounted>> {
    Ok(mount_of(fd, &read()?)?.cloned())
}

/// The path of an open file in this process's mount namespace.
pub fn path_of_file(fd: impl AsFd) -> Option<PathBuf> {
    fs::read_link(format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd())).ok()
}

/// The mount that a path is on; `None` if the path does not exist.
pub fn of_path(path: &str) -> Result<Option<Mounted>> {
    let file = match fs::File::open(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        file => file.context(|| format!("open {path}"))?,
    };
    of_file(file).context(|| format!("find out on which mount {path} is"))
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
    let mut flags = fields.next()?.split(|byte| *byte == b',');
    let is_read_only = flags.any(|flag| flag == b"ro");
    // The number of optional fields depends on the mount; a hyphen ends them.
    let mut fields = fields.skip_while(|field| *field != b"-").skip(1);
    let text = |field: &[u8]| String::from_utf8_lossy(&unescape(field)).into_owned();
    let (file_system, source, options) =
        (text(fields.next()?), text(fields.next()?), fields.next()?);
    // A read-only file system makes each of its mounts read-only.
    let mut own = options.split(|byte| *byte == b',');
    let is_read_only = is_read_only || own.any(|option| option == b"ro");
    let overlay = match &*file_system {
        "overlay" => overlay_directories(options),
        _ => Vec::new(),
    };
    Some(Mounted {
        id,
        device: text(device),
        root: path(root),
        point: path(point),
        is_read_only,
        file_system,
        source,
        options: text(options),
        overlay,
    })
}

/// Reads the directories of an overlay from its options. Linux 6.8 and later may list
/// lower directories one by one (`lowerdir+=`, `datadir+=`).
fn overlay_directories(options: &[u8]) -> Vec<(Part, PathBuf)> {
    let mut directories = Vec::new();
    // In a path, the kernel writes commas as octal digits.
    for option in options.split(|byte| *byte == b',') {
        let Some(at) = option.iter().position(|byte| *byte == b'=') else {
            continue;
        };
        let (name, value) = (&option[..at], unescape(&option[at + 1..]));
        match name {
            b"upperdir" => directories.push((Part::Upper, path_of(value))),
            b"lowerdir" => {
                directories.extend(split_lowers(&value).map(|lower| (Part::Lower, lower)));
            }
            b"lowerdir+" | b"datadir+" => directories.push((Part::Lower, path_of(value))),
            _ => {}
        }
    }
    directories
}

/// Splits the value of the option `lowerdir`, in which a backslash precedes a colon
/// that belongs to a name.
fn split_lowers(value: &[u8]) -> impl Iterator<Item = PathBuf> {
    let mut lowers = vec![Vec::new()];
    let mut bytes = value.iter();
    while let Some(byte) = bytes.next() {
        match byte {
            b':' => lowers.push(Vec::new()),
            b'\\' => lowers
                .last_mut()
                .expect("one at least")
                .extend(bytes.next()),
            other => lowers.last_mut().expect("one at least").push(*other),
        }
    }
    lowers.retain(|lower| !lower.is_empty());
    lowers.into_iter().map(path_of)
}

fn path_of(bytes: Vec<u8>) -> PathBuf {
    PathBuf::from(OsString::from_vec(bytes))
}

fn path(field: &[u8]) -> PathBuf {
    path_of(unescape(field))
}

/// Decodes the three octal digits that the kernel writes for blanks and
/// backslashes.
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
        assert!(second.is_read_only && !first.is_read_only);
        assert_eq!(second.file_system, "xfs");
        assert_eq!(unescape(b"a\\134b\\"), b"a\\b\\");
    }

    #[test]
    fn directories_of_an_overlay_are_found() {
        let of = |options: &str| {
            let line = format!("40 1 0:50 / /m rw - overlay overlay {options}\n");
            let [mounted] = &*parse(line.as_bytes()) else {
                panic!("{options}");
            };
            let text = |(part, path): &(Part, PathBuf)| format!("{part:?} {}", path.display());
            mounted.overlay.iter().map(text).collect::<Vec<_>>()
        };
        assert_eq!(
            of("rw,lowerdir=3/fs:/r/1/fs,upperdir=/a\\054b/5/fs,workdir=/w,index=off"),
            ["Lower 3/fs", "Lower /r/1/fs", "Upper /a,b/5/fs"]
        );
        assert_eq!(
            of("ro,lowerdir=/a\\134:b::/c,lowerdir+=/d:e,datadir+=/f"),
            ["Lower /a:b", "Lower /c", "Lower /d:e", "Lower /f"]
        );
        assert_eq!(of("ro"), [""; 0]);
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
