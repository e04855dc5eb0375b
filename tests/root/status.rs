//! The command `status`.

use std::fs;
use std::process::Command;

use registered::registered;
use serde_json::Value;

use crate::content::layer;
use crate::support::daemon::{BINARY, Split};
use crate::support::{tree, unchanged};

fn status(split: &Split, flags: &[&str]) -> String {
    let output = Command::new(BINARY)
        .arg("status")
        .args(split.daemon.arguments())
        .args(flags)
        .output()
        .unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0), "{said}");
    said
}

fn told(split: &Split) -> Value {
    serde_json::from_str(&status(split, &["--json"])).unwrap()
}

#[registered(crate::Test)]
fn how_things_stand_is_told() {
    let split = Split::start(&["--relocate", "never"]);
    let client = split.client();
    layer(&client, "base", "", |top| {
        fs::write(top.join("file"), "base").unwrap();
    });
    client.prepare("init", "base", &[]).unwrap();
    client.commit("init", "layer", &[]).unwrap();
    client.view("view", "base", &[]).unwrap();
    for number in 0..12_usize {
        let key = format!("default/{number}/web");
        client.prepare(&key, "layer", &[]).unwrap();
        let upper = split
            .writable()
            .join(format!("snapshots/{}/fs", number + 4));
        fs::write(upper.join("own"), vec![1; number << 16]).unwrap();
    }
    let running = told(&split);
    assert_eq!(running["daemon"], "running");
    let volumes = running["volumes"].as_array().unwrap();
    let roots = [split.root(), split.writable()];
    for (volume, path) in volumes.iter().zip(roots) {
        assert_eq!(volume["path"], path.to_str().unwrap());
        assert_eq!(volume["file_system"], "ext4");
        assert!(volume["device"].as_str().unwrap().starts_with("/dev/loop"));
        assert!(volume["free_bytes"].as_u64().unwrap() > 1 << 20);
        assert_eq!(volume["problem"], Value::Null);
    }
    // The identity in the mark.
    let mark = fs::read_to_string(split.writable().join(".volume")).unwrap();
    let identity = volumes[1]["identity"].as_str().unwrap();
    assert!(
        identity.len() > 16 && mark.contains(identity),
        "{identity}: {mark}"
    );
    let state = fs::read_to_string(split.root().join("state")).unwrap();
    let identity = volumes[0]["identity"].as_str().unwrap();
    assert!(
        identity.len() > 16 && state.contains(identity),
        "{identity}: {state}"
    );
    assert!(running["away_bytes"].as_u64().unwrap() > 0);
    let largest = running["largest"].as_array().unwrap();
    let keys: Vec<_> = largest
        .iter()
        .map(|written| written["key"].as_str().unwrap())
        .collect();
    assert_eq!(keys.len(), 10);
    assert_eq!(keys[..2], ["default/11/web", "default/10/web"]);

    let said = status(&split, &[]);
    for words in [
        "daemon     running, nothing is wrong\n",
        "2 committed, 12 active, 1 views",
        "  708K default  web\n",
        "ext4",
    ] {
        assert!(said.contains(words), "{words}: {said}");
    }
    fits_a_screen(&said);
}

#[registered(crate::Test)]
fn what_is_wrong_comes_first() {
    let mut split = Split::start(&[]);
    split.daemon.stop();
    split.writable.unmount();
    // SQLite creates an empty log and its index for a reader.
    told(&split);
    let before = tree(split.root());
    let stopped = told(&split);
    unchanged(split.root(), &before);
    assert_eq!(stopped["daemon"], "stopped");
    let problem = stopped["volumes"][1]["problem"].as_str().unwrap();
    assert!(problem.contains("mount the disk"), "{problem}");
    let said = status(&split, &[]);
    let wrong: Vec<_> = said
        .lines()
        .filter(|line| line.starts_with("WRONG"))
        .collect();
    let [stopped, missing] = *wrong else {
        panic!("two things are wrong: {said}");
    };
    assert!(said.starts_with("WRONG"), "{said}");
    assert!(stopped.contains("the daemon is stopped"), "{said}");
    assert!(
        missing.contains("the writable volume cannot be used"),
        "{said}"
    );
    fits_a_screen(&said);
    split.writable.mount();

    split.writable.fill();
    let said = status(&split, &[]);
    assert!(said.contains("the writable volume is full"), "{said}");
    let said = status(&split, &["--reserve", "50%", "--default-max-size", "1G"]);
    assert!(
        said.contains("--reserve (") && !said.contains("is full"),
        "{said}"
    );
    split.writable.make_room();
    let said = status(&split, &["--default-max-size", "1G"]);
    // This ext4 has no project quotas.
    assert!(said.contains("their limits cannot be enforced"), "{said}");
}

/// Whether a terminal of 24 lines shows all of it.
fn fits_a_screen(said: &str) {
    let rows = said
        .lines()
        .map(|line| line.chars().count().div_ceil(80).max(1));
    assert!(rows.sum::<usize>() < 24, "{said}");
}
