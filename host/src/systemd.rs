//! The service manager: reports of the state of this process, and listeners that systemd has opened for it.

use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use std::{env, io};

use anyhow::{Context, Result, ensure};
use kvs_runtime::{Clock, Env};
use listenfd::ListenFd;
use rustix::io::{FdFlags, fcntl_setfd};
use sd_notify::NotifyState;
use tracing::warn;

use crate::edge::listener::{FileOwner, Listener};
use crate::settings::listen::Address;

/// Socket of the service manager.
const SOCKET: &str = "NOTIFY_SOCKET";
/// Time for which a report is repeated: the queue of the socket is full while the service manager reads nothing. By default,
/// systemd waits 90 s for the start of a service.
const TIMEOUT: Duration = Duration::from_secs(60);
const RETRY_DELAY: Duration = Duration::from_millis(100);

/// The newest report, and its time, while the queue of the socket is full. It replaces the one before: each is the whole state.
static PENDING: Mutex<Option<(Instant, String)>> = Mutex::new(None);

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
pub fn ready(env: &Env) {
    replaced_by(env, std::process::id());
}

/// Reports that another process serves, and is the main one from now on. To be called by the one that was it, which is not to end
/// before it is [`reported`]: the service would end with it.
pub fn replaced_by(env: &Env, process: u32) {
    notify(env, &[NotifyState::Ready, NotifyState::MainPid(process)]);
}

/// Reports that this process may be replaced, until the next [`ready`].
pub fn reloading(env: &Env) {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => notify(env, &[NotifyState::Reloading, now]),
        Err(error) => warn!("cannot report to the service manager: {error}"),
    }
}

pub fn stopping(env: &Env) {
    notify(env, &[NotifyState::Stopping]);
}

/// Waits until no report is pending, which takes at most the timeout of the last one.
pub async fn reported(clock: &Clock) {
    while pending().is_some() {
        clock.sleep(RETRY_DELAY).await;
    }
}

/// Does nothing where there is no service manager. Does not wait for one that reads nothing.
fn notify(env: &Env, state: &[NotifyState<'_>]) {
    let report: String = state.iter().map(|line| format!("{line}\n")).collect();
    let mut pending = pending();
    if pending.is_some() {
        *pending = Some((env.clock.now(), report));
        return;
    }
    match send(&report) {
        Err(error) if error.kind() == ErrorKind::WouldBlock => {
            *pending = Some((env.clock.now(), report));
            env.tasks.detach("service manager report", repeat(env.clock.clone()));
        }
        sent => log(sent),
    }
}

/// Sends the pending report, once there is space for it.
async fn repeat(clock: Clock) {
    loop {
        clock.sleep(RETRY_DELAY).await;
        let mut pending = pending();
        let Some((since, report)) = &*pending else { return };
        match send(report) {
            Err(error) if error.kind() == ErrorKind::WouldBlock && clock.elapsed(*since) < TIMEOUT => {}
            sent => {
                *pending = None;
                return log(sent);
            }
        }
    }
}

fn log(sent: io::Result<()>) {
    if let Err(error) = sent {
        warn!("cannot report to the service manager: {error}");
    }
}

fn pending() -> MutexGuard<'static, Option<(Instant, String)>> {
    // Every change under this lock is whole.
    PENDING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// As `sd_notify::notify`, which waits without a limit.
fn send(report: &str) -> io::Result<()> {
    let Some(path) = env::var_os(SOCKET) else { return Ok(()) };
    let socket = UnixDatagram::unbound()?;
    match path.as_encoded_bytes() {
        [b'@', name @ ..] => socket.connect_addr(&SocketAddr::from_abstract_name(name)?)?,
        _ => socket.connect(&path)?,
    }
    socket.set_nonblocking(true)?;
    socket.send(report.as_bytes()).map(drop)
}
