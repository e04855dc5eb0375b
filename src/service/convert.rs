//! Converts the types of this program to the messages of containerd's API.

use protobuf::well_known_types::timestamp::Timestamp as WireTimestamp;

use crate::proto::mount::Mount as WireMount;
use crate::proto::snapshots as api;
use crate::types::{Info, Kind, Mount, Timestamp};

/// Converts mounts for an answer. The messages have no target, which means the mount point
/// itself and not a directory in it.
pub fn mounts(mounts: Vec<Mount>) -> Vec<WireMount> {
    mounts
        .into_iter()
        .map(|mount| WireMount {
            type_: mount.fs_type.to_owned(),
            source: mount.source,
            options: mount.options,
            ..Default::default()
        })
        .collect()
}

/// Converts a snapshot for an answer.
pub fn info(info: Info) -> api::Info {
    let kind = match info.kind {
        Kind::View => api::Kind::VIEW,
        Kind::Active => api::Kind::ACTIVE,
        Kind::Committed => api::Kind::COMMITTED,
    };
    api::Info {
        name: info.name,
        parent: info.parent,
        kind: kind.into(),
        created_at: Some(timestamp(info.created)).into(),
        updated_at: Some(timestamp(info.updated)).into(),
        labels: info.labels.into_iter().collect(),
        ..Default::default()
    }
}

fn timestamp(moment: Timestamp) -> WireTimestamp {
    let (seconds, nanos) = moment.seconds_and_nanos();
    WireTimestamp {
        seconds,
        nanos,
        ..Default::default()
    }
}
