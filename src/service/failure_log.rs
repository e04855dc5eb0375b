//! Decides which failed requests get a line in the log.
//!
//! Clients try again, and some requests come from an image or a pod, so refused requests can
//! arrive without end. Therefore each method with each kind of error gets a limited number of
//! lines per minute, and the number of further failures is logged afterwards. Each kind of
//! error has a limit of its own, so that many refused requests do not hide an error about lost
//! data.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use super::method::Method;
use super::metrics::code_name;
use crate::error::ErrorKind;
use crate::util::lock::lock;

/// How many lines the requests of one method with one kind of error get per
/// minute.
pub(super) const MOST_LINES: u64 = 10;
const MINUTE: Duration = Duration::from_secs(60);

/// The failures of the last minute: at most one entry for each pair of a method and a
/// kind.
#[derive(Default)]
pub(super) struct FailureLog(Mutex<Vec<Failures>>);

struct Failures {
    method: Method,
    kind: ErrorKind,
    since: Instant,
    count: u64,
}

/// Whether a failed request gets a line in the log.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Line {
    Written,
    /// This line is the last one of its minute.
    Last,
    LeftOut,
}

impl FailureLog {
    pub fn note(&self, method: Method, kind: ErrorKind, now: Instant) -> Line {
        let mut all = lock(&self.0);
        let is_it = |failures: &&mut Failures| (failures.method, failures.kind) == (method, kind);
        let count = match all.iter_mut().find(is_it) {
            Some(failures) => {
                failures.count += 1;
                failures.count
            }
            None => {
                all.push(Failures {
                    method,
                    kind,
                    since: now,
                    count: 1,
                });
                1
            }
        };
        match count {
            ..MOST_LINES => Line::Written,
            MOST_LINES => Line::Last,
            _ => Line::LeftOut,
        }
    }

    /// Logs how many lines were left out in minutes that have ended.
    pub fn report(&self, now: Instant) {
        for text in self.take(|since| now.duration_since(since) >= MINUTE) {
            log::warn!("{text}");
        }
    }

    /// Removes the entries whose minute is over, and returns a log line for each of them that
    /// had failures without a line.
    fn take(&self, is_over: impl Fn(Instant) -> bool) -> Vec<String> {
        let mut all = lock(&self.0);
        let over = all.extract_if(.., |failures| is_over(failures.since));
        let texts = over.filter_map(|failures| {
            let left_out = failures.count.checked_sub(MOST_LINES).filter(|n| *n > 0)?;
            Some(format!(
                "{}: {left_out} more requests ended with {} within a minute, and were not logged",
                failures.method.name(),
                code_name(Some(failures.kind))
            ))
        });
        texts.collect()
    }
}

impl Drop for FailureLog {
    fn drop(&mut self) {
        for text in self.take(|_| true) {
            log::warn!("{text}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_lines_a_minute_and_a_count() {
        let log = FailureLog::default();
        let (kind, begun) = (ErrorKind::InvalidArgument, Instant::now());
        let note = |now| log.note(Method::Prepare, kind, now);
        for _ in 1..MOST_LINES {
            assert_eq!(note(begun), Line::Written);
        }
        assert_eq!(note(begun), Line::Last);
        for _ in 0..100_000 {
            assert_eq!(note(begun + MINUTE / 2), Line::LeftOut);
        }
        // Other kinds of errors have lines of their own.
        let lost = log.note(Method::Prepare, ErrorKind::DataLoss, begun);
        assert_eq!(lost, Line::Written);
        assert_eq!(log.note(Method::View, kind, begun), Line::Written);
        let over_at = |now: Instant| log.take(|since| now.duration_since(since) >= MINUTE);
        assert_eq!(over_at(begun + MINUTE / 2), [""; 0]);
        assert_eq!(
            over_at(begun + MINUTE),
            [
                "Prepare: 100000 more requests ended with INVALID_ARGUMENT within a minute, and \
                 were not logged"
            ]
        );
        assert_eq!(note(begun + MINUTE), Line::Written);
        assert!(lock(&log.0).len() == 1);
    }
}
