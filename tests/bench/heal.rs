//! How long deep checks and healing take, of an image of many layers.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::containerd::Containerd;
use crate::support::daemon::{BINARY, Daemon, command};
use crate::support::disk::Disk;
use crate::support::run;

const LAYERS: usize = 20;
const LAYER_MIB: usize = 32;

pub fn of_one_layer() {
    let (image, writable) = (Disk::ext4(4096), Disk::ext4(256));
    let daemon = Daemon::start(&command(&image, &writable, &[]));
    let containerd = Containerd::start(daemon.address());
    let dir = tempfile::tempdir().unwrap();
    let archive = make_image(dir.path());
    println!("\nAn image of {LAYERS} layers of {LAYER_MIB} MiB, seconds\n");
    let row = |what: &str, taken: Duration| println!("{what:<58} {:>6.2}", taken.as_secs_f64());
    let begun = Instant::now();
    let import = ["images", "import", "--snapshotter", "rwsplit", &archive];
    containerd.ctr(&import);
    row("import and unpack all", begun.elapsed());
    let check = |flag: &str, expected: &str| {
        let begun = Instant::now();
        let mut check = Command::new(BINARY);
        check.arg("check").args(daemon.arguments());
        check.args([flag, "--json", "--containerd-address"]);
        let output = check.arg(containerd.address()).output().unwrap();
        let taken = begun.elapsed();
        let said = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success() && said.contains(expected), "{said}");
        taken
    };
    let all = format!("\"sound\": {LAYERS}");
    row(
        "check --deep, all unpacked and digests recorded",
        check("--deep", &all),
    );
    row("check --deep again, by the digests", check("--deep", &all));
    let file = image.path().join("root/snapshots/7/fs/file");
    let file = File::options().write(true).open(file).unwrap();
    file.write_all_at(b"?", 1000).unwrap();
    let healed = "other bytes, from 1000 on";
    row("check --heal, one layer damaged", check("--heal", healed));
}

/// An image of layers with random bytes.
fn make_image(dir: &Path) -> String {
    let blobs = dir.join("image/blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    let (mut layers, mut diff_ids) = (Vec::new(), Vec::new());
    for _ in 0..LAYERS {
        let mut random = Command::new("dd");
        random
            .args(["if=/dev/urandom", "of=file", "bs=1M"])
            .current_dir(dir);
        run(random.arg(format!("count={LAYER_MIB}")));
        run(Command::new("tar")
            .args(["cf", "new", "file"])
            .current_dir(dir));
        let layer = add(dir, &blobs, "application/vnd.oci.image.layer.v1.tar");
        diff_ids.push(layer["digest"].clone());
        layers.push(layer);
    }
    let add_json = |value: Value, kind: &str| {
        fs::write(dir.join("new"), value.to_string()).unwrap();
        add(dir, &blobs, kind)
    };
    let config = json!({
        "architecture": std::env::consts::ARCH.replace("x86_64", "amd64").replace("aarch64", "arm64"),
        "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    });
    let config = add_json(config, "application/vnd.oci.image.config.v1+json");
    let kind = "application/vnd.oci.image.manifest.v1+json";
    let manifest = json!({
        "schemaVersion": 2, "mediaType": kind, "config": config, "layers": layers,
    });
    let mut manifest = add_json(manifest, kind);
    manifest["annotations"] = json!({"io.containerd.image.name": "docker.io/library/many:latest"});
    let index = json!({"schemaVersion": 2, "manifests": [manifest]});
    fs::write(dir.join("image/index.json"), index.to_string()).unwrap();
    let layout = json!({"imageLayoutVersion": "1.0.0"});
    fs::write(dir.join("image/oci-layout"), layout.to_string()).unwrap();
    let archive = dir.join("image.tar");
    let archive = archive.to_str().unwrap();
    run(Command::new("tar")
        .args(["cf", archive, "-C"])
        .arg(dir.join("image"))
        .arg("."));
    archive.to_owned()
}

/// Makes the file `new` a blob, and returns its descriptor.
fn add(dir: &Path, blobs: &Path, kind: &str) -> Value {
    let new = dir.join("new");
    let size = fs::metadata(&new).unwrap().len();
    let said = run(Command::new("sha256sum").arg(&new));
    let digest = &said[..64];
    fs::rename(new, blobs.join(digest)).unwrap();
    json!({"mediaType": kind, "digest": format!("sha256:{digest}"), "size": size})
}
