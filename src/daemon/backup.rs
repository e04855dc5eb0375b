//! Copies the database in the background, some time after it has changed.
//!
//! Without changes, nothing is copied, so that the disks can sleep.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::error::Result;
use crate::snapshotter::Snapshotter;
use crate::util::threads::Background;

/// How long after a change the copy is made. Most changes come in bursts, so one copy is enough
/// for many of them, and the disk that they have woken is still awake.
const SETTLING: Duration = Duration::from_secs(60);
/// The shortest time between two copies.
const INTERVAL: Duration = Duration::from_secs(3600);

/// Starts the thread that makes the copies.
pub fn start(snapshotter: &Arc<Snapshotter>) -> Result<Background> {
    let stop = |snapshotter: &Snapshotter| snapshotter.store().end_waiting();
    Background::start("keeper", snapshotter, stop, keep)
}

fn keep(snapshotter: &Snapshotter) {
    let mut not_before = Instant::now();
    while snapshotter.store().await_change(not_before, SETTLING) {
        if let Err(error) = snapshotter.store().copy() {
            log::warn!("cannot {}; the earlier copy stays", error.chain());
        }
        not_before = Instant::now() + INTERVAL;
    }
}
