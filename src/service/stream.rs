//! Answers that are sent as streams: List, and Usage, which is one on our side.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;

use futures_channel::oneshot;
use futures_util::{Sink, SinkExt};
use grpcio::{RpcContext, ServerStreamingSink, WriteFlags};

use super::outcome::answer;
use super::pool::Work;
use super::{Desk, LIST, USAGE, decode, dropped, encode, list_pages, usage};
use crate::snapshotter::Caller;

/// All pages are made at once, so that the answer is of one moment and a
/// reader that stalls holds memory but no worker and no transaction.
pub(super) fn stream_list(
    context: &RpcContext<'_>,
    request: Vec<u8>,
    mut sink: ServerStreamingSink<Vec<u8>>,
    desk: &Arc<Desk>,
) {
    let (sender, receiver) = oneshot::channel();
    let answering = Arc::clone(desk);
    let submitted = desk.pool.admit().map(|running| {
        desk.pool.submit(running, Work::Brief, move || {
            let pages = || list_pages(&answering.snapshotter, &request);
            let _ = sender.send(answer(&answering.metrics, LIST, pages));
        });
    });
    context.spawn(async move {
        let pages = match submitted {
            Ok(()) => receiver.await.unwrap_or_else(|_| Err(dropped())),
            Err(status) => Err(status),
        };
        // A client that has hung up is no concern of ours.
        let _ = match pages {
            Err(status) => sink.fail(status).await,
            Ok(pages) => {
                for page in pages {
                    if sink.send((page, WriteFlags::default())).await.is_err() {
                        return;
                    }
                }
                sink.close().await
            }
        };
    });
}

/// Answers Usage, which may walk for long: given up when the client has gone, or
/// its deadline has passed.
pub(super) fn respond_while_wanted(
    context: &RpcContext<'_>,
    request: Vec<u8>,
    mut sink: ServerStreamingSink<Vec<u8>>,
    desk: &Arc<Desk>,
) {
    let caller = Caller::default();
    let (sender, mut receiver) = oneshot::channel();
    let (answering, asking) = (Arc::clone(desk), caller.clone());
    let submitted = desk.pool.admit().map(|running| {
        desk.pool.submit(running, Work::Long, move || {
            let result = answer(&answering.metrics, USAGE, || {
                encode(&usage(&answering.snapshotter, &decode(&request)?, &asking)?)
            });
            let _ = sender.send(result);
        });
    });
    context.spawn(async move {
        let result = match submitted {
            Err(status) => Err(status),
            Ok(()) => {
                let ended = poll_fn(|context| {
                    if let Poll::Ready(result) = Pin::new(&mut receiver).poll(context) {
                        return Poll::Ready(Some(result));
                    }
                    // A sink that has sent nothing is always ready, or over.
                    match Pin::new(&mut sink).poll_ready(context) {
                        Poll::Ready(Err(_)) => Poll::Ready(None),
                        Poll::Ready(Ok(())) | Poll::Pending => Poll::Pending,
                    }
                });
                match ended.await {
                    Some(result) => result.unwrap_or_else(|_| Err(dropped())),
                    None => {
                        caller.leave();
                        return;
                    }
                }
            }
        };
        // A client that has hung up is no concern of ours.
        let _ = match result {
            Err(status) => sink.fail(status).await,
            Ok(response) => match sink.send((response, WriteFlags::default())).await {
                Ok(()) => sink.close().await,
                Err(error) => Err(error),
            },
        };
    });
}
