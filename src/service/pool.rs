//! The threads that may wait for a disk, and the end of all requests at a stop.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use grpcio::{RpcStatus, RpcStatusCode};

use crate::error::{Context, Result};
use crate::util::lock::lock;

type Job = Box<dyn FnOnce() + Send>;

/// How long a request may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// No longer than its disks let it wait.
    Brief,
    /// As long as a walk through a tree takes. Half of the workers are kept free of such
    /// work, where there are several: a container that starts does not wait for it.
    Long,
}

/// A fixed number of threads that take requests in the order of their arrival.
pub struct Pool {
    requests: Arc<Requests>,
    workers: Mutex<Vec<JoinHandle<()>>>,
}

/// What is under way. Not a channel: its receiver would be shared behind a lock, and each
/// job would wake a second worker, to be the next one to wait in it.
struct Requests {
    state: Mutex<State>,
    /// A job has been added, or there will be no more.
    added: Condvar,
    /// The last request has ended while a stop waits for it.
    drained: Condvar,
    /// How many workers may be at long work at the same time.
    most_long: usize,
}

#[derive(Default)]
struct State {
    is_closed: bool,
    /// Requests that were let in and have not ended.
    under_way: usize,
    waiting: VecDeque<(Work, Job)>,
    long_running: usize,
}

/// A request under way, waiting or running; over when dropped.
pub struct Running {
    requests: Arc<Requests>,
}

impl Pool {
    /// Starts `threads` workers.
    pub fn start(threads: usize) -> Result<Pool> {
        let requests = Arc::new(Requests {
            state: Mutex::default(),
            added: Condvar::new(),
            drained: Condvar::new(),
            most_long: threads.div_ceil(2),
        });
        let mut workers = Vec::with_capacity(threads);
        for number in 0..threads {
            let requests = Arc::clone(&requests);
            let worker = thread::Builder::new()
                .name(format!("worker-{number}"))
                .spawn(move || requests.work())
                .context(|| "start a worker thread")?;
            workers.push(worker);
        }
        Ok(Pool {
            requests,
            workers: Mutex::new(workers),
        })
    }

    /// Lets a request in; it is under way until the value is dropped. Fails with gRPC's
    /// Unavailable once [`Pool::close`] was called.
    pub fn admit(&self) -> std::result::Result<Running, RpcStatus> {
        let mut state = lock(&self.requests.state);
        if state.is_closed {
            return Err(stopping());
        }
        state.under_way += 1;
        Ok(Running {
            requests: Arc::clone(&self.requests),
        })
    }

    /// Hands a request that was let in to the workers; it is under way until
    /// `job` has run.
    pub fn submit(&self, running: Running, work: Work, job: impl FnOnce() + Send + 'static) {
        let job = Box::new(move || {
            job();
            drop(running);
        });
        lock(&self.requests.state).waiting.push_back((work, job));
        self.requests.added.notify_one();
    }

    /// Admits nothing from now on, and waits until what is under way has ended.
    /// `false` if that took longer than `limit`.
    pub fn close(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        let requests = &self.requests;
        let mut state = lock(&requests.state);
        state.is_closed = true;
        while state.under_way > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let waited = requests.drained.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        drop(state);
        requests.added.notify_all();
        for worker in lock(&self.workers).drain(..) {
            // A worker catches its requests' panics.
            let _ = worker.join();
        }
        true
    }
}

impl Requests {
    fn work(&self) {
        while let Some((work, job)) = self.take() {
            job();
            if work == Work::Long {
                // This worker looks for the next job itself.
                lock(&self.state).long_running -= 1;
            }
        }
    }

    /// Waits for a job that may begin; `None` when there will be no more.
    fn take(&self) -> Option<(Work, Job)> {
        let mut state = lock(&self.state);
        loop {
            let is_full = state.long_running == self.most_long;
            let may_begin = |(work, _): &(Work, Job)| *work == Work::Brief || !is_full;
            if let Some(next) = state.waiting.iter().position(may_begin) {
                let taken = state.waiting.remove(next);
                let is_long = taken.as_ref().is_some_and(|(work, _)| *work == Work::Long);
                state.long_running += usize::from(is_long);
                return taken;
            }
            if state.is_closed && state.under_way == 0 {
                return None;
            }
            let waited = self.added.wait(state);
            state = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }
}

pub(super) fn stopping() -> RpcStatus {
    RpcStatus::with_message(
        RpcStatusCode::UNAVAILABLE,
        "the snapshotter is stopping: try again when it is back".to_owned(),
    )
}

impl Drop for Running {
    fn drop(&mut self) {
        let mut state = lock(&self.requests.state);
        state.under_way -= 1;
        // Only a stop waits for it; a wake is a system call, waited for or not.
        if state.is_closed {
            self.requests.drained.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn a_stop_waits_for_what_is_under_way_and_admits_no_more() {
        let pool = Pool::start(3).unwrap();
        let done = Arc::new(AtomicUsize::new(0));
        for _ in 0..20 {
            let done = Arc::clone(&done);
            pool.submit(pool.admit().unwrap(), Work::Brief, move || {
                thread::sleep(Duration::from_millis(5));
                done.fetch_add(1, Ordering::SeqCst);
            });
        }
        assert!(pool.close(Duration::from_secs(60)));
        assert_eq!(done.load(Ordering::SeqCst), 20);
        let refused = pool.admit().err().unwrap();
        assert_eq!(refused.code(), RpcStatusCode::UNAVAILABLE);
    }

    #[test]
    fn long_work_leaves_a_worker_to_the_others() {
        let pool = Pool::start(3).unwrap();
        let (began, beginnings) = channel();
        let (release, wait) = channel::<()>();
        let wait = Arc::new(Mutex::new(wait));
        for number in 0..4 {
            let (began, wait) = (began.clone(), Arc::clone(&wait));
            pool.submit(pool.admit().unwrap(), Work::Long, move || {
                began.send(number).unwrap();
                let _ = lock(&wait).recv();
            });
        }
        let next = || beginnings.recv_timeout(Duration::from_secs(60)).unwrap();
        let mut first = [next(), next()];
        first.sort_unstable();
        assert_eq!(first, [0, 1]);
        let began_brief = began.clone();
        pool.submit(pool.admit().unwrap(), Work::Brief, move || {
            began_brief.send(9).unwrap();
        });
        // Before the long ones that came before it.
        assert_eq!(next(), 9);
        release.send(()).unwrap();
        assert_eq!(next(), 2);
        drop(release);
        assert_eq!(next(), 3);
        assert!(pool.close(Duration::from_secs(60)));
    }

    #[test]
    fn long_work_is_done_by_an_only_worker_too() {
        let pool = Pool::start(1).unwrap();
        let done = Arc::new(AtomicUsize::new(0));
        let counting = Arc::clone(&done);
        pool.submit(pool.admit().unwrap(), Work::Long, move || {
            counting.fetch_add(1, Ordering::SeqCst);
        });
        assert!(pool.close(Duration::from_secs(60)));
        assert_eq!(done.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn a_stop_does_not_wait_for_ever() {
        let pool = Pool::start(1).unwrap();
        let (release, wait) = channel::<()>();
        pool.submit(pool.admit().unwrap(), Work::Brief, move || {
            let _ = wait.recv();
        });
        assert!(!pool.close(Duration::from_millis(20)));
        drop(release);
        assert!(pool.close(Duration::from_secs(60)));
    }
}
