//! Locks that survive a panic.

use std::sync::Mutex;

/// Locks even a poisoned mutex: every write here leaves the content consistent.
pub fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
