//! The new process: what it gets from the one that serves, and when.

use std::env;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use kvs_txlog::Handed;
use kvs_txlog::file::Lock;
use rustix::net::sockopt::socket_peercred;
use rustix::process::{Signal, getpid, getuid, kill_process};
use tracing::info;

use super::channel::{Channel, Message};
use super::{ADMIN, CONTROL, LISTEN, LISTEN_ACTIVATED, LOG, PROTOCOL, READY, SERVING, VARIABLE, WHEN_PRIMARY};
use crate::edge::listener::{FileOwner, Listener};
use crate::follow::Followed;

/// Timeout of the first message, which is sent at once.
const TIMEOUT: Duration = Duration::from_secs(30);
/// Entries that may be missing when the old process is asked for the log: they are applied while no call is made.
const FEW: u64 = 2_000;

/// Names, for tests, the step at which a new process kills or stops itself: `kill:ready`, `stop:log`. Also in a release build,
/// which is what is tested. Read only in a process that a server starts for an upgrade, with its own environment.
const FAILPOINT: &str = "UPGRADE_FAILPOINT";

/// The listeners of the old process, and the channel to it.
pub struct Inherited {
    channel: Channel,
    /// Those of `--listen`, in their order.
    pub http: Vec<Listener>,
    pub admin: Option<Listener>,
    pub control: Option<UnixListener>,
    pub when_primary: Option<Listener>,
}

impl Inherited {
    /// Returns what the process that serves gives to this one. None where this one was started by anything else.
    pub fn receive() -> Result<Option<Self>> {
        if env::var_os(VARIABLE).is_none() {
            return Ok(None);
        }
        fail_at("start");
        let from = "the server that is to be upgraded";
        let socket = io::stdin().as_fd().try_clone_to_owned()?;
        let peer =
            socket_peercred(&socket).with_context(|| format!("{VARIABLE} is set, but not by {from}; unset it"))?;
        ensure!(peer.uid == getuid(), "{from} belongs to another user");
        let channel = Channel::new(socket);
        let first = channel.receive(Some(TIMEOUT)).with_context(|| format!("no message from {from}"))?;
        let Message { text, descriptors } = first.with_context(|| format!("{from} has ended"))?;
        let Some(names) = text.strip_prefix(PROTOCOL) else {
            bail!("{from} is of another version: it begins with {text:?}, not with {PROTOCOL:?}; restart it instead");
        };
        let mut inherited = Self { channel, http: Vec::new(), admin: None, control: None, when_primary: None };
        let listener = Listener::from_descriptor;
        for (name, descriptor) in names.split_whitespace().zip(descriptors) {
            match name {
                LISTEN => inherited.http.push(listener(descriptor, FileOwner::Server)?),
                LISTEN_ACTIVATED => inherited.http.push(listener(descriptor, FileOwner::ServiceManager)?),
                ADMIN => inherited.admin = Some(listener(descriptor, FileOwner::Server)?),
                CONTROL => inherited.control = Some(descriptor.into()),
                WHEN_PRIMARY => inherited.when_primary = Some(listener(descriptor, FileOwner::Server)?),
                _ => bail!("{from} gives a listener {name:?} that this version does not know; restart it instead"),
            }
        }
        Ok(Some(inherited))
    }

    /// Follows the log until this process is primary. Returns the socket at which the old process forwards requests; None if it
    /// has ended, so that the log was taken over as by any standby.
    pub async fn take_over(&self, followed: &Followed) -> Result<Option<UnixStream>> {
        followed.caught_up(FEW).await;
        fail_at("ready");
        self.channel.send(READY, &[]).context("cannot report to the server that is to be upgraded")?;
        let message = self.channel.received().await.context("cannot receive the log")?;
        let Some(Message { text, mut descriptors }) = message else {
            info!("the server that was to be upgraded has ended");
            followed.promoted().await;
            return Ok(None);
        };
        fail_at("log");
        let (Some(position), Some(socket)) = (text.strip_prefix(LOG), descriptors.pop()) else {
            bail!("the server that is to be upgraded sends {text:?} in place of the log");
        };
        let lock = <[OwnedFd; 2]>::try_from(descriptors).ok().map(Lock::from_descriptors);
        followed.receive(Handed { lock, position: position.to_owned() });
        followed.promoted().await;
        fail_at("promoted");
        Ok(Some(socket.into()))
    }

    /// Reports that this process serves. An old one that has ended need not know.
    pub fn serves(&self) {
        let _ = self.channel.send(SERVING, &[]);
        fail_at("serving");
    }
}

/// Ends or stops this process at the step that a test names.
fn fail_at(step: &str) {
    let Ok(failpoint) = env::var(FAILPOINT) else { return };
    let signal = match failpoint.split_once(':') {
        Some(("kill", at)) if at == step => Signal::KILL,
        Some(("stop", at)) if at == step => Signal::STOP,
        _ => return,
    };
    let _ = kill_process(getpid(), signal);
}
