//! Primitives of synchronization: those of std and arc-swap. A model checker replaces them where it compiles a module once more:
//! `cache/tests/model.rs`, `shard/tests.rs`.

pub use std::sync::{Arc, Mutex, MutexGuard, PoisonError, atomic};

pub use arc_swap::{ArcSwap, Guard};
