//! Addresses of the HTTP interface.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Args;

use crate::parse;

#[derive(Args, Debug)]
pub struct Listen {
    /// Address of the HTTP listener, or a Unix socket, unix:PATH; can be repeated. Port 0 takes a free one
    #[arg(long, env = "KVS_LISTEN", value_name = "ADDRESS", value_delimiter = ',', default_value = "127.0.0.1:8080",
          value_parser = address)]
    pub listen: Vec<Address>,

    /// Permissions of the Unix sockets of --listen, octal: 660 also lets the group connect
    #[arg(long, env = "KVS_LISTEN_MODE", value_name = "MODE", default_value = "600", value_parser = mode)]
    pub listen_mode: u32,
}

/// Maximum length of the path of a Unix socket, which is a limit of the system.
const MAX_UNIX_PATH_BYTES: usize = 107;

/// Address of a listener.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

impl Listen {
    /// The addresses that are not Unix sockets.
    pub fn tcp(&self) -> impl Iterator<Item = SocketAddr> {
        self.listen.iter().filter_map(|address| match address {
            Address::Tcp(address) => Some(*address),
            Address::Unix(_) => None,
        })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

fn address(text: &str) -> Result<Address, String> {
    match text.strip_prefix("unix:") {
        Some("") => Err("a Unix socket needs a path, unix:/run/kvs/kvs.sock".to_owned()),
        Some(path) if path.len() > MAX_UNIX_PATH_BYTES => Err(format!(
            "the path of a Unix socket has at most {MAX_UNIX_PATH_BYTES} bytes, and this one {}; choose a shorter one",
            path.len()
        )),
        Some(path) => Ok(Address::Unix(path.into())),
        None => parse::address(text).map(Address::Tcp),
    }
}

fn mode(text: &str) -> Result<u32, String> {
    let mode =
        u32::from_str_radix(text, 8).ok().filter(|mode| (0o600..=0o777).contains(mode) && !text.starts_with('+'));
    mode.ok_or_else(|| "must be octal permissions from 600 to 777".to_owned())
}
