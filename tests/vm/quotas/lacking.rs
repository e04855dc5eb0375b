//! Missing quotas, and snapshots from before there were quotas.

use std::fs;
use std::path::Path;
use std::process::Command;

use grpcio::RpcStatusCode;
use registered::registered;
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_remount, unmount};

use super::{
    MAX_INODES, MIB, OWN_MAX_SIZE, Rig, disk, fill, is_refused, prepare, size_of_disk, upper,
    usage, walk,
};
use crate::guest::WRITABLE_DEVICE;
use crate::support::client::Client;
use crate::support::daemon::{Daemon, is_empty, refused};

const LIMITED: &[(&str, &str)] = &[(OWN_MAX_SIZE, "8M")];

/// quotactl(2) with the path of the device, as before Linux 5.14.
#[registered(crate::quotas::Test)]
fn the_older_call_does_as_well(rig: &mut Rig) {
    let arguments = rig.arguments(&[]);
    let daemon = Daemon::start_in(&arguments, &[("SNAPSHOTTER_NO_QUOTACTL_FD", "1")]);
    let client = daemon.client();
    let mounts = client.prepare("web", "", LIMITED).unwrap();
    let web = super::Mounted::new(&mounts);
    assert_eq!(size_of_disk(&web), 8 * MIB);
    fill(&web.path().join("file"), MIB);
    assert_eq!(usage(&client, "web"), walk(&rig.newest()));
    drop(web);
    rig.clear(&client);
}

#[registered(crate::quotas::Test)]
fn what_is_older_than_quotas_is_walked(rig: &mut Rig) {
    let mut daemon = rig.start(&["--quota", "off"]);
    let client = daemon.client();
    client.prepare("old", "base", &[]).unwrap();
    is_refused(
        client.prepare("limited", "base", LIMITED),
        RpcStatusCode::FAILED_PRECONDITION,
        &["--quota off"],
    );
    fs::write(upper(&client, "old").join("file"), vec![1; 100_000]).unwrap();
    daemon.stop();
    daemon.set_arguments(rig.arguments(&[]));
    daemon.restart();
    let client = daemon.client();
    assert_eq!(usage(&client, "old"), walk(&upper(&client, "old")));
    let field = format!("labels.{OWN_MAX_SIZE}");
    is_refused(
        client.update("old", &[&field], LIMITED),
        RpcStatusCode::FAILED_PRECONDITION,
        &["create the container again"],
    );
    assert!(client.stat("old").unwrap().labels.is_empty());
    let new = prepare(&client, "new", LIMITED);
    assert_eq!(size_of_disk(&new), 8 * MIB);

    // With quotas switched off again, the limits stay, and files are counted.
    daemon.stop();
    daemon.set_arguments(rig.arguments(&["--quota", "off"]));
    daemon.restart();
    let client = daemon.client();
    assert_eq!(size_of_disk(&new), 8 * MIB);
    assert_eq!(usage(&client, "new"), walk(&upper(&client, "new")));
    drop(new);
    client.remove("new").unwrap();
    client.cleanup().unwrap();
    daemon.stop();
    daemon.set_arguments(rig.arguments(&[]));
    daemon.restart();
    rig.clear(&daemon.client());
}

#[registered(crate::quotas::Test)]
fn a_limit_is_taken_away_without_quotas(rig: &mut Rig) {
    let mut daemon = rig.start(&[]);
    let labels = [(OWN_MAX_SIZE, "8M"), (MAX_INODES, "100"), ("other", "x")];
    let web = prepare(&daemon.client(), "web", &labels);
    let mut start_with = |flags: &[&str]| {
        daemon.stop();
        daemon.set_arguments(rig.arguments(flags));
        daemon.restart();
        daemon.client()
    };
    let client = start_with(&["--quota", "off"]);
    let field = format!("labels.{OWN_MAX_SIZE}");
    is_refused(
        client.update("web", &[&field], &[(OWN_MAX_SIZE, "16M")]),
        RpcStatusCode::FAILED_PRECONDITION,
        &["--quota off"],
    );
    client.update("web", &[&field], &[]).unwrap();
    assert!(
        !client
            .stat("web")
            .unwrap()
            .labels
            .contains_key(OWN_MAX_SIZE)
    );
    // The kernel still has the old limit.
    assert_eq!(size_of_disk(&web), 8 * MIB);
    start_with(&[]);
    assert!(size_of_disk(&web) > 100 * MIB);
    assert_eq!(disk(&web).f_files, 100);
    // All labels at once.
    let client = start_with(&["--quota", "off"]);
    client.update("web", &[], &[("other", "y")]).unwrap();
    let client = start_with(&[]);
    assert!(disk(&web).f_files > 100);
    drop(web);
    rig.clear(&client);
}

/// The kernel treats a request for a quota as a write.
#[registered(crate::quotas::Test)]
fn a_read_only_volume_is_walked(rig: &mut Rig) {
    let daemon = rig.start(&[]);
    let client = daemon.client();
    client.prepare("web", "base", LIMITED).unwrap();
    let upper = upper(&client, "web");
    fs::write(upper.join("file"), vec![1; 100_000]).unwrap();
    rustix::fs::sync();
    mount_remount(&rig.writable, MountFlags::RDONLY, c"").unwrap();
    let told = client.usage("web").map(|usage| usage.inodes);
    mount_remount(&rig.writable, MountFlags::empty(), c"").unwrap();
    assert_eq!(told, Ok(2), "the file, and what it is in");
    rig.clear(&client);
}

#[registered(crate::quotas::Test)]
fn a_missing_mount_option_is_named(rig: &mut Rig) {
    let option = rig.option();
    let mut daemon = rig.start(&[]);
    daemon.stop();
    rig.remount_writable("");
    daemon.restart();
    let client = daemon.client();
    client.prepare("free", "base", &[]).unwrap();
    fs::write(upper(&client, "free").join("file"), vec![1; 100_000]).unwrap();
    is_refused(
        client.prepare("web", "base", LIMITED),
        RpcStatusCode::FAILED_PRECONDITION,
        &[option, "mount -o", WRITABLE_DEVICE],
    );
    assert_eq!(client.names(&["kind==active"]).unwrap(), ["free"]);
    if !rig.is_xfs() {
        // ext4 counts in spite of that.
        assert_eq!(usage(&client, "free"), walk(&rig.newest()));
        assert!(status(rig).contains("limits are not enforced"));
    }
    client.remove("free").unwrap();
    client.cleanup().unwrap();
    daemon.stop();
    let said = refused(&rig.arguments(&["--quota", "require"]));
    assert!(said.contains(option), "{said}");
    daemon.set_arguments(rig.arguments(&["--default-max-size", "8M"]));
    daemon.restart();
    assert!(daemon.log().contains("no container can be created"));
    let client: Client = daemon.client();
    is_refused(
        client.prepare("web", "base", &[]),
        RpcStatusCode::FAILED_PRECONDITION,
        &[option],
    );
    client
        .prepare("web", "base", &[(OWN_MAX_SIZE, "0")])
        .unwrap();
    client.remove("web").unwrap();
    daemon.stop();

    rig.remount_writable(option);
    daemon.set_arguments(rig.arguments(&["--quota", "require"]));
    daemon.restart();
    let client = daemon.client();
    drop(prepare(&client, "web", LIMITED));
    let said = status(rig);
    assert!(
        said.contains("limits are enforced") && said.contains("of 8.0M"),
        "{said}"
    );
    rig.clear(&client);
}

fn status(rig: &Rig) -> String {
    let mut status = Command::new(crate::support::daemon::BINARY);
    crate::support::run(status.arg("status").args(rig.arguments(&[])))
}

/// The disk comes back without the option, and something was removed meanwhile.
#[registered(crate::quotas::Test)]
fn quotas_that_are_gone_stop_no_removal(rig: &mut Rig) {
    let daemon = rig.start(&["--quota", "require"]);
    let client = daemon.client();
    client.prepare("web", "base", &[]).unwrap();
    unmount(&rig.writable, UnmountFlags::empty()).unwrap();
    client.remove("web").unwrap();
    rig.mount(WRITABLE_DEVICE, &rig.writable, "");
    client.cleanup().unwrap();
    for name in ["snapshots", "trash"] {
        assert!(is_empty(rig.writable().join(name)), "{name}");
    }
    rig.remount_writable(rig.option());
    rig.clear(&client);
}

#[registered(crate::quotas::Test)]
fn a_missing_feature_is_named(rig: &mut Rig) {
    if rig.is_xfs() {
        return;
    }
    // The image volume's disk has the feature, so a file on it becomes a disk
    // without.
    let file = rig.image.join("without");
    fs::File::create(&file).unwrap().set_len(16 * MIB).unwrap();
    crate::support::run(Command::new("mkfs.ext4").arg("-q").arg(&file));
    let device = crate::support::run(Command::new("losetup").args(["-f", "--show"]).arg(&file));
    fs::create_dir(rig.writable()).unwrap();
    rig.mount(device.trim(), &rig.writable(), "");
    let daemon = rig.start(&[]);
    let client = daemon.client();
    client.prepare("free", "base", &[]).unwrap();
    is_refused(
        client.prepare("web", "base", LIMITED),
        RpcStatusCode::FAILED_PRECONDITION,
        &["tune2fs -O quota,project", device.trim(), "prjquota"],
    );
    drop(daemon);
    unmount(rig.writable(), UnmountFlags::DETACH).unwrap();
}

#[registered(crate::quotas::Test)]
fn broken_quotas_stop_only_who_needs_them(rig: &mut Rig) {
    if rig.is_xfs() {
        return;
    }
    let file = rig.image.join("broken");
    fs::File::create(&file).unwrap().set_len(32 * MIB).unwrap();
    let mut make = Command::new("mkfs.ext4");
    // With the largest block size, so that the beginning of the tree is in the
    // same block.
    make.args(["-q", "-b", "4096", "-O", "quota,project"]);
    make.args(["-E", "quotatype=prjquota"]);
    crate::support::run(make.arg(&file));
    break_quotas(&file);
    let device = crate::support::run(Command::new("losetup").args(["-f", "--show"]).arg(&file));
    fs::create_dir(rig.writable()).unwrap();
    rig.mount(device.trim(), &rig.writable(), rig.option());
    let mut daemon = rig.start(&[]);
    let client = daemon.client();
    for key in ["one", "two"] {
        drop(prepare(&client, key, &[]));
        assert_eq!(usage(&client, key), walk(&upper(&client, key)));
    }
    let warned = daemon
        .log()
        .matches("new containers get no project")
        .count();
    assert_eq!(warned, 1, "{}", daemon.log());
    let internal = RpcStatusCode::INTERNAL;
    let limited = client.prepare("web", "base", LIMITED);
    is_refused(limited, internal, &["project 2"]);
    assert_eq!(client.names(&["kind==active"]).unwrap(), ["one", "two"]);
    client.remove("one").unwrap();
    daemon.stop();
    unmount(rig.writable(), UnmountFlags::DETACH).unwrap();
}

/// Damages an ext4's quota file, in the tree of ids. Its root has the number of a
/// block for each first byte. The block for 0, the project of everything without
/// one, stays sound.
fn break_quotas(file: &Path) {
    /// `V2_INITQMAGICS` of projects (`fs/quota/quotaio_v2.h`), and the version.
    const BEGINNING: [u8; 8] = [0x14, 0x3f, 0xc0, 0xd9, 1, 0, 0, 0];
    const BLOCK: usize = 1024;
    let mut bytes = fs::read(file).unwrap();
    let is_quota_file = |block: &[u8]| block.starts_with(&BEGINNING);
    let at = bytes.chunks(BLOCK).position(is_quota_file).unwrap() * BLOCK;
    bytes[at + BLOCK + 4..at + 2 * BLOCK].fill(0xff);
    fs::write(file, bytes).unwrap();
}

#[registered(crate::quotas::Test)]
fn another_file_system_has_none(rig: &mut Rig) {
    fs::create_dir(rig.writable()).unwrap();
    mount("none", rig.writable(), "tmpfs", MountFlags::empty(), None).unwrap();
    let daemon = rig.start(&[]);
    let client = daemon.client();
    client.prepare("free", "base", &[]).unwrap();
    assert_eq!(usage(&client, "free"), walk(&upper(&client, "free")));
    is_refused(
        client.prepare("web", "base", LIMITED),
        RpcStatusCode::FAILED_PRECONDITION,
        &["tmpfs", "ext4", "XFS"],
    );
    drop(daemon);
    unmount(rig.writable(), UnmountFlags::DETACH).unwrap();
}
