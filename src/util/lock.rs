//! Locking a mutex, even if its last holder panicked.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks a mutex, even if a thread has panicked while it held the lock: a panic in one
/// request must not make all later requests fail. The values behind this program's locks
/// are valid after a panic: SQLite rolls back an unfinished transaction, and the other
/// values are flags and counters.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
