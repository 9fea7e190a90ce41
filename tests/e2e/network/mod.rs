//! Connections: listeners, access and limits.
//!
//! `listeners`, `tls` and `behind_a_proxy`: addresses, certificates and proxies. `access`, `key_prefix`, `quotas` and
//! `token_command`: tokens; `rate_limit`: rates. `http2` and `raw` test the protocols byte for byte, `limits` slow and many
//! clients, `floods` and `attacks` malicious ones.

mod access;
mod attacks;
mod behind_a_proxy;
mod floods;
mod http2;
mod key_prefix;
mod limits;
mod listeners;
mod quotas;
mod rate_limit;
mod raw;
mod tls;
mod token_command;
