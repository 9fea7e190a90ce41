//! Operation of a server.
//!
//! `admin` tests the admin listener, `metrics` and `console` its content, `alerts` the rules for Prometheus, `deployed` the settings in
//! the files of `deploy/`. `access_log` and `audit`
//! test log lines of requests and changes, `diagnostics` a blocked standard error. `signals` stop a server, `upgrade` replaces its
//! process without a failed request; `supervision`: failed tasks are restarted or end the server.

mod access_log;
mod admin;
mod alerts;
mod audit;
mod console;
mod deployed;
mod diagnostics;
mod metrics;
mod signals;
mod supervision;
mod upgrade;
