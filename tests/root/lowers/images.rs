//! Host directories that the daemon chooses by the image.

use std::fs;

use registered::registered;

use super::LABEL;
use crate::check::is_clean;
use crate::support::client::Client;
use crate::support::daemon::{Split, command};
use crate::support::mounted::Mounted;

const IMAGE_REF: &str = "containerd.io/snapshot/cri.image-ref";

#[registered(crate::Test)]
fn images_get_what_the_daemon_was_told() {
    let host = tempfile::tempdir().unwrap();
    let at = |name: &str| {
        let path = host.path().join(name);
        fs::create_dir_all(&path).unwrap();
        fs::write(path.join("name"), name).unwrap();
        fs::write(path.join(name), "").unwrap();
        path.to_str().unwrap().to_owned()
    };
    let (npm, every, own) = (at("npm"), at("every"), at("own"));
    let allowed = host.path().to_str().unwrap();
    let rules = [
        format!("--lower-for=docker.io/library/node:*={npm}"),
        format!("--lower-for=docker.io/*={every}:{npm}"),
    ];
    let mut split = Split::start(&["--allow-lower", allowed, &rules[0], &rules[1]]);
    let client = split.client();
    // As CRI has layers unpacked: the labels come with Prepare and with Commit.
    let unpack = |name: &str, parent: &str, image: &str| {
        let with = [(IMAGE_REF, image)];
        let key = format!("k8s.io/1/extract-{name}");
        let mounts = client.prepare(&key, parent, &with).unwrap();
        fs::write(Mounted::new(&mounts).path().join("image"), image).unwrap();
        assert!(!format!("{mounts:?}").contains("lowers/"), "{mounts:?}");
        client.commit(&key, name, &with).unwrap();
    };
    unpack("shared", "", "quay.io/other:1");
    unpack("node", "shared", "docker.io/library/node:20");
    unpack("other", "shared", "docker.io/library/other:1");

    let seen = |client: &Client, key: &str| {
        let mounted = Mounted::new(&client.mounts(key).unwrap());
        let has = |name: &str| mounted.path().join(name).exists();
        let first = fs::read_to_string(mounted.path().join("name")).unwrap_or_default();
        (first, has("npm"), has("every"), has("own"))
    };
    let expected = |first: &str, npm, every, own| (first.to_owned(), npm, every, own);
    let label = [(LABEL, own.as_str())];
    for (key, parent, with, result) in [
        ("node", "node", &[][..], expected("npm", true, true, false)),
        // The label may come from a pod.
        (
            "labelled",
            "node",
            &label,
            expected("npm", true, true, false),
        ),
        ("other", "other", &[], expected("every", true, true, false)),
        ("shared", "shared", &[], expected("", false, false, false)),
        ("nothing", "", &[], expected("", false, false, false)),
    ] {
        let key = format!("k8s.io/2/{key}");
        client.prepare(&key, parent, with).unwrap();
        assert_eq!(seen(&client, &key), result, "{key}");
    }
    // Neither a view nor the next layer gets the directories.
    let view = client.view("view", "node", &[]).unwrap();
    assert!(!format!("{view:?}").contains("lowers/"), "{view:?}");
    unpack("upon", "node", "docker.io/library/node:20");

    // A container keeps its choice; new ones get the new choice.
    split.daemon.stop();
    let flags = ["--allow-lower", allowed];
    let arguments = command(&split.image, &split.writable, &flags);
    split.daemon.set_arguments(arguments);
    split.daemon.restart();
    let client = split.client();
    let result = expected("npm", true, true, false);
    assert_eq!(seen(&client, "k8s.io/2/node"), result);
    client.prepare("k8s.io/3/node", "node", &[]).unwrap();
    let result = expected("", false, false, false);
    assert_eq!(seen(&client, "k8s.io/3/node"), result);
    is_clean(&split);
}
