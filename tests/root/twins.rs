//! Directories on the image volume that have the number of a layer whose bytes are on the
//! writable volume: only the layer itself takes its place, and no files are deleted.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use registered::registered;

use crate::check::{check, is_clean};
use crate::support::daemon::{Split, refused};
use crate::support::run;

/// A stopped daemon with one unmoved layer, and the paths of the layer on the writable and
/// the image volume.
fn with_unmoved_layer() -> (Split, PathBuf, PathBuf) {
    let mut split = Split::start(&["--relocate", "never"]);
    let client = split.client();
    let mounts = client.prepare("web", "", &[]).unwrap();
    let upper = PathBuf::from(&mounts[0].source);
    fs::write(upper.join("own"), "precious").unwrap();
    client.commit("web", "layer", &[]).unwrap();
    split.daemon.stop();
    let directory = upper.parent().unwrap().to_owned();
    let link = split
        .root()
        .join("snapshots")
        .join(directory.file_name().unwrap());
    assert!(link.is_symlink());
    (split, directory, link)
}

/// Puts a directory of another daemon, with more in it, into the place of the link.
fn replace_link(link: &Path) {
    fs::remove_file(link).unwrap();
    fs::create_dir_all(link.join("fs")).unwrap();
    for name in ["x", "y", "z"] {
        fs::write(link.join("fs").join(name), "another's").unwrap();
    }
}

/// Fails unless the layer is as it was committed, and the other directory is set aside.
#[track_caller]
fn is_kept(split: &Split, link: &Path) {
    let client = split.client();
    let mounts = client.view("view", "layer", &[]).unwrap();
    assert_eq!(fs::read_dir(&mounts[0].source).unwrap().count(), 1);
    client.cleanup().unwrap();
    let own = PathBuf::from(&mounts[0].source).join("own");
    assert_eq!(fs::read_to_string(own).unwrap(), "precious");
    let aside = split
        .root()
        .join("left-out")
        .join(link.file_name().unwrap());
    assert_eq!(fs::read_to_string(aside.join("fs/x")).unwrap(), "another's");
}

/// The image disk of a machine that was cloned from this one, and used since.
#[registered(crate::Test)]
fn a_repair_with_another_image_disk_keeps_the_layers_of_this_one() {
    let (mut split, _, link) = with_unmoved_layer();
    replace_link(&link);
    let ids = split.root().join(".ids");
    fs::write(&ids, "1 00000000000000000000000000000000\n").unwrap();
    refused(split.daemon.arguments());
    let (code, said, complaint) = check(&split, &["--repair", "--yes"]);
    assert_eq!(code, 0, "{said}{complaint}");
    split.daemon.restart();
    is_kept(&split, &link);
    split.daemon.stop();
    is_clean(&split);
}

/// Even the link that a move leaves proves nothing on the disk of another machine.
#[registered(crate::Test)]
fn a_move_on_another_image_disk_is_not_recorded() {
    let (mut split, directory, link) = with_unmoved_layer();
    replace_link(&link);
    let name = link.file_name().unwrap().to_str().unwrap();
    let moving = link.with_file_name(format!(".moving-{name}"));
    std::os::unix::fs::symlink(&directory, moving).unwrap();
    let ids = split.root().join(".ids");
    fs::write(&ids, "1 00000000000000000000000000000000\n").unwrap();
    let (code, said, complaint) = check(&split, &["--repair", "--yes"]);
    assert_eq!(code, 0, "{said}{complaint}");
    split.daemon.restart();
    is_kept(&split, &link);
}

#[registered(crate::Test)]
fn a_start_does_not_take_a_number_for_a_move() {
    let (mut split, _, link) = with_unmoved_layer();
    replace_link(&link);
    let (code, said, _) = check(&split, &["--json"]);
    assert_eq!(code, 1);
    assert!(said.contains("\"other-directory\""), "{said}");
    split.daemon.restart();
    is_kept(&split, &link);
    split.daemon.stop();
    is_clean(&split);
}

/// A database from before the move of a layer: the moved layer is all that there is.
#[registered(crate::Test)]
fn a_layer_that_is_only_on_the_image_volume_is_taken_there() {
    let (mut split, directory, link) = with_unmoved_layer();
    fs::remove_file(&link).unwrap();
    run(Command::new("cp").arg("-a").args([&directory, &link]));
    fs::remove_dir_all(&directory).unwrap();
    split.daemon.restart();
    let client = split.client();
    let mounts = client.view("view", "layer", &[]).unwrap();
    let own = PathBuf::from(&mounts[0].source).join("own");
    assert_eq!(fs::read_to_string(own).unwrap(), "precious");
    assert!(link.is_dir() && !link.is_symlink());
    split.daemon.stop();
    is_clean(&split);
}
