//! The HTTP interface, as clients use it.
//!
//! `book` is the session that every reader of *Cloud Native Go* knows. `rest`, `conditions`, `lists`, `expiry`, `transactions`,
//! `operations`, `watch` and `long_poll` have a part of the interface each, `client` invalid requests, `cors` pages of other
//! origins. `openapi` compares the interface with its description. `response_cache`: what is reused is right.

mod book;
mod client;
mod conditions;
mod cors;
mod expiry;
mod lists;
mod long_poll;
mod openapi;
mod operations;
mod response_cache;
mod rest;
mod transactions;
mod watch;
