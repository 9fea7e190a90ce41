//! The guest: the component that holds the store and gives HTTP its meaning.
//!
//! Owns: compiling and checking guests, calling them within their limits, and giving them back their state.
//! Must never know: sockets, TLS, how the log keeps its promise.
//!
//! Read `engine` first (what may run), then `instance` (one call), then `shard` (many calls, one at a time).

mod clock;
mod engine;
mod instance;
mod memory;
mod sandbox;
mod shard;

pub use engine::{Engine, Guest, Limits};
pub use instance::{Answer, Client, Incoming};
pub use shard::{CallError, Replayed, Shard};
