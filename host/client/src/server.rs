//! HTTP client of one server, with or without TLS, and with one-line errors.
//!
//! Owns: URLs, tokens, and trusted CAs. Must never know: the meaning of a request.

use std::fmt::{Display, Write as _};
use std::fs;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use percent_encoding::{AsciiSet, CONTROLS, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::de::DeserializeOwned;
use ureq::http::{HeaderValue, Request, Response, header};
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Body};

/// Characters to escape in a path segment. No others are escaped, since tokens can be limited to paths as written.
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
/// Characters to escape in a query parameter, where `+` and `&` have a meaning too.
const IN_QUERY: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// Connect timeout.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Maximum number of idle connections.
const MAX_IDLE: usize = 64;
/// Size of a body above which the request has `Expect: 100-continue`.
const EXPECT_CONTINUE_BYTES: usize = 1 << 20;
/// Maximum size of a response in JSON: more than a server sends, which ends a page after a mebibyte or the first value beyond
/// it.
const MAX_JSON_BYTES: u64 = 8 << 30;
/// Maximum length of the reason that is read from an error response.
const REASON_BYTES: u64 = 4 << 10;
/// Maximum length of a key in an error.
const MAX_SHOWN_KEY_BYTES: usize = 100;

/// How to reach a server.
#[derive(Clone, Copy)]
pub struct Options<'o> {
    /// A URL, or just an address.
    pub url: &'o str,
    /// The flag with the URL, for errors.
    pub flag: &'static str,
    /// The bearer token to present.
    pub token: Option<&'o str>,
    /// A PEM file of trusted CAs, in place of those of the system.
    pub authorities: Option<&'o Path>,
    /// Read timeout: the longest time without a byte from the server.
    pub read_timeout: Option<Duration>,
    /// Whether stale reads, from a standby, are accepted.
    pub stale: bool,
}

/// A client of one server.
pub struct Server {
    agent: Agent,
    base: String,
    /// The flag with the URL.
    flag: &'static str,
    token: Option<HeaderValue>,
    stale: bool,
}

/// A failed request.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("no response from {base}: {reason}; check that the server is running and that {flag} is right")]
    Transport { base: String, reason: String, flag: &'static str },
    #[error("{reason} ({status})")]
    Status { status: u16, reason: String, retry_after: Option<Duration> },
}

/// A request to the server.
pub struct ApiRequest<'a> {
    pub method: &'static str,
    /// Path and query.
    pub target: &'a str,
    pub headers: &'a [(&'a str, &'a str)],
    pub body: Option<&'a [u8]>,
}

impl Server {
    pub fn new(options: &Options<'_>) -> Result<Self> {
        let &Options { url, flag, token, authorities, read_timeout, stale } = options;
        if let Some(path) = url.strip_prefix("unix:") {
            bail!(
                "{flag} {url}: commands connect over TCP alone; give the server an address beside, --listen 127.0.0.1:8080, or use \
                 curl --unix-socket {path} http://kvs/v1"
            );
        }
        let base = if url.contains("://") { url.to_owned() } else { format!("http://{url}") };
        let base = base.trim_end_matches('/').to_owned();
        let mut config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .max_idle_connections(MAX_IDLE)
            .max_idle_connections_per_host(MAX_IDLE)
            .timeout_connect(Some(CONNECT_TIMEOUT))
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

    /// Returns the base URL.
    pub fn base(&self) -> &str {
        &self.base
    }

    /// Sends a request, and returns the response if its status is a success.
    pub fn send(&self, api_request: &ApiRequest<'_>) -> Result<Response<Body>, ClientError> {
        let mut request =
            Request::builder().method(api_request.method).uri(format!("{}{}", self.base, api_request.target));
        if let Some(token) = &self.token {
            request = request.header(header::AUTHORIZATION, token);
        }
        if self.stale {
            request = request.header("kvs-consistency", "stale");
        }
        for (name, value) in api_request.headers {
            request = request.header(*name, *value);
        }
        let answered = match api_request.body {
            None => request.body(()).map_err(ureq::Error::from).and_then(|request| self.agent.run(request)),
            Some(body) => {
                if body.len() > EXPECT_CONTINUE_BYTES {
                    request = request.header(header::EXPECT, "100-continue");
                }
                request.body(body).map_err(ureq::Error::from).and_then(|request| self.agent.run(request))
            }
        };
        let response = answered.map_err(|error| self.transport_error(&error))?;
        if response.status().is_success() { Ok(response) } else { Err(status_error(response)) }
    }

    /// Sends a request, and reads the JSON of its response.
    pub fn send_for<T: DeserializeOwned>(&self, api_request: &ApiRequest<'_>) -> Result<T> {
        let reader = self.send(api_request)?.into_body().into_reader();
        let mut text = Vec::new();
        reader.take(MAX_JSON_BYTES).read_to_end(&mut text).map_err(|error| self.transport_error(&error))?;
        serde_json::from_slice(&text).with_context(|| format!("{} returned something else than expected", self.base))
    }

    /// Returns the error of a request without a complete response.
    pub fn transport_error(&self, error: &dyn std::error::Error) -> ClientError {
        let mut reason = error.to_string();
        if reason.contains("UnknownIssuer") {
            reason += " (add the CA with --cacert)";
        }
        ClientError::Transport { base: self.base.clone(), reason, flag: self.flag }
    }
}

fn bearer(token: &str) -> Result<HeaderValue> {
    // The error does not show the token.
    let mut value = HeaderValue::from_str(&format!("Bearer {}", token.trim()))
        .map_err(|_| anyhow!("the token contains invalid characters"))?;
    value.set_sensitive(true);
    Ok(value)
}

fn status_error(response: Response<Body>) -> ClientError {
    let status = response.status().as_u16();
    let retry_after = response.headers().get(header::RETRY_AFTER).and_then(|after| after.to_str().ok()?.parse().ok());
    let mut text = Vec::new();
    // A read error is ignored: the status is known.
    let _ = response.into_body().into_reader().take(REASON_BYTES).read_to_end(&mut text);
    let mut reason = String::from_utf8_lossy(&text).trim().replace(char::is_control, " ");
    if reason.is_empty() {
        reason = "the server returned no reason".to_owned();
    }
    if status == 401 {
        reason += "; set KVS_TOKEN or --token-file";
    }
    ClientError::Status { status, reason, retry_after: retry_after.map(Duration::from_secs) }
}

/// Reads the CAs in a file, or those that the system trusts.
fn trusted(file: Option<&Path>) -> Result<Vec<Certificate<'static>>> {
    let Some(file) = file else {
        let found = rustls_native_certs::load_native_certs();
        ensure!(!found.certs.is_empty(), "this system has no trusted CAs; give some with --cacert");
        return Ok(found.certs.iter().map(|der| Certificate::from_der(der).to_owned()).collect());
    };
    let name = file.display();
    let pem = fs::read(file).with_context(|| format!("cannot read --cacert {name}"))?;
    let mut certificates = Vec::new();
    for item in parse_pem(&pem) {
        if let PemItem::Certificate(certificate) = item.with_context(|| format!("--cacert {name} is malformed"))? {
            certificates.push(certificate);
        }
    }
    ensure!(!certificates.is_empty(), "--cacert {name} contains no PEM certificate");
    Ok(certificates)
}

/// Returns a key for an error: a long one is truncated.
pub fn shown(key: &str) -> String {
    if key.len() <= MAX_SHOWN_KEY_BYTES {
        return key.to_owned();
    }
    format!("{}… ({} bytes)", &key[..key.floor_char_boundary(MAX_SHOWN_KEY_BYTES)], key.len())
}

/// Returns prefixes for an error.
pub fn prefix_shown(prefix: &str) -> String {
    if prefix.is_empty() { "all keys".to_owned() } else { shown(prefix) }
}

/// Returns the path of a key.
pub fn path_of(key: &str) -> String {
    format!("/v1/{}", segment_of(key))
}

/// Returns a key as a segment of a path.
pub fn segment_of(key: &str) -> impl Display {
    utf8_percent_encode(key, IN_PATH)
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
    fn long_key_is_truncated_between_characters() {
        assert_eq!(shown(&"a".repeat(100)), "a".repeat(100));
        assert_eq!(shown(&"é".repeat(100)), format!("{}… (200 bytes)", "é".repeat(50)));
        assert_eq!(shown(&format!("a{}", "é".repeat(100))), format!("a{}… (201 bytes)", "é".repeat(49)));
    }

    #[test]
    fn keys_are_escaped_only_where_needed() {
        assert_eq!(path_of("team-a_1.~!$&'()*+,;=:@"), "/v1/team-a_1.~!$&'()*+,;=:@");
        assert_eq!(path_of("a/b c%41?d#é\n"), "/v1/a%2Fb%20c%2541%3Fd%23%C3%A9%0A");
        let mut target = "/v1".to_owned();
        add(&mut target, "prefix", "a+b&c=d/é");
        add(&mut target, "limit", "5");
        assert_eq!(target, "/v1?prefix=a%2Bb%26c%3Dd%2F%C3%A9&limit=5");
    }
}
