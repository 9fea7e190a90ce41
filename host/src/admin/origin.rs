//! `Host` and `Origin` of a request to the admin listener: a web page of another site must not reach it.
//!
//! A browser on the operator's machine reaches loopback and the internal network for any page. By DNS rebinding the name of the
//! page itself leads here, and the browser takes this server for its origin; but it still sends that name as `Host`. An address
//! cannot be rebound, and is always accepted: probes and scrapers use one. So is HTTP/1.0 without `Host`: no browser sends it.

use std::net::{Ipv4Addr, Ipv6Addr};

use hyper::header::{self, HeaderMap, HeaderValue};
use hyper::http::uri::Authority;
use hyper::{Request, StatusCode};

use super::{Answer, is_scan, text};

/// Names by which requests may address the admin listener, besides addresses and `localhost`.
pub struct Hosts(Vec<String>);

impl Hosts {
    pub fn new(names: &[String]) -> Self {
        Self(names.to_vec())
    }

    /// Rejects a request that a page of another site may have sent.
    pub fn check<B>(&self, request: &Request<B>) -> Result<(), Box<Answer>> {
        let host = only(request.headers(), header::HOST)?.map(authority).transpose()?;
        // A target with an authority overrides the header.
        for host in request.uri().authority().into_iter().chain(&host) {
            if !self.knows(host) {
                let name = host.host();
                return Err(forbidden(format!(
                    "the name {name:?} is not one of this admin listener; use its address, or start the server with \
                     --admin-host {name}\n"
                )));
            }
        }
        // What a page embeds has no Origin, and would start a scan of the log. A link may lead to the rest.
        let site = request.headers().get("sec-fetch-site");
        let is_foreign = site.is_some_and(|site| site != "same-origin" && site != "none");
        if is_foreign && is_scan(request.uri().path()) {
            return Err(forbidden("a page of another site must not scan the log\n".to_owned()));
        }
        let Some(origin) = only(request.headers(), header::ORIGIN)? else { return Ok(()) };
        let same = || {
            let (scheme, origin) = origin.to_str().ok()?.split_once("://")?;
            // A proxy in front may speak TLS.
            matches!(scheme, "http" | "https").then_some(())?;
            host.filter(|host| host.as_str().eq_ignore_ascii_case(origin))
        };
        same()
            .map(drop)
            .ok_or_else(|| forbidden("a page of another origin must not use the admin listener\n".to_owned()))
    }

    fn knows(&self, host: &Authority) -> bool {
        let name = host.host();
        let is_address = match name.strip_prefix('[').and_then(|name| name.strip_suffix(']')) {
            Some(name) => name.parse::<Ipv6Addr>().is_ok(),
            None => name.parse::<Ipv4Addr>().is_ok(),
        };
        let is_name = |known: &str| name.eq_ignore_ascii_case(known);
        is_address || is_name("localhost") || self.0.iter().any(|known| is_name(known))
    }
}

/// Parses the name of `--admin-host`.
pub fn host_name(text: &str) -> Result<String, String> {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    if !text.is_empty() && text.len() <= 253 && text.bytes().all(fits) {
        Ok(text.to_ascii_lowercase())
    } else {
        Err("must be a host name without a port, such as kvs-admin.example.org".to_owned())
    }
}

/// The value of a header, which may be there once.
fn only(headers: &HeaderMap, name: header::HeaderName) -> Result<Option<&HeaderValue>, Box<Answer>> {
    let mut values = headers.get_all(&name).iter();
    match (values.next(), values.next()) {
        (value, None) => Ok(value),
        _ => Err(malformed(format!("a request has at most one {name}\n"))),
    }
}

fn authority(host: &HeaderValue) -> Result<Authority, Box<Answer>> {
    let authority = Authority::try_from(host.as_bytes()).ok();
    authority.filter(|host| !host.as_str().contains('@')).ok_or_else(|| malformed("the Host is malformed\n".to_owned()))
}

fn malformed(reason: String) -> Box<Answer> {
    Box::new(text(StatusCode::BAD_REQUEST, reason))
}

fn forbidden(reason: String) -> Box<Answer> {
    Box::new(text(StatusCode::FORBIDDEN, reason))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(target: &str, headers: &[(&str, &str)]) -> u16 {
        let mut request = Request::builder().uri(target);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(()).expect("the request is well-formed");
        let hosts = Hosts::new(&[host_name("Kvs-Admin.example.org").expect("a name")]);
        hosts.check(&request).map_or_else(|refusal| refusal.status().as_u16(), |()| 200)
    }

    #[test]
    fn host_must_be_address_or_known_name() {
        for host in [
            "127.0.0.1:9090",
            "10.0.0.7",
            "[::1]:9090",
            "[fe80::1]",
            "localhost:1",
            "LOCALHOST",
            "kvs-admin.example.org:80",
        ] {
            assert_eq!(status("/guest", &[("host", host)]), 200, "{host}");
        }
        for host in
            ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "xlocalhost", "0x7f000001", "[::1", ""]
        {
            assert!(matches!(status("/guest", &[("host", host)]), 400 | 403), "{host}");
        }
        assert_eq!(status("/guest", &[("host", "x@127.0.0.1")]), 400);
        assert_eq!(status("/guest", &[("host", "127.0.0.1"), ("host", "127.0.0.1")]), 400);
        // HTTP/1.0, which no browser speaks.
        assert_eq!(status("/guest", &[]), 200);
        assert_eq!(status("http://evil.example/guest", &[("host", "127.0.0.1")]), 403);
    }

    #[test]
    fn origin_must_be_that_of_the_listener() {
        let status = |origin| status("/guest", &[("host", "127.0.0.1:9090"), ("origin", origin)]);
        assert_eq!(status("http://127.0.0.1:9090"), 200);
        assert_eq!(status("https://127.0.0.1:9090"), 200);
        for origin in
            ["http://127.0.0.1", "http://127.0.0.1:8080", "http://evil.example", "null", "", "file://127.0.0.1:9090"]
        {
            assert_eq!(status(origin), 403, "{origin}");
        }
    }

    #[test]
    fn page_of_another_site_scans_nothing() {
        let status = |target, site| status(target, &[("host", "127.0.0.1:9090"), ("sec-fetch-site", site)]);
        for site in ["cross-site", "same-site", ""] {
            assert_eq!(status("/backup", site), 403, "{site}");
            assert_eq!(status("/console", site), 200, "{site}");
        }
        assert_eq!(status("/backup", "same-origin"), 200);
        assert_eq!(status("/metrics", "none"), 200);
    }

    #[test]
    fn admin_host_is_name_without_port() {
        assert_eq!(host_name("Kvs").as_deref(), Ok("kvs"));
        for unfit in ["", "kvs:9090", "http://kvs", "a b", "*"] {
            assert!(host_name(unfit).is_err(), "{unfit}");
        }
    }
}
