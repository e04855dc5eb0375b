//! Mounting an overlay with any number of layers.
//!
//! mount(2) takes all options as one string of at most a page, and the paths of
//! many layers do not fit into a page. Linux 6.7 takes layers one by one (`lowerdir+`,
//! Documentation/filesystems/overlayfs.rst). On older kernels, the paths are relative
//! to the working directory, which makes them short enough. An older kernel reports
//! only at the end that it does not know `lowerdir+` (`legacy_parse_param` in
//! fs/fs_context.c), so the code compares the kernel's version.
//!
//! Mounts are nosuid and nodev: set-user-ID programs and devices in a layer are
//! for containers, not for users of the host who can read the directory.

use std::ffi::CString;
use std::path::Path;

use rustix::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use rustix::io::{Errno, read};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MoveMountFlags, fsconfig_create,
    fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, mount, move_mount,
};
use rustix::param::page_size;

use super::{kernel_release, kernel_version};
use crate::error::{Error, ErrorKind, Result};
use crate::types::SnapshotPaths;

/// The first version of Linux that takes layers one by one.
const LAYERS_ONE_BY_ONE: (u32, u32) = (6, 7);

/// The longest value that fsconfig(2) takes.
const MAX_VALUE_BYTES: usize = 255;

/// An overlay to be mounted. All paths are absolute, and contain no characters with a
/// special meaning in mount options.
#[derive(Debug)]
pub struct Stack<'a> {
    /// The device name that mountinfo and df(1) show.
    pub source: &'a str,
    /// The directory that contains most layers. On kernels before Linux 6.7, it becomes the
    /// working directory of the process, so the process must not use relative paths.
    pub base: Option<&'a str>,
    /// The lower directories, the topmost first: at least one, and at least two
    /// without an upper directory.
    pub lowers: &'a [String],
    /// The upper and the work directory; `None` for a read-only mount.
    pub own: Option<&'a SnapshotPaths>,
    /// Further options, as for mount(8).
    pub options: &'a [String],
}

impl Stack<'_> {
    /// Mounts the overlay on the directory `target`; `path` is its path for error messages.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::FailedPrecondition`], which contains the kernel's message.
    pub fn mount(&self, target: impl AsFd, path: &Path) -> Result<()> {
        let is_long = |path: &String| path.len() > MAX_VALUE_BYTES;
        let own = self.own.iter().flat_map(|own| [&own.upper, &own.work]);
        let is_new = kernel_version(&kernel_release()) >= Some(LAYERS_ONE_BY_ONE);
        if is_new && !self.lowers.iter().chain(own).any(is_long) {
            match self.mount_by_layers(target.as_fd()) {
                // A seccomp filter or an emulator may reject these calls even on a new
                // kernel.
                Err((Errno::NOSYS, _)) => {}
                done => return done.map_err(|(errno, said)| refused(path, errno, &said)),
            }
        }
        self.mount_by_string(target.as_fd(), path)
    }

    /// Mounts the overlay with fsconfig(2), one call for each layer. On failure, returns the
    /// error number and the kernel's message.
    fn mount_by_layers(&self, target: BorrowedFd<'_>) -> std::result::Result<(), (Errno, String)> {
        let plain = |errno| (errno, String::new());
        let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).map_err(plain)?;
        let mounted = self
            .configure(&context)
            .and_then(|()| {
                let mut attributes =
                    MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
                if self.own.is_none() {
                    attributes |= MountAttrFlags::MOUNT_ATTR_RDONLY;
                }
                fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
            })
            .map_err(|errno| (errno, said(&context)))?;
        let flags =
            MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
        move_mount(&mounted, "", target, "", flags).map_err(plain)
    }

    fn configure(&self, context: &OwnedFd) -> std::result::Result<(), Errno> {
        fsconfig_set_string(context, "source", self.source)?;
        for lower in self.lowers {
            fsconfig_set_string(context, "lowerdir+", lower.as_str())?;
        }
        match self.own {
            Some(own) => {
                fsconfig_set_string(context, "upperdir", own.upper.as_str())?;
                fsconfig_set_string(context, "workdir", own.work.as_str())?;
            }
            None => fsconfig_set_flag(context, "ro")?,
        }
        for option in self.options {
            match option.split_once('=') {
                Some((name, value)) => fsconfig_set_string(context, name, value)?,
                None => fsconfig_set_flag(context, option.as_str())?,
            }
        }
        fsconfig_create(context)
    }

    /// Mounts the overlay with mount(2), which takes all options as one string. The names of
    /// layers are relative to `base`.
    fn mount_by_string(&self, target: BorrowedFd<'_>, path: &Path) -> Result<()> {
        let mut data = String::from("lowerdir=");
        for (number, lower) in self.lowers.iter().enumerate() {
            if number > 0 {
                data.push(':');
            }
            let below = self.base.and_then(|base| lower.strip_prefix(base));
            let below = below.and_then(|below| below.strip_prefix('/'));
            data.push_str(below.unwrap_or(lower));
        }
        if let Some(SnapshotPaths { upper, work }) = self.own {
            data.push_str(&format!(",upperdir={upper},workdir={work}"));
        }
        for option in self.options {
            data.push(',');
            data.push_str(option);
        }
        let most = page_size() - 1;
        if data.len() > most {
            return Err(Error::refused(format!(
                "the mount options of {} layers are {} bytes long, but mount(2) accepts only \
                 {most}: use Linux 6.7 or later, which can mount these layers if no directory's \
                 path is longer than {MAX_VALUE_BYTES} bytes",
                self.lowers.len(),
                data.len()
            )));
        }
        let data = CString::new(data).map_err(|_| refused(path, Errno::INVAL, ""))?;
        let mut flags = MountFlags::NOSUID | MountFlags::NODEV;
        if self.own.is_none() {
            flags |= MountFlags::RDONLY;
        }
        if let Some(base) = self.base {
            std::env::set_current_dir(base).map_err(|error| {
                let what = format!("enter {base}");
                Error::caused(ErrorKind::FailedPrecondition, what, error)
            })?;
        }
        // This path leads to the directory that `target` has opened, even if another
        // directory has its name by now.
        let target = format!("/proc/self/fd/{}", target.as_raw_fd());
        mount(self.source, target, "overlay", flags, Some(data.as_c_str()))
            .map_err(|errno| refused(path, errno, ""))
    }
}

/// Reads the kernel's messages about a failed mount
/// (`Documentation/filesystems/mount_api.rst`). Each message begins with a letter for
/// its severity, which is removed.
fn said(context: &OwnedFd) -> String {
    let mut said = String::new();
    let mut line = [0_u8; 1024];
    while let Ok(bytes @ 1..) = read(context, &mut line) {
        let text = String::from_utf8_lossy(line.get(..bytes).unwrap_or_default()).into_owned();
        let text = text.trim_end();
        said.push_str(": ");
        said.push_str(text.get(2..).unwrap_or(text));
    }
    said
}

fn refused(path: &Path, errno: Errno, said: &str) -> Error {
    Error::caused(
        ErrorKind::FailedPrecondition,
        format!("cannot mount an overlay on {}{said}", path.display()),
        std::io::Error::from(errno),
    )
}
