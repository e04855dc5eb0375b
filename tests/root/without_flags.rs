//! Commands without a flag of the daemon, and the configuration that they use.

use std::fs;
use std::process::{Command, Output};

use registered::registered;

use crate::support::daemon::BINARY;
use crate::support::disk::Disk;

/// Starts the daemon of `dir`, and waits until it serves. Everything runs in a process
/// and mount namespace of its own with its own service settings, because the daemon is
/// found by the name of its program.
const BEGIN: &str = r#"
    mount -t tmpfs tmpfs /etc/default
    settings=/etc/default/overlay-read-write-splitting-snapshotter
    : >"$dir/log"
    serve() {
        cd "$1"
        shift
        "$program" "$@" 2>>"$dir/log" &
        daemon=$!
        tries=1200
        until grep -q serving "$dir/log"; do
            tries=$((tries - 1))
            [ "$tries" -gt 0 ] && kill -0 "$daemon" || { cat "$dir/log" >&2; exit 9; }
            sleep 0.1
        done
        cd /
    }
"#;

/// Runs a script with `$program` and `$dir`, a disk.
fn run(disk: &Disk, script: &str) -> (Option<i32>, String, String) {
    let script = format!("{BEGIN}\n{script}");
    let Output {
        status,
        stdout,
        stderr,
    } = Command::new("unshare")
        .args(["--pid", "--fork", "--kill-child", "--mount-proc", "--mount"])
        .args(["sh", "-euc", &script])
        .env("program", BINARY)
        .env("dir", disk.path())
        .output()
        .unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (status.code(), text(stdout), text(stderr))
}

#[registered(crate::Test)]
fn the_running_daemon_says_where_the_volumes_are() {
    let disk = Disk::ext4(64);
    // Paths that are relative to the daemon's working directory, and one that is not in
    // the root.
    let (code, said, reported) = run(
        &disk,
        r#"
        echo 'OPTIONS="--root-dir /nowhere"' >$settings
        serve "$dir" --root-dir a --writable-dir=fast/b --sync none
        cd /tmp
        "$program" status
        "$program" check
        "$program" doctor --json --containerd-config /nowhere | grep -c "$dir/a"
        kill "$daemon"
        wait "$daemon"
        "#,
    );
    assert_eq!(code, Some(0), "{said}{reported}");
    let dir = disk.text();
    for words in [
        format!("image      {dir}/a\n"),
        format!("writable   {dir}/fast/b\n"),
        "daemon     running".to_owned(),
    ] {
        assert!(said.contains(&words), "{words}: {said}{reported}");
    }
    let lines: Vec<_> = reported.lines().collect();
    assert_eq!(lines.len(), 3, "{reported}");
    for line in lines {
        assert!(
            line.starts_with("using the configuration of the running daemon, process ")
                && line.ends_with(": --root-dir a --writable-dir=fast/b --sync none"),
            "{reported}"
        );
    }
}

#[registered(crate::Test)]
fn flags_on_the_command_line_are_all_that_counts() {
    let disk = Disk::ext4(64);
    let (code, said, reported) = run(
        &disk,
        r#"
        serve "$dir" --root-dir a
        "$program" status --root-dir "$dir/b"
        "#,
    );
    assert_eq!(code, Some(1), "{said}");
    assert!(
        reported.contains("/b") && !reported.contains("using"),
        "{reported}"
    );
}

#[registered(crate::Test)]
fn of_two_daemons_none_is_chosen() {
    let disk = Disk::ext4(64);
    let (code, said, reported) = run(
        &disk,
        r#"
        serve "$dir" --root-dir a
        : >"$dir/log"
        serve "$dir" --root-dir b
        "$program" status
        "#,
    );
    assert_eq!(code, Some(1), "{said}");
    let words = "2 daemons are running (process ";
    assert!(
        reported.contains(words) && reported.contains(": --root-dir b): give"),
        "{reported}"
    );
}

#[registered(crate::Test)]
fn without_a_daemon_the_service_says_it() {
    let disk = Disk::ext4(64);
    let (code, said, reported) = run(
        &disk,
        r#"
        serve "$dir" --root-dir a --writable-dir "$dir/b"
        kill -9 "$daemon"
        wait "$daemon" || :
        # A process of that name that does not serve the root is no daemon of it.
        cp "$(command -v sleep)" /etc/default/rwsplit
        /etc/default/rwsplit 1000 &
        echo "OPTIONS=\"--root-dir $dir/a --writable-dir $dir/b\"" >$settings
        "$program" check
        "#,
    );
    assert_eq!(code, Some(0), "{said}{reported}");
    let dir = disk.text();
    let line = format!(
        "no daemon is running; using /etc/default/overlay-read-write-splitting-snapshotter: \
         OPTIONS=\"--root-dir {dir}/a --writable-dir {dir}/b\"\n"
    );
    assert!(reported.contains(&line), "{reported}");
    fs::metadata(disk.path().join("a/metadata.db")).unwrap();

    for options in ["\"--root-dir $HOME\"", "\"status\"", "\"--no-such-flag\""] {
        let script = format!("echo 'OPTIONS={options}' >$settings\n\"$program\" check");
        let (code, said, reported) = run(&disk, &script);
        assert_eq!(code, Some(2), "{said}");
        assert!(reported.contains("OPTIONS in /etc/default/"), "{reported}");
    }
    let (code, _, reported) = run(&disk, "\"$program\" status");
    assert_eq!(code, Some(1));
    assert!(
        reported.contains("using the default directories"),
        "{reported}"
    );
}
