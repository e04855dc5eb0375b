//! Mounting what the daemon returns, as containerd does.

use std::ffi::CString;
use std::path::{Path, PathBuf};

use overlay_read_write_splitting_snapshotter::proto::mount::Mount;
use rustix::mount::{
    MountFlags, UnmountFlags, mount, mount_bind_recursive, mount_remount, unmount,
};

/// The mounted mounts of a snapshot, unmounted when dropped.
pub struct Mounted {
    dir: tempfile::TempDir,
}

impl Mounted {
    /// Mounts them in a temporary directory.
    pub fn new(mounts: &[Mount]) -> Mounted {
        let [wanted] = mounts else {
            panic!("one mount is expected: {mounts:?}");
        };
        let dir = tempfile::tempdir().unwrap();
        match wanted.type_.as_str() {
            "bind" => {
                mount_bind_recursive(wanted.source.as_str(), dir.path()).unwrap();
                if wanted.options.iter().any(|option| option == "ro") {
                    let flags = MountFlags::BIND | MountFlags::RDONLY;
                    mount_remount(dir.path(), flags, c"").unwrap();
                }
            }
            "overlay" => mount_overlay(&wanted.options, dir.path()),
            other => panic!("unknown type {other}"),
        }
        Mounted { dir }
    }

    /// The mount point.
    pub fn path(&self) -> PathBuf {
        self.dir.path().to_owned()
    }
}

/// The directory that receives what is written into these mounts of an active
/// snapshot.
pub fn upper_of(mounts: &[Mount]) -> PathBuf {
    let [mount] = mounts else {
        panic!("one mount is expected: {mounts:?}");
    };
    if mount.type_ == "bind" {
        return PathBuf::from(&mount.source);
    }
    let mut options = mount.options.iter();
    let upper = options.find_map(|option| option.strip_prefix("upperdir="));
    PathBuf::from(upper.unwrap_or_else(|| panic!("no upper: {mounts:?}")))
}

/// mount(2) takes at most a page of options. Like containerd, this writes long
/// lists relative to the directory that all lower directories share.
fn mount_overlay(options: &[String], target: &Path) {
    let lowers = options
        .iter()
        .find_map(|option| option.strip_prefix("lowerdir="))
        .unwrap();
    let common = Path::new(lowers.split(':').next().unwrap())
        .parent()
        .and_then(Path::parent)
        .unwrap()
        .to_owned();
    let is_long = options.join(",").len() > 3500;
    let options: Vec<String> = options
        .iter()
        .map(|option| match option.strip_prefix("lowerdir=") {
            Some(lowers) if is_long => {
                let prefix = format!("{}/", common.display());
                let short: Vec<_> = lowers
                    .split(':')
                    .map(|lower| lower.strip_prefix(&prefix).unwrap())
                    .collect();
                format!("lowerdir={}", short.join(":"))
            }
            _ => option.clone(),
        })
        .collect();
    let data = CString::new(options.join(",")).unwrap();
    let mount_it = || {
        let data = Some(data.as_c_str());
        mount("overlay", target, "overlay", MountFlags::empty(), data).unwrap();
    };
    if is_long {
        in_directory(&common, mount_it);
    } else {
        mount_it();
    }
}

/// Runs in a thread with a working directory of its own, because other tests
/// run at the same time.
fn in_directory(directory: &Path, work: impl FnOnce() + Send) {
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            // The thread gets its own working directory by unsharing it.
            #[allow(deprecated)]
            rustix::thread::unshare(rustix::thread::UnshareFlags::FS).unwrap();
            std::env::set_current_dir(directory).unwrap();
            work();
        });
        thread.join().unwrap();
    });
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = unmount(self.dir.path(), UnmountFlags::DETACH);
    }
}
