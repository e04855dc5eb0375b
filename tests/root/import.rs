//! The command `import`: each of the Go original's snapshots is served, or
//! named in the report.

mod crashes;
mod original;
mod refusals;
mod undo;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;

use registered::registered;
use serde_json::{Value, json};

use crate::check::is_clean;
use crate::support::client::Client;
use crate::support::daemon::refused;
use crate::support::mounted::Mounted;
use crate::support::until;
use original::Original;

/// Three layers, two containers, a view, an interrupted unpack, and ids that
/// are not in use any more.
fn sample() -> Original {
    let mut original = Original::new();
    original.layer("default/1/base", "", "base");
    original.layer("default/2/middle", "default/1/base", "middle");
    original.removed();
    original.layer("default/3/upper", "default/2/middle", "upper");
    original.container("default/4/web", "default/3/upper", "written by web");
    original.container("default/5/db", "default/1/base", "written by db");
    original.view("default/6/look", "default/2/middle");
    original.removed();
    original
}

/// The daemon's list, in the form of the Go program.
fn listing(client: &Client) -> BTreeMap<String, Value> {
    let pages = client.list_pages(&[]).unwrap();
    let infos = pages.into_iter().flatten();
    let told = infos.map(|info| {
        let nanos = |time: &protobuf::well_known_types::timestamp::Timestamp| {
            time.seconds * 1_000_000_000 + i64::from(time.nanos)
        };
        let usage = client.usage(&info.name).unwrap();
        let kind = format!("{:?}", info.kind.unwrap());
        let mut value = json!({
            "parent": info.parent,
            "kind": kind.to_lowercase(),
            "created": nanos(&info.created_at),
            "updated": nanos(&info.updated_at),
            "labels": info.labels,
        });
        if kind.to_lowercase() == "committed" {
            value["usage"] = json!([usage.size, usage.inodes]);
        }
        (info.name, value)
    });
    told.collect()
}

/// The list of the Go program, in the same form.
fn theirs(listed: &Value) -> BTreeMap<String, Value> {
    let snapshots = listed["snapshots"].as_array().unwrap().iter();
    let told = snapshots.map(|snapshot| {
        let kind = snapshot["kind"].as_str().unwrap().to_lowercase();
        let labels = match &snapshot["labels"] {
            Value::Null => json!({}),
            labels => labels.clone(),
        };
        let mut value = json!({
            "parent": snapshot["parent"],
            "kind": kind,
            "created": snapshot["created"],
            "updated": snapshot["updated"],
            "labels": labels,
        });
        if kind == "committed" {
            value["usage"] = json!([snapshot["size"], snapshot["inodes"]]);
        }
        (snapshot["name"].as_str().unwrap().to_owned(), value)
    });
    told.collect()
}

#[track_caller]
fn reads(client: &Client, key: &str, file: &str, content: &str) {
    let mounted = Mounted::new(&client.mounts(key).unwrap());
    let found = fs::read_to_string(mounted.path().join(file)).unwrap();
    assert_eq!(found, content, "{key}: {file}");
}

#[track_caller]
fn sample_works(client: &Client) {
    reads(client, "default/4/web", "own", "written by web");
    reads(client, "default/4/web", "top", "upper");
    reads(client, "default/4/web", "base", "base");
    reads(client, "default/5/db", "own", "written by db");
    reads(client, "default/5/db", "top", "base");
    reads(client, "default/6/look", "top", "middle");
}

#[registered(crate::Test)]
fn everything_is_served() {
    let mut original = sample();
    let listed = original.finish();
    let line = refused(&original.arguments());
    assert!(line.contains("`import`"), "{line}");
    let said = original.import_all();
    for words in [
        "imported 6 snapshots: 3 layers, 2 active, 1 views",
        "metadata.db.bbolt",
    ] {
        assert!(said.contains(words), "{said}");
    }
    assert!(!original.root().join("import").exists());
    let mut split = original.serve();
    is_clean(&split);
    let client = split.client();
    assert_eq!(listing(&client), theirs(&listed));
    sample_works(&client);
    // No id is given out again.
    client
        .prepare("default/7/new", "default/3/upper", &[])
        .unwrap();
    let last = listed["sequence"].as_u64().unwrap();
    let made = split.writable().join(format!("snapshots/{}", last + 1));
    assert!(made.is_dir(), "{}", made.display());
    client
        .commit("default/7/new", "default/8/made", &[])
        .unwrap();
    client.view("default/9/see", "default/8/made", &[]).unwrap();
    is_clean(&split);
    split.daemon.stop();
    split.daemon.restart();
    sample_works(&split.client());
    split.remove_everything();
    is_clean(&split);
}

#[registered(crate::Test)]
fn a_look_changes_nothing() {
    let mut original = sample();
    original.broken("default/7/broken", "default/1/base", "broken");
    original.layer("default/8/gone", "", "gone");
    fs::remove_dir_all(original.last_on_image().parent().unwrap()).unwrap();
    original.layer("default/9/upon", "default/8/gone", "upon");
    original.container("default/10/stuck", "default/9/upon", "stuck");
    original.finish();
    let before = original.trees();
    original.is_refused(
        &["--dry-run"],
        &["\"default/8/gone\"", "--leave-out-missing"],
    );
    let (code, said, complaint) = original.import(&["--dry-run", "--leave-out-missing"]);
    assert_eq!(code, 1, "{said}{complaint}");
    for words in [
        "would import 7",
        "would move",
        "would leave out 3:",
        "to be done afterwards in",
        &format!(
            "\"default/10/stuck\": would be in {}/left-out/12/fs",
            original.writable().display()
        ),
        "all these would be kept in",
        "default/7/broken",
        "default/8/gone",
        "nothing was changed",
    ] {
        assert!(said.contains(words), "{words}: {said}");
    }
    original.is_as(&before);
    assert!(!original.root().join("lock").exists());
    let (code, said, _) = original.import(&["--dry-run", "--json", "--leave-out-missing"]);
    assert_eq!(code, 1);
    let told: Value = serde_json::from_str(&said).unwrap();
    assert_eq!(told["dry_run"], true);
    assert_eq!(told["away"], json!(["default/7/broken"]));
    assert_eq!(told["left_out"][0]["code"], "missing");
    original.is_as(&before);
}

#[registered(crate::Test)]
fn broken_commits_become_layers() {
    let mut original = sample();
    original.broken("default/7/built", "default/3/upper", "built");
    original.broken("default/8/built-more", "default/7/built", "more");
    // The user has made links as a workaround.
    let own_links = [
        ("9", original.writable().join("snapshots/9")),
        ("10", "../../nowhere".into()),
        ("3", "1".into()),
    ];
    for (name, target) in &own_links {
        symlink(target, original.root().join("snapshots").join(name)).unwrap();
    }
    original.container("default/9/run", "default/8/built-more", "run");
    let listed = original.finish();
    let before = original.trees();
    let said = original.import_all();
    assert!(said.contains("default/7/built"), "{said}");
    for (name, target) in &own_links {
        let kept = fs::read_link(original.root().join("left-out").join(name)).unwrap();
        assert_eq!(kept, *target, "{name}");
    }
    original.undo();
    original.is_as(&before);
    original.import_all();
    original.flags = vec!["--relocate".to_owned(), "never".to_owned()];
    let mut split = original.serve();
    is_clean(&split);
    let client = split.client();
    assert_eq!(listing(&client), theirs(&listed));
    reads(&client, "default/9/run", "own", "run");
    client
        .prepare("default/10/on-it", "default/7/built", &[])
        .unwrap();
    reads(&client, "default/10/on-it", "own", "built");
    reads(&client, "default/10/on-it", "top", "upper");
    split.daemon.stop();

    // After their move, they are like all other layers.
    let flags = ["--relocate-after", "0"];
    let arguments = crate::support::daemon::command(&split.image, &split.writable, &flags);
    split.daemon.set_arguments(arguments);
    split.daemon.restart();
    let client = split.client();
    for key in ["default/9/run", "default/10/on-it"] {
        client.remove(key).unwrap();
    }
    let layer = split.root().join("snapshots/9");
    until("the layer is home", || !layer.is_symlink());
    client
        .prepare("default/11/again", "default/8/built-more", &[])
        .unwrap();
    reads(&client, "default/11/again", "own", "more");
    is_clean(&split);
}

/// The place with the whole layer is used, on whichever volume it is.
#[registered(crate::Test)]
fn a_layer_on_both_volumes() {
    let mut original = sample();
    original.broken("default/7/built", "default/1/base", "built");
    let half = original.root().join("snapshots/9");
    original.layer("default/8/pulled", "default/1/base", "pulled");
    let other_half = original.writable().join("snapshots/10");
    original.finish();
    for half in [&half, &other_half] {
        fs::create_dir_all(half.join("fs")).unwrap();
        fs::write(half.join("half"), "half").unwrap();
    }
    let before = original.trees();
    original.import_all();
    original.undo();
    original.is_as(&before);
    original.import_all();
    for half in [&half, &other_half] {
        let volume = half.parent().unwrap().with_file_name("left-out");
        let kept = volume.join(half.file_name().unwrap()).join("half");
        assert_eq!(fs::read_to_string(kept).unwrap(), "half");
    }
    let split = original.serve();
    let client = split.client();
    for (key, parent, file, content) in [
        ("default/9/a", "default/7/built", "own", "built"),
        ("default/10/b", "default/8/pulled", "top", "pulled"),
    ] {
        client.prepare(key, parent, &[]).unwrap();
        reads(&client, key, file, content);
    }
    is_clean(&split);
}

#[registered(crate::Test)]
fn what_is_missing_is_left_out() {
    let mut original = sample();
    let mut ids = BTreeMap::new();
    original.layer("default/7/lost", "default/1/base", "lost");
    fs::remove_dir_all(original.last_on_image().parent().unwrap()).unwrap();
    original.layer("default/8/upon", "default/7/lost", "upon");
    ids.insert("image", original.last_on_image());
    original.container("default/9/stuck", "default/8/upon", "precious");
    ids.insert("writable", original.last_on_writable());
    original.layer("default/10/short", "", "short");
    fs::remove_file(original.last_on_image().join("top")).unwrap();
    original.container("default/11/bare", "default/1/base", "bare");
    fs::remove_dir_all(original.last_on_writable().parent().unwrap()).unwrap();
    original.layer("default/12/grown", "", "grown");
    fs::write(original.last_on_image().join("more"), "more").unwrap();
    original.layer("default/13/emptied", "", &"full".repeat(10_000));
    fs::write(original.last_on_image().join("top"), "").unwrap();
    fs::write(original.last_on_image().join("emptied"), "").unwrap();
    let listed = original.finish();
    fs::create_dir_all(original.root().join("snapshots/new-123/fs")).unwrap();
    let strays = [
        // An id that is not in use any more, and one that was never entered.
        original.writable().join("snapshots/3"),
        original.root().join("snapshots/16"),
        // The layer itself is on the other volume.
        original.writable().join("snapshots/1"),
    ];
    for stray in &strays {
        fs::create_dir_all(stray.join("fs")).unwrap();
        fs::write(stray.join("fs/own"), "who knows").unwrap();
    }
    let before = original.trees();

    original.is_refused(
        &[],
        &["9/fs of the snapshot \"default/7/lost\" (and 1 more)"],
    );
    let (code, said, complaint) = original.import(&["--leave-out-missing"]);
    assert_eq!(code, 1, "{said}{complaint}");
    for words in [
        "imported 8 snapshots",
        "\"default/13/emptied\": 4 KiB of 84",
        "left out 5",
        "image volume has no snapshots/9/fs",
        "its parent \"default/7/lost\" cannot be taken over",
        "it has 2 inodes, and had 3",
        "writable volume has no snapshots/13/fs",
        "namespace default",
        "pull them again",
        "snapshot \"stuck\"",
        "left-out",
        "snapshots/new-123",
        "writable volume: snapshots/3",
        "image volume: snapshots/16",
        "writable volume: snapshots/1\n",
    ] {
        assert!(said.contains(words), "{words}: {said}");
    }
    let precious = original.writable().join("left-out/11/fs/own");
    let data = precious.parent().unwrap().to_str().unwrap();
    assert!(said.contains("copy out what you need:\n"), "{said}");
    assert!(
        said.contains(&format!("  \"default/9/stuck\": in {data}\n")),
        "{said}"
    );
    assert!(
        !said.contains("left-out/13"),
        "nothing of it is there: {said}"
    );
    assert_eq!(fs::read_to_string(&precious).unwrap(), "precious");

    // The undoing brings all of it back.
    original.undo();
    original.is_as(&before);
    let (code, said, _) = original.import(&["--json", "--leave-out-missing"]);
    assert_eq!(code, 1);
    let told: Value = serde_json::from_str(&said).unwrap();
    let codes: Vec<_> = told["left_out"]
        .as_array()
        .unwrap()
        .iter()
        .map(|left_out| {
            (
                left_out["key"].as_str().unwrap(),
                left_out["code"].as_str().unwrap(),
            )
        })
        .collect();
    assert_eq!(
        codes,
        [
            ("default/7/lost", "missing"),
            ("default/8/upon", "parent-left-out"),
            ("default/9/stuck", "parent-left-out"),
            ("default/10/short", "incomplete"),
            ("default/11/bare", "missing"),
        ]
    );
    let mut split = original.serve();
    is_clean(&split);
    let client = split.client();
    sample_works(&client);
    let mut all = theirs(&listed);
    for (key, _) in codes {
        all.remove(key);
        assert!(!client.exists(key));
    }
    let mut ours = listing(&client);
    let grown = ours.remove("default/12/grown").unwrap();
    assert_eq!(grown["usage"][1], 4, "what the layer holds now");
    all.remove("default/12/grown");
    assert_eq!(ours, all);
    client.cleanup().unwrap();
    assert_eq!(fs::read_to_string(&precious).unwrap(), "precious");
    for stray in &strays {
        let volume = stray.parent().unwrap().with_file_name("left-out");
        let kept = volume.join(stray.file_name().unwrap()).join("fs/own");
        assert_eq!(fs::read_to_string(kept).unwrap(), "who knows");
    }
    // containerd pulls the layer again.
    crate::content::layer(&client, "default/7/lost", "default/1/base", |top| {
        fs::write(top.join("top"), "anew").unwrap();
    });
    split.daemon.stop();
    is_clean(&split);
}

#[registered(crate::Test)]
fn thousands_of_snapshots() {
    let mut original = Original::new();
    for image in 0..60 {
        let mut parent = String::new();
        for layer in 0..40 {
            let name = format!("default/{}/sha256:{image:04}{layer:04}", image * 40 + layer);
            original.layer(&name, &parent, "content");
            parent = name;
        }
        original.container(&format!("default/{image}/web-{image}"), &parent, "own");
    }
    let listed = original.finish();
    original.import_all();
    let split = original.serve();
    let client = split.client();
    assert_eq!(listing(&client), theirs(&listed));
    reads(&client, "default/59/web-59", "sha256:00590000", "content");
    is_clean(&split);
}

/// Files of an earlier daemon in the place of the new database.
#[registered(crate::Test)]
fn an_old_log_is_not_taken_for_ours() {
    let mut other = crate::support::daemon::Split::start(&[]);
    for number in 0..20 {
        let key = format!("default/{number}/other");
        other.client().prepare(&key, "", &[]).unwrap();
    }
    other.daemon.kill();
    let mut original = sample();
    let listed = original.finish();
    for suffix in ["-wal", "-shm"] {
        let name = format!("metadata.db{suffix}");
        fs::copy(other.root().join(&name), original.root().join(&name)).unwrap();
    }
    fs::write(original.root().join("metadata.db.copy"), "a copy").unwrap();
    let away = original.image.path().join("away");
    fs::create_dir(&away).unwrap();
    // Each file may be all that is left of its database.
    for name in ["metadata.db-wal", "metadata.db.copy"] {
        let remains = original.root().join(name);
        assert!(fs::metadata(&remains).unwrap().len() > 0);
        for flags in [&[][..], &["--dry-run"]] {
            original.is_refused(flags, &[remains.to_str().unwrap(), "move this file away"]);
        }
        fs::rename(&remains, away.join(name)).unwrap();
    }
    let stale = ["-wal", "-journal", ".copy.new"].map(|suffix| {
        let path = original.root().join(format!("metadata.db{suffix}"));
        let content = if suffix == "-wal" { "" } else { "stale" };
        fs::write(&path, content).unwrap();
        path
    });
    original.import_all();
    for path in stale {
        assert!(!path.exists(), "{}", path.display());
    }
    let split = original.serve();
    assert_eq!(listing(&split.client()), theirs(&listed));
    sample_works(&split.client());
    is_clean(&split);
}
