//! Primitives of synchronization: those of std here, those of a model checker where a module is compiled once more for it.
//!
//! A module that names `super::sync` and not `std::sync` can be model-checked: `tests/model` has one of these names with
//! shuttle's primitives, and compiles the same file below it. What tokio has for tasks (`oneshot`, `Notify`) never blocks a
//! thread, and is the same in both.

pub use std::sync::{Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, atomic};

// It waits on a condition variable with a timeout.
pub use kvs_runtime::Clock;
