//! Authentication and authorization: bearer tokens, each with a scope.
//!
//! The token file has one token per line: a name, a scope, the SHA-256 of the token in hexadecimal, and optionally a path
//! prefix that it is limited to. The token itself is not stored; it is 256 random bits, so its hash reveals nothing.
//!
//! Must never know: the meaning of a path. Scopes depend on the method, and prefixes on the bytes of the path as sent.

use std::collections::HashMap;
use std::fs::{self, OpenOptions};
use std::future::pending;
use std::hint::black_box;
use std::io::{ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, ensure};
use clap::ValueEnum;
use hyper::header::{self, HeaderMap, HeaderValue};
use hyper::http::request::Parts;
use hyper::{Method, StatusCode, Uri};
use kvs_runtime::Random;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use super::fresh::Fresh;
use super::head;
use super::refusal::{Answer, Refusal, refuse};
use crate::contract;

/// Prefix of tokens, so that scanners recognise leaked ones.
pub const TOKEN_PREFIX: &str = "kvs_";

/// Scope of a token. Each includes those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Scope {
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
            Scope::Read => Self::Read,
            Scope::Write => Self::Write,
            Scope::Admin => Self::Admin,
        }
    }
}

struct Token {
    name: Arc<str>,
    scope: Scope,
    prefix: Option<String>,
}

/// Principal, scope and token of a request.
pub struct Grant {
    pub name: Arc<str>,
    pub scope: Scope,
    hash: Hash,
}

/// The reloadable table of tokens.
pub type Tokens = Fresh<TokenTable>;

/// Table of tokens, by the first bytes of their hashes.
///
/// Hashes are compared in constant time, even if there is none to compare with. The time to look up the first bytes reveals
/// nothing about a token.
pub struct TokenTable(HashMap<First, Vec<(Hash, Token)>>);

type Hash = [u8; 32];
type First = [u8; 8];

/// Dummy hash for a comparison in constant time.
const NOBODY: Hash = [0; 32];

/// Loads the token file, and reloads it when it changes.
pub fn load(file: &Path) -> Result<Arc<Tokens>> {
    let file = file.to_owned();
    Fresh::new("the token file", vec![file.clone()], move || {
        let text = fs::read_to_string(&file).with_context(|| format!("cannot read --tokens {}", file.display()))?;
        TokenTable::parse(&text).with_context(|| format!("--tokens {}", file.display()))
    })
}

impl TokenTable {
    fn parse(text: &str) -> Result<Self> {
        let mut tokens = HashMap::new();
        let lines = text.lines().enumerate().map(|(index, line)| (index + 1, line.trim()));
        for (number, line) in lines.filter(|(_, line)| !line.is_empty() && !line.starts_with('#')) {
            // The error does not show the line, which may contain the token itself by mistake.
            let (hash, token) = parse_line(line).with_context(|| format!("line {number}"))?;
            let same_prefix: &mut Vec<(Hash, Token)> = tokens.entry(first(&hash)).or_default();
            ensure!(same_prefix.iter().all(|(other, _)| *other != hash), "line {number}: duplicate token");
            same_prefix.push((hash, token));
        }
        Ok(Self(tokens))
    }

    /// Authenticates and authorizes a request.
    ///
    /// The path prefix of a token is enforced here and not passed to the guest: which keys a path names depends on the guest,
    /// so no key prefix follows from it.
    pub fn check(&self, head: &Parts) -> Result<Grant, Refusal> {
        let (hash, token) = self.find(&head.headers)?;
        token.allow(hash, &head.method, head.uri.path())
    }

    /// Checks that an earlier grant is still valid.
    fn check_again(&self, grant: &Grant, method: &Method, path: &str) -> Result<(), Refusal> {
        let token = self.known(&grant.hash).ok_or_else(unknown)?;
        let now = token.allow(grant.hash, method, path)?;
        // The response of the guest was for this name and scope.
        let holds = now.name == grant.name && now.scope >= grant.scope;
        if holds { Ok(()) } else { Err(forbidden("the permissions of the token were reduced during the request")) }
    }

    /// Authenticates and authorizes a request to the admin listener.
    pub fn check_admin(&self, headers: &HeaderMap) -> Result<(), Refusal> {
        let (_, token) = self.find(headers)?;
        let admin = token.scope == Scope::Admin && token.prefix.is_none();
        if admin { Ok(()) } else { Err(forbidden("the token is not valid for the admin listener")) }
    }

    fn known(&self, hash: &Hash) -> Option<&Token> {
        match self.0.get(&first(hash)) {
            Some(same_prefix) => same_prefix.iter().find(|(other, _)| other.ct_eq(hash).into()).map(|(_, token)| token),
            None => {
                black_box(NOBODY.ct_eq(hash));
                None
            }
        }
    }

    fn find(&self, headers: &HeaderMap) -> Result<(Hash, &Token), Refusal> {
        let mut given = headers.get_all(header::AUTHORIZATION).iter();
        let token = match (given.next(), given.next()) {
            (None, _) => return Err(unauthorized("a bearer token is required: Authorization: Bearer TOKEN", "")),
            (Some(only), None) => bearer(only.as_bytes()),
            _ => None,
        };
        let hash = token.map(hash).ok_or_else(unknown)?;
        Ok((hash, self.known(&hash).ok_or_else(unknown)?))
    }
}

impl Token {
    fn allow(&self, hash: Hash, method: &Method, path: &str) -> Result<Grant, Refusal> {
        let needed = if head::is_safe(method) { Scope::Read } else { Scope::Write };
        if self.scope < needed {
            return Err(forbidden("the token is read-only"));
        }
        if let Some(prefix) = &self.prefix
            && !within(prefix, path)
        {
            return Err(forbidden("the token is not valid for this path"));
        }
        // A token with a path prefix is never valid for the admin listener.
        let scope = if self.prefix.is_some() { self.scope.min(Scope::Write) } else { self.scope };
        Ok(Grant { name: Arc::clone(&self.name), scope, hash })
    }
}

/// Authorization of a streaming or waiting request.
pub struct Standing {
    pub tokens: Arc<Tokens>,
    pub grant: Grant,
    pub method: Method,
    pub uri: Uri,
}

impl Standing {
    /// Waits until the authorization is revoked, and returns the response for it.
    pub async fn revoked(&self) -> Refusal {
        // Before the first check, so that no reload is missed.
        let mut renewals = self.tokens.renewals();
        loop {
            if let Err(refusal) = self.tokens.get().check_again(&self.grant, &self.method, self.uri.path()) {
                return refusal;
            }
            if renewals.changed().await.is_err() {
                pending().await
            }
        }
    }
}

/// Waits for a revocation; never returns without tokens.
pub async fn revoked(standing: Option<&Standing>) -> Refusal {
    match standing {
        Some(standing) => standing.revoked().await,
        None => pending().await,
    }
}

fn unknown() -> Refusal {
    unauthorized("the token is unknown", ", error=\"invalid_token\"")
}

fn first(hash: &Hash) -> First {
    std::array::from_fn(|index| hash[index])
}

fn parse_line(line: &str) -> Result<(Hash, Token)> {
    let words: Vec<_> = line.split_whitespace().collect();
    let (name, scope, hash, prefix) = match words[..] {
        [name, scope, hash] => (name, scope, hash, None),
        [name, scope, hash, prefix] => (name, scope, hash, Some(prefix.to_owned())),
        _ => return Err(anyhow!("the line is not NAME SCOPE SHA256 [PATH-PREFIX]")),
    };
    check_name(name)?;
    let scope = Scope::from_str(scope, false).map_err(|_| anyhow!("the scope is not read, write or admin"))?;
    let hash = from_hex(hash).context("the hash is not 64 hexadecimal digits")?;
    ensure!(prefix.as_ref().is_none_or(|prefix| prefix.starts_with('/')), "the path prefix must start with a slash");
    Ok((hash, Token { name: name.into(), scope, prefix }))
}

/// Validates a name. It cannot equal the subject of a certificate, which contains an equals sign.
fn check_name(name: &str) -> Result<()> {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    ensure!(
        (1..=64).contains(&name.len()) && name.bytes().all(fits),
        "the name must be 1 to 64 letters, digits, - _ and ."
    );
    Ok(())
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

fn unauthorized(reason: &str, error: &str) -> Refusal {
    challenge(refuse(StatusCode::UNAUTHORIZED, reason), error)
}

fn forbidden(reason: &str) -> Refusal {
    challenge(refuse(StatusCode::FORBIDDEN, reason), ", error=\"insufficient_scope\"")
}

/// Adds the challenge of RFC 6750.
fn challenge(mut response: Answer, error: &str) -> Refusal {
    if let Ok(value) = HeaderValue::from_str(&format!("Bearer realm=\"kvs\"{error}")) {
        response.headers_mut().insert(header::WWW_AUTHENTICATE, value);
    }
    response.into()
}

fn hash(token: &[u8]) -> Hash {
    Sha256::digest(token).into()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn from_hex(text: &str) -> Option<Hash> {
    let mut bytes = [0; 32];
    if text.len() != 64 || !text.is_ascii() {
        return None;
    }
    for (index, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * index..2 * index + 2], 16).ok()?;
    }
    Some(bytes)
}

/// Creates a token: appends the line with its hash to the file, and returns the token, which is stored nowhere.
pub fn create(file: &Path, name: &str, scope: Scope, path_prefix: Option<&str>, random: &Random) -> Result<String> {
    check_name(name)?;
    let mut secret = [0; 32];
    random.fill(&mut secret)?;
    let token = format!("{TOKEN_PREFIX}{}", hex(&secret));
    let scope = scope.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned());
    let prefix = path_prefix.map(|prefix| format!(" {prefix}")).unwrap_or_default();
    let line = format!("{name} {scope} {}{prefix}", hex(&hash(token.as_bytes())));
    parse_line(&line)?;
    let before = match fs::read_to_string(file) {
        Ok(text) => text,
        Err(error) if error.kind() == ErrorKind::NotFound => String::new(),
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", file.display())),
    };
    let known = TokenTable::parse(&before).with_context(|| file.display().to_string())?;
    ensure!(
        known.0.values().flatten().all(|(_, token)| *token.name != *name),
        "{} already has a token with this name; choose another name, or remove it",
        file.display()
    );
    let mut options = OpenOptions::new();
    let opened = options.append(true).create(true).mode(0o600).open(file);
    let written = opened.and_then(|mut opened| opened.write_all(format!("{line}\n").as_bytes()));
    written.with_context(|| format!("cannot write {}", file.display()))?;
    Ok(token)
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

    #[test]
    fn token_file_errors_show_line_not_content() {
        let hash = "0".repeat(64);
        assert!(TokenTable::parse(&format!("# people\n\nalice read {hash}\n")).is_ok());
        for (text, line) in [
            ("alice".to_owned(), 1),
            (format!("\nalice all {hash}"), 2),
            (format!("alice read {hash}0"), 1),
            ("alice read kvs_secret".to_owned(), 1),
            (format!("al=ice read {hash}"), 1),
            (format!("alice read {hash} v1"), 1),
            (format!("alice read {hash}\nbob read {hash}"), 2),
        ] {
            let error = format!("{:#}", TokenTable::parse(&text).err().expect("it is invalid"));
            assert!(error.starts_with(&format!("line {line}: ")) && !error.contains("secret"), "{text}: {error}");
        }
    }
}
