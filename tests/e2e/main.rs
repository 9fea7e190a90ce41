//! The end-to-end tests: the real binary, real sockets, real files.
//!
//! | Folder | Subject |
//! | --- | --- |
//! | `interface` | the HTTP interface |
//! | `persistence` | durability and linearizability |
//! | `hosting` | guests |
//! | `operating` | operation of a server |
//! | `network` | connections, protocols, tokens, limits |
//! | `logs` | logs in databases, and servers that share a log |
//! | `command_line` | the command line |
//! | `support` | shared by suites: servers, clients, certificates, databases, the checker of histories |
//! | `probes` | guests in other languages, which `hosting::languages` builds |
//!
//! A suite imports from `support`, never from another suite. Start with `support::server`, which runs the binary, and
//! `interface::book`.

mod command_line;
mod hosting;
mod interface;
mod logs;
mod network;
mod operating;
mod persistence;
mod support;
