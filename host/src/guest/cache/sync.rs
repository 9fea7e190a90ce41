//! Primitives of synchronization: those of std and arc-swap here, those of a model checker where `versions.rs` is compiled
//! once more for it (`tests/model.rs`).

pub use std::sync::{Arc, atomic};

pub use arc_swap::{ArcSwap, Guard};
