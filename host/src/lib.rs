//! A key-value store whose logic is a WebAssembly component.
//!
//! Read it in the order data flows: [`edge`] takes requests from the network, [`guest`] calls the component that answers
//! them, [`log`] makes durable what the component appended, and the edge lets the response go. [`contract`] is what they
//! speak of; [`serve`] puts them together, and [`admin`] tells how they are, by the numbers in `metrics` too. [`client`] is
//! at the other end. ARCHITECTURE.md has the map and the invariants.

pub mod admin;
mod changes;
pub mod cli;
pub mod client;
pub mod contract;
pub mod edge;
mod follow;
pub mod guest;
pub mod lines;
pub mod log;
mod metrics;
pub mod serve;
mod terminal;
