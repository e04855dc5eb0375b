//! Answers that are on their way.

use std::future::Future;
use std::pin::Pin;
use std::sync::Mutex;
use std::task::{Context, Waker};

use grpcio::UnarySinkResult;

use crate::util::lock::lock;

/// Keeps answers until they are sent: a call that is let go of is cut off. Nobody
/// waits for them, as that would wake a thread for each.
#[derive(Default)]
pub struct Sending {
    answers: Mutex<Vec<UnarySinkResult>>,
}

impl Sending {
    /// Keeps one more, and lets go of those that are sent by now, or whose client has
    /// hung up.
    pub(super) fn keep(&self, answer: UnarySinkResult) {
        let mut context = Context::from_waker(Waker::noop());
        let mut answers = lock(&self.answers);
        answers.push(answer);
        answers.retain_mut(|answer| Pin::new(answer).poll(&mut context).is_pending());
    }
}
