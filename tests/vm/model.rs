//! What the daemon has been asked, as lines that leave the machine, and what
//! has to be there after that.

use std::collections::{BTreeMap, BTreeSet};

pub const LABEL_REF: &str = "containerd.io/snapshot.ref";
/// A label of ours that Update changes.
pub const LABEL_REVISION: &str = "test/revision";

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
    /// `layer` is the one being unpacked; empty for what a container writes.
    Prepare {
        key: String,
        parent: String,
        layer: String,
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
        revision: String,
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
            Request::Prepare { key, parent, layer } => {
                let snapshot = Snapshot {
                    is_layer: false,
                    parent: parent.clone(),
                    labels: prepare_labels(layer),
                };
                state.insert(key.clone(), snapshot);
            }
            Request::Commit { key, name } => {
                let mut snapshot = state.remove(key).expect("it was prepared");
                snapshot.is_layer = true;
                snapshot.labels = revision_label("0");
                state.insert(name.clone(), snapshot);
            }
            Request::Remove { key } => {
                state.remove(key);
            }
            Request::Update { key, revision } => {
                let snapshot = state.get_mut(key).expect("it was there");
                snapshot.labels.extend(revision_label(revision));
            }
        }
    }

    fn words(&self) -> Vec<&str> {
        match self {
            Request::Prepare { key, parent, layer } => vec!["prepare", key, parent, layer],
            Request::Commit { key, name } => vec!["commit", key, name],
            Request::Remove { key } => vec!["remove", key],
            Request::Update { key, revision } => vec!["update", key, revision],
        }
    }

    fn from_words(words: &[&str]) -> Option<Request> {
        let text = |word: &str| word.to_owned();
        Some(match *words {
            ["prepare", key, parent, layer] => Request::Prepare {
                key: text(key),
                parent: text(parent),
                layer: text(layer),
            },
            ["commit", key, name] => Request::Commit {
                key: text(key),
                name: text(name),
            },
            ["remove", key] => Request::Remove { key: text(key) },
            ["update", key, revision] => Request::Update {
                key: text(key),
                revision: text(revision),
            },
            _ => return None,
        })
    }
}

/// The labels with which a layer is unpacked; none for what a container writes.
pub fn prepare_labels(layer: &str) -> BTreeMap<String, String> {
    let reference = (!layer.is_empty()).then(|| (LABEL_REF.to_owned(), layer.to_owned()));
    reference.into_iter().collect()
}

fn revision_label(revision: &str) -> BTreeMap<String, String> {
    [(LABEL_REVISION.to_owned(), revision.to_owned())].into()
}

/// What a thread of the load says, each on one line. A thread has one request
/// under way at most.
#[derive(Debug, PartialEq, Eq)]
pub enum Record {
    /// About to be sent.
    Asked(usize, Request),
    /// Answered: done.
    Done(usize),
}

impl Record {
    pub fn line(&self) -> String {
        match self {
            Record::Asked(thread, request) => {
                format!("asked\t{thread}\t{}", request.words().join("\t"))
            }
            Record::Done(thread) => format!("done\t{thread}"),
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
            _ => None,
        }
    }
}

/// What is known of a machine's snapshots.
#[derive(Default)]
pub struct History {
    /// What has been acknowledged.
    pub state: State,
    /// What was under way at the end: done or not.
    pub in_flight: Vec<Request>,
    /// Layers acknowledged ever.
    pub layers: usize,
    /// What an acknowledged Remove or Commit has taken away since the last look.
    pub gone: BTreeSet<String>,
}

impl History {
    /// Takes in what was said from a boot until the power cut.
    pub fn read(&mut self, records: impl Iterator<Item = Record>) {
        let mut under_way = BTreeMap::new();
        for record in records {
            match record {
                Record::Asked(thread, request) => {
                    let before = under_way.insert(thread, request);
                    assert!(before.is_none(), "never answered: {before:?}");
                }
                Record::Done(thread) => {
                    let request: Request = under_way.remove(&thread).expect("it was asked");
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
        self.in_flight = under_way.into_values().collect();
    }
}
