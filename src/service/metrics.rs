//! Counts requests: how many there were, how they ended, and how long they took.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::method::Method;
use crate::error::ErrorKind;
use crate::text::prometheus::{Kind, head, line};

/// All outcomes of a request, each with gRPC's name.
const CODES: [(&str, Option<ErrorKind>); 10] = [
    ("OK", None),
    ("NOT_FOUND", Some(ErrorKind::NotFound)),
    ("ALREADY_EXISTS", Some(ErrorKind::AlreadyExists)),
    ("INVALID_ARGUMENT", Some(ErrorKind::InvalidArgument)),
    ("FAILED_PRECONDITION", Some(ErrorKind::FailedPrecondition)),
    ("RESOURCE_EXHAUSTED", Some(ErrorKind::ResourceExhausted)),
    ("UNAVAILABLE", Some(ErrorKind::Unavailable)),
    ("CANCELLED", Some(ErrorKind::Cancelled)),
    ("DATA_LOSS", Some(ErrorKind::DataLoss)),
    ("INTERNAL", Some(ErrorKind::Internal)),
];

/// gRPC's name for the outcome of a request.
pub(super) fn code_name(failure: Option<ErrorKind>) -> &'static str {
    let named = CODES.iter().find(|(_, kind)| *kind == failure);
    named.expect("every kind of error is in the list").0
}

/// Upper bounds of the buckets of durations, in microseconds, from a read of
/// the database to a flush of a slow disk. The last bucket has no bound.
const BOUNDS: [u64; 11] = [
    100, 250, 1_000, 2_500, 10_000, 25_000, 100_000, 250_000, 1_000_000, 5_000_000, 30_000_000,
];

/// Counters of all methods, since the start of the daemon.
#[derive(Default)]
pub struct Metrics {
    methods: [MethodMetrics; Method::ALL.len()],
}

#[derive(Default)]
struct MethodMetrics {
    ended: [AtomicU64; CODES.len()],
    /// The counts of each bucket alone, not cumulative.
    lasted: [AtomicU64; BOUNDS.len() + 1],
    microseconds: AtomicU64,
}

impl Metrics {
    /// Counts a request that has taken `lasted` since its arrival.
    pub(super) fn record(&self, method: Method, failure: Option<ErrorKind>, lasted: Duration) {
        let method = &self.methods[method as usize];
        let code = CODES.iter().position(|(_, kind)| *kind == failure);
        let code = code.expect("every kind of error is in the list");
        let microseconds = u64::try_from(lasted.as_micros()).unwrap_or(u64::MAX);
        let bucket = BOUNDS.partition_point(|bound| *bound < microseconds);
        method.ended[code].fetch_add(1, Ordering::Relaxed);
        method.lasted[bucket].fetch_add(1, Ordering::Relaxed);
        method
            .microseconds
            .fetch_add(microseconds, Ordering::Relaxed);
    }

    /// Writes all counters. Outcomes that have not happened are left out.
    pub fn render(&self, out: &mut String) {
        let name = "snapshotter_requests_total";
        let help = "Requests answered, by method and gRPC code.";
        head(out, Kind::Counter, name, help);
        for (method, label) in self.by_name() {
            for (count, (code, _)) in method.ended.iter().zip(CODES) {
                let count = count.load(Ordering::Relaxed);
                if count > 0 {
                    line(out, name, &[("method", label), ("code", code)], count);
                }
            }
        }
        let name = "snapshotter_request_seconds";
        let help = "How long requests took from their arrival, including the wait for a worker.";
        head(out, Kind::Histogram, name, help);
        for (method, label) in self.by_name() {
            method.render_durations(out, name, label);
        }
    }

    fn by_name(&self) -> impl Iterator<Item = (&MethodMetrics, &'static str)> {
        let names = Method::ALL.iter().map(|method| method.name());
        self.methods.iter().zip(names)
    }
}

impl MethodMetrics {
    fn render_durations(&self, out: &mut String, name: &str, label: &str) {
        let bucket = format!("{name}_bucket");
        let mut count = 0;
        for (number, lasted) in self.lasted.iter().enumerate() {
            count += lasted.load(Ordering::Relaxed);
            let bound = match BOUNDS.get(number) {
                Some(bound) => (*bound as f64 / 1e6).to_string(),
                None => "+Inf".to_owned(),
            };
            line(out, &bucket, &[("method", label), ("le", &bound)], count);
        }
        let seconds = self.microseconds.load(Ordering::Relaxed) as f64 / 1e6;
        line(out, &format!("{name}_sum"), &[("method", label)], seconds);
        line(out, &format!("{name}_count"), &[("method", label)], count);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_counted_by_method_code_and_duration() {
        let metrics = Metrics::default();
        metrics.record(Method::Stat, None, Duration::from_micros(100));
        metrics.record(Method::Stat, None, Duration::from_micros(101));
        metrics.record(
            Method::Stat,
            Some(ErrorKind::NotFound),
            Duration::from_secs(60),
        );
        let mut text = String::new();
        metrics.render(&mut text);
        for line in [
            "snapshotter_requests_total{method=\"Stat\",code=\"OK\"} 2",
            "snapshotter_requests_total{method=\"Stat\",code=\"NOT_FOUND\"} 1",
            "snapshotter_request_seconds_bucket{method=\"Stat\",le=\"0.0001\"} 1",
            "snapshotter_request_seconds_bucket{method=\"Stat\",le=\"0.00025\"} 2",
            "snapshotter_request_seconds_bucket{method=\"Stat\",le=\"30\"} 2",
            "snapshotter_request_seconds_bucket{method=\"Stat\",le=\"+Inf\"} 3",
            "snapshotter_request_seconds_sum{method=\"Stat\"} 60.000201",
            "snapshotter_request_seconds_count{method=\"Stat\"} 3",
            "snapshotter_request_seconds_count{method=\"List\"} 0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}: {text}");
        }
    }
}
