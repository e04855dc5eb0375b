//! The archive that a machine starts from: this binary as its first process, the
//! daemon, the libraries and tools that they need, and modules of the kernel.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::machine::Driver;
use crate::support::daemon::BINARY;
use crate::support::run;

/// Programs that make, damage and repair disks.
const TOOLS: &[&str] = &["dmsetup", "e2fsck", "debugfs", "mkfs.ext4", "losetup"];

/// Makes the archive in `scratch`, a directory for this alone.
pub fn make(scratch: &Path, driver: &Driver) -> PathBuf {
    let mut archive = Archive::default();
    for name in ["proc", "sys", "dev", "tmp"] {
        archive.add(Path::new(name), DIRECTORY, &[]);
    }
    // Before /dev is mounted, the kernel opens this device for its first
    // process.
    archive.add_device("dev/console", CHARACTER_DEVICE, (5, 1));

    let own = std::env::current_exe().unwrap();
    for (program, place) in [(own.as_path(), "/init"), (Path::new(BINARY), BINARY)] {
        let stripped = scratch.join("stripped");
        run(Command::new("strip").arg("-o").arg(&stripped).arg(program));
        archive.add_program(Path::new(place), &stripped);
    }
    for tool in TOOLS {
        // A program without PATH looks here.
        let place = Path::new("bin").join(tool);
        let program = run(Command::new("which").arg(tool));
        archive.add_program(&place, Path::new(program.trim()));
    }
    for (number, module) in modules(driver).iter().enumerate() {
        let name = module.file_name().unwrap().to_str().unwrap();
        let place = format!("modules/{number:02}-{name}");
        archive.add(Path::new(&place), FILE, &fs::read(module).unwrap());
    }
    let path = scratch.join("initramfs");
    fs::write(&path, archive.finish()).unwrap();
    path
}

/// The libraries of a program, and its loader.
fn libraries(program: &Path) -> Vec<PathBuf> {
    let text = run(Command::new("ldd").arg(program));
    // `NAME => PATH (ADDRESS)` or `PATH (ADDRESS)`.
    text.lines()
        .filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')))
        .map(PathBuf::from)
        .collect()
}

/// The modules, each after those that it needs.
fn modules(driver: &Driver) -> Vec<PathBuf> {
    let all = find(Path::new(driver.modules_in), &|name| name.ends_with(".ko"));
    let mut ordered = Vec::new();
    for name in driver.modules {
        add_module(name, &all, &mut ordered);
    }
    ordered
}

fn add_module(name: &str, all: &[PathBuf], ordered: &mut Vec<PathBuf>) {
    let plain = |name: &str| name.replace('-', "_");
    let is_it = |path: &&PathBuf| plain(path.file_stem().unwrap().to_str().unwrap()) == plain(name);
    let path = all
        .iter()
        .find(is_it)
        .unwrap_or_else(|| panic!("no module {name} is unpacked"));
    if ordered.contains(path) {
        return;
    }
    for needed in needed_by(&fs::read(path).unwrap()) {
        add_module(&needed, all, ordered);
    }
    ordered.push(path.clone());
}

/// The modules that a module needs: `depends=A,B` between zeros in its
/// `.modinfo`.
fn needed_by(module: &[u8]) -> Vec<String> {
    let key = b"\0depends=";
    let Some(at) = module.windows(key.len()).position(|window| window == key) else {
        return Vec::new();
    };
    let value = module[at + key.len()..].split(|byte| *byte == 0).next();
    String::from_utf8_lossy(value.unwrap_or_default())
        .split(',')
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect()
}

/// All files with such names below a directory; none if it does not exist.
pub fn find(directory: &Path, is_wanted: &dyn Fn(&str) -> bool) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).into_iter().flatten() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_dir() {
            found.extend(find(&entry.path(), is_wanted));
        } else if is_wanted(&entry.file_name().to_string_lossy()) {
            found.push(entry.path());
        }
    }
    found
}

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const FILE: u32 = 0o100_644;
const CHARACTER_DEVICE: u32 = 0o020_600;

/// A cpio archive in the format that the kernel unpacks
/// (Documentation/driver-api/early-userspace/buffer-format.rst).
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    names: BTreeSet<PathBuf>,
}

impl Archive {
    /// Adds an entry, if it is not there yet, with its parent directories.
    fn add(&mut self, path: &Path, mode: u32, content: &[u8]) {
        let path = path.strip_prefix("/").unwrap_or(path);
        if !self.names.insert(path.to_owned()) {
            return;
        }
        if let Some(parent) = path.parent().filter(|parent| *parent != Path::new("")) {
            self.add(parent, DIRECTORY, &[]);
        }
        self.entry(path.to_str().unwrap(), mode, (0, 0), content);
    }

    /// Adds a program with its libraries.
    fn add_program(&mut self, path: &Path, file: &Path) {
        self.add(path, PROGRAM, &fs::read(file).unwrap());
        for library in libraries(file) {
            self.add(&library, PROGRAM, &fs::read(&library).unwrap());
        }
    }

    fn add_device(&mut self, name: &str, mode: u32, number: (u32, u32)) {
        self.entry(name, mode, number, &[]);
    }

    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        let size = u32::try_from(content.len()).unwrap();
        let name_size = u32::try_from(name.len()).unwrap() + 1;
        // ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor,
        // rdevmajor, rdevminor, namesize, check
        let fields = [
            0, mode, 0, 0, 1, 0, size, 0, 0, device.0, device.1, name_size, 0,
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes
                .extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    /// Names and contents begin at multiples of four.
    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }
}
