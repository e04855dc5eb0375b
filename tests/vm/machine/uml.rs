//! A machine that is a process: user-mode Linux, a Linux kernel built as a program
//! (Documentation/virt/uml/user_mode_linux_howto_v2.rst). Its processes run at the
//! speed of the processor, and it has only one processor.
//!
//! Its threads belong to that process and end with it. The host's processes for
//! the machine's processes are killed a moment later; without the kernel, they
//! cannot reach a disk.

use std::fs::File;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use super::{Driver, Start, ends_with_its_thread};

const MEBIBYTES_OF_MEMORY: u64 = 1024;

/// The directory into which `tests/uml.sh` unpacks it.
const UML: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/target/tools/uml");

pub const DRIVER: Driver = Driver {
    name: "uml",
    at_once: |processors| processors,
    cuts: 100,
    load_ms: (300, 2200),
    modules_in: UML,
    // For the daemon, disks that fail, and quotas.
    modules: &["overlay", "dm-flakey", "quota_v2", "loop", "fuse"],
    devices: [
        ("VM_IMAGE_DEVICE", "/dev/ubda"),
        ("VM_WRITABLE_DEVICE", "/dev/ubdb"),
        ("VM_OUTLET", "/dev/ttyS1"),
    ],
    most_boots: 2,
    limit_of_boot: Duration::from_secs(60),
    limit: Duration::from_secs(180),
    command,
};

/// Whether user-mode Linux was unpacked.
pub fn is_there() -> bool {
    Path::new(UML).join("linux").exists()
}

fn command(start: &Start) -> Command {
    let console = start.console();
    let mut command = ends_with_its_thread();
    command
        // setarch switches off the random layout of its memory. Otherwise, it
        // would start itself again to do that.
        .args(["setarch", "-R", "env", "LD_LIBRARY_PATH=.", "./linux"])
        .current_dir(UML)
        .env("TMPDIR", place_of_memory(start.scratch))
        .arg(format!("mem={MEBIBYTES_OF_MEMORY}M"))
        .arg(format!("initrd={}", start.archive.display()))
        .arg(format!("uml_dir={}/", start.scratch.display()))
        // The kernel writes a line to its descriptor without a buffer. Nothing is
        // read, so that the descriptor for input is free for this.
        .args(["con=null", "con0=null,fd:1", "ssl=null", "ssl1=null,fd:0"])
        .args(["quiet", "panic=-1"])
        .args(start.settings)
        .stdin(File::create(start.records()).unwrap())
        .stdout(console.try_clone().unwrap())
        .stderr(console);
    for (number, disk) in start.disks.iter().enumerate() {
        command.arg(format!("ubd{number}={}", disk.display()));
    }
    command
}

/// The machine's memory is a file. It should be in the host's memory, but in a
/// container that file system may be too small.
fn place_of_memory(scratch: &Path) -> &Path {
    let shared_memory = Path::new("/dev/shm");
    let is_large = rustix::fs::statvfs(shared_memory).is_ok_and(|disk| {
        // There has to be room for the machines of other processors.
        disk.f_bavail * disk.f_frsize >= 8 * (MEBIBYTES_OF_MEMORY << 20)
    });
    if is_large { shared_memory } else { scratch }
}
