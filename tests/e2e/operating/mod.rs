//! A server, as its operator sees it.
//!
//! `admin` has the admin listener, `metrics` and, in a browser, `console` what is shown there, `alerts` what Prometheus makes of it.
//! `access_log` and `audit` are about who did what. `diagnostics`: nothing depends on whether log lines are read. `signals` stop a
//! server, `upgrade` replaces its process without anybody noticing; `supervision`: no task dies unnoticed.

mod access_log;
mod admin;
mod alerts;
mod audit;
mod console;
mod diagnostics;
mod metrics;
mod signals;
mod supervision;
mod upgrade;
