//! Many simultaneous clients with few keys, while layers move: whatever the
//! answers are, rows and directories agree in the end.

use std::fs;
use std::process::{Command, Stdio};
use std::thread;

use grpcio::RpcStatusCode;
use registered::registered;

use crate::content::layer;
use crate::rescue::Target;
use crate::support::client::{Client, Refusal};
use crate::support::daemon::{BINARY, Split, is_empty};
use crate::support::mounted::Mounted;
use crate::support::random::Random;
use crate::support::until;

fn is_expected(refusal: &Refusal) -> bool {
    matches!(
        refusal.0,
        RpcStatusCode::NOT_FOUND
            | RpcStatusCode::ALREADY_EXISTS
            | RpcStatusCode::FAILED_PRECONDITION
            | RpcStatusCode::INVALID_ARGUMENT
    )
}

fn random_call(client: &Client, random: &mut Random) -> Result<(), Refusal> {
    let unpack = if random.below(2) == 0 { "extract-" } else { "" };
    let key = format!("{unpack}key-{}", random.below(4));
    let layer = format!("layer-{}", random.below(6));
    let parent = match random.below(3) {
        0 => String::new(),
        _ => format!("layer-{}", random.below(6)),
    };
    match random.below(12) {
        10 => client.usage(&key).map(drop),
        11 => client.mounts(&key).map(drop),
        0..=2 => client.prepare(&key, &parent, &[]).map(drop),
        3..=5 => client.commit(&key, &layer, &[]),
        6 => client.remove(&key),
        7 => client.remove(&layer),
        8 => client.view("view", &layer, &[]).map(drop),
        _ => {
            let _ = client.remove("view");
            client.cleanup()
        }
    }
}

#[registered(crate::Test)]
fn clients_on_the_same_keys() {
    let split = Split::start(&["--relocate-after", "0", "--sync", "none"]);
    thread::scope(|scope| {
        for seed in 1..=6 {
            let client = split.client();
            scope.spawn(move || {
                // The choices are the same in each run, but the races differ.
                let mut random = Random::new(seed);
                let mut done = 0;
                for _ in 0..250 {
                    match random_call(&client, &mut random) {
                        Ok(()) => done += 1,
                        Err(refusal) => assert!(is_expected(&refusal), "{refusal:?}"),
                    }
                }
                assert!(done > 20, "{done} calls were answered well");
            });
        }
    });

    let client = split.client();
    let layers = client.names(&["kind==committed"]).unwrap();
    for layer in &layers {
        let view = client.view("check", layer, &[]).unwrap();
        fs::read_dir(Mounted::new(&view).path()).unwrap();
        client.remove("check").unwrap();
    }
    let active = client.names(&["kind==active"]).unwrap();
    for key in &active {
        let mounted = Mounted::new(&client.mounts(key).unwrap());
        fs::write(mounted.path().join("file"), "x").unwrap();
    }
    split.remove_everything();
    let log = split.daemon.log();
    assert!(!log.contains("ERROR"), "{log}");
}

#[registered(crate::Test)]
fn two_commits_of_one_key() {
    let split = Split::start(&["--relocate-after", "0", "--sync", "none"]);
    let clients = [split.client(), split.client()];
    for round in 1..=60_u64 {
        let mounts = clients[0].prepare("key", "", &[]).unwrap();
        let content = format!("round {round}");
        fs::write(format!("{}/file", mounts[0].source), &content).unwrap();
        let won = thread::scope(|scope| {
            let commits = clients.each_ref().map(|client| {
                // A name of its own, or the same name again, like a retry.
                let name = format!("layer-{round}");
                scope.spawn(move || client.commit("key", &name, &[]))
            });
            commits.map(|commit| commit.join().unwrap())
        });
        let winners = won.iter().filter(|result| result.is_ok()).count();
        assert_eq!(winners, 1, "{won:?}");
        let path = split.root().join(format!("snapshots/{round}/fs/file"));
        assert_eq!(fs::read_to_string(path).unwrap(), content);
    }
    until("all are home", || {
        is_empty(split.writable().join("snapshots"))
    });
    for round in 1..=60_u64 {
        let path = split.root().join(format!("snapshots/{round}/fs/file"));
        assert_eq!(fs::read_to_string(path).unwrap(), format!("round {round}"));
    }
}

#[registered(crate::Test)]
fn a_mount_by_hand_meets_the_start_of_a_container() {
    let split = Split::start(&[]);
    let client = split.client();
    layer(&client, "base", "", |_| ());
    // containerd has the mounts, and is about to mount.
    let mounts = client.prepare("web", "base", &[]).unwrap();
    let target = Target::new();
    let is_mounted = || {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        mounts.contains(&format!(" {} ", target.path().display()))
    };
    let by_hand = Command::new(BINARY)
        .args(["mount", "web"])
        .arg(target.path())
        .args(split.daemon.arguments())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    until("it is mounted by hand", is_mounted);
    let container = Mounted::new(&mounts);
    let output = by_hand.wait_with_output().unwrap();
    let complaint = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{complaint}");
    let point = container.path().display().to_string();
    assert!(complaint.contains(&point), "{complaint}");
    assert!(!is_mounted());
    fs::write(container.path().join("file"), "x").unwrap();
}
