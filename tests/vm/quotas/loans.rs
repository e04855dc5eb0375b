//! Loans of room to a full container for its mount.

use std::fs;
use std::thread::sleep;
use std::time::Duration;

use registered::registered;
use rustix::fs::StatVfsMountFlags;

use super::{
    Client, MAX_INODES, MIB, Mounted, OWN_MAX_SIZE, Rig, disk, fill, prepare, until, usage,
};

/// Each mount creates overlayfs's work directory again, which takes room for a moment.
#[registered(crate::quotas::Test)]
fn a_full_container_starts_again(rig: &mut Rig) {
    let daemon = rig.start(&[]);
    let client = daemon.client();
    for (key, label) in [
        ("bytes", (OWN_MAX_SIZE, "4M")),
        ("inodes", (MAX_INODES, "50")),
    ] {
        let mut mounted = prepare(&client, key, &[label]);
        let limits = rig.projects().last().unwrap().1.limits;
        for _ in 0..3 {
            fill_all(&mounted);
            drop(mounted);
            mounted = again(&client, key);
            assert!(!is_read_only(&mounted), "{key}");
            fs::remove_file(mounted.path().join("1")).unwrap();
            until("the limits are as they were", || {
                rig.projects().last().unwrap().1.limits == limits
            });
        }
        // Also if an update has left a limit far below the present usage.
        fill_all(&mounted);
        drop(mounted);
        let (name, value) = match key {
            "bytes" => (OWN_MAX_SIZE, "2M"),
            _ => (MAX_INODES, "20"),
        };
        let field = format!("labels.{name}");
        client.update(key, &[&field], &[(name, value)]).unwrap();
        assert!(!is_read_only(&again(&client, key)), "{key}");
    }
    rig.clear(&client);
}

#[registered(crate::quotas::Test)]
fn a_loan_ends_with_the_daemon(rig: &mut Rig) {
    let mut daemon = rig.start(&[]);
    let client = daemon.client();
    let mounted = prepare(&client, "web", &[(OWN_MAX_SIZE, "4M")]);
    fill_all(&mounted);
    drop(mounted);
    let limit = |rig: &Rig| rig.projects()[0].1.limits.max_bytes.unwrap();
    // The mounts are not mounted.
    client.mounts("web").unwrap();
    assert!(limit(rig) > 4 * MIB);
    daemon.kill();
    daemon.restart();
    assert_eq!(limit(rig), 4 * MIB);
    rig.clear(&daemon.client());
}

#[registered(crate::quotas::Test)]
fn the_least_limits_will_do(rig: &mut Rig) {
    let daemon = rig.start(&[]);
    let client = daemon.client();
    let least = [(OWN_MAX_SIZE, "1M"), (MAX_INODES, "16")];
    let web = prepare(&client, "web", &least);
    assert!(!is_read_only(&web));
    fs::create_dir(web.path().join("proc")).unwrap();
    fs::write(web.path().join("file"), vec![1; 100_000]).unwrap();
    drop(web);
    assert!(!is_read_only(&again(&client, "web")));
    rig.clear(&client);
}

/// Creates as many files as possible, with as much data as possible.
fn fill_all(mounted: &Mounted) {
    for number in 0..60 {
        fill(&mounted.path().join(number.to_string()), MIB);
    }
}

fn again(client: &Client, key: &str) -> Mounted {
    Mounted::new(&client.mounts(key).unwrap())
}

fn is_read_only(mounted: &Mounted) -> bool {
    disk(mounted).f_flag.contains(StatVfsMountFlags::RDONLY)
}

/// What a container writes as soon as it runs, at each start. A runtime takes longer than
/// this from the mount to the container's program.
#[registered(crate::quotas::Test)]
fn loans_do_not_add_up(rig: &mut Rig) {
    let daemon = rig.start(&[]);
    let client = daemon.client();
    let limits = [(OWN_MAX_SIZE, "4M"), (MAX_INODES, "50")];
    let mut mounted = prepare(&client, "web", &limits);
    fill_all(&mounted);
    for start in 100..106 {
        drop(mounted);
        mounted = again(&client, "web");
        assert!(!is_read_only(&mounted), "start {start}");
        sleep(Duration::from_millis(250));
        for file in 0..20 {
            let _ = fs::create_dir(mounted.path().join(format!("{start}-{file}")));
        }
        fill(&mounted.path().join("0"), 8 * MIB);
    }
    drop(mounted);
    let (bytes, inodes) = usage(&client, "web");
    assert!(bytes <= 4 * MIB + (512 << 10), "{bytes}");
    assert!(inodes <= 50 + 8, "{inodes}");
    rig.clear(&client);
}

#[registered(crate::quotas::Test)]
fn nothing_is_lent_while_it_is_mounted(rig: &mut Rig) {
    let daemon = rig.start(&[]);
    let client = daemon.client();
    let mounted = prepare(&client, "web", &[(OWN_MAX_SIZE, "4M")]);
    fill_all(&mounted);
    client.mounts("web").unwrap();
    assert_eq!(rig.projects()[0].1.limits.max_bytes, Some(4 * MIB));
    drop(mounted);
    client.mounts("web").unwrap();
    assert_eq!(
        rig.projects()[0].1.limits.max_bytes,
        Some(4 * MIB + (512 << 10))
    );
    rig.clear(&client);
}
