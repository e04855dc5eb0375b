//! containerd's snapshots API on the wire.
//!
//! Owns: protobuf to our types and back, which request runs where, error kinds
//! to gRPC codes, and the log line of a failed request. Never: SQL, paths,
//! files.
//!
//! gRPC's poll thread serves all connections, so nothing that may wait for a
//! disk runs on it: requests go to a pool of workers, all but Stat, which reads
//! the database only, most of which is in memory, and Mounts where that is all
//! it takes. What may wait for something else than our own disks has threads of its own.
//! Messages are decoded by ourselves,
//! not by the library: so a bad one is an InvalidArgument that says so, and a
//! panic, wherever in a request, is answered Internal and ends nothing.

mod call;
mod cleanup;
mod convert;
mod failure_log;
mod method;
mod metrics;
mod pool;

use std::sync::Arc;

use grpcio::ServiceBuilder;
use protobuf::Message;
use protobuf::well_known_types::empty::Empty;

use crate::error::{Error, ErrorKind, Result};
use crate::proto::snapshots as api;
use crate::snapshotter::{Caller, Snapshotter};
use crate::types::Mount;
use call::Beginning::{Always, Asked};
use call::{Begun, Pages, PendingAnswers, stream, unary};
use cleanup::Cleanups;
use failure_log::FailureLog;
use method::Method;
pub use metrics::Metrics;
pub use pool::Pool;
use pool::Work::{Brief, Elsewhere, Long};

/// What requests are answered with.
pub struct Service {
    /// Does what they ask for.
    pub snapshotter: Arc<Snapshotter>,
    /// Where they wait for disks.
    pub pool: Pool,
    /// Counts them.
    pub metrics: Metrics,
    failures: FailureLog,
    sending: PendingAnswers,
    cleanups: Cleanups,
}

impl Service {
    /// Puts the parts together; no request has come yet.
    pub fn new(snapshotter: Arc<Snapshotter>, pool: Pool) -> Service {
        Service {
            snapshotter,
            pool,
            metrics: Metrics::default(),
            failures: FailureLog::default(),
            sending: PendingAnswers::default(),
            cleanups: Cleanups::default(),
        }
    }

    /// Where the ends of requests are noted.
    fn outcomes(&self) -> (&Metrics, &FailureLog) {
        (&self.metrics, &self.failures)
    }
}

/// The service, to be registered with a gRPC server.
pub fn build(service: &Arc<Service>) -> grpcio::Service {
    let remove_work = match service.snapshotter.removes_at_once() {
        true => Long,
        false => Brief,
    };
    let mut all = ServiceBuilder::new();
    all = unary(all, service, Method::Prepare, Asked(begin_prepare), prepare);
    all = unary(all, service, Method::View, Asked(begin_view), view);
    all = unary(all, service, Method::Mounts, Asked(begin_mounts), mounts);
    all = unary(all, service, Method::Commit, Always(Brief), commit);
    all = unary(all, service, Method::Remove, Always(remove_work), remove);
    all = unary(all, service, Method::Stat, Asked(begin_stat), stat);
    all = unary(all, service, Method::Update, Asked(begin_update), update);
    all = cleanup::register(all, service);
    all = stream(all, service, (Method::List, Brief), list);
    // On the wire the same as a unary one; only a stream's sink shows that the client
    // has gone.
    all = stream(all, service, (Method::Usage, Long), usage);
    all.build()
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

fn begin_prepare(
    snapshotter: &Snapshotter,
    request: api::PrepareSnapshotRequest,
) -> Result<Begun<api::PrepareSnapshotResponse>> {
    let labels = request.labels.into_iter().collect();
    snapshotter
        .creation_waits_elsewhere(&request.parent, &labels)
        .map(needs)
}

fn begin_view(
    snapshotter: &Snapshotter,
    request: api::ViewSnapshotRequest,
) -> Result<Begun<api::ViewSnapshotResponse>> {
    let labels = request.labels.into_iter().collect();
    snapshotter
        .creation_waits_elsewhere(&request.parent, &labels)
        .map(needs)
}

fn needs<A>(waits_elsewhere: bool) -> Begun<A> {
    Begun::Needs(match waits_elsewhere {
        true => Elsewhere,
        false => Brief,
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
    snapshotter.mounts(&request.key).map(mounts_response)
}

fn begin_mounts(
    snapshotter: &Snapshotter,
    request: api::MountsRequest,
) -> Result<Begun<api::MountsResponse>> {
    let key = &request.key;
    Ok(match snapshotter.mounts_at_once(key)? {
        Some(mounts) => Begun::Answered(mounts_response(mounts)),
        None => needs(snapshotter.mounts_wait_elsewhere(key)?),
    })
}

fn mounts_response(mounts: Vec<Mount>) -> api::MountsResponse {
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

fn begin_stat(
    snapshotter: &Snapshotter,
    request: api::StatSnapshotRequest,
) -> Result<Begun<api::StatSnapshotResponse>> {
    stat(snapshotter, request).map(Begun::Answered)
}

fn begin_update(
    snapshotter: &Snapshotter,
    request: api::UpdateSnapshotRequest,
) -> Result<Begun<api::UpdateSnapshotResponse>> {
    let given = request.info.unwrap_or_default();
    let mask = request.update_mask.unwrap_or_default().paths;
    let labels = given.labels.into_iter().collect();
    snapshotter
        .update_waits_elsewhere(&given.name, &mask, &labels)
        .map(needs)
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

/// Given up when the client has gone: it may walk for long.
fn usage(snapshotter: &Snapshotter, request: &[u8], caller: &Caller) -> Result<Pages> {
    let request: api::UsageRequest = decode(request)?;
    let usage = snapshotter.usage(&request.key, caller)?;
    let response = api::UsageResponse {
        size: i64::try_from(usage.size_bytes).unwrap_or(i64::MAX),
        inodes: i64::try_from(usage.inodes).unwrap_or(i64::MAX),
        ..Default::default()
    };
    Ok(vec![encode(&response)?])
}

/// A page of List: at most 100 snapshots (containerd
/// `plugins/services/snapshots/service.go`), and few enough bytes that no
/// client's limit on a message (16 MiB in containerd) is near.
const PAGE_SNAPSHOTS: usize = 100;
const PAGE_BYTES: usize = 1 << 20;

fn list(snapshotter: &Snapshotter, request: &[u8], _: &Caller) -> Result<Pages> {
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
