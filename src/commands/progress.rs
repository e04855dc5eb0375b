//! Shows the progress of a long command, on a terminal only.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

/// A command that ends before this time has passed shows no progress.
const SILENCE: Duration = Duration::from_millis(500);
const BETWEEN_LINES: Duration = Duration::from_millis(100);

/// A line about the progress on standard error, if that is a terminal. Dropping this value
/// removes the line.
pub struct Progress {
    what: &'static str,
    is_terminal: bool,
    is_shown: bool,
    next: Instant,
}

impl Progress {
    pub fn new(what: &'static str) -> Progress {
        Progress {
            what,
            is_terminal: std::io::stderr().is_terminal(),
            is_shown: false,
            next: Instant::now() + SILENCE,
        }
    }

    /// Iterates over snapshots, and shows how many are done.
    pub fn over<'a, T>(what: &'static str, all: &'a [T]) -> impl Iterator<Item = &'a T> {
        let mut progress = Progress::new(what);
        all.iter().enumerate().map(move |(done, one)| {
            progress.show(done, all.len());
            one
        })
    }

    /// Shows how many snapshots are done, not more often than a person can read.
    pub fn show(&mut self, done: usize, all: usize) {
        let now = Instant::now();
        if !self.is_terminal || now < self.next {
            return;
        }
        self.next = now + BETWEEN_LINES;
        self.is_shown = true;
        self.write(&format!("\r{}: {done} of {all} snapshots", self.what));
    }

    /// Shows a line at once.
    pub fn say(&mut self, text: &str) {
        if self.is_terminal {
            self.is_shown = true;
            self.write(&format!("\r\x1b[K{}: {text}", self.what));
        }
    }

    fn write(&self, text: &str) {
        // The command goes on even if progress cannot be shown.
        let _ = std::io::stderr().write_all(text.as_bytes());
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.is_shown {
            self.write("\r\x1b[K");
        }
    }
}
