//! One request, from its arrival until its answer is being sent.

use std::future::{Future, poll_fn};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};
use std::time::Instant;

use futures_channel::oneshot::{self, Receiver};
use futures_util::Sink;
use grpcio::{
    MethodType, RpcContext, RpcStatus, RpcStatusCode, ServerStreamingSink, ServiceBuilder,
    UnarySink, UnarySinkResult,
};
use log::Level;
use protobuf::Message;

use super::failure_log::{FailureLog, Line};
use super::method::Method;
use super::pool::{GivenUp, Work, stopping};
use super::unsent::Sending;
#[cfg(doc)]
use super::unsent::UnsentAnswers;
use super::{Metrics, Service, decode, encode};
use crate::error::{Error, ErrorKind, Result};
use crate::snapshotter::{Caller, Snapshotter};
use crate::util::lock::lock;

/// What the client gets: one encoded message, several encoded messages, or an error.
pub(super) type Answer<T> = std::result::Result<T, RpcStatus>;

/// The encoded messages of a stream.
pub(super) type Pages = Vec<Vec<u8>>;

/// The result of the first part of a request, which waits for no disk.
pub(super) enum Begun<A> {
    /// The request already has its answer.
    Answered(A),
    /// The request needs a thread for work of this kind.
    Needs(Work),
}

/// Decides whether a request of a method needs a thread.
#[derive(Clone)]
pub(super) enum Beginning<Q, A> {
    /// All requests need a thread for work of the same kind.
    Always(Work),
    /// This function decides for each request. It waits for no disk other than the database's.
    Asked(fn(&Snapshotter, Q) -> Result<Begun<A>>),
}

/// Registers a method with one answer. If a request may have to wait for a disk,
/// `operation` runs on a thread of the pool.
pub(super) fn unary<Q: Message, A: Message>(
    builder: ServiceBuilder,
    service: &Arc<Service>,
    method: Method,
    beginning: Beginning<Q, A>,
    operation: fn(&Snapshotter, Q) -> Result<A>,
) -> ServiceBuilder {
    let service = Arc::clone(service);
    let handler = move |context: RpcContext<'_>, request: Vec<u8>, sink: UnarySink<Vec<u8>>| {
        let call = Call::begin(method);
        let running = match service.pool.admit() {
            Ok(running) => running,
            Err(status) => return context.spawn(ended(respond(sink, Err(status)))),
        };
        let begun = call.run(|| match beginning {
            Beginning::Always(work) => Ok(Begun::Needs(work)),
            Beginning::Asked(begin) => Ok(match begin(&service.snapshotter, decode(&request)?)? {
                Begun::Answered(response) => Begun::Answered(encode(&response)?),
                Begun::Needs(work) => Begun::Needs(work),
            }),
        });
        let result = match begun {
            Ok(Begun::Needs(work)) => {
                let answering = Arc::clone(&service);
                let deadline = context.deadline();
                let work = (work, Box::new(move || deadline.exceeded()) as GivenUp);
                return service.pool.submit(running, work, move |turn| {
                    let answer = call.answer(answering.outcomes(), || {
                        turn?;
                        encode(&operation(&answering.snapshotter, decode(&request)?)?)
                    });
                    // The answer is sent from this thread, because sending from gRPC's poll
                    // thread would take two more wake-ups.
                    answering.sending.keep(respond(sink, answer));
                });
            }
            Ok(Begun::Answered(response)) => Ok(response),
            Err(error) => Err(error),
        };
        let answer = call.settle(service.outcomes(), result);
        context.spawn(ended(respond(sink, answer)));
    };
    builder.add_unary_handler(&method.on_wire(MethodType::Unary), handler)
}

/// Registers a method that answers with a stream. All pages are created before the first one is
/// sent, so that they show the same moment. A client that reads slowly then holds memory, which
/// [`UnsentAnswers`] bounds, but no worker and no transaction.
pub(super) fn stream(
    builder: ServiceBuilder,
    service: &Arc<Service>,
    (method, work): (Method, Work),
    operation: fn(&Snapshotter, &[u8], &Caller) -> Result<Pages>,
) -> ServiceBuilder {
    let service = Arc::clone(service);
    let handler =
        move |context: RpcContext<'_>, request: Vec<u8>, sink: ServerStreamingSink<Vec<u8>>| {
            let call = Call::begin(method);
            let caller = Caller::default();
            let (sender, receiver) = oneshot::channel();
            let (answering, asking) = (Arc::clone(&service), caller.clone());
            let leaving = caller.clone();
            let work = (work, Box::new(move || leaving.has_left()) as GivenUp);
            let submitted = service.pool.admit().map(|running| {
                service.pool.submit(running, work, move |turn| {
                    let answer = call.answer(answering.outcomes(), || {
                        turn?;
                        operation(&answering.snapshotter, &request, &asking)
                    });
                    let _ = sender.send(answer.map(|pages| answering.unsent.begin(pages)));
                });
                receiver
            });
            answer_later(&context, sink, submitted, caller);
        };
    builder.add_server_streaming_handler(&method.on_wire(MethodType::ServerStreaming), handler)
}

/// Sends the answer once a worker has provided it. If the client leaves before, marks `caller`
/// as gone.
pub(super) fn answer_later(
    context: &RpcContext<'_>,
    mut sink: ServerStreamingSink<Vec<u8>>,
    submitted: std::result::Result<Receiver<Answer<Sending>>, RpcStatus>,
    caller: Caller,
) {
    context.spawn(async move {
        let answer = match submitted {
            Err(status) => Err(status),
            Ok(mut receiver) => match while_wanted(&mut receiver, &mut sink).await {
                Some(answer) => answer,
                None => return caller.leave(),
            },
        };
        match answer {
            // The client may have hung up.
            Err(status) => drop(sink.fail(status).await),
            Ok(answer) => answer.send(sink).await,
        }
    });
}

/// Waits for the answer of a worker. Returns `None` once the client has gone, or its
/// deadline has passed.
async fn while_wanted<T>(
    receiver: &mut Receiver<Answer<T>>,
    sink: &mut ServerStreamingSink<Vec<u8>>,
) -> Option<Answer<T>> {
    poll_fn(|context| {
        if let Poll::Ready(answer) = Pin::new(&mut *receiver).poll(context) {
            return Poll::Ready(Some(answer.unwrap_or_else(|_| Err(stopping()))));
        }
        // A sink that has sent nothing is either ready or cancelled.
        match Pin::new(&mut *sink).poll_ready(context) {
            Poll::Ready(Err(_)) => Poll::Ready(None),
            Poll::Ready(Ok(())) | Poll::Pending => Poll::Pending,
        }
    })
    .await
}

/// Begins to send an answer. Dropping the returned future cancels the call.
fn respond(sink: UnarySink<Vec<u8>>, answer: Answer<Vec<u8>>) -> UnarySinkResult {
    match answer {
        Ok(response) => sink.success(response),
        Err(status) => sink.fail(status),
    }
}

async fn ended(sending: UnarySinkResult) {
    // The client may have hung up.
    let _ = sending.await;
}

/// Holds the futures of answers that are being sent: dropping one cancels its call.
/// They are polled when the next answer is added, which saves a thread wake-up for each
/// answer.
#[derive(Default)]
pub(super) struct PendingAnswers(Mutex<Vec<UnarySinkResult>>);

impl PendingAnswers {
    /// Adds an answer, and drops the answers that are sent or whose clients have hung
    /// up.
    fn keep(&self, answer: UnarySinkResult) {
        let mut context = Context::from_waker(Waker::noop());
        let mut answers = lock(&self.0);
        answers.push(answer);
        answers.retain_mut(|answer| Pin::new(answer).poll(&mut context).is_pending());
    }
}

/// A request that has arrived.
#[derive(Clone, Copy)]
pub(super) struct Call {
    method: Method,
    begun: Instant,
}

impl Call {
    pub(super) fn begin(method: Method) -> Call {
        Call {
            method,
            begun: Instant::now(),
        }
    }

    /// Runs an operation, and counts and logs the result.
    fn answer<T>(
        self,
        outcomes: (&Metrics, &FailureLog),
        operation: impl FnOnce() -> Result<T>,
    ) -> Answer<T> {
        self.settle(outcomes, self.run(operation))
    }

    /// Runs an operation, and turns a panic into an error. Values that were being
    /// changed are repaired by their owners: the store rolls back, and new
    /// directories go to the trash.
    pub(super) fn run<T>(self, operation: impl FnOnce() -> Result<T>) -> Result<T> {
        catch_unwind(AssertUnwindSafe(operation)).unwrap_or_else(|_| {
            // The panic handler has already printed the message.
            let name = self.method.name();
            let what = format!(
                "{name} failed because of a bug in this program: the log of the daemon shows \
                 where, please report it"
            );
            Err(Error::new(ErrorKind::Internal, what))
        })
    }

    /// Counts and logs a request that has ended.
    pub(super) fn settle<T>(
        self,
        (metrics, failures): (&Metrics, &FailureLog),
        result: Result<T>,
    ) -> Answer<T> {
        let (name, lasted) = (self.method.name(), self.begun.elapsed());
        let failure = result.as_ref().err().map(Error::kind);
        metrics.record(self.method, failure, lasted);
        failures.report(Instant::now());
        let error = match result {
            Ok(response) => {
                log::debug!("{name}: done in {lasted:?}");
                return Ok(response);
            }
            Err(error) => error,
        };
        let (kind, chain) = (error.kind(), error.chain());
        match level_of(kind) {
            Level::Debug => log::debug!("{name}: {chain} ({lasted:?})"),
            level => match failures.note(self.method, kind, Instant::now()) {
                Line::Written => log::log!(level, "{name}: {chain}"),
                Line::Last => log::log!(
                    level,
                    "{name}: {chain} (for a minute, further failures of this kind are only counted)"
                ),
                Line::LeftOut => log::debug!("{name}: {chain}"),
            },
        }
        Err(RpcStatus::with_message(code_of(kind), chain))
    }
}

fn level_of(kind: ErrorKind) -> Level {
    match kind {
        // containerd expects these errors: it looks for snapshots before they exist, and
        // creates snapshots that exist already.
        ErrorKind::NotFound | ErrorKind::AlreadyExists | ErrorKind::Cancelled => Level::Debug,
        ErrorKind::InvalidArgument | ErrorKind::FailedPrecondition | ErrorKind::Unavailable => {
            Level::Warn
        }
        ErrorKind::ResourceExhausted | ErrorKind::DataLoss | ErrorKind::Internal => Level::Error,
    }
}

/// containerd 1.7 and older convert only the first eight of gRPC's codes back
/// into errors of their own. The others arrive as unknown errors with the same
/// text.
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

#[cfg(test)]
mod tests {
    use super::*;

    fn answer<T>(
        metrics: &Metrics,
        method: Method,
        operation: impl FnOnce() -> Result<T>,
    ) -> Answer<T> {
        Call::begin(method).answer((metrics, &FailureLog::default()), operation)
    }

    #[test]
    fn a_panic_is_an_internal_error_and_nothing_more() {
        let metrics = Metrics::default();
        let status = answer::<()>(&metrics, Method::Stat, || panic!("a bug")).unwrap_err();
        assert_eq!(status.code(), RpcStatusCode::INTERNAL);
        assert!(status.message().contains("Stat"), "{}", status.message());
        assert_eq!(answer(&metrics, Method::Stat, || Ok(7)).unwrap(), 7);
    }

    #[test]
    fn an_error_reaches_the_client_whole() {
        let status = answer::<()>(&Metrics::default(), Method::Prepare, || {
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
}
