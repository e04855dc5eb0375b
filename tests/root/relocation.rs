//! Layers committed from containers, before, during and after their move.

use std::fs::{self, File, FileTimes};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, PermissionsExt, chown, lchown, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, sleep};
use std::time::{Duration, Instant, SystemTime};

use grpcio::RpcStatusCode;
use registered::registered;
use rustix::fs::{
    CWD, FallocateFlags, FileType, Mode, XattrFlags, fallocate, lsetxattr, mknodat, setxattr,
};

use crate::content::layer;
use crate::support::client::Client;
use crate::support::daemon::{Daemon, Split, command, is_empty};
use crate::support::device;
use crate::support::disk::Disk;
use crate::support::mounted::Mounted;
use crate::support::trees::describe;
use crate::support::until;

/// Whether layer `id` is a directory on the image volume.
fn is_home(root: &Path, id: u64) -> bool {
    fs::symlink_metadata(root.join(format!("snapshots/{id}"))).is_ok_and(|found| found.is_dir())
}

/// Prepares `key`, writes 2 MiB and a file, and commits it as `name`. Returns its id.
fn committed(client: &Client, key: &str, parent: &str, name: &str) -> u64 {
    let mounts = client.prepare(key, parent, &[]).unwrap();
    {
        let mounted = Mounted::new(&mounts);
        fs::write(mounted.path().join(format!("data-{name}")), data(name)).unwrap();
        fs::write(mounted.path().join("latest"), name).unwrap();
    }
    client.commit(key, name, &[]).unwrap();
    let mut options = mounts[0].options.iter();
    let upper = options.find_map(|option| option.strip_prefix("upperdir="));
    let upper = Path::new(upper.unwrap_or(&mounts[0].source));
    let number = upper.parent().and_then(Path::file_name).unwrap();
    number.to_str().unwrap().parse().unwrap()
}

fn data(name: &str) -> Vec<u8> {
    name.bytes().cycle().take(2 << 20).collect()
}

fn holds(top: &Path, name: &str) -> bool {
    fs::read(top.join(format!("data-{name}"))).unwrap() == data(name)
}

#[registered(crate::Test)]
fn a_layer_moves_home_under_a_running_container() {
    let split = Split::start(&["--relocate-after", "1"]);
    let client = split.client();
    layer(&client, "base", "", |top| {
        fs::write(top.join("a"), "a").unwrap()
    });
    committed(&client, "init-key", "base", "init");
    let container = Mounted::new(&client.prepare("web", "init", &[]).unwrap());
    let view = Mounted::new(&client.view("view", "init", &[]).unwrap());
    let before = describe(&container.path());
    let (root, old) = (split.root(), split.writable().join("snapshots/2"));
    assert!(!is_home(&root, 2));

    let is_done = AtomicBool::new(false);
    let rounds = thread::scope(|scope| {
        // A running container sees its files at every moment.
        let reader = scope.spawn(|| {
            let mut rounds = 0;
            while !is_done.load(Ordering::Relaxed) {
                assert!(holds(&container.path(), "init") && holds(&view.path(), "init"));
                assert_eq!(fs::read_to_string(container.path().join("a")).unwrap(), "a");
                assert!(describe(&container.path()) == before);
                rounds += 1;
            }
            rounds
        });
        // New mounts work at every moment.
        until("the layer is home", || {
            assert!(holds(&root.join("snapshots/2/fs"), "init"));
            is_home(&root, 2)
        });
        for number in 0..5 {
            let key = format!("other-{number}");
            let other = Mounted::new(&client.prepare(&key, "init", &[]).unwrap());
            assert!(holds(&other.path(), "init"));
            drop(other);
            client.remove(&key).unwrap();
        }
        is_done.store(true, Ordering::Relaxed);
        reader.join().unwrap()
    });
    assert!(rounds > 2, "{rounds} rounds");
    assert_eq!(
        device(root.join("snapshots/2/fs/data-init")),
        device(split.image.path())
    );
    assert!(
        split
            .daemon
            .log()
            .contains("layer \"init\" moved to the image volume")
    );

    assert!(
        holds(&old.join("fs"), "init"),
        "kept as long as it may be mounted"
    );
    client.cleanup().unwrap();
    drop(view);
    client.remove("view").unwrap();
    client.cleanup().unwrap();
    assert!(holds(&container.path(), "init") && old.exists());
    drop(container);
    client.remove("web").unwrap();
    until("it is gone with its last user", || {
        client.cleanup().unwrap();
        !old.exists()
    });
    client.cleanup().unwrap();
    assert!(is_empty(split.writable().join("trash")));
    assert!(holds(&root.join("snapshots/2/fs"), "init"));
    client.remove("init").unwrap();
    client.cleanup().unwrap();
    assert_eq!(fs::read_dir(root.join("snapshots")).unwrap().count(), 1);
}

#[registered(crate::Test)]
fn a_layer_without_users_leaves_nothing_behind() {
    let split = Split::start(&["--relocate-after", "0"]);
    let client = split.client();
    committed(&client, "key", "", "layer");
    until("the layer is home", || is_home(&split.root(), 1));
    until("its old place is empty", || {
        is_empty(split.writable().join("snapshots"))
    });
    assert!(holds(&split.root().join("snapshots/1/fs"), "layer"));
    assert_eq!(
        fs::read_dir(split.root().join("snapshots"))
            .unwrap()
            .count(),
        1
    );
    client.cleanup().unwrap();
    assert!(is_empty(split.writable().join("trash")) && is_empty(split.root().join("trash")));
}

/// Makes one entry of each kind, with unusual attributes.
fn fill_with_everything(top: &Path) {
    let path = |name: &str| top.join(name);
    let long_ago = SystemTime::UNIX_EPOCH + Duration::new(1_000_000_000, 123_456_789);
    let set = |name: &str, key: &str, value: &[u8]| {
        lsetxattr(path(name), key, value, XattrFlags::empty()).unwrap();
    };
    fs::create_dir_all(path("dir/below/deeper")).unwrap();
    fs::set_permissions(path("dir/below"), fs::Permissions::from_mode(0o1731)).unwrap();
    chown(path("dir/below"), Some(11), Some(12)).unwrap();
    set("dir", "trusted.overlay.opaque", b"y");
    set("dir", "user.empty", b"");
    fs::write(path("file"), "content").unwrap();
    fs::set_permissions(path("file"), fs::Permissions::from_mode(0o640)).unwrap();
    set("file", "user.large", &[7; 3000]);
    // cap_net_raw+ep and an ACL (user 1000: rw), in the kernel's form.
    fs::write(path("ping"), "x").unwrap();
    let capability = [
        1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    ];
    set("ping", "security.capability", &capability);
    fs::write(path("acl"), "x").unwrap();
    let mut acl = vec![2, 0, 0, 0];
    let any = u32::MAX;
    for (tag, perm, id) in [
        (1_u16, 6_u16, any),
        (2, 6, 1000),
        (4, 4, any),
        (0x10, 6, any),
        (0x20, 0, any),
    ] {
        acl.extend_from_slice(&tag.to_le_bytes());
        acl.extend_from_slice(&perm.to_le_bytes());
        acl.extend_from_slice(&id.to_le_bytes());
    }
    set("acl", "system.posix_acl_access", &acl);
    fs::write(path("setuid"), "x").unwrap();
    chown(path("setuid"), Some(5), Some(6)).unwrap();
    fs::set_permissions(path("setuid"), fs::Permissions::from_mode(0o6755)).unwrap();
    fs::hard_link(path("file"), path("dir/same-file")).unwrap();
    fs::hard_link(path("file"), path("dir/below/deeper/same-file")).unwrap();
    symlink("/etc/../nowhere/é", path("link")).unwrap();
    lchown(path("link"), Some(21), Some(22)).unwrap();
    set("link", "trusted.of-a-link", b"1");
    symlink("..", path("dir/up")).unwrap();
    let node = |name: &str, kind: FileType, mode: u32, device: u64| {
        mknodat(CWD, path(name), kind, Mode::from_raw_mode(mode), device).unwrap();
    };
    node("whiteout", FileType::CharacterDevice, 0, 0);
    node(
        "null",
        FileType::CharacterDevice,
        0o666,
        rustix::fs::makedev(1, 3),
    );
    node(
        "loop",
        FileType::BlockDevice,
        0o660,
        rustix::fs::makedev(7, 200),
    );
    node("fifo", FileType::Fifo, 0o622, 0);
    fs::hard_link(path("fifo"), path("same-fifo")).unwrap();
    drop(UnixListener::bind(path("socket")).unwrap());
    let sparse = File::create(path("sparse")).unwrap();
    sparse.write_all_at(&[1; 5000], 8 << 20).unwrap();
    sparse.write_all_at(&[2; 5000], 1 << 20).unwrap();
    sparse.set_len(64 << 20).unwrap();
    File::create(path("hole"))
        .unwrap()
        .set_len(3 << 20)
        .unwrap();
    File::create(path("empty")).unwrap();
    fs::write(
        top.join(std::ffi::OsStr::from_bytes(b"not \xff UTF-8\n")),
        "x",
    )
    .unwrap();
    fs::write(path(&"n".repeat(255)), "x").unwrap();
    let mut deep = path("deep");
    for _ in 0..30 {
        deep = deep.join("d".repeat(100));
    }
    fs::create_dir_all(&deep).unwrap();
    for name in ["file", "sparse", "dir/below/deeper", "dir/below", "dir"] {
        let times = FileTimes::new()
            .set_accessed(long_ago)
            .set_modified(long_ago);
        File::open(path(name)).unwrap().set_times(times).unwrap();
    }
    chown(top, Some(31), Some(32)).unwrap();
    setxattr(top, "user.top", b"top", XattrFlags::empty()).unwrap();
}

#[registered(crate::Test)]
fn the_copy_keeps_every_kind_of_inode() {
    let split = Split::start(&["--relocate-after", "1"]);
    let client = split.client();
    client.prepare("key", "", &[]).unwrap();
    let old = split.writable().join("snapshots/1/fs");
    fill_with_everything(&old);
    // The file system has allocated the data only after this.
    split.writable.sync();
    let before = describe(&old);
    assert!(before.len() > 40);
    client.commit("key", "layer", &[]).unwrap();
    until("the layer is home", || is_home(&split.root(), 1));
    let after = describe(&split.root().join("snapshots/1/fs"));
    assert_eq!(
        before.keys().collect::<Vec<_>>(),
        after.keys().collect::<Vec<_>>()
    );
    for (path, node) in &before {
        assert!(
            after[path] == *node,
            "{path:?}: was {node:?}, is {:?}",
            after[path]
        );
    }
    assert_eq!(
        fs::read_dir(split.root().join("snapshots/1"))
            .unwrap()
            .count(),
        1
    );
}

/// Kills the daemon at each of these steps of a move, and checks after the next
/// start that the layer is whole, moves, and leaves nothing.
fn check_kills(steps: &[&str], arguments: &[String], root: &Path, writable: &Path) {
    let mut daemon = Daemon::start(arguments);
    for (layers, step) in (1..).zip(steps) {
        daemon.stop();
        daemon.restart_to_die_at(step);
        let name = format!("layer-{step}");
        let client = daemon.client();
        let number = committed(&client, "key", "", &name);
        // The move begins by itself, a second after the answer to the commit.
        let status = daemon.wait();
        assert!(!status.success(), "{step}: {status}");
        assert!(daemon.log().contains(&format!("fault point {step}")));
        let link = root.join(format!("snapshots/{number}"));
        daemon.restart();
        assert!(holds(&link.join("fs"), &name), "{step}");
        until("the layer is home", || is_home(root, number));
        until("the old place is empty", || {
            is_empty(writable.join("snapshots"))
        });
        let top = fs::read_dir(&link).unwrap();
        let names: Vec<_> = top.map(|entry| entry.unwrap().file_name()).collect();
        assert!(
            names.iter().all(|name| name == "fs" || name == "work"),
            "{step}: {names:?}"
        );
        assert!(holds(&link.join("fs"), &name), "{step}");
        let entries = fs::read_dir(root.join("snapshots")).unwrap().count();
        assert_eq!(entries, layers, "{step}");
        assert!(!daemon.log().contains("is lost"), "{step}");
        daemon.client().cleanup().unwrap();
        assert!(
            is_empty(root.join("trash")) && is_empty(writable.join("trash")),
            "{step}"
        );
    }
}

#[registered(crate::Test)]
fn a_kill_at_any_step_leaves_a_whole_layer() {
    let (image, writable) = (Disk::ext4(256), Disk::ext4(256));
    let arguments = command(&image, &writable, &["--relocate-after", "1"]);
    let steps = [
        "begun",
        "copied",
        "durable",
        "exchanged",
        "recorded",
        "trashed",
    ];
    let (root, writable) = (image.path().join("root"), writable.path().join("writable"));
    check_kills(&steps, &arguments, &root, &writable);
}

#[registered(crate::Test)]
fn a_kill_at_any_step_of_a_rename_leaves_a_whole_layer() {
    let disk = Disk::ext4(256);
    let arguments = command(&disk, &disk, &["--relocate-after", "1"]);
    let (root, writable) = (disk.path().join("root"), disk.path().join("writable"));
    check_kills(
        &["renamed", "rename-exchanged", "rename-recorded"],
        &arguments,
        &root,
        &writable,
    );
}

#[registered(crate::Test)]
fn a_layer_waits_its_time() {
    let split = Split::start(&["--relocate-after", "3"]);
    let client = split.client();
    committed(&client, "key", "", "layer");
    let begun = Instant::now();
    // A layer that is removed before its time, as most layers of a build are.
    committed(&client, "key", "", "short");
    client.remove("short").unwrap();
    until("the layer is home", || is_home(&split.root(), 1));
    assert!(
        begun.elapsed() > Duration::from_millis(2500),
        "{:?}",
        begun.elapsed()
    );
    assert!(
        !split
            .daemon
            .log()
            .contains("\"short\" moved to the image volume")
    );
}

#[registered(crate::Test)]
fn a_small_layer_in_use_stays() {
    let split = Split::start(&["--relocate-after", "0"]);
    let client = split.client();
    client.prepare("init-key", "", &[]).unwrap();
    fs::write(split.writable().join("snapshots/1/fs/hosts"), "hosts").unwrap();
    // Prepared before the commit, so that the layer is in use from the
    // beginning.
    client.prepare("holder", "", &[]).unwrap();
    client.commit("init-key", "init", &[]).unwrap();
    let used = client.prepare("web", "init", &[]);
    if used.is_ok() && !is_home(&split.root(), 1) {
        until("it is put off", || {
            split.daemon.log().contains("\"init\" is put off") || is_home(&split.root(), 1)
        });
    }
    client.remove("web").unwrap();
    until("the layer is home", || is_home(&split.root(), 1));
}

#[registered(crate::Test)]
fn never_means_never() {
    let split = Split::start(&["--relocate", "never", "--relocate-after", "0"]);
    let client = split.client();
    committed(&client, "key", "", "layer");
    let uid = ("containerd.io/snapshot/uidmapping", "0:100000:65536");
    let gid = ("containerd.io/snapshot/gidmapping", "0:100000:65536");
    let (code, text) = client.prepare("mapped", "layer", &[uid, gid]).unwrap_err();
    assert_eq!(code, RpcStatusCode::FAILED_PRECONDITION);
    assert!(text.contains("--relocate never"), "{text}");
    assert!(!client.exists("mapped"));
    client.prepare("plain", "layer", &[]).unwrap();
    sleep(Duration::from_millis(500));
    assert!(!is_home(&split.root(), 1));
}

#[registered(crate::Test)]
fn a_full_image_volume_puts_a_move_off() {
    // How much of the layer fits, in percent.
    for share in [10, 50, 99] {
        // The database needs room of its own, so it is on the other disk.
        let (image, writable) = (Disk::ext4(256), Disk::ext4(256));
        let state_dir = format!("{}/state", writable.text());
        let flags = ["--relocate-after", "0", "--state-dir", &state_dir];
        let split = Split::on(image, writable, &flags);
        let client = split.client();
        let size: u64 = 32 << 20;
        let fill = split.image.path().join("fill");
        split.image.sync();
        let room = size * share / 100;
        let file = File::create(&fill).unwrap();
        let mut length = split.image.free() - room;
        // The file system needs some room itself to store such a large file,
        // and a failed try keeps what it got.
        while fallocate(&file, FallocateFlags::empty(), 0, length).is_err() {
            file.set_len(0).unwrap();
            split.image.sync();
            length -= 64 << 10;
        }
        client.prepare("key", "", &[]).unwrap();
        let old = split.writable().join("snapshots/1/fs/data");
        fs::write(&old, vec![9; usize::try_from(size).unwrap()]).unwrap();
        client.commit("key", "layer", &[]).unwrap();
        until("it is said", || {
            split.daemon.log().contains("stays on the writable volume")
        });
        assert!(!is_home(&split.root(), 1));
        assert_eq!(
            fs::read(split.root().join("snapshots/1/fs/data"))
                .unwrap()
                .len() as u64,
            size
        );
        drop(file);
        fs::remove_file(&fill).unwrap();
        // The room is there a moment later, because another test's process may still have
        // the file.
        until("the layer is home", || {
            client.cleanup().unwrap();
            is_home(&split.root(), 1)
        });
        let said = split
            .daemon
            .log()
            .matches("stays on the writable volume")
            .count();
        assert_eq!(said, 1, "one warning");
        let left = split.root().join("snapshots/.moving-1");
        until("the move has left nothing", || {
            left.symlink_metadata().is_err()
        });
    }
}

#[registered(crate::Test)]
fn what_the_target_refuses_stays_where_it_is() {
    // An attribute that is too large for an ext4 without large ones, and that
    // XFS on the other side supports. Here, one that fills more than a block.
    let image = Disk::make(64, "ext4", &["-q", "-F", "-b", "1024", "-I", "128"]);
    let writable = Disk::make(64, "ext4", &["-q", "-F", "-b", "4096"]);
    let daemon = Daemon::start(&command(&image, &writable, &["--relocate-after", "0"]));
    let client = daemon.client();
    client.prepare("key", "", &[]).unwrap();
    let file = writable.path().join("writable/snapshots/1/fs/file");
    fs::write(&file, vec![1; 2 << 20]).unwrap();
    setxattr(&file, "user.large", &[7; 3000], XattrFlags::empty()).unwrap();
    client.commit("key", "layer", &[]).unwrap();
    until("it is said", || {
        daemon.log().contains("stays on the writable volume")
    });
    let root = image.path().join("root");
    assert!(!is_home(&root, 1) && !root.join("snapshots/.moving-1").exists());
    let found = describe(&root.join("snapshots/1/fs/"));
    assert_eq!(found.len(), 2);
    assert!(file.exists());
}

#[registered(crate::Test)]
fn id_mapped_containers_bring_their_layers_home() {
    let split = Split::start(&["--relocate-after", "3600"]);
    let client = split.client();
    committed(&client, "key", "", "layer");
    assert!(!is_home(&split.root(), 1));
    let uid = ("containerd.io/snapshot/uidmapping", "0:100000:65536");
    let gid = ("containerd.io/snapshot/gidmapping", "0:100000:65536");
    client.prepare("mapped", "layer", &[uid, gid]).unwrap();
    assert!(is_home(&split.root(), 1));
    assert!(holds(&split.root().join("snapshots/1/fs"), "layer"));
}

#[registered(crate::Test)]
fn a_build_of_twenty_steps_keeps_every_step() {
    let split = Split::start(&["--relocate-after", "0"]);
    let client = split.client();
    let mut parent = String::new();
    for step in 0..20 {
        let name = format!("step-{step:02}");
        committed(&client, &format!("run-{step}"), &parent, &name);
        parent = name;
        let mounted = Mounted::new(&client.view("check", &parent, &[]).unwrap());
        for earlier in 0..=step {
            assert!(
                holds(&mounted.path(), &format!("step-{earlier:02}")),
                "{step} {earlier}"
            );
        }
        assert_eq!(
            fs::read_to_string(mounted.path().join("latest")).unwrap(),
            parent
        );
        drop(mounted);
        client.remove("check").unwrap();
        // A side branch that is removed.
        let side = format!("side-{step}");
        committed(&client, &side, &parent, &format!("{side}-layer"));
        client.remove(&format!("{side}-layer")).unwrap();
    }
    let homes = || {
        (1..=20)
            .filter(|step| is_home(&split.root(), step * 3 - 2))
            .count()
    };
    until("all are home", || homes() == 20);
    let mounted = Mounted::new(&client.prepare("web", &parent, &[]).unwrap());
    for step in 0..20 {
        assert!(holds(&mounted.path(), &format!("step-{step:02}")));
    }
    client.cleanup().unwrap();
    let left: Vec<PathBuf> = fs::read_dir(split.writable().join("snapshots"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    assert_eq!(left.len(), 1, "the container alone: {left:?}");
}

#[registered(crate::Test)]
fn left_bytes_go_with_the_next_boot() {
    let mut split = Split::start(&["--relocate-after", "0"]);
    let client = split.client();
    committed(&client, "key", "", "layer");
    let old = split.writable().join("snapshots/1");
    client.prepare("web", "layer", &[]).unwrap();
    until("the layer is home", || is_home(&split.root(), 1));
    if !old.exists() {
        // It had moved before the container came, so nothing is left behind.
        return;
    }
    split.daemon.stop();
    split.daemon.restart();
    assert!(old.exists(), "a restart is no boot");
    split.daemon.stop();
    let database = rusqlite::Connection::open(split.root().join("metadata.db")).unwrap();
    let changed = database
        .execute("UPDATE retired SET boot_id = 'another'", [])
        .unwrap();
    assert_eq!(changed, 1);
    drop(database);
    split.daemon.restart();
    assert!(!old.exists());
    assert!(holds(&split.root().join("snapshots/1/fs"), "layer"));
}

#[registered(crate::Test)]
fn one_file_system_needs_no_copy() {
    let disk = Disk::ext4(256);
    let daemon = Daemon::start(&command(&disk, &disk, &["--relocate-after", "1"]));
    let client = daemon.client();
    committed(&client, "key", "", "layer");
    let container = Mounted::new(&client.prepare("web", "layer", &[]).unwrap());
    let root = disk.path().join("root");
    until("the layer is home", || is_home(&root, 1));
    assert!(holds(&container.path(), "layer") && holds(&root.join("snapshots/1/fs"), "layer"));
    until("the move is logged", || {
        daemon.log().contains("0 bytes copied")
    });
    assert_eq!(
        fs::read_dir(disk.path().join("writable/snapshots"))
            .unwrap()
            .count(),
        1
    );
    assert!(holds(
        &Mounted::new(&client.prepare("other", "layer", &[]).unwrap()).path(),
        "layer"
    ));
}

/// Like `ctr snapshot commit` of a running container's snapshot.
#[registered(crate::Test)]
fn a_layer_committed_under_its_container_waits() {
    let split = Split::start(&["--relocate-after", "0"]);
    let client = split.client();
    let (root, old) = (split.root(), split.writable().join("snapshots"));
    layer(&client, "image", "", |top| {
        fs::write(top.join("a"), "a").unwrap()
    });
    committed(&client, "below-key", "image", "below");
    let running = Mounted::new(&client.prepare("web", "below", &[]).unwrap());
    fs::write(running.path().join("mine"), vec![2; 2 << 20]).unwrap();
    client.commit("web", "top", &[]).unwrap();
    until("it is put off", || {
        split.daemon.log().contains("\"top\" is put off")
    });
    // Each removal is a reason to look again.
    for number in 0..5 {
        let key = format!("other-{number}");
        client.prepare(&key, "", &[]).unwrap();
        client.remove(&key).unwrap();
        client.cleanup().unwrap();
        fs::write(running.path().join(&key), "still writing").unwrap();
        assert!(holds(&running.path(), "below"));
        assert_eq!(
            fs::read(running.path().join("mine")).unwrap(),
            vec![2; 2 << 20]
        );
    }
    assert!(!is_home(&root, 3) && old.join("3/fs/other-4").exists());
    drop(running);
    client.prepare("last", "", &[]).unwrap();
    client.remove("last").unwrap();
    until("it is home", || is_home(&root, 3));
    let mounted = Mounted::new(&client.view("view", "top", &[]).unwrap());
    let said = fs::read_to_string(mounted.path().join("other-4")).unwrap();
    assert_eq!(said, "still writing");
}
