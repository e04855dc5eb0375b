//! What the daemon has been asked, as lines that leave the machine, and what
//! has to be there after that.

use std::collections::{BTreeMap, BTreeSet};

pub const LABEL_REF: &str = "containerd.io/snapshot.ref";
/// A label of ours that Update changes.
pub const LABEL_REVISION: &str = "test/revision";
/// How much a container may write, where there are quotas.
pub const LABEL_LIMIT: &str = "containerd.io/snapshot/overlay-read-write-splitting.max-size";

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    pub is_layer: bool,
    pub parent: String,
    pub labels: BTreeMap<String, String>,
}

/// Snapshots by key or name.
pub type State = BTreeMap<String, Snapshot>;

/// A request that changes something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// `layer` is the one being unpacked; empty for what a container writes, which
    /// has perhaps a limit.
    Prepare {
        key: String,
        parent: String,
        layer: String,
        limit: String,
    },
    Commit {
        key: String,
        name: String,
    },
    Remove {
        key: String,
    },
    Update {
        key: String,
        label: String,
        value: String,
    },
}

impl Request {
    /// The keys and names that it concerns.
    pub fn keys(&self) -> Vec<&str> {
        match self {
            Request::Commit { key, name } => vec![key, name],
            Request::Prepare { key, .. }
            | Request::Remove { key }
            | Request::Update { key, .. } => vec![key],
        }
    }

    /// What it makes of a state.
    pub fn apply(&self, state: &mut State) {
        match self {
            Request::Prepare {
                key,
                parent,
                layer,
                limit,
            } => {
                let snapshot = Snapshot {
                    is_layer: false,
                    parent: parent.clone(),
                    labels: prepare_labels(layer, limit),
                };
                state.insert(key.clone(), snapshot);
            }
            Request::Commit { key, name } => {
                let mut snapshot = state.remove(key).expect("it was prepared");
                snapshot.is_layer = true;
                snapshot.labels = [(LABEL_REVISION.to_owned(), "0".to_owned())].into();
                state.insert(name.clone(), snapshot);
            }
            Request::Remove { key } => {
                state.remove(key);
            }
            Request::Update { key, label, value } => {
                let snapshot = state.get_mut(key).expect("it was there");
                snapshot.labels.insert(label.clone(), value.clone());
            }
        }
    }

    fn words(&self) -> Vec<&str> {
        match self {
            Request::Prepare {
                key,
                parent,
                layer,
                limit,
            } => vec!["prepare", key, parent, layer, limit],
            Request::Commit { key, name } => vec!["commit", key, name],
            Request::Remove { key } => vec!["remove", key],
            Request::Update { key, label, value } => vec!["update", key, label, value],
        }
    }

    fn from_words(words: &[&str]) -> Option<Request> {
        let text = |word: &str| word.to_owned();
        Some(match *words {
            ["prepare", key, parent, layer, limit] => Request::Prepare {
                key: text(key),
                parent: text(parent),
                layer: text(layer),
                limit: text(limit),
            },
            ["commit", key, name] => Request::Commit {
                key: text(key),
                name: text(name),
            },
            ["remove", key] => Request::Remove { key: text(key) },
            ["update", key, label, value] => Request::Update {
                key: text(key),
                label: text(label),
                value: text(value),
            },
            _ => return None,
        })
    }
}

/// The labels with which a layer is unpacked, or of what a container writes.
pub fn prepare_labels(layer: &str, limit: &str) -> BTreeMap<String, String> {
    [(LABEL_REF, layer), (LABEL_LIMIT, limit)]
        .into_iter()
        .filter(|(_, value)| !value.is_empty())
        .map(|(label, value)| (label.to_owned(), value.to_owned()))
        .collect()
}

/// What a thread of the load says, each on one line. A thread has one request
/// under way at most.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// About to be sent.
    Asked(usize, Request),
    /// Answered: done.
    Done(usize),
    /// Not answered, as the daemon was killed, and not done: the next one shows
    /// things as they were before.
    NotDone(usize),
}

impl Record {
    pub fn line(&self) -> String {
        match self {
            Record::Asked(thread, request) => {
                format!("asked\t{thread}\t{}", request.words().join("\t"))
            }
            Record::Done(thread) => format!("done\t{thread}"),
            Record::NotDone(thread) => format!("not done\t{thread}"),
        }
    }

    /// `None` if the line is something else.
    pub fn from_line(line: &str) -> Option<Record> {
        let words: Vec<_> = line.split('\t').collect();
        match words[..] {
            ["asked", thread, ref words @ ..] => {
                let request = Request::from_words(words)?;
                Some(Record::Asked(thread.parse().ok()?, request))
            }
            ["done", thread] => Some(Record::Done(thread.parse().ok()?)),
            ["not done", thread] => Some(Record::NotDone(thread.parse().ok()?)),
            _ => None,
        }
    }
}

/// What is known of a machine's snapshots.
#[derive(Clone, Default)]
pub struct History {
    /// What has been acknowledged.
    pub state: State,
    /// What each thread has asked for without an answer so far.
    pub under_way: BTreeMap<usize, Request>,
    /// Layers acknowledged ever.
    pub layers: usize,
    /// What an acknowledged Remove or Commit has taken away since the last look.
    pub gone: BTreeSet<String>,
}

impl History {
    /// Takes in what was said from a boot until the power cut.
    pub fn read(&mut self, records: impl Iterator<Item = Record>) {
        records.for_each(|record| self.take(record));
    }

    /// Takes in one record.
    pub fn take(&mut self, record: Record) {
        let mut answered =
            |thread| -> Request { self.under_way.remove(&thread).expect("it was asked") };
        match record {
            Record::Asked(thread, request) => {
                let before = self.under_way.insert(thread, request);
                assert!(before.is_none(), "never answered: {before:?}");
            }
            Record::NotDone(thread) => drop(answered(thread)),
            Record::Done(thread) => {
                let request = answered(thread);
                request.apply(&mut self.state);
                self.layers += usize::from(matches!(request, Request::Commit { .. }));
                for key in request.keys() {
                    if self.state.contains_key(key) {
                        self.gone.remove(key);
                    } else {
                        self.gone.insert(key.to_owned());
                    }
                }
            }
        }
    }
}
