//! Host directories in real containers: a dependency cache that each container
//! may change for itself.

use std::fs;
use std::path::Path;

use registered::registered;

use super::layers;
use crate::check::is_clean;
use crate::support::containerd::{Containerd, IMAGE, wait_for};
use crate::support::daemon::Split;
use crate::support::{tree, unchanged};

const LABEL: &str = "containerd.io/snapshot/overlay-custom-add-lower.paths";

/// Makes a cache on the host: modules that the image lacks, and another motd.
fn make_cache(host: &Path) -> String {
    let modules = host.join("cache/opt/app/node_modules");
    fs::create_dir_all(modules.join("left")).unwrap();
    fs::write(modules.join("left/index.js"), "left\n").unwrap();
    fs::write(modules.join("lock"), "locked\n").unwrap();
    fs::create_dir(host.join("cache/etc")).unwrap();
    fs::write(host.join("cache/etc/motd"), "motd of the host\n").unwrap();
    host.join("cache").to_str().unwrap().to_owned()
}

fn links(split: &Split) -> usize {
    fs::read_dir(split.root().join("lowers")).unwrap().count()
}

#[registered(crate::Test)]
fn containers_see_host_directories() {
    let host = tempfile::tempdir().unwrap();
    let cache = make_cache(host.path());
    let split = Split::start(&["--allow-lower", &cache]);
    let containerd = Containerd::start(split.daemon.address());
    containerd.import();
    let before = tree(host.path());

    // The cache is merged over the image, and each container can change its own
    // view.
    let label = format!("{LABEL}={cache}");
    let with = ["--snapshotter-label", label.as_str()];
    let script = "cd /opt/app; cat only.txt node_modules/left/index.js /etc/motd
        echo mine >node_modules/left/index.js; rm node_modules/lock; echo new >node_modules/new
        mkdir node_modules/right; cat node_modules/left/index.js; ls node_modules";
    for id in ["first", "second"] {
        assert_eq!(
            containerd.try_run_with(&with, id, script).unwrap(),
            "the only file here\nleft\nmotd of the host\nmine\nleft\nnew\nright\n",
            "{id}"
        );
        unchanged(host.path(), &before);
    }
    assert_eq!(
        containerd.run("plain", "cat /etc/motd"),
        "motd of layer 5\n"
    );
    containerd.collect_garbage();
    assert_eq!(links(&split), 0);

    // Two containers at the same time, and a change on the host that both see.
    let sleep = "while :; do sleep 0.05; done";
    for id in ["one", "two"] {
        let start = [
            "run",
            "--detach",
            "--null-io",
            "--snapshotter-label",
            &label,
        ];
        containerd.ctr(
            &[
                &start[..],
                &[
                    IMAGE,
                    id,
                    "sh",
                    "-ec",
                    &format!("trap 'exit 0' TERM; {sleep}"),
                ],
            ]
            .concat(),
        );
    }
    let read = "cat /opt/app/node_modules/";
    containerd.exec("one", "echo one >/opt/app/node_modules/lock");
    assert_eq!(containerd.exec("two", &format!("{read}lock")), "locked\n");
    fs::write(format!("{cache}/opt/app/node_modules/later"), "later\n").unwrap();
    for id in ["one", "two"] {
        assert_eq!(containerd.exec(id, &format!("{read}later")), "later\n");
    }
    assert_eq!(links(&split), 2);

    // The diff of the container, which a commit uses, includes the host's files.
    let diff = containerd.ctr_output(&[
        "snapshots",
        "diff",
        "--media-type",
        "application/vnd.oci.image.layer.v1.tar",
        "two",
    ]);
    let tar = String::from_utf8_lossy(&diff.stdout).into_owned();
    assert!(diff.status.success());
    assert!(
        tar.contains("opt/app/node_modules/left/index.js"),
        "as docs/host-directories.md warns"
    );

    // The label is changed for the next start.
    containerd.stop("one");
    let other = format!("{cache}/opt");
    containerd.ctr(&["snapshot", "label", "one", &format!("{LABEL}={other}")]);
    let refused = containerd.try_ctr(&["snapshot", "label", "one", &format!("{LABEL}=/etc")]);
    assert!(refused.unwrap_err().contains("--allow-lower"));
    containerd.ctr(&["task", "start", "--detach", "--null-io", "one"]);
    let script = "cat /opt/app/node_modules/lock /app/node_modules/left/index.js /etc/motd";
    assert_eq!(
        containerd.exec("one", script),
        "one\nleft\nmotd of layer 5\n"
    );
    let said = containerd.try_run_with(
        &["--snapshotter-label", &format!("{LABEL}=/etc")],
        "refused",
        "true",
    );
    let said = said.unwrap_err();
    assert!(
        said.contains("invalid argument") && said.contains("--allow-lower"),
        "{said}"
    );

    for id in ["one", "two"] {
        containerd.stop(id);
        containerd.remove(id);
    }
    containerd.collect_garbage();
    assert_eq!(links(&split), 0);
    is_clean(&split);
}

#[registered(crate::Test)]
fn containers_of_an_image_see_host_directories() {
    let host = tempfile::tempdir().unwrap();
    let cache = make_cache(host.path());
    let rule = format!("docker.io/library/split-test:*={cache}");
    let mut split = Split::start(&["--allow-lower", &cache, "--lower-for", &rule]);
    let containerd = Containerd::start(split.daemon.address());
    containerd.import();
    let script = "cat /etc/motd";
    assert_eq!(containerd.run("unnamed", script), "motd of layer 5\n");
    // CRI gives each layer this label when it pulls.
    let top = layers(&containerd).pop().unwrap();
    let name = format!("containerd.io/snapshot/cri.image-ref={IMAGE}");
    containerd.ctr(&["snapshot", "label", &top, &name]);
    assert_eq!(containerd.run("named", script), "motd of the host\n");
    containerd.start_container("stays", "true");
    split.daemon.kill();
    split.daemon.restart();
    assert_eq!(containerd.exec("stays", script), "motd of the host\n");
    // containerd tries to connect at growing intervals.
    wait_for("answer of the daemon", || {
        containerd.try_ctr(&["snapshot", "info", "stays"])
    });
    containerd.stop("stays");
    containerd.remove("stays");
    containerd.collect_garbage();
    assert_eq!(links(&split), 0);
    is_clean(&split);
}
