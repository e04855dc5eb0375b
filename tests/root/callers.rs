//! The calls that Docker and nerdctl make around a commit, in their order, with
//! real mounts, before and after the layer has moved.

use std::fs;
use std::path::{Path, PathBuf};

use grpcio::RpcStatusCode;
use registered::registered;

use crate::content::layer;
use crate::support::client::Client;
use crate::support::daemon::{Split, is_empty};
use crate::support::mounted::Mounted;
use crate::support::trees::files;
use crate::support::until;

fn read(top: &Path, name: &str) -> String {
    fs::read_to_string(top.join(name)).unwrap()
}

fn is_home(split: &Split, id: u64) -> bool {
    let path = split.root().join(format!("snapshots/{id}"));
    fs::symlink_metadata(path).is_ok_and(|found| found.is_dir())
}

fn image(client: &Client) {
    layer(client, "sha256:base", "", |top| {
        fs::create_dir(top.join("etc")).unwrap();
        fs::write(top.join("etc/passwd"), "root").unwrap();
        fs::write(top.join("removed"), "x").unwrap();
    });
}

/// Names in `snapshots/` of both volumes that are neither `.` nor `..`.
fn left(split: &Split) -> Vec<PathBuf> {
    [split.root(), split.writable()]
        .iter()
        .flat_map(|volume| fs::read_dir(volume.join("snapshots")).unwrap())
        .map(|entry| entry.unwrap().path())
        .collect()
}

/// moby `daemon/containerd/image_snapshot.go`: an init layer for each container,
/// the container's own snapshot on it, both removed with the container.
#[registered(crate::Test)]
fn the_calls_of_docker() {
    let split = Split::start(&["--relocate-after", "0"]);
    let client = split.client();
    image(&client);
    for number in 0..5 {
        let (init, id) = (
            format!("moby/1/c{number}-init"),
            format!("moby/2/c{number}"),
        );
        let init_key = format!("{init}-key");
        let mounts = client.prepare(&init_key, "sha256:base", &[]).unwrap();
        {
            let mounted = Mounted::new(&mounts);
            fs::create_dir(mounted.path().join("dev")).unwrap();
            fs::write(mounted.path().join("etc/hosts"), "").unwrap();
        }
        client.commit(&init_key, &init, &[]).unwrap();
        client.prepare(&id, &init, &[]).unwrap();
        // Started, stopped and started again, so mounted again each time.
        for round in 0..3 {
            let mounted = Mounted::new(&client.mounts(&id).unwrap());
            assert_eq!(read(&mounted.path(), "etc/passwd"), "root");
            assert_eq!(read(&mounted.path(), "etc/hosts").len(), round);
            fs::write(mounted.path().join("etc/hosts"), "x".repeat(round + 1)).unwrap();
        }
        let (code, _) = client.remove(&init).unwrap_err();
        assert_eq!(code, RpcStatusCode::FAILED_PRECONDITION);
    }
    // As containerd's garbage collector removes them: children first.
    for kind in ["", "-init"] {
        for number in 0..5 {
            let namespace = if kind.is_empty() { 2 } else { 1 };
            client
                .remove(&format!("moby/{namespace}/c{number}{kind}"))
                .unwrap();
        }
    }
    client.remove("sha256:base").unwrap();
    until("all space is given back", || {
        client.cleanup().unwrap();
        left(&split).is_empty()
            && is_empty(split.root().join("trash"))
            && is_empty(split.writable().join("trash"))
    });
}

/// nerdctl `pkg/imgutil/commit`: a view of the container's parent; a comparison
/// of both; the difference is applied to a new snapshot on the parent, which is
/// committed; then a container on it. The first container keeps running.
#[registered(crate::Test)]
fn the_calls_of_nerdctl_commit() {
    let split = Split::start(&["--relocate-after", "1"]);
    let client = split.client();
    image(&client);
    let running = Mounted::new(&client.prepare("default/2/web", "sha256:base", &[]).unwrap());
    fs::write(running.path().join("etc/motd"), "hello").unwrap();
    fs::write(running.path().join("data"), vec![7; 2 << 20]).unwrap();
    fs::remove_file(running.path().join("removed")).unwrap();

    let view = client
        .view("default/3/web-parent-view", "sha256:base", &[])
        .unwrap();
    let before = files(&Mounted::new(&view).path());
    let after = files(&Mounted::new(&client.mounts("default/2/web").unwrap()).path());
    client.remove("default/3/web-parent-view").unwrap();
    let changed: Vec<_> = after
        .iter()
        .filter(|(path, node)| before.get(*path) != Some(node))
        .map(|(path, _)| path.display().to_string())
        .collect();
    assert_eq!(changed, ["data", "etc/motd"]);

    let mounts = client
        .prepare("default/4/commit-123", "sha256:base", &[])
        .unwrap();
    {
        let mounted = Mounted::new(&mounts);
        for path in &changed {
            fs::copy(running.path().join(path), mounted.path().join(path)).unwrap();
        }
        fs::remove_file(mounted.path().join("removed")).unwrap();
    }
    client
        .commit("default/4/commit-123", "sha256:top", &[])
        .unwrap();
    let child = Mounted::new(
        &client
            .prepare("default/5/child", "sha256:top", &[])
            .unwrap(),
    );
    let check = |child: &Path| {
        assert_eq!(read(child, "etc/motd"), "hello");
        assert_eq!(read(child, "etc/passwd"), "root");
        assert_eq!(fs::read(child.join("data")).unwrap(), vec![7; 2 << 20]);
        assert!(!child.join("removed").exists());
    };
    assert!(!is_home(&split, 4));
    check(&child.path());
    until("the layer is home", || is_home(&split, 4));
    check(&child.path());
    let later = Mounted::new(
        &client
            .prepare("default/6/later", "sha256:top", &[])
            .unwrap(),
    );
    check(&later.path());
    assert_eq!(read(&running.path(), "etc/motd"), "hello");
}
