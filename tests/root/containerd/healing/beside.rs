//! Healing while the daemon runs, and through it.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use grpcio::RpcStatusCode;
use overlay_read_write_splitting_snapshotter::proto::healing::HealRequest;
use registered::registered;

use super::damages::{DAMAGES, payload};
use super::{Stage, layer_names};
use crate::support::containerd::AtEnd;
use crate::support::daemon::Split;
use crate::support::mounted::Mounted;
use crate::support::{tree, unchanged, until};

impl Stage {
    /// With a daemon that runs.
    pub fn begin_beside() -> Stage {
        let mut stage = Stage::begin();
        stage.split.daemon.restart();
        stage
    }

    #[track_caller]
    fn heals(&self) -> String {
        let (code, said, complaint) = self.check(&["--heal"]);
        assert_eq!(code, 0, "{said}{complaint}");
        assert!(said.contains("daemon running"), "{said}");
        assert!(said.contains("healed layer"), "{said}");
        said
    }

    #[track_caller]
    pub fn has_sound_layers(&self) {
        let (code, said, complaint) = self.check(&["--deep"]);
        assert_eq!(code, 0, "{said}{complaint}");
        assert!(said.contains("5 of them sound"), "{said}");
    }

    /// The daemon deletes damaged directories once nobody can have them mounted. It looks
    /// every minute.
    fn becomes_tidy(&self) {
        let begun = Instant::now();
        while !self.left_of_checks().is_empty() {
            let left = self.left_of_checks();
            assert!(begun.elapsed() < Duration::from_secs(150), "{left:?}");
            sleep(Duration::from_millis(100));
        }
    }
}

#[registered(crate::Test)]
fn every_kind_of_damage_heals_beside_the_daemon() {
    let mut stage = Stage::begin_beside();
    for (what, number, damage, _) in DAMAGES {
        let top = &stage.layers[number - 1];
        // So that the digests of all layers are recorded.
        stage.has_sound_layers();
        let before = tree(top);
        damage(top);
        let said = stage.heals();
        assert_eq!(said.matches("healed layer").count(), 1, "{what}: {said}");
        unchanged(top, &before);
    }
    stage.becomes_tidy();
    stage.is_sound();
    let trash = stage.split.root().join("trash");
    assert!(fs::read_dir(trash).unwrap().next().is_none());
    stage.split.daemon.stop();
    stage.web_is_whole();
}

/// A layer that the start has missed is no reason for alarm once it has healed.
#[registered(crate::Test)]
fn a_lost_layer_heals_beside_the_daemon() {
    let mut stage = Stage::begin();
    let top = stage.layers[2].clone();
    let before = tree(&top);
    fs::remove_dir_all(top.parent().unwrap()).unwrap();
    stage.split.daemon.restart();
    let client = stage.split.client();
    let web = client.names(&["kind==active"]).unwrap().remove(0);
    let (_, said) = client.mounts(&web).unwrap_err();
    assert!(said.contains("missing"), "{said}");
    stage.heals();
    unchanged(&top, &before);
    client.mounts(&web).unwrap();
    stage.becomes_tidy();
    stage.is_sound();
    stage.split.daemon.stop();
    stage.web_is_whole();
}

/// The damaged directory stays as long as a container has it mounted, and goes then.
#[registered(crate::Test)]
fn a_running_container_goes_on_beside_the_daemon() {
    let mut stage = Stage::begin();
    stage.start_web();
    let top = stage.layers[4].clone();
    fs::write(top.join("etc/motd"), "damaged").unwrap();
    let said = stage.heals();
    assert!(
        said.contains("/web\" is mounted with the damaged files"),
        "{said}"
    );
    // Longer than a mount that was under way may take.
    sleep(Duration::from_secs(12));
    let seen = "cat /etc/motd; cat /own";
    assert_eq!(stage.containerd.exec("web", seen), "damagedown\n");
    fs::write(top.join("etc/motd"), "again").unwrap();
    let (code, said, _) = stage.check(&["--heal"]);
    assert_eq!(code, 1, "{said}");
    assert!(said.contains("still mounted: restart"), "{said}");
    assert_eq!(stage.containerd.exec("web", seen), "damagedown\n");
    stage.containerd.stop("web");
    stage.heals();
    stage.becomes_tidy();
    stage.is_sound();
    stage
        .containerd
        .ctr(&["task", "start", "--detach", "--null-io", "web"]);
    let right = "motd of layer 5\nown\n";
    assert_eq!(stage.containerd.exec("web", seen), right);
    stage.containerd.stop("web");
    stage.split.daemon.stop();
    stage.web_is_whole();
}

/// Whichever of the two is killed, and at which step: the layer is whole or as it was.
#[registered(crate::Test)]
fn a_kill_of_either_leaves_the_old_or_the_new_layer() {
    let mut stage = Stage::begin();
    let top = stage.layers[1].clone();
    let whole = tree(&top);
    let commands = ["unpacked", "handed-over"].map(|step| (step, false));
    let daemons = ["durable", "exchanged", "recorded"].map(|step| (step, true));
    for (step, is_daemon) in commands.into_iter().chain(daemons) {
        payload(&top).write_all_at(b"?", 5).unwrap();
        let damaged = tree(&top);
        let fault = format!("heal-{step}");
        let mut heal = stage.command(&["--heal"]);
        if is_daemon {
            stage.split.daemon.restart_to_die_at(&fault);
        } else {
            stage.split.daemon.restart();
            heal.env("SNAPSHOTTER_FAULT", fault);
        }
        let output = heal.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        if is_daemon {
            assert_eq!(output.status.code(), Some(2), "{step}: {output:?}");
            assert!(said.contains("does not answer"), "{step}: {said}");
            stage.split.daemon.wait();
        } else {
            assert_eq!(output.status.code(), None, "{step}: {output:?}");
            // The daemon goes on, and another command heals.
            stage.heals();
            stage.split.daemon.stop();
        }
        let is_new = !is_daemon || step != "durable";
        unchanged(&top, if is_new { &whole } else { &damaged });
        stage.split.daemon.restart();
        unchanged(&top, if is_new { &whole } else { &damaged });
        stage.is_tidy();
        if !is_new {
            stage.heals();
        }
        unchanged(&top, &whole);
        stage.becomes_tidy();
        stage.is_sound();
        stage.split.daemon.stop();
    }
    stage.web_is_whole();
}

/// Beside healing, what is mounted shows the layer as it was or whole, and never nothing.
#[registered(crate::Test)]
fn views_are_whole_while_a_layer_heals() {
    let stage = Stage::begin_beside();
    let top = stage.layers[4].clone();
    let name = layer_names(&stage).pop().unwrap();
    let is_over = AtomicBool::new(false);
    let look = |number: usize| {
        let (client, key) = (stage.split.client(), format!("look-{number}"));
        let mut looks = 0;
        while !is_over.load(Ordering::Relaxed) {
            let mounted = Mounted::new(&client.view(&key, &name, &[]).unwrap());
            let motd = fs::read_to_string(mounted.path().join("etc/motd")).unwrap();
            assert!(
                ["motd of layer 5\n", "damaged"].contains(&motd.as_str()),
                "{motd}"
            );
            assert!(mounted.path().join("bin/busybox").is_file());
            drop(mounted);
            client.remove(&key).unwrap();
            looks += 1;
        }
        looks
    };
    std::thread::scope(|scope| {
        let lookers: Vec<_> = (0..2)
            .map(|number| scope.spawn(move || look(number)))
            .collect();
        let end = AtEnd(|| is_over.store(true, Ordering::Relaxed));
        let mut healed = 0;
        while healed < 10 {
            fs::write(top.join("etc/motd"), "damaged").unwrap();
            let (code, said, complaint) = stage.check(&["--heal"]);
            // A view may have the directory before this one mounted.
            let is_held = code == 1 && said.contains("still mounted");
            assert!(code == 0 || is_held, "{said}{complaint}");
            healed += usize::from(code == 0);
        }
        drop(end);
        let looks = lookers.into_iter().map(|looker| looker.join().unwrap());
        assert!(looks.sum::<i32>() > 10);
    });
    stage.becomes_tidy();
    stage.is_sound();
}

/// Only a command of the daemon's own version, on the daemon's own root, is served.
#[registered(crate::Test)]
fn what_does_not_fit_is_refused() {
    let stage = Stage::begin_beside();
    payload(&stage.layers[1]).write_all_at(b"?", 5).unwrap();
    let before = tree(stage.split.root().join("snapshots"));
    let refused = |address: &str, words: &str| {
        let (code, said, complaint) = stage.check(&["--heal", "--address", address]);
        assert_eq!(code, 2, "{said}{complaint}");
        assert!(complaint.contains(words), "{complaint}");
        unchanged(stage.split.root().join("snapshots"), &before);
    };
    // A daemon of an earlier version knows the method as little as containerd does.
    refused(&stage.containerd.address(), "is of an earlier version");
    let other = Split::start(&[]);
    refused(other.daemon.address(), "serves another root");
    refused("/none", "does not answer");

    let client = stage.split.client();
    let root = rusqlite::Connection::open(stage.split.root().join("metadata.db")).unwrap();
    let fact = "SELECT value FROM fact WHERE name = 'identity'";
    let root: String = root.query_row(fact, [], |row| row.get(0)).unwrap();
    let request = |layer: &str, id: u64, unpacked: &str| HealRequest {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        root: root.clone(),
        layer: layer.to_owned(),
        id,
        unpacked: unpacked.to_owned(),
        ..HealRequest::default()
    };
    client.heal(&request("", 0, "")).unwrap();
    let mut old = request("", 0, "");
    old.version = "0.0.1".to_owned();
    let (code, said) = client.heal(&old).unwrap_err();
    assert_eq!(code, RpcStatusCode::FAILED_PRECONDITION);
    assert!(said.contains("0.0.1"), "{said}");

    let (name, id) = (layer_names(&stage).remove(1), number_of(&stage.layers[1]));
    for wrong in [
        "..",
        "../trash",
        "1",
        ".unpacked",
        ".unpacked-",
        ".unpacked-1/../1",
    ] {
        let (code, said) = client.heal(&request(&name, id, wrong)).unwrap_err();
        assert_eq!(code, RpcStatusCode::INVALID_ARGUMENT, "{wrong}: {said}");
    }
    unchanged(stage.split.root().join("snapshots"), &before);
    // A layer that was removed meanwhile, or another one of that name: what was unpacked
    // goes.
    for (name, id) in [("gone", id), (&name, id + 1)] {
        let unpacked = stage.split.root().join("snapshots/.unpacked-1-1");
        fs::create_dir_all(unpacked.join("fs/etc")).unwrap();
        client
            .heal(&request(name, id, ".unpacked-1-1"))
            .unwrap_err();
        assert!(!unpacked.exists());
    }
    unchanged(stage.split.root().join("snapshots"), &before);
}

/// What a check has come to is in the daemon's log and figures, also after a restart.
#[registered(crate::Test)]
fn the_result_of_a_deep_check_is_a_figure() {
    let mut stage = Stage::begin();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("metrics");
    let mut arguments = stage.split.daemon.arguments().to_vec();
    let flags = ["--metrics-file", path.to_str().unwrap()];
    arguments.extend(flags.map(ToOwned::to_owned));
    stage.split.daemon.set_arguments(arguments);
    stage.split.daemon.restart();
    let figure = || {
        let text = fs::read_to_string(&path).unwrap_or_default();
        let name = "snapshotter_deep_check_damaged_layers ";
        let value = |line: &str| line.strip_prefix(name).map(ToOwned::to_owned);
        text.lines().find_map(value)
    };
    until("figures", || path.exists());
    assert_eq!(figure(), None);
    payload(&stage.layers[1]).write_all_at(b"?", 5).unwrap();
    assert_eq!(stage.check(&["--deep"]).0, 1);
    let log = stage.split.daemon.log();
    assert!(log.contains("compared 5 layers, 1 of them"), "{log}");
    stage.split.daemon.stop();
    stage.split.daemon.restart();
    until("damaged layer in the figures", || {
        figure().as_deref() == Some("1")
    });
    stage.heals();
    stage.split.daemon.stop();
    stage.split.daemon.restart();
    until("healed layer in the figures", || {
        figure().as_deref() == Some("0")
    });
}

fn number_of(top: &Path) -> u64 {
    let name = top.parent().unwrap().file_name().unwrap();
    name.to_str().unwrap().parse().unwrap()
}
