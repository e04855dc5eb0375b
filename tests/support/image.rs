//! The descriptions of an image in an archive as `docker save` writes it.

use std::fs;
use std::path::Path;

/// Writes `manifest.json` and `config.json` of an image with these layers into the
/// directory. Each layer is the name of its archive there, and the archive's SHA-256.
pub fn describe(directory: &Path, name: &str, layers: &[(String, String)]) {
    let machine = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let list = |text: fn(&(String, String)) -> String| {
        let texts: Vec<_> = layers.iter().map(text).collect();
        texts.join(",")
    };
    let config = format!(
        r#"{{"architecture":"{machine}","os":"linux","config":{{"Env":["PATH=/bin"]}},
            "rootfs":{{"type":"layers","diff_ids":[{}]}}}}"#,
        list(|(_, digest)| format!("\"sha256:{digest}\""))
    );
    fs::write(directory.join("config.json"), config).unwrap();
    let manifest = format!(
        r#"[{{"Config":"config.json","RepoTags":["{name}:latest"],"Layers":[{}]}}]"#,
        list(|(archive, _)| format!("{archive:?}"))
    );
    fs::write(directory.join("manifest.json"), manifest).unwrap();
}
