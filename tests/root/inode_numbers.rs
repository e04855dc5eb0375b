//! What programs in containers see of inode numbers, and the other options that mounts
//! need on this kernel.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};

use registered::registered;

use crate::content::layer;
use crate::support::client::Client;
use crate::support::daemon::{Daemon, Split, command};
use crate::support::disk::Disk;
use crate::support::mounted::Mounted;
use crate::support::run;

/// An archive whose links point out of it. GNU tar makes these links at its end, and
/// checks that the inode numbers of their directories are the same as before.
fn archive(directory: &Path) -> std::path::PathBuf {
    let source = directory.join("src");
    for number in 0..150 {
        let inner = source.join(format!("d{number}"));
        fs::create_dir_all(inner.join("s")).unwrap();
        fs::write(inner.join("s/file"), "x").unwrap();
        symlink("/usr/bin/true", inner.join("link")).unwrap();
    }
    let archive = directory.join("src.tar");
    run(Command::new("tar")
        .arg("-cf")
        .arg(&archive)
        .arg("-C")
        .arg(directory)
        .arg("src"));
    archive
}

/// Makes the kernel forget inodes that nothing uses.
fn drop_caches() {
    run(Command::new("sync").arg("--file-system").arg("/"));
    for _ in 0..4 {
        fs::write("/proc/sys/vm/drop_caches", "2").unwrap();
    }
}

/// Extracts the archive, with a pause in the middle.
fn extract(archive: &Path, target: &Path) {
    let mut child = Command::new("tar")
        .args(["-xf", "-", "-C"])
        .arg(target)
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut bytes = Vec::new();
    File::open(archive)
        .unwrap()
        .read_to_end(&mut bytes)
        .unwrap();
    let mut input = child.stdin.take().unwrap();
    let middle = bytes.len() / 2 / 512 * 512;
    input.write_all(&bytes[..middle]).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(500));
    run(Command::new("sync").arg("--file-system").arg(target));
    drop_caches();
    input.write_all(&bytes[middle..]).unwrap();
    drop(input);
    let output = child.wait_with_output().unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

fn inodes(flags: &[&str], top: &Path) -> u64 {
    let said = run(Command::new("du")
        .args(["--inodes", "-s"])
        .args(flags)
        .arg(top));
    said.split_whitespace().next().unwrap().parse().unwrap()
}

fn filled_layer(client: &Client) {
    layer(client, "base", "", |top| {
        for number in 0..50 {
            fs::create_dir(top.join(format!("{number}"))).unwrap();
            fs::write(top.join(format!("{number}/file")), "x").unwrap();
        }
    });
}

#[registered(crate::Test)]
fn they_are_lasting_and_of_one_device() {
    let directory = tempfile::tempdir().unwrap();
    let archive = archive(directory.path());
    let disks = || {
        [
            Disk::ext4(64),
            Disk::make(320, "xfs", &["-q"]),
            Disk::ext4(64),
        ]
    };
    for pair in disks().windows(2) {
        let daemon = Daemon::start(&command(&pair[0], &pair[1], &[]));
        let client = daemon.client();
        filled_layer(&client);
        let mounts = client.prepare("web", "base", &[]).unwrap();
        assert_eq!(client.mounts("web").unwrap(), mounts);
        let mounted = Mounted::new(&mounts);
        let top = mounted.path();
        extract(&archive, &top);

        let numbers = |name: &str| {
            let found = fs::metadata(top.join(name)).unwrap();
            (found.dev(), found.ino())
        };
        let names = ["", "src", "src/d7/s/file", "7", "7/file"];
        let before = names.map(numbers);
        drop_caches();
        assert_eq!(names.map(numbers), before);
        let device = before[0].0;
        assert!(
            before.iter().all(|(found, _)| *found == device),
            "{before:?}"
        );
        assert_eq!(inodes(&["-x"], &top), inodes(&[], &top));
    }
}

/// Builders compare whole trees below a mount with options that they do not know.
#[registered(crate::Test)]
fn mounts_on_one_file_system_need_no_option() {
    let has_xino = |mounts: &[overlay_read_write_splitting_snapshotter::proto::mount::Mount]| {
        mounts[0]
            .options
            .iter()
            .any(|option| option.starts_with("xino"))
    };
    let split = Split::start(&[]);
    let client = split.client();
    filled_layer(&client);
    let unpack = client.prepare("default/1/extract-2", "base", &[]).unwrap();
    assert!(!has_xino(&unpack), "{unpack:?}");

    let disk = Disk::ext4(64);
    let daemon = Daemon::start(&command(&disk, &disk, &[]));
    let client = daemon.client();
    filled_layer(&client);
    let web = client.prepare("web", "base", &[]).unwrap();
    assert!(!has_xino(&web), "{web:?}");

    // The administrator's choice stays.
    let split = Split::start(&["--mount-option", "xino=off"]);
    let client = split.client();
    filled_layer(&client);
    let web = client.prepare("web", "base", &[]).unwrap();
    let chosen = web[0]
        .options
        .iter()
        .filter(|option| option.starts_with("xino"));
    assert_eq!(chosen.collect::<Vec<_>>(), ["xino=off"]);
}

/// BuildKit merges layers from views, and fails at an option that it does not know.
#[registered(crate::Test)]
fn views_have_only_options_that_builders_know() {
    let (image, writable) = (Disk::ext4(64), Disk::ext4(64));
    let daemon = start_without_defaults(&image, &writable);
    let client = daemon.client();
    filled_layer(&client);
    client.prepare("step", "base", &[]).unwrap();
    client.commit("step", "built", &[]).unwrap();
    let view = client.view("view", "built", &[]).unwrap();
    let known = |option: &&String| {
        ["lowerdir=", "index=off", "redirect_dir="]
            .iter()
            .any(|known| option.starts_with(known))
    };
    let unknown: Vec<_> = view[0].options.iter().filter(|it| !known(it)).collect();
    assert!(unknown.is_empty(), "{unknown:?}");
}

/// Starts a daemon that has to name all options: the overlay module's defaults are hidden
/// from it, as before the module is loaded, and host directories are allowed.
fn start_without_defaults(image: &Disk, writable: &Disk) -> Daemon {
    const HIDE: &str = "mount -t tmpfs none /sys/module/overlay/parameters && exec \"$0\" \"$@\"";
    let starter = ["unshare", "--mount", "sh", "-c", HIDE];
    let flags = ["--allow-lower", "/srv"];
    Daemon::start_by(&starter, &command(image, writable, &flags), &[])
}

#[registered(crate::Test)]
fn options_do_not_depend_on_when_the_module_is_loaded() {
    let (image, writable) = (Disk::ext4(64), Disk::ext4(64));
    let daemon = start_without_defaults(&image, &writable);
    let client = daemon.client();
    filled_layer(&client);
    let mounts = client.prepare("web", "base", &[]).unwrap();
    for option in ["index=off", "metacopy=off", "redirect_dir=off", "xino=auto"] {
        assert!(
            mounts[0].options.iter().any(|it| it == option),
            "{option}: {mounts:?}"
        );
    }
    drop(Mounted::new(&mounts));
}
