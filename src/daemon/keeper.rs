//! Copies of the database, made now and then beside the requests.
//!
//! Nothing is done by the clock alone: without changes the disks may sleep.

use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind, Result};
use crate::snapshotter::Snapshotter;

/// How long after a change the copy is made: most changes come in bursts, and a
/// disk that was woken for one is still awake.
const SETTLING: Duration = Duration::from_secs(60);
/// How often a copy is made at most.
const INTERVAL: Duration = Duration::from_secs(3600);

/// The thread that does it; ends when dropped.
pub struct Keeper {
    snapshotter: Arc<Snapshotter>,
    thread: Option<JoinHandle<()>>,
}

impl Keeper {
    /// Starts it.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Internal`] if the system gives no thread.
    pub fn start(snapshotter: &Arc<Snapshotter>) -> Result<Keeper> {
        let kept = Arc::clone(snapshotter);
        let thread = thread::Builder::new()
            .name("keeper".to_owned())
            .spawn(move || keep(&kept))
            .map_err(|error| Error::caused(ErrorKind::Internal, "start the keeper", error))?;
        Ok(Keeper {
            snapshotter: Arc::clone(snapshotter),
            thread: Some(thread),
        })
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.snapshotter.store().end_waiting();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the keeper has ended by a bug; the log says where");
        }
    }
}

fn keep(snapshotter: &Snapshotter) {
    let mut not_before = Instant::now();
    while snapshotter.store().await_change(not_before, SETTLING) {
        if let Err(error) = snapshotter.store().copy() {
            log::warn!("{}", error.chain());
        }
        not_before = Instant::now() + INTERVAL;
    }
}
