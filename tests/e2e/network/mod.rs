//! Connections: where a server can be reached, by whom, and how much they get.
//!
//! `listeners`, `tls` and `behind_a_proxy`: addresses, certificates and proxies. `access` and `key_prefix`: tokens; `rate_limit`: how often. `http2` and `raw`
//! are about the protocols byte for byte, `limits` about slow and many clients, `floods` and `attacks` about bad ones.

mod access;
mod attacks;
mod behind_a_proxy;
mod floods;
mod http2;
mod key_prefix;
mod limits;
mod listeners;
mod rate_limit;
mod raw;
mod tls;
