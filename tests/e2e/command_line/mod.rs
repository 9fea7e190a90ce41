//! The command line: `commands` tests those for clients, `operator` errors and environment variables, `output` the output
//! for programs, `other_stores` imports from Redis, etcd and Consul. `pages` runs the sessions of README.md and the book.

mod commands;
mod operator;
mod other_stores;
mod output;
mod pages;
