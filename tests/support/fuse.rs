//! A file system with two files, which stand for the two disks. A loop device on
//! such a file passes each write and each flush to this process as it happens.
//!
//! This module implements the kernel's protocol (fuse(4), `linux/fuse.h`),
//! because two files that are never created, renamed or removed need little of
//! it.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{JoinHandle, spawn};

use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

/// The number of disks.
pub const DISKS: usize = 2;

/// The contents of the files. Only one request is under way at any time.
pub trait Devices: Send + Sync {
    /// The size of each file, in bytes.
    fn size(&self) -> u64;
    fn read(&self, disk: usize, offset: usize, length: usize) -> Vec<u8>;
    fn write(&self, disk: usize, offset: usize, bytes: &[u8]);
    fn flush(&self, disk: usize);
}

/// The mounted file system; unmounted when dropped.
pub struct Served {
    path: PathBuf,
    server: Option<JoinHandle<()>>,
}

impl Served {
    pub fn mount(devices: Arc<dyn Devices>, at: &Path) -> Served {
        let mut options = File::options();
        let connection = options.read(true).write(true).open("/dev/fuse").unwrap();
        let options = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0",
            connection.as_raw_fd()
        );
        let options = std::ffi::CString::new(options).unwrap();
        let flags = MountFlags::NODEV | MountFlags::NOSUID;
        mount("disks", at, "fuse", flags, options.as_c_str()).unwrap();
        let server = spawn(move || serve(&connection, &*devices));
        Served {
            path: at.to_owned(),
            server: Some(server),
        }
    }

    /// The file of a disk.
    pub fn file(&self, disk: usize) -> PathBuf {
        self.path.join(disk.to_string())
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = unmount(&self.path, UnmountFlags::DETACH);
        // As long as a loop device uses a file, the kernel goes on sending
        // requests.
        if !std::thread::panicking()
            && let Some(server) = self.server.take()
        {
            let _ = server.join();
        }
    }
}

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const SETATTR: u32 = 4;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const RELEASE: u32 = 18;
const FSYNC: u32 = 20;
const INIT: u32 = 26;
const INTERRUPT: u32 = 36;
const BATCH_FORGET: u32 = 42;

const HEADER: usize = 40;
const MOST_BYTES: u32 = 1 << 20;
/// Flag of INIT: `max_pages` is filled in.
const MAX_PAGES: u32 = 1 << 22;
/// Flag of INIT: writes may be longer than a page.
const BIG_WRITES: u32 = 1 << 5;
/// Flag of OPEN: the kernel keeps no pages of the file.
const DIRECT_IO: u32 = 1;
/// The number of the top directory, which the files' numbers follow.
const TOP: u64 = 1;

/// Answers requests until the file system is unmounted.
fn serve(mut connection: &File, devices: &dyn Devices) {
    let mut buffer = vec![0; MOST_BYTES as usize + 4096];
    loop {
        let length = match connection.read(&mut buffer) {
            Ok(length) => length,
            Err(error) => match Errno::from_io_error(&error) {
                // The request was interrupted.
                Some(Errno::NOENT | Errno::INTR) => continue,
                Some(Errno::NODEV) => return,
                _ => panic!("read /dev/fuse: {error}"),
            },
        };
        let request = Request(&buffer[..length]);
        let (error, body) = match answer(&request, devices) {
            Some(Ok(body)) => (0, body),
            Some(Err(errno)) => (-errno.raw_os_error(), Vec::new()),
            None => continue,
        };
        let mut reply = Bytes::default();
        reply.u32(u32::try_from(16 + body.len()).unwrap());
        reply.0.extend_from_slice(&error.to_ne_bytes());
        reply.u64(request.u64(8));
        reply.0.extend_from_slice(&body);
        // ENOENT: no process waits for the answer any more.
        let _ = connection.write(&reply.0);
    }
}

struct Request<'a>(&'a [u8]);

impl Request<'_> {
    fn u32(&self, at: usize) -> u32 {
        u32::from_ne_bytes(self.0[at..at + 4].try_into().unwrap())
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from_ne_bytes(self.0[at..at + 8].try_into().unwrap())
    }

    /// The number of the file that the request is about.
    fn node(&self) -> u64 {
        self.u64(16)
    }

    fn disk(&self) -> usize {
        usize::try_from(self.node() - TOP - 1).unwrap()
    }

    /// The range of a READ or WRITE.
    fn range(&self) -> (usize, usize) {
        let offset = usize::try_from(self.u64(HEADER + 8)).unwrap();
        (offset, self.u32(HEADER + 16) as usize)
    }
}

/// `None` for requests that have no answer.
fn answer(request: &Request<'_>, devices: &dyn Devices) -> Option<Result<Vec<u8>, Errno>> {
    let mut body = Bytes::default();
    match request.u32(4) {
        INIT => {
            // Version 7.31, and the kernel's defaults (0) for everything else.
            let flags = MAX_PAGES | BIG_WRITES;
            [7, 31, 0, flags, 0, MOST_BYTES, 1, MOST_BYTES / 4096]
                .into_iter()
                .for_each(|number| body.u32(number));
            body.0.resize(64, 0);
        }
        LOOKUP => {
            let name = request.0[HEADER..].split(|byte| *byte == 0).next();
            let name = String::from_utf8_lossy(name.unwrap_or_default());
            match name.parse::<usize>() {
                Ok(disk) if disk < DISKS => entry(&mut body, TOP + 1 + disk as u64, devices),
                _ => return Some(Err(Errno::NOENT)),
            }
        }
        GETATTR | SETATTR => {
            // The kernel caches nothing of it.
            body.u64(0);
            body.u64(0);
            attributes(&mut body, request.node(), devices);
        }
        OPEN => [0, 0, DIRECT_IO, 0]
            .into_iter()
            .for_each(|number| body.u32(number)),
        READ => {
            let (offset, length) = request.range();
            body.0 = devices.read(request.disk(), offset, length);
        }
        WRITE => {
            let (offset, length) = request.range();
            devices.write(request.disk(), offset, &request.0[HEADER + 40..][..length]);
            body.u32(length as u32);
            body.u32(0);
        }
        FSYNC => devices.flush(request.disk()),
        RELEASE => {}
        FORGET | BATCH_FORGET | INTERRUPT => return None,
        _ => return Some(Err(Errno::NOSYS)),
    }
    Some(Ok(body.0))
}

/// `struct fuse_entry_out`.
fn entry(body: &mut Bytes, node: u64, devices: &dyn Devices) {
    [node, 0, 0, 0, 0]
        .into_iter()
        .for_each(|number| body.u64(number));
    attributes(body, node, devices);
}

/// `struct fuse_attr`.
fn attributes(body: &mut Bytes, node: u64, devices: &dyn Devices) {
    let (mode, size) = match node {
        TOP => (0o040_700, 0),
        _ => (0o100_600, devices.size()),
    };
    [node, size, size / 512, 0, 0, 0]
        .into_iter()
        .for_each(|number| body.u64(number));
    [0, 0, 0, mode, 1, 0, 0, 0, 4096, 0]
        .into_iter()
        .for_each(|number| body.u32(number));
}

#[derive(Default)]
struct Bytes(Vec<u8>);

impl Bytes {
    fn u32(&mut self, number: u32) {
        self.0.extend_from_slice(&number.to_ne_bytes());
    }

    fn u64(&mut self, number: u64) {
        self.0.extend_from_slice(&number.to_ne_bytes());
    }
}
