//! The method Cleanup, which cleans the image volume and then the writable volume. On each
//! volume, one cleanup runs at a time, and callers that arrive while it runs share the next
//! one. A volume that does not answer does not keep the other volume from being cleaned.
//!
//! A Cleanup has to free everything that was removed before the call, so a caller cannot share
//! a cleanup that has already begun. The callers wait without a thread, each at most as long as
//! its client does. Each cleanup has a thread of its own, because freeing space must not wait
//! for walks through containers' files.

use std::sync::{Arc, Mutex};
use std::thread;

use futures_channel::oneshot::{self, Sender};
use grpcio::{MethodType, RpcContext, ServerStreamingSink, ServiceBuilder};
use protobuf::well_known_types::empty::Empty;

use super::call::{Answer, Call, answer_later};
use super::method::Method;
use super::pool::{GivenUp, Running, Work};
use super::unsent::Sending;
use super::{Service, api, decode, encode};
use crate::error::{Error, ErrorKind, Result};
use crate::snapshotter::Caller;
use crate::types::Volume;
use crate::util::lock::lock;

/// For each volume: whether a cleanup runs, and the callers that wait for the next one.
#[derive(Default)]
pub(super) struct Cleanups([Mutex<State>; 2]);

#[derive(Default)]
struct State {
    is_running: bool,
    /// The callers that wait for the next cleanup.
    waiting: Vec<Waiter>,
}

struct Waiter {
    call: Call,
    /// The result of cleaning the image volume, once that is done.
    image: Result<()>,
    sender: Sender<Answer<Sending>>,
    /// Makes a stop wait for this request.
    running: Running,
}

/// Registers the method Cleanup.
pub(super) fn register(builder: ServiceBuilder, service: &Arc<Service>) -> ServiceBuilder {
    let service = Arc::clone(service);
    let handler =
        move |context: RpcContext<'_>, request: Vec<u8>, sink: ServerStreamingSink<Vec<u8>>| {
            let call = Call::begin(Method::Cleanup);
            let admitted = service.pool.admit().and_then(|running| {
                if let Err(error) = decode::<api::CleanupRequest>(&request) {
                    return call.settle(service.outcomes(), Err(error));
                }
                let (sender, receiver) = oneshot::channel();
                let waiter = Waiter {
                    call,
                    image: Ok(()),
                    sender,
                    running,
                };
                service.join_cleanup(Volume::Image, waiter);
                Ok(receiver)
            });
            answer_later(&context, sink, admitted, Caller::default());
        };
    // Cleanup is registered as a stream, because only a stream's sink reports that the client
    // has gone. On the wire, a stream of one message looks like a single answer.
    let method = Method::Cleanup.on_wire(MethodType::ServerStreaming);
    builder.add_server_streaming_handler(&method, handler)
}

impl Service {
    fn join_cleanup(self: &Arc<Service>, volume: Volume, waiter: Waiter) {
        let mut state = lock(&self.cleanups.0[volume as usize]);
        state.waiting.push(waiter);
        if !state.is_running {
            self.begin_cleanup(volume, &mut state);
        }
    }

    /// Starts the next Cleanup of a volume if a caller waits for it.
    fn begin_cleanup(self: &Arc<Service>, volume: Volume, state: &mut State) {
        let first = state.waiting.first();
        state.is_running = first.is_some();
        if let Some(first) = first {
            let clean_up = || {
                let (service, running) = (Arc::clone(self), first.running.share());
                move || {
                    service.clean_up(volume);
                    drop(running);
                }
            };
            let thread = thread::Builder::new().name("cleanup".to_owned());
            if let Err(error) = thread.spawn(clean_up()) {
                log::error!(
                    "cannot start a thread for containerd's garbage collection, so a thread for \
                     other requests deletes the removed files, and these requests may wait: {error}"
                );
                let (running, clean_up) = (first.running.share(), clean_up());
                let work = (Work::Long, Box::new(|| false) as GivenUp);
                self.pool.submit(running, work, move |_| clean_up());
            }
        }
    }

    fn clean_up(self: &Arc<Service>, volume: Volume) {
        let state = &self.cleanups.0[volume as usize];
        let waiting = std::mem::take(&mut lock(state).waiting);
        let (left, waiting): (Vec<_>, Vec<_>) = waiting
            .into_iter()
            .partition(|waiter| waiter.sender.is_canceled());
        for waiter in left {
            let error = Error::new(ErrorKind::Cancelled, "the caller does not wait any longer");
            waiter.answer(self, Err(error));
        }
        if let Some(first) = waiting.first() {
            let result = first.call.run(|| self.snapshotter.cleanup(volume));
            for mut waiter in waiting {
                let result = result.as_ref().copied();
                let result = result.map_err(|error| Error::new(error.kind(), error.chain()));
                match volume {
                    Volume::Image => {
                        waiter.image = result;
                        self.join_cleanup(Volume::Writable, waiter);
                    }
                    Volume::Writable => {
                        let image = std::mem::replace(&mut waiter.image, Ok(()));
                        waiter.answer(self, image.and(result));
                    }
                }
            }
        }
        self.begin_cleanup(volume, &mut lock(state));
    }
}

impl Waiter {
    fn answer(self, service: &Service, result: Result<()>) {
        let pages = result.and_then(|()| Ok(vec![encode(&Empty::new())?]));
        let answer = self.call.settle(service.outcomes(), pages);
        let answer = answer.map(|pages| service.unsent.begin(pages));
        // The client may have hung up.
        let _ = self.sender.send(answer);
    }
}
