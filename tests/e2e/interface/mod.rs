//! The HTTP interface.
//!
//! `book` is the session in *Cloud Native Go*. `rest`, `conditions`, `lists`, `expiry`, `transactions`,
//! `operations`, `watch` and `long_poll` have a part of the interface each, `client` invalid requests, `cors` pages of other
//! origins. `openapi` compares the interface with its description. `response_cache`: reuse of
//! responses. `recipes` are those of the book, in Rust.

mod book;
mod client;
mod conditions;
mod cors;
mod expiry;
mod lists;
mod long_poll;
mod openapi;
mod operations;
mod recipes;
mod response_cache;
mod rest;
mod transactions;
mod watch;
