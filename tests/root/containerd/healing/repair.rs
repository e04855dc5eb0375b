//! A repair heals what can heal, and drops only the rest.

use std::fs::{self, File};

use registered::registered;

use super::damages::payload;
use super::{Stage, blobs};
use crate::support::{tree, unchanged};

#[registered(crate::Test)]
fn a_repair_heals_first() {
    let mut stage = Stage::begin();
    let before = tree(&stage.layers[0]);
    File::create(stage.layers[0].join("bin/busybox")).unwrap();
    fs::remove_dir_all(stage.layers[2].parent().unwrap()).unwrap();
    let (code, said, complaint) = stage.check(&["--repair", "--yes"]);
    assert_eq!(code, 0, "{said}{complaint}");
    assert_eq!(said.matches("healed layer").count(), 2, "{said}");
    assert!(!said.contains("dropped"), "{said}");
    unchanged(&stage.layers[0], &before);
    stage.is_sound();
    stage.web_is_whole();
}

#[registered(crate::Test)]
fn a_repair_drops_what_cannot_heal_and_says_why() {
    let stage = Stage::begin();
    let before = tree(&stage.layers[0]);
    File::create(stage.layers[0].join("bin/busybox")).unwrap();
    payload(&stage.layers[1]).set_len(1000).unwrap();
    stage.containerd.ctr(&["content", "rm", &blobs(&stage)[1]]);
    // What it stands on cannot heal.
    File::create(stage.layers[4].join("etc/motd")).unwrap();
    let (code, said, complaint) = stage.check(&["--repair", "--yes"]);
    assert_eq!(code, 0, "{said}{complaint}");
    for words in [
        "healed layer",
        "containerd has not kept the content",
        "content fetch",
        "a layer below this one could not be healed",
        "dropped in containerd's namespace",
        "snapshot \"web\"",
    ] {
        assert!(said.contains(words), "{words}: {said}");
    }
    unchanged(&stage.layers[0], &before);
    for top in &stage.layers[1..] {
        assert!(!top.exists());
    }
}

/// Without containerd a repair is what it always was, and says that nothing has healed.
#[registered(crate::Test)]
fn a_repair_without_containerd_says_so() {
    let stage = Stage::begin();
    File::create(stage.layers[4].join("etc/motd")).unwrap();
    let flags = ["--repair", "--yes", "--containerd-address", "/none"];
    let (code, said, complaint) = crate::check::check(&stage.split, &flags);
    assert_eq!(code, 0, "{said}{complaint}");
    assert!(said.contains("no layer was healed: "), "{said}");
    assert!(said.contains("check that containerd is running"), "{said}");
    assert!(!stage.layers[4].exists());
    assert!(stage.layers[3].exists());
}
