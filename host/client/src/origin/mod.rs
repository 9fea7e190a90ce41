//! Other stores that an import copies from, once: Redis, etcd and Consul.
//!
//! Owns: how they are read, and what of theirs fits. Must never know: how keys are put.

mod consul;
mod etcd;
#[cfg(feature = "redis")]
mod redis;
#[cfg(test)]
mod tests;

use std::fmt;
use std::io::{PipeWriter, Write};
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use indicatif::ProgressBar;
use percent_encoding::percent_decode_str;
use serde_json::json;

use super::import::ImportHooks;
use super::server::{Options, Server, shown};

/// Keys that are read at once, at most.
const PAGE: usize = 100;
/// Maximum time without an answer of the other store.
const READ_TIMEOUT: Duration = Duration::from_secs(60);
/// Keys that do not fit which are reported by name; more are counted.
const MAX_REPORTED: u64 = 20;

/// Another store: `redis://[USER:PASSWORD@]HOST[:PORT][/DATABASE]`, `etcd://[USER:PASSWORD@]HOST[:PORT]` or
/// `consul://[TOKEN@]HOST[:PORT]`; `rediss`, `etcds` and `consuls` over TLS. The login is percent-encoded, as in every URL.
#[derive(Clone)]
pub struct Origin {
    kind: Kind,
    is_tls: bool,
    login: Option<Login>,
    address: String,
    /// Number of the database; Redis only.
    database: Option<u32>,
}

/// User and password. Consul's token is the user.
#[derive(Clone)]
struct Login {
    user: String,
    password: Option<String>,
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Redis,
    Etcd,
    Consul,
}

impl FromStr for Origin {
    type Err = &'static str;

    fn from_str(url: &str) -> Result<Self, Self::Err> {
        let (scheme, rest) =
            url.split_once("://").ok_or("a URL is meant: redis://HOST, etcd://HOST or consul://HOST")?;
        let (kind, port) = match scheme {
            "redis" | "rediss" => (Kind::Redis, 6379),
            "etcd" | "etcds" => (Kind::Etcd, 2379),
            "consul" => (Kind::Consul, 8500),
            "consuls" => (Kind::Consul, 8501),
            _ => return Err("the scheme is none of redis, rediss, etcd, etcds, consul and consuls"),
        };
        if kind == Kind::Redis && cfg!(not(feature = "redis")) {
            return Err("this binary is built without Redis; use the full flavour");
        }
        let (login, rest) = rest.rsplit_once('@').map_or((None, rest), |(login, rest)| (Some(login), rest));
        let login = login.map(Login::parse).transpose()?;
        if kind == Kind::Etcd && login.as_ref().is_some_and(|login| login.password.is_none()) {
            return Err("the login of etcd is USER:PASSWORD");
        }
        if kind == Kind::Consul && login.as_ref().is_some_and(|login| login.password.is_some()) {
            return Err("the login of Consul is TOKEN");
        }
        let (host, database) = rest.split_once('/').unwrap_or((rest, ""));
        if host.is_empty() || host.starts_with(':') {
            return Err("the host is missing");
        }
        let database = match database {
            "" => None,
            number if kind == Kind::Redis => {
                Some(number.parse().map_err(|_| "the database is a number: redis://HOST/0")?)
            }
            _ => return Err("a path has no meaning: all keys are copied"),
        };
        // The colons of an IPv6 address are in brackets.
        let has_port = host.rsplit_once(']').map_or(host, |(_, port)| port).contains(':');
        let address = if has_port { host.to_owned() } else { format!("{host}:{port}") };
        Ok(Self { kind, is_tls: scheme.ends_with('s') && scheme != "redis", login, address, database })
    }
}

impl Login {
    fn parse(encoded: &str) -> Result<Self, &'static str> {
        let decode = |part| {
            let decoded = percent_decode_str(part).decode_utf8();
            decoded.map(String::from).map_err(|_| "the login is not UTF-8")
        };
        let (user, password) = encoded.split_once(':').map_or((encoded, None), |(user, rest)| (user, Some(rest)));
        Ok(Self { user: decode(user)?, password: password.map(decode).transpose()? })
    }
}

/// Without the login.
impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.kind {
            Kind::Redis => "redis",
            Kind::Etcd => "etcd",
            Kind::Consul => "consul",
        };
        write!(f, "{name}{}://{}", if self.is_tls { "s" } else { "" }, self.address)?;
        self.database.map_or(Ok(()), |database| write!(f, "/{database}"))
    }
}

/// Without the login, too.
impl fmt::Debug for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Origin {
    /// Reads all keys and values.
    pub(crate) fn copy(&self, authorities: Option<&Path>, lines: &mut Lines) -> Result<()> {
        let copied = match self.kind {
            #[cfg(feature = "redis")]
            Kind::Redis => redis::copy(self, authorities, lines),
            #[cfg(not(feature = "redis"))]
            Kind::Redis => unreachable!("rejected when the URL was parsed"),
            Kind::Etcd => {
                self.server(authorities, None).and_then(|server| etcd::copy(&server, self.login.as_ref(), lines))
            }
            Kind::Consul => {
                let token = self.login.as_ref().map(|login| login.user.as_str());
                self.server(authorities, token).and_then(|server| consul::copy(&server, lines))
            }
        };
        copied.with_context(|| format!("cannot copy from {self}"))
    }

    /// The HTTP interface of the other store.
    fn server(&self, authorities: Option<&Path>, token: Option<&str>) -> Result<Server> {
        let scheme = if self.is_tls { "https" } else { "http" };
        Server::new(&Options {
            url: &format!("{scheme}://{}", self.address),
            flag: "--from",
            token,
            authorities,
            read_timeout: Some(READ_TIMEOUT),
            stale: false,
        })
    }
}

/// What was read, as lines for an import.
pub(crate) struct Lines {
    out: PipeWriter,
    hooks: ImportHooks,
    bar: ProgressBar,
    left_out: Arc<LeftOut>,
}

impl Lines {
    pub fn new(out: PipeWriter, hooks: ImportHooks, left_out: Arc<LeftOut>) -> Self {
        Self { out, hooks, bar: ProgressBar::hidden(), left_out }
    }

    /// Shows the progress of this many keys.
    fn expect(&mut self, keys: u64) {
        self.bar = (self.hooks.bar)(keys, "keys read");
    }

    fn put(&mut self, key: &[u8], value: &[u8], expires_in: Option<Duration>) -> Result<()> {
        self.bar.inc(1);
        let Ok(name) = str::from_utf8(key) else {
            self.report_unfit(key, "the key is not UTF-8");
            return Ok(());
        };
        if let Err(reason) = (self.hooks.check_key)(name) {
            self.report_unfit(key, &format!("no server accepts the key: {reason}"));
            return Ok(());
        }
        let mut line = match str::from_utf8(value) {
            Ok(text) => json!({ "key": name, "value": text }),
            Err(_) => json!({ "key": name, "value_base64": STANDARD.encode(value) }),
        };
        if let Some(left) = expires_in {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            line["expires"] = json!(now.saturating_add(left).as_millis() as u64);
        }
        // The import ended early, for a reason of its own, when this fails.
        self.out.write_all(format!("{line}\n").as_bytes()).context("the import ended")
    }

    /// Leaves out a key, by name.
    fn leave_out(&mut self, key: &[u8], reason: &str) {
        self.bar.inc(1);
        self.report_unfit(key, reason);
    }

    fn report_unfit(&self, key: &[u8], reason: &str) {
        self.bar.suspend(|| self.left_out.add(&String::from_utf8_lossy(key), reason));
    }

    pub fn finish(self) {
        self.bar.finish_and_clear();
    }
}

/// Keys that do not fit, which a copy leaves out.
pub(crate) struct LeftOut {
    report: fn(&str),
    count: AtomicU64,
}

impl LeftOut {
    pub fn new(hooks: ImportHooks) -> Self {
        Self { report: hooks.report, count: AtomicU64::new(0) }
    }

    pub fn add(&self, key: &str, reason: &str) {
        if self.count.fetch_add(1, Ordering::Relaxed) < MAX_REPORTED {
            (self.report)(&format!("left out {:?}: {reason}", shown(key)));
        }
    }

    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }
}
