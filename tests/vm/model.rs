//! The requests to the daemon, as lines that leave the machine, and the state
//! that they lead to.

use std::collections::{BTreeMap, BTreeSet};

pub const LABEL_REF: &str = "containerd.io/snapshot.ref";
/// A label for tests, which Update changes.
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
    /// `layer` is the layer being unpacked; empty for a container's snapshot,
    /// which may have a limit.
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
    /// The keys and names that the request is about.
    pub fn keys(&self) -> Vec<&str> {
        match self {
            Request::Commit { key, name } => vec![key, name],
            Request::Prepare { key, .. }
            | Request::Remove { key }
            | Request::Update { key, .. } => vec![key],
        }
    }

    /// Applies the request to a state.
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

/// The labels with which a layer is unpacked, or those of a container's
/// snapshot.
pub fn prepare_labels(layer: &str, limit: &str) -> BTreeMap<String, String> {
    [(LABEL_REF, layer), (LABEL_LIMIT, limit)]
        .into_iter()
        .filter(|(_, value)| !value.is_empty())
        .map(|(label, value)| (label.to_owned(), value.to_owned()))
        .collect()
}

/// The reports of a thread of the load, each in one line. A thread has at most
/// one request under way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// A request is about to be sent.
    Asked(usize, Request),
    /// A request was answered: it is done.
    Done(usize),
    /// A request was not answered, because the daemon was killed, and is not
    /// done: the daemon's next life shows the state before it.
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

    /// Parses a line; `None` if it is something else.
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
    /// The acknowledged state.
    pub state: State,
    /// The requests that were sent and not answered so far.
    pub under_way: BTreeMap<usize, Request>,
    /// The number of layers that were ever acknowledged.
    pub layers: usize,
    /// Snapshots that an acknowledged Remove or Commit has removed since the
    /// last look.
    pub gone: BTreeSet<String>,
}

impl History {
    /// Processes the records from a boot to the power cut.
    pub fn read(&mut self, records: impl Iterator<Item = Record>) {
        records.for_each(|record| self.take(record));
    }

    /// Processes one record.
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
