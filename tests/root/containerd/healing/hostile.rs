//! Images of strangers whose content is not what they say it is.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{scope, sleep};
use std::time::Duration;

use registered::registered;
use serde_json::{Value, json};

use super::Stage;
use crate::support::containerd::{Containerd, IMAGE};
use crate::support::run;

/// Begins with a name before that of the real image. A terminal would obey it.
const HOSTILE: &str = "docker.io/aaa/\u{1b}[31mhostile:1";

fn document(containerd: &Containerd, digest: &Value) -> Value {
    let text = fs::read(containerd.blob(digest.as_str().unwrap())).unwrap();
    serde_json::from_slice(&text).unwrap()
}

/// The manifest of the image that was imported.
fn manifest(containerd: &Containerd) -> Value {
    let listed = containerd.ctr(&["images", "ls"]);
    let line = listed.lines().find(|line| line.starts_with(IMAGE)).unwrap();
    let digest = line.split_whitespace().nth(2).unwrap();
    let mut found = document(containerd, &digest.into());
    while let Some(below) = found["manifests"].get(0) {
        found = document(containerd, &below["digest"]);
    }
    found
}

/// Writes a file into the archive's directory under its digest, and describes it.
fn blob(dir: &Path, media_type: &str, content: &[u8]) -> Value {
    let blobs = dir.join("blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    fs::write(blobs.join("new"), content).unwrap();
    let said = run(Command::new("sha256sum").arg(blobs.join("new")));
    let digest = said.split_whitespace().next().unwrap();
    fs::rename(blobs.join("new"), blobs.join(digest)).unwrap();
    json!({
        "mediaType": media_type,
        "digest": format!("sha256:{digest}"),
        "size": content.len(),
    })
}

const KIND: &str = "application/vnd.oci.image";

/// Imports an image that names the layers of the real one, and has for each of them content
/// that does not fit on the disk once it is unpacked.
fn import_hostile(containerd: &Containerd) {
    let real = manifest(containerd);
    let (dir, work) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let dir = dir.path();
    let script = "truncate -s 400M \"$0/zeros\" && tar -C \"$0\" -czf \"$0/bomb\" zeros";
    run(Command::new("sh").args(["-c", script]).arg(work.path()));
    let bomb = fs::read(work.path().join("bomb")).unwrap();
    let bomb = blob(dir, &format!("{KIND}.layer.v1.tar+gzip"), &bomb);
    let config = real["config"]["digest"].as_str().unwrap();
    let config = fs::read(containerd.blob(config)).unwrap();
    let config = blob(dir, &format!("{KIND}.config.v1+json"), &config);
    let layers = vec![bomb; real["layers"].as_array().unwrap().len()];
    import_layers(containerd, dir, &config, &layers);
}

/// Imports an image with this configuration and these layers, which are in the directory.
fn import_layers(containerd: &Containerd, dir: &Path, config: &Value, layers: &[Value]) {
    let media_type = format!("{KIND}.manifest.v1+json");
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": media_type,
        "config": config,
        "layers": layers,
    });
    let mut described = blob(dir, &media_type, manifest.to_string().as_bytes());
    described["annotations"] = json!({ "io.containerd.image.name": HOSTILE });
    let index = json!({ "schemaVersion": 2, "manifests": [described] });
    fs::write(dir.join("index.json"), index.to_string()).unwrap();
    fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    let work = tempfile::tempdir().unwrap();
    let archive = work.path().join("hostile.tar");
    run(Command::new("tar")
        .arg("-cf")
        .arg(&archive)
        .arg("-C")
        .arg(dir)
        .arg("."));
    containerd.ctr(&["images", "import", "--no-unpack", archive.to_str().unwrap()]);
    assert!(containerd.ctr(&["images", "ls"]).contains("hostile:1"));
}

/// The least that was free on the image disk meanwhile.
fn least_free(stage: &Stage, work: impl FnOnce()) -> u64 {
    let is_done = AtomicBool::new(false);
    scope(|scope| {
        let watching = scope.spawn(|| {
            let mut least = u64::MAX;
            while !is_done.load(Ordering::Relaxed) {
                least = least.min(stage.split.image.free());
                sleep(Duration::from_millis(5));
            }
            least
        });
        work();
        is_done.store(true, Ordering::Relaxed);
        watching.join().unwrap()
    })
}

/// The real content was not unpacked here before, so nothing proves which of the two is
/// right, and the wrong one comes first.
#[registered(crate::Test)]
fn the_content_of_a_hostile_image_keeps_no_layer_from_healing() {
    let stage = Stage::begin();
    stage.import_compressed();
    import_hostile(&stage.containerd);
    let motd = stage.layers[4].join("etc/motd");
    let right = fs::read(&motd).unwrap();
    fs::write(&motd, "damaged").unwrap();
    let least = least_free(&stage, || {
        let (code, said, complaint) = stage.check(&["--heal"]);
        assert_eq!(code, 0, "{said}{complaint}");
        assert!(said.contains("healed layer"), "{said}");
        let all = said + &complaint;
        assert!(!all.contains('\u{1b}'), "{all:?}");
    });
    // How much is unpacked until the next look depends on the disk's speed. Without a limit,
    // the content fills the disk.
    assert!(least > 4 << 20, "{least}");
    assert_eq!(fs::read(&motd).unwrap(), right);
    stage.is_sound();
    stage.is_tidy();
}

/// A document of a few megabytes can have a million values, each of which takes a hundred
/// times its length in memory.
#[registered(crate::Test)]
fn the_documents_of_a_hostile_image_need_no_memory() {
    let stage = Stage::begin();
    stage.import_compressed();
    let real = manifest(&stage.containerd);
    let mut config = document(&stage.containerd, &real["config"]["digest"]);
    config["bulk"] = vec![json!({ "": 0 }); 1_000_000].into();
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let config = blob(
        dir,
        &format!("{KIND}.config.v1+json"),
        config.to_string().as_bytes(),
    );
    let layers = real["layers"].as_array().unwrap();
    for layer in layers {
        let content = fs::read(stage.containerd.blob(layer["digest"].as_str().unwrap()));
        blob(dir, "", &content.unwrap());
    }
    import_layers(&stage.containerd, dir, &config, layers);
    let check = stage.command(&["--deep"]);
    let mut limited = Command::new("prlimit");
    limited.args(["--data=400000000", "--"]);
    limited.arg(check.get_program()).args(check.get_args());
    let output = limited.output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{said}{complaint}");
    assert!(said.contains("5 of them sound"), "{said}");
}
