//! A server, as a client sees it: asks over HTTP, with or without TLS, and has one line for what went wrong.
//!
//! Owns: URLs, tokens, and whom to trust. Must never know: what is asked.

use std::fmt::Write as _;
use std::fs;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use percent_encoding::{AsciiSet, CONTROLS, NON_ALPHANUMERIC, utf8_percent_encode};
use ureq::http::{HeaderValue, Request, Response, header};
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Body};

/// What a segment of a path cannot hold as it is. Nothing more is escaped, since tokens can be bound to paths as written.
const IN_PATH: &AsciiSet = &CONTROLS
    .add(b' ')
    .add(b'"')
    .add(b'#')
    .add(b'%')
    .add(b'/')
    .add(b'<')
    .add(b'>')
    .add(b'?')
    .add(b'[')
    .add(b'\\')
    .add(b']')
    .add(b'^')
    .add(b'`')
    .add(b'{')
    .add(b'|')
    .add(b'}');
/// The value of a parameter, where `+` and `&` have a meaning too.
const IN_QUERY: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// How long a connection may take to be made.
const CONNECT: Duration = Duration::from_secs(10);
/// Connections that wait for the next request.
const IDLE: usize = 64;
/// Bodies beyond this are sent when the server has said that it takes them.
const ASK_FIRST_BYTES: usize = 1 << 20;
/// What is read of an answer that says why something was not done.
const REASON_BYTES: u64 = 4 << 10;

/// How to reach a server.
#[derive(Clone, Copy)]
pub struct Options<'o> {
    /// A URL, or an address alone.
    pub url: &'o str,
    /// The flag that named it, for errors.
    pub flag: &'static str,
    /// The bearer token to present.
    pub token: Option<&'o str>,
    /// A PEM file of authorities to trust in place of those of the system.
    pub authorities: Option<&'o Path>,
    /// The longest time without a byte from the server.
    pub read_timeout: Option<Duration>,
    /// Accept stale reads of a server that is not primary.
    pub stale: bool,
}

pub struct Server {
    agent: Agent,
    base: String,
    /// The flag that named it.
    flag: &'static str,
    token: Option<HeaderValue>,
    stale: bool,
}

/// Why there is no answer, or not the one that was wanted.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    #[error("no answer from {base}: {reason}; is the server running, and is this its {flag}?")]
    Unanswered { base: String, reason: String, flag: &'static str },
    #[error("{reason} ({status})")]
    Refused { status: u16, reason: String, again_after: Option<Duration> },
}

/// What to ask.
pub struct Ask<'a> {
    pub method: &'static str,
    /// Path and query.
    pub target: &'a str,
    pub headers: &'a [(&'a str, &'a str)],
    pub body: Option<&'a [u8]>,
}

impl Server {
    pub fn new(options: &Options<'_>) -> Result<Self> {
        let &Options { url, flag, token, authorities, read_timeout, stale } = options;
        let base = if url.contains("://") { url.to_owned() } else { format!("http://{url}") };
        let base = base.trim_end_matches('/').to_owned();
        let mut config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .max_idle_connections(IDLE)
            .max_idle_connections_per_host(IDLE)
            .timeout_connect(Some(CONNECT))
            .timeout_per_read(read_timeout)
            .timeout_per_write(read_timeout)
            .proxy(None);
        if base.starts_with("https://") {
            let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
            let roots = RootCerts::Specific(Arc::new(trusted(authorities)?));
            let tls = TlsConfig::builder().unversioned_rustls_crypto_provider(provider).root_certs(roots);
            config = config.tls_config(tls.build());
        }
        Ok(Self { agent: config.build().into(), base, flag, token: token.map(bearer).transpose()?, stale })
    }

    /// Where it is.
    pub fn base(&self) -> &str {
        &self.base
    }

    /// Asks, and gives the answer when it is that this was done.
    pub fn ask(&self, ask: &Ask<'_>) -> Result<Response<Body>, Failure> {
        let mut request = Request::builder().method(ask.method).uri(format!("{}{}", self.base, ask.target));
        if let Some(token) = &self.token {
            request = request.header(header::AUTHORIZATION, token);
        }
        if self.stale {
            request = request.header("kvs-consistency", "stale");
        }
        for (name, value) in ask.headers {
            request = request.header(*name, *value);
        }
        let answered = match ask.body {
            None => request.body(()).map_err(ureq::Error::from).and_then(|request| self.agent.run(request)),
            Some(body) => {
                if body.len() > ASK_FIRST_BYTES {
                    request = request.header(header::EXPECT, "100-continue");
                }
                request.body(body).map_err(ureq::Error::from).and_then(|request| self.agent.run(request))
            }
        };
        let response = answered.map_err(|error| self.unanswered(&error))?;
        if response.status().is_success() { Ok(response) } else { Err(refused(response)) }
    }

    /// The end of an answer that began well.
    pub fn unanswered(&self, error: &dyn std::error::Error) -> Failure {
        let mut reason = error.to_string();
        if reason.contains("UnknownIssuer") {
            reason += ", which --cacert can name";
        }
        Failure::Unanswered { base: self.base.clone(), reason, flag: self.flag }
    }
}

fn bearer(token: &str) -> Result<HeaderValue> {
    // The error does not show it.
    let mut value = HeaderValue::from_str(&format!("Bearer {}", token.trim()))
        .map_err(|_| anyhow!("the token has characters that no token has"))?;
    value.set_sensitive(true);
    Ok(value)
}

fn refused(response: Response<Body>) -> Failure {
    let status = response.status().as_u16();
    let again_after = response.headers().get(header::RETRY_AFTER).and_then(|after| after.to_str().ok()?.parse().ok());
    let mut text = Vec::new();
    // However it ends, the status is known.
    let _ = response.into_body().into_reader().take(REASON_BYTES).read_to_end(&mut text);
    let mut reason = String::from_utf8_lossy(&text).trim().replace(char::is_control, " ");
    if reason.is_empty() {
        reason = "the server gives no reason".to_owned();
    }
    if status == 401 {
        reason += "; it can be in KVS_TOKEN or --token-file";
    }
    Failure::Refused { status, reason, again_after: again_after.map(Duration::from_secs) }
}

/// The authorities in a file, or those that the system trusts.
fn trusted(file: Option<&Path>) -> Result<Vec<Certificate<'static>>> {
    let Some(file) = file else {
        let found = rustls_native_certs::load_native_certs();
        ensure!(!found.certs.is_empty(), "this system trusts no authorities; --cacert names some");
        return Ok(found.certs.iter().map(|der| Certificate::from_der(der).to_owned()).collect());
    };
    let name = file.display();
    let pem = fs::read(file).with_context(|| format!("--cacert {name} cannot be read"))?;
    let mut certificates = Vec::new();
    for item in parse_pem(&pem) {
        if let PemItem::Certificate(certificate) = item.with_context(|| format!("--cacert {name} is damaged"))? {
            certificates.push(certificate);
        }
    }
    ensure!(!certificates.is_empty(), "--cacert {name} holds no certificate in PEM");
    Ok(certificates)
}

/// The path of a key.
pub fn path_of(key: &str) -> String {
    format!("/v1/{}", utf8_percent_encode(key, IN_PATH))
}

/// Adds a parameter to a target.
pub fn add(target: &mut String, name: &str, value: &str) {
    let separator = if target.contains('?') { '&' } else { '?' };
    // Writing to a string cannot fail.
    let _ = write!(target, "{separator}{name}={}", utf8_percent_encode(value, IN_QUERY));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_escaped_where_a_path_needs_it_and_nowhere_else() {
        assert_eq!(path_of("team-a_1.~!$&'()*+,;=:@"), "/v1/team-a_1.~!$&'()*+,;=:@");
        assert_eq!(path_of("a/b c%41?d#é\n"), "/v1/a%2Fb%20c%2541%3Fd%23%C3%A9%0A");
        let mut target = "/v1".to_owned();
        add(&mut target, "prefix", "a+b&c=d/é");
        add(&mut target, "limit", "5");
        assert_eq!(target, "/v1?prefix=a%2Bb%26c%3Dd%2F%C3%A9&limit=5");
    }
}
