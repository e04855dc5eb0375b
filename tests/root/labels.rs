//! Labels from sources that are not trusted, with the keys and labels that containerd
//! 1.6 and 2.x send: an image's manifest and a pod's annotations choose neither
//! volume nor owner nor host directories, and no later request with them does so.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use grpcio::RpcStatusCode;
use overlay_read_write_splitting_snapshotter::proto::mount::Mount;
use overlay_read_write_splitting_snapshotter::types::{
    LABEL_GID_MAPPING, LABEL_LOWERS, LABEL_MAX_INODES, LABEL_MAX_SIZE, LABEL_OWN_MAX_SIZE,
    LABEL_SNAPSHOT_REF, LABEL_UID_MAPPING, LABEL_VOLUME,
};
use registered::registered;

use crate::check::is_clean;
use crate::content::layer;
use crate::support::daemon::{Split, command};
use crate::support::mounted::Mounted;

const CHAIN: &str = "sha256:3ba6bc2b6ee8";
const SANDBOX: &str = "6c1f2a4b8d0e6c1f2a4b8d0e6c1f2a4b8d0e6c1f2a4b8d0e6c1f2a4b8d0e6c1f";

/// A daemon that may show directories in `cache`, which has another team's
/// directory.
struct Scene {
    split: Split,
    host: tempfile::TempDir,
    /// The other team's directory, and one that does not exist.
    wanted: String,
}

impl Scene {
    fn start(flags: &[&str]) -> Scene {
        let host = tempfile::tempdir().unwrap();
        let cache = host.path().join("cache");
        fs::create_dir_all(cache.join("team-b")).unwrap();
        fs::write(cache.join("team-b/token"), "secret").unwrap();
        let cache = cache.to_str().unwrap();
        let split = Split::start(&[&["--allow-lower", cache], flags].concat());
        layer(&split.client(), "base", "", |_| ());
        Scene {
            wanted: format!("{cache}/team-b:{cache}/made/by-label"),
            split,
            host,
        }
    }

    /// Every label that could choose something.
    fn hostile(&self) -> Vec<(&'static str, &str)> {
        vec![
            (LABEL_VOLUME, "writable"),
            (LABEL_LOWERS, &self.wanted),
            (LABEL_OWN_MAX_SIZE, "1M"),
            (LABEL_MAX_INODES, "16"),
            (LABEL_MAX_SIZE, "0"),
            (LABEL_UID_MAPPING, "0:1000:65536"),
            (LABEL_GID_MAPPING, "0:1000:65536"),
        ]
    }

    /// Fails if a host directory was created or linked to.
    #[track_caller]
    fn is_untouched(&self) {
        assert!(!self.host.path().join("cache/made").exists());
        let links = fs::read_dir(self.split.root().join("lowers"));
        assert_eq!(links.map_or(0, Iterator::count), 0);
    }

    /// Fails unless the log has exactly one line for each of these labels.
    #[track_caller]
    fn names_once(&self, labels: &[(&str, &str)]) {
        let log = self.split.daemon.log();
        for (label, _) in labels {
            let line = format!("the label {label} of snapshot");
            assert_eq!(log.matches(&line).count(), 1, "{label}: {log}");
        }
    }

    fn restart_with(&mut self, flags: &[&str]) {
        self.split.daemon.stop();
        let cache = self.host.path().join("cache");
        let flags = [&["--allow-lower", cache.to_str().unwrap()], flags].concat();
        let arguments = command(&self.split.image, &self.split.writable, &flags);
        self.split.daemon.set_arguments(arguments);
        self.split.daemon.restart();
    }
}

/// The upper directory of these mounts.
fn upper(mounts: &[Mount]) -> PathBuf {
    let mut options = mounts[0].options.iter();
    let upper = options.find_map(|option| option.strip_prefix("upperdir="));
    upper.unwrap_or(&mounts[0].source).into()
}

fn owner(directory: &Path) -> (u32, u32) {
    let meta = directory.metadata().unwrap();
    (meta.uid(), meta.gid())
}

#[track_caller]
fn shows_only_layers(mounts: &[Mount]) {
    let text = format!("{mounts:?}");
    assert!(
        !text.contains("lowers/") && !text.contains("map="),
        "{text}"
    );
}

#[registered(crate::Test)]
fn an_image_chooses_nothing() {
    let scene = Scene::start(&[]);
    let client = scene.split.client();
    let hostile = scene.hostile();
    for (number, namespace) in ["default", "k8s.io", "moby"].iter().enumerate() {
        // containerd 2.3 and later send one label more than 1.6.
        for (version, own) in [
            ("1.6", &[(LABEL_SNAPSHOT_REF, CHAIN)][..]),
            (
                "2.3",
                &[
                    (LABEL_SNAPSHOT_REF, CHAIN),
                    ("containerd.io/snapshot/diff-id", CHAIN),
                ],
            ),
        ] {
            let with = [&hostile, own].concat();
            let key = format!("{namespace}/{number}/extract-123456789-AbC= {version} {CHAIN}");
            let name = format!("{namespace}/{number}/{CHAIN} {version}");
            let mounts = client.prepare(&key, "", &with).unwrap();
            shows_only_layers(&mounts);
            let directory = upper(&mounts);
            assert!(directory.starts_with(scene.split.root().join("snapshots")));
            assert_eq!(client.mounts(&key).unwrap(), mounts);
            fs::write(Mounted::new(&mounts).path().join("file"), "x").unwrap();

            // All of its labels again, because a client may send back what it has from
            // containerd.
            client.update(&key, &[], &with).unwrap();
            assert_eq!(client.mounts(&key).unwrap(), mounts);
            client.commit(&key, &name, &with).unwrap();
            client.update(&name, &[], &with).unwrap();
            let stored = client.stat(&name).unwrap().labels;
            assert_eq!(stored.len(), own.len(), "{stored:?}");
            assert_eq!(owner(&directory), (0, 0));

            let web = format!("{namespace}/{number}/web {version}");
            let mounts = client.prepare(&web, &name, &[]).unwrap();
            shows_only_layers(&mounts);
            assert!(upper(&mounts).starts_with(scene.split.writable()));
            assert_eq!(owner(&upper(&mounts)), (0, 0));
            let view = client.view(&format!("{web} view"), &name, &[]).unwrap();
            shows_only_layers(&view);
        }
    }
    scene.is_untouched();
    scene.names_once(&hostile);
    is_clean(&scene.split);
}

#[registered(crate::Test)]
fn what_an_unpacks_labels_say_is_no_reason_to_refuse_it() {
    let scene = Scene::start(&[]);
    let client = scene.split.client();
    for (number, label) in [
        (LABEL_VOLUME, "ssd"),
        (LABEL_LOWERS, "/a,b"),
        (LABEL_OWN_MAX_SIZE, "ten"),
        (LABEL_MAX_INODES, "1"),
        (LABEL_MAX_SIZE, "10G"),
        (LABEL_UID_MAPPING, "nonsense"),
    ]
    .into_iter()
    .enumerate()
    {
        let with = [(LABEL_SNAPSHOT_REF, CHAIN), label];
        let key = format!("default/{number}/extract-1-AbC= {CHAIN}");
        client.prepare(&key, "base", &with).unwrap();
        let name = format!("default/{number}/{CHAIN}");
        client.commit(&key, &name, &with).unwrap();
        let mask = format!("labels.{}", label.0);
        let (code, said) = client.update(&name, &[&mask], &with).unwrap_err();
        assert_eq!(code, RpcStatusCode::FAILED_PRECONDITION, "{said}");
        assert!(said.contains(label.0), "{said}");
        assert_eq!(client.stat(&name).unwrap().labels.len(), 1);
    }
}

#[registered(crate::Test)]
fn a_pod_chooses_nothing() {
    let scene = Scene::start(&[]);
    let client = scene.split.client();
    let ours = scene.hostile()[1..4].to_vec();
    let ours = [
        &[(LABEL_VOLUME, "image"), (LABEL_SNAPSHOT_REF, CHAIN)],
        &ours[..],
    ]
    .concat();
    for number in 0..20 {
        let key = format!("k8s.io/{number}/{SANDBOX}");
        let mounts = client.prepare(&key, "base", &ours).unwrap();
        shows_only_layers(&mounts);
        assert!(upper(&mounts).starts_with(scene.split.writable()));
        client.update(&key, &[], &ours).unwrap();
        assert_eq!(client.mounts(&key).unwrap(), mounts);
        assert!(client.stat(&key).unwrap().labels.is_empty());
        for (label, _) in &ours {
            let mask = format!("labels.{label}");
            let (code, said) = client.update(&key, &[&mask], &ours).unwrap_err();
            assert_eq!(code, RpcStatusCode::FAILED_PRECONDITION, "{said}");
            assert!(said.contains(label) && said.contains("k8s.io"), "{said}");
        }
        let view = format!("k8s.io/{number}/view");
        shows_only_layers(&client.view(&view, "base", &ours).unwrap());
        // An unpack is recognised by its key.
        let unpack = format!("k8s.io/{number}/extract-1-AbC= {CHAIN}");
        let mounts = client.prepare(&unpack, "", &ours).unwrap();
        assert!(upper(&mounts).starts_with(scene.split.root().join("snapshots")));
        shows_only_layers(&mounts);
    }
    // containerd's size is a hint: without a default, and also if no limit can be
    // enforced.
    for size in ["0", "1", "1048576", "-1", "10G", "99999999999999999999"] {
        let key = format!("k8s.io/21/size {size}");
        client
            .prepare(&key, "base", &[(LABEL_MAX_SIZE, size)])
            .unwrap();
    }
    scene.is_untouched();
    // The reference counts for an unpack. The other labels have a line for each of both.
    scene.names_once(&[(LABEL_SNAPSHOT_REF, "")]);
    let log = scene.split.daemon.log();
    assert_eq!(log.matches("logged once for all").count(), 9, "{log}");
    is_clean(&scene.split);
}

#[registered(crate::Test)]
fn pods_with_user_namespaces_have_their_ids_mapped() {
    let scene = Scene::start(&[]);
    let client = scene.split.client();
    let ids = [
        (LABEL_UID_MAPPING, "0:100000:65536"),
        (LABEL_GID_MAPPING, "0:200000:65536"),
    ];
    let key = format!("k8s.io/7/{SANDBOX}");
    let mounts = client.prepare(&key, "base", &ids).unwrap();
    assert_eq!(mounts[0].options[0], "uidmap=0:100000:65536");
    assert_eq!(owner(&upper(&mounts)), (100_000, 200_000));
    assert_eq!(client.mounts(&key).unwrap(), mounts);
}

#[registered(crate::Test)]
fn labels_of_pods_can_be_trusted_and_are_not_afterwards() {
    let mut scene = Scene::start(&["--trust-labels-from", "k8s.io"]);
    let client = scene.split.client();
    let wanted = scene.wanted.clone();
    let key = format!("k8s.io/7/{SANDBOX}");
    // No pod's label creates a directory on the host, whatever the request.
    let made = scene.host.path().join("cache/made");
    let mask = format!("labels.{LABEL_LOWERS}");
    let named = [(LABEL_LOWERS, wanted.as_str())];
    client.prepare("k8s.io/9/later", "base", &[]).unwrap();
    for refused in [
        client.prepare(&key, "base", &named).map(drop),
        client.view(&key, "base", &named).map(drop),
        client.update("k8s.io/9/later", &[&mask], &named).map(drop),
    ] {
        let (code, said) = refused.unwrap_err();
        assert_eq!(code, RpcStatusCode::FAILED_PRECONDITION, "{said}");
        assert!(said.contains("create it first"), "{said}");
        assert!(!made.exists());
    }
    fs::create_dir_all(made.join("by-label")).unwrap();
    client.update("k8s.io/9/later", &[&mask], &named).unwrap();
    fs::remove_dir_all(&made).unwrap();
    client.mounts("k8s.io/9/later").unwrap_err();
    assert!(!made.exists());
    fs::create_dir_all(made.join("by-label")).unwrap();
    let with = [(LABEL_LOWERS, wanted.as_str()), (LABEL_VOLUME, "image")];
    let mounts = client.prepare(&key, "base", &with).unwrap();
    assert!(upper(&mounts).starts_with(scene.split.root().join("snapshots")));
    let mounted = Mounted::new(&mounts);
    assert_eq!(fs::read(mounted.path().join("token")).unwrap(), b"secret");
    drop(mounted);
    // Trusted or not, the reference makes no unpack in this namespace.
    let reference = [(LABEL_SNAPSHOT_REF, CHAIN)];
    let mounts = client
        .prepare("k8s.io/8/other", "base", &reference)
        .unwrap();
    assert!(upper(&mounts).starts_with(scene.split.writable()));
    let update = |scene: &Scene| {
        let client = scene.split.client();
        client.update("k8s.io/8/other", &[&mask], &[(LABEL_LOWERS, &wanted)])
    };
    update(&scene).unwrap();

    // Labels that were stored while they were trusted have no effect without
    // the flag.
    scene.restart_with(&[]);
    let client = scene.split.client();
    for key in [&key, "k8s.io/8/other"] {
        shows_only_layers(&client.mounts(key).unwrap());
    }
    let (code, said) = update(&scene).unwrap_err();
    assert_eq!(code, RpcStatusCode::FAILED_PRECONDITION, "{said}");
    assert!(said.contains("--trust-labels-from"), "{said}");
    client.update("k8s.io/8/other", &[&mask], &[]).unwrap();
    let left = client.stat("k8s.io/8/other").unwrap().labels;
    assert!(!left.contains_key(LABEL_LOWERS), "{left:?}");
}
