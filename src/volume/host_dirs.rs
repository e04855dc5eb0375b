//! Links to host directories: `<root>/lowers/<id>.<number>`.
//!
//! The mounting program shortens long lists of lower directories by changing
//! into their common parent directory. It cannot do that if one of them is
//! elsewhere on the host, so each host directory is reached through a link below
//! the root. This also keeps all characters of its path out of the mount
//! options. Each snapshot has links of its own, numbered from 0, so that no
//! references have to be counted, and no snapshot touches the links of another.
//!
//! After a crash, links of removed snapshots may be left, or some links may be
//! missing. The next start removes the former; the latter are created by the
//! next request for the mounts.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::OnceLock;

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{AtFlags, readlinkat, renameat, symlinkat, unlinkat};
use rustix::io::Errno;

use super::dirs::{ensure_directory, open_to_list};
use super::image::Image;
use super::paths::HOST_DIRS;
use crate::error::{Context, Result};
use crate::types::SnapshotId;
use crate::util::cached_lookup::{Glance, glance};
use crate::util::entries::entries;
use crate::util::lock::lock;
use crate::util::undo::Undo;

/// Opens `lowers/` of a root if it exists.
pub(super) fn open_host_dirs(top: impl AsFd) -> OnceLock<OwnedFd> {
    open_to_list(top, HOST_DIRS).map_or_else(|_| OnceLock::new(), OnceLock::from)
}

/// The name of a link before it replaces another one. While [`Image::host_links_made`] is
/// locked, only one request uses it.
const NEW: &str = ".new";

impl Image {
    /// The paths by which `count` host directories of a snapshot are
    /// mounted, the topmost first.
    pub fn host_dir_paths(&self, id: SnapshotId, count: usize) -> Vec<String> {
        let path = self.links_path();
        (0..count)
            .map(|number| format!("{path}/{}", link_name(id, number)))
            .collect()
    }

    /// Whether a snapshot has links to exactly these directories.
    pub fn has_host_dir_links(&self, id: SnapshotId, targets: &[PathBuf]) -> Result<bool> {
        let Some(links) = self.links_dir() else {
            return Ok(targets.is_empty());
        };
        let none = [OsStr::new("")];
        let wanted = targets.iter().map(|target| target.as_os_str()).chain(none);
        for (number, wanted) in wanted.enumerate() {
            let name = link_name(id, number);
            let is_right = match readlinkat(links, name.as_str(), Vec::new()) {
                Ok(found) => found.to_bytes() == wanted.as_bytes(),
                Err(Errno::NOENT) => wanted.is_empty(),
                Err(Errno::INVAL) => false,
                Err(errno) => {
                    return Err(errno)
                        .context(|| format!("read the link {}/{name}", self.links_path()));
                }
            };
            if !is_right {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Whether a snapshot has no links, as far as the kernel knows without accessing a
    /// disk. `false` means that it may have some.
    pub(super) fn has_no_links_for_sure(&self, id: SnapshotId) -> bool {
        let first = |links| glance(links, &link_name(id, 0));
        let first = self.links_dir().map(first);
        matches!(first, None | Some(Glance::Absent))
    }

    /// Makes a snapshot's links lead to these directories. Each link is replaced in
    /// one step; further links are removed. On failure, no new links are left.
    pub fn link_host_dirs<'a>(
        &'a self,
        id: SnapshotId,
        targets: &[PathBuf],
    ) -> Result<Undo<impl FnOnce() -> Result<()> + use<'a>>> {
        let new = Undo::new(
            "the links to the host directories of a snapshot",
            move || self.remove_host_dir_links(id),
        );
        if targets.is_empty() {
            self.remove_host_dir_links(id)?;
            return Ok(new);
        }
        let links = self.ensure_links_dir()?;
        let _one_at_a_time = lock(&self.host_links_made);
        for (number, target) in targets.iter().enumerate() {
            let name = link_name(id, number);
            let link = || match symlinkat(target, links, NEW) {
                Err(Errno::EXIST) => {
                    unlinkat(links, NEW, AtFlags::empty())?;
                    symlinkat(target, links, NEW)
                }
                linked => linked,
            };
            link()
                .and_then(|()| renameat(links, NEW, links, name.as_str()))
                .context(|| format!("link {}/{name} to {}", self.links_path(), target.display()))?;
        }
        self.remove_host_dir_links_from(id, targets.len())?;
        Ok(new)
    }

    /// Removes a snapshot's links, if it has any. If it has no links, nothing is written,
    /// because a write waits for a disk that does not answer.
    pub fn remove_host_dir_links(&self, id: SnapshotId) -> Result<()> {
        if self.has_host_dir_links(id, &[])? {
            return Ok(());
        }
        self.remove_host_dir_links_from(id, 0)
    }

    fn remove_host_dir_links_from(&self, id: SnapshotId, first: usize) -> Result<()> {
        let Some(links) = self.links_dir() else {
            return Ok(());
        };
        for name in (first..).map(|number| link_name(id, number)) {
            match unlinkat(links, name.as_str(), AtFlags::empty()) {
                Ok(()) => {}
                Err(Errno::NOENT) => break,
                Err(errno) => {
                    return Err(errno)
                        .context(|| format!("remove the link {}/{name}", self.links_path()));
                }
            }
        }
        Ok(())
    }

    /// Removes all links except those of the snapshots for which `is_wanted`
    /// returns `true`.
    pub fn sweep_host_dir_links(&self, is_wanted: impl Fn(SnapshotId) -> bool) -> Result<()> {
        let Some(links) = self.links_dir() else {
            return Ok(());
        };
        let sweeping = || format!("look through {}", self.links_path());
        for entry in entries(links).context(sweeping)? {
            let entry = entry.context(sweeping)?;
            let name = entry.file_name();
            let is_ours = name.to_bytes() == NEW.as_bytes() || linked_id(name.to_bytes()).is_some();
            if linked_id(name.to_bytes()).is_some_and(&is_wanted) || !is_ours {
                continue;
            }
            match unlinkat(links, name, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT | Errno::ISDIR) => {}
                Err(errno) => return Err(errno).context(sweeping),
            }
            log::info!(
                "removed the link {:?} in lowers/, which no snapshot needs any more",
                name
            );
        }
        Ok(())
    }

    fn links_path(&self) -> String {
        format!("{}/{HOST_DIRS}", self.path())
    }

    /// The directory of the links; `None` if no container has ever asked for
    /// host directories.
    fn links_dir(&self) -> Option<BorrowedFd<'_>> {
        self.host_dirs.get().map(AsFd::as_fd)
    }

    fn ensure_links_dir(&self) -> Result<BorrowedFd<'_>> {
        if let Some(links) = self.links_dir() {
            return Ok(links);
        }
        let made = ensure_directory(self.top(), self.path(), HOST_DIRS)?;
        Ok(self.host_dirs.get_or_init(|| made).as_fd())
    }
}

fn link_name(id: SnapshotId, number: usize) -> String {
    format!("{id}.{number}")
}

fn linked_id(name: &[u8]) -> Option<SnapshotId> {
    let dot = name.iter().position(|byte| *byte == b'.')?;
    let number = name.get(dot + 1..)?;
    if number.is_empty() || !number.iter().all(u8::is_ascii_digit) {
        return None;
    }
    SnapshotId::from_directory_name(&name[..dot])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_named_by_snapshot_and_number() {
        let id = SnapshotId::new(12);
        assert_eq!(link_name(id, 3), "12.3");
        assert_eq!(linked_id(b"12.3"), Some(id));
        for strange in ["12", "12.", ".3", ".new", "12.x", "012.3", "12.3.4"] {
            assert_eq!(linked_id(strange.as_bytes()), None, "{strange}");
        }
    }
}
