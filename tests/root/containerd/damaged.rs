//! A layer that a disk has damaged: found, dropped, and pulled again.

use std::fs::{self, File};

use registered::registered;

use super::{layers, left};
use crate::check::{check, is_clean};
use crate::support::containerd::{Containerd, IMAGE, wait_for};
use crate::support::daemon::Split;

/// Zero-byte files as users have reported them: a layer that a power cut has
/// emptied, which survives `rmi` and another pull as long as the snapshotter
/// has it.
#[registered(crate::Test)]
fn a_damaged_layer_is_pulled_again() {
    let mut split = Split::start(&[]);
    let containerd = Containerd::start(split.daemon.address());
    containerd.import();
    assert_eq!(containerd.run("before", "echo sound"), "sound\n");
    let all = layers(&containerd);

    // busybox itself, in the image's first layer.
    split.daemon.stop();
    let mut emptied = 0;
    for directory in left(&split) {
        let file = directory.join("fs/bin/busybox");
        if file.is_file() {
            File::create(&file).unwrap();
            emptied += 1;
        }
    }
    assert_eq!(emptied, 1);
    let (code, said, complaint) = check(&split, &[]);
    assert_eq!(code, 1, "{said}{complaint}");
    assert!(
        said.contains("is damaged") && said.contains(&all[0]),
        "{said}"
    );
    let (code, said, complaint) = check(&split, &["--repair", "--yes"]);
    assert_eq!(code, 0, "{said}{complaint}");
    for layer in &all {
        assert!(said.contains(layer), "{layer}: {said}");
    }
    assert!(said.contains("pull them again"), "{said}");

    split.daemon.restart();
    // containerd reconnects within a moment.
    wait_for("answer of the daemon", || {
        containerd.try_ctr(&["snapshot", "ls"])
    });
    assert!(containerd.try_run("broken", "echo broken").is_err());
    containerd.ctr(&["images", "rm", "--sync", IMAGE]);
    containerd.import();
    assert_eq!(containerd.run("after", "echo mended"), "mended\n");
    assert_eq!(layers(&containerd), all);
    is_clean(&split);
    assert!(
        fs::read_dir(split.root().join("snapshots"))
            .unwrap()
            .count()
            >= all.len()
    );
}
