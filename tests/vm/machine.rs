//! A virtual machine with two disks, and cutting its power.
//!
//! A disk is a plain file, of which the program that runs the machine caches
//! nothing. SIGKILL makes the machine lose what its kernel had not written yet, and
//! nothing that it had. A real disk may also lose what it has in its own cache and
//! was not asked to flush; this does not happen here.

mod qemu;
mod uml;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::OnceLock;
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::initramfs;
use crate::support::{run, until};

/// The machine's line before its work.
pub const UP: &str = "up";
/// The machine's line after its work.
pub const PASSED: &str = "passed";
/// The first word of the machine's line when a test in it fails.
pub const FAILED: &str = "failed";

/// A program that runs machines, with its properties.
pub struct Driver {
    /// The value of the option `--machine`.
    pub name: &'static str,
    /// How many machines run at once on this number of processors.
    pub at_once: fn(usize) -> usize,
    /// How often the power is cut, unless `--cuts` is given.
    pub cuts: u32,
    /// For how many milliseconds a load runs before the power is cut: at least, and
    /// how much longer at most.
    pub load_ms: (u64, u64),
    /// The directory with the kernel's modules, at any depth.
    pub modules_in: &'static str,
    /// The modules that the machine needs.
    pub modules: &'static [&'static str],
    /// The names of the disks, and of the line to the host, in the machine's
    /// kernel.
    devices: [(&'static str, &'static str); 3],
    /// How often a boot is tried.
    most_boots: u32,
    limit_of_boot: Duration,
    /// The time limit for the machine's work.
    limit: Duration,
    command: fn(&Start) -> Command,
}

/// The parameters of a machine's start.
struct Start<'a> {
    archive: &'a Path,
    disks: [&'a Path; 2],
    /// Words for the kernel's command line.
    settings: &'a [String],
    /// A directory for this machine alone.
    scratch: &'a Path,
}

impl Start<'_> {
    /// The file with the machine's lines.
    fn records(&self) -> PathBuf {
        self.scratch.join("records")
    }

    fn console(&self) -> File {
        File::create(self.scratch.join("console")).unwrap()
    }
}

static DRIVER: OnceLock<&Driver> = OnceLock::new();

/// Chooses how this process runs machines: by name, or the fastest available
/// way.
pub fn choose_driver(name: Option<&str>) -> &'static Driver {
    let driver = match name {
        Some(name) => [&uml::DRIVER, &qemu::DRIVER]
            .into_iter()
            .find(|driver| driver.name == name)
            .unwrap_or_else(|| panic!("--machine takes uml or qemu, not {name}")),
        None if uml::is_there() => &uml::DRIVER,
        None => {
            eprintln!(
                "vm: there is no user-mode Linux (tests/uml.sh brings it): qemu emulates \
                 the machines, and their power is cut {} times, not {}",
                qemu::DRIVER.cuts,
                uml::DRIVER.cuts
            );
            &qemu::DRIVER
        }
    };
    DRIVER.get_or_init(|| driver)
}

fn driver() -> &'static Driver {
    DRIVER.get().expect("main has chosen a driver")
}

/// A command that is killed when the thread that has started it ends, so that no
/// machine outlives its test.
fn ends_with_its_thread() -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL"]);
    command
}

/// A running machine, which ends when this value is dropped.
pub struct Machine {
    child: Child,
    limit: Duration,
    scratch: tempfile::TempDir,
}

impl Machine {
    /// Boots a machine with these disks and settings (see [`crate::guest`]).
    ///
    /// On a busy host, an emulated timer may be so late that the kernel considers it
    /// broken ("IO-APIC + timer doesn't work"), or waits for it in vain. Nothing has
    /// happened by then, so the boot is tried again.
    pub fn boot(disks: [&Path; 2], settings: &[(&str, String)]) -> Machine {
        let driver = driver();
        let devices = driver.devices.iter();
        let devices = devices.map(|(name, device)| format!("{name}={device}"));
        let given = settings.iter();
        let given = given.map(|(name, value)| format!("{name}={value}"));
        let settings: Vec<_> = devices.chain(given).collect();
        for _ in 1..driver.most_boots {
            let mut machine = Machine::try_boot(driver, disks, &settings);
            if machine.is_up(driver.limit_of_boot) {
                return machine;
            }
            eprintln!("the machine does not come up:\n{}", machine.console());
        }
        Machine::try_boot(driver, disks, &settings)
    }

    /// Waits until its first process works. Returns `false` if the machine ends
    /// before that, or takes too long.
    fn is_up(&mut self, limit: Duration) -> bool {
        let begun = Instant::now();
        while begun.elapsed() < limit {
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

    fn try_boot(driver: &Driver, disks: [&Path; 2], settings: &[String]) -> Machine {
        let scratch = tempfile::tempdir().unwrap();
        let archive = archive(driver);
        let mut command = (driver.command)(&Start {
            archive: &archive,
            disks,
            settings,
            scratch: scratch.path(),
        });
        let child = command
            .spawn()
            .unwrap_or_else(|error| panic!("{command:?}: {error}"));
        Machine {
            child,
            limit: driver.limit,
            scratch,
        }
    }

    /// Gives the machine a longer time limit than others.
    pub fn give_longer(mut self, by: Duration) -> Machine {
        self.limit += by;
        self
    }

    /// Waits until the machine has printed this line.
    pub fn wait_for(&mut self, line: &str) {
        let begun = Instant::now();
        loop {
            // Asked before the lines are read, so that lines before its end are
            // not missed.
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

    /// Waits until its work has succeeded, and returns its other lines.
    pub fn finish(mut self) -> Vec<String> {
        self.wait_for(PASSED);
        let mut lines = self.lines();
        lines.retain(|line| line != PASSED);
        lines
    }

    /// Cuts its power, and returns its lines.
    pub fn cut(mut self) -> Vec<String> {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        let lines = self.lines();
        let failure = lines.iter().find(|line| line.starts_with(FAILED));
        assert!(failure.is_none(), "{failure:?}\n{}", self.console());
        lines
    }

    /// Its lines about its work so far.
    fn lines(&self) -> Vec<String> {
        let mut lines = self.said();
        lines.retain(|line| line != UP);
        lines
    }

    /// Its lines so far; an incomplete last line is left out.
    fn said(&self) -> Vec<String> {
        let text = fs::read_to_string(self.scratch.path().join("records")).unwrap_or_default();
        let ended = text.rfind('\n').map_or("", |end| &text[..=end]);
        // A terminal ends lines with "\r\n".
        ended.lines().map(str::to_owned).collect()
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

/// The archive that all machines start from, made once.
fn archive(driver: &Driver) -> PathBuf {
    static ARCHIVE: OnceLock<PathBuf> = OnceLock::new();
    let make = || {
        let scratch = Path::new(env!("CARGO_TARGET_TMPDIR")).join("vm");
        fs::create_dir_all(&scratch).unwrap();
        initramfs::make(&scratch, driver)
    };
    ARCHIVE.get_or_init(make).clone()
}

/// The two disks of a machine, in files. While the machine is off, they can be
/// mounted on the host, at the same paths as in the machine.
pub struct Disks {
    dir: tempfile::TempDir,
}

/// The file system of a disk.
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

    /// The files of the image volume and of the writable volume.
    pub fn files(&self) -> [PathBuf; 2] {
        ["image.raw", "writable.raw"].map(|name| self.dir.path().join(name))
    }

    /// The mount point of the image volume.
    pub fn image(&self) -> PathBuf {
        self.dir.path().join("image")
    }

    /// The mount point of the writable volume.
    pub fn writable(&self) -> PathBuf {
        self.dir.path().join("writable")
    }

    /// Boots a machine with these disks.
    pub fn boot(&self, settings: &[(&str, String)]) -> Machine {
        let mut all = vec![
            ("VM_IMAGE", self.image().display().to_string()),
            ("VM_WRITABLE", self.writable().display().to_string()),
        ];
        all.extend_from_slice(settings);
        let [image, writable] = self.files();
        Machine::boot([&image, &writable], &all)
    }

    /// Mounts both on the host, which replays their journals.
    pub fn mount(&self) {
        for (file, at) in self.files().iter().zip([self.image(), self.writable()]) {
            // Not `mount -o loop`: that asks every loop device of the machine, and waits for
            // those whose files are another test's hanging disk.
            let find = ["--find", "--show"];
            let device = run(Command::new("losetup").args(find).arg(file));
            let device = device.trim();
            let mut mount = Command::new("mount");
            run(mount.args(["-o", "noatime", device]).arg(at));
            // The mount keeps it.
            run(Command::new("losetup").args(["--detach", device]));
        }
    }

    /// Unmounts both, and waits until nothing uses their file systems. A process that has
    /// copied the host's mounts into a namespace of its own keeps them in use, and the
    /// next mount on the host would not show what the machine has written meanwhile.
    pub fn unmount(&self) {
        for at in [self.image(), self.writable()] {
            let device = run(Command::new("findmnt")
                .args(["-n", "-o", "SOURCE"])
                .arg(&at));
            run(Command::new("umount").arg(at));
            until_free(device.trim());
        }
    }
}

/// Waits until nothing uses the ext4 of a device that was unmounted.
pub fn until_free(device: &str) {
    let used = Path::new("/sys/fs/ext4").join(device.trim_start_matches("/dev/"));
    until("a disk is free", || !used.exists());
}

impl Drop for Disks {
    fn drop(&mut self) {
        // A failed test has left them mounted.
        for at in [self.image(), self.writable()] {
            let _ = Command::new("umount").args(["-l", "-q"]).arg(at).status();
        }
    }
}
