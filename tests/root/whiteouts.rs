//! Whiteouts in an image's first layer: there is nothing beneath that they could hide.

use std::fs;
use std::os::unix::fs::{FileTypeExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use registered::registered;

use crate::support::containerd::Containerd;
use crate::support::daemon::Split;
use crate::support::image::describe;
use crate::support::mounted::Mounted;
use crate::support::run;

/// An archive of an image with one layer, as `docker save` writes it. The layer has
/// busybox and then these entries of `/opt`, in this order, and a whiteout in `/`.
fn archive(directory: &Path, entries: &[&str]) -> PathBuf {
    let layer = directory.join("layer");
    for directory in ["bin", "opt"] {
        fs::create_dir_all(layer.join(directory)).unwrap();
    }
    let busybox = run(Command::new("sh").args(["-c", "command -v busybox"]));
    fs::copy(busybox.trim(), layer.join("bin/busybox")).unwrap();
    symlink("busybox", layer.join("bin/sh")).unwrap();
    fs::write(layer.join(".wh.top"), "").unwrap();
    let mut names = ["bin", "bin/busybox", "bin/sh", ".wh.top", "opt"]
        .map(str::to_owned)
        .to_vec();
    for entry in entries {
        fs::write(layer.join("opt").join(entry), "").unwrap();
        names.push(format!("opt/{entry}"));
    }
    let tar = |archive: &str, top: &Path, names: &[String]| {
        let archive = directory.join(archive);
        let mut command = Command::new("tar");
        run(command
            .arg("--no-recursion")
            .arg("-cf")
            .arg(&archive)
            .arg("-C")
            .arg(top)
            .args(names));
        archive
    };
    let digest = run(Command::new("sha256sum").arg(tar("layer.tar", &layer, &names)));
    let digest = digest.split_whitespace().next().unwrap();
    let layers = [("layer.tar".to_owned(), digest.to_owned())];
    describe(directory, "split-test", &layers);
    let parts = ["manifest.json", "config.json", "layer.tar"].map(str::to_owned);
    tar("image.tar", directory, &parts)
}

#[registered(crate::Test)]
fn whiteouts_of_nothing_leave_nothing() {
    for entries in [
        &[".wh.gone", "keep"][..],
        &["gone", ".wh.gone", "keep"],
        &[".wh..wh..opq", "keep", ".wh.gone"],
    ] {
        let split = Split::start(&[]);
        let containerd = Containerd::start(split.daemon.address());
        let directory = tempfile::tempdir().unwrap();
        let image = archive(directory.path(), entries);
        containerd.ctr(&["image", "import", image.to_str().unwrap()]);

        let seen = containerd.run(
            "web",
            "busybox ls -A /opt; busybox cp -a /opt /copy; busybox ls -A /copy",
        );
        assert_eq!(seen, "keep\nkeep\n", "{entries:?}");
        // Volumes of an image are copied in this way.
        let client = split.client();
        let layers = client.names(&["kind==committed"]).unwrap();
        let view = Mounted::new(&client.view("view", &layers[0], &[]).unwrap());
        for directory in [view.path(), view.path().join("opt")] {
            for entry in fs::read_dir(directory).unwrap() {
                let entry = entry.unwrap();
                assert!(!entry.file_type().unwrap().is_char_device(), "{entry:?}");
            }
        }
    }
}
