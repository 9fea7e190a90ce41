//! The service manager: reports of the state of this process, and listeners that systemd has opened for it.

use std::net::TcpListener;
use std::os::fd::AsFd;

use anyhow::{Context, Result};
use listenfd::ListenFd;
use rustix::io::{FdFlags, fcntl_setfd};
use sd_notify::NotifyState;
use tracing::warn;

/// Listeners of socket activation, in the order of the socket unit: the HTTP listener, and the admin listener.
#[derive(Default)]
pub struct Activated {
    pub listener: Option<TcpListener>,
    pub admin: Option<TcpListener>,
}

impl Activated {
    /// Takes the listeners that this process was started with, once.
    pub fn take() -> Result<Self> {
        let mut given = ListenFd::from_env();
        let mut take = |index| -> Result<_> {
            if index >= given.len() {
                return Ok(None);
            }
            let listener = given.take_tcp_listener(index);
            let listener = listener.context("LISTEN_FDS: only TCP listeners can be served; see the socket unit")?;
            if let Some(listener) = &listener {
                listener.set_nonblocking(true)?;
                // An upgrade passes the listener itself.
                fcntl_setfd(listener.as_fd(), FdFlags::CLOEXEC)?;
            }
            Ok(listener)
        };
        Ok(Self { listener: take(0)?, admin: take(1)? })
    }
}

/// Reports that this process serves, and is the main one of its service.
pub fn ready() {
    notify(&[NotifyState::Ready, NotifyState::MainPid(std::process::id())]);
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

/// Does nothing where there is no NOTIFY_SOCKET.
fn notify(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        warn!("cannot report to the service manager: {error}");
    }
}
