//! kvs: an in-memory key-value store with a durable transaction log, whose logic is a WebAssembly component.
//!
//! Read it in the order data flows: [`edge`] accepts requests from the network, [`guest`] calls the component that handles
//! them, `kvs_txlog` makes durable what the component appended, and the edge releases the response. `contract` holds the
//! types of the WIT world; [`commands`] has the command line, a file per command, with `commands/serve.rs` where everything
//! is put together; [`admin`] is the listener for operators. `kvs_client` is the other end. docs/architecture.md has the code map
//! and the invariants.

#![cfg_attr(not(test), warn(clippy::disallowed_methods))]

pub mod admin;
mod audit;
mod changes;
pub mod commands;
mod contract;
mod descriptors;
pub mod edge;
mod entry_json;
mod follow;
pub mod guest;
pub mod lines;
mod memory;
mod parse;
pub mod renamed;
mod settings;
mod signals;
mod stats_report;
mod systemd;
mod terminal;
mod upgrade;
mod watchdog;
mod workers;
