//! Directories that are emptied, or hidden, under a running daemon.

use std::fs;
use std::path::Path;

use grpcio::RpcStatusCode;
use registered::registered;
use rustix::mount::{UnmountFlags, mount_bind, unmount};

use crate::content::layer;
use crate::support::daemon::{Split, refused};
use crate::support::disk::Disk;
use crate::support::{tree, unchanged};

/// As `rm -rf <directory>/*` does: names that begin with a dot stay.
fn empty(directory: &Path) {
    for entry in fs::read_dir(directory).unwrap() {
        let entry = entry.unwrap();
        if entry.file_name().as_encoded_bytes().starts_with(b".") {
            continue;
        }
        match entry.file_type().unwrap().is_dir() {
            true => fs::remove_dir_all(entry.path()).unwrap(),
            false => fs::remove_file(entry.path()).unwrap(),
        }
    }
}

/// Waits until the daemon ends, as one that its service manager starts again, and returns
/// what it has said.
fn ended(split: &mut Split) -> String {
    let status = split.daemon.wait();
    assert_eq!(status.code(), Some(1), "{}", split.daemon.log());
    let log = split.daemon.log();
    log.lines().last().unwrap().to_owned()
}

fn populate(split: &Split) {
    let client = split.client();
    layer(&client, "base", "", |top| {
        fs::write(top.join("file"), "base").unwrap();
    });
    client.prepare("web", "base", &[]).unwrap();
    fs::write(split.writable().join("snapshots/2/fs/own"), "written").unwrap();
}

#[registered(crate::Test)]
fn a_root_that_is_emptied() {
    let mut split = Split::start(&[]);
    populate(&split);
    let before = tree(split.writable());
    empty(&split.root());
    let line = ended(&mut split);
    assert!(line.contains(split.root().to_str().unwrap()), "{line}");
    assert!(line.contains("was emptied"), "{line}");
    let left: Vec<_> = fs::read_dir(split.root()).unwrap().collect();
    assert!(left.len() <= 1, "the end writes nothing: {left:?}");

    // The containers' volume is of another history, and stays as it is.
    for _ in 0..2 {
        let line = refused(split.daemon.arguments());
        assert!(line.contains("of another root"), "{line}");
        unchanged(split.writable(), &before);
    }
    let status = std::process::Command::new(crate::support::daemon::BINARY)
        .arg("status")
        .args(split.daemon.arguments())
        .output()
        .unwrap();
    let said = String::from_utf8(status.stdout).unwrap();
    assert!(!said.contains("mount the disk that was there"), "{said}");

    // As the refusal says.
    empty(&split.writable());
    fs::remove_file(split.writable().join(".volume")).unwrap();
    split.daemon.restart();
    let client = split.client();
    assert!(client.names(&[]).unwrap().is_empty());
    layer(&client, "base", "", |_| ());
    client.prepare("web", "base", &[]).unwrap();
    crate::check::is_clean(&split);
}

#[registered(crate::Test)]
fn a_root_that_is_hidden_by_another_disk() {
    let mut split = Split::start(&[]);
    populate(&split);
    let before = tree(split.root().join("snapshots"));
    let other = Disk::ext4(64);
    fs::create_dir(other.path().join("root")).unwrap();
    mount_bind(other.path(), split.image.path()).unwrap();
    let hidden = tree(split.image.path());
    let line = ended(&mut split);
    assert!(line.contains("mounted over it"), "{line}");
    unchanged(split.image.path(), &hidden);
    unmount(split.image.path(), UnmountFlags::empty()).unwrap();
    unchanged(split.root().join("snapshots"), &before);
    split.daemon.restart();
    split.client().mounts("web").unwrap();
    crate::check::is_clean(&split);
}

#[registered(crate::Test)]
fn a_state_directory_that_is_emptied() {
    let state = Disk::ext4(64);
    let directory = state.path().join("state");
    let mut split = Split::start(&["--state-dir", directory.to_str().unwrap()]);
    populate(&split);
    let before = [tree(split.root().join("snapshots")), tree(split.writable())];
    empty(&directory);
    let line = ended(&mut split);
    assert!(line.contains("metadata.db is not there"), "{line}");
    let line = refused(split.daemon.arguments());
    assert!(line.contains("is missing, but it was there"), "{line}");
    unchanged(split.root().join("snapshots"), &before[0]);
    unchanged(split.writable(), &before[1]);
}

#[registered(crate::Test)]
fn a_socket_that_is_removed() {
    let mut split = Split::start(&[]);
    populate(&split);
    fs::remove_file(split.daemon.address()).unwrap();
    let line = ended(&mut split);
    assert!(line.contains("grpc.socks"), "{line}");
    split.daemon.restart();
    split.client().mounts("web").unwrap();
    crate::check::is_clean(&split);
}

/// A writable volume without its mark, and one with the mark alone.
#[registered(crate::Test)]
fn a_writable_volume_that_is_emptied() {
    let mut split = Split::start(&["--relocate", "never"]);
    populate(&split);
    empty(&split.writable());
    let refuses = |split: &Split| {
        let client = split.client();
        for refusal in [
            client.prepare("new", "base", &[]).unwrap_err(),
            client.mounts("web").unwrap_err(),
            client.cleanup().unwrap_err(),
        ] {
            let (code, text) = refusal;
            assert_eq!(code, RpcStatusCode::FAILED_PRECONDITION, "{text}");
            assert!(text.contains("was emptied"), "{text}");
        }
        assert!(!split.writable().join("snapshots").exists());
        assert!(!split.writable().join("trash").exists());
    };
    refuses(&split);
    split.daemon.stop();
    split.daemon.restart();
    refuses(&split);
    layer(&split.client(), "upper", "base", |_| ());
    split.daemon.stop();

    let (code, said, complaint) = crate::check::check(&split, &["--reset-writable", "--yes"]);
    assert_eq!(code, 2, "{said}{complaint}");
    fs::remove_file(split.writable().join(".volume")).unwrap();
    let (code, said, complaint) = crate::check::check(&split, &["--reset-writable", "--yes"]);
    assert_eq!(code, 0, "{said}{complaint}");
    split.daemon.restart();
    split.client().prepare("new", "base", &[]).unwrap();
    crate::check::is_clean(&split);
}
