//! Statements about layers: what stands on what, which layers have to move from the
//! writable volume to the image volume, and the directories they leave behind.

use std::collections::{HashMap, HashSet};

use rusqlite::params;

use super::Transaction;
use super::snapshots::Ancestor;
use super::sql::{Number, Rows, damaged};
use crate::error::Result;
use crate::types::{Kind, SnapshotId, Timestamp, Volume};

/// A layer whose bytes are on the writable volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnmovedLayer {
    /// The layer's id.
    pub id: SnapshotId,
    /// The layer's name.
    pub name: String,
    /// When it was committed.
    pub committed: Timestamp,
    /// The bytes that the layer takes.
    pub size_bytes: u64,
    /// The inodes that the layer takes.
    pub inodes: u64,
}

/// The leftover directory of a moved layer on the writable volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeftoverDir {
    /// The layer's id.
    pub id: SnapshotId,
    /// The boot of the host on which something may have had it mounted.
    pub boot_id: String,
    /// The bytes that the directory takes.
    pub size_bytes: u64,
    /// The highest id of any snapshot when the layer moved.
    highest_id: u64,
}

impl Rows {
    /// The layer `id` and the layers below it, in this order.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::DataLoss`](crate::error::ErrorKind::DataLoss) if one of the layers
    /// has no directory of its own, which only a view may lack, or stands on itself.
    pub fn chain(&self, id: SnapshotId) -> Result<Vec<Ancestor>> {
        // One recursive statement would take several times as long, because SQLite
        // creates two tables for it each time.
        self.at_one_moment(|| {
            let mut chain: Vec<Ancestor> = Vec::new();
            let mut next = Some(id);
            while let Some(id) = next {
                if chain.iter().any(|layer| layer.id == id) {
                    return Err(damaged(format_args!("layer {id} stands on itself")));
                }
                let layer: Option<(_, Option<Volume>, _)> = self.one(
                    "SELECT parent_id, volume, is_remapped FROM snapshot WHERE id = ?1",
                    [id],
                    format_args!("look up what snapshot {id} stands on"),
                    |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)),
                )?;
                let Some((parent, volume, is_remapped)) = layer else {
                    break;
                };
                let volume =
                    volume.ok_or_else(|| damaged(format_args!("layer {id} has no volume")))?;
                chain.push(Ancestor {
                    id,
                    volume,
                    is_remapped,
                });
                next = parent;
            }
            Ok(chain)
        })
    }

    /// The layers among these snapshots, and all layers below them.
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

    /// The layers that have not moved to the image volume, in the order of their commits.
    pub fn away(&self) -> Result<Vec<UnmovedLayer>> {
        let sql = "SELECT id, name, created_ns, size_bytes, inodes FROM snapshot
             WHERE kind = 3 AND volume = 1 ORDER BY created_ns, id";
        self.all(sql, "list the layers on the writable volume", |row| {
            Ok(UnmovedLayer {
                id: row.get(0)?,
                name: row.get(1)?,
                committed: row.get(2)?,
                size_bytes: row.get::<_, Number>(3)?.0,
                inodes: row.get::<_, Number>(4)?.0,
            })
        })
    }

    /// The digests of sound layers.
    pub fn digests(&self) -> Result<HashMap<SnapshotId, String>> {
        let sql = "SELECT id, digest FROM digest";
        let rows = self.all(sql, "list the digests of layers", |row| {
            Ok((row.get(0)?, row.get(1)?))
        })?;
        Ok(rows.into_iter().collect())
    }

    /// Whether an active snapshot or a view stands on that layer, directly or
    /// on other layers.
    pub fn is_in_use(&self, layer: SnapshotId) -> Result<bool> {
        self.is_in_use_up_to(layer, Number(u64::MAX))
    }

    /// Whether a snapshot still exists whose mounts a caller may have been given before
    /// the layer moved.
    pub fn may_be_mounted(&self, leftover: &LeftoverDir) -> Result<bool> {
        self.is_in_use_up_to(leftover.id, Number(leftover.highest_id))
    }

    /// Like [`Rows::is_in_use`], for snapshots with an id up to `highest_id`.
    fn is_in_use_up_to(&self, layer: SnapshotId, highest_id: Number) -> Result<bool> {
        let found = self.one(
            "WITH RECURSIVE upon (id, kind) AS (
                 SELECT id, kind FROM snapshot WHERE parent_id = ?1
                 UNION
                 SELECT s.id, s.kind FROM upon JOIN snapshot s ON s.parent_id = upon.id
             )
             SELECT 1 FROM upon WHERE kind IN (1, 2) AND id <= ?2 LIMIT 1",
            params![layer, highest_id],
            format_args!("look up which snapshots stand on layer {layer}"),
            |_| Ok(()),
        )?;
        Ok(found.is_some())
    }

    /// The leftover directories that are still kept.
    pub fn retired(&self) -> Result<Vec<LeftoverDir>> {
        let sql = "SELECT id, boot_id, size_bytes, highest_id FROM retired ORDER BY id";
        self.all(sql, "list the directories that layers have left", |row| {
            Ok(LeftoverDir {
                id: row.get(0)?,
                boot_id: row.get(1)?,
                size_bytes: row.get::<_, Number>(2)?.0,
                highest_id: row.get::<_, Number>(3)?.0,
            })
        })
    }
}

impl Transaction<'_> {
    /// Records that a layer's bytes are on the image volume now. Returns `true`
    /// if the layer's old directory may be mounted, because a snapshot in use stands
    /// on the layer or because the layer is in `held`. This is recorded too, and the
    /// directory has to stay until [`Transaction::forget_retired`].
    pub fn move_home(
        &self,
        layer: SnapshotId,
        held: &HashSet<SnapshotId>,
        boot_id: &str,
    ) -> Result<bool> {
        let doing = format!("record that layer {layer} has moved");
        self.record_home(layer)?;
        if !held.contains(&layer) && !self.is_in_use(layer)? {
            self.bury(layer, Volume::Writable)?;
            return Ok(false);
        }
        self.execute(
            "INSERT OR REPLACE INTO retired (id, highest_id, boot_id, size_bytes)
             SELECT ?1, seq, ?2, (SELECT size_bytes FROM snapshot WHERE id = ?1)
             FROM sqlite_sequence WHERE name = 'snapshot'",
            params![layer, boot_id],
            &doing,
        )?;
        Ok(true)
    }

    /// Records that a layer's bytes are on the image volume. Nothing may be deleted for it.
    pub fn record_home(&self, layer: SnapshotId) -> Result<()> {
        let sql = "UPDATE snapshot SET volume = 0 WHERE id = ?1";
        let doing = format_args!("record where layer {layer} is");
        self.execute(sql, [layer], doing)?;
        // The other file system may not store everything that is part of the
        // digest.
        self.forget_digest(layer)
    }

    /// Records the digest of a sound layer.
    pub fn record_digest(&self, layer: SnapshotId, digest: &str) -> Result<()> {
        let sql = "INSERT OR REPLACE INTO digest (id, digest) VALUES (?1, ?2)";
        let doing = format_args!("record the digest of layer {layer}");
        self.execute(sql, params![layer, digest], doing)
    }

    /// Forgets the digest of a layer that has changed.
    pub fn forget_digest(&self, layer: SnapshotId) -> Result<()> {
        let sql = "DELETE FROM digest WHERE id = ?1";
        let doing = format_args!("forget the digest of layer {layer}");
        self.execute(sql, [layer], doing)
    }

    /// Deletes the record of a layer's leftover directory, which may then be
    /// deleted.
    pub fn forget_retired(&self, layer: SnapshotId) -> Result<()> {
        let sql = "DELETE FROM retired WHERE id = ?1";
        let doing = format_args!("forget what layer {layer} has left");
        self.execute(sql, [layer], doing)?;
        self.bury(layer, Volume::Writable)
    }
}
