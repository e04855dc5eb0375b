//! The load on the daemon in the machine: layers unpacked, containers committed,
//! snapshots removed, by several clients at once. Nothing is flushed by the
//! clients, and no overlay is mounted: to unmount one flushes its upper file
//! system, which would hide what the daemon fails to flush.

use std::path::PathBuf;
use std::thread;

use overlay_read_write_splitting_snapshotter::proto::snapshots::{Info, Kind};

use crate::content;
use crate::guest::Outlet;
use crate::model::{LABEL_REVISION, Record, Request, Snapshot, State, prepare_labels};
use crate::support::client::{Client, Refusal};
use crate::support::daemon::Daemon;
use crate::support::mounted::upper_of;
use crate::support::random::Random;

const THREADS: usize = 3;
/// What one thread keeps, so that the disks do not fill up.
const MOST_LAYERS: usize = 30;
const MOST_ACTIVE: usize = 8;
/// How many layers stand upon each other.
const DEEPEST: usize = 5;

/// The line that says that everything is in motion.
pub const BEGUN: &str = "begun";

/// Loads the daemon until the power goes.
pub fn run(daemon: &Daemon, outlet: &Outlet, seed: u64, boot: u32) -> ! {
    let all: Vec<Info> = daemon.client().list_pages(&[]).unwrap().concat();
    outlet.line(BEGUN);
    thread::scope(|scope| {
        for number in 0..THREADS {
            let all = &all;
            scope.spawn(move || {
                let mine = all.iter().filter(|info| is_of(&info.name, number));
                let mut worker = Worker {
                    number,
                    boot,
                    seed,
                    count: 0,
                    client: daemon.client(),
                    state: mine
                        .map(|info| (info.name.clone(), snapshot(info)))
                        .collect(),
                    random: content::random(seed, &format!("{boot} {number}")),
                    outlet,
                };
                loop {
                    worker.step();
                }
            });
        }
    });
    unreachable!("the threads never end")
}

pub fn snapshot(info: &Info) -> Snapshot {
    Snapshot {
        is_layer: info.kind.enum_value() == Ok(Kind::COMMITTED),
        parent: info.parent.clone(),
        labels: info
            .labels
            .iter()
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect(),
    }
}

/// Whether a thread made it, on this boot or before.
fn is_of(name: &str, thread: usize) -> bool {
    name.contains(&format!("thread{thread}-"))
}

struct Worker<'a> {
    number: usize,
    boot: u32,
    seed: u64,
    /// How many snapshots it has made.
    count: usize,
    client: Client,
    /// Its own snapshots: no other thread stands on them or removes them.
    state: State,
    random: Random,
    outlet: &'a Outlet,
}

impl Worker<'_> {
    fn step(&mut self) {
        let layers = self.layers().count();
        let is_full = layers > MOST_LAYERS || self.state.len() - layers > MOST_ACTIVE;
        match self.random.below(100) {
            _ if is_full => self.remove(),
            0..45 => self.unpack(),
            45..70 => self.commit_container(),
            70..77 => self.prepare_container(),
            77..88 => self.remove(),
            88..96 => self.update(),
            _ => self.client.cleanup().unwrap(),
        }
    }

    /// Says what is asked for before and after.
    fn ask<T>(&mut self, request: Request, send: impl FnOnce(&Client) -> Result<T, Refusal>) -> T {
        let asked = Record::Asked(self.number, request.clone());
        self.outlet.line(&asked.line());
        let answer =
            send(&self.client).unwrap_or_else(|refusal| panic!("{request:?}: {refusal:?}"));
        self.outlet.line(&Record::Done(self.number).line());
        request.apply(&mut self.state);
        answer
    }

    fn prepare(&mut self, key: &str, parent: &str, layer: &str) -> PathBuf {
        let request = Request::Prepare {
            key: key.to_owned(),
            parent: parent.to_owned(),
            layer: layer.to_owned(),
        };
        let labels = prepare_labels(layer);
        let labels: Vec<_> = labels
            .iter()
            .map(|(key, value)| (key.as_str(), value.as_str()))
            .collect();
        let mounts = self.ask(request, |client| client.prepare(key, parent, &labels));
        upper_of(&mounts)
    }

    fn commit(&mut self, key: &str, name: &str) {
        let request = Request::Commit {
            key: key.to_owned(),
            name: name.to_owned(),
        };
        self.ask(request, |client| {
            client.commit(key, name, &[(LABEL_REVISION, "0")])
        });
    }

    fn unpack(&mut self) {
        let name = self.new_name();
        let key = format!("extract-{} {name}", self.count);
        self.make_layer(&key, &name, &name.clone());
    }

    fn commit_container(&mut self) {
        let name = self.new_name();
        self.make_layer(&format!("container {name}"), &name, "");
    }

    fn make_layer(&mut self, key: &str, name: &str, reference: &str) {
        let parent = self.some_parent();
        let upper = self.prepare(key, &parent, reference);
        content::write(&content::of_layer(self.seed, name), &upper)
            .unwrap_or_else(|error| panic!("{}: {error}", upper.display()));
        self.commit(key, name);
    }

    /// A container that goes on running.
    fn prepare_container(&mut self) {
        let key = format!("running {}", self.new_name());
        let parent = self.some_parent();
        let upper = self.prepare(&key, &parent, "");
        std::fs::write(upper.join("file"), &key).unwrap();
    }

    fn remove(&mut self) {
        let is_parent = |name: &String| self.state.values().any(|other| other.parent == *name);
        let leaves: Vec<_> = self
            .state
            .keys()
            .filter(|name| !is_parent(name))
            .cloned()
            .collect();
        if !leaves.is_empty() {
            let key = self.random.pick(&leaves);
            let request = Request::Remove { key: key.clone() };
            self.ask(request, |client| client.remove(key));
        }
    }

    fn update(&mut self) {
        let names: Vec<_> = self.layers().cloned().collect();
        if !names.is_empty() {
            let key = self.random.pick(&names);
            let revision = self.random.below(1000).to_string();
            let request = Request::Update {
                key: key.clone(),
                revision: revision.clone(),
            };
            let mask = format!("labels.{LABEL_REVISION}");
            self.ask(request, |client| {
                client.update(key, &[&mask], &[(LABEL_REVISION, &revision)])
            });
        }
    }

    fn new_name(&mut self) -> String {
        self.count += 1;
        format!("thread{}-boot{}-{}", self.number, self.boot, self.count)
    }

    fn layers(&self) -> impl Iterator<Item = &String> {
        let layers = self.state.iter().filter(|(_, one)| one.is_layer);
        layers.map(|(name, _)| name)
    }

    /// A layer to stand on, or none.
    fn some_parent(&mut self) -> String {
        let names = self.layers().filter(|name| self.depth(name) < DEEPEST);
        let names: Vec<_> = names.cloned().collect();
        match names.is_empty() || self.random.is_one_in(4) {
            true => String::new(),
            false => self.random.pick(&names).clone(),
        }
    }

    fn depth(&self, name: &str) -> usize {
        match self.state.get(name) {
            Some(snapshot) => 1 + self.depth(&snapshot.parent),
            None => 0,
        }
    }
}
