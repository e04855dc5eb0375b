//! The command line.

use std::time::Duration;

use super::*;
use crate::error::ErrorKind;
use crate::volume::Reserve;

fn run(arguments: &[&str]) -> Result<Config> {
    match parse(arguments.iter().map(OsString::from).collect())? {
        Parsed::Run(config, Command::Serve) => Ok(*config),
        other => panic!("{other:?}"),
    }
}

fn checked(arguments: &[&str]) -> CheckOptions {
    match parse(arguments.iter().map(OsString::from).collect()).unwrap() {
        Parsed::Run(_, Command::Check(options)) => options,
        other => panic!("{other:?}"),
    }
}

fn refused(arguments: &[&str]) -> String {
    let error = run(arguments).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    let text = error.chain();
    assert_eq!(text.lines().count(), 1, "{text}");
    text
}

#[test]
fn defaults_are_the_originals() {
    let config = run(&[]).unwrap();
    assert_eq!(&*config.root, DEFAULT_ROOT);
    assert_eq!(*config.writable, format!("{DEFAULT_ROOT}/writable"));
    assert_eq!(config.state_dir, DEFAULT_ROOT);
    assert_eq!(config.address, format!("{DEFAULT_ROOT}/grpc.socks"));
    assert!(!config.options.removes_at_once);
    assert!(!config.options.shows_upperdir);
    assert_eq!(config.options.sync, SyncMode::AtCommit);
    let after = Duration::from_secs(60);
    assert_eq!(
        config.options.relocation,
        Relocation::Background {
            after,
            keeps_small: true
        }
    );
    assert!((8..=16).contains(&config.threads));
}

#[test]
fn both_ways_to_give_a_value_mean_the_same() {
    let apart = run(&[
        "--root-dir",
        "/a/",
        "--async-remove",
        "false",
        "--upperdir-label",
        "true",
        "--mount-option",
        "xino=auto",
        "--mount-option",
        "metacopy=on",
        "--threads",
        "3",
    ]);
    let joined = run(&[
        "--root-dir=/a",
        "--async-remove=false",
        "--upperdir-label",
        "--mount-option=xino=auto",
        "--mount-option=metacopy=on",
        "--threads=3",
    ]);
    let apart = apart.unwrap();
    assert_eq!(&*apart.root, "/a");
    assert_eq!(apart.options.mount_options, ["xino=auto", "metacopy=on"]);
    assert!(apart.options.shows_upperdir);
    assert!(apart.options.removes_at_once);
    assert_eq!(apart, joined.unwrap());
    let alone = run(&["--async-remove", "--root-dir", "/a"]).unwrap();
    assert!(!alone.options.removes_at_once);
}

#[test]
fn only_the_labels_of_pods_have_to_be_trusted() {
    assert_eq!(run(&[]).unwrap().options.pod_labels, PodLabels::Ignored);
    let config = run(&["--trust-labels-from=k8s.io"]).unwrap();
    assert_eq!(config.options.pod_labels, PodLabels::Trusted);
    for other in ["moby", "", "*", "k8s.io/"] {
        let text = refused(&["--trust-labels-from", other]);
        assert!(text.contains("it has to be \"k8s.io\""), "{text}");
    }
}

#[test]
fn paths_that_could_inject_mount_options_are_refused() {
    for path in ["/a,b", "/a:b", "/a\\b", "/a\nb", "", "/", "/a/../b"] {
        for flag in ["--root-dir", "--writable-dir", "--state-dir", "--address"] {
            let text = refused(&[flag, path]);
            assert!(text.contains(flag), "{text}");
        }
    }
    run(&["--root-dir", "/with blank/é"]).unwrap();
}

#[test]
fn directories_do_not_lie_in_each_others_own() {
    for pair in [
        ["--root-dir=/a", "--writable-dir=/a"],
        ["--root-dir=/a", "--writable-dir=/a/snapshots"],
        ["--root-dir=/a", "--writable-dir=/a/trash/x"],
        ["--root-dir=/a/snapshots/x", "--writable-dir=/a"],
        ["--root-dir=/a", "--state-dir=/a/snapshots"],
    ] {
        let text = refused(&pair);
        assert!(text.contains("/a"), "{text}");
    }
    run(&["--root-dir=/a", "--writable-dir=/a/fast"]).unwrap();
    run(&["--root-dir=/a", "--writable-dir=/ab"]).unwrap();
    run(&["--root-dir=/a", "--writable-dir=/b", "--state-dir=/b"]).unwrap();
    run(&["--root-dir=/a", "--writable-dir=/b", "--state-dir=/b/db"]).unwrap();
}

#[test]
fn options_that_are_not_ours_to_give_are_refused() {
    for option in [
        "lowerdir=/x",
        "upperdir=/x",
        "workdir",
        "a,b",
        "",
        "=x",
        "a b",
        "uidmap=0:0:1",
        "volatile",
        "volatile=on",
        "fsync=volatile",
    ] {
        let text = refused(&["--mount-option", option]);
        assert!(text.contains("--mount-option"), "{text}");
    }
}

#[test]
fn nonsense_is_refused_in_one_line() {
    refused(&["--threads", "many"]);
    refused(&["--sync", "sometimes"]);
    refused(&["--relocate", "sometimes"]);
    refused(&["--mount-option", "index=on"]);
    run(&["--mount-option", "index=on", "--relocate", "never"]).unwrap();
    refused(&["stray"]);
    let long = format!("/{}", "a".repeat(107));
    refused(&["--address", &long]);
    refused(&["--root-dir", &long]);
    // A command does not check the address, because it needs no socket.
    assert_eq!(
        checked(&["check", "--root-dir", &long]).format,
        Format::Human
    );
}

#[test]
fn host_directories_are_off_unless_allowed() {
    let usual = run(&[]).unwrap();
    let options = usual.options;
    assert!(options.lowers.allowed.is_empty() && options.lower_rules.is_empty());
    let config = run(&[
        "--allow-lower=/srv/cache/",
        "--allow-lower",
        "/opt/a b",
        "--lower-for=reg:5000/x:*=/srv/cache/npm:/opt/a b",
        "--lower-for",
        "*=/srv/cache",
    ])
    .unwrap();
    assert_eq!(config.options.lowers.allowed, ["/srv/cache", "/opt/a b"]);
    let [first, second] = config.options.lower_rules.as_slice() else {
        panic!("{:?}", config.options.lower_rules);
    };
    assert_eq!(first.paths(), ["/srv/cache/npm", "/opt/a b"]);
    assert!(first.matches("reg:5000/x:1") && second.matches("any"));
    for wrong in [
        &["--allow-lower", "/a,b"][..],
        &["--allow-lower", "/"],
        &["--allow-lower", "/a/../b"],
        &["--lower-for", "*=/srv"],
        &["--allow-lower=/srv", "--lower-for=*=/srvx"],
        &["--allow-lower=/srv", "--lower-for=/srv"],
        &["--allow-lower=/srv", "--lower-for=*=/srv/a,b"],
        &["--allow-lower=/srv", "--mount-option", "metacopy=on"],
    ] {
        refused(wrong);
    }
}

#[test]
fn guards_are_off_unless_asked_for() {
    let usual = run(&[]).unwrap();
    assert!(!usual.requires_mounts);
    assert_eq!(usual.writable_lifetime, Lifetime::Lasting);
    assert_eq!(usual.options.reserve, Reserve::Bytes(0));
    let guarded = run(&["--require-mount", "--writable-volatile", "--reserve=5%"]).unwrap();
    assert!(guarded.requires_mounts);
    assert_eq!(guarded.writable_lifetime, Lifetime::UntilReboot);
    assert_eq!(guarded.options.reserve, Reserve::Percent(5));
    assert!(refused(&["--reserve", "much"]).contains("--reserve"));
}

#[test]
fn check_takes_the_daemons_flags_in_any_order() {
    let plain = CheckOptions {
        format: Format::Human,
        depth: Depth::Counts,
        containerd_address: "/run/containerd/containerd.sock".to_owned(),
        mending: Mending::Never,
        resets_writable: false,
    };
    assert_eq!(checked(&["check"]), plain);
    assert_eq!(
        checked(&["--root-dir", "/a", "check", "--sync=none"]),
        plain
    );
    assert_eq!(checked(&["check", "--json"]).format, Format::Json);
    let asking = checked(&["check", "--repair", "--root-dir=/a"]);
    assert_eq!(asking.mending, Mending::AfterAsking);
    let all = checked(&["check", "--reset-writable", "--yes", "--json"]);
    assert_eq!(all.mending, Mending::AtOnce);
    assert!(all.resets_writable);
    assert_eq!(checked(&["check", "--deep"]).depth, Depth::Content);
    let heal = checked(&["check", "--deep", "--heal", "--containerd-address", "/c"]);
    assert_eq!(heal.depth, Depth::Heal);
    assert_eq!(heal.containerd_address, "/c");
    for mistake in [
        &["chekc"][..],
        &["check", "check"],
        &["check", "now"],
        &["--json"],
        &["--repair"],
        &["--yes"],
        &["--reset-writable"],
        &["check", "--yes"],
        &["check", "--json", "--repair"],
        &["check", "--heal", "--repair"],
        &["check", "--deep", "--reset-writable"],
        &["check", "--heal", "--yes"],
        &["check", "--containerd-address=/c"],
        &["status", "--deep"],
        &["status", "--repair"],
        &["status", "check"],
    ] {
        refused(mistake);
    }
}

#[test]
fn status_is_a_command() {
    let parsed = |arguments: &[&str]| parse(arguments.iter().map(OsString::from).collect());
    assert!(matches!(
        parsed(&["--root-dir=/a", "status"]),
        Ok(Parsed::Run(_, Command::Status(Format::Human)))
    ));
    assert!(matches!(
        parsed(&["status", "--json"]),
        Ok(Parsed::Run(_, Command::Status(Format::Json)))
    ));
}

#[test]
fn the_version_is_printed() {
    match parse(vec!["--version".into()]).unwrap() {
        Parsed::Print(text) => assert!(text.contains(env!("CARGO_PKG_VERSION")), "{text}"),
        other => panic!("{other:?}"),
    }
}

/// The flags in a text.
fn flags_in(text: &str) -> Vec<&str> {
    let words = text.split(|c: char| c != '-' && !c.is_ascii_alphanumeric());
    let is_flag = |word: &&str| word.len() > 2 && word.starts_with("--");
    let mut flags: Vec<_> = words.filter(is_flag).collect();
    flags.sort();
    flags
}

/// All flags, including those that every program has.
fn all_flags() -> Vec<&'static str> {
    let mut flags: Vec<_> = FLAGS.iter().map(|flag| flag.name).collect();
    flags.extend(["--help", "--version"]);
    flags.sort();
    flags
}

#[test]
fn help_fits_a_screen() {
    for word in ["--help", "-h", "help"] {
        match parse(vec![word.into()]).unwrap() {
            Parsed::Print(text) => assert_eq!(text, HELP),
            other => panic!("{other:?}"),
        }
    }
    assert!((24..=40).contains(&HELP.lines().count()));
    assert!(HELP.lines().all(|line| line.chars().count() <= 80));
    let known = all_flags();
    for flag in flags_in(HELP) {
        assert!(
            known.contains(&flag),
            "--help has {flag}, the program does not"
        );
    }
    for flag in FLAGS.iter().filter(|flag| !flag.commands.is_empty()) {
        let is_named = HELP.contains(flag.name) || flag.name == "--containerd-config";
        assert!(
            is_named || flag.name == "--leave-out-missing",
            "{}",
            flag.name
        );
    }
}

#[test]
fn every_flag_is_in_the_manual_once() {
    const MANUAL: &str =
        include_str!("../../packaging/overlay-read-write-splitting-snapshotter.8.md");
    let lines: Vec<_> = MANUAL.lines().collect();
    // An entry is a line of its own.
    let is_entry = |lines: &&[&str]| matches!(lines, ["", line, ""] if line.starts_with("**--"));
    let entries = lines.windows(3).filter(is_entry).map(|lines| lines[1]);
    let mut flags: Vec<_> = entries.flat_map(flags_in).collect();
    flags.sort();
    assert_eq!(flags, all_flags());
}

#[test]
fn flags_that_there_are_not_and_values_that_they_do_not_take_are_named() {
    for (arguments, said) in [
        (&["--no-such-flag"][..], "there is no flag --no-such-flag"),
        (&["-x"], "there is no flag -x"),
        (&["---\n"], "there is no flag ---\\n"),
        (&["--root-dir"], "--root-dir needs a value"),
        (
            &["--root-dir=/a", "--root-dir", "/b"],
            "--root-dir is given twice",
        ),
        (&["--require-mount=yes"], "--require-mount takes no value"),
        (&["--quota", "on"], "\"auto\", \"require\" or \"off\""),
        (&["--async-remove=maybe"], "--async-remove is \"maybe\""),
        (&["--threads", "0"], "--threads is \"0\""),
        (&["--relocate-after", "-1"], "--relocate-after is \"-1\""),
    ] {
        let text = refused(arguments);
        assert!(text.contains(said), "{text}");
    }
}

#[test]
fn flags_of_the_daemon_are_noticed() {
    let have = |arguments: &[&str]| {
        have_daemon_flags(&arguments.iter().map(OsString::from).collect::<Vec<_>>())
    };
    assert!(have(&["check", "--root-dir", "/a"]) && have(&["--sync=none", "status"]));
    assert!(!have(&["check", "--repair", "--yes", "--json"]) && !have(&[]));
    assert!(!have(&["mount", "key", "/mnt", "--read-only"]));
}

#[test]
fn import_takes_the_daemons_flags_and_its_own() {
    let imported = |arguments: &[&str]| {
        let arguments = arguments.iter().map(Into::into).collect();
        match parse(arguments).unwrap() {
            Parsed::Run(config, Command::Import(options)) => (config.root.to_string(), options),
            other => panic!("{other:?}"),
        }
    };
    let (root, plain) = imported(&["import", "--root-dir", "/a", "--sync=none"]);
    assert_eq!(root, "/a");
    assert_eq!(plain.format, Format::Human);
    assert_eq!(plain.task, ImportTask::Import);
    assert_eq!(imported(&["--dry-run", "import"]).1.task, ImportTask::Look);
    let (_, undo) = imported(&["import", "--undo", "--json"]);
    assert_eq!((undo.task, undo.format), (ImportTask::Undo, Format::Json));
    assert!(!plain.leaves_out_missing);
    let (_, without) = imported(&["import", "--leave-out-missing"]);
    assert!(without.leaves_out_missing);
    for mistake in [
        &["import", "check"][..],
        &["import", "--repair"],
        &["import", "--yes"],
        &["import", "--undo", "--dry-run"],
        &["import", "--undo", "--leave-out-missing"],
        &["check", "--leave-out-missing"],
        &["--undo"],
        &["check", "--undo"],
        &["check", "--dry-run"],
    ] {
        refused(mistake);
    }
}
