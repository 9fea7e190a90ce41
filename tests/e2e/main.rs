//! The end-to-end tests: the real binary, real sockets, real files.
//!
//! Start with `server`, which runs the binary, and `book`, the session every reader of *Cloud Native Go* knows; `pages` runs
//! those of README.md and the book in docs/. `rest`,
//! `conditions`, `expiry`, `lists`, `transactions`, `watch`, `long_poll`, `cors`, `openapi`, `client` and `operator` say what
//! each kind of user gets, `tls` and its `certificates` whom a server trusts; `components`, `compiled`, `unruly` and `hostile` what a
//! bad guest can do, `attacks` what bad clients can, `swap`, `guests` and `locks` what good guests can, `shadow` what is found of them before they serve; `shards` that several are one store; `durability`, and under the
//! clients of `load` `crash`, `faults`, `full_disk` and `backup`, that nothing is lost; `linear` that all clients see one store,
//! whatever happens to it, and `everything` all of that at once; `online_backup` that a backup of a running server holds what was acknowledged, `past` that a log can be served as it was, `stats` what is counted in it; `metrics`, `access_log` and, in a `browser`, `console` what an operator sees of it, `alerts` what Prometheus tells the operator, and
//! `diagnostics` that nothing depends on whether anybody looks; `audit` who changed a server, `traps` what is reported of a guest that fails; `supervision` that nothing dies unnoticed, in servers of `sabotage`;
//! `upgrade` that nobody notices another process; `response_cache` that what is reused is right; `listeners` where a server can be reached, and `behind_a_proxy` by whom; `commands` what the client in the binary
//! does, `other_stores` what it copies from Redis, etcd and Consul; `log_command` what can be done with a log at rest, and `bad_log` what is done with one that is not right; `postgres` all that concerns a log in a
//! database, and `nats` one in NATS JetStream.

mod access;
mod access_log;
mod admin;
mod alerts;
mod attacks;
mod audit;
mod backup;
mod bad_log;
mod behind_a_proxy;
mod book;
mod client;
mod commands;
mod compiled;
mod components;
mod conditions;
mod console;
mod cors;
mod crash;
mod diagnostics;
mod durability;
mod everything;
mod expiry;
mod faults;
mod floods;
mod full_disk;
mod guests;
mod hostile;
mod http2;
mod key_prefix;
mod languages;
mod limits;
mod linear;
mod listeners;
mod lists;
mod locks;
mod log_command;
mod long_poll;
mod metrics;
mod nats;
mod online_backup;
mod openapi;
mod operations;
mod operator;
mod other_stores;
mod output;
mod pages;
mod pair;
mod past;
mod postgres;
mod raw;
mod response_cache;
mod rest;
mod shadow;
mod shards;
mod signals;
mod spare;
mod standby;
mod stats;
mod supervision;
mod support;
mod swap;
mod tls;
mod transactions;
mod traps;
mod unruly;
mod upgrade;
mod watch;
