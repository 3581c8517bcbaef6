//! How the program takes its locks.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Takes a lock whether or not somebody panicked with it: what stands behind the locks here is whole between any two steps, and a
/// panic is answered where it happened. (The prefix cache of a model is not, and is thrown away then.)
pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
