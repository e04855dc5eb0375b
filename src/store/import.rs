//! Filling a database with all snapshots of another program in one step, and
//! checking that it is unchanged since.

use rusqlite::params;
use rusqlite::types::ValueRef;

use super::snapshots::Snapshot;
use super::sql::{Number, Rows, sql_error};
use super::{Transaction, labels};
use crate::error::Result;
use crate::types::Quoted;
use crate::util::fnv::Fnv;

/// The name of the fact with the checksum of all rows that an import has entered.
const IMPORTED: &str = "imported";

impl Transaction<'_> {
    /// Replaces all snapshots by these, reserves all ids up to `highest_id`, and records
    /// the checksum of the import. The parent of each snapshot has to be in `snapshots`.
    pub fn import(&self, snapshots: &[Snapshot], highest_id: u64) -> Result<()> {
        self.connection()
            .execute_batch(
                // Children may come before their parents. The commit checks
                // that all parents exist.
                "PRAGMA defer_foreign_keys = ON;
                 DELETE FROM retired;
                 DELETE FROM snapshot;
                 DELETE FROM sqlite_sequence WHERE name = 'snapshot';",
            )
            .map_err(|error| sql_error(error, "begin with an empty database"))?;
        for snapshot in snapshots {
            self.enter(snapshot)?;
        }
        if highest_id > 0 {
            self.skip_ids_through(highest_id)?;
        }
        let sum = self.sum()?;
        self.record_fact(IMPORTED, &sum)
    }

    fn enter(&self, snapshot: &Snapshot) -> Result<()> {
        let info = &snapshot.info;
        self.execute(
            "INSERT INTO snapshot (id, name, parent_id, kind, volume, created_ns, updated_ns,
                 size_bytes, inodes, data_bytes, labels, attributes, is_hollow)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13)",
            params![
                snapshot.id,
                info.name,
                snapshot.parent_id,
                info.kind,
                snapshot.volume,
                info.created,
                info.updated,
                Number(snapshot.usage.size_bytes),
                Number(snapshot.usage.inodes),
                snapshot.data_bytes,
                labels::encode(&info.labels),
                snapshot.marks.map(|marks| Number(marks.attributes)),
                snapshot.marks.map(|marks| marks.is_hollow),
            ],
            format_args!("enter snapshot {}", Quoted(&info.name)),
        )
    }
}

impl Rows {
    /// Whether nothing was entered, changed, removed or moved since the import
    /// that has made this database; `None` if no import has made it.
    pub fn is_as_imported(&self) -> Result<Option<bool>> {
        let sum = self.fact(IMPORTED)?;
        sum.map(|sum| Ok(sum == self.sum()?)).transpose()
    }

    /// Computes the checksum of every row that a request or a move of a layer can change. It
    /// also differs after a change that was reverted, because the times or the ids given out
    /// have changed.
    fn sum(&self) -> Result<String> {
        let mut sum = Fnv::new();
        for sql in [
            "SELECT id, name, parent_id, kind, volume, created_ns, updated_ns, size_bytes, inodes,
                 data_bytes, labels FROM snapshot ORDER BY id",
            "SELECT id, highest_id, boot_id FROM retired ORDER BY id",
            "SELECT seq FROM sqlite_sequence WHERE name = 'snapshot'",
        ] {
            self.all(sql, "compute the checksum of all rows", |row| {
                for column in 0..row.as_ref().column_count() {
                    add(&mut sum, row.get_ref(column)?);
                }
                Ok(())
            })?;
            sum.add(b"\n");
        }
        Ok(format!("{:016x}", sum.sum()))
    }
}

/// Adds a value, after its length, so that the rows ("ab", "c") and ("a", "bc") have
/// different checksums.
fn add(sum: &mut Fnv, value: ValueRef<'_>) {
    let number;
    let (kind, bytes): (u8, &[u8]) = match value {
        ValueRef::Null => (0, &[]),
        ValueRef::Integer(integer) => {
            number = integer.to_le_bytes();
            (1, &number)
        }
        ValueRef::Real(real) => {
            number = real.to_le_bytes();
            (2, &number)
        }
        ValueRef::Text(text) => (3, text),
        ValueRef::Blob(blob) => (4, blob),
    };
    sum.add(&[kind]);
    sum.add(&(bytes.len() as u64).to_le_bytes());
    sum.add(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{DataBytes, LabelChange, New, Store};
    use crate::types::Marks;
    use crate::types::{Info, Kind, Labels, SnapshotId, Timestamp, Usage, Volume};

    fn snapshot(id: u64, parent_id: Option<u64>) -> Snapshot {
        Snapshot {
            id: SnapshotId::new(id),
            parent_id: parent_id.map(SnapshotId::new),
            volume: Some(Volume::Image),
            info: Info {
                name: format!("layer-{id}"),
                parent: parent_id.map_or(String::new(), |id| format!("layer-{id}")),
                kind: Kind::Committed,
                created: Timestamp::from_nanos(-5),
                updated: Timestamp::from_nanos(7),
                labels: [("a".to_owned(), "b".to_owned())].into(),
            },
            usage: Usage {
                size_bytes: 4096,
                inodes: 3,
            },
            data_bytes: DataBytes::Counted(17),
            marks: Some(Marks {
                attributes: 2,
                is_hollow: false,
            }),
        }
    }

    fn import(store: &Store, snapshots: &[Snapshot], highest_id: u64) -> Result<()> {
        let mut transaction = store.write()?;
        transaction.import(snapshots, highest_id)?;
        transaction.commit()
    }

    #[test]
    fn rows_are_entered_as_they_are_and_ids_go_on() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("metadata.db")).unwrap();
        assert_eq!(store.read().unwrap().is_as_imported().unwrap(), None);
        // The child comes before its parent.
        let snapshots = [snapshot(3, Some(9)), snapshot(9, None)];
        import(&store, &snapshots, 40).unwrap();
        // An import that was interrupted begins again; here the second try has
        // fewer snapshots.
        import(&store, &[snapshot(3, Some(9)), snapshot(9, None)], 20).unwrap();
        for snapshot in &snapshots {
            let found = store.read().unwrap().stat(&snapshot.info.name).unwrap();
            assert_eq!(found, *snapshot);
        }
        assert_eq!(store.read().unwrap().highest_id().unwrap(), 20);
        import(&store, &[snapshot(3, Some(8))], 20).unwrap_err();
        assert_eq!(store.read().unwrap().is_as_imported().unwrap(), Some(true));
    }

    #[test]
    fn every_change_is_noticed() {
        let changes: [fn(&Transaction<'_>); 4] = [
            |rows| {
                let new = New {
                    kind: Kind::Active,
                    key: "new",
                    parent: "",
                    labels: &Labels::new(),
                    volume: None,
                };
                rows.create_next(&new).unwrap();
                rows.remove("new").unwrap();
            },
            |rows| {
                rows.remove("layer-3").unwrap();
            },
            |rows| {
                let change = LabelChange::Delete("none".to_owned());
                rows.update("layer-3", vec![change]).unwrap();
            },
            |rows| {
                let layer = SnapshotId::new(9);
                let held = [layer].into();
                rows.move_home(layer, &held, "boot").unwrap();
            },
        ];
        for change in changes {
            let dir = tempfile::tempdir().unwrap();
            let store = Store::open(&dir.path().join("metadata.db")).unwrap();
            import(&store, &[snapshot(3, Some(9)), snapshot(9, None)], 9).unwrap();
            store.begin_use().unwrap();
            store.copy().unwrap();
            assert_eq!(store.read().unwrap().is_as_imported().unwrap(), Some(true));
            let mut transaction = store.write().unwrap();
            change(&transaction);
            transaction.commit().unwrap();
            drop(transaction);
            assert_eq!(store.read().unwrap().is_as_imported().unwrap(), Some(false));
        }
    }
}
