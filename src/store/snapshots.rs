//! The records of snapshots, and the queries for them.

use rusqlite::Row;
use rusqlite::types::FromSqlError;

use super::labels;
use super::sql::{Number, Rows, damaged, sql_error};
use crate::error::{Error, ErrorKind, Result};
use crate::text::filter::{Filters, Subject};
use crate::types::{Content, Info, Kind, Labels, Marks, Quoted, SnapshotId, Usage, Volume};

/// One snapshot as the database records it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// The snapshot's id, which is also the name of its directory.
    pub id: SnapshotId,
    /// The parent's id.
    pub parent_id: Option<SnapshotId>,
    /// Where the snapshot's directory is; `None` for a view with a parent,
    /// which has none.
    pub volume: Option<Volume>,
    /// The part of the record that containerd sees.
    pub info: Info,
    /// The usage counted at the commit; zero before the commit.
    pub usage: Usage,
    /// The total length of all files, as far as it is known.
    pub data_bytes: DataBytes,
    /// The marks counted at the commit; `None` if they were not counted.
    pub marks: Option<Marks>,
}

/// The most inodes of a layer that may count as hollow. Docker makes about ten
/// in the layer between an image and its container.
const MOST_HOLLOW_INODES: u64 = 64;

impl Snapshot {
    /// Whether this is a hollow layer, which an empty layer can replace: Docker's layer
    /// between an image and its container, whose mount points the container's start makes
    /// again. In any other layer, the names, owners and modes of empty files are content.
    pub fn is_hollow(&self) -> bool {
        // Docker gives such layers names with this ending.
        let is_dockers = self.volume == Some(Volume::Writable) && self.info.name.ends_with("-init");
        let is_small = self.usage.inodes <= MOST_HOLLOW_INODES;
        let is_hollow = self.marks.is_none_or(|marks| marks.is_hollow);
        is_dockers && is_small && is_hollow && self.data_bytes == DataBytes::Counted(0)
    }

    /// The snapshot's id and kind, and where its directory is.
    pub fn place(&self) -> Place {
        Place {
            id: self.id,
            kind: self.info.kind,
            volume: self.volume,
        }
    }
}

/// What is known about the total length of a layer's files ([`Content::data_bytes`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DataBytes {
    /// The length of all files, counted at the commit.
    Counted(u64),
    /// The snapshot was still mounted at the commit, so a container may have changed it
    /// since.
    WasMounted,
    /// The lengths were not counted, because the snapshot is not a layer, or because an
    /// earlier version of this program has committed it.
    Unknown,
}

/// One layer below a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ancestor {
    /// The layer's id.
    pub id: SnapshotId,
    /// Where the layer's bytes are.
    pub volume: Volume,
    /// Whether containerd has given the layer's files the owners of a user namespace.
    pub is_remapped: bool,
}

/// A snapshot to be prepared.
pub struct New<'a> {
    /// [`Kind::Active`] or [`Kind::View`].
    pub kind: Kind,
    /// The snapshot's key.
    pub key: &'a str,
    /// The parent's name; empty if there is no parent.
    pub parent: &'a str,
    /// The snapshot's labels, already checked.
    pub labels: &'a Labels,
    /// Where the snapshot's directory will be; `None` for a view that gets none.
    pub volume: Option<Volume>,
}

/// A snapshot that [`super::Transaction::create`] has entered.
#[derive(Debug, PartialEq, Eq)]
pub struct Created {
    /// The snapshot's id.
    pub id: SnapshotId,
    /// The layers below the snapshot, nearest first.
    pub ancestors: Vec<Ancestor>,
}

/// An active snapshot that will become a layer.
pub struct Commit<'a> {
    /// The snapshot's id. The key alone is not enough, because another snapshot may have
    /// got the same key meanwhile.
    pub id: SnapshotId,
    /// The snapshot's key.
    pub key: &'a str,
    /// The name that the layer gets.
    pub name: &'a str,
    /// A late parent, which is named only at the commit; empty to keep the present parent.
    pub parent: &'a str,
    /// The layer's labels, already checked.
    pub labels: &'a Labels,
    /// The bytes, inodes and attributes of the layer, as counted.
    pub content: Content,
    /// [`DataBytes::Counted`], unless the snapshot is mounted.
    pub data_bytes: DataBytes,
    /// Whether containerd has given the layer's files the owners of a user namespace, so
    /// that the files must not be id-mapped again.
    pub is_remapped: bool,
}

/// The id and kind of a snapshot, and where its directory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The snapshot's id.
    pub id: SnapshotId,
    /// The snapshot's kind.
    pub kind: Kind,
    /// Where the snapshot's directory is; `None` if it has none.
    pub volume: Option<Volume>,
}

impl Place {
    /// Whether the snapshot is an unmoved layer.
    pub fn is_unmoved(&self) -> bool {
        self.kind == Kind::Committed && self.volume == Some(Volume::Writable)
    }

    /// The volumes on which there is an entry with the snapshot's id.
    pub fn volumes(&self) -> impl Iterator<Item = Volume> {
        let link = self.is_unmoved().then_some(Volume::Image);
        self.volume.into_iter().chain(link)
    }
}

/// The number of snapshots of one kind whose directories are on one volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tally {
    /// The kind of the snapshots.
    pub kind: Kind,
    /// The volume of their directories; `None` for snapshots without a directory.
    pub volume: Option<Volume>,
    /// The number of snapshots.
    pub count: u64,
    /// The sum of the bytes that the layers among them took at their commits.
    pub bytes: u64,
}

/// One change of an update of labels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LabelChange {
    /// All labels are replaced.
    Replace(Labels),
    /// One label is set.
    Set(String, String),
    /// One label is removed, if the snapshot has it.
    Delete(String),
}

impl LabelChange {
    /// Applies the change to `labels`.
    pub fn apply(self, labels: &mut Labels) {
        match self {
            LabelChange::Replace(all) => *labels = all,
            LabelChange::Set(key, value) => {
                labels.insert(key, value);
            }
            LabelChange::Delete(key) => {
                labels.remove(&key);
            }
        }
    }
}

const SELECT: &str = "SELECT s.id, s.name, s.kind, s.volume, s.created_ns, s.updated_ns, \
     s.size_bytes, s.inodes, s.data_bytes, s.labels, s.parent_id, p.name, \
     s.attributes, s.is_hollow \
     FROM snapshot s LEFT JOIN snapshot p ON p.id = s.parent_id";

fn snapshot(row: &Row<'_>) -> rusqlite::Result<Snapshot> {
    let id: SnapshotId = row.get(0)?;
    let labels = row.get_ref(9)?.as_blob().ok().and_then(labels::decode);
    let damage = || damaged(format_args!("the labels of snapshot {id} cannot be read"));
    Ok(Snapshot {
        id,
        parent_id: row.get(10)?,
        volume: row.get(3)?,
        usage: Usage {
            size_bytes: row.get::<_, Number>(6)?.0,
            inodes: row.get::<_, Number>(7)?.0,
        },
        data_bytes: row.get(8)?,
        marks: marks(row.get(12)?, row.get(13)?),
        info: Info {
            name: row.get(1)?,
            parent: row.get::<_, Option<String>>(11)?.unwrap_or_default(),
            kind: row.get(2)?,
            created: row.get(4)?,
            updated: row.get(5)?,
            labels: labels.ok_or_else(|| FromSqlError::other(damage()))?,
        },
    })
}

fn marks(attributes: Option<Number>, is_hollow: Option<bool>) -> Option<Marks> {
    Some(Marks {
        attributes: attributes?.0,
        is_hollow: is_hollow?,
    })
}

fn place(row: &Row<'_>) -> rusqlite::Result<Place> {
    Ok(Place {
        id: row.get(0)?,
        kind: row.get(1)?,
        volume: row.get(2)?,
    })
}

impl Rows {
    /// The snapshot of that key or name, if there is one.
    pub fn find(&self, name: &str) -> Result<Option<Snapshot>> {
        let sql = format!("{SELECT} WHERE s.name = ?1");
        let doing = format_args!("look up snapshot {}", Quoted(name));
        self.one(&sql, [name], doing, snapshot)
    }

    /// The snapshot of that key or name.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`] if there is none.
    pub fn stat(&self, name: &str) -> Result<Snapshot> {
        self.find(name)?.ok_or_else(|| {
            let what = format!("snapshot {} does not exist", Quoted(name));
            Error::new(ErrorKind::NotFound, what)
        })
    }

    /// Calls `each` for every snapshot that matches the filters, in the order of the
    /// names, until `each` fails.
    pub fn list(
        &self,
        filters: &Filters,
        mut each: impl FnMut(Snapshot) -> Result<()>,
    ) -> Result<()> {
        let listing = |error| sql_error(error, "list snapshots");
        let mut query = self
            .connection()
            .prepare_cached(&format!("{SELECT} ORDER BY s.name"))
            .map_err(listing)?;
        let mut rows = query.query([]).map_err(listing)?;
        while let Some(row) = rows.next().map_err(listing)? {
            let snapshot = snapshot(row).map_err(listing)?;
            let info = &snapshot.info;
            let subject = Subject {
                name: &info.name,
                parent: &info.parent,
                kind: info.kind.word(),
                labels: &info.labels,
            };
            if filters.is_all() || filters.matches(&subject) {
                each(snapshot)?;
            }
        }
        Ok(())
    }

    /// The id, the kind and the volume of a snapshot; `None` if it was removed.
    pub fn place(&self, id: SnapshotId) -> Result<Option<Place>> {
        let sql = "SELECT id, kind, volume FROM snapshot WHERE id = ?1";
        self.one(sql, [id], format_args!("look up snapshot {id}"), place)
    }

    /// Every snapshot's id, kind, volume and name, in no order.
    pub fn inventory(&self) -> Result<Vec<(Place, String)>> {
        let sql = "SELECT id, kind, volume, name FROM snapshot";
        self.all(sql, "list the snapshots' directories", |row| {
            Ok((place(row)?, row.get(3)?))
        })
    }

    /// How many snapshots there are, by kind and volume.
    pub fn tally(&self) -> Result<Vec<Tally>> {
        let sql = "SELECT kind, volume, count(*), sum(size_bytes) FROM snapshot
             GROUP BY kind, volume ORDER BY kind, volume";
        self.all(sql, "count the snapshots", |row| {
            Ok(Tally {
                kind: row.get(0)?,
                volume: row.get(1)?,
                count: row.get::<_, Number>(2)?.0,
                bytes: row.get::<_, Number>(3)?.0,
            })
        })
    }

    /// Whether no snapshot has ever been entered.
    pub fn is_untouched(&self) -> Result<bool> {
        let sql = "SELECT 1 FROM sqlite_sequence WHERE name = 'snapshot'";
        let doing = "find out whether the database was ever used";
        let found = self.one(sql, [], doing, |_| Ok(()))?;
        Ok(found.is_none())
    }

    /// The highest id of any snapshot that was ever entered; 0 if there was
    /// none.
    pub fn highest_id(&self) -> Result<u64> {
        let sql = "SELECT seq FROM sqlite_sequence WHERE name = 'snapshot'";
        let highest = self.one(sql, [], "look up the highest id", |row| row.get(0))?;
        Ok(highest.map_or(0, |Number(highest)| highest))
    }

    /// Checks that a snapshot can be created, and returns the layers below it, nearest
    /// first.
    ///
    /// # Errors
    ///
    /// The same as in [`super::Transaction::create`].
    pub fn ancestors_of_new(&self, new: &New<'_>) -> Result<Vec<Ancestor>> {
        let parent = match new.parent {
            "" => None,
            name => Some(self.committed_parent(name, ErrorKind::InvalidArgument)?),
        };
        self.refuse_taken(new.key)?;
        parent.map_or(Ok(Vec::new()), |parent| self.chain(parent))
    }

    /// Checks that the snapshot `key` can be committed as `name` (onto `parent`, if given),
    /// and returns the snapshot and the parent that the layer will have.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::AlreadyExists`] if the name is in use (checked first);
    /// [`ErrorKind::NotFound`] for an unknown key or parent;
    /// [`ErrorKind::FailedPrecondition`] if the snapshot is not active or the
    /// parent not committed; [`ErrorKind::InvalidArgument`] if the snapshot
    /// stands on another parent already.
    pub fn committable(
        &self,
        key: &str,
        name: &str,
        parent: &str,
    ) -> Result<(Snapshot, Option<SnapshotId>)> {
        self.refuse_taken(name)?;
        let snapshot = self.stat(key)?;
        if snapshot.info.kind != Kind::Active {
            return Err(Error::refused(format!(
                "snapshot {} is {}, and only an active snapshot can be committed",
                Quoted(key),
                snapshot.info.kind
            )));
        }
        let parent_id = match (parent, snapshot.info.parent.as_str()) {
            ("", _) => snapshot.parent_id,
            (given, "") => Some(self.committed_parent(given, ErrorKind::FailedPrecondition)?),
            (given, has) if given == has => snapshot.parent_id,
            (given, has) => {
                return Err(Error::invalid(format!(
                    "snapshot {} stands on {} and cannot be committed onto {}",
                    Quoted(key),
                    Quoted(has),
                    Quoted(given)
                )));
            }
        };
        Ok((snapshot, parent_id))
    }

    /// The id of the layer `name`, which will be a parent. `otherwise` is the kind of the error
    /// that is returned if the snapshot is not committed.
    pub(super) fn committed_parent(&self, name: &str, otherwise: ErrorKind) -> Result<SnapshotId> {
        let parent = self.find(name)?.ok_or_else(|| {
            let what = format!("parent snapshot {} does not exist", Quoted(name));
            Error::new(ErrorKind::NotFound, what)
        })?;
        if parent.info.kind != Kind::Committed {
            let what = format!(
                "parent snapshot {} is {}, but a parent has to be committed",
                Quoted(name),
                parent.info.kind
            );
            return Err(Error::new(otherwise, what));
        }
        Ok(parent.id)
    }

    pub(super) fn refuse_taken(&self, name: &str) -> Result<()> {
        if self.find(name)?.is_none() {
            return Ok(());
        }
        let what = format!("snapshot {} already exists", Quoted(name));
        Err(Error::new(ErrorKind::AlreadyExists, what))
    }

    /// Runs `work` in one read transaction: all its queries see the same state of the
    /// database, and SQLite's locks are taken only once.
    pub fn at_one_moment<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let connection = self.connection();
        if !connection.is_autocommit() {
            return work();
        }
        let begun = connection
            .unchecked_transaction()
            .map_err(|error| sql_error(error, "begin to read the database"))?;
        let found = work();
        drop(begun);
        found
    }
}
