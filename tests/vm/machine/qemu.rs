//! A machine that qemu emulates, with the kernel of Debian 12, which users have. It
//! is ten times slower than the processor.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use super::{Driver, Start, ends_with_its_thread};
use crate::initramfs::find;

const MEBIBYTES_OF_MEMORY: &str = "512";

/// Where `tests/install-tools.sh` unpacks Debian's kernel package.
const KERNEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/target/tools/kernel");

pub const DRIVER: Driver = Driver {
    name: "qemu",
    // Each machine uses two processors.
    at_once: |_| 1,
    cuts: 15,
    load_ms: (2000, 6000),
    modules_in: KERNEL,
    // For the disks, the line to the host, the daemon, disks that fail, and quotas.
    modules: &[
        "virtio_pci",
        "virtio_blk",
        "virtio_console",
        "overlay",
        "dm-flakey",
        "quota_v2",
        "xfs",
        "loop",
    ],
    devices: [
        ("VM_IMAGE_DEVICE", "/dev/vda"),
        ("VM_WRITABLE_DEVICE", "/dev/vdb"),
        // The one port of the one virtio console (virtio_console.c).
        ("VM_OUTLET", "/dev/vport0p1"),
    ],
    most_boots: 5,
    limit_of_boot: Duration::from_secs(240),
    // For emulated processors on a busy host.
    limit: Duration::from_secs(600),
    command,
};

fn command(start: &Start) -> Command {
    let words = format!(
        "console=ttyS0 quiet panic=-1 mitigations=off {}",
        start.settings.join(" ")
    );
    let console = start.console();
    let mut command = ends_with_its_thread();
    command
        .args(["qemu-system-x86_64", "-nodefaults", "-no-user-config"])
        .args(["-display", "none"])
        // Emulated even if there is a /dev/kvm: one that can be opened may
        // still not run a machine, for example inside another virtual machine.
        .args(["-accel", "tcg,thread=multi", "-cpu", "qemu64,+rdrand"])
        .args(["-smp", "2", "-m", MEBIBYTES_OF_MEMORY])
        .arg("-kernel")
        .arg(kernel())
        .arg("-initrd")
        .arg(start.archive)
        .args(["-append", &words, "-no-reboot", "-serial", "stdio"])
        // A line has to be in the file before the machine goes on, so it is not
        // passed to another thread of qemu.
        .args(["-device", "virtio-serial-pci,ioeventfd=off"])
        .args(["-device", "virtserialport,chardev=records"])
        .arg("-chardev")
        .arg(format!(
            "file,id=records,path={}",
            start.records().display()
        ))
        .stdin(Stdio::null())
        .stdout(console.try_clone().unwrap())
        .stderr(console);
    for disk in start.disks {
        // A flush in the machine is a flush of the file.
        let drive = format!(
            "if=virtio,format=raw,cache=writeback,file={}",
            disk.display()
        );
        command.args(["-drive", &drive]);
    }
    command
}

fn kernel() -> PathBuf {
    let found = find(&Path::new(KERNEL).join("boot"), &|name| {
        name.starts_with("vmlinuz-")
    });
    found.into_iter().next().unwrap_or_else(|| {
        panic!("no kernel in {KERNEL}: sudo sh tests/install-tools.sh all unpacks one")
    })
}
