//! Settings for proxies in front of the server.

use clap::Args;

use crate::edge::proxy::{TrustedProxy, trusted_proxy};

#[derive(Args, Debug)]
#[command(next_help_heading = "Proxy")]
pub struct Proxy {
    /// Network or address of a proxy that is trusted to give the addresses of its clients, in Forwarded or X-Forwarded-For; can be
    /// repeated. `unix` trusts every client of a Unix socket
    #[arg(long, env = "KVS_TRUSTED_PROXY", value_name = "CIDR", value_delimiter = ',', value_parser = trusted_proxy)]
    pub trusted_proxy: Vec<TrustedProxy>,

    /// PROXY protocol, version 2: connections of trusted proxies must begin with its header
    #[arg(long, env = "KVS_PROXY_PROTOCOL", requires = "trusted_proxy")]
    pub proxy_protocol: bool,
}
