//! The figures for Prometheus.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use registered::registered;

use crate::content::layer;
use crate::support::daemon::{Daemon, command, refused};
use crate::support::disk::Disk;
use crate::support::until;

/// Each figure by its name and labels. Fails on a line that is not a figure.
fn read(path: &Path) -> BTreeMap<String, f64> {
    let text = fs::read_to_string(path).unwrap();
    let lines = text.lines().filter(|line| !line.starts_with("# "));
    lines
        .map(|line| {
            let (name, value) = line.rsplit_once(' ').unwrap();
            (name.to_owned(), value.parse().unwrap())
        })
        .collect()
}

#[registered(crate::Test)]
fn figures_follow_what_happens() {
    let (image, writable) = (Disk::ext4(64), Disk::ext4(64));
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("snapshotter.prom");
    let flags = ["--metrics-file", path.to_str().unwrap()];
    let daemon = Daemon::start(&command(&image, &writable, &flags));
    until("written", || path.exists());
    let at_start = read(&path);
    assert_eq!(at_start["snapshotter_degraded"], 0.0);
    assert!(at_start["snapshotter_volume_free_bytes{volume=\"writable\"}"] > 1e7);

    let client = daemon.client();
    layer(&client, "base", "", |top| {
        fs::write(top.join("file"), "base").unwrap();
    });
    client.prepare("init", "base", &[]).unwrap();
    client.commit("init", "layer", &[]).unwrap();
    client.prepare("web", "layer", &[]).unwrap();
    client.view("view", "base", &[]).unwrap();
    client.stat("nothing").unwrap_err();
    until("written again", || {
        read(&path).contains_key("snapshotter_requests_total{method=\"Stat\",code=\"NOT_FOUND\"}")
    });
    let figures = read(&path);
    for (name, value) in [
        (
            "snapshotter_requests_total{method=\"Prepare\",code=\"OK\"}",
            3.0,
        ),
        (
            "snapshotter_requests_total{method=\"Commit\",code=\"OK\"}",
            2.0,
        ),
        ("snapshotter_request_seconds_count{method=\"Prepare\"}", 3.0),
        (
            "snapshotter_snapshots{kind=\"committed\",volume=\"image\"}",
            1.0,
        ),
        (
            "snapshotter_snapshots{kind=\"committed\",volume=\"writable\"}",
            1.0,
        ),
        (
            "snapshotter_snapshots{kind=\"active\",volume=\"writable\"}",
            1.0,
        ),
        ("snapshotter_snapshots{kind=\"view\",volume=\"none\"}", 1.0),
        ("snapshotter_volume_usable{volume=\"writable\"}", 1.0),
    ] {
        assert_eq!(figures[name], value, "{name}");
    }
    assert!(figures["snapshotter_away_bytes"] > 0.0);

    writable.unmount();
    until("degraded", || read(&path)["snapshotter_degraded"] == 1.0);
    assert_eq!(
        read(&path)["snapshotter_volume_usable{volume=\"writable\"}"],
        0.0
    );
    assert_eq!(
        read(&path)["snapshotter_volume_usable{volume=\"image\"}"],
        1.0
    );
    writable.mount();
    until("well again", || read(&path)["snapshotter_degraded"] == 0.0);
    // The collector would read any other name that ends in .prom.
    let names = fs::read_dir(dir.path()).unwrap();
    assert!(names.count() <= 2);
}

#[registered(crate::Test)]
fn an_unusable_file_is_told() {
    let (image, writable) = (Disk::ext4(64), Disk::ext4(64));
    for path in ["/proc/figures.prom", "/nowhere/at/all.prom"] {
        let daemon = Daemon::start(&command(&image, &writable, &["--metrics-file", path]));
        until("told", || daemon.log().contains("--metrics-file"));
        daemon.client().prepare(path, "", &[]).unwrap();
    }
    // A user who may write in its directory cannot make the daemon write to
    // another file.
    let dir = tempfile::tempdir().unwrap();
    let (precious, path) = (dir.path().join("precious"), dir.path().join("figures.prom"));
    fs::write(&precious, "x").unwrap();
    symlink(&precious, dir.path().join("figures.prom.new")).unwrap();
    let flags = ["--metrics-file", path.to_str().unwrap()];
    let daemon = Daemon::start(&command(&image, &writable, &flags));
    until("written", || path.exists());
    assert_eq!(fs::read_to_string(&precious).unwrap(), "x");
    drop(daemon);
    let own = format!("{}/root/snapshots/x.prom", image.text());
    let line = refused(&command(&image, &writable, &["--metrics-file", &own]));
    assert!(line.contains("--metrics-file"), "{line}");
}
