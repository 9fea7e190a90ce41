//! Shared parts of the logs that another service stores: the write queue, the circuit breaker and the read lease.
//!
//! Must never know: which service it is.

pub mod breaker;
pub mod lease;
pub mod queue;
