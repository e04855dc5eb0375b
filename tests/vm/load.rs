//! The load on the daemon in the machine: several clients unpack layers, commit
//! containers, heal layers and remove snapshots at once. The clients flush nothing, and mount
//! no overlay: unmounting one flushes its upper file system, which would hide
//! what the daemon fails to flush.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::fs;
use std::path::PathBuf;
use std::thread;

use grpcio::RpcStatusCode;
use overlay_read_write_splitting_snapshotter::proto::healing::HealRequest;
use overlay_read_write_splitting_snapshotter::proto::snapshots::{Info, Kind};

use crate::content;
use crate::model::{LABEL_LIMIT, LABEL_REVISION, Record, Request, Snapshot, State, prepare_labels};
use crate::support::client::{Client, Refusal};
use crate::support::mounted::upper_of;
use crate::support::random::Random;

const THREADS: usize = 3;
/// The length of the longest chain of layers.
const DEEPEST: usize = 5;

/// The line that reports that the load has begun.
pub const BEGUN: &str = "begun";

/// The kind and size of a load.
#[derive(Clone, Copy)]
pub struct Load {
    pub seed: u64,
    /// The number of the daemon's start, so that no name is used twice.
    pub boot: u32,
    /// The most layers of one thread, so that the disks do not fill up.
    pub most_layers: usize,
    pub most_active: usize,
    /// How many of 100 steps heal a layer.
    pub healings: u64,
    /// Whether containers get limits.
    pub has_quotas: bool,
}

impl Load {
    /// Loads the daemon at that socket until `is_over`, or until the daemon does not
    /// answer any more. Each request is reported before it is sent, and when it was
    /// answered.
    pub fn run(
        &self,
        address: &str,
        say: &(dyn Fn(Record) + Sync),
        is_over: &(dyn Fn() -> bool + Sync),
    ) {
        let all = Client::connect(address).list_pages(&[]);
        let Some(all) = answer("list", all).map(|pages| pages.concat()) else {
            return;
        };
        thread::scope(|scope| {
            for number in 0..THREADS {
                let mine = all.iter().filter(|info| is_of(&info.name, number));
                let mut worker = Worker {
                    load: *self,
                    number,
                    count: 0,
                    client: Client::connect(address),
                    state: mine
                        .map(|info| (info.name.clone(), snapshot(info)))
                        .collect(),
                    unpacked: BTreeMap::new(),
                    random: content::random(self.seed, &format!("{} {number}", self.boot)),
                    say,
                };
                scope.spawn(move || while !is_over() && worker.step().is_some() {});
            }
        });
    }
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

/// Whether a thread made it, in this boot or before.
fn is_of(name: &str, thread: usize) -> bool {
    name.contains(&format!("thread{thread}-"))
}

/// `None` if the daemon has ended before it answered.
fn answer<T>(request: impl Debug, answer: Result<T, Refusal>) -> Option<T> {
    match answer {
        Ok(answer) => Some(answer),
        Err((RpcStatusCode::UNAVAILABLE | RpcStatusCode::CANCELLED, _)) => None,
        Err(refusal) => panic!("{request:?}: {refusal:?}"),
    }
}

struct Worker<'a> {
    load: Load,
    number: usize,
    /// How many snapshots it has made.
    count: usize,
    client: Client,
    /// Its own snapshots: no other thread uses or removes them.
    state: State,
    /// The directories `fs` of the layers that it has unpacked.
    unpacked: BTreeMap<String, PathBuf>,
    random: Random,
    say: &'a (dyn Fn(Record) + Sync),
}

/// Each step returns `None` once the daemon does not answer any more.
impl Worker<'_> {
    fn step(&mut self) -> Option<()> {
        let layers = self.layers().count();
        let active = self.state.len() - layers;
        let is_full = layers > self.load.most_layers || active > self.load.most_active;
        if self.random.below(100) < self.load.healings {
            return self.heal();
        }
        match self.random.below(100) {
            _ if is_full => self.remove(),
            0..45 => self.unpack(),
            45..70 => self.commit_container(),
            70..77 => self.prepare_container(),
            77..88 => self.remove(),
            88..96 => self.update(),
            _ => answer("clean up", self.client.cleanup()),
        }
    }

    /// Sends a request, and reports it before and after.
    fn ask<T>(
        &mut self,
        request: Request,
        send: impl FnOnce(&Client) -> Result<T, Refusal>,
    ) -> Option<T> {
        (self.say)(Record::Asked(self.number, request.clone()));
        let answer = answer(&request, send(&self.client))?;
        (self.say)(Record::Done(self.number));
        request.apply(&mut self.state);
        Some(answer)
    }

    fn prepare(&mut self, key: &str, parent: &str, layer: &str) -> Option<PathBuf> {
        let limit = match self.load.has_quotas && layer.is_empty() {
            true => self.some_limit(),
            false => String::new(),
        };
        let request = Request::Prepare {
            key: key.to_owned(),
            parent: parent.to_owned(),
            layer: layer.to_owned(),
            limit: limit.clone(),
        };
        let labels = prepare_labels(layer, &limit);
        let labels: Vec<_> = labels
            .iter()
            .map(|(key, value)| (key.as_str(), value.as_str()))
            .collect();
        let mounts = self.ask(request, |client| client.prepare(key, parent, &labels))?;
        Some(upper_of(&mounts))
    }

    fn commit(&mut self, key: &str, name: &str) -> Option<()> {
        let request = Request::Commit {
            key: key.to_owned(),
            name: name.to_owned(),
        };
        self.ask(request, |client| {
            client.commit(key, name, &[(LABEL_REVISION, "0")])
        })
    }

    fn unpack(&mut self) -> Option<()> {
        let name = self.new_name();
        let key = format!("extract-{} {name}", self.count);
        let upper = self.make_layer(&key, &name, &name.clone())?;
        self.unpacked.insert(name, upper);
        Some(())
    }

    /// Has an unpacked layer replaced by a copy, as `check --heal` does.
    fn heal(&mut self) -> Option<()> {
        let layers = self.unpacked.iter();
        let layers: Vec<_> = layers
            .filter(|(name, _)| self.state.contains_key(*name))
            .collect();
        if layers.is_empty() {
            return Some(());
        }
        let (layer, upper) = *self.random.pick(&layers);
        let id = upper.parent().unwrap();
        let snapshots = id.parent().unwrap();
        self.count += 1;
        let unpacked = format!(".unpacked-{}-{}{}", self.load.boot, self.number, self.count);
        for directory in ["", "fs", "work"] {
            fs::create_dir(snapshots.join(&unpacked).join(directory)).unwrap();
        }
        let content = content::of_layer(self.load.seed, layer);
        content::write(&content, &snapshots.join(&unpacked).join("fs")).unwrap();
        let state = fs::read_to_string(snapshots.with_file_name("state")).unwrap();
        let identity = state
            .lines()
            .find_map(|line| line.strip_prefix("identity "));
        let request = HealRequest {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            root: identity.unwrap().to_owned(),
            layer: layer.clone(),
            id: id.file_name().unwrap().to_str().unwrap().parse().unwrap(),
            unpacked,
            ..HealRequest::default()
        };
        answer(&request, self.client.heal(&request)).map(drop)
    }

    fn commit_container(&mut self) -> Option<()> {
        let name = self.new_name();
        self.make_layer(&format!("container {name}"), &name, "")
            .map(drop)
    }

    /// Returns where the layer was written.
    fn make_layer(&mut self, key: &str, name: &str, reference: &str) -> Option<PathBuf> {
        let parent = self.some_parent();
        let upper = self.prepare(key, &parent, reference)?;
        content::write(&content::of_layer(self.load.seed, name), &upper)
            .unwrap_or_else(|error| panic!("{}: {error}", upper.display()));
        self.commit(key, name)?;
        Some(upper)
    }

    /// Prepares a container that keeps running.
    fn prepare_container(&mut self) -> Option<()> {
        let key = format!("running {}", self.new_name());
        let parent = self.some_parent();
        let upper = self.prepare(&key, &parent, "")?;
        fs::write(upper.join("file"), &key).unwrap();
        Some(())
    }

    fn remove(&mut self) -> Option<()> {
        let is_parent = |name: &String| self.state.values().any(|other| other.parent == *name);
        let leaves: Vec<_> = self
            .state
            .keys()
            .filter(|name| !is_parent(name))
            .cloned()
            .collect();
        if leaves.is_empty() {
            return Some(());
        }
        let key = self.random.pick(&leaves);
        let request = Request::Remove { key: key.clone() };
        self.ask(request, |client| client.remove(key))
    }

    /// Changes a layer's revision, or a container's limit.
    fn update(&mut self) -> Option<()> {
        let is_limit = self.load.has_quotas && self.random.is_one_in(2);
        let wanted = self.state.iter().filter(|(_, one)| match is_limit {
            true => one.labels.contains_key(LABEL_LIMIT),
            false => one.is_layer,
        });
        let keys: Vec<_> = wanted.map(|(key, _)| key.clone()).collect();
        if keys.is_empty() {
            return Some(());
        }
        let key = self.random.pick(&keys);
        let (label, value) = match is_limit {
            true => (LABEL_LIMIT, self.some_limit()),
            false => (LABEL_REVISION, self.random.below(1000).to_string()),
        };
        let request = Request::Update {
            key: key.clone(),
            label: label.to_owned(),
            value: value.clone(),
        };
        let (mask, labels) = (format!("labels.{label}"), [(label, value.as_str())]);
        self.ask(request, |client| client.update(key, &[&mask], &labels))
            .map(drop)
    }

    /// A limit that is more than a container writes here.
    fn some_limit(&mut self) -> String {
        format!("{}M", 8 + self.random.below(32))
    }

    fn new_name(&mut self) -> String {
        self.count += 1;
        format!(
            "thread{}-boot{}-{}",
            self.number, self.load.boot, self.count
        )
    }

    fn layers(&self) -> impl Iterator<Item = &String> {
        let layers = self.state.iter().filter(|(_, one)| one.is_layer);
        layers.map(|(name, _)| name)
    }

    /// A layer to stand on; empty for none.
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
