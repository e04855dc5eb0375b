//! The socket, readiness, stops and restarts.

use std::fs;
use std::io::Read;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use grpcio::RpcStatusCode;
use overlay_read_write_splitting_snapshotter::proto::snapshots::Info;
use registered::registered;
use rustix::process::Signal;

use crate::content::layer;
use crate::support::client::{Client, finish};
use crate::support::daemon::{Daemon, Split, command, skip_ids_through};
use crate::support::disk::Disk;
use crate::support::until;

/// The time within which a stop has to end in every situation.
const STOP: Duration = Duration::from_secs(10);

/// The service manager's end of sd_notify(3).
struct Manager {
    dir: tempfile::TempDir,
    socket: UnixDatagram,
}

impl Manager {
    fn new() -> Manager {
        let dir = tempfile::tempdir().unwrap();
        let socket = UnixDatagram::bind(dir.path().join("notify")).unwrap();
        socket
            .set_read_timeout(Some(Duration::from_secs(30)))
            .unwrap();
        Manager { dir, socket }
    }

    fn address(&self) -> String {
        self.dir.path().join("notify").display().to_string()
    }

    /// The lines of the next message.
    fn told(&self) -> Vec<String> {
        let mut bytes = [0; 1024];
        let length = self.socket.recv(&mut bytes).unwrap();
        let text = std::str::from_utf8(&bytes[..length]).unwrap();
        text.lines().map(str::to_owned).collect()
    }

    /// Whether all messages were read.
    fn has_heard_all(&self) -> bool {
        self.socket.set_nonblocking(true).unwrap();
        let nothing = self.socket.recv(&mut [0; 1024]).is_err();
        self.socket.set_nonblocking(false).unwrap();
        nothing
    }
}

/// Makes every writing request of the daemon wait, as a disk that does not
/// answer would, by taking the database's write lock. SQLite gives up after
/// five seconds.
struct Obstacle {
    connection: rusqlite::Connection,
}

impl Obstacle {
    fn put(database: &Path) -> Obstacle {
        let connection = rusqlite::Connection::open(database).unwrap();
        connection.execute_batch("BEGIN IMMEDIATE").unwrap();
        Obstacle { connection }
    }

    /// Returns the open connection, because the last one that closes the
    /// database removes its log.
    fn clear(self) -> rusqlite::Connection {
        self.connection.execute_batch("ROLLBACK").unwrap();
        self.connection
    }
}

/// Every snapshot, as List and as Stat return it.
fn everything(client: &Client) -> Vec<Info> {
    let listed = client.list_pages(&[]).unwrap().concat();
    for info in &listed {
        assert_eq!(client.stat(&info.name).unwrap(), *info);
    }
    listed
}

#[registered(crate::Test)]
fn the_socket_is_roots_alone() {
    let mut split = Split::start(&[]);
    let address = split.daemon.address().to_owned();
    assert_eq!(Path::new(&address), split.root().join("grpc.socks"));
    let first = fs::symlink_metadata(&address).unwrap();
    assert!(first.file_type().is_socket());
    assert_eq!(
        (first.mode() & 0o7777, first.uid(), first.gid()),
        (0o600, 0, 0)
    );
    split.client().prepare("web", "", &[]).unwrap();

    // A killed daemon leaves its socket, and the next one replaces it.
    split.daemon.kill();
    assert!(fs::symlink_metadata(&address).is_ok());
    assert!(UnixStream::connect(&address).is_err());
    split.daemon.restart();
    split.client().stat("web").unwrap();
    let second = fs::symlink_metadata(&address).unwrap();
    assert_eq!(second.mode() & 0o7777, 0o600);
}

#[registered(crate::Test)]
fn readiness_is_told_when_served() {
    let manager = Manager::new();
    let (image, writable) = (Disk::ext4(64), Disk::ext4(64));
    let arguments = command(&image, &writable, &[]);
    let environment = [("NOTIFY_SOCKET", &*manager.address())];
    let mut daemon = Daemon::start_in(&arguments, &environment);
    assert_eq!(manager.told(), ["READY=1"]);
    daemon.client().prepare("web", "", &[]).unwrap();
    daemon.stop();
    assert_eq!(manager.told(), ["STOPPING=1"]);

    // Strays make the next start long, so that a notification that comes too
    // early is noticed.
    let root = image.path().join("root");
    skip_ids_through(&root, 3000);
    let snapshots = root.join("snapshots");
    for number in 1000..3000 {
        fs::create_dir(snapshots.join(number.to_string())).unwrap();
    }
    let address = daemon.address().to_owned();
    std::thread::scope(|scope| {
        let listener = scope.spawn(|| {
            assert_eq!(manager.told(), ["READY=1"]);
            // The first try succeeds.
            UnixStream::connect(&address).unwrap();
            Client::connect(&address).stat("web").unwrap();
            assert_eq!(fs::read_dir(&snapshots).unwrap().count(), 0);
        });
        daemon.restart();
        listener.join().unwrap();
    });
    // A killed daemon notifies nothing.
    daemon.kill();
    assert!(manager.has_heard_all());
}

#[registered(crate::Test)]
fn signals_stop_it() {
    let mut split = Split::start(&[]);
    for signal in [Signal::TERM, Signal::INT] {
        // containerd's connection is open and idle all the time.
        let client = split.client();
        layer(&client, &format!("base-{signal:?}"), "", |_| ());
        let log = split.root().join("metadata.db-wal");
        until("has its size", || {
            fs::metadata(&log).unwrap().len() == 4 << 20
        });

        let begun = Instant::now();
        split.daemon.signal(signal);
        let status = split.daemon.wait();
        assert_eq!(status.code(), Some(0), "{}", split.daemon.log());
        // If there is nothing to wait for, the stop does not wait.
        assert!(begun.elapsed() < Duration::from_secs(3), "{signal:?}");
        assert!(fs::symlink_metadata(split.daemon.address()).is_err());
        let is_empty = fs::read(&log).unwrap().iter().all(|byte| *byte == 0);
        assert!(is_empty, "its log is in the database");
        assert_eq!(fs::metadata(&log).unwrap().len(), 4 << 20);
        split.daemon.restart();
        // The old connection finds the new daemon by itself.
        until("reconnected", || {
            match client.stat(&format!("base-{signal:?}")) {
                Ok(_) => true,
                Err((code, _)) => {
                    assert_eq!(code, RpcStatusCode::UNAVAILABLE);
                    false
                }
            }
        });
    }
}

#[registered(crate::Test)]
fn a_hangup_does_not_stop_it() {
    let mut split = Split::start(&[]);
    let client = split.client();
    for number in 0..3 {
        split.daemon.signal(Signal::HUP);
        until("reported", || {
            split.daemon.log().matches("SIGHUP is ignored").count() > number
        });
        client.prepare(&format!("web-{number}"), "", &[]).unwrap();
    }
    split.daemon.signal(Signal::TERM);
    assert_eq!(split.daemon.wait().code(), Some(0));
}

#[registered(crate::Test)]
fn a_stop_waits_for_running_requests() {
    let manager = Manager::new();
    let (image, writable) = (Disk::ext4(64), Disk::ext4(64));
    let arguments = command(&image, &writable, &[]);
    let environment = [("NOTIFY_SOCKET", &*manager.address())];
    let mut daemon = Daemon::start_in(&arguments, &environment);
    assert_eq!(manager.told(), ["READY=1"]);
    let client = daemon.client();
    client.prepare("before", "", &[]).unwrap();

    let obstacle = Obstacle::put(&image.path().join("root/metadata.db"));
    let running = client.begin_prepare("during", "", &[]);
    // A request that does not write is not blocked. Its answer shows that the
    // request sent before it on the same connection has arrived.
    client.stat("before").unwrap();
    daemon.terminate();
    assert_eq!(manager.told(), ["STOPPING=1"]);
    // A request in the moment between is served. All later ones are asked to
    // come again.
    until("closed", || match client.stat("before") {
        Ok(_) => false,
        Err((code, text)) => {
            assert_eq!(code, RpcStatusCode::UNAVAILABLE, "{text}");
            true
        }
    });
    let (code, _) = client.prepare("after", "", &[]).unwrap_err();
    assert_eq!(code, RpcStatusCode::UNAVAILABLE);
    assert!(daemon.is_running());
    drop(obstacle.clear());
    finish(running).unwrap();
    assert_eq!(daemon.wait().code(), Some(0));

    daemon.restart();
    let client = daemon.client();
    assert_eq!(client.names(&[]).unwrap(), ["before", "during"]);
    assert!(writable.path().join("writable/snapshots/2/fs").is_dir());
}

#[registered(crate::Test)]
fn a_stop_does_not_wait_for_ever() {
    let mut split = Split::start(&["--threads", "2"]);
    let client = split.client();
    client.prepare("before", "", &[]).unwrap();
    let obstacle = Obstacle::put(&split.root().join("metadata.db"));
    // Each request waits for five seconds, two at a time and one after the
    // other: together, they take longer than a stop may.
    let running: Vec<_> = (0..6)
        .map(|number| client.begin_prepare(&format!("during-{number}"), "", &[]))
        .collect();
    client.stat("before").unwrap();
    let begun = Instant::now();
    split.daemon.terminate();
    assert_eq!(split.daemon.wait().code(), Some(0));
    assert!(begun.elapsed() < STOP, "{:?}", begun.elapsed());
    assert!(fs::symlink_metadata(split.daemon.address()).is_err());
    for request in running {
        let (code, text) = finish(request).unwrap_err();
        assert_eq!(code, RpcStatusCode::UNAVAILABLE, "{text}");
    }
    let open_database = obstacle.clear();
    split.daemon.restart();
    drop(open_database);
    assert_eq!(split.client().names(&[]).unwrap(), ["before"]);
    assert_eq!(
        fs::read_dir(split.writable().join("snapshots"))
            .unwrap()
            .count(),
        1
    );
}

#[registered(crate::Test)]
fn a_stop_does_not_wait_for_stalled_clients() {
    let mut split = Split::start(&["--sync", "none"]);
    let client = split.client();
    layer(&client, "base", "", |_| ());
    // More than a connection buffers for its reader.
    let label = "x".repeat(4000);
    for number in 0..600 {
        let with = [("filler", label.as_str())];
        client
            .view(&format!("view-{number}"), "base", &with)
            .unwrap();
    }
    let stalled = client.begin_list(&[]);
    client.stat("base").unwrap();
    // And a client that sends nothing at all. The server's first bytes show
    // that it has accepted the connection.
    let mut silent = UnixStream::connect(split.daemon.address()).unwrap();
    silent.read_exact(&mut [0; 9]).unwrap();
    let begun = Instant::now();
    split.daemon.terminate();
    assert_eq!(split.daemon.wait().code(), Some(0));
    assert!(begun.elapsed() < STOP, "{:?}", begun.elapsed());
    assert!(fs::symlink_metadata(split.daemon.address()).is_err());
    drop((stalled, silent));
    split.daemon.restart();
    assert_eq!(split.client().names(&[]).unwrap().len(), 601);
}

#[registered(crate::Test)]
fn a_restart_finds_everything() {
    let mut split = Split::start(&[]);
    let client = split.client();
    let label = [("containerd.io/gc.root", "1"), ("strange\n", "\"ü\"\0")];
    layer(&client, "base", "", |top| {
        fs::write(top.join("file"), "of the layer").unwrap();
    });
    client.update("base", &["labels"], &label).unwrap();
    layer(&client, "upper", "base", |_| ());
    client.prepare("init-key", "upper", &[]).unwrap();
    client.commit("init-key", "init", &label).unwrap();
    client.prepare("web", "init", &label).unwrap();
    client.prepare("extract-1 unfinished", "base", &[]).unwrap();
    client.prepare("of nothing", "", &[]).unwrap();
    client.view("view", "upper", &[]).unwrap();
    client.view("view of nothing", "", &label).unwrap();
    client.prepare("gone", "", &[]).unwrap();
    client.remove("gone").unwrap();
    let upper = split.writable().join("snapshots/4/fs/written");
    fs::write(&upper, "by the container").unwrap();

    let told = |client: &Client| {
        let infos = everything(client);
        let usages: Vec<_> = infos
            .iter()
            .map(|info| client.usage(&info.name).unwrap())
            .collect();
        let mounts: Vec<_> = infos.iter().map(|info| client.mounts(&info.name)).collect();
        (infos, usages, mounts)
    };
    // A file counts with its blocks, which ext4 allocates late.
    split.writable.sync();
    let before = told(&client);
    assert_eq!(before.0.len(), 8);
    for way in ["stopped", "killed", "killed again"] {
        if way == "stopped" {
            split.daemon.stop();
        } else {
            split.daemon.kill();
        }
        split.daemon.restart();
        let client = split.client();
        assert!(told(&client) == before, "{way}: {:?}", told(&client));
        assert_eq!(fs::read_to_string(&upper).unwrap(), "by the container");
        assert!(!split.daemon.log().contains("ERROR"), "{way}");
    }
    // No id is given out twice.
    let earlier = fs::read_dir(split.writable().join("snapshots"))
        .unwrap()
        .count();
    split.client().prepare("next", "", &[]).unwrap();
    let now = fs::read_dir(split.writable().join("snapshots"))
        .unwrap()
        .count();
    assert_eq!(now, earlier + 1);
}
