//! A thread for work that may wait for a disk that never answers.

use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind, Result};

type Job = Box<dyn FnOnce() + Send>;

/// Runs several jobs in a separate thread, one after the other. The caller waits for all
/// jobs together no longer than a limit, and never for the end of the thread.
pub struct Patience {
    jobs: Sender<Job>,
    thread: Thread,
    deadline: Instant,
    is_over: bool,
}

impl Patience {
    /// Starts a thread of that name. The time limit begins now.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Internal`] if the system cannot start a thread.
    pub fn start(name: &str, limit: Duration) -> Result<Patience> {
        let (jobs, queue) = channel::<Job>();
        let started = thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || queue.into_iter().for_each(|job| job()))
            .map_err(|error| {
                Error::caused(
                    ErrorKind::Internal,
                    format!("start the thread {name:?}"),
                    error,
                )
            })?;
        Ok(Patience {
            jobs,
            thread: started.thread().clone(),
            deadline: Instant::now() + limit,
            is_over: false,
        })
    }

    /// The thread that runs the jobs.
    pub fn thread(&self) -> &Thread {
        &self.thread
    }

    /// Whether a job was not done within the time limit.
    pub fn is_over(&self) -> bool {
        self.is_over
    }

    /// Runs `work` in the thread, and waits for its result. Returns `None` once the time limit
    /// has passed: a job that has begun continues then, and later jobs do not begin.
    pub fn wait_for<T: Send + 'static>(
        &mut self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Option<T> {
        if self.is_over {
            return None;
        }
        let (sender, done) = channel();
        self.leave_to_thread(move || drop(sender.send(work())));
        let left = self.deadline.saturating_duration_since(Instant::now());
        match done.recv_timeout(left) {
            Ok(result) => Some(result),
            Err(RecvTimeoutError::Timeout) => {
                self.is_over = true;
                None
            }
            Err(RecvTimeoutError::Disconnected) => panic!("work has ended by a bug"),
        }
    }

    /// Runs `work` in the thread after all earlier work, and does not wait for it.
    pub fn leave_to_thread(&self, work: impl FnOnce() + Send + 'static) {
        // This fails only if a bug has ended the thread: it accepts work until this value
        // is dropped.
        let _ = self.jobs.send(Box::new(work));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_that_takes_too_long_goes_on_unattended() {
        let mut patience = Patience::start("test", Duration::from_secs(60)).unwrap();
        assert_eq!(patience.wait_for(|| 7), Some(7));
        patience.deadline = Instant::now();
        let (release, wait) = channel::<()>();
        let (say, hear) = channel();
        let first = say.clone();
        let slow = move || {
            let _ = wait.recv();
            first.send("first").unwrap();
        };
        assert_eq!(patience.wait_for(slow), None);
        assert!(patience.is_over());
        assert_eq!(patience.wait_for(|| 8), None);
        patience.leave_to_thread(move || say.send("last").unwrap());
        drop(patience);
        drop(release);
        let said = || hear.recv_timeout(Duration::from_secs(60));
        assert_eq!((said(), said()), (Ok("first"), Ok("last")));
    }
}
