//! Statements about layers that move from the writable volume to the image
//! volume, and about the directories they leave behind.

use std::borrow::Borrow;
use std::collections::HashSet;

use rusqlite::{Connection, OptionalExtension, params};

use super::convert::{id_from_sql, place_from_sql, sql_id};
use super::rows::{Place, Rows};
use super::sql_error;
use crate::error::Result;
use crate::types::{Kind, SnapshotId, Timestamp};

/// A layer whose bytes are on the writable volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Away {
    /// Its number.
    pub id: SnapshotId,
    /// Its name.
    pub name: String,
    /// When it was committed.
    pub committed: Timestamp,
    /// What it holds, in bytes.
    pub size_bytes: u64,
}

/// A directory on the writable volume that a layer has left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Retired {
    /// The layer.
    pub id: SnapshotId,
    /// On which boot of the host something may have had it mounted.
    pub boot_id: String,
}

impl<C: Borrow<Connection>> Rows<C> {
    /// The layers among these snapshots, and all that those stand on.
    ///
    /// # Errors
    ///
    /// Those of the database.
    pub fn layers_of(&self, snapshots: &[SnapshotId]) -> Result<HashSet<SnapshotId>> {
        let mut layers = HashSet::new();
        for id in snapshots {
            let place = self.place(*id)?;
            if place.is_some_and(|place| place.kind == Kind::Committed) {
                layers.extend(self.chain(*id)?.into_iter().map(|layer| layer.id));
            }
        }
        Ok(layers)
    }

    /// The layers that are not home, those committed first first.
    ///
    /// # Errors
    ///
    /// Those of the database.
    pub fn away(&self) -> Result<Vec<Away>> {
        let doing = |error| sql_error(error, "list the layers on the writable volume");
        let mut query = self
            .connection()
            .prepare_cached(
                "SELECT id, name, created_ns, size_bytes FROM snapshot
                 WHERE kind = 3 AND volume = 1 ORDER BY created_ns, id",
            )
            .map_err(doing)?;
        let rows = query
            .query_map([], |row| {
                Ok((
                    row.get::<_, i64>(0)?,
                    row.get::<_, String>(1)?,
                    row.get::<_, i64>(2)?,
                    row.get::<_, i64>(3)?,
                ))
            })
            .map_err(doing)?;
        let mut away = Vec::new();
        for row in rows {
            let (id, name, committed_ns, size_bytes) = row.map_err(doing)?;
            away.push(Away {
                id: id_from_sql(id)?,
                name,
                committed: Timestamp::from_nanos(committed_ns),
                size_bytes: size_bytes.try_into().unwrap_or(0),
            });
        }
        Ok(away)
    }

    /// What the snapshot of that number is and where, if it is still there.
    ///
    /// # Errors
    ///
    /// Those of the database.
    pub fn place(&self, id: SnapshotId) -> Result<Option<Place>> {
        let raw = self
            .connection()
            .prepare_cached("SELECT id, kind, volume FROM snapshot WHERE id = ?1")
            .and_then(|mut query| {
                query
                    .query_row([sql_id(id)], |row| {
                        Ok((row.get(0)?, row.get(1)?, row.get(2)?))
                    })
                    .optional()
            })
            .map_err(|error| sql_error(error, format!("look up snapshot {id}")))?;
        raw.map(|(id, kind, volume)| place_from_sql(id, kind, volume))
            .transpose()
    }

    /// The highest id that was ever given out; 0 before the first.
    ///
    /// # Errors
    ///
    /// Those of the database.
    pub fn highest_id(&self) -> Result<u64> {
        let highest: Option<i64> = self
            .connection()
            .prepare_cached("SELECT seq FROM sqlite_sequence WHERE name = 'snapshot'")
            .and_then(|mut query| query.query_row([], |row| row.get(0)).optional())
            .map_err(|error| sql_error(error, "look up the highest id"))?;
        Ok(highest.unwrap_or(0).try_into().unwrap_or(0))
    }

    /// Whether an active snapshot or a view stands on that layer, directly or
    /// on other layers.
    ///
    /// # Errors
    ///
    /// Those of the database.
    pub fn is_in_use(&self, layer: SnapshotId) -> Result<bool> {
        self.is_in_use_up_to(sql_id(layer), i64::MAX)
    }

    fn is_in_use_up_to(&self, layer: i64, highest_id: i64) -> Result<bool> {
        self.connection()
            .prepare_cached(
                "WITH RECURSIVE upon (id, kind) AS (
                     SELECT id, kind FROM snapshot WHERE parent_id = ?1
                     UNION
                     SELECT s.id, s.kind FROM upon JOIN snapshot s ON s.parent_id = upon.id
                 )
                 SELECT EXISTS (SELECT 1 FROM upon WHERE kind IN (1, 2) AND id <= ?2)",
            )
            .and_then(|mut query| query.query_row([layer, highest_id], |row| row.get(0)))
            .map_err(|error| sql_error(error, format!("look what stands on layer {layer}")))
    }

    /// The directories that layers have left and that are still kept.
    ///
    /// # Errors
    ///
    /// Those of the database.
    pub fn retired(&self) -> Result<Vec<Retired>> {
        let doing = |error| sql_error(error, "list the directories that layers have left");
        let mut query = self
            .connection()
            .prepare_cached("SELECT id, boot_id FROM retired ORDER BY id")
            .map_err(doing)?;
        let rows = query
            .query_map([], |row| Ok((row.get::<_, i64>(0)?, row.get(1)?)))
            .map_err(doing)?;
        let mut retired = Vec::new();
        for row in rows {
            let (id, boot_id) = row.map_err(doing)?;
            retired.push(Retired {
                id: id_from_sql(id)?,
                boot_id,
            });
        }
        Ok(retired)
    }
}

impl Rows<&Connection> {
    /// Records that a layer's bytes are on the image volume now. `true` if
    /// something may have its old directory mounted, because it stands on the
    /// layer or the layer is in `held`: that is recorded too, and the directory
    /// has to stay until [`Rows::release_retired`] tells it.
    ///
    /// # Errors
    ///
    /// Those of the database.
    pub fn move_home(
        &self,
        layer: SnapshotId,
        held: &HashSet<SnapshotId>,
        boot_id: &str,
    ) -> Result<bool> {
        let doing = |error| sql_error(error, format!("record that layer {layer} has moved"));
        self.connection()
            .prepare_cached("UPDATE snapshot SET volume = 0 WHERE id = ?1")
            .and_then(|mut update| update.execute([sql_id(layer)]))
            .map_err(doing)?;
        if !held.contains(&layer) && !self.is_in_use(layer)? {
            return Ok(false);
        }
        self.connection()
            .prepare_cached(
                "INSERT OR REPLACE INTO retired (id, highest_id, boot_id)
                 SELECT ?1, seq, ?2 FROM sqlite_sequence WHERE name = 'snapshot'",
            )
            .and_then(|mut insert| insert.execute(params![sql_id(layer), boot_id]))
            .map_err(doing)?;
        Ok(true)
    }

    /// Strikes out, and returns, the left directories that nothing can have
    /// mounted any more because what stood on their layers is gone; those in
    /// `held` stay.
    ///
    /// # Errors
    ///
    /// Those of the database.
    pub fn release_retired(&self, held: &HashSet<SnapshotId>) -> Result<Vec<SnapshotId>> {
        let doing = |error| sql_error(error, "release the directories that layers have left");
        let kept: Vec<(i64, i64)> = self
            .connection()
            .prepare_cached("SELECT id, highest_id FROM retired")
            .and_then(|mut query| {
                query
                    .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?
                    .collect()
            })
            .map_err(doing)?;
        let mut released = Vec::new();
        for (id, highest_id) in kept {
            let is_in_use = self.is_in_use_up_to(id, highest_id)?;
            let id = id_from_sql(id)?;
            if !is_in_use && !held.contains(&id) {
                self.forget_retired(id)?;
                released.push(id);
            }
        }
        Ok(released)
    }

    /// Strikes one left directory out.
    ///
    /// # Errors
    ///
    /// Those of the database.
    pub fn forget_retired(&self, layer: SnapshotId) -> Result<()> {
        self.connection()
            .prepare_cached("DELETE FROM retired WHERE id = ?1")
            .and_then(|mut delete| delete.execute([sql_id(layer)]))
            .map_err(|error| sql_error(error, format!("forget what layer {layer} has left")))?;
        Ok(())
    }
}
