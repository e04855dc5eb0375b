//! The threads that may wait for a disk, and the door that closes at a stop.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use grpcio::{RpcStatus, RpcStatusCode};

use crate::error::{Error, ErrorKind, Result};
use crate::lock::lock;

type Job = Box<dyn FnOnce() + Send>;

/// A fixed number of threads that take requests in the order of their arrival.
pub struct Pool {
    door: Arc<Door>,
    jobs: Mutex<Option<Sender<Job>>>,
    workers: Mutex<Vec<JoinHandle<()>>>,
}

/// Counts what is under way, and admits nothing more once closed.
struct Door {
    state: Mutex<DoorState>,
    changed: Condvar,
}

struct DoorState {
    is_open: bool,
    running: usize,
}

/// A request under way, waiting or running; over when dropped.
pub struct Running {
    door: Arc<Door>,
}

impl Pool {
    /// Starts `threads` workers.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Internal`] if the system gives no thread.
    pub fn start(threads: usize) -> Result<Pool> {
        let (sender, receiver) = channel::<Job>();
        let receiver = Arc::new(Mutex::new(receiver));
        let mut workers = Vec::with_capacity(threads);
        for number in 0..threads {
            let receiver = Arc::clone(&receiver);
            let worker = thread::Builder::new()
                .name(format!("worker-{number}"))
                .spawn(move || work(&receiver))
                .map_err(|error| {
                    Error::caused(ErrorKind::Internal, "start a worker thread", error)
                })?;
            workers.push(worker);
        }
        Ok(Pool {
            door: Arc::new(Door {
                state: Mutex::new(DoorState {
                    is_open: true,
                    running: 0,
                }),
                changed: Condvar::new(),
            }),
            jobs: Mutex::new(Some(sender)),
            workers: Mutex::new(workers),
        })
    }

    /// Lets a request in that runs where it is; it is under way until the
    /// value is dropped.
    ///
    /// # Errors
    ///
    /// Unavailable, once [`Pool::close`] was called.
    pub fn admit(&self) -> std::result::Result<Running, RpcStatus> {
        let mut state = self.door.lock();
        if !state.is_open {
            return Err(stopping());
        }
        state.running += 1;
        Ok(Running {
            door: Arc::clone(&self.door),
        })
    }

    /// Hands a request to the workers.
    ///
    /// # Errors
    ///
    /// Unavailable, once [`Pool::close`] was called.
    pub fn submit(
        &self,
        job: impl FnOnce() + Send + 'static,
    ) -> std::result::Result<(), RpcStatus> {
        let running = self.admit()?;
        let jobs = lock(&self.jobs);
        let sender = jobs.as_ref().ok_or_else(stopping)?;
        let job = Box::new(move || {
            job();
            drop(running);
        });
        sender.send(job).map_err(|_| stopping())
    }

    /// Admits nothing from now on, and waits until what is under way has ended.
    /// `false` if that took longer than `limit`.
    pub fn close(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        let mut state = self.door.lock();
        state.is_open = false;
        while state.running > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            state = self
                .door
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        drop(state);
        lock(&self.jobs).take();
        for worker in lock(&self.workers).drain(..) {
            // A worker catches its requests' panics; it ends with the channel.
            let _ = worker.join();
        }
        true
    }
}

fn work(jobs: &Mutex<Receiver<Job>>) {
    loop {
        // The guard must be gone before the job runs.
        let job = lock(jobs).recv();
        match job {
            Ok(job) => job(),
            Err(_) => return,
        }
    }
}

fn stopping() -> RpcStatus {
    RpcStatus::with_message(
        RpcStatusCode::UNAVAILABLE,
        "the snapshotter is stopping: try again when it is back".to_owned(),
    )
}

impl Door {
    fn lock(&self) -> MutexGuard<'_, DoorState> {
        lock(&self.state)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.door.lock().running -= 1;
        self.door.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn a_stop_waits_for_what_is_under_way_and_admits_no_more() {
        let pool = Pool::start(3).unwrap();
        let done = Arc::new(AtomicUsize::new(0));
        for _ in 0..20 {
            let done = Arc::clone(&done);
            pool.submit(move || {
                thread::sleep(Duration::from_millis(5));
                done.fetch_add(1, Ordering::SeqCst);
            })
            .unwrap();
        }
        assert!(pool.close(Duration::from_secs(60)));
        assert_eq!(done.load(Ordering::SeqCst), 20);
        let refused = pool.submit(|| ()).unwrap_err();
        assert_eq!(refused.code(), RpcStatusCode::UNAVAILABLE);
        assert!(pool.admit().is_err());
    }

    #[test]
    fn a_stop_does_not_wait_for_ever() {
        let pool = Pool::start(1).unwrap();
        let (release, wait) = channel::<()>();
        pool.submit(move || {
            let _ = wait.recv();
        })
        .unwrap();
        assert!(!pool.close(Duration::from_millis(20)));
        drop(release);
        assert!(pool.close(Duration::from_secs(60)));
    }
}
