//! The command line: `commands` are those for clients, `operator` has errors and variables of the environment, `output` what is
//! printed for programs, `other_stores` imports from Redis, etcd and Consul. `pages` runs the sessions of README.md and the book.

mod commands;
mod operator;
mod other_stores;
mod output;
mod pages;
