//! The listeners of the HTTP interface and of the admin interface: bound, and refused where they are open by oversight.
//!
//! Owns: addresses and sockets. Must never know: what is served there.

use std::future::pending;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kvs_runtime::Clock;
use kvs_txlog::Condition;
use tokio::net::{TcpListener, TcpSocket};
use tracing::{info, warn};

use crate::follow::Followed;
use crate::settings::Serve;

/// Connections that may wait to be accepted.
const BACKLOG: u32 = 1024;
/// The pause between two attempts to open the listener of the primary.
const PAUSE: Duration = Duration::from_millis(20);

/// Refuses to be open to a network by oversight. Returns warnings for where that is by intent.
pub fn exposed(args: &Serve) -> Result<Vec<String>> {
    let mut exposures = Vec::new();
    let outside = |address: SocketAddr| !address.ip().to_canonical().is_loopback();
    let (tls, tokens) = (args.tls.tls_cert.is_some(), args.access.tokens.is_some());
    let listeners = [("--listen", Some(args.listen)), ("--listen-when-primary", args.listen_when_primary)];
    for (flag, address) in listeners {
        let Some(address) = address.filter(|address| outside(*address) && !tls) else { continue };
        ensure!(
            tokens || args.access.insecure,
            "{flag} {address} can be reached from elsewhere, without TLS and tokens; give those, or --insecure"
        );
        let open = if tokens { "tokens can be overheard" } else { "everybody can read and change everything" };
        exposures.push(format!("{flag} {address} can be reached from elsewhere, without TLS: {open}"));
    }
    if outside(args.admin) {
        ensure!(
            tokens && !args.access.admin_open,
            "--admin {} can be reached from elsewhere; give --tokens, with one of scope admin and without --admin-open, or \
             listen on 127.0.0.1",
            args.admin
        );
        let open = "tokens can be overheard";
        exposures.push(format!("--admin {} can be reached from elsewhere, without TLS: {open}", args.admin));
    }
    Ok(exposures)
}

pub fn bind(address: SocketAddr, flag: &str) -> Result<TcpSocket> {
    try_bind(address).with_context(|| cannot_listen(address, flag))
}

fn try_bind(address: SocketAddr) -> io::Result<TcpSocket> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    // Else a restart would have to wait for the connections of the run before to be forgotten.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    Ok(socket)
}

pub fn listen(socket: TcpSocket) -> io::Result<(SocketAddr, TcpListener)> {
    let listener = socket.listen(BACKLOG)?;
    Ok((listener.local_addr()?, listener))
}

pub fn cannot_listen(address: SocketAddr, flag: &str) -> String {
    format!("cannot listen on {address}; stop what listens there, or choose another address with {flag}")
}

/// URL that clients reach the primary at: as configured, or else by the address that it listens on. None for a wildcard
/// address, which is of no use to others.
pub fn advertised(args: &Serve, listen: SocketAddr) -> Option<String> {
    let address = args.listen_when_primary.unwrap_or(listen);
    let scheme = if args.tls.tls_cert.is_some() { "https" } else { "http" };
    let by_address = || (!address.ip().is_unspecified()).then(|| format!("{scheme}://{address}"));
    args.advertise.clone().or_else(by_address)
}

/// The listener of the primary, which is opened when this process is primary and the address is free: a former primary may
/// still have it.
#[derive(Default)]
pub struct WhenPrimary {
    /// Why the address cannot be had yet.
    failure: Mutex<Option<String>>,
}

impl WhenPrimary {
    /// Waits until this process is primary, and then for the address. `followed` is there where it began as a standby.
    pub async fn open(
        &self,
        address: Option<SocketAddr>,
        followed: Option<Arc<Followed>>,
        clock: &Clock,
    ) -> TcpListener {
        let Some(address) = address else { pending().await };
        if let Some(followed) = followed {
            followed.promoted().await;
        }
        loop {
            match try_bind(address).and_then(listen) {
                Ok((address, listener)) => {
                    self.set_failure(None);
                    info!("primary, listening on {address} too");
                    return listener;
                }
                Err(error) => {
                    let failure = format!("--listen-when-primary {address} cannot be opened: {error}");
                    if self.set_failure(Some(failure.clone())) {
                        warn!("{failure}; trying again until it can");
                    }
                }
            }
            clock.sleep(PAUSE).await;
        }
    }

    /// Returns whether it is another one than before.
    fn set_failure(&self, failure: Option<String>) -> bool {
        let mut known = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        let is_new = *known != failure;
        *known = failure;
        is_new
    }

    /// How it is, for those who look after it. Clients reach the other listener meanwhile.
    pub fn condition(&self) -> Condition {
        let failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner).clone();
        failure.map_or(Condition::Well, Condition::But)
    }
}
