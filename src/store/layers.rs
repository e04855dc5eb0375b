//! Statements about layers: the chains of parents, the layers that have to move from the
//! writable volume to the image volume, and the leftover directories of moved layers.

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
    /// When the layer was committed.
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
    /// The boot id of the host when the layer moved. After a reboot, nothing has the
    /// directory mounted any more.
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
    /// stands on itself, or has no volume, as only a view may.
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
                    format_args!("look up the parent of snapshot {id}"),
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

    /// The ids of the layers among these snapshots, and of all layers below the snapshots.
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

    /// The digests that [`Transaction::record_digest`] has recorded, by layer.
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

    /// Whether the leftover directory may be mounted: a snapshot that stands on the layer, and
    /// that is older than the layer's move, still exists.
    pub fn may_be_mounted(&self, leftover: &LeftoverDir) -> Result<bool> {
        self.is_in_use_up_to(leftover.id, Number(leftover.highest_id))
    }

    /// Like [`Rows::is_in_use`], but considers only snapshots with an id up to `highest_id`.
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

    /// The leftover directories that have to be kept.
    pub fn retired(&self) -> Result<Vec<LeftoverDir>> {
        let sql = "SELECT id, boot_id, size_bytes, highest_id FROM retired ORDER BY id";
        self.all(sql, "list the leftover directories of layers", |row| {
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
    /// on the layer or because the layer is in `held`. The old directory is then recorded
    /// as a leftover directory, and has to stay until [`Transaction::forget_retired`].
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

    /// Records that a layer's bytes are on the image volume. No directory may be deleted
    /// because of this record, unlike after [`Transaction::move_home`].
    pub fn record_home(&self, layer: SnapshotId) -> Result<()> {
        let sql = "UPDATE snapshot SET volume = 0 WHERE id = ?1";
        let doing = format_args!("record that layer {layer} is on the image volume");
        self.execute(sql, [layer], doing)?;
        // The image volume may not store everything that is part of the digest.
        self.forget_digest(layer)
    }

    /// Records the digest of a layer that was found to be sound.
    pub fn record_digest(&self, layer: SnapshotId, digest: &str) -> Result<()> {
        let sql = "INSERT OR REPLACE INTO digest (id, digest) VALUES (?1, ?2)";
        let doing = format_args!("record the digest of layer {layer}");
        self.execute(sql, params![layer, digest], doing)
    }

    /// Forgets the digest of a layer that has changed.
    pub fn forget_digest(&self, layer: SnapshotId) -> Result<()> {
        let sql = "DELETE FROM digest WHERE id = ?1";
        let doing = format_args!("delete the digest of layer {layer}");
        self.execute(sql, [layer], doing)
    }

    /// Deletes the record of a layer's leftover directory, which may then be
    /// deleted.
    pub fn forget_retired(&self, layer: SnapshotId) -> Result<()> {
        let sql = "DELETE FROM retired WHERE id = ?1";
        let doing = format_args!("delete the record of the leftover directory of layer {layer}");
        self.execute(sql, [layer], doing)?;
        self.bury(layer, Volume::Writable)
    }
}
