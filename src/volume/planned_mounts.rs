//! Mount points in the host's configuration. A volume that is used for the first time
//! must not begin in the bare mount point of a disk that is mounted later.

use std::path::{Path, PathBuf};

use super::preconditions::is_mount_point;
use crate::error::{Context, Error, Result};

const FSTAB: &str = "/etc/fstab";
/// The directories of mount units, including those that systemd generates from fstab
/// (systemd.unit(5)).
const UNITS: [&str; 4] = [
    "/etc/systemd/system",
    "/run/systemd/system",
    "/run/systemd/generator",
    "/usr/lib/systemd/system",
];

/// Returns an error if `path` should be on a disk that fstab or a mount unit names, and
/// this disk is not mounted.
///
/// # Errors
///
/// [`ErrorKind::FailedPrecondition`](crate::error::ErrorKind::FailedPrecondition).
pub(super) fn require_mounted(path: &str) -> Result<()> {
    let looking = || format!("find out which disk should be mounted at {path}");
    let fstab = match std::fs::read(FSTAB) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        bytes => bytes.context(looking)?,
    };
    let fstab = String::from_utf8_lossy(&fstab);
    let path = resolve(Path::new(path));
    for point in path.ancestors().filter(|point| *point != Path::new("/")) {
        let shown = point.to_string_lossy();
        if point.is_dir() && is_mount_point(&shown).context(looking)? {
            return Ok(());
        }
        let name = unit_name(&shown);
        let mut units = UNITS.iter().map(|folder| format!("{folder}/{name}"));
        let named_by = match names(&fstab, point) {
            true => Some(FSTAB.to_owned()),
            false => units.find(|unit| Path::new(unit).exists()),
        };
        if let Some(named_by) = named_by {
            return Err(Error::refused(format!(
                "the disk that {named_by} names for {shown} is not mounted, and {} should be on \
                 this disk: mount it (mount {shown}), or remove the entry from {named_by}",
                path.display()
            )));
        }
    }
    Ok(())
}

/// Resolves links in the path, as far as it exists.
fn resolve(path: &Path) -> PathBuf {
    match (path.canonicalize(), path.parent(), path.file_name()) {
        (Ok(resolved), _, _) => resolved,
        (Err(_), Some(parent), Some(name)) => resolve(parent).join(name),
        _ => path.to_owned(),
    }
}

/// Whether an fstab (fstab(5)) names this mount point.
fn names(fstab: &str, point: &Path) -> bool {
    fstab.lines().any(|line| {
        let mut fields = line.split_whitespace();
        let is_entry = fields.next().is_some_and(|device| !device.starts_with('#'));
        let at = fields.next().map(unescape);
        is_entry && at.is_some_and(|at| resolve(Path::new(&at)) == point)
    })
}

/// Decodes a backslash and three octal digits, for example `\040` for a blank.
fn unescape(field: &str) -> String {
    let bytes = field.as_bytes();
    let mut text = Vec::new();
    let mut at = 0;
    while let Some(byte) = bytes.get(at) {
        let digits = bytes
            .get(at + 1..at + 4)
            .and_then(|digits| std::str::from_utf8(digits).ok());
        let escaped = digits.and_then(|digits| u8::from_str_radix(digits, 8).ok());
        let (byte, length) = match escaped {
            Some(escaped) if *byte == b'\\' => (escaped, 4),
            _ => (*byte, 1),
        };
        text.push(byte);
        at += length;
    }
    String::from_utf8_lossy(&text).into_owned()
}

/// The name of the mount unit for this path (`systemd-escape --path
/// --suffix=mount`).
fn unit_name(path: &str) -> String {
    let mut name = String::new();
    for (at, byte) in path.trim_matches('/').bytes().enumerate() {
        match byte {
            b'/' => name.push('-'),
            b'.' if at == 0 => name.push_str("\\x2e"),
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b':' | b'_' | b'.' => {
                name.push(char::from(byte));
            }
            other => name.push_str(&format!("\\x{other:02x}")),
        }
    }
    name + ".mount"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_named_as_systemd_does() {
        for (path, name) in [
            ("/mnt/ssd", "mnt-ssd.mount"),
            ("/mnt/my-disk", "mnt-my\\x2ddisk.mount"),
            ("/srv/a b/.c", "srv-a\\x20b-.c.mount"),
            ("/.hidden", "\\x2ehidden.mount"),
        ] {
            assert_eq!(unit_name(path), name);
        }
    }

    #[test]
    fn fstab_is_read_as_mount_reads_it() {
        let fstab = "# /mnt/comment\n\
                     UUID=1 /no/such/ssd ext4 defaults,nofail 0 2\n\
                     \tLABEL=x   /no/such/m\\171\\040disk/ xfs\n\
                     /swapfile none swap sw\n";
        let names = |point: &str| names(fstab, Path::new(point));
        assert!(names("/no/such/ssd") && names("/no/such/my disk"));
        assert!(!names("/mnt/comment") && !names("/no/such") && !names("/swapfile"));
    }
}
