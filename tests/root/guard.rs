//! Checks of the volumes before their use: that they are mounted, have room,
//! and are what an empty one should be.

use std::fs;
use std::path::Path;

use grpcio::RpcStatusCode;
use registered::registered;
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_bind, unmount};

use crate::check::is_clean;
use crate::content::layer;
use crate::support::daemon::{Daemon, Split, command, is_empty, refused};
use crate::support::disk::Disk;
use crate::support::mounted::Mounted;

/// A file system in memory, empty like after a reboot; unmounted when dropped.
struct Memory<'a>(&'a Path);

impl Memory<'_> {
    fn mount(path: &Path) -> Memory<'_> {
        mount("tmpfs", path, "tmpfs", MountFlags::empty(), None).unwrap();
        Memory(path)
    }
}

impl Drop for Memory<'_> {
    fn drop(&mut self) {
        unmount(self.0, UnmountFlags::DETACH).unwrap();
    }
}

#[registered(crate::Test)]
fn mount_points_are_required() {
    let (image, writable) = (Disk::ext4(64), Disk::ext4(64));
    // Directories on mounted disks are no mount points.
    let inside = command(&image, &writable, &["--require-mount"]);
    let line = refused(&inside);
    assert!(
        line.contains("--root-dir") && line.contains("does not exist"),
        "{line}"
    );
    assert!(is_bare(image.path()) && is_bare(writable.path()));

    let arguments: Vec<String> = [
        "--root-dir",
        &image.text(),
        "--writable-dir",
        &writable.text(),
        "--require-mount",
    ]
    .map(str::to_owned)
    .to_vec();
    writable.unmount();
    let line = refused(&arguments);
    assert!(line.contains("--writable-dir"), "{line}");
    assert!(is_empty(writable.path()) && is_bare(image.path()));
    writable.mount();
    let mut daemon = Daemon::start(&arguments);
    daemon.client().prepare("web", "", &[]).unwrap();
    daemon.stop();

    // A bind mount is a mount point.
    let elsewhere = tempfile::tempdir().unwrap();
    mount_bind(elsewhere.path(), elsewhere.path()).unwrap();
    let mut bound = arguments.clone();
    bound[3] = elsewhere.path().to_str().unwrap().to_owned();
    let mut daemon = Daemon::start(&bound);
    daemon.stop();
    unmount(elsewhere.path(), UnmountFlags::empty()).unwrap();
    let line = refused(&bound);
    assert!(line.contains("not a mount point"), "{line}");
}

/// Whether an ext4 contains only what mkfs makes.
fn is_bare(path: impl AsRef<Path>) -> bool {
    let mut names = fs::read_dir(path).unwrap();
    names.all(|entry| entry.unwrap().file_name() == "lost+found")
}

#[registered(crate::Test)]
fn a_volume_in_memory() {
    let image = Disk::ext4(64);
    let writable = tempfile::tempdir().unwrap();
    let memory = Memory::mount(writable.path());
    let arguments = |flags: &[&str]| -> Vec<String> {
        let root = format!("{}/root", image.text());
        // A directory in memory, which a reboot deletes with its contents.
        let writable = format!("{}/a/b", writable.path().display());
        [&["--root-dir", &root, "--writable-dir", &writable], flags]
            .concat()
            .iter()
            .map(ToString::to_string)
            .collect()
    };
    let mut daemon = Daemon::start(&arguments(&["--writable-volatile", "--relocate", "never"]));
    let client = daemon.client();
    layer(&client, "base", "", |top| {
        fs::write(top.join("file"), "base").unwrap();
    });
    client.prepare("init", "base", &[]).unwrap();
    fs::write(writable.path().join("a/b/snapshots/2/fs/own"), "lost").unwrap();
    client.commit("init", "layer", &[]).unwrap();
    client.prepare("on-layer", "layer", &[]).unwrap();
    let mounted = Mounted::new(&client.prepare("web", "base", &[]).unwrap());
    fs::write(mounted.path().join("own"), "written").unwrap();
    drop(mounted);
    daemon.stop();

    // The same disk: a restart of the daemon alone loses nothing.
    daemon.restart();
    let own = writable.path().join("a/b/snapshots/4/fs/own");
    assert_eq!(fs::read_to_string(&own).unwrap(), "written");
    daemon.stop();

    // A reboot without the mount: the daemon waits for the mount.
    drop(memory);
    daemon.restart();
    let (code, text) = daemon.client().mounts("web").unwrap_err();
    assert_eq!(code, RpcStatusCode::FAILED_PRECONDITION, "{text}");
    assert!(is_empty(writable.path()));
    daemon.stop();

    // A reboot with the mount: containers start from their images, and the log
    // names the loss.
    let anew = Memory::mount(writable.path());
    daemon.restart();
    let client = daemon.client();
    let mounted = Mounted::new(&client.mounts("web").unwrap());
    assert!(mounted.path().join("file").exists() && !mounted.path().join("own").exists());
    drop(mounted);
    let (code, text) = client.prepare("new", "layer", &[]).unwrap_err();
    assert_eq!(code, RpcStatusCode::DATA_LOSS, "{text}");
    assert!(
        daemon.log().contains("layer \"layer\" is lost"),
        "{}",
        daemon.log()
    );
    client.prepare("new", "base", &[]).unwrap();
    daemon.stop();

    daemon.restart();
    daemon.stop();

    // A disk with files on it is not what a reboot leaves.
    drop(anew);
    let other = Memory::mount(writable.path());
    fs::create_dir_all(writable.path().join("a/b/snapshots/2")).unwrap();
    daemon.restart();
    let (code, text) = daemon.client().prepare("more", "base", &[]).unwrap_err();
    assert_eq!(code, RpcStatusCode::FAILED_PRECONDITION, "{text}");
    assert!(writable.path().join("a/b/snapshots/2").exists());
    daemon.stop();

    // Without the flag, an empty disk is another disk.
    drop(other);
    let _memory = Memory::mount(writable.path());
    daemon.set_arguments(arguments(&["--relocate", "never"]));
    daemon.restart();
    let (code, text) = daemon.client().prepare("more", "base", &[]).unwrap_err();
    assert_eq!(code, RpcStatusCode::FAILED_PRECONDITION, "{text}");
    assert!(is_empty(writable.path()));
}

#[registered(crate::Test)]
fn a_reserve_is_kept() {
    for reserve in ["64M", "25%"] {
        let split = Split::start(&["--reserve", reserve]);
        let client = split.client();
        layer(&client, "base", "", |top| {
            fs::write(top.join("file"), "base").unwrap();
        });
        client.prepare("web", "base", &[]).unwrap();
        let filler = split.writable().join("snapshots/2/fs/filler");
        // 256 MiB, a part of which ext4 takes itself.
        fs::write(&filler, vec![1; 190 << 20]).unwrap();
        let (code, text) = client.prepare("new", "base", &[]).unwrap_err();
        assert_eq!(code, RpcStatusCode::RESOURCE_EXHAUSTED, "{text}");
        assert!(
            text.contains("--reserve") && text.contains("MiB free"),
            "{text}"
        );
        assert!(!client.exists("new"));
        // Images, views and existing containers work.
        layer(&client, "upper", "base", |_| ());
        client.view("view", "upper", &[]).unwrap();
        client.mounts("web").unwrap();
        client.commit("web", "layer", &[]).unwrap();
        client.remove("layer").unwrap();
        client.cleanup().unwrap();
        client.prepare("new", "base", &[]).unwrap();
        is_clean(&split);
    }
}
