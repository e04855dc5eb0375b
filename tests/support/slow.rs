//! Two disks in memory that take their time.

use std::sync::{Arc, Mutex};
use std::thread::sleep;
use std::time::Duration;

use super::disk::Disk;
use super::fuse::{DISKS, Devices, Served};

/// What a disk's work takes.
#[derive(Clone, Copy, Default)]
pub struct Speed {
    /// A flush of its cache.
    pub flush: Duration,
    /// A MiB that is written.
    pub mebibyte: Duration,
}

/// The disks; they end with the value, which has to outlive what is mounted from them.
pub struct SlowDisks {
    memory: Arc<Memory>,
    served: Served,
    _dir: tempfile::TempDir,
}

struct Memory {
    disks: [Mutex<Vec<u8>>; DISKS],
    speed: Mutex<Speed>,
}

impl SlowDisks {
    pub fn new(mebibytes: usize, speed: Speed) -> SlowDisks {
        let dir = tempfile::tempdir().unwrap();
        let memory = Arc::new(Memory {
            disks: std::array::from_fn(|_| Mutex::new(vec![0; mebibytes << 20])),
            speed: Mutex::new(speed),
        });
        let served = Served::mount(memory.clone(), dir.path());
        SlowDisks {
            memory,
            served,
            _dir: dir,
        }
    }

    /// An ext4 on each of them, made with these arguments.
    pub fn format(&self, arguments: &[&str]) -> [Disk; DISKS] {
        std::array::from_fn(|number| Disk::on(&self.served.file(number), "ext4", arguments))
    }

    /// From now on.
    pub fn set_speed(&self, speed: Speed) {
        *self.memory.speed.lock().unwrap() = speed;
    }
}

impl Devices for Memory {
    fn size(&self) -> u64 {
        self.disks[0].lock().unwrap().len() as u64
    }

    fn read(&self, disk: usize, offset: usize, length: usize) -> Vec<u8> {
        let bytes = self.disks[disk].lock().unwrap();
        let end = bytes.len().min(offset + length);
        bytes[offset.min(end)..end].to_vec()
    }

    fn write(&self, disk: usize, offset: usize, bytes: &[u8]) {
        let speed = *self.speed.lock().unwrap();
        if speed.mebibyte > Duration::ZERO {
            sleep(
                speed
                    .mebibyte
                    .mul_f64(bytes.len() as f64 / (1 << 20) as f64),
            );
        }
        self.disks[disk].lock().unwrap()[offset..][..bytes.len()].copy_from_slice(bytes);
    }

    fn flush(&self, _: usize) {
        let speed = *self.speed.lock().unwrap();
        sleep(speed.flush);
    }
}
