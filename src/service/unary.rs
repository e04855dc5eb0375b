//! Requests with one answer: where each runs, and how its answer is sent.

use std::sync::Arc;
use std::time::Instant;

use grpcio::{MethodType, RpcContext, RpcStatus, ServiceBuilder, UnarySink, UnarySinkResult};
use protobuf::Message;

use super::outcome::{answer, run, settle};
use super::pool::Work;
use super::{Desk, decode, encode, raw_method};
use crate::error::Result;
use crate::snapshotter::Snapshotter;

/// Answers a request without waiting for anything, or finds that something
/// may have to be waited for.
type AtOnce<Q, A> = fn(&Snapshotter, Q) -> Result<Option<A>>;

/// What the unary methods are registered with.
pub(super) struct Unary<'a> {
    pub desk: &'a Arc<Desk>,
}

impl Unary<'_> {
    pub(super) fn on_worker<Q: Message, A: Message>(
        &self,
        builder: ServiceBuilder,
        work: Work,
        name: &'static str,
        operation: fn(&Snapshotter, Q) -> Result<A>,
    ) -> ServiceBuilder {
        self.with_workers(builder, work, name, None, operation)
    }

    pub(super) fn at_once_or_on_worker<Q: Message, A: Message>(
        &self,
        builder: ServiceBuilder,
        name: &'static str,
        at_once: AtOnce<Q, A>,
        operation: fn(&Snapshotter, Q) -> Result<A>,
    ) -> ServiceBuilder {
        self.with_workers(builder, Work::Brief, name, Some(at_once), operation)
    }

    fn with_workers<Q: Message, A: Message>(
        &self,
        builder: ServiceBuilder,
        work: Work,
        name: &'static str,
        at_once: Option<AtOnce<Q, A>>,
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
                let found = match at_once {
                    Some(at_once) => at_once(&desk.snapshotter, decode(&request)?)?,
                    None => None,
                };
                found.as_ref().map(encode).transpose()
            });
            if let Some(result) = tried.transpose() {
                let result = settle(&desk.metrics, name, begun, result);
                return context.spawn(ended(respond(sink, result)));
            }
            let answering = Arc::clone(&desk);
            desk.pool.submit(running, work, move || {
                let result = answer(&answering.metrics, name, || {
                    encode(&operation(&answering.snapshotter, decode(&request)?)?)
                });
                // Sent from here: the poll thread would send it two wakes later.
                answering.sending.keep(respond(sink, result));
            });
        };
        builder.add_unary_handler(&raw_method(name, MethodType::Unary), handler)
    }

    pub(super) fn in_place<Q: Message, A: Message>(
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
