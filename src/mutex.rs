//! Locks that outlive a panic.

use std::sync::Mutex;

/// The lock's content, even after a panic: every write leaves it whole.
pub fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
