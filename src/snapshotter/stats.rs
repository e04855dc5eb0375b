//! The state of the snapshotter in numbers, for `status` and the metrics.

use std::collections::HashMap;

use super::in_use::Mounts;
use super::{Snapshotter, UsageFigures};
use crate::error::{Error, Result};
use crate::quota::Support;
use crate::store::Tally;
use crate::tree;
use crate::types::{Kind, Limits, Timestamp, Volume};
use crate::util::lock::lock;

/// The figures about the snapshotter as a whole.
#[derive(Debug)]
pub struct Figures {
    pub snapshots: Vec<Tally>,
    /// Bytes of unmoved layers, as counted at their commits.
    pub away_bytes: u64,
    /// Bytes in leftover directories.
    pub held_bytes: u64,
    pub volumes: [VolumeFigures; 2],
    pub lost_layers: u64,
    /// Layers moved to the image volume since the start.
    pub relocations: u64,
    /// Bytes copied by moves of layers since the start.
    pub relocated_bytes: u64,
    pub relocation_failures: u64,
    /// The result of the last deep check; `None` before the first one.
    pub deep_check: Option<DeepCheck>,
    /// What project quotas can do on the writable volume: `None` if it has none,
    /// or cannot be asked.
    pub quotas: Option<Support>,
    pub projects: u64,
    pub usages: UsageFigures,
}

/// The figures of one volume. Sizes are zero if the volume cannot be asked.
#[derive(Clone, Copy, Debug)]
pub struct VolumeFigures {
    pub volume: Volume,
    /// Whether the volume is there, and has not failed to write since the start.
    pub is_usable: bool,
    pub size_bytes: u64,
    pub free_bytes: u64,
}

/// A leftover directory on the writable volume, and its mounts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// The id of the layer.
    pub id: u64,
    /// The name of the layer; `None` if the layer was removed.
    pub layer: Option<String>,
    pub bytes: u64,
    /// The mount points that may show the directory.
    pub points: Vec<String>,
}

/// How much one container has written, and its limits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    pub key: String,
    pub bytes: u64,
    pub inodes: u64,
    pub limits: Limits,
}

/// The name of the fact that records the last [`DeepCheck`], as three numbers.
const DEEP_CHECK: &str = "deep-check";

/// The result of a deep check, which compares layers with containerd's content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeepCheck {
    /// When the check ended, in seconds since 1970.
    pub ended: u64,
    /// How many layers were compared.
    pub compared: u64,
    /// How many of the compared layers are damaged, and have not healed.
    pub damaged: u64,
}

impl DeepCheck {
    fn parse(text: &str) -> Option<DeepCheck> {
        let mut numbers = text.split(' ').map(|number| number.parse().ok());
        let mut next = || numbers.next().flatten();
        Some(DeepCheck {
            ended: next()?,
            compared: next()?,
            damaged: next()?,
        })
    }
}

impl Figures {
    /// Whether a volume cannot be used, or a layer is lost.
    pub fn is_degraded(&self) -> bool {
        self.lost_layers > 0 || self.volumes.iter().any(|volume| !volume.is_usable)
    }
}

impl Snapshotter {
    /// Records and logs the result of a deep check.
    pub fn record_deep_check(&self, compared: u64, damaged: u64) -> Result<()> {
        let what =
            format!("a deep check has compared {compared} layers, {damaged} of them are damaged");
        match damaged {
            0 => log::info!("{what}"),
            _ => log::warn!("{what}; `check --heal` heals them"),
        }
        let ended = Timestamp::now().nanos() / 1_000_000_000;
        let text = format!("{ended} {compared} {damaged}");
        self.store
            .together(|transaction| transaction.record_fact(DEEP_CHECK, &text))
    }

    /// Collects the figures, without waiting for a disk as long as the database is in
    /// memory.
    pub fn figures(&self) -> Result<Figures> {
        let reader = self.store.read()?;
        let (snapshots, projects) = (reader.tally()?, reader.count_projects()?);
        let held_bytes = reader.retired()?.iter().map(|left| left.size_bytes).sum();
        let is_away =
            |held: &&Tally| held.kind == Kind::Committed && held.volume == Some(Volume::Writable);
        let moves = self.relocator.moves();
        Ok(Figures {
            away_bytes: snapshots
                .iter()
                .filter(is_away)
                .map(|held| held.bytes)
                .sum(),
            held_bytes,
            snapshots,
            volumes: [Volume::Image, Volume::Writable].map(|volume| self.volume_figures(volume)),
            lost_layers: lock(&self.lost).len() as u64,
            relocations: moves.layers,
            relocated_bytes: moves.bytes,
            relocation_failures: moves.failures,
            deep_check: reader
                .fact(DEEP_CHECK)?
                .as_deref()
                .and_then(DeepCheck::parse),
            quotas: self.quota_support().ok(),
            projects,
            usages: self.walks.figures(),
        })
    }

    /// The active snapshots that take most of the writable volume, the largest first, at
    /// most `limit`. The files of snapshots without a project quota are counted. Snapshots
    /// that are removed meanwhile, or cannot be read, are left out. The list is empty if
    /// the volume is missing.
    pub fn largest_writable(&self, limit: usize) -> Result<Vec<Written>> {
        let Ok(dirs) = self.volumes.open(Volume::Writable) else {
            return Ok(Vec::new());
        };
        let given = self.store.read()?.projects()?.into_iter();
        let limits: HashMap<_, _> = given.map(|given| (given.snapshot, given.limits)).collect();
        let mut written = Vec::new();
        for snapshot in self.all_snapshots()? {
            if snapshot.info.kind != Kind::Active || snapshot.volume != Some(Volume::Writable) {
                continue;
            }
            let id = snapshot.id;
            let counted = dirs.open_upper(id).and_then(|upper| {
                match self.projects.usage(&dirs, id, &upper)? {
                    Some(usage) => Ok(usage),
                    None => tree::count(upper).map(|content| content.usage),
                }
            });
            if let Ok(usage) = counted {
                written.push(Written {
                    key: snapshot.info.name,
                    bytes: usage.size_bytes,
                    inodes: usage.inodes,
                    limits: limits.get(&Some(id)).copied().unwrap_or_default(),
                });
            }
        }
        written.sort_by_key(|written| std::cmp::Reverse(written.bytes));
        written.truncate(limit);
        Ok(written)
    }

    /// The leftover directories, the largest first, and the mount points that may show
    /// them.
    pub fn held(&self) -> Result<Vec<Held>> {
        let leftovers = self.store.read()?.retired()?;
        if leftovers.is_empty() {
            return Ok(Vec::new());
        }
        let inventory = self.store.read()?.inventory()?;
        let names: HashMap<_, _> = inventory
            .into_iter()
            .map(|(place, name)| (place.id, name))
            .collect();
        let mounts = Mounts::read(&self.store, &self.volumes)?;
        let held = leftovers.into_iter().map(|left| {
            let mounted = mounts.of_leftover(left.id).into_iter();
            let mut points: Vec<_> = mounted
                .map(|mounted| mounted.point.display().to_string())
                .collect();
            points.sort();
            points.dedup();
            Held {
                id: left.id.number(),
                layer: names.get(&left.id).cloned(),
                bytes: left.size_bytes,
                points,
            }
        });
        let mut held: Vec<_> = held.collect();
        held.sort_by_key(|held| std::cmp::Reverse(held.bytes));
        Ok(held)
    }

    pub fn problem_of(&self, volume: Volume) -> Option<Error> {
        self.volumes.open(volume).err()
    }

    fn volume_figures(&self, volume: Volume) -> VolumeFigures {
        let room = self.volumes.open(volume).and_then(|dirs| dirs.room());
        let has_failed = self.flusher.has_failed(volume);
        let (size_bytes, free_bytes) = match &room {
            Ok(room) => (room.size_bytes, room.free_bytes),
            Err(_) => (0, 0),
        };
        VolumeFigures {
            volume,
            is_usable: room.is_ok() && !has_failed,
            size_bytes,
            free_bytes,
        }
    }
}
