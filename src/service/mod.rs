//! containerd's snapshots API on the wire, and the method that `check --heal` calls
//! while the daemon runs.
//!
//! Owns: converting between protobuf and our types, which thread runs each request, the
//! gRPC code of each kind of error, and the log line of a failed request. Never: SQL,
//! paths, files.
//!
//! gRPC's poll thread serves all connections, so nothing that may wait for a disk runs on it.
//! Requests go to a pool of workers. The exceptions are Stat, and Mounts if reading the
//! database is enough: most of the database is in memory. Requests that may wait for something
//! other than our own disks have threads of their own.
//!
//! This program decodes messages, not the gRPC library, so that a bad message gets the
//! error InvalidArgument with an explanation, and a panic in any request gets the error
//! Internal without ending the daemon.

mod call;
mod cleanup;
mod convert;
mod failure_log;
mod healing;
mod method;
mod metrics;
mod pool;
mod unsent;

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
pub use healing::HealingClient;
use method::Method;
pub use metrics::Metrics;
pub use pool::Pool;
use pool::Work::{Brief, Elsewhere, List, Long};
use unsent::UnsentAnswers;

/// The gRPC service: everything that is needed to answer requests.
pub struct Service {
    /// The snapshotter, which performs the operations.
    pub snapshotter: Arc<Snapshotter>,
    /// The threads on which requests wait for disks.
    pub pool: Pool,
    /// Counts the requests.
    pub metrics: Metrics,
    failures: FailureLog,
    sending: PendingAnswers,
    unsent: Arc<UnsentAnswers>,
    cleanups: Cleanups,
}

impl Service {
    /// Creates the service, which has not received any request yet.
    pub fn new(snapshotter: Arc<Snapshotter>, pool: Pool) -> Service {
        Service {
            snapshotter,
            pool,
            metrics: Metrics::default(),
            failures: FailureLog::default(),
            sending: PendingAnswers::default(),
            unsent: Arc::default(),
            cleanups: Cleanups::default(),
        }
    }

    /// The counters and the log in which ended requests are recorded.
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
    all = unary(all, service, Method::Heal, Always(Long), healing::heal);
    all = cleanup::register(all, service);
    all = stream(all, service, (Method::List, List), list);
    // Usage is registered as a stream, because only a stream's sink reports that the client has
    // gone. On the wire, a stream of one message looks like a single answer.
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

/// Answers Usage. Counting files can take long, so the count ends when the client has gone.
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

/// The most snapshots in a page of List, as in containerd
/// (`plugins/services/snapshots/service.go`).
const PAGE_SNAPSHOTS: usize = 100;
/// The size from which a page of List gets no more snapshots. It is far below the limit of
/// clients for a message (16 MiB in containerd).
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
