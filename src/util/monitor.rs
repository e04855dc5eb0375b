//! A value whose changes threads wait for, and a way to end their waiting.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::lock::lock;

/// A value behind a mutex, with a condition variable and a flag that asks
/// background threads to end. All waiting ends when the flag is set.
#[derive(Default)]
pub struct Monitor<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
}

#[derive(Default)]
struct State<T> {
    value: T,
    is_stopping: bool,
}

impl<T> Monitor<T> {
    /// Reads or changes the value, and wakes every thread that waits.
    pub fn change<R>(&self, change: impl FnOnce(&mut T) -> R) -> R {
        let changed = change(&mut lock(&self.state).value);
        self.changed.notify_all();
        changed
    }

    /// Reads or changes the value without waking any thread.
    pub fn look<R>(&self, look: impl FnOnce(&mut T) -> R) -> R {
        look(&mut lock(&self.state).value)
    }

    /// Ends all waiting, now and later.
    pub fn stop(&self) {
        lock(&self.state).is_stopping = true;
        self.changed.notify_all();
    }

    /// Whether [`Monitor::stop`] was called.
    pub fn is_stopping(&self) -> bool {
        lock(&self.state).is_stopping
    }

    /// Waits while `is_idle` returns `true`, then calls `take` under the same lock.
    /// Returns `None` after [`Monitor::stop`].
    pub fn wait_while<R>(
        &self,
        is_idle: impl Fn(&T) -> bool,
        take: impl FnOnce(&mut T) -> R,
    ) -> Option<R> {
        self.wait_until(None, is_idle, take)
    }

    /// Like [`Monitor::wait_while`], but stops waiting at `deadline` and calls `take` then.
    pub fn wait_until<R>(
        &self,
        deadline: Option<Instant>,
        is_idle: impl Fn(&T) -> bool,
        take: impl FnOnce(&mut T) -> R,
    ) -> Option<R> {
        let mut state = lock(&self.state);
        while !state.is_stopping && is_idle(&state.value) {
            let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
            state = match left {
                Some(Duration::ZERO) => break,
                Some(left) => self.wait_for(state, left),
                None => self
                    .changed
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner),
            };
        }
        (!state.is_stopping).then(|| take(&mut state.value))
    }

    /// Waits for `duration`. Returns `false` after [`Monitor::stop`].
    pub fn pause(&self, duration: Duration) -> bool {
        let deadline = Some(Instant::now() + duration);
        self.wait_until(deadline, |_| true, |_| ()).is_some()
    }

    fn wait_for<'a>(
        &self,
        state: MutexGuard<'a, State<T>>,
        left: Duration,
    ) -> MutexGuard<'a, State<T>> {
        let waited = self.changed.wait_timeout(state, left);
        waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn waiting_ends_with_a_change_a_deadline_or_the_stop() {
        let monitor = Monitor::<u32>::default();
        thread::scope(|scope| {
            let waiting = scope.spawn(|| monitor.wait_while(|value| *value == 0, |value| *value));
            monitor.change(|value| *value = 7);
            assert_eq!(waiting.join().unwrap(), Some(7));
        });
        assert!(monitor.pause(Duration::from_millis(1)));
        thread::scope(|scope| {
            let waiting = scope.spawn(|| monitor.wait_while(|value| *value == 7, |value| *value));
            monitor.stop();
            assert_eq!(waiting.join().unwrap(), None);
        });
        assert!(!monitor.pause(Duration::from_secs(3600)));
    }
}
