//! Moves between different file systems, and moves that fail.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use registered::registered;
use rustix::fs::{CWD, FileType, Mode, XattrFlags, getxattr, mknodat, setxattr};
use rustix::io::Errno;

use crate::check::{check, is_clean};
use crate::content::layer;
use crate::support::daemon::{Daemon, Split, command, is_empty};
use crate::support::disk::Disk;
use crate::support::mounted::Mounted;
use crate::support::until;

fn is_home(root: &Path, id: u64) -> bool {
    fs::symlink_metadata(root.join(format!("snapshots/{id}"))).is_ok_and(|found| found.is_dir())
}

fn set(path: &Path, name: &str, value: &[u8]) {
    setxattr(path, name, value, XattrFlags::empty()).unwrap();
}

fn has(path: &Path, name: &str) -> bool {
    match getxattr(path, name, &mut [0_u8; 4096]) {
        Ok(_) => true,
        Err(Errno::NODATA | Errno::OPNOTSUPP) => false,
        Err(errno) => panic!("{}: {name}: {errno}", path.display()),
    }
}

/// An ACL for that many users, in the kernel's form.
fn acl(users: u32) -> Vec<u8> {
    let mut acl = vec![2, 0, 0, 0];
    let any = u32::MAX;
    let mut entry = |tag: u16, perm: u16, id: u32| {
        acl.extend_from_slice(&tag.to_le_bytes());
        acl.extend_from_slice(&perm.to_le_bytes());
        acl.extend_from_slice(&id.to_le_bytes());
    };
    entry(1, 6, any);
    for user in 0..users {
        entry(2, 6, 1000 + user);
    }
    entry(4, 4, any);
    entry(0x10, 6, any);
    entry(0x20, 0, any);
    acl
}

/// Properties of a btrfs and XFS's own form of ACLs are left behind; the ACL itself and
/// all content are copied.
#[registered(crate::Test)]
fn what_belongs_to_a_file_system_does_not_stop_a_move() {
    for kind in ["btrfs", "xfs"] {
        let image = Disk::ext4(256);
        let writable = Disk::make(320, kind, &["-q"]);
        let daemon = Daemon::start(&command(&image, &writable, &["--relocate-after", "0"]));
        let client = daemon.client();
        client.prepare("key", "", &[]).unwrap();
        let top = writable.path().join("writable/snapshots/1/fs");
        let (file, directory) = (top.join("file"), top.join("directory"));
        fs::write(&file, "x").unwrap();
        fs::create_dir(&directory).unwrap();
        for path in [&file, &directory] {
            set(path, "system.posix_acl_access", &acl(20));
            set(path, "user.mine", b"1");
        }
        set(&directory, "trusted.overlay.opaque", b"y");
        if kind == "btrfs" {
            set(&file, "btrfs.compression", b"zstd");
            set(&directory, "btrfs.compression", b"zstd");
        } else {
            assert!(has(&file, "trusted.SGI_ACL_FILE"));
        }
        client.commit("key", "layer", &[]).unwrap();
        let root = image.path().join("root");
        until("the layer is home", || is_home(&root, 1));
        let moved = root.join("snapshots/1/fs");
        for name in ["file", "directory"] {
            let path = moved.join(name);
            assert!(has(&path, "system.posix_acl_access") && has(&path, "user.mine"));
            assert!(!has(&path, "trusted.SGI_ACL_FILE") && !has(&path, "btrfs.compression"));
        }
        assert!(has(&moved.join("directory"), "trusted.overlay.opaque"));
        let said = daemon.log().matches("do not have these attributes").count();
        assert_eq!(said, 1, "{}", daemon.log());
    }
}

#[registered(crate::Test)]
fn a_target_without_acls_takes_the_layer() {
    let image = Disk::make(320, "btrfs", &["-q"]);
    image.remount("noacl");
    let writable = Disk::ext4(256);
    let daemon = Daemon::start(&command(&image, &writable, &["--relocate-after", "0"]));
    let client = daemon.client();
    client.prepare("key", "", &[]).unwrap();
    let file = writable.path().join("writable/snapshots/1/fs/file");
    fs::write(&file, "x").unwrap();
    set(&file, "system.posix_acl_access", &acl(1));
    set(&file, "user.mine", b"1");
    client.commit("key", "layer", &[]).unwrap();
    let root = image.path().join("root");
    until("the layer is home", || is_home(&root, 1));
    assert!(has(&root.join("snapshots/1/fs/file"), "user.mine"));
    assert!(daemon.log().contains("system.posix_acl_access"));
}

/// If a copy of the image volume has lost the marks of opaque directories, deleted files
/// show again.
#[registered(crate::Test)]
fn a_check_misses_attributes() {
    let mut split = Split::start(&[]);
    let client = split.client();
    layer(&client, "base", "", |top| {
        fs::create_dir(top.join("d")).unwrap();
        fs::write(top.join("d/deleted"), "x").unwrap();
    });
    layer(&client, "top", "base", |top| {
        fs::remove_dir_all(top.join("d")).unwrap();
        fs::create_dir(top.join("d")).unwrap();
        fs::write(top.join("d/new"), "x").unwrap();
    });
    is_clean(&split);
    split.daemon.stop();
    let directory = split.root().join("snapshots/2/fs/d");
    rustix::fs::removexattr(&directory, "trusted.overlay.opaque").unwrap();
    let (code, said, _) = check(&split, &[]);
    assert_eq!(code, 1, "{said}");
    assert!(
        said.contains("damaged") && said.contains("with 2 extended attributes, and held"),
        "{said}"
    );
    set(&directory, "trusted.overlay.opaque", b"y");
    is_clean(&split);
}

/// A file with as many names as the file system allows.
#[registered(crate::Test)]
fn a_file_with_the_most_names_moves() {
    const MOST: u64 = 65_000;
    let split = Split::start(&["--relocate-after", "0"]);
    let client = split.client();
    client.prepare("key", "", &[]).unwrap();
    let top = split.writable().join("snapshots/1/fs");
    fs::write(top.join("0"), "x").unwrap();
    for number in 1..MOST {
        fs::hard_link(top.join("0"), top.join(number.to_string())).unwrap();
    }
    fs::hard_link(top.join("0"), top.join("one too many")).unwrap_err();
    client.commit("key", "layer", &[]).unwrap();
    until("the layer is home", || is_home(&split.root(), 1));
    let moved = split.root().join("snapshots/1/fs");
    assert_eq!(fs::metadata(moved.join("7")).unwrap().nlink(), MOST);
    assert_eq!(fs::read_dir(&moved).unwrap().count() as u64, MOST);
}

/// A move that fails again and again, with restarts and kills of the daemon.
#[registered(crate::Test)]
fn a_move_that_fails_leaves_nothing() {
    // The target does not support a link of this length.
    let image = Disk::make(320, "xfs", &["-q"]);
    let writable = Disk::ext4(256);
    let mut daemon = Daemon::start(&command(&image, &writable, &["--relocate-after", "0"]));
    let root = image.path().join("root");
    let client = daemon.client();
    client.prepare("key", "", &[]).unwrap();
    let top = writable.path().join("writable/snapshots/1/fs");
    fs::write(top.join("data"), vec![1; 20 << 20]).unwrap();
    symlink("x/".repeat(1000), top.join("z-link")).unwrap();
    client.commit("key", "layer", &[]).unwrap();
    let failures = |daemon: &Daemon| daemon.log().matches("until the next start").count();
    for start in 1..=3 {
        until("it is said", || failures(&daemon) == start);
        until("nothing is left", || {
            is_empty(root.join("trash")) && !root.join("snapshots/.moving-1").exists()
        });
        daemon.stop();
        daemon.restart();
    }
    daemon.stop();
    for _ in 0..3 {
        daemon.restart_until_dead_at("begun");
    }
    let before = failures(&daemon);
    daemon.restart();
    until("it is said", || failures(&daemon) > before);
    until("nothing is left", || is_empty(root.join("trash")));
}

/// The layer that Docker makes between an image and its container.
fn docker_container(split: &Split, key: &str, image: &str) {
    let client = split.client();
    let init = format!("moby/1/{key}-init");
    let mounted = Mounted::new(&client.prepare("init-key", image, &[]).unwrap());
    fs::create_dir_all(mounted.path().join("dev/pts")).unwrap();
    for name in ["dev/console", "etc/hosts", ".dockerenv"] {
        fs::write(mounted.path().join(name), "").unwrap();
    }
    // The image of the second container has the link already.
    let _ = symlink("/proc/mounts", mounted.path().join("etc/mtab"));
    drop(mounted);
    client.commit("init-key", &init, &[]).unwrap();
    client.prepare(key, &init, &[]).unwrap();
}

fn docker(split: &Split) {
    let client = split.client();
    layer(&client, "image", "", |top| {
        fs::create_dir(top.join("etc")).unwrap();
        fs::write(top.join("etc/passwd"), "root").unwrap();
    });
    docker_container(split, "c1", "image");
    // A docker commit of the container, and a container of that image.
    let mounted = Mounted::new(&client.mounts("c1").unwrap());
    fs::write(mounted.path().join("installed"), vec![1; 2 << 20]).unwrap();
    drop(mounted);
    client.commit("c1", "committed", &[]).unwrap();
    docker_container(split, "c2", "committed");
}

fn shows_everything(split: &Split) {
    let mounted = Mounted::new(&split.client().mounts("c2").unwrap());
    assert_eq!(
        fs::read(mounted.path().join("installed")).unwrap().len(),
        2 << 20
    );
    assert_eq!(
        fs::read(mounted.path().join("etc/passwd")).unwrap(),
        b"root"
    );
}

#[registered(crate::Test)]
fn dockers_containers_start_after_a_reset() {
    // Time for a container to stand on its small layer.
    let mut split = Split::start(&["--relocate-after", "3"]);
    docker(&split);
    until("the committed image is home", || is_home(&split.root(), 3));
    assert!(!is_home(&split.root(), 4), "small layers in use stay");
    split.daemon.stop();
    split.writable.unmount();
    split.writable = Disk::ext4(64);
    let arguments = command(&split.image, &split.writable, &["--relocate-after", "0"]);
    split.daemon.set_arguments(arguments);
    let (code, said, complaint) = check(&split, &["--reset-writable", "--yes"]);
    assert_eq!(code, 0, "{said}{complaint}");
    is_clean(&split);
    split.daemon.restart();
    shows_everything(&split);
}

#[registered(crate::Test)]
fn dockers_containers_start_after_a_volatile_volume_is_emptied() {
    // Only the layers that the test waits for have moved by then.
    let flags = ["--writable-volatile", "--relocate-after", "0"];
    let mut split = Split::start(&flags);
    docker(&split);
    until("also small layers move", || {
        [2, 3, 4].iter().all(|id| is_home(&split.root(), *id))
    });
    split.daemon.stop();
    split.writable.unmount();
    split.writable = Disk::ext4(64);
    fs::create_dir(split.writable.path().join("writable")).unwrap();
    let point = split.writable.path().join("writable");
    rustix::mount::mount(
        "none",
        &point,
        "tmpfs",
        rustix::mount::MountFlags::empty(),
        None,
    )
    .unwrap();
    split
        .daemon
        .set_arguments(command(&split.image, &split.writable, &flags));
    split.daemon.restart();
    shows_everything(&split);
    split.daemon.stop();
    is_clean(&split);
}

/// A layer that hides something, or holds a link, is not replaced by an empty one.
#[registered(crate::Test)]
fn a_lost_layer_that_changes_what_is_shown_stays_lost() {
    let mut split = Split::start(&["--relocate", "never"]);
    let client = split.client();
    layer(&client, "image", "", |top| {
        fs::write(top.join("a"), "a").unwrap();
        fs::create_dir(top.join("d")).unwrap();
    });
    let changes: [fn(&Path); 4] = [
        |top| {
            mknodat(
                CWD,
                top.join("a"),
                FileType::CharacterDevice,
                Mode::empty(),
                0,
            )
            .unwrap()
        },
        |top| symlink("a", top.join("link")).unwrap(),
        |top| set(top, "trusted.overlay.opaque", b"y"),
        |top| fs::write(top.join("b"), "b").unwrap(),
    ];
    for (number, change) in changes.iter().enumerate() {
        client.prepare("key", "image", &[]).unwrap();
        change(
            &split
                .writable()
                .join(format!("snapshots/{}/fs", number + 2)),
        );
        client
            .commit("key", &format!("{number}-init"), &[])
            .unwrap();
    }
    split.daemon.stop();
    for id in 2..6 {
        fs::remove_dir_all(split.writable().join(format!("snapshots/{id}"))).unwrap();
    }
    let (_, said, _) = check(&split, &[]);
    assert_eq!(said.matches("is missing from").count(), 4, "{said}");
    assert!(!said.contains("nothing but empty"), "{said}");
    split.daemon.restart();
    assert_eq!(split.daemon.log().matches("is lost").count(), 4);
}

#[registered(crate::Test)]
fn times_that_the_target_cannot_keep_are_said_first() {
    let image = Disk::make(128, "ext4", &["-q", "-F", "-I", "128"]);
    let writable = Disk::ext4(64);
    let arguments = command(&image, &writable, &["--relocate-after", "3600"]);
    let daemon = Daemon::start(&arguments);
    until("it is said", || daemon.log().contains("up to 2038 only"));
    let doctor = Command::new(crate::support::daemon::BINARY)
        .arg("doctor")
        .args(&arguments)
        .output()
        .unwrap();
    let said = String::from_utf8(doctor.stdout).unwrap();
    assert!(said.contains("2038"), "{said}");
    let split = Split::start(&[]);
    std::thread::sleep(Duration::from_millis(300));
    assert!(!split.daemon.log().contains("2038"));
}

#[registered(crate::Test)]
fn an_image_volume_that_cannot_hold_layers_is_refused() {
    let writable = Disk::ext4(64);
    let ram = tempfile::tempdir().unwrap();
    let flags = rustix::mount::MountFlags::empty();
    rustix::mount::mount("none", ram.path(), "ramfs", flags, None).unwrap();
    let arguments = [
        "--root-dir".to_owned(),
        format!("{}/root", ram.path().display()),
        "--writable-dir".to_owned(),
        format!("{}/writable", writable.text()),
    ];
    let said = Daemon::try_start(&arguments).err();
    rustix::mount::unmount(ram.path(), rustix::mount::UnmountFlags::DETACH).unwrap();
    let said = said.expect("it is refused");
    assert!(said.contains("cannot hold image layers"), "{said}");
    assert!(!writable.path().join("writable").exists());
}
