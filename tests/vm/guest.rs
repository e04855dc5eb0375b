//! The first process in the machine. Its task is in its environment, which has
//! each `NAME=value` of the kernel's command line.

use std::env;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{FileTypeExt, symlink};
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

use rustix::mount::{MountFlags, mount};
use rustix::system::{RebootCommand, finit_module, reboot};

use crate::load::{BEGUN, Load};
use crate::machine::{FAILED, PASSED, UP};
use crate::support::daemon::Daemon;
use crate::support::until;
use crate::{crash, faults, quotas};

/// The disk of the image volume.
pub const IMAGE_DEVICE: &str = "/dev/image";
/// The disk of the writable volume.
pub const WRITABLE_DEVICE: &str = "/dev/writable";

/// The line to the host: when the call returns, the host has what was written,
/// whatever happens to the machine then.
pub struct Outlet(File);

impl Outlet {
    fn open() -> Outlet {
        let path: String = setting("VM_OUTLET");
        until("a port to the outside", || {
            fs::metadata(&path).is_ok_and(|found| found.file_type().is_char_device())
        });
        Outlet(File::options().write(true).open(path).unwrap())
    }

    /// Writes a line, in one piece.
    pub fn line(&self, text: &str) {
        (&self.0).write_all(format!("{text}\n").as_bytes()).unwrap();
    }
}

/// Does the machine's task, and turns the machine off.
pub fn main() -> ! {
    make_usable();
    let outlet = Arc::new(Outlet::open());
    outlet.line(UP);
    let (to_outside, print) = (Arc::clone(&outlet), take_hook());
    set_hook(Box::new(move |panic| {
        print(panic);
        let text = panic.to_string().replace('\n', " ");
        to_outside.line(&format!("{FAILED}\t{text}"));
    }));
    // The hook has reported a panic of any thread.
    if catch_unwind(AssertUnwindSafe(|| work(&outlet))).is_ok() {
        outlet.line(PASSED);
    }
    let _ = reboot(RebootCommand::PowerOff);
    unreachable!("the power is off");
}

fn work(outlet: &Outlet) {
    match setting::<String>("VM_WORK").as_str() {
        "load" => {
            mount_disks();
            let daemon = Daemon::start(&arguments());
            let load = Load {
                seed: setting("VM_SEED"),
                boot: setting("VM_BOOT"),
                most_layers: 30,
                most_active: 8,
                healings: 5,
                has_quotas: false,
            };
            outlet.line(BEGUN);
            load.run(
                daemon.address(),
                &|record| outlet.line(&record.line()),
                &|| false,
            );
            panic!("the daemon has ended:\n{}", daemon.log());
        }
        "crash" => crash::run_as_guest(outlet),
        "quotas" => quotas::run(outlet),
        test => faults::run(test),
    }
}

/// A setting from the kernel's command line.
pub fn setting<T: FromStr>(name: &str) -> T {
    let text = env::var(name).unwrap_or_else(|_| panic!("{name} is missing"));
    text.parse()
        .unwrap_or_else(|_| panic!("{name} cannot be {text}"))
}

/// The daemon's arguments.
fn arguments() -> Vec<String> {
    let words = setting::<String>("VM_DAEMON");
    words.split(',').map(str::to_owned).collect()
}

/// Mounts both disks at the same paths as the host does.
fn mount_disks() {
    for (device, setting_name) in [(IMAGE_DEVICE, "VM_IMAGE"), (WRITABLE_DEVICE, "VM_WRITABLE")] {
        mount_ext4(device, Path::new(&setting::<String>(setting_name)));
    }
}

pub fn mount_ext4(device: &str, at: &Path) {
    fs::create_dir_all(at).unwrap();
    mount(device, at, "ext4", MountFlags::NOATIME, None)
        .unwrap_or_else(|errno| panic!("mount {device}: {errno}"));
}

fn make_usable() {
    for (kind, at) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        mount(kind, at, kind, MountFlags::empty(), None).unwrap();
    }
    let mut modules: Vec<_> = fs::read_dir("/modules")
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    // Their names begin with numbers, so that a module comes after those it
    // needs.
    modules.sort();
    for module in modules {
        finit_module(File::open(&module).unwrap(), c"", 0)
            .unwrap_or_else(|errno| panic!("load {}: {errno}", module.display()));
    }
    // Each kind of machine has other names for the disks.
    for (name, setting_name) in [
        (IMAGE_DEVICE, "VM_IMAGE_DEVICE"),
        (WRITABLE_DEVICE, "VM_WRITABLE_DEVICE"),
    ] {
        symlink(setting::<String>(setting_name), name).unwrap();
    }
}
