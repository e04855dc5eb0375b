//! Disks that are completely full, or have no inode left: each request is done
//! or refused as a whole, the daemon keeps running and can be started, and
//! removing makes room again.
//!
//! The relocator on a full image volume is tested in `relocation`.

use std::fs;
use std::path::{Path, PathBuf};

use grpcio::RpcStatusCode;
use registered::registered;

use crate::content::layer;
use crate::support::client::{Client, Refusal};
use crate::support::daemon::{Split, is_empty};
use crate::support::disk::Disk;
use crate::support::mounted::upper_of;
use crate::support::{tree, unchanged, until};

#[registered(crate::Test)]
fn the_image_volume() {
    goes_on(Database::WithImages, &[Full::ImageBlocks]);
}

#[registered(crate::Test)]
fn the_writable_volume() {
    goes_on(Database::WithImages, &[Full::WritableBlocks]);
}

#[registered(crate::Test)]
fn both_volumes() {
    let both = [Full::ImageBlocks, Full::WritableBlocks];
    goes_on(Database::WithImages, &both);
}

#[registered(crate::Test)]
fn no_inode_on_the_image_volume() {
    goes_on(Database::WithImages, &[Full::ImageInodes]);
}

#[registered(crate::Test)]
fn no_inode_on_the_writable_volume() {
    goes_on(Database::WithImages, &[Full::WritableInodes]);
}

#[registered(crate::Test)]
fn the_image_volume_without_the_database() {
    goes_on(Database::Apart, &[Full::ImageBlocks]);
}

#[registered(crate::Test)]
fn the_writable_volume_with_the_database() {
    goes_on(Database::WithWrites, &[Full::WritableBlocks]);
}

#[registered(crate::Test)]
fn no_inode_on_the_writable_volume_with_the_database() {
    goes_on(Database::WithWrites, &[Full::WritableInodes]);
}

#[registered(crate::Test)]
fn the_disk_of_the_database() {
    goes_on(Database::Tiny, &[Full::DatabaseBlocks]);
}

/// The log already has its space.
#[registered(crate::Test)]
fn a_full_disk_of_the_database_takes_changes() {
    let mut disks = Disks::start(Database::Apart);
    let log = disks
        .database
        .as_ref()
        .unwrap()
        .path()
        .join("metadata.db-wal");
    until("has its size", || {
        fs::metadata(&log).unwrap().len() == 4 << 20
    });
    populate(&disks.split.client());
    disks.fill(&[Full::DatabaseBlocks]);
    for round in ["filled", "stopped"] {
        assert!(serves(&mut disks, round).is_empty());
        disks.split.daemon.stop();
        assert_eq!(fs::metadata(&log).unwrap().len(), 4 << 20);
        disks.split.daemon.restart();
    }
}

#[registered(crate::Test)]
fn all_containers_are_removed_before_a_cleanup() {
    all_can_be_removed(Database::WithImages, Full::WritableBlocks, "");
}

#[registered(crate::Test)]
fn all_beside_the_database_are_removed_before_a_cleanup() {
    all_can_be_removed(Database::WithWrites, Full::WritableBlocks, "");
}

#[registered(crate::Test)]
fn all_unpacks_are_removed_before_a_cleanup() {
    all_can_be_removed(Database::Apart, Full::ImageBlocks, "extract-");
}

/// A full image volume cannot record which ids are used on it. What moves there later has
/// such an id, and the next start must not treat the volume as one that was rolled back.
#[registered(crate::Test)]
fn a_layer_moves_to_an_image_volume_that_was_full_at_the_start() {
    let database = Disk::ext4(32);
    let flags = ["--relocate-after", "0", "--state-dir", &database.text()];
    let mut split = Split::on(Disk::ext4(64), Disk::ext4(64), &flags);
    layer(&split.client(), "base", "", |top| {
        fs::write(top.join("file"), "base").unwrap();
    });
    split.daemon.stop();
    split.image.fill();
    split.daemon.restart();
    let client = split.client();
    let upper = upper_of(&client.prepare("key", "base", &[]).unwrap());
    fs::write(upper.join("large"), vec![1; 2 << 20]).unwrap();
    client.commit("key", "moving", &[]).unwrap();
    let mut entries = fs::read_dir(split.writable().join("snapshots")).unwrap();
    let id = entries.next().unwrap().unwrap().file_name();
    let home = split.root().join("snapshots").join(id);
    assert!(fs::symlink_metadata(&home).unwrap().is_symlink());
    split.image.make_room();
    until("the layer is home", || {
        client.cleanup().unwrap();
        fs::symlink_metadata(&home).is_ok_and(|found| found.is_dir())
    });
    split.daemon.stop();
    split.daemon.restart();
    split.client().prepare("web", "moving", &[]).unwrap();
}

/// A stop frees the inode of the socket, and a program that still unpacks may take it.
#[registered(crate::Test)]
fn a_start_without_an_inode_on_the_image_volume() {
    let mut disks = Disks::start(Database::WithImages);
    populate(&disks.split.client());
    disks.fill(&[Full::ImageInodes]);
    disks.split.daemon.stop();
    disks.fill(&[Full::ImageInodes]);
    disks.split.daemon.restart();
    let client = disks.split.client();
    client.remove("old-layer").unwrap();
    client.cleanup().unwrap();
    client.prepare("extract-new", "base", &[]).unwrap();
}

/// The disk that is full, and what it lacks.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Full {
    ImageBlocks,
    ImageInodes,
    WritableBlocks,
    WritableInodes,
    DatabaseBlocks,
}

/// The disk that the database is on.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Database {
    WithImages,
    WithWrites,
    Apart,
    /// On a disk where the log does not get its full size.
    Tiny,
}

/// The daemon and its small disks.
struct Disks {
    split: Split,
    database: Option<Disk>,
}

impl Disks {
    fn start(database: Database) -> Disks {
        let disk = |mebibytes| {
            let arguments = ["-q", "-F", "-m", "0", "-b", "4096", "-N", "2048"];
            Disk::make(mebibytes, "ext4", &arguments)
        };
        let (image, writable) = (disk(32), disk(32));
        let own = match database {
            Database::WithImages | Database::WithWrites => None,
            Database::Apart => Some(disk(32)),
            Database::Tiny => Some(disk(12)),
        };
        let state_dir = match database {
            Database::WithImages => format!("{}/root", image.text()),
            Database::WithWrites => format!("{}/state", writable.text()),
            Database::Apart | Database::Tiny => own.as_ref().unwrap().text(),
        };
        // No layer moves, so that only the test changes the disks.
        let flags = ["--relocate", "never", "--state-dir", &state_dir];
        let split = Split::on(image, writable, &flags);
        Disks {
            split,
            database: own,
        }
    }

    fn fill(&self, full: &[Full]) {
        for full in full {
            match full {
                Full::ImageBlocks => self.split.image.fill(),
                Full::ImageInodes => self.split.image.fill_inodes(),
                Full::WritableBlocks => self.split.writable.fill(),
                Full::WritableInodes => self.split.writable.fill_inodes(),
                Full::DatabaseBlocks => self.database.as_ref().unwrap().fill(),
            }
        }
    }

    fn volumes(&self) -> [PathBuf; 2] {
        [self.split.root(), self.split.writable()]
    }
}

fn goes_on(database: Database, full: &[Full]) {
    let mut disks = Disks::start(database);
    populate(&disks.split.client());
    disks.fill(full);
    let mut refused = serves(&mut disks, "filled");
    // After a start, there may be room again: what the database's log had
    // taken, and the ballast.
    assert!(!refused.is_empty(), "no disk is full");
    disks.split.daemon.kill();
    disks.split.daemon.restart();
    refused.extend(serves(&mut disks, "killed"));
    disks.split.daemon.stop();
    // SQLite releases its space only while it is open, and the test fills the
    // disk quickly. The inodes of the image volume stay as they are now,
    // because a socket cannot be created there without one.
    if !full.contains(&Full::ImageInodes) {
        disks.fill(full);
    }
    disks.split.daemon.restart();
    refused.extend(serves(&mut disks, "stopped"));

    let client = disks.split.client();
    for name in ["old-layer", "old-web"] {
        client.remove(name).unwrap();
    }
    client.cleanup().unwrap();
    for volume in disks.volumes() {
        assert!(is_empty(volume.join("trash")), "{}", volume.display());
    }
    if full.contains(&Full::DatabaseBlocks) {
        // There are no bytes of snapshots on this disk.
        disks.database.as_ref().unwrap().make_room();
    }
    for request in refused {
        (request.send)(&client, &request.object).unwrap();
    }
    reads_work(&client);
}

/// Makes each kind of request once to a running daemon, and returns the refused
/// ones.
fn serves(disks: &mut Disks, round: &str) -> Vec<Request> {
    let pid = disks.split.daemon.pid();
    let client = disks.split.client();
    reads_work(&client);
    let mut refused = requests(round);
    refused.retain(|request| is_refused(disks, &client, request));
    reads_work(&client);
    assert!(disks.split.daemon.is_running() && disks.split.daemon.pid() == pid);
    refused
}

/// Creates something to remove on both disks, with many files and blocks.
fn populate(client: &Client) {
    let fill = |top: &Path| {
        fs::write(top.join("large"), vec![1; 1 << 20]).unwrap();
        for number in 0..40 {
            fs::write(top.join(format!("file-{number}")), "x").unwrap();
        }
    };
    layer(client, "base", "", |top| {
        fs::write(top.join("file"), "base").unwrap();
    });
    layer(client, "old-layer", "base", fill);
    fill(&upper_of(&client.prepare("old-web", "base", &[]).unwrap()));
    client.prepare("web", "base", &[]).unwrap();
    client.view("view", "base", &[]).unwrap();
    for round in ["filled", "killed", "stopped"] {
        for key in [format!("extract-{round}"), format!("done-{round}")] {
            let upper = upper_of(&client.prepare(&key, "base", &[]).unwrap());
            fs::write(upper.join("file"), "x").unwrap();
        }
    }
}

/// Requests that change nothing need no room.
fn reads_work(client: &Client) {
    let names = client.names(&[]).unwrap();
    assert!(names.len() >= 9, "{names:?}");
    for name in &names {
        client.stat(name).unwrap();
        client.usage(name).unwrap();
    }
    for key in ["web", "view"] {
        client.mounts(key).unwrap();
    }
}

/// A request that changes something.
struct Request {
    /// The key of the request, which a refusal of it has to name.
    object: String,
    send: fn(&Client, &str) -> Result<(), Refusal>,
}

/// One request for each operation and volume, with keys that no other round
/// has.
fn requests(round: &str) -> Vec<Request> {
    let request = |object: &str, send| Request {
        object: format!("{object}{round}"),
        send,
    };
    let mut requests = vec![
        request("web-", |client, key| {
            client.prepare(key, "base", &[]).map(drop)
        }),
        request("web-without-parent-", |client, key| {
            client.prepare(key, "", &[]).map(drop)
        }),
        request("extract-new-", |client, key| {
            client.prepare(key, "base", &[]).map(drop)
        }),
        request("view-", |client, key| {
            client.view(key, "base", &[]).map(drop)
        }),
        request("view-without-parent-", |client, key| {
            client.view(key, "", &[]).map(drop)
        }),
    ];
    // On either volume.
    for key in ["extract-", "done-"] {
        requests.push(request(key, |client, key| {
            client.commit(key, &format!("{key}-layer"), &[])
        }));
    }
    requests.push(Request {
        object: "web".to_owned(),
        send: |client, key| {
            let value = "x".repeat(3000);
            client.update(key, &[], &[("label", &value)]).map(drop)
        },
    });
    requests
}

/// Whether the request is refused. If it is, it may not have changed anything.
fn is_refused(disks: &Disks, client: &Client, request: &Request) -> bool {
    let snapshots = disks.volumes().map(|volume| volume.join("snapshots"));
    let listed = client.list_pages(&[]).unwrap();
    let before = snapshots.each_ref().map(tree);
    let Err((code, text)) = (request.send)(client, &request.object) else {
        return false;
    };
    assert_eq!(code, RpcStatusCode::RESOURCE_EXHAUSTED, "{text}");
    assert!(text.contains(&request.object), "{text}");
    assert_eq!(client.list_pages(&[]).unwrap(), listed, "{text}");
    for (top, before) in snapshots.iter().zip(&before) {
        unchanged(top, before);
    }
    true
}

/// containerd's garbage collection removes everything that it can before it asks
/// for the space. Each removal adds some pages to the database's log, and an
/// entry to the trash, which sometimes takes another block. The snapshots' keys
/// begin with `prefix`.
fn all_can_be_removed(database: Database, full: Full, prefix: &str) {
    let mut disks = Disks::start(database);
    let client = disks.split.client();
    populate(&client);
    for number in 0..400 {
        let key = format!("{prefix}old-{number}");
        client.prepare(&key, "base", &[]).unwrap();
    }
    disks.fill(&[full]);
    for name in client.names(&["name!=base"]).unwrap() {
        client.remove(&name).unwrap();
    }
    disks.split.daemon.kill();
    disks.split.daemon.restart();
    let client = disks.split.client();
    assert_eq!(client.names(&[]).unwrap(), ["base"]);
    client.cleanup().unwrap();
    for volume in disks.volumes() {
        assert!(is_empty(volume.join("trash")), "{}", volume.display());
    }
    assert!(is_empty(disks.split.writable().join("snapshots")));
    let layers = fs::read_dir(disks.split.root().join("snapshots")).unwrap();
    assert_eq!(layers.count(), 1);
    client
        .prepare(&format!("{prefix}new"), "base", &[])
        .unwrap();
}
