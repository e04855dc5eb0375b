//! The threads on which requests may wait for a disk, and the end of all requests when the
//! daemon stops.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use grpcio::{RpcStatus, RpcStatusCode};

use crate::error::{Context, Error, ErrorKind, Result};
use crate::util::lock::lock;
use crate::waits::{MOST_AT_ONE_PLACE, PLACES, Waits};

/// A request to be run. Its argument is an error if the request must not be performed, because
/// it was refused or its caller has given it up.
type Job = Box<dyn FnOnce(Result<()>) + Send>;

/// Returns whether the caller of a request has stopped waiting for the answer.
pub type GivenUp = Box<dyn Fn() -> bool + Send>;

/// What a request may wait for, and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// The request waits only for single accesses to the snapshotter's own disks.
    Brief,
    /// The request waits for a walk through a tree of files. Half of the workers (if there are
    /// several) do no such work, so that the start of a container does not wait for a walk.
    Long,
    /// The request reads all snapshots, and its answer takes memory. At most [`MOST_LISTS`]
    /// requests do this at the same time.
    List,
    /// The request may wait for something other than the snapshotter's own disks, such as a
    /// host directory on a server that does not answer. This work has threads of its own, at
    /// most [`MOST_ELSEWHERE`].
    Elsewhere,
}

/// How many requests may wait for something other than our own disks at the same
/// time.
pub const MOST_ELSEWHERE: usize = 32;

/// How many requests may create the answer of a List at the same time.
const MOST_LISTS: usize = 4;

/// How long a request beyond [`MOST_ELSEWHERE`] waits for a thread before it is refused.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long a request waits for a worker before it gets an additional thread. The
/// workers may all be waiting for a disk that does not answer any more, and the request
/// may not need that disk.
const CROWDED: Duration = Duration::from_millis(100);
/// How many additional threads there may be. An additional thread ends when no request waits
/// for a thread. Requests that wait for disks that do not answer occupy at most half of these
/// threads.
const MOST_SPARE: usize = 2 * PLACES * MOST_AT_ONE_PLACE;

/// A fixed number of threads that take requests in the order of their arrival, and
/// additional threads if a request has to wait for too long.
pub struct Pool {
    requests: Arc<Requests>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// The requests under way. This is not a channel, because the workers would share the receiver
/// of a channel behind a lock, and each job would wake a second worker, which would only wait
/// for that lock.
struct Requests {
    state: Mutex<State>,
    /// Signalled when a job was added, or when no more jobs will come.
    added: Condvar,
    /// Signalled when a job waits and no worker is idle, or when no more jobs will come.
    crowded: Condvar,
    /// Signalled when the last request has ended during a stop.
    drained: Condvar,
    waits: Arc<Waits>,
}

#[derive(Default)]
struct State {
    is_closed: bool,
    /// How many workers may do long work at the same time.
    most_long: usize,
    /// How many requests were admitted and have not ended.
    under_way: usize,
    waiting: VecDeque<Waiting>,
    /// How many workers wait for a job.
    idle: usize,
    spare: usize,
    long_running: usize,
    lists_running: usize,
    /// The requests of [`Work::Elsewhere`] that have no thread yet.
    elsewhere_waiting: VecDeque<Waiting>,
    elsewhere_running: usize,
}

/// A request that waits for a thread.
struct Waiting {
    /// The time at which the request arrived.
    since: Instant,
    work: Work,
    is_given_up: GivenUp,
    job: Job,
}

/// Represents a request that waits or runs. Dropping this value means that the request has
/// ended.
pub struct Running {
    requests: Arc<Requests>,
}

impl Pool {
    /// Starts `threads` workers.
    pub fn start(threads: usize) -> Result<Pool> {
        let requests = Arc::new(Requests {
            state: Mutex::new(State {
                most_long: threads.div_ceil(2),
                ..State::default()
            }),
            added: Condvar::new(),
            crowded: Condvar::new(),
            drained: Condvar::new(),
            waits: Arc::default(),
        });
        let start = |name: String, work: fn(&Arc<Requests>)| {
            let requests = Arc::clone(&requests);
            thread::Builder::new()
                .name(name)
                .spawn(move || work(&requests))
                .context(|| "start a worker thread")
        };
        let mut all = vec![start("crowded".to_owned(), Requests::relieve)?];
        for number in 0..threads {
            all.push(start(format!("worker-{number}"), |requests| {
                requests.work()
            })?);
        }
        Ok(Pool {
            requests,
            threads: Mutex::new(all),
        })
    }

    /// Admits a request, which is under way until the returned value is dropped. Returns gRPC's
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

    /// Passes an admitted request to the workers. The request is under way until `job` has run.
    /// `job` gets [`ErrorKind::Unavailable`] if it is refused because too many requests wait
    /// for something other than our own disks, and [`ErrorKind::Cancelled`] if the caller has
    /// given it up before its turn.
    pub fn submit(
        &self,
        running: Running,
        (work, is_given_up): (Work, GivenUp),
        job: impl FnOnce(Result<()>) + Send + 'static,
    ) {
        let waiting = Waiting {
            since: Instant::now(),
            work,
            is_given_up,
            job: Box::new(move |turn: Result<()>| {
                job(turn);
                drop(running);
            }),
        };
        if work == Work::Elsewhere {
            return self.submit_elsewhere(waiting);
        }
        let mut state = lock(&self.requests.state);
        state.waiting.push_back(waiting);
        let is_crowded = state.waiting.len() > state.idle;
        drop(state);
        self.requests.added.notify_one();
        if is_crowded {
            self.requests.crowded.notify_one();
        }
    }

    fn submit_elsewhere(&self, waiting: Waiting) {
        let mut state = lock(&self.requests.state);
        state.elsewhere_waiting.push_back(waiting);
        if state.elsewhere_running == MOST_ELSEWHERE {
            drop(state);
            // All workers are woken, because any of them may be free first. That worker refuses
            // the request if it has waited for too long.
            return self.requests.added.notify_all();
        }
        state.elsewhere_running += 1;
        drop(state);
        let requests = Arc::clone(&self.requests);
        let thread = thread::Builder::new().name("elsewhere".to_owned());
        if let Err(error) = thread.spawn(move || requests.work_elsewhere()) {
            log::error!(
                "cannot start a thread for a request, so the request waits until another one has \
                 ended: {error}"
            );
            lock(&self.requests.state).elsewhere_running -= 1;
            self.requests.added.notify_all();
        }
    }

    /// Admits no more requests, and waits until those under way have ended.
    /// Returns `false` if that takes longer than `limit`.
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
        requests.crowded.notify_all();
        for thread in lock(&self.threads).drain(..) {
            // No worker has ended with a panic, because each request catches its own panics.
            let _ = thread.join();
        }
        true
    }
}

impl Requests {
    fn work(&self) {
        while let Some(taken) = self.take() {
            self.run(taken);
        }
    }

    fn run(&self, taken: Waiting) {
        match taken.work {
            Work::Brief => self.waits.run(|| taken.take_turn()),
            // This worker itself takes the next job, so no other worker has to be woken.
            Work::Long => {
                taken.take_turn();
                lock(&self.state).long_running -= 1;
            }
            Work::List => {
                taken.take_turn();
                lock(&self.state).lists_running -= 1;
            }
            Work::Elsewhere => (taken.job)(Err(all_wait_elsewhere())),
        }
    }

    /// Starts an additional thread for each request that has waited for too long while
    /// all workers are busy.
    fn relieve(self: &Arc<Requests>) {
        let mut state = lock(&self.state);
        loop {
            let given_up = state.take_given_up();
            if !given_up.is_empty() {
                drop(state);
                given_up.into_iter().for_each(Waiting::take_turn);
                state = lock(&self.state);
            }
            let since = state.next().map(|at| state.waiting[at].since);
            let left = since.map(|since| CROWDED.saturating_sub(since.elapsed()));
            if state.is_closed && state.under_way == 0 {
                return;
            }
            if left == Some(Duration::ZERO) && state.idle == 0 && state.spare < MOST_SPARE {
                state.spare += 1;
                drop(state);
                let requests = Arc::clone(self);
                let spare = thread::Builder::new().name("spare".to_owned());
                if let Err(error) = spare.spawn(move || requests.work_as_spare()) {
                    log::error!(
                        "cannot start a thread for a request, so the request waits until another \
                         one has ended: {error}"
                    );
                    lock(&self.state).spare -= 1;
                }
                state = lock(&self.state);
            }
            state = match left {
                None => self
                    .crowded
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner),
                Some(left) => {
                    let pause = left.max(Duration::from_millis(1));
                    let waited = self.crowded.wait_timeout(state, pause);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }

    fn work_as_spare(&self) {
        let next = || {
            let mut state = lock(&self.state);
            let next = state.take_next();
            state.spare -= usize::from(next.is_none());
            next
        };
        while let Some(taken) = next() {
            self.run(taken);
        }
    }

    /// Runs requests that wait for something other than our own disks, until there are
    /// no more.
    fn work_elsewhere(&self) {
        let next = || {
            let mut state = lock(&self.state);
            let next = state.elsewhere_waiting.pop_front();
            state.elsewhere_running -= usize::from(next.is_none());
            next
        };
        while let Some(taken) = next() {
            taken.take_turn();
        }
    }

    /// Waits for a job that may begin, or for a job of [`Work::Elsewhere`] that has waited for
    /// too long. Returns `None` when no more jobs will come.
    fn take(&self) -> Option<Waiting> {
        let mut state = lock(&self.state);
        loop {
            if let Some(taken) = state.take_next() {
                return Some(taken);
            }
            let waiting = state.elsewhere_waiting.front();
            let left = waiting.map(|first| PATIENCE.saturating_sub(first.since.elapsed()));
            if left == Some(Duration::ZERO) {
                return state.elsewhere_waiting.pop_front();
            }
            if state.is_closed && state.under_way == 0 {
                return None;
            }
            state.idle += 1;
            state = match left {
                None => self
                    .added
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner),
                Some(left) => {
                    let waited = self.added.wait_timeout(state, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
            state.idle -= 1;
        }
    }
}

impl State {
    /// The index of the first job that may begin.
    fn next(&self) -> Option<usize> {
        let may_begin = |waiting: &Waiting| match waiting.work {
            Work::Brief | Work::Elsewhere => true,
            Work::Long => self.long_running < self.most_long,
            Work::List => self.lists_running < MOST_LISTS,
        };
        self.waiting.iter().position(may_begin)
    }

    fn take_next(&mut self) -> Option<Waiting> {
        let taken = self.waiting.remove(self.next()?)?;
        self.long_running += usize::from(taken.work == Work::Long);
        self.lists_running += usize::from(taken.work == Work::List);
        Some(taken)
    }

    /// Removes and returns the waiting requests whose callers have given them up.
    fn take_given_up(&mut self) -> Vec<Waiting> {
        let (given_up, waiting) = std::mem::take(&mut self.waiting)
            .into_iter()
            .partition::<Vec<_>, _>(|waiting| (waiting.is_given_up)());
        self.waiting = waiting.into();
        given_up
    }
}

impl Waiting {
    /// Runs the request, unless its caller has given it up.
    fn take_turn(self) {
        (self.job)(match (self.is_given_up)() {
            false => Ok(()),
            true => Err(Error::new(
                ErrorKind::Cancelled,
                "the caller does not wait any longer",
            )),
        });
    }
}

fn all_wait_elsewhere() -> Error {
    Error::new(
        ErrorKind::Unavailable,
        format!(
            "{MOST_ELSEWHERE} requests wait for host directories or for layers to be moved, and \
             none of them has ended for {} seconds: check that the disks and servers beneath \
             --allow-lower answer, and try again",
            PATIENCE.as_secs()
        ),
    )
}

pub(super) fn stopping() -> RpcStatus {
    RpcStatus::with_message(
        RpcStatusCode::UNAVAILABLE,
        "the snapshotter is stopping: try again when it is back".to_owned(),
    )
}

impl Running {
    /// A second value for the same request, which ends once both values are dropped.
    pub fn share(&self) -> Running {
        lock(&self.requests.state).under_way += 1;
        Running {
            requests: Arc::clone(&self.requests),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let mut state = lock(&self.requests.state);
        state.under_way -= 1;
        // Only a stop waits for the end of requests, and each wake-up is a system call.
        if state.is_closed {
            self.requests.drained.notify_all();
        }
    }
}

#[cfg(test)]
mod tests;
