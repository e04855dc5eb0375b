//! The daemon is killed between two steps: nothing that was acknowledged may be
//! lost, no id may be in use twice, and no project may be left.

use std::collections::BTreeSet;
use std::fs;
use std::sync::atomic::{AtomicUsize, Ordering};

use registered::registered;

use super::{MIB, OWN_MAX_SIZE, Rig, prepare, project, size_of_disk, usage};
use crate::support::until;

#[registered(crate::quotas::Test)]
fn cut_off_while_a_project_is_given(rig: &mut Rig) {
    let mut daemon = rig.start(&[]);
    daemon.stop();
    daemon.restart_to_die_at("project-given");
    let limited = [(OWN_MAX_SIZE, "1M")];
    daemon
        .client()
        .prepare("web", "base", &limited)
        .unwrap_err();
    daemon.wait();
    let first = rig.ids().first().number();
    assert_eq!(project(&rig.newest()), first);

    daemon.restart();
    let client = daemon.client();
    assert_eq!(client.names(&["kind==active"]).unwrap().len(), 0);
    // Its directory is in the trash, so its id is taken.
    client.prepare("web", "base", &limited).unwrap();
    assert_eq!(project(&rig.newest()), first + 1);
    rig.projects_are_left(&client, 1);
    let held = rig.projects();
    assert_eq!(held[0].0.number(), first + 1);
    rig.clear(&client);
}

#[registered(crate::quotas::Test)]
fn cut_off_while_limits_change(rig: &mut Rig) {
    let mut daemon = rig.start(&[]);
    let web = prepare(&daemon.client(), "web", &[(OWN_MAX_SIZE, "8M")]);
    daemon.stop();
    daemon.restart_to_die_at("limits-changed");
    let field = format!("labels.{OWN_MAX_SIZE}");
    let client = daemon.client();
    client
        .update("web", &[&field], &[(OWN_MAX_SIZE, "64M")])
        .unwrap_err();
    daemon.wait();
    assert_eq!(size_of_disk(&web), 64 * MIB);
    daemon.restart();
    let client = daemon.client();
    assert_eq!(client.stat("web").unwrap().labels[OWN_MAX_SIZE], "8M");
    assert_eq!(size_of_disk(&web), 8 * MIB);
    drop(web);
    rig.clear(&client);
}

#[registered(crate::quotas::Test)]
fn cut_off_while_projects_are_given_back(rig: &mut Rig) {
    let mut daemon = rig.start(&["--default-max-size", "1M"]);
    let client = daemon.client();
    for key in ["one", "two", "kept"] {
        client.prepare(key, "base", &[]).unwrap();
    }
    daemon.stop();
    daemon.restart_to_die_at("unlimited");
    let client = daemon.client();
    client.remove("one").unwrap();
    client.remove("two").unwrap();
    client.cleanup().unwrap_err();
    daemon.wait();
    daemon.restart();
    let client = daemon.client();
    rig.projects_are_left(&client, 1);
    rig.clear(&client);
}

#[registered(crate::quotas::Test)]
fn killed_at_any_moment(rig: &mut Rig) {
    let mut daemon = rig.start(&["--default-max-size", "2M"]);
    let mut acknowledged = BTreeSet::new();
    let mut removed = BTreeSet::new();
    for round in 0..6_usize {
        let client = daemon.client();
        let requests = AtomicUsize::new(0);
        let (kept, gone) = std::thread::scope(|scope| {
            let worker = scope.spawn(|| {
                let (mut kept, mut gone) = (Vec::new(), Vec::new());
                for count in 0.. {
                    let key = format!("{round}-{count}");
                    if client.prepare(&key, "base", &[]).is_err() {
                        break;
                    }
                    requests.fetch_add(1, Ordering::SeqCst);
                    if count % 3 != 0 {
                        kept.push(key);
                        continue;
                    }
                    // The answer may have come before the kill or not.
                    gone.push(key.clone());
                    if client.remove(&key).is_err() || client.cleanup().is_err() {
                        break;
                    }
                }
                (kept, gone)
            });
            until("some are answered", || {
                requests.load(Ordering::SeqCst) >= 4 + round
            });
            // At another moment of the request each time.
            std::thread::sleep(std::time::Duration::from_millis(7 * round as u64));
            daemon.kill();
            worker.join().unwrap()
        });
        acknowledged.extend(kept);
        removed.extend(gone);
        daemon.restart();
    }
    let client = daemon.client();
    let names: BTreeSet<_> = client
        .names(&["kind==active"])
        .unwrap()
        .into_iter()
        .collect();
    assert!(acknowledged.len() > 10);
    assert!(
        acknowledged
            .iter()
            .filter(|key| !names.contains(*key))
            .count()
            <= 6
    );
    let snapshots = fs::read_dir(rig.writable().join("snapshots")).unwrap();
    let projects: Vec<_> = snapshots
        .map(|entry| project(&entry.unwrap().path()))
        .collect();
    let distinct: BTreeSet<_> = projects.iter().collect();
    assert_eq!(projects.len(), names.len());
    assert_eq!(
        distinct.len(),
        projects.len(),
        "an id is in use twice: {projects:?}"
    );
    for name in &names {
        assert_eq!(usage(&client, name).1, 3, "{name}");
    }
    rig.projects_are_left(&client, names.len());
    rig.clear(&client);
}
