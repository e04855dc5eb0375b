//! Limits: where they come from, and that they are enforced.

use std::fs::{self, File};
use std::os::unix::fs::symlink;

use grpcio::RpcStatusCode;
use overlay_read_write_splitting_snapshotter::quota::{Quotas, charge_file};
use overlay_read_write_splitting_snapshotter::types::{Limits, ProjectId};
use registered::registered;

use rustix::fd::AsFd;
use rustix::io::Errno;

use super::{
    Client, MAX_INODES, MAX_SIZE, MIB, Mounted, OWN_MAX_SIZE, Rig, disk, fill, is_refused, prepare,
    project, size_of_disk, upper, usage, walk,
};

const NEARLY: u64 = 9 * MIB;

#[registered(crate::quotas::Test)]
fn one_file_reaches_the_limit(rig: &mut Rig) {
    let daemon = rig.start(&[]);
    let client = daemon.client();
    let web = prepare(&client, "web", &[(OWN_MAX_SIZE, "10Mi")]);
    let other = prepare(&client, "other", &[]);
    assert_eq!(size_of_disk(&web), 10 * MIB, "df in the container");
    assert!(size_of_disk(&other) > 100 * MIB);

    let (written, is_full) = fill(&web.path().join("file"), 64 * MIB);
    assert!(
        is_full && (NEARLY..=10 * MIB).contains(&written),
        "{written}"
    );
    let (bytes, inodes) = usage(&client, "web");
    assert!((NEARLY..=10 * MIB).contains(&bytes), "{bytes}");
    assert!((4..=6).contains(&inodes), "{inodes}");
    assert!(disk(&web).f_bfree * disk(&web).f_frsize < MIB);
    let expected = match rig.is_xfs() {
        true => Errno::NOSPC,
        false => Errno::DQUOT,
    };
    let more = fs::write(web.path().join("more"), vec![1; MIB as usize]).unwrap_err();
    assert_eq!(Errno::from_io_error(&more), Some(expected));
    // On XFS, there may be no block for its name either.
    let _ = fs::remove_file(web.path().join("more"));
    // The disk itself is not full for containers with a higher limit.
    assert_eq!(
        fill(&other.path().join("file"), 32 * MIB),
        (32 * MIB, false)
    );

    fs::remove_file(web.path().join("file")).unwrap();
    let (written, is_full) = fill(&web.path().join("again"), 64 * MIB);
    assert!(is_full && written >= NEARLY, "{written}");
    drop((web, other));
    rig.clear(&client);
}

#[registered(crate::quotas::Test)]
fn many_files_reach_the_limit(rig: &mut Rig) {
    let daemon = rig.start(&[]);
    let client = daemon.client();
    let web = prepare(&client, "web", &[(MAX_SIZE, "10485760")]);
    fs::create_dir_all(web.path().join("a/b")).unwrap();
    let mut total = 0;
    let mut is_full = false;
    for number in 0..400 {
        let path = web.path().join(format!("a/b/{number}"));
        if rustix::fs::mknodat(
            rustix::fs::CWD,
            &path,
            rustix::fs::FileType::RegularFile,
            rustix::fs::Mode::from_raw_mode(0o600),
            0,
        )
        .is_err()
        {
            is_full = true;
            break;
        }
        let (written, ended) = fill(&path, 64 << 10);
        total += written;
        is_full |= ended;
        if ended {
            break;
        }
    }
    assert!(is_full && (NEARLY..=10 * MIB).contains(&total), "{total}");
    drop(web);
    rig.clear(&client);
}

#[registered(crate::quotas::Test)]
fn inodes_reach_the_limit(rig: &mut Rig) {
    let daemon = rig.start(&["--default-max-inodes", "200"]);
    let client = daemon.client();
    let (few, many) = (
        prepare(&client, "few", &[(MAX_INODES, "50")]),
        prepare(&client, "many", &[]),
    );
    for (mounted, limit) in [(&few, 50), (&many, 200)] {
        assert_eq!(disk(mounted).f_files, limit);
        let mut count = 0;
        while File::create(mounted.path().join(count.to_string())).is_ok() {
            count += 1;
            assert!(count <= limit, "{count}");
        }
        // Three directories of the snapshotter, and one or two of overlayfs.
        assert!(count >= limit - 6, "{count}");
    }
    drop((few, many));
    rig.clear(&client);
}

#[registered(crate::quotas::Test)]
fn labels_come_before_the_default(rig: &mut Rig) {
    let daemon = rig.start(&["--default-max-size", "20M"]);
    let client = daemon.client();
    let table: &[(&[(&str, &str)], u64)] = &[
        (&[], 20 * MIB),
        (&[(OWN_MAX_SIZE, "12M")], 12 * MIB),
        (&[(OWN_MAX_SIZE, "12M"), (MAX_SIZE, "8388608")], 8 * MIB),
    ];
    for (number, (labels, size)) in table.iter().enumerate() {
        let mounted = prepare(&client, &number.to_string(), labels);
        assert_eq!(size_of_disk(&mounted), *size, "{labels:?}");
    }
    let free = prepare(&client, "free", &[(OWN_MAX_SIZE, "0")]);
    assert!(size_of_disk(&free) > 100 * MIB);
    drop(free);
    // An unpack is on the image volume and has no limit, whatever its labels are.
    let volume = "containerd.io/snapshot/overlay-read-write-splitting.volume";
    let labels = [(volume, "writable"), (MAX_SIZE, "1048576")];
    let unpack = Mounted::new(&client.prepare("extract-1", "base", &labels).unwrap());
    assert!(size_of_disk(&unpack) > 100 * MIB);
    drop(unpack);
    // A view takes nothing, and a container on the image volume has no limit.
    client
        .view("view", "base", &[(OWN_MAX_SIZE, "1M")])
        .unwrap();
    is_refused(
        client.prepare(
            "on-image",
            "base",
            &[(volume, "image"), (OWN_MAX_SIZE, "1M")],
        ),
        RpcStatusCode::FAILED_PRECONDITION,
        &["image volume"],
    );
    rig.clear(&client);
}

#[registered(crate::quotas::Test)]
fn a_pod_can_only_lower_the_default(rig: &mut Rig) {
    let daemon = rig.start(&["--default-max-size", "20M"]);
    let client = daemon.client();
    let table: &[(&[(&str, &str)], u64)] = &[
        (&[(OWN_MAX_SIZE, "0"), (MAX_INODES, "0")], 20),
        (&[(OWN_MAX_SIZE, "12M")], 20),
        (&[(MAX_SIZE, "8388608"), (OWN_MAX_SIZE, "12M")], 8),
        (&[(MAX_SIZE, "41943040")], 20),
        (&[(MAX_SIZE, "40M")], 20),
        (&[(MAX_SIZE, "0")], 1),
        (&[(MAX_SIZE, "5")], 1),
    ];
    for (number, (labels, mib)) in table.iter().enumerate() {
        let key = format!("k8s.io/{number}/sandbox");
        let mounted = prepare(&client, &key, labels);
        assert_eq!(size_of_disk(&mounted), mib * MIB, "{labels:?}");
    }
    let field = format!("labels.{MAX_SIZE}");
    let set = |size: &str| client.update("k8s.io/0/sandbox", &[&field], &[(MAX_SIZE, size)]);
    set("4194304").unwrap();
    let mounted = Mounted::new(&client.mounts("k8s.io/0/sandbox").unwrap());
    assert_eq!(size_of_disk(&mounted), 4 * MIB);
    drop(mounted);
    set("41943040").unwrap();
    let mounted = Mounted::new(&client.mounts("k8s.io/0/sandbox").unwrap());
    assert_eq!(size_of_disk(&mounted), 20 * MIB);
    drop(mounted);
    rig.clear(&client);
}

#[registered(crate::quotas::Test)]
fn wrong_labels_leave_no_trace(rig: &mut Rig) {
    let daemon = rig.start(&[]);
    let client = daemon.client();
    for labels in [
        [(MAX_SIZE, "10G")],
        [(MAX_SIZE, "-1")],
        [(OWN_MAX_SIZE, "ten")],
        [(OWN_MAX_SIZE, "1K")],
        [(MAX_INODES, "1.5")],
    ] {
        let words = [labels[0].0, labels[0].1, "has to be"];
        let invalid = RpcStatusCode::INVALID_ARGUMENT;
        is_refused(client.prepare("web", "base", &labels), invalid, &words);
        is_refused(client.view("web", "base", &labels), invalid, &words);
    }
    let limited = [(OWN_MAX_SIZE, "1M")];
    is_refused(
        client.prepare("web", "missing", &limited),
        RpcStatusCode::NOT_FOUND,
        &[],
    );
    assert_eq!(client.names(&[]).unwrap(), ["base"]);
    assert_eq!(rig.projects(), []);
}

#[registered(crate::quotas::Test)]
fn an_update_counts_at_once(rig: &mut Rig) {
    let mut daemon = rig.start(&["--default-max-size", "8M"]);
    let client = daemon.client();
    let web = prepare(&client, "web", &[]);
    let file = web.path().join("file");
    let (written, is_full) = fill(&file, 64 * MIB);
    assert!(is_full && written <= 8 * MIB, "{written}");

    let field = format!("labels.{OWN_MAX_SIZE}");
    let set = |size: &str| client.update("web", &[&field], &[(OWN_MAX_SIZE, size)]);
    set("16Mi").unwrap();
    assert_eq!(size_of_disk(&web), 16 * MIB);
    let (written, is_full) = fill(&file, 64 * MIB);
    assert!(
        is_full && (15 * MIB..=16 * MIB).contains(&written),
        "{written}"
    );

    // A limit below the present usage: nothing is lost, and nothing can be
    // added.
    set("4M").unwrap();
    assert_eq!(file.metadata().unwrap().len(), written);
    assert_eq!(fill(&web.path().join("more"), MIB), (0, true));
    is_refused(set("4X"), RpcStatusCode::INVALID_ARGUMENT, &["4X"]);
    assert_eq!(client.stat("web").unwrap().labels[OWN_MAX_SIZE], "4M");
    assert_eq!(size_of_disk(&web), 4 * MIB);

    // Other labels change nothing. Without its label, the limit is the default.
    client
        .update("web", &["labels.other"], &[("other", "x")])
        .unwrap();
    assert_eq!(size_of_disk(&web), 4 * MIB);
    set("").unwrap();
    assert_eq!(size_of_disk(&web), 8 * MIB);
    set("6M").unwrap();

    daemon.stop();
    daemon.set_arguments(rig.arguments(&["--default-max-size", "9M"]));
    daemon.restart();
    let client = daemon.client();
    assert_eq!(size_of_disk(&web), 6 * MIB);
    // Another default counts for containers that are created from now on.
    client
        .update("web", &["labels.other"], &[("other", "y")])
        .unwrap();
    assert_eq!(size_of_disk(&web), 6 * MIB);
    drop(web);

    // A change of one limit does not change the other.
    let plain = prepare(&client, "plain", &[]);
    assert_eq!(size_of_disk(&plain), 9 * MIB);
    daemon.stop();
    let flags = ["--default-max-size", "3M", "--default-max-inodes", "100"];
    daemon.set_arguments(rig.arguments(&flags));
    daemon.restart();
    let client = daemon.client();
    let set = |label: &str, value: &str| {
        let field = format!("labels.{label}");
        client.update("plain", &[&field], &[(label, value)])
    };
    set(MAX_INODES, "1000").unwrap();
    assert_eq!(size_of_disk(&plain), 9 * MIB);
    assert_eq!(disk(&plain).f_files, 1000);
    set(OWN_MAX_SIZE, "5M").unwrap();
    assert_eq!(size_of_disk(&plain), 5 * MIB);
    assert_eq!(disk(&plain).f_files, 1000);
    drop(plain);
    rig.clear(&client);
}

#[registered(crate::quotas::Test)]
fn usage_is_what_a_walk_finds(rig: &mut Rig) {
    let daemon = rig.start(&[]);
    let client = daemon.client();
    let web = prepare(&client, "web", &[]);
    let top = web.path();
    for directory in 0..20 {
        let below = top.join(format!("{directory}/a/b"));
        fs::create_dir_all(&below).unwrap();
        for file in 0..20_usize {
            fs::write(below.join(file.to_string()), vec![1; file * 3000]).unwrap();
        }
        fs::hard_link(below.join("7"), below.join("same")).unwrap();
        symlink("/nowhere", below.join("link")).unwrap();
        let sparse = File::create(below.join("sparse")).unwrap();
        sparse.set_len(1 << 30).unwrap();
    }
    drop(web);
    rustix::fs::sync();
    let (bytes, inodes) = usage(&client, "web");
    let (walked_bytes, walked_inodes) = walk(&upper(&client, "web"));
    // `<id>`, `work`, and what overlayfs has created in it.
    assert!(
        (2..=4).contains(&(inodes - walked_inodes)),
        "{inodes} {walked_inodes}"
    );
    assert!(bytes - walked_bytes <= 4 * 4096, "{bytes} {walked_bytes}");
    rig.clear(&client);
}

/// Another program uses the first id, and keeps it.
fn the_second_id_is_given(rig: &Rig, client: &Client) {
    client
        .prepare("web", "base", &[(OWN_MAX_SIZE, "1M")])
        .unwrap();
    assert_eq!(project(&rig.newest()), rig.ids().first().number() + 1);
    client.remove("web").unwrap();
    rig.projects_are_left(client, 1);
}

#[registered(crate::quotas::Test)]
fn a_project_of_others_is_passed_over(rig: &mut Rig) {
    let daemon = rig.start(&[]);
    let client = daemon.client();
    let theirs = rig.writable().join("theirs");
    fs::create_dir(&theirs).unwrap();
    let directory = File::open(&theirs).unwrap();
    let first = rig.ids().first();
    overlay_read_write_splitting_snapshotter::quota::set_project(&directory, first).unwrap();
    the_second_id_is_given(rig, &client);
    let held = rig.projects();
    assert_eq!((held[0].0, held[0].1.limits), (first, Limits::NONE));
    fs::remove_dir(&theirs).unwrap();
}

/// An administrator has set a limit for files to come.
#[registered(crate::quotas::Test)]
fn a_limit_of_others_stays(rig: &mut Rig) {
    let daemon = rig.start(&[]);
    let client = daemon.client();
    let first = rig.ids().first();
    let theirs = Limits {
        max_bytes: Some(64 * MIB),
        max_inodes: None,
    };
    let set = |limits| {
        let directory = File::open(&rig.writable).unwrap();
        let quotas = Quotas::probe(directory.as_fd()).unwrap().unwrap();
        quotas.set_limits(first, limits).unwrap();
    };
    set(theirs);
    the_second_id_is_given(rig, &client);
    assert_eq!(rig.projects()[0].1.limits, theirs);
    set(Limits::NONE);
    rig.clear(&client);
}

/// The host's root in a container has put its files into the next projects.
#[registered(crate::quotas::Test)]
fn projects_taken_by_a_container_refuse_nobody(rig: &mut Rig) {
    let daemon = rig.start(&[]);
    let client = daemon.client();
    let web = prepare(&client, "web", &[]);
    let first = rig.ids().first().number();
    // More ids than are tried.
    let taken = first + 1..=first + 5000;
    for number in taken.clone() {
        let file = File::create(web.path().join(number.to_string())).unwrap();
        charge_file(&file, ProjectId::new(number)).unwrap();
    }
    for key in ["one", "two"] {
        client.prepare(key, "base", &[]).unwrap();
        let found = project(&rig.newest());
        assert!(rig.ids().contains(ProjectId::new(found)));
        assert!(!taken.contains(&found), "{found}");
    }
    drop(web);
    rig.clear(&client);
}

/// What docs/limits.md says about processes that a limit does not bind.
#[registered(crate::quotas::Test)]
fn who_is_not_bound_is_as_described(rig: &mut Rig) {
    let daemon = rig.start(&[]);
    let client = daemon.client();
    let limited = [(OWN_MAX_SIZE, "4M")];
    let web = prepare(&client, "web", &limited);
    // Without the overlay, with CAP_SYS_RESOURCE.
    let (written, is_full) = fill(&upper(&client, "web").join("by-host"), 8 * MIB);
    assert_eq!(is_full, rig.is_xfs(), "{written}");
    fs::remove_file(upper(&client, "web").join("by-host")).unwrap();
    // `chattr -p 0` of the host's root in the container.
    let (written, is_full) = fill(&web.path().join("file"), 3 * MIB);
    assert_eq!((written, is_full), (3 * MIB, false));
    let file = File::open(web.path().join("file")).unwrap();
    charge_file(&file, ProjectId::NONE).unwrap();
    assert_eq!(fill(&web.path().join("more"), 3 * MIB), (3 * MIB, false));
    assert!(usage(&client, "web").0 < 4 * MIB);
    drop((web, file));
    // Its files are deleted with the rest.
    rig.clear(&client);
}
