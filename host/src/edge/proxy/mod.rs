//! Addresses of clients behind proxies: those that trusted proxies give, in `Forwarded` (RFC 7239), in `X-Forwarded-For`, or in
//! the header of the PROXY protocol.
//!
//! Each proxy adds the address that it was connected from on the right, so the client is the rightmost that is not a trusted
//! proxy: what is left of it, the client may have written itself.
//!
//! Owns: the set of trusted proxies. Must never know: sockets, except to read the header of the PROXY protocol.

mod forwarded;
mod protocol;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use hyper::StatusCode;
use hyper::header::{HeaderMap, HeaderName};
use ipnet::IpNet;

use super::head;
use super::rejection::Rejection;
use crate::guest::Client;
pub use protocol::{ProxyHeaderError, read as read_header};

const FORWARDED: HeaderName = HeaderName::from_static("forwarded");
const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

/// An address in a header: none where it is `unknown`, obfuscated or malformed.
type Node = Option<SocketAddr>;

/// A proxy that is trusted to give the addresses of its clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TrustedProxy {
    Network(IpNet),
    /// Any that is connected to a Unix socket.
    Unix,
}

/// The trusted proxies.
#[derive(Debug)]
pub struct TrustedProxies(Vec<TrustedProxy>);

impl TrustedProxies {
    pub fn new(proxies: &[TrustedProxy]) -> Self {
        Self(proxies.to_vec())
    }

    /// Returns whether a peer is a trusted proxy. One without an address is that of a Unix socket.
    pub fn trusts(&self, peer: Option<SocketAddr>) -> bool {
        match peer {
            Some(address) => self.has(address.ip()),
            None => self.0.contains(&TrustedProxy::Unix),
        }
    }

    fn has(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        self.0.iter().any(|proxy| matches!(proxy, TrustedProxy::Network(network) if network.contains(&address)))
    }

    /// Returns the client of a request that `peer` sent: the peer itself, or the client that it gives as a trusted proxy.
    pub fn client(&self, peer: &Arc<Client>, headers: &HeaderMap) -> Result<Arc<Client>, Rejection> {
        if self.0.is_empty() || !self.trusts(peer.address) {
            return Ok(Arc::clone(peer));
        }
        let address = self.given(headers)?;
        Ok(address.map_or_else(|| Arc::clone(peer), |address| Arc::new(peer.at(address))))
    }

    /// Returns the client's address in the headers of a trusted proxy.
    fn given(&self, headers: &HeaderMap) -> Result<Option<SocketAddr>, Rejection> {
        let (forwarded, x_forwarded) = (values(headers, FORWARDED), values(headers, X_FORWARDED_FOR));
        let nodes = forwarded::nodes(&forwarded).map_err(|()| bad("the header Forwarded is malformed"))?;
        let by_forwarded = self.outermost(nodes.into_iter().rev());
        let by_x_forwarded = self.outermost(forwarded::x_nodes_from_right(&x_forwarded));
        if x_forwarded.is_empty() {
            return Ok(by_forwarded);
        }
        if forwarded.is_empty() {
            return Ok(by_x_forwarded);
        }
        // A proxy sets one of them and may pass on the other as the client sent it, and which one is not known.
        match by_forwarded.zip(by_x_forwarded) {
            Some((one, other)) if one.ip() != other.ip() => Err(bad(
                "Forwarded and X-Forwarded-For give different clients; have the proxy remove the one that it does not set",
            )),
            both => Ok(both.map(|(one, _)| one)),
        }
    }

    /// Returns the last of the addresses up to the first that is not a trusted proxy, or up to one that is not known.
    fn outermost(&self, nodes: impl Iterator<Item = Node>) -> Option<SocketAddr> {
        let mut outermost = None;
        for address in nodes.map_while(|node| node) {
            outermost = Some(address);
            if !self.has(address.ip()) {
                break;
            }
        }
        outermost
    }
}

fn values(headers: &HeaderMap, name: HeaderName) -> Vec<&[u8]> {
    head::values(headers, name).map(|value| value.as_bytes()).collect()
}

fn bad(reason: &'static str) -> Rejection {
    Rejection::new(StatusCode::BAD_REQUEST, reason)
}

/// Parses a value of `--trusted-proxy`.
pub fn trusted_proxy(text: &str) -> Result<TrustedProxy, String> {
    if text == "unix" {
        return Ok(TrustedProxy::Unix);
    }
    let network = text.parse().or_else(|_| text.parse().map(|address: IpAddr| IpNet::from(address.to_canonical())));
    let network = network.map_err(|_| "must be a network like 10.0.0.0/8, an address, or unix".to_owned())?;
    Ok(TrustedProxy::Network(network))
}

#[cfg(test)]
mod tests {
    use hyper::header::HeaderValue;

    use super::*;

    fn proxies() -> TrustedProxies {
        let parsed: Vec<_> =
            ["10.0.0.0/8", "192.0.2.1", "2001:db8::/32", "unix"].map(|text| trusted_proxy(text).unwrap()).into();
        TrustedProxies::new(&parsed)
    }

    /// The client's address behind a trusted proxy, or the status of the rejection.
    fn given(headers: &[(&'static str, &str)]) -> Result<Option<String>, u16> {
        let parse = |(name, value): &(&'static str, &str)| {
            (HeaderName::from_static(name), HeaderValue::from_bytes(value.as_bytes()).unwrap())
        };
        let mut map = HeaderMap::new();
        headers.iter().map(parse).for_each(|(name, value)| {
            map.append(name, value);
        });
        let given = proxies().given(&map).map_err(|rejection| rejection.status().as_u16());
        given.map(|address| address.map(|address| address.to_string()))
    }

    fn is(text: &str) -> Result<Option<String>, u16> {
        Ok(Some(text.to_owned()))
    }

    #[test]
    fn trusted_proxies_are_networks_and_unix() {
        for wrong in ["", "10.0.0.0/33", "proxy.example", "10.0.0.0-10.0.0.9", "::1/129", "fe80::1%eth0"] {
            assert!(trusted_proxy(wrong).is_err(), "{wrong}");
        }
        let trusts = |address: &str| proxies().trusts(Some(address.parse().unwrap()));
        for trusted in ["10.9.9.9:1", "[::ffff:10.0.0.1]:1", "192.0.2.1:80", "[2001:db8:ffff::1]:1"] {
            assert!(trusts(trusted), "{trusted}");
        }
        for other in ["11.0.0.1:1", "192.0.2.2:1", "[::1]:1", "[2001:db9::1]:1"] {
            assert!(!trusts(other), "{other}");
        }
        assert!(proxies().trusts(None));
        assert!(!TrustedProxies::new(&[]).trusts(None));
    }

    #[test]
    fn rightmost_untrusted_address_is_the_client() {
        for (value, client) in [
            ("203.0.113.7", Some("203.0.113.7:0")),
            ("6.6.6.6, 203.0.113.7", Some("203.0.113.7:0")),
            ("6.6.6.6, 203.0.113.7:55, 10.0.0.1,10.0.0.2", Some("203.0.113.7:55")),
            ("6.6.6.6,, 2001:db9::1 ,10.0.0.2,", Some("[2001:db9::1]:0")),
            ("[2001:db9::1]:443", Some("[2001:db9::1]:443")),
            ("[2001:db9::1]", Some("[2001:db9::1]:0")),
            ("::ffff:203.0.113.7", Some("203.0.113.7:0")),
            // All are proxies: the first of them asks.
            ("10.0.0.1, 10.0.0.2", Some("10.0.0.1:0")),
            // Beyond what is not known nothing is believed.
            ("6.6.6.6, unknown, 10.0.0.2", Some("10.0.0.2:0")),
            ("6.6.6.6, _hidden", None),
            ("6.6.6.6, fe80::1%eth0", None),
            ("6.6.6.6, [fe80::1%2]:80", None),
            ("6.6.6.6, 203.0.113.700", None),
            ("6.6.6.6, 203.0.113.7:99999", None),
            ("\u{e4}", None),
            ("", None),
        ] {
            assert_eq!(given(&[("x-forwarded-for", value)]), Ok(client.map(str::to_owned)), "{value}");
        }
        let lines = [("x-forwarded-for", "6.6.6.6"), ("x-forwarded-for", "203.0.113.7, 10.0.0.1")];
        assert_eq!(given(&lines), is("203.0.113.7:0"));
    }

    #[test]
    fn forwarded_gives_the_client_or_is_refused() {
        for (value, client) in [
            ("for=203.0.113.7", Ok(Some("203.0.113.7:0"))),
            ("For=\"203.0.113.7:55\";proto=https;by=10.0.0.9", Ok(Some("203.0.113.7:55"))),
            ("for=6.6.6.6, proto=http;for=\"[2001:db9::1]:443\", for=10.0.0.1", Ok(Some("[2001:db9::1]:443"))),
            ("for=\"203.0.113.7:_p.1\"", Ok(Some("203.0.113.7:0"))),
            ("for=6.6.6.6, for=203.0.113.7;host=\"a,\\\"b;for=6.6.6.6\"", Ok(Some("203.0.113.7:0"))),
            ("for=6.6.6.6, , for=203.0.113.7,", Ok(Some("203.0.113.7:0"))),
            ("for=6.6.6.6, for=unknown", Ok(None)),
            ("for=6.6.6.6, for=_gazonk, for=10.0.0.1", Ok(Some("10.0.0.1:0"))),
            ("for=6.6.6.6, proto=https", Ok(None)),
            ("for=\"[fe80::1%2]:80\"", Ok(None)),
            // Where an element begins and ends is not known.
            ("for=\"6.6.6.6, for=203.0.113.7", Err(400)),
            ("for=6.6.6.6;for=203.0.113.7", Err(400)),
            ("for", Err(400)),
            ("for=, for=203.0.113.7", Err(400)),
            ("=203.0.113.7", Err(400)),
            ("for = 203.0.113.7", Err(400)),
            ("for=\"203.0.113.7\"x", Err(400)),
            ("for=\u{e4}", Err(400)),
        ] {
            let expected = client.map(|client| client.map(str::to_owned));
            assert_eq!(given(&[("forwarded", value)]), expected, "{value}");
        }
        let lines = [("forwarded", "for=6.6.6.6"), ("forwarded", "for=203.0.113.7, for=10.0.0.1")];
        assert_eq!(given(&lines), is("203.0.113.7:0"));
    }

    #[test]
    fn two_headers_must_agree() {
        let both = |one, other| given(&[("forwarded", one), ("x-forwarded-for", other)]);
        assert_eq!(both("for=\"203.0.113.7:55\"", "6.6.6.6, 203.0.113.7"), is("203.0.113.7:55"));
        assert_eq!(both("for=6.6.6.6", "203.0.113.7"), Err(400));
        assert_eq!(both("for=203.0.113.7", "6.6.6.6"), Err(400));
        // The proxy knows no address, and passes on what the client sent.
        assert_eq!(both("for=unknown", "203.0.113.7"), Ok(None));
        assert_eq!(both("for=203.0.113.7", "unknown"), Ok(None));
    }
}
