//! Background threads that end together with the value that owns them.

use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind, Result};
use crate::sys;

/// The shortest time that [`Background::end_all`] waits for threads.
const MOMENT: Duration = Duration::from_millis(500);
/// The time between two checks of [`Background::end_all`].
const BETWEEN_LOOKS: Duration = Duration::from_millis(2);

/// A running thread. Dropping this value stops the thread and waits for its
/// end.
pub struct Background {
    name: &'static str,
    stop: Box<dyn Fn() + Send>,
    thread: Option<JoinHandle<()>>,
}

impl Background {
    /// Starts a thread of that name, which runs `work` on `part` until `stop` is called.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Internal`] if the system cannot start a thread.
    pub fn start<T: Send + Sync + 'static>(
        name: &'static str,
        part: &Arc<T>,
        stop: impl Fn(&T) + Send + 'static,
        work: impl FnOnce(&T) + Send + 'static,
    ) -> Result<Background> {
        let (stopped, working) = (Arc::clone(part), Arc::clone(part));
        let thread = thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || work(&working))
            .map_err(|error| {
                Error::caused(
                    ErrorKind::Internal,
                    format!("start the thread {name:?}"),
                    error,
                )
            })?;
        Ok(Background {
            name,
            stop: Box::new(move || stop(&stopped)),
            thread: Some(thread),
        })
    }
}

impl Background {
    /// Stops all of these threads, and waits for their end until `deadline`, but at least
    /// for a moment. Returns `false` if a thread is still running then, for example because
    /// its disk does not answer.
    pub fn end_all(threads: Vec<Background>, deadline: Instant) -> bool {
        threads.iter().for_each(|thread| (thread.stop)());
        let deadline = deadline.max(Instant::now() + MOMENT);
        let mut have_ended = true;
        for mut background in threads {
            while background.is_running() && Instant::now() < deadline {
                thread::sleep(BETWEEN_LOOKS);
            }
            if background.is_running() {
                log::warn!(
                    "the thread {:?} has not ended in time, perhaps because its disk does not \
                     answer; the daemon stops without waiting for it",
                    background.name
                );
                background.thread = None;
                have_ended = false;
            }
        }
        have_ended
    }

    fn is_running(&self) -> bool {
        let thread = self.thread.as_ref();
        thread.is_some_and(|thread| !thread.is_finished())
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        (self.stop)();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!(
                "the thread {:?} has ended because of a bug; an earlier log line shows where",
                self.name
            );
        }
    }
}

/// Gives the calling thread the idle I/O priority, so that its reads and writes wait for
/// those of containers. `who` names the thread in the log if that is impossible.
pub fn lower_io_priority(who: &str) {
    if let Err(errno) = sys::lower_io_priority() {
        log::debug!(
            "cannot lower the I/O priority of {who}, which may slow down containers: {errno}"
        );
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;
    use crate::util::monitor::Monitor;

    #[test]
    fn an_end_does_not_wait_for_a_thread_that_hangs() {
        let start = |work: fn(&Monitor<()>)| {
            let part = Arc::new(Monitor::<()>::default());
            Background::start("test", &part, Monitor::stop, work).unwrap()
        };
        let idle: fn(&Monitor<()>) = |stop| assert!(!stop.pause(Duration::from_secs(3600)));
        let now = Instant::now();
        assert!(Background::end_all(vec![start(idle), start(idle)], now));
        let (release, wait) = channel::<()>();
        let part = Arc::new(());
        let hangs = move |_: &()| assert!(wait.recv().is_err());
        let hanging = Background::start("test", &part, |_| (), hangs).unwrap();
        assert!(!Background::end_all(vec![start(idle), hanging], now));
        drop(release);
    }
}
