//! Projects of containers that become layers, and of layers that move.

use std::fs;
use std::path::Path;

use registered::registered;

use super::{
    MIB, OWN_MAX_SIZE, Rig, THEIRS, fill, prepare, project, put_into, size_of_disk, upper,
};
use crate::support::until;

/// A layer that is not home is reached by a link.
fn is_directory(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|found| found.is_dir())
}

#[registered(crate::quotas::Test)]
fn a_layer_that_leaves_gives_its_project_back(rig: &mut Rig) {
    let daemon = rig.start(&["--relocate-after", "0", "--default-max-size", "16M"]);
    let client = daemon.client();
    for name in ["one", "two"] {
        let mounted = prepare(&client, "web", &[]);
        fs::create_dir_all(mounted.path().join("a/b")).unwrap();
        fs::write(mounted.path().join("a/b/file"), vec![1; 2 << 20]).unwrap();
        drop(mounted);
        let id = rig.newest();
        client.commit("web", name, &[]).unwrap();
        let home = rig.root().join("snapshots").join(id.file_name().unwrap());
        until("the layer is home", || is_directory(&home));
        for part in ["", "fs", "fs/a", "fs/a/b"] {
            assert_eq!(project(&home.join(part)), 0, "{part}");
        }
        until("its project is given back", || {
            client.cleanup().unwrap();
            rig.projects().is_empty()
        });
    }
    let on = |name: &str| super::Mounted::new(&client.prepare("on", name, &[]).unwrap());
    assert_eq!(size_of_disk(&on("two")), 16 * MIB);
    rig.clear(&client);
}

#[registered(crate::quotas::Test)]
fn a_layer_in_use_keeps_its_project(rig: &mut Rig) {
    let daemon = rig.start(&["--relocate-after", "0"]);
    let client = daemon.client();
    // Like `ctr snapshot commit` of a running container.
    let mounted = prepare(&client, "web", &[(OWN_MAX_SIZE, "8M")]);
    fill(&mounted.path().join("file"), 4 * MIB);
    client.commit("web", "layer", &[]).unwrap();
    let (written, is_full) = fill(&mounted.path().join("more"), 64 * MIB);
    assert!(is_full && written <= 4 * MIB, "{written}");
    client.cleanup().unwrap();
    assert_eq!(rig.projects().len(), 1);
    drop(mounted);
    client.remove("layer").unwrap();
    rig.clear(&client);
}

/// With one file system the move is a rename, and the project moves with the
/// layer.
#[registered(crate::quotas::Test)]
fn a_layer_moves_within_one_file_system(rig: &mut Rig) {
    let root = rig.writable();
    let inner = root.join("writable");
    let places = [("--root-dir", &root), ("--writable-dir", &inner)];
    let mut arguments: Vec<String> = places
        .iter()
        .flat_map(|(flag, path)| [(*flag).to_owned(), path.display().to_string()])
        .collect();
    let ids = rig.ids().to_string();
    let flags = ["--quota-ids", &ids, "--relocate-after", "0"];
    arguments.extend(flags.iter().map(|flag| (*flag).to_owned()));
    let mut daemon = super::Daemon::start(&arguments);
    let client = daemon.client();
    let mounts = client.prepare("web", "", &[(OWN_MAX_SIZE, "8M")]).unwrap();
    let upper = super::upper_of(&mounts);
    fs::write(upper.join("file"), vec![1; 2 << 20]).unwrap();
    client.commit("web", "layer", &[]).unwrap();
    let home = root.join("snapshots/1");
    until("the layer is home", || is_directory(&home));
    assert_eq!(rig.projects().len(), 1);
    client.cleanup().unwrap();
    daemon.stop();
    daemon.restart();
    let client = daemon.client();
    client.cleanup().unwrap();
    // The id is taken as long as the layer is there.
    assert_eq!(rig.projects().len(), 1);
    let upper = super::upper_of(&client.prepare("on", "layer", &[]).unwrap());
    assert_eq!(project(&upper), rig.ids().first().number() + 1);
    client.remove("on").unwrap();
    client.remove("layer").unwrap();
    rig.no_project_is_left(&client);
}

/// The link that it replaces is older than that project.
#[registered(crate::quotas::Test)]
fn a_layer_moves_into_a_project_of_others(rig: &mut Rig) {
    let mut daemon = rig.start(&["--relocate", "never"]);
    let client = daemon.client();
    client.prepare("layer-key", "base", &[]).unwrap();
    fs::write(upper(&client, "layer-key").join("file"), "of the layer").unwrap();
    client.commit("layer-key", "layer", &[]).unwrap();
    daemon.stop();
    let snapshots = rig.root().join("snapshots");
    put_into(&snapshots, THEIRS);
    daemon.set_arguments(rig.arguments(&["--relocate-after", "0"]));
    daemon.restart();
    let home = snapshots.join("2");
    until("the layer is home", || is_directory(&home));
    let file = fs::read_to_string(home.join("fs/file")).unwrap();
    assert_eq!(file, "of the layer");
    assert_eq!(fs::read_dir(&home).unwrap().count(), 1, "nothing but fs");
    for directory in [&snapshots, &home] {
        assert_eq!(project(directory), THEIRS, "{directory:?}");
    }
    let client = daemon.client();
    client.remove("layer").unwrap();
    rig.clear(&client);
}
