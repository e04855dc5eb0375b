//! Disks that fail under the running daemon: what it acknowledges is whole in
//! spite of that, what it refuses leaves nothing, and requests that need only
//! the other disk are served.
//!
//! Each test runs in a machine of its own, and fails by a panic there.

use std::fs;
use std::path::{Path, PathBuf};

use grpcio::RpcStatusCode;
use registered::registered;

use crate::content;
use crate::faulty::FaultyDisk;
use crate::guest::{IMAGE_DEVICE, WRITABLE_DEVICE, setting};
use crate::machine::Disks;
use crate::model::LABEL_REF;
use crate::support::client::{Client, Refusal};
use crate::support::daemon::Daemon;
use crate::support::mounted::{Mounted, upper_of};
use crate::support::until;
use crate::verify::{LABEL_UPPERDIR, require_sound};

/// A test: its module, its name, and its function.
pub struct Test(pub &'static str, pub &'static str, pub fn());
inventory::collect!(Test);

/// With less, mkfs makes the journal in several pieces.
const MEBIBYTES: u64 = 256;
/// Tests write the same data each time.
const SEED: u64 = 0;

/// On the host: runs a test in a machine.
pub fn run_in_machine(name: &str) {
    let disks = Disks::new(MEBIBYTES);
    disks.boot(&[("VM_WORK", name.to_owned())]).finish();
}

/// In the machine: runs a test.
pub fn run(name: &str) {
    let is_it = |Test(_, other, _): &&Test| *other == name;
    let Test(_, _, test) = inventory::iter::<Test>().find(is_it).unwrap();
    test();
}

/// Both disks, and a daemon on them.
struct Split {
    image: FaultyDisk,
    writable: FaultyDisk,
    daemon: Daemon,
    places: Vec<String>,
}

#[derive(Clone, Copy)]
enum Database {
    WithLayers,
    WithWrites,
}

impl Split {
    fn start(database: Database) -> Split {
        Split::start_in(database, &[])
    }

    fn start_in(database: Database, environment: &[(&str, &str)]) -> Split {
        let at = |name| PathBuf::from(setting::<String>(name));
        let image = FaultyDisk::new("image", IMAGE_DEVICE, at("VM_IMAGE"));
        let writable = FaultyDisk::new("writable", WRITABLE_DEVICE, at("VM_WRITABLE"));
        let below = |disk: &FaultyDisk, name| disk.path().join(name).to_str().unwrap().to_owned();
        let mut places = vec![
            "--root-dir".to_owned(),
            below(&image, "root"),
            "--writable-dir".to_owned(),
            below(&writable, "writable"),
        ];
        if matches!(database, Database::WithWrites) {
            places.extend(["--state-dir".to_owned(), below(&writable, "state")]);
        }
        let mut arguments = places.clone();
        arguments.extend(["--upperdir-label", "--relocate", "never"].map(str::to_owned));
        arguments.extend(["--address", "/tmp/socket"].map(str::to_owned));
        let daemon = Daemon::start_in(&arguments, environment);
        let split = Split {
            image,
            writable,
            daemon,
            places,
        };
        let client = split.client();
        unpack(&client, "base", "").unwrap();
        commit_container(&client, "init", "base").unwrap();
        client.prepare("web", "init", &[]).unwrap();
        // What was written before a fault has to be on the disks.
        rustix::fs::sync();
        split
    }

    fn client(&self) -> Client {
        self.daemon.client()
    }

    /// Checks that everything works again, that all layers are there, also after
    /// the disks were mounted again, and that the daemon's own check finds
    /// nothing.
    fn stays_well(mut self, layers: &[&str]) {
        assert!(self.daemon.is_running(), "the daemon has ended");
        let client = self.client();
        unpack(&client, "last", "base").unwrap();
        commit_container(&client, "last-init", "last").unwrap();
        client.cleanup().unwrap();
        self.daemon.stop();
        for disk in [&self.image, &self.writable] {
            disk.unmount();
            disk.repair();
            disk.mount();
        }
        self.daemon.restart();
        let client = self.client();
        for name in layers.iter().chain(&["base", "init", "last", "last-init"]) {
            is_whole(&client, name);
        }
        client.mounts("web").unwrap();
        self.daemon.stop();
        require_sound(&self.places);
    }
}

/// Prepares a snapshot, and fills it with the content of the layer `name`.
fn fill(client: &Client, key: &str, parent: &str, name: &str) -> Result<(), Refusal> {
    let labels: &[_] = match key.starts_with("extract-") {
        true => &[(LABEL_REF, name)],
        false => &[],
    };
    let mounts = client.prepare(key, parent, labels)?;
    content::write(&content::of_layer(SEED, name), &upper_of(&mounts)).unwrap();
    Ok(())
}

fn unpack(client: &Client, name: &str, parent: &str) -> Result<(), Refusal> {
    let key = format!("extract-{name}");
    fill(client, &key, parent, name)?;
    client.commit(&key, name, &[])
}

fn commit_container(client: &Client, name: &str, parent: &str) -> Result<(), Refusal> {
    let key = format!("container-{name}");
    fill(client, &key, parent, name)?;
    client.commit(&key, name, &[])
}

#[track_caller]
fn is_whole(client: &Client, name: &str) {
    let path = client.stat(name).unwrap().labels[LABEL_UPPERDIR].clone();
    let found = content::read(Path::new(&path)).unwrap();
    let difference = content::difference(&content::of_layer(SEED, name), &found);
    assert!(difference.is_none(), "{name}: {difference:?}");
}

/// Fails unless the request is refused for one of these reasons, with a text
/// that names the disk.
#[track_caller]
fn is_refused<T>(result: Result<T, Refusal>, codes: &[RpcStatusCode], disk: &FaultyDisk) {
    let path = disk.path().to_str().unwrap();
    is_refused_about(
        result,
        codes,
        &[path, &format!("the {} volume", disk.name())],
    );
}

/// Like [`is_refused`]; the text must contain one of these words.
#[track_caller]
fn is_refused_about<T>(result: Result<T, Refusal>, codes: &[RpcStatusCode], about: &[&str]) {
    let Err((code, text)) = result else {
        panic!("it went well");
    };
    let says_it = about.iter().any(|words| text.contains(words));
    assert!(codes.contains(&code) && says_it, "{code:?} {text}");
}

const BROKEN: &[RpcStatusCode] = &[
    RpcStatusCode::INTERNAL,
    RpcStatusCode::FAILED_PRECONDITION,
    RpcStatusCode::DATA_LOSS,
];
const DATABASE: &[&str] = &["the database"];
const READ_ONLY: &[RpcStatusCode] = &[RpcStatusCode::FAILED_PRECONDITION];
const LOST: &[RpcStatusCode] = &[RpcStatusCode::DATA_LOSS];

/// Checks requests that need only the image volume.
fn images_are_served(client: &Client, name: &str) {
    unpack(client, name, "base").unwrap();
    client.view("view", name, &[]).unwrap();
    let mounted = Mounted::new(&client.mounts("view").unwrap());
    assert!(fs::read_dir(mounted.path()).unwrap().count() > 0);
    drop(mounted);
    client.remove("view").unwrap();
}

/// Checks requests that need only the writable volume, with the database there.
fn containers_are_served(client: &Client) {
    fill(client, "during", "base", "during").unwrap();
    let mounted = Mounted::new(&client.mounts("during").unwrap());
    fs::write(mounted.path().join("written"), "by a container").unwrap();
    drop(mounted);
    client.remove("during").unwrap();
}

#[registered(crate::faults::Test)]
fn writable_fails() {
    let split = Split::start(Database::WithLayers);
    let client = split.client();
    fill(&client, "torn-key", "base", "torn").unwrap();
    split.writable.fail();
    is_refused(
        client.commit("torn-key", "torn", &[]),
        BROKEN,
        &split.writable,
    );
    is_refused(client.prepare("new", "base", &[]), BROKEN, &split.writable);
    images_are_served(&client, "during");
    assert!(!client.exists("torn") && !client.exists("new"));

    split.writable.heal();
    // A user who repairs the disk need not stop the daemon.
    split.writable.unmount();
    is_refused(client.prepare("new", "base", &[]), BROKEN, &split.writable);
    split.writable.repair();
    split.writable.mount();
    drop(Mounted::new(&client.mounts("web").unwrap()));
    is_refused(
        client.commit("torn-key", "torn", &[]),
        LOST,
        &split.writable,
    );
    client.remove("torn-key").unwrap();
    split.stays_well(&["during"]);
}

#[registered(crate::faults::Test)]
fn image_fails() {
    let mut split = Split::start(Database::WithWrites);
    let client = split.client();
    fill(&client, "extract-torn", "base", "torn").unwrap();
    split.image.fail();
    is_refused(
        client.commit("extract-torn", "torn", &[]),
        BROKEN,
        &split.image,
    );
    is_refused(unpack(&client, "new", "base"), BROKEN, &split.image);
    // Its link would be on the image volume.
    is_refused(
        commit_container(&client, "new", "base"),
        BROKEN,
        &split.image,
    );
    client.remove("container-new").unwrap();
    containers_are_served(&client);
    assert!(!client.exists("torn") && !client.exists("new"));

    mend_image(&mut split);
    split.client().remove("extract-torn").unwrap();
    split.stays_well(&[]);
}

#[registered(crate::faults::Test)]
fn image_with_database_fails() {
    let mut split = Split::start(Database::WithLayers);
    let client = split.client();
    fill(&client, "extract-torn", "base", "torn").unwrap();
    fill(&client, "container", "base", "container").unwrap();
    split.image.fail();
    is_refused(
        client.commit("extract-torn", "torn", &[]),
        BROKEN,
        &split.image,
    );
    is_refused(client.commit("container", "new", &[]), BROKEN, &split.image);
    is_refused_about(client.prepare("new", "base", &[]), BROKEN, DATABASE);
    is_refused_about(client.remove("web"), BROKEN, DATABASE);
    // Running containers are not affected: these requests write nothing.
    client.stat("web").unwrap();
    client.usage("container").unwrap();
    assert_eq!(client.names(&[]).unwrap().len(), 5);
    drop(Mounted::new(&client.mounts("web").unwrap()));

    mend_image(&mut split);
    split.client().remove("extract-torn").unwrap();
    split.client().remove("container").unwrap();
    split.stays_well(&[]);
}

/// Repairs the image volume. The daemon has it open, and so is stopped
/// meanwhile.
fn mend_image(split: &mut Split) {
    split.image.heal();
    split.daemon.stop();
    split.image.unmount();
    split.image.repair();
    split.image.mount();
    split.daemon.restart();
}

#[registered(crate::faults::Test)]
fn writable_loses_data() {
    let split = Split::start(Database::WithLayers);
    loses_data(&split, &split.writable, "container-", commit_container);
    split.stays_well(&["mended"]);
}

#[registered(crate::faults::Test)]
fn image_loses_data() {
    let split = Split::start(Database::WithWrites);
    loses_data(&split, &split.image, "extract-", unpack);
    split.stays_well(&["mended"]);
}

/// The layer is flushed by itself, and not with all else on its volume.
const ALONE: &[(&str, &str)] = &[("SNAPSHOTTER_LEFT_OUT", "volume")];

#[registered(crate::faults::Test)]
fn writable_loses_data_of_a_layer_flushed_alone() {
    let split = Split::start_in(Database::WithLayers, ALONE);
    loses_data(&split, &split.writable, "container-", commit_container);
    split.stays_well(&["mended"]);
}

#[registered(crate::faults::Test)]
fn image_loses_data_of_a_layer_flushed_alone() {
    let split = Split::start_in(Database::WithWrites, ALONE);
    loses_data(&split, &split.image, "extract-", unpack);
    split.stays_well(&["mended"]);
}

/// A disk fails to write the data of files for a while, and the file system
/// goes on: only the daemon notices.
fn loses_data(
    split: &Split,
    disk: &FaultyDisk,
    prefix: &str,
    make: fn(&Client, &str, &str) -> Result<(), Refusal>,
) {
    let client = split.client();
    for name in ["at-commit", "before"] {
        let (key, neighbour) = (
            format!("{prefix}{name}"),
            format!("{prefix}{name}-neighbour"),
        );
        fill(&client, &key, "base", name).unwrap();
        fill(&client, &neighbour, "base", "neighbour").unwrap();
        disk.fail_data();
        // Earlier data may be on the disk already, because the daemon flushes
        // while layers are unpacked.
        let late = upper_of(&client.mounts(&key).unwrap()).join("late");
        fs::write(late, vec![1; 1 << 20]).unwrap();
        if name == "before" {
            // The kernel writes on its own, so the disk works again when the
            // daemon flushes.
            rustix::fs::sync();
            disk.heal();
        }
        is_refused(client.commit(&key, name, &[]), BROKEN, disk);
        disk.heal();
        assert!(!disk.is_read_only());
        // It is not known what else the disk has lost.
        is_refused(client.commit(&key, name, &[]), LOST, disk);
        is_refused(client.commit(&neighbour, "neighbour", &[]), LOST, disk);
        assert!(!client.exists(name) && !client.exists("neighbour"));
        client.remove(&key).unwrap();
        client.remove(&neighbour).unwrap();
    }
    make(&client, "mended", "base").unwrap();
}

#[registered(crate::faults::Test)]
fn writable_read_only() {
    let split = Split::start(Database::WithLayers);
    let client = split.client();
    fill(&client, "container-one", "base", "one").unwrap();
    split.writable.make_read_only();
    is_refused(
        client.prepare("new", "base", &[]),
        READ_ONLY,
        &split.writable,
    );
    images_are_served(&client, "during");
    client.mounts("web").unwrap();
    // Its row is removed; its bytes are deleted later.
    client.remove("web").unwrap();
    is_refused(client.cleanup(), READ_ONLY, &split.writable);
    assert!(!client.exists("new"));

    split.writable.make_writable();
    client.prepare("web", "init", &[]).unwrap();
    client.commit("container-one", "one", &[]).unwrap();
    split.stays_well(&["one", "during"]);
}

#[registered(crate::faults::Test)]
fn image_read_only() {
    let split = Split::start(Database::WithWrites);
    let client = split.client();
    fill(&client, "container-one", "base", "one").unwrap();
    fill(&client, "extract-two", "base", "two").unwrap();

    // By force, for all disks at once (admin-guide/sysrq.rst): mount(8) refuses
    // it because the daemon has files open.
    fs::write("/proc/sysrq-trigger", "u").unwrap();
    until("read-only", || {
        split.image.is_read_only() && split.writable.is_read_only()
    });
    split.writable.make_writable();
    is_refused(unpack(&client, "new", "base"), READ_ONLY, &split.image);
    is_refused(
        client.commit("container-one", "one", &[]),
        READ_ONLY,
        &split.image,
    );
    containers_are_served(&client);
    assert!(!client.exists("new") && !client.exists("extract-new") && !client.exists("one"));

    split.image.make_writable();
    client.commit("container-one", "one", &[]).unwrap();
    client.commit("extract-two", "two", &[]).unwrap();
    split.stays_well(&["one", "two"]);
}

#[registered(crate::faults::Test)]
fn writable_gives_up() {
    let split = Split::start(Database::WithLayers);
    let client = split.client();
    fill(&client, "container-torn", "base", "torn").unwrap();
    split.writable.give_up();
    // No data was lost, and nothing can be written at all.
    is_refused(
        client.commit("container-torn", "torn", &[]),
        BROKEN,
        &split.writable,
    );
    is_refused(client.prepare("new", "base", &[]), BROKEN, &split.writable);
    images_are_served(&client, "during");

    split.writable.unmount();
    split.writable.repair();
    split.writable.mount();
    client.remove("container-torn").unwrap();
    split.stays_well(&["during"]);
}

#[registered(crate::faults::Test)]
fn image_gives_up() {
    let mut split = Split::start(Database::WithWrites);
    let client = split.client();
    fill(&client, "extract-torn", "base", "torn").unwrap();
    split.image.give_up();
    is_refused(
        client.commit("extract-torn", "torn", &[]),
        BROKEN,
        &split.image,
    );
    is_refused(unpack(&client, "new", "base"), BROKEN, &split.image);
    containers_are_served(&client);

    mend_image(&mut split);
    split.client().remove("extract-torn").unwrap();
    split.stays_well(&[]);
}
