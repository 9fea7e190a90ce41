//! Authentication and authorization: bearer tokens, each with a scope.
//!
//! Owns: who a client is, and what it may do. `file` has the tokens at rest.
//! Must never know: the meaning of a path. Scopes depend on the method, and path prefixes on the bytes of the path as sent.

mod file;

use std::collections::HashMap;
use std::fs;
use std::future::pending;
use std::hint::black_box;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::ValueEnum;
use hyper::header::{self, HeaderMap, HeaderValue};
use hyper::http::request::Parts;
use hyper::{Method, StatusCode, Uri};
use kvs_runtime::Clock;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use tokio::time::timeout;

pub use self::file::{Limits, check_key_prefix, create, list, revoke};
use super::fresh::Fresh;
use super::head;
use super::rejection::Rejection;
use crate::audit::{self, Actor};
use crate::contract;
use crate::guest::Quota;

/// Prefix of tokens, so that scanners recognise leaked ones.
pub const TOKEN_PREFIX: &str = "kvs_";

/// Scope of a token. Each includes those before it, but `metrics`, which only `admin` includes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Scope {
    /// Only /metrics of the admin listener
    Metrics,
    /// GET, HEAD, OPTIONS and QUERY
    Read,
    /// Every method
    Write,
    /// Also the admin listener
    Admin,
}

impl From<Scope> for contract::Scope {
    fn from(scope: Scope) -> Self {
        match scope {
            // A token for metrics is rejected before.
            Scope::Metrics | Scope::Read => Self::Read,
            Scope::Write => Self::Write,
            Scope::Admin => Self::Admin,
        }
    }
}

/// Interval at which the expiry of a token is checked during a request, since the clock can be set.
const RECHECK_INTERVAL: Duration = Duration::from_secs(60);

/// Maximum number of tokens of each kind in the log line of a reload.
const MAX_SHOWN: usize = 20;

#[derive(PartialEq, Eq)]
struct Token {
    name: Arc<str>,
    scope: Scope,
    prefix: Option<Prefix>,
    /// Of the keys with its prefix.
    quota: Option<Quota>,
    /// In milliseconds since 1970.
    expires: Option<u64>,
}

/// Part of the store that a token is restricted to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Prefix {
    /// Paths, as sent, that begin with it.
    Path(String),
    /// Keys that begin with it. The guest enforces it, and the host on what is appended and watched.
    Key(Arc<str>),
}

/// Principal, access and token of a request.
pub struct Grant {
    pub name: Arc<str>,
    pub scope: Scope,
    pub key_prefix: Option<Arc<str>>,
    pub quota: Option<Quota>,
    hash: Hash,
}

/// The reloadable table of tokens.
pub type Tokens = Fresh<TokenTable>;

/// Table of tokens, by the first bytes of their hashes.
///
/// Hashes are compared in constant time, even if there is none to compare with. The time to look up the first bytes reveals
/// nothing about a token.
pub struct TokenTable {
    tokens: HashMap<First, Vec<(Hash, Token)>>,
    clock: Clock,
}

type Hash = [u8; 32];
type First = [u8; 8];

/// Dummy hash for a comparison in constant time.
const NOBODY: Hash = [0; 32];

/// Loads the token file, and reloads it when it changes.
pub fn load(file: &Path, clock: Clock) -> Result<Arc<Tokens>> {
    let file = file.to_owned();
    Fresh::new("the token file", vec![file.clone()], clock.clone(), move |current: Option<&TokenTable>| {
        let text = fs::read_to_string(&file).with_context(|| format!("cannot read --tokens {}", file.display()))?;
        let table = TokenTable::parse(&text, &clock).with_context(|| format!("--tokens {}", file.display()))?;
        if let Some(differences) = current.and_then(|current| table.differences(current)) {
            audit::log(&Actor::cause("file"), "token-reload", differences, "success");
        }
        Ok(table)
    })
}

impl TokenTable {
    fn parse(text: &str, clock: &Clock) -> Result<Self> {
        let mut tokens: HashMap<First, Vec<(Hash, Token)>> = HashMap::new();
        for (hash, token) in file::parse(text)? {
            tokens.entry(first(&hash)).or_default().push((hash, token));
        }
        Ok(Self { tokens, clock: clock.clone() })
    }

    /// Returns the names and ids of the tokens that another table has, has not, or has with other permissions. None if there are
    /// none.
    fn differences(&self, former: &Self) -> Option<String> {
        let new = self.all().filter(|(hash, _)| former.known(hash).is_none());
        let gone = former.all().filter(|(hash, _)| self.known(hash).is_none());
        let changed = self.all().filter(|(hash, token)| former.known(hash).is_some_and(|former| former != *token));
        let mut lists = Vec::new();
        for (what, tokens) in [("new", shown(new)), ("revoked", shown(gone)), ("changed", shown(changed))] {
            if let Some(tokens) = tokens {
                lists.push(format!("{what}: {tokens}"));
            }
        }
        (!lists.is_empty()).then(|| lists.join("; "))
    }

    fn all(&self) -> impl Iterator<Item = (&Hash, &Token)> {
        self.tokens.values().flatten().map(|(hash, token)| (hash, token))
    }

    /// Authenticates and authorizes a request.
    ///
    /// The path prefix of a token is enforced here and not passed to the guest: which keys a path names depends on the guest,
    /// so no key prefix follows from it.
    pub fn check(&self, head: &Parts) -> Result<Grant, Rejection> {
        let (hash, token) = self.find(&head.headers)?;
        token.allow(hash, &head.method, head.uri.path())
    }

    /// Checks that an earlier grant is still valid.
    fn check_again(&self, grant: &Grant, method: &Method, path: &str) -> Result<(), Rejection> {
        let token = self.known(&grant.hash).ok_or_else(unknown)?;
        self.check_expiry(token)?;
        let now = token.allow(grant.hash, method, path)?;
        // The response of the guest was for this name, scope and key prefix.
        let holds = now.name == grant.name && now.scope >= grant.scope && now.has_keys_of(grant);
        if holds { Ok(()) } else { Err(forbidden("the permissions of the token were reduced during the request")) }
    }

    /// Authenticates and authorizes a request to the admin listener. Returns the name of the token too, also of one that is
    /// rejected for its scope.
    pub fn check_admin(&self, headers: &HeaderMap, needed: Scope) -> (Option<String>, Result<(), Rejection>) {
        let token = match self.find(headers) {
            Ok((_, token)) => token,
            Err(rejection) => return (None, Err(rejection)),
        };
        let is_allowed = token.prefix.is_none() && (token.scope == Scope::Admin || token.scope == needed);
        let checked =
            is_allowed.then_some(()).ok_or_else(|| forbidden("the token is not valid for the admin listener"));
        (Some(token.name.to_string()), checked)
    }

    fn known(&self, hash: &Hash) -> Option<&Token> {
        match self.tokens.get(&first(hash)) {
            Some(same_prefix) => same_prefix.iter().find(|(other, _)| other.ct_eq(hash).into()).map(|(_, token)| token),
            None => {
                black_box(NOBODY.ct_eq(hash));
                None
            }
        }
    }

    fn find(&self, headers: &HeaderMap) -> Result<(Hash, &Token), Rejection> {
        let mut given = headers.get_all(header::AUTHORIZATION).iter();
        let token = match (given.next(), given.next()) {
            (None, _) => return Err(unauthorized("a bearer token is required: Authorization: Bearer TOKEN", "")),
            (Some(only), None) => bearer(only.as_bytes()),
            _ => None,
        };
        let hash = token.map(hash).ok_or_else(unknown)?;
        let token = self.known(&hash).ok_or_else(unknown)?;
        self.check_expiry(token)?;
        Ok((hash, token))
    }

    fn check_expiry(&self, token: &Token) -> Result<(), Rejection> {
        match self.remaining(token.expires) {
            Some(Duration::ZERO) => Err(unauthorized("the token has expired", ", error=\"invalid_token\"")),
            _ => Ok(()),
        }
    }

    /// Time until an expiry. None without one.
    fn remaining(&self, expires: Option<u64>) -> Option<Duration> {
        expires.map(|expires| Duration::from_millis(expires.saturating_sub(self.clock.unix_ms())))
    }
}

impl Token {
    fn allow(&self, hash: Hash, method: &Method, path: &str) -> Result<Grant, Rejection> {
        let needed = if head::is_safe(method) { Scope::Read } else { Scope::Write };
        if self.scope < needed {
            let is_of_metrics = self.scope == Scope::Metrics;
            return Err(forbidden(if is_of_metrics { "the token is for metrics" } else { "the token is read-only" }));
        }
        let (scope, key_prefix) = match &self.prefix {
            None => (self.scope, None),
            Some(Prefix::Path(prefix)) if !within(prefix, path) => {
                return Err(forbidden("the token is not valid for this path"));
            }
            // A token with a prefix is never valid for the admin listener.
            Some(Prefix::Path(_)) => (self.scope.min(Scope::Write), None),
            Some(Prefix::Key(prefix)) => (self.scope.min(Scope::Write), Some(Arc::clone(prefix))),
        };
        Ok(Grant { name: Arc::clone(&self.name), scope, key_prefix, quota: self.quota, hash })
    }
}

impl Grant {
    /// Returns whether this grant has all keys that another one has.
    fn has_keys_of(&self, other: &Self) -> bool {
        self.key_prefix.as_deref().is_none_or(|prefix| {
            let other = other.key_prefix.as_deref();
            other.is_some_and(|other| other.starts_with(prefix))
        })
    }
}

/// Authorization of a request that takes time to arrive, that waits, or whose response is a stream.
pub struct Standing {
    pub tokens: Arc<Tokens>,
    pub grant: Grant,
    pub method: Method,
    pub uri: Uri,
}

impl Standing {
    /// Checks the authorization again, by what the tokens are now.
    pub fn check(&self) -> Result<(), Rejection> {
        self.tokens.get().check_again(&self.grant, &self.method, self.uri.path())
    }

    /// Waits until the authorization is revoked, and returns the response for it.
    pub async fn revoked(&self) -> Rejection {
        // Before the first check, so that no reload is missed.
        let mut renewals = self.tokens.renewals();
        loop {
            if let Err(rejection) = self.check() {
                return rejection;
            }
            let table = self.tokens.get();
            // Its expiry may be another since the request began.
            let token = table.known(&self.grant.hash);
            match token.and_then(|token| table.remaining(token.expires)) {
                Some(remaining) => drop(timeout(remaining.min(RECHECK_INTERVAL), renewals.changed()).await),
                None if renewals.changed().await.is_err() => pending().await,
                None => {}
            }
        }
    }
}

/// Waits until a request to the admin listener would be rejected for its token; never returns without tokens.
pub async fn revoked_admin(tokens: Option<Arc<Tokens>>, headers: HeaderMap, needed: Scope) -> Rejection {
    let Some(tokens) = tokens else { return pending().await };
    let mut renewals = tokens.renewals();
    loop {
        if let (_, Err(rejection)) = tokens.get().check_admin(&headers, needed) {
            return rejection;
        }
        let table = tokens.get();
        let expires = table.find(&headers).ok().and_then(|(_, token)| table.remaining(token.expires));
        // The sender is in `tokens`.
        let _ = timeout(expires.unwrap_or(RECHECK_INTERVAL).min(RECHECK_INTERVAL), renewals.changed()).await;
    }
}

/// Waits for a revocation; never returns without tokens.
pub async fn revoked(standing: Option<&Standing>) -> Rejection {
    match standing {
        Some(standing) => standing.revoked().await,
        None => pending().await,
    }
}

/// Returns the names and ids of tokens, in order, and the number of those that are left out.
fn shown<'t>(tokens: impl Iterator<Item = (&'t Hash, &'t Token)>) -> Option<String> {
    let mut tokens: Vec<_> = tokens.map(|(hash, token)| format!("{} {}", token.name, file::id(hash))).collect();
    tokens.sort_unstable();
    let left_out = tokens.len().saturating_sub(MAX_SHOWN);
    tokens.truncate(MAX_SHOWN);
    let rest = if left_out > 0 { format!(" and {left_out} more") } else { String::new() };
    (!tokens.is_empty()).then(|| tokens.join(", ") + &rest)
}

fn unknown() -> Rejection {
    unauthorized("the token is unknown", ", error=\"invalid_token\"")
}

fn first(hash: &Hash) -> First {
    std::array::from_fn(|index| hash[index])
}

fn bearer(value: &[u8]) -> Option<&[u8]> {
    let (scheme, token) = value.split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"bearer ").then(|| token.trim_ascii())
}

/// Returns whether a path, as sent, lies below a prefix, however the guest normalizes it: dot segments are excluded.
fn within(prefix: &str, path: &str) -> bool {
    let plain =
        path.to_ascii_lowercase().replace("%2e", ".").replace("%2f", "/").replace("%5c", "/").replace('\\', "/");
    path.starts_with(prefix) && !plain.split('/').any(|segment| matches!(segment, "." | ".."))
}

fn unauthorized(reason: &'static str, error: &str) -> Rejection {
    challenge(StatusCode::UNAUTHORIZED, reason, error)
}

fn forbidden(reason: &'static str) -> Rejection {
    challenge(StatusCode::FORBIDDEN, reason, ", error=\"insufficient_scope\"")
}

/// A rejection with the challenge of RFC 6750.
fn challenge(status: StatusCode, reason: &'static str, error: &str) -> Rejection {
    let rejection = Rejection::new(status, reason);
    match HeaderValue::from_str(&format!("Bearer realm=\"kvs\"{error}")) {
        Ok(value) => rejection.with_header(header::WWW_AUTHENTICATE, value),
        Err(_) => rejection,
    }
}

fn hash(token: &[u8]) -> Hash {
    Sha256::digest(token).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn path_below_prefix_must_be_unambiguous() {
        for (path, below) in [
            ("/v1/team-a", true),
            ("/v1/team-a/x", true),
            ("/v1/team-b", false),
            ("/v1", false),
            ("/v1/team%2Da", false),
            ("/v1/team-a/../team-b", false),
            ("/v1/team-a/%2e%2E/team-b", false),
            ("/v1/team-a/..%2Fteam-b", false),
            ("/v1/team-a%2f..%2Fteam-b", false),
            ("/v1/team-a/..\\team-b", false),
            ("/v1/team-a/..%5cteam-b", false),
            ("/v1/team-a/./x", false),
            ("/v1/team-a/..x", true),
        ] {
            assert_eq!(within("/v1/team-a", path), below, "{path}");
        }
    }
}
