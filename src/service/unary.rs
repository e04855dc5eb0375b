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
    pub(super) fn at_once_or_on_worker<Q: Message, A: Message>(
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
