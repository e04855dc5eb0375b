//! The writable disk in an earlier state of itself: what was acknowledged since is missing
//! there, and so the disk is refused.

use std::fs;
use std::path::{Path, PathBuf};

use grpcio::RpcStatusCode;
use registered::registered;

use crate::check::{check, is_clean};
use crate::support::daemon::{Split, refused};
use crate::support::disk::Disk;

/// What is on an unmounted disk.
fn saved(disk: &Disk) -> Vec<u8> {
    fs::read(device(disk)).unwrap()
}

fn put_back(disk: &Disk, saved: &[u8]) {
    fs::write(device(disk), saved).unwrap();
}

fn device(disk: &Disk) -> PathBuf {
    Path::new("/dev").join(disk.block_name())
}

/// Prepares a container whose file says "old".
fn prepare(split: &Split) -> PathBuf {
    let mounts = split.client().prepare("web", "", &[]).unwrap();
    let file = Path::new(&mounts[0].source).join("own");
    fs::write(&file, "old").unwrap();
    file
}

/// Changes the file, and commits the container.
fn commit(split: &Split, file: &Path) {
    fs::write(file, "new").unwrap();
    split.client().commit("web", "layer", &[]).unwrap();
}

#[track_caller]
fn is_refused_at_the_start(split: &mut Split) {
    let line = refused(split.daemon.arguments());
    assert!(line.contains("in an older state than"), "{line}");
    let (code, said, _) = check(split, &["--json"]);
    assert_eq!(code, 1);
    assert!(said.contains("\"other-history\""), "{said}");
}

/// The disk is taken out, copied and put back while the daemon runs. No request comes
/// while it is away, and the files of the copy look the same.
#[registered(crate::Test)]
fn a_disk_that_comes_back_in_an_earlier_state_is_noticed() {
    let mut split = Split::start(&["--relocate", "never"]);
    let file = prepare(&split);
    split.writable.unmount();
    let before = saved(&split.writable);
    split.writable.mount();
    commit(&split, &file);
    split.writable.unmount();
    let latest = saved(&split.writable);
    put_back(&split.writable, &before);
    split.writable.mount();
    let (code, text) = split.client().prepare("more", "", &[]).unwrap_err();
    assert_eq!(code, RpcStatusCode::DATA_LOSS, "{text}");
    assert!(text.contains("in an older state than"), "{text}");
    // The latest one is taken again at once.
    split.writable.unmount();
    put_back(&split.writable, &latest);
    split.writable.mount();
    split.client().prepare("more", "", &[]).unwrap();
    assert_eq!(fs::read_to_string(&file).unwrap(), "new");
    split.daemon.stop();
    is_clean(&split);
    put_back_and_mount(&split, &before);
    is_refused_at_the_start(&mut split);
}

fn put_back_and_mount(split: &Split, state: &[u8]) {
    split.writable.unmount();
    put_back(&split.writable, state);
    split.writable.mount();
}

/// A copy from before the latest start, of which no id was used on the disk.
#[registered(crate::Test)]
fn a_disk_from_before_the_latest_start_is_refused() {
    let mut split = Split::start(&["--relocate", "never"]);
    let file = prepare(&split);
    split.daemon.stop();
    split.writable.unmount();
    let before = saved(&split.writable);
    split.writable.mount();
    split.daemon.restart();
    commit(&split, &file);
    split.daemon.stop();
    put_back_and_mount(&split, &before);
    is_refused_at_the_start(&mut split);
}
