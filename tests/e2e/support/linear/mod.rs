//! Records the operations of clients and checks whether a history of them is linearizable.
//!
//! `clients` record a `history` of operations that they draw from a `plan`; `checker` has the verdict, by a `search` of the
//! `compiled` history.

pub mod checker;
pub mod clients;
mod compiled;
pub mod history;
pub mod plan;
pub mod search;
