//! Images to import.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::image::describe;
use crate::support::run;

/// Makes an archive of an image in an empty directory, as `docker save` writes it: so many
/// layers, each with so many files of a few bytes, and busybox in the first.
pub fn archive(directory: &Path, name: &str, layers: usize, files: usize) -> PathBuf {
    let tar = |archive: &str, top: &Path| {
        let archive = directory.join(archive);
        run(Command::new("tar")
            .arg("-cf")
            .arg(&archive)
            .arg("-C")
            .arg(top)
            .arg("."));
        archive
    };
    let mut parts = Vec::new();
    let top = directory.join("layer");
    for layer in 0..layers {
        fs::create_dir_all(top.join(format!("data/{layer}"))).unwrap();
        for file in 0..files {
            let text = format!("{name} {layer} {file}\n");
            fs::write(top.join(format!("data/{layer}/{file}")), text).unwrap();
        }
        if layer == 0 {
            fs::create_dir(top.join("bin")).unwrap();
            let busybox = run(Command::new("sh").args(["-c", "command -v busybox"]));
            fs::copy(busybox.trim(), top.join("bin/busybox")).unwrap();
            symlink("busybox", top.join("bin/sh")).unwrap();
        }
        let archive = format!("image-{layer}.tar");
        let digest = run(Command::new("sha256sum").arg(tar(&archive, &top)));
        let digest = digest.split_whitespace().next().unwrap();
        parts.push((archive, digest.to_owned()));
        fs::remove_dir_all(&top).unwrap();
    }
    describe(directory, name, &parts);
    let archive = directory.with_extension("tar");
    run(Command::new("tar")
        .arg("-cf")
        .arg(&archive)
        .arg("-C")
        .arg(directory)
        .arg("."));
    archive
}
