//! The command `check`: it names what is wrong, and repairs it on request.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};

use registered::registered;
use serde_json::Value;

use crate::content::layer;
use crate::support::client::Client;
use crate::support::daemon::{BINARY, Split, is_empty};
use crate::support::disk::Disk;
use crate::support::mounted::Mounted;
use crate::support::{tree, unchanged};

/// Exit code, standard output and standard error of a check.
pub fn check(split: &Split, flags: &[&str]) -> (i32, String, String) {
    let output = Command::new(BINARY)
        .arg("check")
        .args(split.daemon.arguments())
        .args(flags)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    (
        output.status.code().unwrap(),
        String::from_utf8(output.stdout).unwrap(),
        String::from_utf8(output.stderr).unwrap(),
    )
}

/// Fails if the check finds anything.
#[track_caller]
pub fn is_clean(split: &Split) {
    let (code, said, complaint) = check(split, &[]);
    assert_eq!(code, 0, "{said}{complaint}");
}

/// The findings of a check, as codes with keys.
#[track_caller]
fn findings(split: &Split) -> Vec<(String, String)> {
    let (code, said, complaint) = check(split, &["--json"]);
    assert_eq!(code, 1, "{said}{complaint}");
    let told: Value = serde_json::from_str(&said).unwrap();
    let findings = told["findings"].as_array().unwrap();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    findings
        .iter()
        .map(|finding| {
            assert!(!text(&finding["text"]).is_empty(), "{finding}");
            (text(&finding["code"]), text(&finding["key"]))
        })
        .collect()
}

fn sample(client: &Client) {
    for (name, parent) in [
        ("default/1/base", ""),
        ("default/2/shrunk", "default/1/base"),
        ("default/3/grown", "default/1/base"),
        ("default/4/gone", "default/1/base"),
        ("default/5/above", "default/4/gone"),
    ] {
        layer(client, name, parent, |top| {
            fs::write(top.join("file"), name).unwrap();
            fs::write(top.join("other"), name).unwrap();
        });
    }
    let mounted = Mounted::new(&client.prepare("init", "default/1/base", &[]).unwrap());
    fs::write(mounted.path().join("own"), "own").unwrap();
    drop(mounted);
    client.commit("init", "default/6/away", &[]).unwrap();
    for (key, parent) in [
        ("default/7/web", "default/6/away"),
        ("default/8/lost", "default/5/above"),
        ("default/9/bare", "default/1/base"),
    ] {
        client.prepare(key, parent, &[]).unwrap();
    }
}

/// The directories of a snapshot on both volumes, existing or not.
fn own(split: &Split, key: &str) -> [std::path::PathBuf; 2] {
    let database = rusqlite::Connection::open(split.root().join("metadata.db")).unwrap();
    let id: i64 = database
        .query_row("SELECT id FROM snapshot WHERE name = ?1", [key], |row| {
            row.get(0)
        })
        .unwrap();
    [split.root(), split.writable()].map(|top| top.join(format!("snapshots/{id}")))
}

/// A stopped daemon's volumes with one damage of each kind, and the findings
/// for them.
fn damaged() -> (Split, Vec<(&'static str, &'static str)>) {
    let mut split = Split::start(&["--relocate", "never"]);
    sample(&split.client());
    split.skip_ids_through(80);
    split.daemon.stop();
    let [shrunk, _] = own(&split, "default/2/shrunk");
    File::options()
        .write(true)
        .open(shrunk.join("fs/file"))
        .unwrap()
        .set_len(0)
        .unwrap();
    let [grown, _] = own(&split, "default/3/grown");
    fs::write(grown.join("fs/new"), "new").unwrap();
    let [gone, _] = own(&split, "default/4/gone");
    fs::remove_dir_all(gone).unwrap();
    let [link, _] = own(&split, "default/6/away");
    fs::remove_file(link).unwrap();
    let [_, bare] = own(&split, "default/9/bare");
    fs::remove_dir_all(bare).unwrap();
    fs::create_dir_all(split.root().join("snapshots/77/fs")).unwrap();
    fs::create_dir_all(split.writable().join("snapshots/78/fs")).unwrap();
    let named = vec![
        ("layer-damaged", "default/2/shrunk"),
        ("layer-changed", "default/3/grown"),
        ("layer-missing", "default/4/gone"),
        ("wrong-link", "default/6/away"),
        ("no-directory", "default/9/bare"),
        ("orphan", ""),
        ("orphan", ""),
    ];
    (split, named)
}

#[registered(crate::Test)]
fn clean_whatever_the_daemon_does() {
    let mut split = Split::start(&["--relocate-after", "0"]);
    let client = split.client();
    sample(&client);
    is_clean(&split);
    let busy = split.client();
    std::thread::scope(|scope| {
        let work = scope.spawn(move || {
            for round in 0..40 {
                let name = format!("layer-{round}");
                layer(&busy, &name, "default/1/base", |top| {
                    fs::write(top.join("file"), &name).unwrap();
                });
                busy.prepare("run", &name, &[]).unwrap();
                busy.remove("run").unwrap();
                busy.remove(&name).unwrap();
            }
        });
        while !work.is_finished() {
            is_clean(&split);
        }
    });
    split.daemon.kill();
    is_clean(&split);
    // The check has not removed the log, without which the daemon would not
    // start.
    split.daemon.restart();
    split.daemon.stop();
    is_clean(&split);
    split.daemon.restart();
    assert!(split.client().exists("default/7/web"));
}

#[registered(crate::Test)]
fn each_finding_is_named() {
    let (split, named) = damaged();
    // SQLite creates an empty log and its index for a reader.
    is_there(&split, &named);
    let before = [split.root(), split.writable()].map(tree);
    is_there(&split, &named);
    unchanged(split.root(), &before[0]);
    unchanged(split.writable(), &before[1]);

    let (code, said, _) = check(&split, &[]);
    assert_eq!(code, 1);
    for (_, key) in &named {
        assert!(said.contains(key), "{key}: {said}");
    }
    for words in [
        "7 findings",
        "snapshots/77",
        "snapshots/78",
        "held 3 inodes and 32 bytes",
        "namespace \"default\"",
        "layer \"above\"",
        "snapshot \"lost\"",
        "pull them again",
    ] {
        assert!(said.contains(words), "{words}: {said}");
    }
}

#[track_caller]
fn is_there(split: &Split, named: &[(&str, &str)]) {
    let found = findings(split);
    let found: Vec<_> = found.iter().map(|(code, key)| (&**code, &**key)).collect();
    assert_eq!(found, named);
}

#[registered(crate::Test)]
fn repair_mends_what_it_said() {
    let (mut split, _) = damaged();
    let (code, said, complaint) = check(&split, &["--repair", "--yes"]);
    assert_eq!(code, 0, "{said}{complaint}");
    is_clean(&split);
    split.daemon.restart();
    let client = split.client();
    let mut names = client.names(&[]).unwrap();
    names.sort();
    assert_eq!(
        names,
        [
            "default/1/base",
            "default/3/grown",
            "default/6/away",
            "default/7/web",
            "default/9/bare"
        ]
    );
    for key in ["default/7/web", "default/9/bare"] {
        let mounted = Mounted::new(&client.mounts(key).unwrap());
        assert_eq!(
            fs::read_to_string(mounted.path().join("file")).unwrap(),
            "default/1/base"
        );
    }
    // containerd pulls the layers again.
    layer(&client, "default/2/shrunk", "default/1/base", |top| {
        fs::write(top.join("file"), "anew").unwrap();
    });
    client.cleanup().unwrap();
    assert!(is_empty(split.root().join("trash")));
    is_clean(&split);
}

#[registered(crate::Test)]
fn repair_asks_first() {
    let (mut split, named) = damaged();
    is_there(&split, &named);
    let before = [split.root(), split.writable()].map(tree);
    let (code, _, complaint) = check(&split, &["--repair"]);
    assert_eq!(code, 2);
    assert!(complaint.contains("--yes"), "{complaint}");

    let arguments = split.daemon.arguments().join(" ");
    let ask = |answer: &str| {
        let command = format!(
            "printf '%s\\n' {answer} {answer} | script -qec \"{BINARY} check --repair --containerd-address /none {arguments}\" /dev/null"
        );
        let output = Command::new("sh").args(["-c", &command]).output().unwrap();
        (
            output.status.code().unwrap(),
            String::from_utf8(output.stdout).unwrap(),
        )
    };
    let (code, said) = ask("n");
    assert_eq!(code, 1, "{said}");
    assert!(said.contains("2 of these can perhaps be healed"), "{said}");
    assert!(said.contains("drops the 4 snapshots"), "{said}");
    for (top, before) in [split.root(), split.writable()].iter().zip(&before) {
        let mut now = tree(top);
        let is_snapshot = |path: &Path| path.to_str().unwrap().contains("/snapshots/");
        now.retain(|path, _| is_snapshot(path));
        let mut before = before.clone();
        before.retain(|path, _| is_snapshot(path));
        assert_eq!(now, before);
    }
    is_there(&split, &named);

    split.daemon.restart();
    let (code, _, complaint) = check(&split, &["--repair", "--yes"]);
    assert_eq!(code, 2, "beside a running daemon");
    assert!(complaint.contains("stop the daemon first"), "{complaint}");
    split.daemon.stop();
    let (code, said) = ask("y");
    assert_eq!(code, 0, "{said}");
    assert!(
        said.contains("no layer was healed"),
        "there is no containerd: {said}"
    );
    is_clean(&split);
}

#[registered(crate::Test)]
fn a_lost_volume_is_given_up() {
    let mut split = Split::start(&["--relocate", "never"]);
    sample(&split.client());
    split.daemon.stop();
    let (code, _, complaint) = check(&split, &["--reset-writable", "--yes"]);
    assert_eq!(code, 2, "it is there");
    assert!(complaint.contains("nothing to reset"), "{complaint}");
    is_clean(&split);

    split.writable.unmount();
    let found = findings(&split);
    assert_eq!(found, [("volume-missing".to_owned(), String::new())]);
    let (code, ..) = check(&split, &["--repair", "--yes"]);
    assert_eq!(code, 1, "nothing can be done about it");
    assert!(is_empty(split.writable.path()), "the mount point is bare");

    split.writable = Disk::ext4(64);
    let arguments =
        crate::support::daemon::command(&split.image, &split.writable, &["--relocate", "never"]);
    split.daemon.set_arguments(arguments);
    let (code, said, complaint) = check(&split, &["--reset-writable", "--yes"]);
    assert_eq!(code, 0, "{said}{complaint}");
    assert!(said.contains("layer \"away\""), "{said}");
    is_clean(&split);
    split.daemon.restart();
    let client = split.client();
    assert!(!client.exists("default/6/away") && !client.exists("default/7/web"));
    let mounted = Mounted::new(&client.mounts("default/9/bare").unwrap());
    assert_eq!(
        fs::read_to_string(mounted.path().join("file")).unwrap(),
        "default/1/base"
    );
}

#[registered(crate::Test)]
fn a_lost_mark_is_made_again() {
    let mut split = Split::start(&[]);
    let client = split.client();
    sample(&client);
    let mounted = Mounted::new(&client.mounts("default/9/bare").unwrap());
    fs::write(mounted.path().join("own"), "written").unwrap();
    drop(mounted);
    split.daemon.stop();
    fs::remove_file(split.writable().join(".volume")).unwrap();
    let found = findings(&split);
    assert_eq!(found, [("mark-missing".to_owned(), String::new())]);
    let (code, said, complaint) = check(&split, &["--repair", "--yes"]);
    assert_eq!(code, 0, "{said}{complaint}");
    split.daemon.restart();
    let mounted = Mounted::new(&split.client().mounts("default/9/bare").unwrap());
    assert_eq!(
        fs::read_to_string(mounted.path().join("own")).unwrap(),
        "written"
    );
}

#[registered(crate::Test)]
fn what_cannot_be_checked() {
    let mut split = Split::start(&[]);
    split.client().prepare("web", "", &[]).unwrap();
    split.daemon.stop();
    let elsewhere = split.image.path().join("elsewhere");
    for root in [elsewhere.as_path(), Path::new("/proc")] {
        let before = root.exists();
        let output = Command::new(BINARY)
            .args(["check", "--root-dir"])
            .arg(root)
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(2));
        assert_eq!(root.exists(), before, "a check makes nothing");
    }
    let database = split.root().join("metadata.db");
    let away = split.root().join("away.db");
    fs::rename(&database, &away).unwrap();
    let (code, _, complaint) = check(&split, &[]);
    assert_eq!(code, 2);
    assert!(complaint.contains("is missing"), "{complaint}");
    assert!(!database.exists());
    fs::rename(&away, &database).unwrap();
    is_clean(&split);
}

/// The bytes have moved, and the database does not record it yet: nothing is
/// lost.
#[registered(crate::Test)]
fn a_move_that_was_cut_short() {
    for (disks, step) in [
        (2, "copied"),
        (2, "exchanged"),
        (2, "recorded"),
        (1, "renamed"),
        (1, "rename-exchanged"),
        (1, "rename-recorded"),
    ] {
        let mut split = Split::start(&["--relocate", "never"]);
        if disks == 1 {
            split.daemon.stop();
            let root = split.root().display().to_string();
            split.daemon.set_arguments(
                ["--root-dir", &root, "--relocate", "never"]
                    .map(str::to_owned)
                    .to_vec(),
            );
            fs::remove_dir_all(&root).unwrap();
            split.daemon.restart();
        }
        let client = split.client();
        let mounts = client.prepare("init", "", &[]).unwrap();
        // Large enough to move while something stands on it.
        let upper = Path::new(&mounts[0].source);
        fs::write(upper.join("file"), vec![7; 2 << 20]).unwrap();
        client.commit("init", "layer", &[]).unwrap();
        client.prepare("web", "layer", &[]).unwrap();
        split.daemon.stop();
        let mut arguments = split.daemon.arguments().to_vec();
        let last = arguments.len() - 1;
        arguments[last - 1] = "--relocate-after".to_owned();
        arguments[last] = "0".to_owned();
        split.daemon.set_arguments(arguments);
        split.daemon.restart_until_dead_at(step);

        let (code, said, complaint) = check(&split, &[]);
        let is_recorded = matches!(step, "copied" | "recorded" | "rename-recorded");
        assert_eq!(code, i32::from(!is_recorded), "{step}: {said}{complaint}");
        assert_eq!(
            said.contains("does not record the move"),
            !is_recorded,
            "{step}: {said}"
        );
        let (code, said, complaint) = check(&split, &["--repair", "--yes"]);
        assert_eq!(code, 0, "{step}: {said}{complaint}");
        is_clean(&split);
        split.daemon.restart();
        let client = split.client();
        let mounted = Mounted::new(&client.mounts("web").unwrap());
        assert_eq!(
            fs::read(mounted.path().join("file")).unwrap(),
            vec![7; 2 << 20],
            "{step}"
        );
    }
}

#[registered(crate::Test)]
fn a_reset_that_is_refused_changes_nothing() {
    let mut split = Split::start(&[]);
    let client = split.client();
    sample(&client);
    split.daemon.stop();
    // Another root's volume, a directory with files in it, and an unsuitable
    // one.
    let other = Split::start(&[]);
    let (filled, vfat) = (Disk::ext4(64), Disk::ext4(64));
    fs::create_dir_all(filled.path().join("writable/snapshots/7")).unwrap();
    fs::create_dir_all(vfat.path().join("writable")).unwrap();
    vfat.remount("ro");
    for disk in [&other.writable, &filled, &vfat] {
        split.writable.unmount();
        rustix::mount::mount_bind(disk.path(), split.writable.path()).unwrap();
        let before = tree(disk.path());
        let (code, said, complaint) = check(&split, &["--reset-writable", "--yes"]);
        assert_eq!(code, 2, "{said}{complaint}");
        unchanged(disk.path(), &before);
        rustix::mount::unmount(split.writable.path(), rustix::mount::UnmountFlags::empty())
            .unwrap();
        split.writable.mount();
        is_clean(&split);
    }
    split.daemon.restart();
    split.client().mounts("default/7/web").unwrap();
}

/// `ctr snapshot commit` of a running container, which goes on writing.
#[registered(crate::Test)]
fn what_changed_after_its_commit_is_kept() {
    let mut split = Split::start(&["--relocate", "never"]);
    let client = split.client();
    layer(&client, "base", "", |_| ());
    let mounted = Mounted::new(&client.prepare("web", "base", &[]).unwrap());
    fs::write(mounted.path().join("pid"), "1").unwrap();
    client.commit("web", "layer", &[]).unwrap();
    fs::remove_file(mounted.path().join("pid")).unwrap();
    drop(mounted);
    split.daemon.stop();
    is_clean(&split);
    let (code, said, complaint) = check(&split, &["--repair", "--yes"]);
    assert_eq!(code, 0, "{said}{complaint}");
    split.daemon.restart();
    assert!(split.client().exists("layer"));
}

#[registered(crate::Test)]
fn hostile_names_are_told_tamely() {
    let mut split = Split::start(&[]);
    let client = split.client();
    let hostile = "x; rm -rf /;/1/\u{1b}[2Jlayer";
    layer(&client, hostile, "", |top| {
        fs::write(top.join("file"), "x").unwrap();
    });
    split.daemon.stop();
    let [image, _] = own(&split, hostile);
    fs::remove_dir_all(image).unwrap();
    let (code, said, _) = check(&split, &[]);
    assert_eq!(code, 1);
    assert!(
        !said.contains('\u{1b}') && !said.contains("ctr -n x"),
        "{said}"
    );
    assert!(said.contains("\"x; rm -rf \""), "{said}");
}
