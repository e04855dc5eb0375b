//! Project quotas: how much of a file system a project may take, and how much
//! it does take.
//!
//! A project is a number that inodes carry. A directory with the inherit flag
//! gives its project to everything created in it. The file system counts the
//! blocks and inodes of each project, and enforces limits (quotactl(2);
//! xfs_quota(8), "PROJECT QUOTA"). Only system calls are used, no external
//! program.
//!
//! Owns: projects and limits on a file system, and finding out what that file
//! system supports and lacks. Never: walks a tree, knows what a directory is
//! for, remembers which snapshot has which project. After a crash, projects and
//! limits are in the state of the file system's journal.

use std::ffi::CString;
use std::fmt;
use std::sync::OnceLock;

use rustix::fd::{AsFd, BorrowedFd};
use rustix::fs::{FileType, fstat, major, minor, stat};
use rustix::io::Errno;

use crate::error::{Context, Error, Result};
use crate::mount::mountinfo;
use crate::sys::quota::{self as sys, Target};
use crate::types::{Limits, ProjectId, QuotedPath, Usage};
use crate::util::fault_point::HAS_FAULT_POINTS;

/// The project ids that the daemon may give out, from a first to a last one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProjectRange {
    first: u32,
    last: u32,
}

impl ProjectRange {
    /// The default range: far from the ids that a kubelet gives to volumes
    /// (1048577 and up), and from those that people write into /etc/projid.
    pub const DEFAULT: ProjectRange = ProjectRange {
        first: 1_000_000_000,
        last: 1_999_999_999,
    };

    /// The ids from `first` to `last`. `None` if the range is empty, or contains
    /// an id that no project can have: 0, and the highest number, which means "no
    /// id".
    pub fn new(first: u32, last: u32) -> Option<ProjectRange> {
        (first > 0 && first <= last && last < u32::MAX).then_some(ProjectRange { first, last })
    }

    /// The first id.
    pub fn first(self) -> ProjectId {
        ProjectId::new(self.first)
    }

    /// Whether the range contains this id.
    pub fn contains(self, project: ProjectId) -> bool {
        (self.first..=self.last).contains(&project.number())
    }

    /// How many ids the range has.
    pub fn count(self) -> u32 {
        self.last - self.first + 1
    }

    /// The id at an index counted from 0. After the last id, counting goes on with the first.
    pub fn at(self, place: u32) -> ProjectId {
        ProjectId::new(self.first + place % self.count())
    }

    /// The id that follows `project`. After the last id, or after an id outside of the range,
    /// this is the first id.
    pub fn after(self, project: ProjectId) -> ProjectId {
        match project.number() >= self.first && project.number() < self.last {
            true => ProjectId::new(project.number() + 1),
            false => self.first(),
        }
    }
}

impl fmt::Display for ProjectRange {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}-{}", self.first, self.last)
    }
}

/// What a file system reports about a project.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// What the project takes.
    pub usage: Usage,
    /// What the project may take.
    pub limits: Limits,
}

impl Held {
    /// Whether the project was never used: nothing is charged to it, and it has
    /// no limits.
    pub fn is_nothing(&self) -> bool {
        *self == Held::default()
    }

    /// Whether nothing is charged to the project.
    pub fn is_unused(&self) -> bool {
        self.usage == Usage::default()
    }

    fn new(quota: &sys::Quota) -> Held {
        let limit = |number: u64| (number > 0).then_some(number);
        Held {
            usage: Usage {
                size_bytes: quota.used_bytes,
                inodes: quota.used_inodes,
            },
            limits: Limits {
                max_bytes: limit(quota.hard_limit_kib.saturating_mul(1024)),
                max_inodes: limit(quota.inode_hard_limit),
            },
        }
    }
}

/// What a file system does for projects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Support {
    /// The file system counts what projects take, and enforces limits.
    Limits,
    /// The file system counts what projects take, but enforces no limits.
    Counts,
}

/// The project quotas of one file system, usable while a directory of it is
/// open.
pub struct Quotas<'a> {
    directory: BorrowedFd<'a>,
    /// The block device, for kernels before Linux 5.14.
    device: Option<CString>,
    support: Support,
}

impl<'a> Quotas<'a> {
    /// Asks what the file system of an open directory supports. Returns `None` if the file
    /// system does not even count what projects take.
    ///
    /// # Errors
    ///
    /// `ErrorKind::FailedPrecondition` if this process may not ask;
    /// `ErrorKind::Internal` for any other failure.
    pub fn probe(directory: BorrowedFd<'a>) -> Result<Option<Quotas<'a>>> {
        let device = match has_quotactl_fd() {
            true => None,
            false => match device_of(directory) {
                Some(device) => Some(device),
                // A file system without a disk has no quotas.
                None => return Ok(None),
            },
        };
        let mut quotas = Quotas {
            directory,
            device,
            support: Support::Counts,
        };
        match sys::quota_flags(quotas.target()) {
            Ok(flags) if flags & sys::LIMITS_PROJECTS != 0 => quotas.support = Support::Limits,
            Ok(flags) if flags & sys::COUNTS_PROJECTS != 0 => {}
            Ok(_) | Err(Errno::NOSYS | Errno::INVAL | Errno::OPNOTSUPP | Errno::SRCH) => {
                return Ok(None);
            }
            Err(Errno::PERM | Errno::ACCESS) => {
                return Err(Error::refused(
                    "the kernel does not permit this process to use quotas (quotactl(2) returned \
                     EPERM or EACCES): the process has to be root, and a service manager's filter \
                     of system calls has to let quotactl and quotactl_fd through",
                ));
            }
            Err(errno) => return Err(errno).context(|| "ask for project quotas"),
        }
        Ok(Some(quotas))
    }

    /// What the file system supports.
    pub fn support(&self) -> Support {
        self.support
    }

    /// What a project takes and may take.
    pub fn held(&self, project: ProjectId) -> Result<Held> {
        match sys::quota(self.target(), project.number()) {
            // Nothing was ever charged to this project.
            Err(Errno::NOENT) => Ok(Held::default()),
            quota => quota
                .map(|quota| Held::new(&quota))
                .context(|| format!("ask for the quota of project {project}")),
        }
    }

    /// Sets the limits of a project. They are durable once the file system has flushed its
    /// journal.
    pub fn set_limits(&self, project: ProjectId, limits: Limits) -> Result<()> {
        let kib = limits.max_bytes.map_or(0, |bytes| (bytes / 1024).max(1));
        sys::set_quota(
            self.target(),
            project.number(),
            kib,
            limits.max_inodes.unwrap_or(0),
        )
        .context(|| format!("set the limits of project {project}"))
    }

    /// For tests: the first project with this or a higher number that has usage or limits, and
    /// both of these (Linux 4.6).
    #[cfg(feature = "fault-points")]
    pub fn next_in_use(&self, from: u32) -> Result<Option<(ProjectId, Held)>> {
        match sys::next_quota(self.target(), from) {
            Err(Errno::NOENT | Errno::SRCH) => Ok(None),
            quota => quota
                .map(|quota| Some((ProjectId::new(quota.id), Held::new(&quota))))
                .context(|| "list projects"),
        }
    }

    /// Makes XFS free the space of deleted files soon. XFS usually does this in the
    /// background. When a program asks for the quota of project 0, XFS does it at once or
    /// a moment later (Linux 5.14, `xfs_qm_scall_getquota`).
    pub fn settle(&self) {
        // The result is not needed: the request itself has the effect.
        let _ = sys::quota(self.target(), 0);
    }

    fn target(&self) -> Target<'_> {
        match &self.device {
            Some(device) => Target::Device(device),
            None => Target::Directory(self.directory),
        }
    }
}

/// An error that says what a file system lacks to enforce limits, and how to enable it.
/// `support` is the result of [`Quotas::probe`], and `path` names the file system in the
/// message.
pub fn lack(directory: BorrowedFd<'_>, path: &str, support: Option<Support>) -> Error {
    let Some(mounted) = mounted(directory) else {
        return Error::refused(format!("the file system of {path} has no project quotas"));
    };
    let (device, point) = (&mounted.source, mounted.point.display());
    let again = |option: &str| {
        format!(
            "umount {point} && mount -o {option} {device} {point} (and {option} in /etc/fstab; \
             a remount is not enough)"
        )
    };
    Error::refused(match (mounted.file_system.as_str(), support) {
        ("ext4", Some(_)) => format!(
            "the ext4 of {path} counts what projects take but enforces no limits, because it is \
             mounted without the option prjquota: {}",
            again("prjquota")
        ),
        ("ext4", None) => format!(
            "the ext4 of {path} lacks the features quota and project: umount {point} && tune2fs \
             -O quota,project -Q prjquota {device} && mount -o prjquota {device} {point} (and \
             prjquota in /etc/fstab)"
        ),
        ("xfs", _) => format!(
            "the XFS of {path} is mounted without the option pquota: {}",
            again("pquota")
        ),
        (other, _) => format!(
            "{path} is on {other}, which has no project quotas here: use ext4 (mkfs.ext4 -O \
             quota,project -E quotatype=prjquota, mounted with prjquota) or XFS (mounted with \
             pquota)"
        ),
    })
}

/// The project that an open directory gives to its new entries;
/// [`ProjectId::NONE`] if it gives none.
pub fn project_of(directory: impl AsFd) -> Result<ProjectId> {
    match sys::file_attributes(&directory) {
        Ok(attributes) if attributes.flags & sys::INHERIT != 0 => {
            Ok(ProjectId::new(attributes.project))
        }
        // File systems without projects give none either.
        Ok(_) | Err(Errno::NOTTY | Errno::OPNOTSUPP) => Ok(ProjectId::NONE),
        Err(errno) => {
            Err(errno).context(|| format!("ask for the project of {}", shown(&directory)))
        }
    }
}

/// Charges an open directory, and everything created in it from now on, to a project or to
/// none. Entries that exist already keep their project.
pub fn set_project(directory: impl AsFd, project: ProjectId) -> Result<()> {
    let setting = || format!("charge {} to project {project}", shown(&directory));
    let mut attributes = sys::file_attributes(&directory).context(setting)?;
    attributes.project = project.number();
    match project {
        ProjectId::NONE => attributes.flags &= !sys::INHERIT,
        _ => attributes.flags |= sys::INHERIT,
    }
    sys::set_file_attributes(&directory, attributes).context(setting)
}

/// Charges an open regular file to a project.
pub fn charge_file(file: impl AsFd, project: ProjectId) -> Result<()> {
    let charging = || format!("charge {} to project {project}", shown(&file));
    let mut attributes = sys::file_attributes(&file).context(charging)?;
    attributes.project = project.number();
    sys::set_file_attributes(&file, attributes).context(charging)
}

/// Whether the kernel has quotactl_fd(2) (Linux 5.14): called with an invalid descriptor,
/// it fails with EBADF rather than ENOSYS.
fn has_quotactl_fd() -> bool {
    static HAS: OnceLock<bool> = OnceLock::new();
    // Lets a test use the older call on a newer kernel.
    let is_hidden = HAS_FAULT_POINTS && std::env::var_os("SNAPSHOTTER_NO_QUOTACTL_FD").is_some();
    *HAS.get_or_init(|| !is_hidden && sys::has_quotactl_fd())
}

/// The path of the block device that a directory's file system is on.
fn device_of(directory: BorrowedFd<'_>) -> Option<CString> {
    let device = fstat(directory).ok()?.st_dev;
    let source = mounted(directory).map(|mounted| mounted.source);
    let by_number = format!("/dev/block/{}:{}", major(device), minor(device));
    let is_it = |path: &String| {
        stat(path.as_str()).is_ok_and(|found| {
            FileType::from_raw_mode(found.st_mode) == FileType::BlockDevice
                && found.st_rdev == device
        })
    };
    let path = source.into_iter().chain([by_number]).find(is_it)?;
    CString::new(path).ok()
}

/// The path of an open file or directory, for messages.
fn shown(file: impl AsFd) -> String {
    let path = mountinfo::path_of_file(file);
    path.map_or_else(|| "a file".to_owned(), |path| QuotedPath(&path).to_string())
}

fn mounted(directory: BorrowedFd<'_>) -> Option<mountinfo::Mounted> {
    mountinfo::of_file(directory).ok()?
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn a_range_has_at_least_one_project() {
        let range = |first, last| ProjectRange::new(first, last).is_some();
        assert!(range(1, 1) && range(1, u32::MAX - 1));
        assert!(!range(0, 5) && !range(5, 4) && !range(1, u32::MAX));
    }

    #[test]
    fn ids_go_round() {
        let range = ProjectRange::new(7, 9).unwrap();
        let ids: Vec<u32> = [0, 6, 7, 8, 9, 10, u32::MAX]
            .map(|number| range.after(ProjectId::new(number)).number())
            .into();
        assert_eq!(ids, [7, 7, 8, 9, 7, 7, 7]);
        assert_eq!(range.count(), 3);
        assert_eq!(
            [0, 2, 3, 7].map(|place| range.at(place).number()),
            [7, 9, 7, 8]
        );
        let widest = ProjectRange::new(1, u32::MAX - 1).unwrap();
        assert_eq!(widest.at(u32::MAX).number(), 2);
        assert!(range.contains(ProjectId::new(9)) && !range.contains(ProjectId::new(10)));
        assert!(!ProjectRange::DEFAULT.contains(ProjectId::new(1_048_577)));
    }

    #[test]
    fn what_a_file_system_lacks_is_named() {
        let proc = File::open("/proc").unwrap();
        assert!(Quotas::probe(proc.as_fd()).unwrap().is_none());
        let error = lack(proc.as_fd(), "/proc", None);
        assert_eq!(error.kind(), ErrorKind::FailedPrecondition);
        let text = error.chain();
        assert!(text.contains("/proc is on proc"), "{text}");
        assert_eq!(project_of(&proc).unwrap(), ProjectId::NONE);
    }
}
