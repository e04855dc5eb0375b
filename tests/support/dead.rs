//! A file system that never answers, as of a server that is gone.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

/// A FUSE mount without a program that serves it; whoever waits for it gets an error, and
/// it is unmounted, when this is dropped.
pub struct Dead {
    path: PathBuf,
    connection: Option<File>,
}

impl Dead {
    /// Mounts it over that directory.
    pub fn mount(path: &Path) -> Dead {
        let mut options = OpenOptions::new();
        let connection = options.read(true).write(true).open("/dev/fuse").unwrap();
        let options = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0",
            connection.as_raw_fd()
        );
        let options = CString::new(options).unwrap();
        mount("dead", path, "fuse", MountFlags::empty(), Some(&*options)).unwrap();
        Dead {
            path: path.to_owned(),
            connection: Some(connection),
        }
    }
}

impl Drop for Dead {
    fn drop(&mut self) {
        // With its last descriptor the connection ends.
        drop(self.connection.take());
        unmount(&self.path, UnmountFlags::DETACH).unwrap();
    }
}
