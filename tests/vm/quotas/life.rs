//! Projects during the whole life of a snapshot.

use std::fs::{self, File};
use std::thread;

use overlay_read_write_splitting_snapshotter::quota::{ProjectRange, set_project};
use registered::registered;

use super::{OWN_MAX_SIZE, Rig, THEIRS, prepare, project, put_into, upper, usage};
use crate::support::until;

#[registered(crate::quotas::Test)]
fn directories_are_in_one_project(rig: &mut Rig) {
    let mut daemon = rig.start(&[]);
    let client = daemon.client();
    let mounted = prepare(&client, "web", &[]);
    let web = rig.newest();
    let first = rig.ids().first().number();
    client.prepare("other", "base", &[]).unwrap();
    let other = rig.newest();
    for part in ["", "fs", "work", "work/work"] {
        assert_eq!(project(&web.join(part)), first, "{part}");
    }
    assert_eq!(project(&other.join("fs")), first + 1);
    for (name, expected) in [("snapshots", 0), ("trash", 0)] {
        assert_eq!(project(&rig.writable().join(name)), expected);
    }
    // Files of a container, and changes of its image.
    fs::create_dir(mounted.path().join("new")).unwrap();
    assert_eq!(project(&web.join("fs/new")), first);
    drop(mounted);

    daemon.stop();
    daemon.restart();
    let client = daemon.client();
    assert_eq!(project(&web.join("fs")), first);
    client.prepare("third", "base", &[]).unwrap();
    assert_eq!(project(&rig.newest()), first + 2);
    rig.clear(&client);
}

#[registered(crate::quotas::Test)]
fn a_thousand_snapshots_leave_no_project(rig: &mut Rig) {
    // Fewer on XFS, where they are enough to find errors, and take long.
    let of_each = if rig.is_xfs() { 50 } else { 250 };
    // The database is in memory, because this is not about it.
    let state = format!("/tmp/state-{}", rig.number);
    let daemon = rig.start(&["--default-max-size", "1M", "--state-dir", &state]);
    thread::scope(|scope| {
        for number in 0..4 {
            let client = daemon.client();
            scope.spawn(move || {
                for count in 0..of_each {
                    let key = format!("{number}-{count}");
                    client.prepare(&key, "base", &[]).unwrap();
                    client.remove(&key).unwrap();
                    if count % 50 == 0 {
                        client.cleanup().unwrap();
                    }
                }
            });
        }
    });
    assert!(!rig.projects().is_empty());
    let client = daemon.client();
    rig.no_project_is_left(&client);
    assert_eq!(client.names(&[]).unwrap(), ["base"]);
}

/// The project is still used in the trash, so its id is taken.
#[registered(crate::quotas::Test)]
fn a_removed_container_keeps_its_project(rig: &mut Rig) {
    let ids = ProjectRange::new(7, 8).unwrap();
    let daemon = rig.start(&["--quota-ids", &ids.to_string()]);
    let client = daemon.client();
    client.prepare("web", "base", &[]).unwrap();
    let file = File::create(upper(&client, "web").join("open")).unwrap();
    rustix::io::write(&file, &[1; 100_000]).unwrap();
    client.remove("web").unwrap();
    client.cleanup().unwrap();
    let (other, third) = ("other", "third");
    client.prepare(other, "base", &[]).unwrap();
    super::is_refused(
        client.prepare(third, "base", &[]),
        super::RpcStatusCode::RESOURCE_EXHAUSTED,
        &["--quota-ids", &ids.to_string()],
    );
    assert_eq!(client.names(&["kind==active"]).unwrap(), [other]);
    drop(file);
    until("its id is given back", || {
        client.cleanup().unwrap();
        client.prepare(third, "base", &[]).is_ok()
    });
    assert_eq!(usage(&client, third).1, 3, "nothing of the one before");
    rig.clear(&client);
    until("both ids are given back", || {
        client.cleanup().unwrap();
        rig.projects_of(ids).is_empty()
    });
}

/// An administrator has put the whole directory into a project of its own.
#[registered(crate::quotas::Test)]
fn projects_of_others_around_it_do_no_harm(rig: &mut Rig) {
    let mut daemon = rig.start(&[]);
    let client = daemon.client();
    client.prepare("before", "base", &[]).unwrap();
    for name in ["snapshots", "trash"] {
        put_into(&rig.writable().join(name), THEIRS);
    }
    daemon.stop();
    daemon.restart();
    let client = daemon.client();
    client.prepare("after", "base", &[]).unwrap();
    client.remove("before").unwrap();
    client.remove("after").unwrap();
    rig.clear(&client);
    let snapshots = rig.writable().join("snapshots");
    assert_eq!(fs::read_dir(snapshots).unwrap().count(), 0);
}

/// While the daemon runs, for both volumes.
#[registered(crate::quotas::Test)]
fn projects_of_others_since_the_start_do_no_harm(rig: &mut Rig) {
    let mut daemon = rig.start(&["--relocate", "never"]);
    let client = daemon.client();
    client.prepare("web", "base", &[]).unwrap();
    client.prepare("layer-key", "base", &[]).unwrap();
    client.commit("layer-key", "layer", &[]).unwrap();
    let directories = [rig.root(), rig.writable()]
        .map(|volume| ["snapshots", "trash"].map(|name| volume.join(name)))
        .concat();
    for directory in &directories {
        put_into(directory, THEIRS);
    }
    for name in ["web", "layer", "base"] {
        client.remove(name).unwrap();
    }
    client.cleanup().unwrap();
    for directory in &directories {
        assert_eq!(fs::read_dir(directory).unwrap().count(), 0, "{directory:?}");
    }
    // What is charged to them on the image volume still is.
    assert_eq!(project(&rig.root().join("snapshots")), THEIRS);
    daemon.stop();
    daemon.restart();
    rig.clear(&daemon.client());
    put_into(&rig.root().join("snapshots"), 0);
}

#[registered(crate::quotas::Test)]
fn check_finds_what_is_not_as_recorded(rig: &mut Rig) {
    let mut daemon = rig.start(&[]);
    let client = daemon.client();
    client
        .prepare("web", "base", &[(OWN_MAX_SIZE, "8M")])
        .unwrap();
    client.prepare("sound", "base", &[]).unwrap();
    let check = |flags: &[&str]| {
        let output = std::process::Command::new(crate::support::daemon::BINARY)
            .arg("check")
            .args(rig.arguments(&["--json"]))
            .args(flags)
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        (output.status.code().unwrap(), text)
    };
    let (code, text) = check(&[]);
    assert_eq!(code, 0, "{text}");

    let id = client
        .mounts("web")
        .map(|mounts| super::upper_of(&mounts))
        .unwrap();
    let directory = File::open(&rig.writable).unwrap();
    let quotas = super::Quotas::probe(super::AsFd::as_fd(&directory))
        .unwrap()
        .unwrap();
    let (web, sound) = (rig.ids().first(), rig.projects()[1].0);
    quotas
        .set_limits(
            web,
            overlay_read_write_splitting_snapshotter::types::Limits::NONE,
        )
        .unwrap();
    drop(directory);
    let (code, text) = check(&[]);
    assert_eq!(code, 1, "{text}");
    assert!(
        text.contains("limits-differ") && !text.contains("not-charged"),
        "{text}"
    );
    set_project(File::open(&id).unwrap(), sound).unwrap();
    let (code, text) = check(&[]);
    assert_eq!(code, 1, "{text}");
    assert!(text.contains("not-charged"), "{text}");

    daemon.stop();
    let (code, text) = check(&["--repair", "--yes"]);
    assert_eq!(code, 0, "{text}");
    assert_eq!(project(&id), web.number());
    daemon.restart();
    rig.clear(&daemon.client());
}
