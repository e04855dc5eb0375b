//! Statements about blocks of ids and about tombstones.
//!
//! Ids are reserved in blocks, so that a snapshot has its id and its directories before
//! its row is entered. The table of blocks is the history of this database, and none of
//! its rows is ever deleted. If ids of another history were used on a volume, the
//! volume names a block that is not in the table.
//!
//! A tombstone proves that a directory without a row was a snapshot's and is not needed
//! any more. It is entered in the transaction that deletes the row, and deleted after
//! the directory is in the trash.

use std::collections::HashSet;

use rusqlite::params;

use super::Transaction;
use super::sql::{Number, Rows};
use crate::error::Result;
use crate::types::{Block, History, SnapshotId, Volume};

impl Rows {
    /// The block that was reserved last; `None` if no block was ever reserved.
    pub fn newest_block(&self) -> Result<Option<Block>> {
        let sql = "SELECT first, token FROM block ORDER BY first DESC LIMIT 1";
        self.one(sql, [], "look up the newest block of ids", |row| {
            let Number(first) = row.get(0)?;
            let token = row.get(1)?;
            Ok(Block { first, token })
        })
    }

    /// Compares the history of this database with `found`, the block that was used last
    /// on a volume; `found` is `None` if the volume names no block.
    pub fn judge(&self, volume: Volume, found: Option<&Block>) -> Result<History> {
        if let Some(found) = found
            && !self.has_reserved(found)?
        {
            return Ok(History::Other);
        }
        // After an upgrade, the database has not recorded a block of the volume yet.
        let Some(recorded) = self.fact(recorded_fact(volume))? else {
            return Ok(History::Same);
        };
        let found = found.map_or_else(String::new, written);
        let (newest, before) = match recorded.split_once(';') {
            Some((newest, before)) => (newest, Some(before)),
            None => (&*recorded, None),
        };
        if found == newest {
            return Ok(History::Same);
        }
        // A block is recorded in the database before it is recorded on the volume. After
        // a crash in between, no id of that block was used on the volume.
        let first: u64 = newest
            .split(' ')
            .next()
            .and_then(|first| first.parse().ok())
            .unwrap_or(0);
        let sql = format!(
            "SELECT 1 FROM snapshot WHERE volume = {} AND id >= ?1 LIMIT 1",
            volume as u8
        );
        let used = self.one(&sql, [Number(first)], "look for ids of a block", |_| Ok(()))?;
        Ok(match before == Some(&*found) && used.is_none() {
            true => History::Same,
            false => History::Earlier,
        })
    }

    /// Whether this database has reserved that block.
    fn has_reserved(&self, block: &Block) -> Result<bool> {
        let sql = "SELECT 1 FROM block WHERE first = ?1 AND token = ?2";
        let of = params![Number(block.first), block.token];
        let found = self.one(sql, of, "look up a block of ids", |_| Ok(()))?;
        Ok(found.is_some())
    }

    /// The highest id that a directory can have: the highest of all snapshots that were ever
    /// entered, or the last id of the newest block; 0 for a new database.
    pub fn highest_reserved(&self) -> Result<u64> {
        let block = self.newest_block()?;
        let last = block.map_or(0, |block| block.last());
        Ok(last.max(self.highest_id()?))
    }

    /// The ids whose directories on that volume may be deleted.
    pub fn tombstones(&self, volume: Volume) -> Result<HashSet<SnapshotId>> {
        let sql = format!("SELECT id FROM tombstone WHERE volume = {}", volume as u8);
        let doing = "list the directories that may be deleted";
        let ids = self.all(&sql, doing, |row| row.get(0))?;
        Ok(ids.into_iter().collect())
    }
}

impl Transaction<'_> {
    /// Reserves the block of ids that begins at `first`, which must be higher than all
    /// ids that were given out.
    pub fn reserve_block(&self, first: u64) -> Result<Block> {
        self.execute(
            "INSERT INTO block (first, token) VALUES (?1, lower(hex(randomblob(16))))",
            [Number(first)],
            format_args!("reserve the ids from {first} on"),
        )?;
        let newest = self.newest_block()?;
        Ok(newest.expect("the row that was just inserted"))
    }

    /// Records that ids of this block will be used next on a volume. `before` is the block
    /// that was used last there.
    pub fn record_block(
        &self,
        volume: Volume,
        block: &Block,
        before: Option<&Block>,
    ) -> Result<()> {
        let before = before.map_or_else(String::new, written);
        let recorded = format!("{};{before}", written(block));
        self.record_fact(recorded_fact(volume), &recorded)
    }

    /// Records that the volume names this block itself, durably. A volume that names an
    /// earlier block is in an older state from then on.
    pub fn confirm_block(&self, volume: Volume, block: &Block) -> Result<()> {
        self.record_fact(recorded_fact(volume), &written(block))
    }

    /// Forgets which ids were used on a volume, because another volume takes its place.
    pub fn forget_block(&self, volume: Volume) -> Result<()> {
        self.forget_fact(recorded_fact(volume))
    }

    /// Deletes all tombstones and all records of leftover directories, because other
    /// directories may have these ids now.
    pub fn forget_all_tombstones(&self) -> Result<()> {
        let doing = "delete the records of directories that may be deleted";
        self.execute("DELETE FROM tombstone", [], doing)?;
        self.execute("DELETE FROM retired", [], doing)
    }

    /// Records that a snapshot's directory on that volume may be deleted.
    pub fn bury(&self, id: SnapshotId, volume: Volume) -> Result<()> {
        self.execute(
            "INSERT OR IGNORE INTO tombstone (volume, id) VALUES (?1, ?2)",
            params![volume, id],
            format_args!("record that the directory of snapshot {id} may be deleted"),
        )
    }

    /// Deletes tombstones whose directories are gone.
    pub fn forget_tombstones(&self, gone: &[(SnapshotId, Volume)]) -> Result<()> {
        for (id, volume) in gone {
            self.execute(
                "DELETE FROM tombstone WHERE volume = ?1 AND id = ?2",
                params![volume, id],
                format_args!("delete the record that snapshot {id} was removed"),
            )?;
        }
        Ok(())
    }
}

/// The name of the fact with the block that was used last on a volume. The previous block
/// follows in the value as long as the volume may still name that one.
fn recorded_fact(volume: Volume) -> &'static str {
    match volume {
        Volume::Image => "block_on_image",
        Volume::Writable => "block_on_writable",
    }
}

fn written(block: &Block) -> String {
    format!("{} {}", block.first, block.token)
}

#[cfg(test)]
mod tests {
    use crate::store::Store;
    use crate::types::{Block, SnapshotId, Volume};

    #[test]
    fn a_block_of_another_history_is_not_known() {
        let dir = tempfile::tempdir().unwrap();
        let open = |name: &str| Store::open(&dir.path().join(name)).unwrap();
        let reserve = |store: &Store, first| {
            let mut transaction = store.write().unwrap();
            let block = transaction.reserve_block(first).unwrap();
            transaction.commit().unwrap();
            block
        };
        let (ours, other) = (open("ours.db"), open("other.db"));
        assert_eq!(ours.read().unwrap().newest_block().unwrap(), None);
        let first = reserve(&ours, 1);
        let second = reserve(&ours, 257);
        let foreign = reserve(&other, 1);
        let knows = |block: &Block| ours.read().unwrap().has_reserved(block).unwrap();
        assert!(knows(&first) && knows(&second) && !knows(&foreign));
        assert_eq!(ours.read().unwrap().newest_block().unwrap(), Some(second));
        assert_eq!(ours.read().unwrap().highest_reserved().unwrap(), 512);
    }

    #[test]
    fn a_tombstone_is_for_one_volume_and_goes_with_the_directory() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("metadata.db")).unwrap();
        let id = SnapshotId::new(7);
        let mut transaction = store.write().unwrap();
        transaction.bury(id, Volume::Writable).unwrap();
        transaction.bury(id, Volume::Writable).unwrap();
        transaction.commit().unwrap();
        drop(transaction);
        let of = |volume| store.read().unwrap().tombstones(volume).unwrap();
        assert!(of(Volume::Image).is_empty());
        assert_eq!(of(Volume::Writable).len(), 1);
        let mut transaction = store.write().unwrap();
        let gone = [(id, Volume::Image), (id, Volume::Writable)];
        transaction.forget_tombstones(&gone).unwrap();
        transaction.commit().unwrap();
        drop(transaction);
        assert!(of(Volume::Writable).is_empty());
    }
}
