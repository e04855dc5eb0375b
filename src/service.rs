//! containerd's snapshots API on the wire.
//!
//! Owns: protobuf to our types and back, which request runs where, error kinds
//! to gRPC codes, and the log line of a failed request. Never: SQL, paths,
//! files.
//!
//! gRPC's poll thread serves all connections, so nothing that may wait for a
//! disk runs on it: requests go to a pool of workers, all but Stat, which only
//! reads what the database has in memory, and Mounts where that is all it takes. Messages are decoded by ourselves,
//! not by the library: so a bad one is an InvalidArgument that says so, and a
//! panic, wherever in a request, is answered Internal and ends nothing.

mod convert;
mod metrics;
mod pool;
mod sending;
mod stream;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;

use grpcio::{
    GrpcSlice, Marshaller, MessageReader, Method, MethodType, RpcContext, RpcStatus, RpcStatusCode,
    ServiceBuilder, UnarySink, UnarySinkResult,
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

/// What the unary methods are registered with.
struct Unary<'a> {
    desk: &'a Arc<Desk>,
}

impl Unary<'_> {
    fn on_worker<Q: Message, A: Message>(
        &self,
        builder: ServiceBuilder,
        work: Work,
        name: &'static str,
        operation: fn(&Snapshotter, Q) -> Result<A>,
    ) -> ServiceBuilder {
        let desk = Arc::clone(self.desk);
        let handler = move |context: RpcContext<'_>, request: Vec<u8>, sink: UnarySink<Vec<u8>>| {
            let running = match desk.pool.admit() {
                Ok(running) => running,
                Err(status) => return context.spawn(ended(respond(sink, Err(status)))),
            };
            let answering = Arc::clone(&desk);
            desk.pool.submit(running, work, move || {
                answering.answer_from_worker(name, &request, sink, operation);
            });
        };
        builder.add_unary_handler(&raw_method(name, MethodType::Unary), handler)
    }

    /// `at_once` waits for nothing, and may find that `operation` has to be asked.
    fn at_once_or_on_worker<Q: Message, A: Message>(
        &self,
        builder: ServiceBuilder,
        name: &'static str,
        at_once: fn(&Snapshotter, Q) -> Result<Option<A>>,
        operation: fn(&Snapshotter, Q) -> Result<A>,
    ) -> ServiceBuilder {
        let desk = Arc::clone(self.desk);
        let handler = move |context: RpcContext<'_>, request: Vec<u8>, sink: UnarySink<Vec<u8>>| {
            let running = match desk.pool.admit() {
                Ok(running) => running,
                Err(status) => return context.spawn(ended(respond(sink, Err(status)))),
            };
            let begun = Instant::now();
            let tried = run(name, || {
                let found = at_once(&desk.snapshotter, decode(&request)?)?;
                found.as_ref().map(encode).transpose()
            });
            if let Some(result) = tried.transpose() {
                let result = settle(&desk.metrics, name, begun, result);
                return context.spawn(ended(respond(sink, result)));
            }
            let answering = Arc::clone(&desk);
            desk.pool.submit(running, Work::Brief, move || {
                answering.answer_from_worker(name, &request, sink, operation);
            });
        };
        builder.add_unary_handler(&raw_method(name, MethodType::Unary), handler)
    }

    fn in_place<Q: Message, A: Message>(
        &self,
        builder: ServiceBuilder,
        name: &'static str,
        operation: fn(&Snapshotter, Q) -> Result<A>,
    ) -> ServiceBuilder {
        let desk = Arc::clone(self.desk);
        let handler = move |context: RpcContext<'_>, request: Vec<u8>, sink: UnarySink<Vec<u8>>| {
            let result = desk.pool.admit().and_then(|_running| {
                answer(&desk.metrics, name, || {
                    encode(&operation(&desk.snapshotter, decode(&request)?)?)
                })
            });
            context.spawn(ended(respond(sink, result)));
        };
        builder.add_unary_handler(&raw_method(name, MethodType::Unary), handler)
    }
}

impl Desk {
    fn answer_from_worker<Q: Message, A: Message>(
        &self,
        name: &'static str,
        request: &[u8],
        sink: UnarySink<Vec<u8>>,
        operation: fn(&Snapshotter, Q) -> Result<A>,
    ) {
        let result = answer(&self.metrics, name, || {
            encode(&operation(&self.snapshotter, decode(request)?)?)
        });
        // Sent from here: the poll thread would send it two wakes later.
        self.sending.keep(respond(sink, result));
    }
}

/// Begins to send an answer. The call ends, and is cut off, with what is returned.
fn respond(
    sink: UnarySink<Vec<u8>>,
    result: std::result::Result<Vec<u8>, RpcStatus>,
) -> UnarySinkResult {
    match result {
        Ok(response) => sink.success(response),
        Err(status) => sink.fail(status),
    }
}

async fn ended(sending: UnarySinkResult) {
    // A client that has hung up is no concern of ours.
    let _ = sending.await;
}

/// Runs one request to its end: times, counts and logs it, turns an error or a panic
/// into the status that the client gets.
fn answer<T>(
    metrics: &Metrics,
    method: &'static str,
    operation: impl FnOnce() -> Result<T>,
) -> std::result::Result<T, RpcStatus> {
    let begun = Instant::now();
    settle(metrics, method, begun, run(method, operation))
}

/// What a panic leaves behind is made sound by those who own it: the store rolls
/// back, new directories go to the trash.
fn run<T>(method: &'static str, operation: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(operation)).unwrap_or_else(|_| {
        // The panic itself has been printed with its place by then.
        Err(Error::new(
            ErrorKind::Internal,
            format!(
                "{} failed by a bug in this program; its log says where",
                short(method)
            ),
        ))
    })
}

fn settle<T>(
    metrics: &Metrics,
    method: &'static str,
    begun: Instant,
    result: Result<T>,
) -> std::result::Result<T, RpcStatus> {
    let name = short(method);
    let failure = result.as_ref().err().map(Error::kind);
    metrics.record(name, failure, begun.elapsed());
    let error = match result {
        Ok(response) => {
            log::debug!("{name}: done in {:?}", begun.elapsed());
            return Ok(response);
        }
        Err(error) => error,
    };
    let chain = error.chain();
    match error.kind() {
        // The caller's own business, and common: containerd asks for what it
        // then makes, and makes what is there.
        ErrorKind::NotFound | ErrorKind::AlreadyExists | ErrorKind::Cancelled => {
            log::debug!("{name}: {chain} ({:?})", begun.elapsed());
        }
        ErrorKind::InvalidArgument | ErrorKind::FailedPrecondition | ErrorKind::Unavailable => {
            log::warn!("{name}: {chain}");
        }
        ErrorKind::ResourceExhausted | ErrorKind::DataLoss | ErrorKind::Internal => {
            log::error!("{name}: {chain}");
        }
    }
    Err(RpcStatus::with_message(code_of(error.kind()), chain))
}

fn short(method: &'static str) -> &'static str {
    method.rsplit('/').next().unwrap_or(method)
}

/// containerd 1.7 and older turn only the first eight of gRPC's codes back into
/// errors of their own; the others arrive as unknown, with the same text.
fn code_of(kind: ErrorKind) -> RpcStatusCode {
    match kind {
        ErrorKind::NotFound => RpcStatusCode::NOT_FOUND,
        ErrorKind::AlreadyExists => RpcStatusCode::ALREADY_EXISTS,
        ErrorKind::InvalidArgument => RpcStatusCode::INVALID_ARGUMENT,
        ErrorKind::FailedPrecondition => RpcStatusCode::FAILED_PRECONDITION,
        ErrorKind::ResourceExhausted => RpcStatusCode::RESOURCE_EXHAUSTED,
        ErrorKind::Unavailable => RpcStatusCode::UNAVAILABLE,
        ErrorKind::Cancelled => RpcStatusCode::CANCELLED,
        ErrorKind::DataLoss => RpcStatusCode::DATA_LOSS,
        ErrorKind::Internal => RpcStatusCode::INTERNAL,
    }
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
    fn a_panic_is_an_internal_error_and_nothing_more() {
        let metrics = Metrics::default();
        let status = answer::<()>(&metrics, STAT, || panic!("a bug")).unwrap_err();
        assert_eq!(status.code(), RpcStatusCode::INTERNAL);
        assert!(status.message().contains("Stat"), "{}", status.message());
        assert_eq!(answer(&metrics, STAT, || Ok(7)).unwrap(), 7);
    }

    #[test]
    fn an_error_reaches_the_client_whole() {
        let status = answer::<()>(&Metrics::default(), PREPARE, || {
            Err(
                Error::new(ErrorKind::NotFound, "parent \"p\" does not exist")
                    .while_doing("prepare snapshot \"k\""),
            )
        })
        .unwrap_err();
        assert_eq!(status.code(), RpcStatusCode::NOT_FOUND);
        assert_eq!(
            status.message(),
            "prepare snapshot \"k\": parent \"p\" does not exist"
        );
    }

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
