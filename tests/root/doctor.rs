//! The command `doctor`, with Debian's containerd.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use registered::registered;
use serde_json::Value;

use crate::support::daemon::BINARY;
use crate::support::disk::Disk;
use crate::support::{tree, unchanged};

/// The exit code of doctor, and its report in JSON and in lines.
fn doctor(arguments: &[String]) -> (Option<i32>, Value, String) {
    let run = |more: &[&str]| {
        Command::new(BINARY)
            .arg("doctor")
            .args(arguments)
            .args(more)
            .output()
            .unwrap()
    };
    let (human, json) = (run(&[]), run(&["--json"]));
    assert_eq!(human.status, json.status);
    let value = serde_json::from_slice(&json.stdout).unwrap_or(Value::Null);
    let text = [human.stdout, human.stderr].concat();
    (human.status.code(), value, String::from_utf8(text).unwrap())
}

fn arguments(image: &Disk, writable: &Disk, configuration: &Path) -> Vec<String> {
    vec![
        format!("--root-dir={}/root", image.text()),
        format!("--writable-dir={}", writable.text()),
        format!("--containerd-config={}", configuration.display()),
    ]
}

/// The verdicts on a topic, and all words about it.
fn told(value: &Value, topic: &str) -> (Vec<String>, String) {
    let findings = value["findings"].as_array().unwrap().iter();
    let about: Vec<_> = findings
        .filter(|finding| finding["topic"] == topic)
        .collect();
    let verdicts = about
        .iter()
        .map(|it| it["verdict"].as_str().unwrap().to_owned());
    let words: Vec<_> = about
        .iter()
        .map(|it| {
            format!(
                "{}\n{}",
                it["text"].as_str().unwrap(),
                it["stanza"].as_str().unwrap_or("")
            )
        })
        .collect();
    (verdicts.collect(), words.join("\n"))
}

#[registered(crate::Test)]
fn two_disks_and_a_right_configuration_are_fit() {
    let (image, writable) = (Disk::ext4(64), Disk::ext4(64));
    let scratch = tempfile::tempdir().unwrap();
    let configuration = scratch.path().join("config.toml");
    // A dump like that of Kubernetes' containerd, with the lines that the first
    // run has suggested.
    fs::write(&configuration, "version = 2\n").unwrap();
    let arguments = arguments(&image, &writable, &configuration);
    let before = (tree(image.path()), tree(writable.path()));
    let (code, value, text) = doctor(&arguments);
    assert_eq!(code, Some(1), "{text}");
    let (verdicts, stanza) = told(&value, "plugin");
    assert_eq!(verdicts, ["bad"], "{text}");
    let stanza = stanza.split_once('\n').unwrap().1.to_owned();

    let cri = "[plugins.\"io.containerd.grpc.v1.cri\".containerd]\n  snapshotter = \"rwsplit\"\n";
    // The place where the kubelet of an older containerd looks for the image
    // volume.
    let top = format!("version = 2\nroot = \"{}\"\n", scratch.path().display());
    fs::write(&configuration, format!("{top}{stanza}\n{cri}")).unwrap();
    let link = "io.containerd.snapshotter.v1.rwsplit";
    symlink(format!("{}/root", image.text()), scratch.path().join(link)).unwrap();
    let (code, value, text) = doctor(&arguments);
    assert_eq!(code, Some(0), "{text}");
    for (topic, verdicts, words) in [
        ("kernel", &["ok"][..], "Linux "),
        ("image", &["ok", "ok"], "/root does not exist yet"),
        ("image", &["ok", "ok"], "overlayfs can read layers there"),
        ("writable", &["ok", "ok"], "overlayfs can write there"),
        ("split", &["ok"], "two file systems"),
        ("containerd", &["ok"], "1."),
        ("plugin", &["ok"], "\"rwsplit\" leads to this program"),
        ("exports", &["ok"], "the kubelet finds the image volume"),
        ("Kubernetes", &["ok"], "pods get this snapshotter"),
    ] {
        let (found, said) = told(&value, topic);
        assert_eq!(found, verdicts, "{topic}: {text}");
        assert!(said.contains(words), "{topic}: {said}");
        assert!(text.contains(words), "{topic}: {text}");
    }
    unchanged(image.path(), &before.0);
    unchanged(writable.path(), &before.1);
}

#[registered(crate::Test)]
fn what_is_wrong_is_said() {
    let (image, writable) = (Disk::ext4(64), Disk::ext4(64));
    let scratch = tempfile::tempdir().unwrap();
    let configuration = scratch.path().join("config.toml");
    let socket = format!("{}/root/grpc.socks", image.text());
    let arguments = arguments(&image, &writable, &configuration);
    let rule = ["--allow-lower=/srv", "--lower-for=*=/srv/cache"].map(str::to_owned);
    let with_rule = [&*arguments, &rule].concat();
    let proxy = |name: &str, kind: &str, address: &str| {
        format!("[proxy_plugins.{name}]\n type = \"{kind}\"\n address = \"{address}\"\n")
    };
    let ours = proxy("rwsplit", "snapshot", &socket);
    let cri = "[plugins.\"io.containerd.grpc.v1.cri\".containerd]\n snapshotter = \"rwsplit\"\n";
    for (arguments, text, topic, verdict, words) in [
        (
            &arguments,
            proxy("rwsplit", "snapshot", "/run/x"),
            "plugin",
            "bad",
            "\"rwsplit\" has /run/x",
        ),
        (
            &arguments,
            proxy("rwsplit", "content", &socket),
            "plugin",
            "bad",
            "has to be \"snapshot\"",
        ),
        (
            &arguments,
            proxy("overlayfs", "snapshot", &socket),
            "plugin",
            "bad",
            "has the name of one of containerd's own",
        ),
        (
            &arguments,
            "= nonsense".to_owned(),
            "plugin",
            "bad",
            "cannot be read",
        ),
        (
            &arguments,
            ours.clone(),
            "Kubernetes",
            "note",
            "pods get the snapshotter \"overlayfs\"",
        ),
        (
            &with_rule,
            format!("{ours}{cri} disable_snapshot_annotations = true\n"),
            "Kubernetes",
            "bad",
            "--lower-for has no effect",
        ),
    ] {
        fs::write(&configuration, format!("version = 2\n{text}")).unwrap();
        let (code, value, said) = doctor(arguments);
        assert_eq!(code, Some(i32::from(verdict == "bad")), "{words}: {said}");
        let (verdicts, told) = told(&value, topic);
        assert_eq!(verdicts, [verdict], "{said}");
        assert!(told.contains(words), "{words}: {told}");
    }
}

#[registered(crate::Test)]
fn disks_that_will_not_do_are_named() {
    let image = Disk::ext4(64);
    let scratch = tempfile::tempdir().unwrap();
    let configuration = scratch.path().join("config.toml");
    fs::write(&configuration, "version = 2\n").unwrap();
    let told_of = |writable: &str, flags: &[&str]| {
        let mut arguments = vec![
            format!("--root-dir={}", image.text()),
            format!("--writable-dir={writable}"),
            format!("--containerd-config={}", configuration.display()),
        ];
        arguments.extend(flags.iter().map(ToString::to_string));
        doctor(&arguments).1
    };
    // Both volumes on one disk.
    let within = format!("{}/writable", image.text());
    let (verdicts, said) = told(&told_of(&within, &[]), "split");
    assert_eq!(verdicts, ["note"], "{said}");
    // The disk has no quotas. If they are needed, this is an error rather than
    // a note.
    let (verdicts, said) = told(&told_of(&within, &[]), "limits");
    assert_eq!(verdicts, ["note"], "{said}");
    assert!(said.contains("quota"), "{said}");
    for flags in [["--quota", "require"], ["--default-max-size", "1G"]] {
        let (verdicts, said) = told(&told_of(&within, &flags), "limits");
        assert_eq!(verdicts, ["bad"], "{said}");
    }
    let (verdicts, said) = told(&told_of(&within, &["--quota", "off"]), "limits");
    assert!(verdicts.is_empty(), "{said}");
    // The directories are no mount points, although the flag requires it.
    let (verdicts, said) = told(&told_of(&within, &["--require-mount"]), "mounts");
    assert_eq!(verdicts, ["bad"], "{said}");

    // A writable directory in memory.
    let memory = Disk::ext4(16);
    let point = format!("{}/memory", memory.text());
    fs::create_dir(&point).unwrap();
    let flags = rustix::mount::MountFlags::empty();
    rustix::mount::mount("tmpfs", point.as_str(), "tmpfs", flags, None).unwrap();
    let (verdicts, said) = told(&told_of(&point, &[]), "writable");
    assert_eq!(verdicts, ["ok", "ok", "note"], "{said}");
    assert!(said.contains("--writable-volatile"), "{said}");
    let (verdicts, _) = told(&told_of(&point, &["--writable-volatile"]), "writable");
    assert_eq!(verdicts, ["ok", "ok"]);
    rustix::mount::unmount(point.as_str(), rustix::mount::UnmountFlags::empty()).unwrap();

    // The directory that a killed doctor has left does not matter, and is
    // removed.
    let left = ".overlay-read-write-splitting-snapshotter-doctor/lower/deep";
    fs::create_dir_all(memory.path().join(left)).unwrap();
    let (verdicts, said) = told(&told_of(&memory.text(), &[]), "writable");
    assert_eq!(verdicts, ["ok", "ok"], "{said}");
    assert!(!memory.path().join(left).exists());
    // Mounts of doctor are not visible here.
    let is_overlay = |line: &str| line.contains(" overlay ") && line.contains("-doctor");
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.lines().any(is_overlay), "{mounts}");
    // A full disk, and an option that overlayfs does not know.
    memory.fill();
    let (verdicts, said) = told(&told_of(&memory.text(), &[]), "writable");
    assert_eq!(verdicts, ["ok", "bad"], "{said}");
    memory.make_room();
    let option = ["--mount-option", "redirect_dir=nonsense"];
    let (verdicts, said) = told(&told_of(&memory.text(), &option), "writable");
    assert_eq!(verdicts, ["ok", "bad"], "{said}");
    assert!(said.contains("--mount-option"), "{said}");

    // A read-only disk, and a file.
    memory.remount("ro");
    let (verdicts, said) = told(&told_of(&memory.text(), &[]), "writable");
    assert_eq!(verdicts, ["ok", "bad"], "{said}");
    assert!(said.contains("make it writable"), "{said}");
    let (verdicts, said) = told(&told_of(configuration.to_str().unwrap(), &[]), "writable");
    assert_eq!(verdicts, ["bad"], "{said}");
    assert!(
        said.contains("is no directory: give another --writable-dir"),
        "{said}"
    );
}

/// Runs a script in a process and mount namespace of its own, with `$program` and `$dir`, a
/// disk.
fn run_apart(disk: &Disk, script: &str) -> String {
    let output = Command::new("unshare")
        .args(["--pid", "--fork", "--kill-child", "--mount-proc", "--mount"])
        .args(["sh", "-euc", script])
        .env("program", BINARY)
        .env("dir", disk.path())
        .output()
        .unwrap();
    String::from_utf8(output.stdout).unwrap()
}

#[registered(crate::Test)]
fn docker_needs_a_containerd_that_has_its_driver() {
    let disk = Disk::ext4(64);
    let script = r#"
        cd "$dir"
        mkdir upper work root writable
        mount -t overlay -o "lowerdir=/etc,upperdir=$dir/upper,workdir=$dir/work" overlay /etc
        mount -t tmpfs tmpfs /run
        mkdir -p /etc/containerd /etc/docker
        cat >/etc/containerd/config.toml <<END
version = 2
[proxy_plugins.rwsplit]
  type = "snapshot"
  address = "$dir/root/grpc.socks"
END
        look() {
            printf '{"storage-driver": "%s"}' "$1" >/etc/docker/daemon.json
            "$program" doctor --root-dir "$dir/root" | grep -A3 ' Docker '
        }
        look rwsplit
        mkdir /run/containerd
        touch /run/containerd/containerd.sock
        look rws
        look rwsplit
        look overlay2
        cp "$(command -v sh)" "$dir/dockerd"
        cp "$(command -v sleep)" "$dir/containerd"
        "$dir/dockerd" -c '"$dir/containerd" 1000; :' &
        until pgrep -x containerd >/dev/null; do sleep 0.05; done
        look rwsplit
    "#;
    let said = run_apart(&disk, script);
    let verdicts: Vec<_> = said
        .lines()
        .filter(|line| line.split_whitespace().nth(1) == Some("Docker"))
        .collect();
    let begins = [
        "BAD   Docker      no containerd serves on",
        "BAD   Docker      Docker's storage-driver is \"rws\", but containerd has no",
        "ok    Docker      Docker uses this snapshotter",
        "note  Docker      Docker does not use this snapshotter",
        "BAD   Docker      Docker uses a containerd that it has started itself",
    ];
    assert_eq!(verdicts.len(), begins.len(), "{said}");
    for (verdict, begin) in verdicts.iter().zip(begins) {
        assert!(verdict.starts_with(begin), "{verdict}: {said}");
    }
}

#[registered(crate::Test)]
fn a_containerd_that_is_part_of_k3s_is_judged_by_its_file() {
    let disk = Disk::ext4(64);
    let script = r#"
        cd "$dir"
        mkdir upper work
        mount -t overlay -o "lowerdir=/var,upperdir=$dir/upper,workdir=$dir/work" overlay /var
        k3s=/var/lib/rancher/k3s/agent/etc/containerd
        mkdir -p "$k3s"
        look() {
            env PATH=/nowhere "$program" doctor --root-dir "$dir/root" || :
        }
        printf 'version = 3\n' >"$k3s/config.toml"
        look
        cat >>"$k3s/config.toml" <<END
[plugins."io.containerd.cri.v1.images"]
  snapshotter = "rwsplit"
[proxy_plugins.rwsplit]
  type = "snapshot"
  address = "$dir/root/grpc.socks"
END
        look
    "#;
    let said = run_apart(&disk, script);
    for words in [
        "config-v3.toml.tmpl",
        "BAD   plugin",
        "ok    plugin",
        "BAD   unpacking",
        "BAD   exports",
        "pods get this snapshotter",
    ] {
        assert!(said.contains(words), "{words}: {said}");
    }
}
