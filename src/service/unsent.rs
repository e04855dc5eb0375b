//! Answers of several pages that are being sent, and a bound for the memory that they hold
//! together.
//!
//! A client may read slowly, or not at all. If the answers together hold too much memory,
//! those whose clients have read nothing for the longest time are given up. So a new
//! answer never waits for the client of another one.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use futures_channel::oneshot::{self, Receiver, Sender};
use futures_util::SinkExt;
use futures_util::future::{Either, select};
use grpcio::{ServerStreamingSink, WriteFlags};

use super::call::Pages;
use crate::util::lock::lock;

/// How many bytes of answers may wait for clients to read them. A single answer may be larger.
const MOST_BYTES: usize = 32 << 20;

/// The answers that are being sent.
#[derive(Default)]
pub(super) struct UnsentAnswers(Mutex<State>);

#[derive(Default)]
struct State {
    next: u64,
    answers: Vec<Held>,
}

/// One answer, and the memory that it holds.
struct Held {
    number: u64,
    bytes: usize,
    /// When the answer's client has last read something.
    since: Instant,
    /// Dropping this makes [`Sending::send`] give the answer up.
    _kept: Sender<()>,
}

/// An answer that is being sent.
pub(super) struct Sending {
    all: Arc<UnsentAnswers>,
    number: u64,
    pages: Pages,
    given_up: Receiver<()>,
}

impl UnsentAnswers {
    /// Adds an answer, and gives up others if all together hold too much memory.
    pub(super) fn begin(self: &Arc<UnsentAnswers>, pages: Pages) -> Sending {
        let bytes = pages.iter().map(Vec::len).sum();
        let (kept, given_up) = oneshot::channel();
        let mut state = lock(&self.0);
        let mut total: usize = bytes;
        total += state.answers.iter().map(|held| held.bytes).sum::<usize>();
        let mut dropped = Vec::new();
        while total > MOST_BYTES
            && let Some(stalled) = state.longest_stalled()
        {
            let held = state.answers.swap_remove(stalled);
            total -= held.bytes;
            dropped.push(held);
        }
        let number = state.next;
        state.next += 1;
        state.answers.push(Held {
            number,
            bytes,
            since: Instant::now(),
            _kept: kept,
        });
        drop(state);
        for held in dropped {
            let (bytes, waited) = (held.bytes, held.since.elapsed());
            log::debug!(
                "gave up an answer with {bytes} bytes left, because its client has read nothing \
                 for {waited:?}"
            );
        }
        Sending {
            all: Arc::clone(self),
            number,
            pages,
            given_up,
        }
    }

    fn note_sent(&self, number: u64, bytes: usize) {
        let mut state = lock(&self.0);
        let held = state.answers.iter_mut().find(|held| held.number == number);
        if let Some(held) = held {
            held.bytes -= bytes;
            held.since = Instant::now();
        }
    }
}

impl State {
    fn longest_stalled(&self) -> Option<usize> {
        let all = self.answers.iter().enumerate();
        all.min_by_key(|(_, held)| held.since).map(|(at, _)| at)
    }
}

impl Sending {
    /// Sends the pages. Ends early if the client has hung up, or if the answer is given up.
    pub(super) async fn send(mut self, mut sink: ServerStreamingSink<Vec<u8>>) {
        for page in std::mem::take(&mut self.pages) {
            let bytes = page.len();
            let sending = sink.send((page, WriteFlags::default()));
            match select(sending, &mut self.given_up).await {
                Either::Left((Ok(()), _)) => self.all.note_sent(self.number, bytes),
                Either::Left((Err(_), _)) | Either::Right(_) => return,
            }
        }
        // The client may have hung up.
        let _ = sink.close().await;
    }
}

impl Drop for Sending {
    fn drop(&mut self) {
        let mut state = lock(&self.all.0);
        state.answers.retain(|held| held.number != self.number);
    }
}
