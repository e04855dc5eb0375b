//! containerd's snapshots API on the wire.
//!
//! Owns: protobuf to our types and back, which request runs where, error kinds
//! to gRPC codes, and the log line of a failed request. Never: SQL, paths,
//! files.
//!
//! gRPC's poll thread serves all connections, so nothing that may wait for a
//! disk runs on it: requests go to a pool of workers, all but Stat, which reads
//! the database only, most of which is in memory, and Mounts where that is all
//! it takes. Messages are decoded by ourselves,
//! not by the library: so a bad one is an InvalidArgument that says so, and a
//! panic, wherever in a request, is answered Internal and ends nothing.

mod convert;
mod metrics;
mod outcome;
mod pool;
mod sending;
mod stream;
mod unary;

use std::sync::Arc;

use grpcio::{
    GrpcSlice, Marshaller, MessageReader, Method, MethodType, RpcStatus, RpcStatusCode,
    ServiceBuilder,
};
use protobuf::Message;
use protobuf::well_known_types::empty::Empty;

use crate::error::{Error, ErrorKind, Result};
use crate::proto::snapshots as api;
use crate::snapshotter::{Caller, Snapshotter};
use crate::types::Mount;
pub use metrics::Metrics;
pub use pool::Pool;
use pool::Work;
pub use sending::Sending;
use unary::Unary;

const PREPARE: &str = "/containerd.services.snapshots.v1.Snapshots/Prepare";
const VIEW: &str = "/containerd.services.snapshots.v1.Snapshots/View";
const MOUNTS: &str = "/containerd.services.snapshots.v1.Snapshots/Mounts";
const COMMIT: &str = "/containerd.services.snapshots.v1.Snapshots/Commit";
const REMOVE: &str = "/containerd.services.snapshots.v1.Snapshots/Remove";
const STAT: &str = "/containerd.services.snapshots.v1.Snapshots/Stat";
const UPDATE: &str = "/containerd.services.snapshots.v1.Snapshots/Update";
const LIST: &str = "/containerd.services.snapshots.v1.Snapshots/List";
const USAGE: &str = "/containerd.services.snapshots.v1.Snapshots/Usage";
const CLEANUP: &str = "/containerd.services.snapshots.v1.Snapshots/Cleanup";

/// What requests are answered with.
pub struct Desk {
    /// Does what they ask for.
    pub snapshotter: Arc<Snapshotter>,
    /// Where they wait for disks.
    pub pool: Pool,
    /// Counts them.
    pub metrics: Metrics,
    /// Their answers, until they are sent.
    pub sending: Sending,
}

/// The service, to be registered with a gRPC server.
pub fn build(desk: &Arc<Desk>) -> grpcio::Service {
    let unary = Unary { desk };
    let mut builder = ServiceBuilder::new();
    builder = unary.on_worker(builder, Work::Brief, PREPARE, prepare);
    builder = unary.on_worker(builder, Work::Brief, VIEW, view);
    builder = unary.at_once_or_on_worker(builder, MOUNTS, mounts_at_once, mounts);
    builder = unary.on_worker(builder, Work::Brief, COMMIT, commit);
    builder = unary.on_worker(builder, Work::Brief, REMOVE, remove);
    builder = unary.in_place(builder, STAT, stat);
    builder = unary.on_worker(builder, Work::Brief, UPDATE, update);
    builder = unary.on_worker(builder, Work::Long, CLEANUP, cleanup);
    let (desk, counting) = (Arc::clone(desk), Arc::clone(desk));
    builder
        // On the wire the same as a unary one; only a stream's sink tells when
        // the client has gone.
        .add_server_streaming_handler(
            &raw_method(USAGE, MethodType::ServerStreaming),
            move |context, request, sink| {
                stream::respond_while_wanted(&context, request, sink, &counting);
            },
        )
        .add_server_streaming_handler(
            &raw_method(LIST, MethodType::ServerStreaming),
            move |context, request, sink| {
                stream::stream_list(&context, request, sink, &desk);
            },
        )
        .build()
}

fn prepare(
    snapshotter: &Snapshotter,
    request: api::PrepareSnapshotRequest,
) -> Result<api::PrepareSnapshotResponse> {
    let labels = request.labels.into_iter().collect();
    let mounts = snapshotter.prepare(&request.key, &request.parent, labels)?;
    Ok(api::PrepareSnapshotResponse {
        mounts: convert::mounts(mounts),
        ..Default::default()
    })
}

fn view(
    snapshotter: &Snapshotter,
    request: api::ViewSnapshotRequest,
) -> Result<api::ViewSnapshotResponse> {
    let labels = request.labels.into_iter().collect();
    let mounts = snapshotter.view(&request.key, &request.parent, labels)?;
    Ok(api::ViewSnapshotResponse {
        mounts: convert::mounts(mounts),
        ..Default::default()
    })
}

fn mounts(snapshotter: &Snapshotter, request: api::MountsRequest) -> Result<api::MountsResponse> {
    snapshotter.mounts(&request.key).map(told_mounts)
}

fn mounts_at_once(
    snapshotter: &Snapshotter,
    request: api::MountsRequest,
) -> Result<Option<api::MountsResponse>> {
    let mounts = snapshotter.mounts_at_once(&request.key)?;
    Ok(mounts.map(told_mounts))
}

fn told_mounts(mounts: Vec<Mount>) -> api::MountsResponse {
    api::MountsResponse {
        mounts: convert::mounts(mounts),
        ..Default::default()
    }
}

fn commit(snapshotter: &Snapshotter, request: api::CommitSnapshotRequest) -> Result<Empty> {
    let labels = request.labels.into_iter().collect();
    snapshotter.commit(&request.key, &request.name, &request.parent, labels)?;
    Ok(Empty::new())
}

fn remove(snapshotter: &Snapshotter, request: api::RemoveSnapshotRequest) -> Result<Empty> {
    snapshotter.remove(&request.key)?;
    Ok(Empty::new())
}

fn stat(
    snapshotter: &Snapshotter,
    request: api::StatSnapshotRequest,
) -> Result<api::StatSnapshotResponse> {
    Ok(api::StatSnapshotResponse {
        info: Some(convert::info(snapshotter.stat(&request.key)?)).into(),
        ..Default::default()
    })
}

fn update(
    snapshotter: &Snapshotter,
    request: api::UpdateSnapshotRequest,
) -> Result<api::UpdateSnapshotResponse> {
    let given = request.info.unwrap_or_default();
    let mask = request.update_mask.unwrap_or_default().paths;
    let labels = given.labels.into_iter().collect();
    let info = snapshotter.update(&given.name, &mask, &labels)?;
    Ok(api::UpdateSnapshotResponse {
        info: Some(convert::info(info)).into(),
        ..Default::default()
    })
}

fn usage(
    snapshotter: &Snapshotter,
    request: &api::UsageRequest,
    caller: &Caller,
) -> Result<api::UsageResponse> {
    let usage = snapshotter.usage(&request.key, caller)?;
    Ok(api::UsageResponse {
        size: i64::try_from(usage.size_bytes).unwrap_or(i64::MAX),
        inodes: i64::try_from(usage.inodes).unwrap_or(i64::MAX),
        ..Default::default()
    })
}

fn cleanup(snapshotter: &Snapshotter, _request: api::CleanupRequest) -> Result<Empty> {
    snapshotter.cleanup()?;
    Ok(Empty::new())
}

/// A page of List: at most 100 snapshots (containerd
/// `plugins/services/snapshots/service.go`), and few enough bytes that no
/// client's limit on a message (16 MiB in containerd) is near.
const PAGE_SNAPSHOTS: usize = 100;
const PAGE_BYTES: usize = 1 << 20;

fn list_pages(snapshotter: &Snapshotter, request: &[u8]) -> Result<Vec<Vec<u8>>> {
    let request: api::ListSnapshotsRequest = decode(request)?;
    let mut pages = Vec::new();
    let mut page = api::ListSnapshotsResponse::new();
    let mut bytes = 0;
    snapshotter.list(&request.filters, |info| {
        let info = convert::info(info);
        bytes += usize::try_from(info.compute_size()).unwrap_or(usize::MAX / 2);
        page.info.push(info);
        if page.info.len() == PAGE_SNAPSHOTS || bytes >= PAGE_BYTES {
            pages.push(encode(&std::mem::take(&mut page)));
            bytes = 0;
        }
    })?;
    if !page.info.is_empty() {
        pages.push(encode(&page));
    }
    pages.into_iter().collect()
}

fn dropped() -> RpcStatus {
    RpcStatus::with_message(
        RpcStatusCode::UNAVAILABLE,
        "the snapshotter is stopping".to_owned(),
    )
}

fn decode<M: Message>(bytes: &[u8]) -> Result<M> {
    M::parse_from_bytes(bytes).map_err(|error| {
        Error::caused(
            ErrorKind::InvalidArgument,
            format!("decode a {}", message_name::<M>()),
            error,
        )
    })
}

fn encode<M: Message>(message: &M) -> Result<Vec<u8>> {
    message.write_to_bytes().map_err(|error| {
        Error::caused(
            ErrorKind::Internal,
            format!("encode a {}", message_name::<M>()),
            error,
        )
    })
}

fn message_name<M>() -> &'static str {
    let path = std::any::type_name::<M>();
    path.rsplit("::").next().unwrap_or(path)
}

fn raw_method(name: &'static str, kind: MethodType) -> Method<Vec<u8>, Vec<u8>> {
    let raw = || Marshaller {
        ser: |bytes: &Vec<u8>, slice: &mut GrpcSlice| {
            *slice = GrpcSlice::from(bytes.as_slice());
            Ok(())
        },
        de: |mut reader: MessageReader| {
            let mut bytes = Vec::with_capacity(reader.len());
            std::io::Read::read_to_end(&mut reader, &mut bytes)
                .map_err(|error| grpcio::Error::Codec(error.into()))?;
            Ok(bytes)
        },
    };
    Method {
        ty: kind,
        name,
        req_mar: raw(),
        resp_mar: raw(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_message_is_an_invalid_argument() {
        let error = decode::<api::PrepareSnapshotRequest>(&[0xff; 7]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        assert!(
            error.chain().contains("PrepareSnapshotRequest"),
            "{}",
            error.chain()
        );
        // A key (field 2) that is not UTF-8.
        let error = decode::<api::PrepareSnapshotRequest>(&[0x12, 1, 0xff]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        // An unknown field is skipped, as protobuf wants it.
        let request: api::StatSnapshotRequest = decode(&[0x12, 1, b'k', 0xf8, 0x01, 9]).unwrap();
        assert_eq!(request.key, "k");
    }
}
