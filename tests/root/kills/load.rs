//! A client that works until the daemon is killed, and the results that it may
//! expect afterwards.
//!
//! Each client has names of its own, so it knows the result of every request,
//! whatever the others do: none is refused.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use grpcio::RpcStatusCode;
use overlay_read_write_splitting_snapshotter::proto::snapshots::Kind;
use overlay_read_write_splitting_snapshotter::types::{LABEL_SNAPSHOT_REF, Volume};

use crate::support::client::{Client, Refusal};
use crate::support::mounted::upper_of;
use crate::support::random::Random;

/// Few enough that all of them can be compared after every kill.
const MAX_SNAPSHOTS: usize = 15;
/// Names are used again soon after their snapshots were removed.
const NAMES: u64 = 40;
/// A layer above 1 MiB moves while others stand on it; a smaller one waits.
const LARGE_BYTES: usize = 5 << 18;

pub type Labels = BTreeMap<String, String>;

/// A snapshot as a List returns it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    pub kind: Kind,
    pub parent: String,
    pub labels: Labels,
}

/// A file, identified by what was written into it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    /// Different for all files of a client.
    stamp: u64,
    length: usize,
}

impl Written {
    pub fn content(self) -> Vec<u8> {
        self.stamp.to_le_bytes().repeat(self.length / 8)
    }
}

/// A snapshot as its client knows it.
#[derive(Clone, Debug)]
pub struct Known {
    pub row: Row,
    /// Where it was prepared.
    pub volume: Volume,
    pub files: BTreeMap<String, Written>,
}

/// The effect of a request: one snapshot less, one more, or both for a snapshot
/// that changes. It never happens in part.
#[derive(Debug, Default)]
struct Change {
    without: Option<String>,
    with: Option<(String, Known)>,
}

/// The daemon was killed before it answered.
struct Cut;

/// How many requests of each kind were answered.
#[derive(Debug, Default)]
pub struct Answered {
    pub prepares: u64,
    pub commits: u64,
    pub removes: u64,
    pub updates: u64,
    pub cleanups: u64,
    /// Changes that were interrupted, and how many of them had happened.
    pub cut: u64,
    pub cut_but_done: u64,
}

pub struct Worker {
    /// The prefix of all its names.
    prefix: String,
    random: Random,
    pub known: BTreeMap<String, Known>,
    /// The change of the request that the last kill has interrupted.
    in_doubt: Option<Change>,
    last_stamp: u64,
    pub answered: Answered,
}

impl Worker {
    pub fn new(number: u64, random: Random) -> Worker {
        Worker {
            prefix: format!("{number}/"),
            random,
            known: BTreeMap::new(),
            in_doubt: None,
            last_stamp: 0,
            answered: Answered::default(),
        }
    }

    /// Makes requests, one after another, until one is interrupted. That must
    /// not happen unless `is_killing` is set.
    pub fn work(&mut self, client: &Client, is_killing: &AtomicBool) {
        while self.step(client).is_ok() {}
        assert!(
            is_killing.load(Ordering::SeqCst),
            "cut off without a kill: {:?}",
            self.in_doubt
        );
    }

    fn step(&mut self, client: &Client) -> Result<(), Cut> {
        let is_full = self.known.len() >= MAX_SNAPSHOTS;
        match self.random.below(12) {
            0..=3 if !is_full => self.prepare(client),
            4..=5 => self.write(client),
            6..=8 => self.commit(client),
            9 => self.update(client),
            10 => self.cleanup(client),
            _ => self.remove(client),
        }
    }

    /// Sends a request. If it is interrupted, either nothing or all of `change`
    /// may have happened.
    fn request(
        &mut self,
        change: Change,
        send: impl FnOnce() -> Result<(), Refusal>,
    ) -> Result<(), Cut> {
        match send() {
            Ok(()) => {
                self.apply(change);
                Ok(())
            }
            Err((RpcStatusCode::UNAVAILABLE, _)) => {
                self.in_doubt = Some(change);
                Err(Cut)
            }
            Err(refusal) => panic!("{change:?}: {refusal:?}"),
        }
    }

    fn apply(&mut self, change: Change) {
        if let Some(name) = change.without {
            self.known.remove(&name);
        }
        self.known.extend(change.with);
    }

    fn prepare(&mut self, client: &Client) -> Result<(), Cut> {
        let number = self.random.below(NAMES);
        let mut labels = Labels::new();
        let (key, volume) = if self.random.is_one_in(2) {
            let layer = format!("{}layer-{number}", self.prefix);
            let key = format!("{}extract-{number} layer-{number}", self.prefix);
            labels.insert(LABEL_SNAPSHOT_REF.to_owned(), layer);
            (key, Volume::Image)
        } else {
            (format!("{}web-{number}", self.prefix), Volume::Writable)
        };
        if self.known.contains_key(&key) {
            return Ok(());
        }
        let parent = match self.random.is_one_in(4) {
            true => None,
            false => self.any(|known| known.row.kind == Kind::COMMITTED),
        };
        let parent = parent.unwrap_or_default();
        let row = Row {
            kind: Kind::ACTIVE,
            parent: parent.clone(),
            labels: labels.clone(),
        };
        let known = Known {
            row,
            volume,
            files: BTreeMap::new(),
        };
        let change = Change {
            without: None,
            with: Some((key.clone(), known)),
        };
        self.request(change, || {
            client.prepare(&key, &parent, &pairs(&labels)).map(drop)
        })?;
        self.answered.prepares += 1;
        Ok(())
    }

    /// Writes to the mounts, as a container does that is not disturbed by the
    /// daemon's end.
    fn write(&mut self, client: &Client) -> Result<(), Cut> {
        let Some(key) = self.any(|known| known.row.kind == Kind::ACTIVE) else {
            return Ok(());
        };
        let mut upper = None;
        self.request(Change::default(), || {
            upper = Some(upper_of(&client.mounts(&key)?));
            Ok(())
        })?;
        let upper = upper.expect("the mounts were answered");
        self.last_stamp += 1;
        let written = Written {
            stamp: self.last_stamp,
            length: match self.random.is_one_in(4) {
                true => LARGE_BYTES,
                false => 64,
            },
        };
        let name = format!("file-{}", self.random.below(3));
        fs::write(Path::new(&upper).join(&name), written.content()).unwrap();
        let known = self.known.get_mut(&key).expect("it was chosen from there");
        known.files.insert(name, written);
        Ok(())
    }

    fn commit(&mut self, client: &Client) -> Result<(), Cut> {
        let number = self.random.below(NAMES);
        let name = format!("{}layer-{number}", self.prefix);
        let key = self.any(|known| known.row.kind == Kind::ACTIVE);
        let Some(key) = key.filter(|_| !self.known.contains_key(&name)) else {
            return Ok(());
        };
        let mut known = self.known[&key].clone();
        let labels = Labels::from([("committed".to_owned(), key.clone())]);
        known.row.kind = Kind::COMMITTED;
        known.row.labels.clone_from(&labels);
        let change = Change {
            without: Some(key.clone()),
            with: Some((name.clone(), known)),
        };
        self.request(change, || client.commit(&key, &name, &pairs(&labels)))?;
        self.answered.commits += 1;
        Ok(())
    }

    fn update(&mut self, client: &Client) -> Result<(), Cut> {
        let Some(name) = self.any(|_| true) else {
            return Ok(());
        };
        let mut known = self.known[&name].clone();
        let value = self.random.below(1000).to_string();
        let mask: &[&str] = match self.random.is_one_in(2) {
            true => &["labels.updated"],
            false => &[],
        };
        if mask.is_empty() {
            known.row.labels.clear();
        }
        known.row.labels.insert("updated".to_owned(), value.clone());
        let change = Change {
            without: Some(name.clone()),
            with: Some((name.clone(), known)),
        };
        let given = [("updated", value.as_str())];
        self.request(change, || client.update(&name, mask, &given).map(drop))?;
        self.answered.updates += 1;
        Ok(())
    }

    fn remove(&mut self, client: &Client) -> Result<(), Cut> {
        let parents: BTreeSet<_> = self.known.values().map(|known| &known.row.parent).collect();
        let leaves: Vec<_> = self
            .known
            .keys()
            .filter(|name| !parents.contains(name))
            .cloned()
            .collect();
        if leaves.is_empty() {
            return Ok(());
        }
        let name = self.random.pick(&leaves).clone();
        let change = Change {
            without: Some(name.clone()),
            with: None,
        };
        self.request(change, || client.remove(&name))?;
        self.answered.removes += 1;
        Ok(())
    }

    fn cleanup(&mut self, client: &Client) -> Result<(), Cut> {
        self.request(Change::default(), || client.cleanup())?;
        self.answered.cleanups += 1;
        Ok(())
    }

    /// One of the known snapshots for which `is_meant` returns `true`.
    fn any(&mut self, is_meant: impl Fn(&Known) -> bool) -> Option<String> {
        let meant: Vec<_> = self
            .known
            .iter()
            .filter(|(_, known)| is_meant(known))
            .map(|(name, _)| name)
            .collect();
        match meant.is_empty() {
            true => None,
            false => Some((*self.random.pick(&meant)).clone()),
        }
    }

    /// Compares the listed snapshots with the known ones, finds out what
    /// happened to the request in doubt, and leaves in `listed` the snapshots
    /// of other clients.
    pub fn settle(&mut self, listed: &mut BTreeMap<String, Row>) {
        let mut mine = BTreeMap::new();
        listed.retain(|name, row| {
            let is_mine = name.starts_with(&self.prefix);
            if is_mine {
                mine.insert(name.clone(), row.clone());
            }
            !is_mine
        });
        let change = self.in_doubt.take().unwrap_or_default();
        let said = format!("in doubt: {change:?}");
        self.answered.cut += u64::from(change.without.is_some() || change.with.is_some());
        if self.rows() == mine {
            return;
        }
        self.apply(change);
        self.answered.cut_but_done += 1;
        let rows = self.rows();
        let differs = |name: &&String| rows.get(*name) != mine.get(*name);
        let names: BTreeSet<_> = rows.keys().chain(mine.keys()).filter(differs).collect();
        for name in &names {
            eprintln!(
                "{name}: expected {:?}, listed {:?}",
                rows.get(*name),
                mine.get(*name)
            );
        }
        assert!(names.is_empty(), "{said}");
    }

    fn rows(&self) -> BTreeMap<String, Row> {
        let rows = self.known.iter();
        rows.map(|(name, known)| (name.clone(), known.row.clone()))
            .collect()
    }
}

fn pairs(labels: &Labels) -> Vec<(&str, &str)> {
    labels
        .iter()
        .map(|(key, value)| (key.as_str(), value.as_str()))
        .collect()
}
