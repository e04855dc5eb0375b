//! How a request ends: caught, counted, logged, and as what the client gets.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use grpcio::{RpcStatus, RpcStatusCode};

use super::Metrics;
use crate::error::{Error, ErrorKind, Result};

/// Runs one request to its end: times, counts and logs it, turns an error or a panic
/// into the status that the client gets.
pub(super) fn answer<T>(
    metrics: &Metrics,
    method: &'static str,
    operation: impl FnOnce() -> Result<T>,
) -> std::result::Result<T, RpcStatus> {
    let begun = Instant::now();
    settle(metrics, method, begun, run(method, operation))
}

/// What a panic leaves behind is made sound by those who own it: the store rolls
/// back, new directories go to the trash.
pub(super) fn run<T>(method: &'static str, operation: impl FnOnce() -> Result<T>) -> Result<T> {
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

pub(super) fn settle<T>(
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

#[cfg(test)]
mod tests {
    use super::super::{PREPARE, STAT};
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
}
