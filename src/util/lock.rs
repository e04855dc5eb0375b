//! Locking a mutex whatever became of its last holder.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks, also after a panic of a thread that held the lock: a panic in one
/// request must not end all later ones. What is behind our locks is sound even
/// then: SQLite rolls back what was begun, the rest are flags and counters.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
