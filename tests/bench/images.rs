//! Images to import.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

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
    let (mut diff_ids, mut parts) = (Vec::new(), Vec::new());
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
        let archive = tar(&format!("image-{layer}.tar"), &top);
        let digest = run(Command::new("sha256sum").arg(archive));
        let digest = digest.split_whitespace().next().unwrap();
        diff_ids.push(format!("\"sha256:{digest}\""));
        parts.push(format!("\"image-{layer}.tar\""));
        fs::remove_dir_all(&top).unwrap();
    }
    let machine = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let config = format!(
        r#"{{"architecture":"{machine}","os":"linux","config":{{"Env":["PATH=/bin"]}},
            "rootfs":{{"type":"layers","diff_ids":[{}]}}}}"#,
        diff_ids.join(",")
    );
    fs::write(directory.join("config.json"), config).unwrap();
    let manifest = format!(
        r#"[{{"Config":"config.json","RepoTags":["{name}:latest"],"Layers":[{}]}}]"#,
        parts.join(",")
    );
    fs::write(directory.join("manifest.json"), manifest).unwrap();
    let archive = directory.with_extension("tar");
    run(Command::new("tar")
        .arg("-cf")
        .arg(&archive)
        .arg("-C")
        .arg(directory)
        .arg("."));
    archive
}
