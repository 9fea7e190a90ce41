//! The service manager: reports of the state of this process, and listeners that systemd has opened for it.

use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;
use std::{env, io};

use anyhow::{Context, Result, ensure};
use listenfd::ListenFd;
use rustix::io::{FdFlags, fcntl_setfd};
use sd_notify::NotifyState;
use tracing::warn;

use crate::edge::listener::{FileOwner, Listener};
use crate::settings::listen::Address;

/// Socket of the service manager.
const SOCKET: &str = "NOTIFY_SOCKET";
/// Timeout of a report: the queue of the socket is full while the service manager reads nothing.
const TIMEOUT: Duration = Duration::from_secs(1);

/// Listeners of socket activation, in the order of the socket unit: those of `--listen`, and that of `--admin`.
#[derive(Default)]
pub struct Activated {
    pub http: Option<Vec<Listener>>,
    pub admin: Option<Listener>,
}

impl Activated {
    /// Takes the listeners that this process was started with, once.
    pub fn take(addresses: &[Address]) -> Result<Self> {
        let mut given = ListenFd::from_env();
        let (sockets, expected) = (given.len(), addresses.len());
        if sockets == 0 {
            return Ok(Self::default());
        }
        let fits = sockets == expected || sockets == expected + 1;
        let unit =
            "the socket unit needs those of --listen, in the same order, and may have that of --admin after them";
        ensure!(fits, "LISTEN_FDS: {sockets} sockets for {expected} addresses of --listen; {unit}");
        let mut take = |index, is_unix| -> Result<_> {
            let socket = if is_unix {
                given.take_unix_listener(index).map(|listener| listener.map(OwnedFd::from))
            } else {
                given.take_tcp_listener(index).map(|listener| listener.map(OwnedFd::from))
            };
            let socket =
                socket.with_context(|| format!("LISTEN_FDS: socket {} is of another kind; {unit}", index + 1))?;
            let Some(socket) = socket else { return Ok(None) };
            // An upgrade passes the listener itself.
            fcntl_setfd(&socket, FdFlags::CLOEXEC)?;
            Ok(Some(Listener::from_descriptor(socket, FileOwner::ServiceManager)?))
        };
        let is_unix = |address: &Address| matches!(address, Address::Unix(_));
        let http = addresses.iter().enumerate().map(|(index, address)| take(index, is_unix(address)));
        let http: Vec<_> = http.collect::<Result<_>>()?;
        Ok(Self { http: Some(http.into_iter().flatten().collect()), admin: take(expected, false)? })
    }
}

/// Reports that this process serves, and is the main one of its service.
pub fn ready() {
    replaced_by(std::process::id());
}

/// Reports that another process serves, and is the main one from now on. To be called by the one that was it: if that ended
/// first, the service would end with it.
pub fn replaced_by(process: u32) {
    notify(&[NotifyState::Ready, NotifyState::MainPid(process)]);
}

/// Reports that this process may be replaced, until the next [`ready`].
pub fn reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => notify(&[NotifyState::Reloading, now]),
        Err(error) => warn!("cannot report to the service manager: {error}"),
    }
}

pub fn stopping() {
    notify(&[NotifyState::Stopping]);
}

/// Does nothing where there is no service manager.
fn notify(state: &[NotifyState<'_>]) {
    if let Err(error) = send(state) {
        warn!("cannot report to the service manager: {error}");
    }
}

/// As `sd_notify::notify`, which waits without a limit.
fn send(state: &[NotifyState<'_>]) -> io::Result<()> {
    let Some(path) = env::var_os(SOCKET) else { return Ok(()) };
    let socket = UnixDatagram::unbound()?;
    match path.as_encoded_bytes() {
        [b'@', name @ ..] => socket.connect_addr(&SocketAddr::from_abstract_name(name)?)?,
        _ => socket.connect(&path)?,
    }
    socket.set_write_timeout(Some(TIMEOUT))?;
    let lines: String = state.iter().map(|line| format!("{line}\n")).collect();
    socket.send(lines.as_bytes()).map(drop)
}
