//! The image volume: `<root>`. The directory stays open as long as the daemon runs,
//! because the lock and, by default, the database keep files open there anyway.

use std::fs::DirBuilder;
use std::io::ErrorKind as IoKind;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock};

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{
    AtFlags, FlockOperation, Mode, OFlags, flock, fstat, openat, readlinkat, statat, symlinkat,
    unlinkat,
};
use rustix::io::Errno;
use rustix::process::geteuid;

use super::dirs::{Dirs, Owner, ensure_directory, open_to_list};
use super::host_dirs::open_host_dirs;
use super::identity::open_top;
use super::paths::{BY_HAND, EMPTY, SNAPSHOTS, upper_of};
use super::planned_mounts::require_mounted;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::types::{MountPath, SnapshotId, Volume};
use crate::util::cached_lookup::{Glance, glance};
use crate::util::entries::{is_empty, lacks_types};
use crate::waits::{self, Awaited};

/// The opened image volume.
pub struct Image {
    path: MountPath,
    dirs: Arc<Dirs>,
    /// The directory of links to host directories, once it exists.
    pub(super) host_dirs: OnceLock<OwnedFd>,
    /// Locked while links to host directories are created.
    pub(super) host_links_made: Mutex<()>,
}

/// The root directory, before anything in it has been changed.
pub struct Root {
    path: MountPath,
    top: OwnedFd,
}

impl Root {
    /// The path of the root, as configured.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The opened root directory.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.top.as_fd()
    }

    /// Checks that the root belongs to the user of this process, because another user
    /// could put anything there.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::FailedPrecondition`] if the root belongs to another user.
    pub fn require_own(&self) -> Result<()> {
        let path = &self.path;
        let owner = fstat(&self.top)
            .context(|| format!("look at {path}"))?
            .st_uid;
        if owner == geteuid().as_raw() {
            return Ok(());
        }
        Err(Error::refused(format!(
            "the root directory {path} belongs to user {owner}, and this command runs as user \
             {}: give the --root-dir of the daemon, or run the command as user {owner}",
            geteuid().as_raw()
        )))
    }

    /// Returns an error if the file system reports no types in directory
    /// entries (`d_type` in readdir(3)). overlayfs needs the types to find
    /// whiteouts: without types, deleted files show again. The check needs at least
    /// one entry in the root, such as the lock.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::FailedPrecondition`] on such a file system.
    pub fn require_entry_types(&self) -> Result<()> {
        let path = &self.path;
        match lacks_types(&self.top).context(|| format!("list {path}"))? {
            true => Err(no_entry_types(path)),
            false => Ok(()),
        }
    }
}

impl Image {
    /// Opens the root directory, creating it (0700, with its parents) if it is missing.
    ///
    /// # Errors
    /// [`ErrorKind::FailedPrecondition`] if the path is not a directory, or if the root is new
    /// (it has no entry `state`) and should be on a disk that is not mounted, according to the
    /// host's fstab and mount units.
    pub fn open_root(path: &MountPath, state: &str) -> Result<Root> {
        if !Path::new(&**path).join(state).exists() {
            require_mounted(path)?;
        }
        create_directory(path, "root", "--root-dir")?;
        let top = open_top(path).context(|| format!("open the root directory {path}"))?;
        Ok(Root {
            path: path.clone(),
            top,
        })
    }

    /// Opens a root directory that must exist.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::FailedPrecondition`] if it does not exist.
    pub fn open_existing_root(path: &MountPath) -> Result<Root> {
        match open_top(path) {
            Err(Errno::NOENT | Errno::NOTDIR) => Err(Error::refused(format!(
                "there is no root directory {path}: give the --root-dir of the daemon"
            ))),
            top => Ok(Root {
                path: path.clone(),
                top: top.context(|| format!("open the root directory {path}"))?,
            }),
        }
    }

    /// Whether `snapshots/` of a root contains anything.
    pub fn holds_snapshots(root: &Root) -> Result<bool> {
        let looking = || format!("look into {}/{SNAPSHOTS}", root.path);
        match open_to_list(&root.top, SNAPSHOTS) {
            Err(Errno::NOENT) => Ok(false),
            opened => Ok(!opened.and_then(is_empty).context(looking)?),
        }
    }

    /// Opens the directories in the root, and creates the missing ones.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::FailedPrecondition`] if one of the names is taken by something else.
    pub fn open(root: Root) -> Result<Image> {
        ensure_directory(&root.top, &root.path, EMPTY)?;
        let host_dirs = open_host_dirs(&root.top);
        let dirs = Dirs::open(Volume::Image, &root.path, root.top)?;
        dirs.trash_fd()?;
        Ok(Image {
            path: root.path,
            host_dirs,
            host_links_made: Mutex::default(),
            dirs: Arc::new(dirs),
        })
    }

    /// `snapshots/` and `trash/`.
    pub fn dirs(&self) -> &Arc<Dirs> {
        &self.dirs
    }

    /// `<root>`, as configured.
    pub(super) fn path(&self) -> &str {
        &self.path
    }

    /// The owner of a layer's top directory, wherever its bytes are.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::DataLoss`] if the layer's directory is missing.
    pub fn layer_owner(&self, id: SnapshotId) -> Result<Owner> {
        let looking = || format!("look at the layer {}", self.layer_path(id));
        // For an unmoved layer, this path leads through a link. The link is
        // safe, because this program has made it.
        let snapshots = self.dirs.snapshots_fd();
        let found = match glance(snapshots, &upper_of(id)) {
            Glance::There(upper) => fstat(upper),
            Glance::Absent | Glance::Unknown => {
                waits::enter(Awaited::Volume(Volume::Image))?;
                statat(snapshots, upper_of(id), AtFlags::empty())
            }
        };
        let stat = found.map_err(|errno| match errno {
            Errno::NOENT => Error::missing(errno, format!("{}, which is missing", looking())),
            _ => Error::missing(errno, looking()),
        })?;
        Ok(Owner {
            uid: stat.st_uid,
            gid: stat.st_gid,
        })
    }

    /// Makes `snapshots/<id>` a link to `target`. An older link of that name is removed,
    /// and a directory is set aside.
    pub(super) fn link(&self, id: SnapshotId, target: &str) -> Result<()> {
        let linking = || format!("link {}/{id} to {target}", self.snapshots_path());
        if self.links_to(id, target)? {
            return Ok(());
        }
        self.remove_link(id)?;
        self.dirs.clear_away(id).context(linking)?;
        symlinkat(target, self.dirs.snapshots_fd(), id.to_string()).context(linking)
    }

    /// Whether `snapshots/<id>` is a link to `target`.
    pub fn links_to(&self, id: SnapshotId, target: &str) -> Result<bool> {
        match readlinkat(self.dirs.snapshots_fd(), id.to_string(), Vec::new()) {
            Ok(found) => Ok(found.to_bytes() == target.as_bytes()),
            // There is no such entry, or it is not a link.
            Err(Errno::NOENT | Errno::INVAL) => Ok(false),
            Err(errno) => {
                Err(errno).context(|| format!("read the link {}/{id}", self.snapshots_path()))
            }
        }
    }

    /// Whether `snapshots/<id>` is a link as
    /// [`Volumes::link_home`](super::Volumes::link_home) makes it, perhaps to an earlier
    /// place of the writable volume.
    pub fn is_layer_link(&self, id: SnapshotId) -> Result<bool> {
        self.leads_to_layer(&id.to_string(), id)
    }

    /// Whether the entry `name` of `snapshots/` is a link to a directory of this layer on a
    /// writable volume.
    pub(super) fn leads_to_layer(&self, name: &str, id: SnapshotId) -> Result<bool> {
        match readlinkat(self.dirs.snapshots_fd(), name, Vec::new()) {
            Ok(target) => {
                let end = format!("/{SNAPSHOTS}/{id}");
                Ok(target.to_bytes().ends_with(end.as_bytes()))
            }
            Err(Errno::NOENT | Errno::INVAL) => Ok(false),
            Err(errno) => {
                Err(errno).context(|| format!("read the link {}/{name}", self.snapshots_path()))
            }
        }
    }

    /// Removes `snapshots/<id>` if it is a link.
    pub fn remove_link(&self, id: SnapshotId) -> Result<()> {
        match unlinkat(self.dirs.snapshots_fd(), id.to_string(), AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT | Errno::ISDIR) => Ok(()),
            Err(errno) => {
                Err(errno).context(|| format!("remove the link {}/{id}", self.snapshots_path()))
            }
        }
    }

    /// Creates a mark that a person is about to mount the snapshot to write to it. The mark is
    /// only a hint: it stays after a reboot, and a read-only root gets no mark. As long as the
    /// returned file is open, [`Image::unmark_unless_mounted`] does not remove the mark.
    pub fn mark_mounted_by_hand(&self, id: SnapshotId) -> Result<Option<OwnedFd>> {
        let marking = || format!("write {}/{BY_HAND}/{id}", self.path);
        let marked = ensure_directory(self.top(), &self.path, BY_HAND).and_then(|directory| {
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            loop {
                let mode = Mode::from_raw_mode(0o600);
                let mark = openat(&directory, id.to_string(), flags, mode).context(marking)?;
                flock(&mark, FlockOperation::LockExclusive).context(marking)?;
                // Another process may have removed the mark before this one locked it.
                if fstat(&mark).context(marking)?.st_nlink > 0 {
                    return Ok(mark);
                }
            }
        });
        match marked {
            Err(error) if error.kind() == ErrorKind::FailedPrecondition => Ok(None),
            marked => marked.map(Some),
        }
    }

    /// Whether a person may have mounted the snapshot to write to it.
    pub fn is_marked_mounted_by_hand(&self, id: SnapshotId) -> Result<bool> {
        let mark = format!("{BY_HAND}/{id}");
        Ok(match glance(self.top(), &mark) {
            Glance::There(_) => true,
            Glance::Absent => false,
            Glance::Unknown => {
                waits::enter(Awaited::Volume(Volume::Image))?;
                statat(self.top(), mark, AtFlags::SYMLINK_NOFOLLOW).is_ok()
            }
        })
    }

    /// Whether the snapshot is not marked as mounted by hand and has no links to host
    /// directories, as far as the kernel knows without accessing a disk. `false` means that
    /// it may have a mark or links.
    pub fn is_plain_for_sure(&self, id: SnapshotId) -> bool {
        let mark = glance(self.top(), &format!("{BY_HAND}/{id}"));
        matches!(mark, Glance::Absent) && self.has_no_links_for_sure(id)
    }

    /// Removes the mark that a person may have mounted the snapshot, unless `is_mounted`
    /// returns `true`. Returns whether the mark is still there.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Unavailable`] while a person is mounting the snapshot.
    pub fn unmark_unless_mounted(
        &self,
        id: SnapshotId,
        is_mounted: impl FnOnce() -> Result<bool>,
    ) -> Result<bool> {
        let name = format!("{BY_HAND}/{id}");
        let looking = || format!("look at {}/{name}", self.path);
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mark = match openat(self.top(), name.as_str(), flags, Mode::empty()) {
            Err(Errno::NOENT) => return Ok(false),
            mark => mark.context(looking)?,
        };
        match flock(&mark, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => {
                let what = format!("snapshot {id} is being mounted by hand: try again");
                return Err(Error::new(ErrorKind::Unavailable, what));
            }
            locked => locked.context(looking)?,
        }
        if is_mounted()? {
            return Ok(true);
        }
        match unlinkat(self.top(), name.as_str(), AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(false),
            Err(errno) => Err(errno).context(|| format!("remove {}/{name}", self.path)),
        }
    }

    /// The root directory itself, for the files outside of the volume's
    /// directories.
    pub fn top(&self) -> BorrowedFd<'_> {
        self.dirs.top_fd()
    }
}

pub(super) fn no_entry_types(path: &str) -> Error {
    Error::refused(format!(
        "the file system of {path} does not report the types of directory entries (d_type), \
         which overlayfs needs: create the file system again with this feature (mkfs.xfs -n \
         ftype=1, mkfs.ext4 -O filetype), or use another disk"
    ))
}

/// Creates a directory (0700, with its parents) unless it exists. If there is anything
/// but a directory at `path`, the error names `what` and `flag`.
pub(super) fn create_directory(path: &str, what: &str, flag: &str) -> Result<()> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.map_err(|error| match error.kind() {
        IoKind::NotADirectory | IoKind::AlreadyExists => Error::refused(format!(
            "the {what} {path} is not a directory: give another {flag}"
        )),
        _ => Error::caused(
            ErrorKind::Internal,
            format!("create the {what} {path}"),
            error,
        ),
    })
}
