//! Healing that fails when everything is prepared.

use std::fs;

use registered::registered;
use rustix::mount::{UnmountFlags, mount_bind, unmount};

use super::Stage;
use crate::support::containerd::AtEnd;
use crate::support::{tree, unchanged};

/// A directory on which something is mounted cannot change its name.
#[registered(crate::Test)]
fn an_exchange_that_fails_leaves_all_as_it_was() {
    let stage = Stage::begin();
    let top = stage.layers[1].parent().unwrap();
    let before = tree(top);
    let other = tempfile::tempdir().unwrap();
    fs::create_dir(other.path().join("fs")).unwrap();
    mount_bind(other.path(), top).unwrap();
    let mounted = AtEnd(|| unmount(top, UnmountFlags::DETACH).unwrap());
    let (code, said, complaint) = stage.check(&["--heal"]);
    assert_eq!(code, 1, "{said}{complaint}");
    assert!(said.contains("into place"), "{said}{complaint}");
    stage.is_tidy();
    drop(mounted);
    unchanged(top, &before);
    stage.is_sound();
}
