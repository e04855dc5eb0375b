//! A virtual machine with two disks, and how its power is cut.
//!
//! A disk is a plain file, of which qemu itself keeps nothing in memory: with
//! SIGKILL the machine loses what its kernel had not written yet, and nothing
//! that it had. A real disk may also lose what it has in a cache of its own and
//! was not told to flush; that is not seen here.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::initramfs;
use crate::support::run;

/// What the machine says before its work.
pub const UP: &str = "up";
/// What the machine says at the end of its work.
pub const PASSED: &str = "passed";
/// The first word of what it says when a test in it fails.
pub const FAILED: &str = "failed";

const MEBIBYTES_OF_MEMORY: u32 = 512;
/// Of emulated processors on a busy machine.
const LIMIT: Duration = Duration::from_secs(600);
const LIMIT_OF_BOOT: Duration = Duration::from_secs(240);
const MOST_BOOTS: u32 = 5;

/// A running machine; its end is that of this value.
pub struct Machine {
    child: Child,
    limit: Duration,
    scratch: tempfile::TempDir,
}

impl Machine {
    /// Boots one with these disks and settings (see [`crate::guest`]).
    ///
    /// On a busy machine the emulated timer may be so late that the kernel takes it
    /// for broken ("IO-APIC + timer doesn't work"), or waits for it in vain. Nothing
    /// has happened by then, and another boot does.
    pub fn boot(disks: [&Path; 2], settings: &[(&str, String)]) -> Machine {
        for _ in 1..MOST_BOOTS {
            let mut machine = Machine::try_boot(disks, settings);
            if machine.is_up() {
                return machine;
            }
            eprintln!("the machine does not come up:\n{}", machine.console());
        }
        Machine::try_boot(disks, settings)
    }

    /// Waits until its first process is at work; `false` if it ends before, or takes
    /// too long.
    fn is_up(&mut self) -> bool {
        let begun = Instant::now();
        while begun.elapsed() < LIMIT_OF_BOOT {
            let ended = self.child.try_wait().unwrap().is_some();
            if self.said().iter().any(|line| line == UP) {
                return true;
            }
            if ended {
                return false;
            }
            sleep(Duration::from_millis(10));
        }
        false
    }

    fn try_boot(disks: [&Path; 2], settings: &[(&str, String)]) -> Machine {
        let scratch = tempfile::tempdir().unwrap();
        let mut words = "console=ttyS0 quiet panic=-1 mitigations=off".to_owned();
        for (name, value) in settings {
            words.push_str(&format!(" {name}={value}"));
        }
        let console = File::create(scratch.path().join("console")).unwrap();
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args(["-nodefaults", "-no-user-config", "-display", "none"])
            // Emulated also where there is a /dev/kvm: one that can be opened
            // may still not run a machine, as within another virtual machine.
            .args(["-accel", "tcg,thread=multi", "-cpu", "qemu64,+rdrand"])
            .args(["-smp", "2", "-m", &MEBIBYTES_OF_MEMORY.to_string()])
            .arg("-kernel")
            .arg(initramfs::kernel())
            .arg("-initrd")
            .arg(archive())
            .args(["-append", &words, "-no-reboot", "-serial", "stdio"])
            // A line is in the file before the machine goes on: not handed to
            // another thread of qemu.
            .args(["-device", "virtio-serial-pci,ioeventfd=off"])
            .args(["-device", "virtserialport,chardev=records"])
            .arg("-chardev")
            .arg(format!(
                "file,id=records,path={}/records",
                scratch.path().display()
            ))
            .stdin(Stdio::null())
            .stdout(console.try_clone().unwrap())
            .stderr(console);
        for disk in disks {
            // Flushes of the machine are flushes of the file.
            let drive = format!(
                "if=virtio,format=raw,cache=writeback,file={}",
                disk.display()
            );
            command.args(["-drive", &drive]);
        }
        let child = command
            .spawn()
            .unwrap_or_else(|error| panic!("qemu-system-x86_64: {error}"));
        Machine {
            child,
            limit: LIMIT,
            scratch,
        }
    }

    /// Gives it longer than others for its work.
    pub fn give_longer(mut self, by: Duration) -> Machine {
        self.limit += by;
        self
    }

    /// Waits until the machine has said this.
    pub fn wait_for(&mut self, line: &str) {
        let begun = Instant::now();
        loop {
            // Asked first: what it says before its end is read all the same.
            let ended = self.child.try_wait().unwrap();
            let lines = self.lines();
            if lines.iter().any(|said| said == line) {
                return;
            }
            assert!(
                ended.is_none() && begun.elapsed() < self.limit,
                "the machine has not said {line:?}, {}, and said last: {:?}\n{}",
                ended.map_or_else(|| "hangs".to_owned(), |status| format!("ended ({status})")),
                lines.last(),
                self.console()
            );
            sleep(Duration::from_millis(10));
        }
    }

    /// Waits until its work has gone well; what it has said besides.
    pub fn finish(mut self) -> Vec<String> {
        self.wait_for(PASSED);
        let mut lines = self.lines();
        lines.retain(|line| line != PASSED);
        lines
    }

    /// Cuts its power, and tells what it has said.
    pub fn cut(mut self) -> Vec<String> {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        let lines = self.lines();
        let failure = lines.iter().find(|line| line.starts_with(FAILED));
        assert!(failure.is_none(), "{failure:?}\n{}", self.console());
        lines
    }

    /// What it has said so far of its work.
    fn lines(&self) -> Vec<String> {
        let mut lines = self.said();
        lines.retain(|line| line != UP);
        lines
    }

    /// What it has said so far, line by line; one that is not ended is left out.
    fn said(&self) -> Vec<String> {
        let text = fs::read_to_string(self.scratch.path().join("records")).unwrap_or_default();
        let whole = text
            .split_inclusive('\n')
            .filter_map(|line| line.strip_suffix('\n'));
        whole.map(str::to_owned).collect()
    }

    fn console(&self) -> String {
        let bytes = fs::read(self.scratch.path().join("console")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What all machines start from, made once.
fn archive() -> PathBuf {
    static ARCHIVE: OnceLock<PathBuf> = OnceLock::new();
    let make = || {
        let scratch = Path::new(env!("CARGO_TARGET_TMPDIR")).join("vm");
        fs::create_dir_all(&scratch).unwrap();
        initramfs::make(&scratch)
    };
    ARCHIVE.get_or_init(make).clone()
}

/// The two disks of a machine: in files, mounted here while it is off, at
/// the same paths as in the machine.
pub struct Disks {
    dir: tempfile::TempDir,
}

/// What is on a disk.
#[derive(Clone, Copy)]
pub enum Format {
    Ext4,
    /// With the features for project quotas.
    Ext4WithQuotas,
    Xfs,
}

impl Format {
    fn make(self, path: &Path) {
        // The block size of larger disks.
        let ext4 = ["-q", "-F", "-b", "4096"];
        let quotas = ["-O", "quota,project", "-E", "quotatype=prjquota"];
        match self {
            Format::Ext4 => run(Command::new("mkfs.ext4").args(ext4).arg(path)),
            Format::Ext4WithQuotas => {
                run(Command::new("mkfs.ext4").args(ext4).args(quotas).arg(path))
            }
            Format::Xfs => run(Command::new("mkfs.xfs").args(["-q", "-f"]).arg(path)),
        };
    }
}

impl Disks {
    /// Two empty disks with ext4, not mounted.
    pub fn new(mebibytes: u64) -> Disks {
        Disks::formatted(mebibytes, Format::Ext4)
    }

    /// Two empty disks, not mounted.
    pub fn formatted(mebibytes: u64, format: Format) -> Disks {
        let dir = tempfile::tempdir().unwrap();
        let disks = Disks { dir };
        for path in disks.files() {
            let file = File::create(&path).unwrap();
            file.set_len(mebibytes << 20).unwrap();
            format.make(&path);
        }
        for path in [disks.image(), disks.writable()] {
            fs::create_dir(path).unwrap();
        }
        disks
    }

    /// The files: the image volume's and the writable volume's.
    pub fn files(&self) -> [PathBuf; 2] {
        ["image.raw", "writable.raw"].map(|name| self.dir.path().join(name))
    }

    /// Where the image volume is mounted.
    pub fn image(&self) -> PathBuf {
        self.dir.path().join("image")
    }

    /// Where the writable volume is mounted.
    pub fn writable(&self) -> PathBuf {
        self.dir.path().join("writable")
    }

    /// Boots a machine with them.
    pub fn boot(&self, settings: &[(&str, String)]) -> Machine {
        let mut all = vec![
            ("VM_IMAGE", self.image().display().to_string()),
            ("VM_WRITABLE", self.writable().display().to_string()),
        ];
        all.extend_from_slice(settings);
        let [image, writable] = self.files();
        Machine::boot([&image, &writable], &all)
    }

    /// Mounts both here, which replays their journals.
    pub fn mount(&self) {
        for (file, at) in self.files().iter().zip([self.image(), self.writable()]) {
            run(Command::new("mount")
                .args(["-o", "loop,noatime"])
                .arg(file)
                .arg(at));
        }
    }

    /// Unmounts both.
    pub fn unmount(&self) {
        for at in [self.image(), self.writable()] {
            run(Command::new("umount").arg(at));
        }
    }
}

impl Drop for Disks {
    fn drop(&mut self) {
        // A test that failed has left them mounted.
        for at in [self.image(), self.writable()] {
            let _ = Command::new("umount").args(["-l", "-q"]).arg(at).status();
        }
    }
}
