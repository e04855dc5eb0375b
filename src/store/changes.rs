//! Statements that change snapshots, within a transaction. They refuse the same
//! changes as containerd's own store (`core/snapshots/storage/bolt.go`), and check
//! the conditions in the same order.

use rusqlite::params;

use super::Transaction;
use super::labels;
use super::snapshots::{Commit, Created, LabelChange, New, Place, Snapshot};
use super::sql::Number;
use crate::error::{Error, ErrorKind, Result};
use crate::types::{Content, Kind, Quoted, SnapshotId, Timestamp};

impl Transaction<'_> {
    /// Enters an active snapshot or a view under an id that was never given out before.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`] for an unknown parent,
    /// [`ErrorKind::InvalidArgument`] for a parent that is not committed,
    /// [`ErrorKind::AlreadyExists`] for a key in use.
    pub fn create(&self, id: SnapshotId, new: &New<'_>) -> Result<Created> {
        let ancestors = self.ancestors_of_new(new)?;
        let parent = ancestors.first().map(|parent| parent.id);
        self.execute(
            "INSERT INTO snapshot
                 (id, name, parent_id, kind, volume, created_ns, updated_ns, labels)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?6, ?7)",
            params![
                id,
                new.key,
                parent,
                new.kind,
                new.volume,
                Timestamp::now(),
                labels::encode(new.labels),
            ],
            format_args!("enter snapshot {}", Quoted(new.key)),
        )?;
        Ok(Created { id, ancestors })
    }

    /// Like [`Transaction::create`], with the first id after all that were given out.
    #[cfg(test)]
    pub fn create_next(&self, new: &New<'_>) -> Result<Created> {
        self.create(SnapshotId::new(self.highest_id()? + 1), new)
    }

    /// Turns an active snapshot into a layer; it keeps its id.
    ///
    /// # Errors
    ///
    /// Those of [`Rows::committable`](super::Rows::committable);
    /// [`ErrorKind::NotFound`] if another snapshot has the key by now.
    pub fn commit_snapshot(&self, commit: &Commit<'_>) -> Result<()> {
        let (snapshot, parent) = self.committable(commit.key, commit.name, commit.parent)?;
        if snapshot.id != commit.id {
            let what = format!("snapshot {} was removed meanwhile", Quoted(commit.key));
            return Err(Error::new(ErrorKind::NotFound, what));
        }
        self.execute(
            "UPDATE snapshot SET name = ?2, parent_id = ?3, kind = ?4, created_ns = ?5,
                 updated_ns = ?5, size_bytes = ?6, inodes = ?7, data_bytes = ?8, labels = ?9,
                 is_remapped = ?10, attributes = ?11, is_hollow = ?12
             WHERE id = ?1",
            params![
                snapshot.id,
                commit.name,
                parent,
                Kind::Committed,
                Timestamp::now(),
                Number(commit.content.usage.size_bytes),
                Number(commit.content.usage.inodes),
                commit.data_bytes,
                labels::encode(commit.labels),
                commit.is_remapped,
                commit.content.marks.map(|marks| Number(marks.attributes)),
                commit.content.marks.map(|marks| marks.is_hollow),
            ],
            format_args!("commit snapshot {}", Quoted(commit.key)),
        )
    }

    /// Deletes the row of a snapshot, and returns the snapshot's place. From then on,
    /// the snapshot's directory may be deleted, and for an unmoved layer also its
    /// entries on the image volume.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`] if there is no such snapshot;
    /// [`ErrorKind::FailedPrecondition`] if another snapshot stands on it.
    pub fn remove(&self, name: &str) -> Result<Place> {
        let removing = format!("remove snapshot {}", Quoted(name));
        let snapshot = self.stat(name)?;
        let child: Option<String> = self.one(
            "SELECT name FROM snapshot WHERE parent_id = ?1 LIMIT 1",
            [snapshot.id],
            &removing,
            |row| row.get(0),
        )?;
        if let Some(child) = child {
            return Err(Error::refused(format!(
                "snapshot {} is the parent of {}, which has to be removed first",
                Quoted(name),
                Quoted(&child)
            )));
        }
        let sql = "DELETE FROM snapshot WHERE id = ?1";
        self.execute(sql, [snapshot.id], &removing)?;
        let place = snapshot.place();
        for volume in place.volumes() {
            self.bury(place.id, volume)?;
        }
        Ok(place)
    }

    /// Applies changes to a snapshot's labels, in order, and returns the changed
    /// snapshot.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`] if there is no such snapshot.
    pub fn update(&self, name: &str, changes: Vec<LabelChange>) -> Result<Snapshot> {
        let mut snapshot = self.stat(name)?;
        for change in changes {
            change.apply(&mut snapshot.info.labels);
        }
        snapshot.info.updated = Timestamp::now();
        self.execute(
            "UPDATE snapshot SET updated_ns = ?2, labels = ?3 WHERE id = ?1",
            params![
                snapshot.id,
                snapshot.info.updated,
                labels::encode(&snapshot.info.labels),
            ],
            format_args!("update snapshot {}", Quoted(name)),
        )?;
        Ok(snapshot)
    }

    /// Deletes the rows of snapshots. All snapshots that stand on one of them must be in
    /// `ids` as well. Their directories are later set aside, unless [`Transaction::bury`]
    /// records that a directory may be deleted.
    pub fn drop_snapshots(&self, ids: &[SnapshotId]) -> Result<()> {
        // The links to parents are deleted first: in a damaged database, two snapshots may be
        // each other's parent.
        for sql in [
            "UPDATE snapshot SET parent_id = NULL WHERE id = ?1",
            "DELETE FROM snapshot WHERE id = ?1",
        ] {
            for id in ids {
                let doing = format_args!("delete snapshot {id} from the database");
                self.execute(sql, [id], doing)?;
            }
        }
        Ok(())
    }

    /// Replaces the recorded size, inodes and attributes of a layer.
    pub fn record_content(&self, id: SnapshotId, content: &Content) -> Result<()> {
        self.forget_digest(id)?;
        self.execute(
            "UPDATE snapshot SET size_bytes = ?2, inodes = ?3, data_bytes = ?4, attributes = ?5,
                 is_hollow = ?6
             WHERE id = ?1",
            params![
                id,
                Number(content.usage.size_bytes),
                Number(content.usage.inodes),
                Number(content.data_bytes),
                content.marks.map(|marks| Number(marks.attributes)),
                content.marks.map(|marks| marks.is_hollow),
            ],
            format_args!("record the size of layer {id}"),
        )
    }

    /// Ensures that no id up to `highest` is given out in the future.
    pub fn skip_ids_through(&self, highest: u64) -> Result<()> {
        for sql in [
            "UPDATE sqlite_sequence SET seq = max(seq, ?1) WHERE name = 'snapshot'",
            "INSERT INTO sqlite_sequence (name, seq) SELECT 'snapshot', ?1
             WHERE NOT EXISTS (SELECT 1 FROM sqlite_sequence WHERE name = 'snapshot')",
        ] {
            let doing = "skip the ids of existing directories";
            self.execute(sql, [Number(highest)], doing)?;
        }
        Ok(())
    }
}
