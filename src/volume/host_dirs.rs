//! Links to host directories: `<root>/lowers/<id>.<number>`.
//!
//! Mounting sides shorten long lists of lower directories by changing into the
//! directory that all share, and cannot where one is elsewhere on the host. So
//! each is reached through a link beneath the root, and whatever its path holds
//! stays out of the mount options. Each snapshot has links of its own, by number
//! from 0 on: nothing has to be counted, and none is touched for another's sake.
//! After a crash there may be links of snapshots that are gone, or too few:
//! a start removes the former, the next look at the mounts mends the latter.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::OnceLock;

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{AtFlags, readlinkat, renameat, symlinkat, unlinkat};
use rustix::io::Errno;

use super::cached_lookup::{Glance, glance};
use super::dirs::{ensure_directory, open_to_list};
use super::image::Image;
use super::paths::HOST_DIRS;
use crate::error::{Context, Result};
use crate::types::SnapshotId;
use crate::util::entries::entries;
use crate::util::lock::lock;
use crate::util::undo::Undo;

/// Opens `lowers/` of a root, if it is there.
pub(super) fn open_host_dirs(top: impl AsFd) -> OnceLock<OwnedFd> {
    open_to_list(top, HOST_DIRS).map_or_else(|_| OnceLock::new(), OnceLock::from)
}

/// What a link is called before it takes the place of another. [`Image::host_links_made`]
/// lets one request at a time use it.
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

    /// Whether a snapshot's links are these, and no others.
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

    /// Whether a snapshot has none, told without a disk: `false` if it may have some.
    pub(super) fn has_no_links_for_sure(&self, id: SnapshotId) -> bool {
        let first = |links| glance(links, &link_name(id, 0));
        let first = self.links_dir().map(first);
        matches!(first, None | Some(Glance::Absent))
    }

    /// Makes a snapshot's links lead to these directories, one after another,
    /// each in one step; further ones are removed. Leaves nothing behind on failure.
    pub fn link_host_dirs<'a>(
        &'a self,
        id: SnapshotId,
        targets: &[PathBuf],
    ) -> Result<Undo<impl FnOnce() -> Result<()> + use<'a>>> {
        let new = Undo::new("link the host directories of a snapshot", move || {
            self.remove_host_dir_links(id)
        });
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

    /// Removes a snapshot's links, if it has any. If it has none, a disk that takes no
    /// writes is not waited for.
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

    /// Removes every link but those of the snapshots that `is_wanted` names.
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
            log::info!("the link {:?} in lowers/ led nowhere needed: removed", name);
        }
        Ok(())
    }

    fn links_path(&self) -> String {
        format!("{}/{HOST_DIRS}", self.path())
    }

    /// Where nobody has asked for host directories, there is none.
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
