//! The server that is upgraded: it starts the new process, gives it what it has, and continues where the new one fails.

use std::convert::Infallible;
use std::env;
use std::net::TcpListener as StdListener;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use anyhow::{Context, Error, Result, anyhow, bail, ensure};
use kvs_runtime::Env;
use kvs_txlog::change_feed::ChangeFeed;
use kvs_txlog::{Condition, HandOver, TransactionLog};
use tokio::signal::unix::Signal;
use tokio::sync::{oneshot, watch};
use tokio::task;
use tokio::time::timeout;
use tracing::{error, info, warn};

use super::channel::{Channel, Message};
use super::{
    ADMIN, CONTROL, Control, LISTEN, LISTEN_ACTIVATED, LOG, PROTOCOL, READY, SERVING, Upgraded, VARIABLE, WHEN_PRIMARY,
};
use crate::admin::ReadOnly;
use crate::audit::{self, Actor};
use crate::edge::Successor;
use crate::edge::listener::{FileOwner, Listener};
use crate::follow::Followed;
use crate::guest::{Paused, Shards, Swapper};
use crate::memory;
use crate::signals::Listen;
use crate::systemd;

/// Timeout of the start of a new process, when it is asked for by a signal.
const START_TIMEOUT: Duration = Duration::from_secs(600);
/// Timeout of each step in which no call is made: requests wait meanwhile.
const PAUSE_TIMEOUT: Duration = Duration::from_secs(10);
/// Timeout for all processes of a failed upgrade to be gone, after the new one was killed.
const END_TIMEOUT: Duration = Duration::from_secs(5);

/// The listeners that the new process gets.
pub struct Listeners {
    /// In the order of the flags. Gone when the server no longer accepts connections.
    pub http: Vec<Weak<Listener>>,
    pub admin: StdListener,
    pub control: Arc<Control>,
    pub when_primary: Box<dyn Fn() -> Option<Arc<Listener>> + Send + Sync>,
}

/// What is handed over, and the switch that ends this process when it was.
pub struct Upgrader {
    pub shards: Arc<Shards>,
    pub swapper: Arc<Swapper>,
    pub read_only: Arc<ReadOnly>,
    pub changes: Arc<ChangeFeed>,
    /// None where it is only looked at.
    pub log: Option<Arc<dyn HandOver>>,
    pub listeners: Listeners,
    pub successor: Arc<OnceLock<Successor>>,
    /// Set when another process serves.
    pub handed_over: watch::Sender<bool>,
    pub stop: watch::Receiver<bool>,
    /// Held during an upgrade.
    pub alone: tokio::sync::Mutex<()>,
    /// Held for reading until the outcome of an upgrade is sent to its caller.
    pub answering: tokio::sync::RwLock<()>,
}

/// The new process, until it serves or has ended.
struct NewProcess(Child);

impl NewProcess {
    /// Starts `binary` with the flags of this process. `channel` becomes its standard input.
    fn start(binary: &Path, channel: OwnedFd) -> Result<Self> {
        let mut command = Command::new(binary);
        command.args(env::args_os().skip(1)).env(VARIABLE, std::process::id().to_string()).stdin(channel);
        let child = command.spawn().with_context(|| format!("cannot start {}", binary.display()))?;
        Ok(Self(child))
    }

    /// Kills it, and waits for its end. It is a child, so its number means no other process before that.
    fn end(&mut self) -> String {
        // An error means that it has ended.
        let _ = self.0.kill();
        // The kernel frees its memory first, gigabytes for many keys.
        let ended = task::block_in_place(|| self.0.wait());
        ended.map_or_else(|error| error.to_string(), |status| status.to_string())
    }
}

impl Upgrader {
    pub fn env(&self) -> &Env {
        self.shards.env()
    }

    /// Starts to accept requests for an upgrade: by signal, and at the control socket once this process is primary. One that
    /// only looks at the log may share the data directory with a primary.
    pub fn start(self: Arc<Self>, mut signal: Listen, followed: Option<Arc<Followed>>) {
        let Env { tasks, clock, .. } = self.env();
        let upgrader = Arc::clone(&self);
        tasks.restart("upgrade signal", clock, move || {
            let (signal, upgrader) = (signal(), Arc::clone(&upgrader));
            async move { upgrader.heed(signal?).await }
        });
        let upgrader = Arc::clone(&self);
        if self.log.is_none() {
            return;
        }
        tasks.restart("upgrade requests", clock, move || {
            let (upgrader, followed) = (Arc::clone(&upgrader), followed.clone());
            async move {
                if let Some(followed) = followed {
                    followed.promoted().await;
                }
                let control = Arc::clone(&upgrader.listeners.control);
                control.serve(upgrader).await
            }
        });
    }

    async fn heed(self: Arc<Self>, mut signal: Signal) -> Result<Infallible> {
        loop {
            signal.recv().await;
            // The outcome is logged.
            let _ = self.upgrade(None, START_TIMEOUT, Actor::cause("SIGUSR2")).await;
        }
    }

    /// Replaces this process by `binary`, or by the one at the path that this one was started by. Continues to its end whether or
    /// not anybody waits for it. `timeout` is that of the start of the new process.
    pub async fn upgrade(
        self: &Arc<Self>,
        binary: Option<PathBuf>,
        timeout: Duration,
        actor: Actor,
    ) -> Result<Upgraded> {
        let me = Arc::clone(self);
        let binary = binary
            .or_else(|| env::args_os().next().map(PathBuf::from))
            .context("the path of the binary is unknown; give it with --binary")?;
        let (done, outcome) = oneshot::channel();
        self.env().tasks.detach("upgrade", async move {
            let alone = me.alone.try_lock().ok();
            let outcome = if alone.is_some() {
                me.steps(&binary, timeout).await
            } else {
                Err(anyhow!("another upgrade is in progress"))
            };
            let result = outcome.as_ref().map_or_else(|error| format!("{error:#}"), |_| "success".to_owned());
            audit::log(&actor, "upgrade", binary.display(), &result);
            let (outcome, stays) = match outcome {
                Ok(Upgraded { process, pause }) => {
                    info!(?pause, "process {process} serves in place of this one");
                    systemd::replaced_by(me.env(), process);
                    me.handed_over.send_replace(true);
                    (Ok(Upgraded { process, pause }), false)
                }
                Err(error) => {
                    let serves = !*me.handed_over.borrow() && me.changes.watermark().failure().is_none();
                    // The service manager waits for the upgrade that is in progress, if this is another one.
                    if alone.is_some() && serves {
                        systemd::ready(me.env());
                    }
                    let failed = if serves { "not upgraded, the server continues to serve" } else { "not upgraded" };
                    let error = error.context(failed);
                    warn!("{error:#}");
                    (Err(error), serves)
                }
            };
            // Not before the outcome is known: a server that stops removes its sockets unless they are those of the new process.
            let alone = alone.filter(|_| !stays);
            // The caller may have left.
            let _ = done.send(outcome);
            systemd::reported(&me.env().clock).await;
            // From here on this process may end.
            drop(alone);
        });
        outcome.await.context("the upgrade ended half-way")?
    }

    async fn steps(&self, binary: &Path, timeout: Duration) -> Result<Upgraded> {
        ensure!(!*self.handed_over.borrow(), "another process serves already; ask again");
        let log = self.log.as_ref().context("a server with --read-only has no log to hand over; restart it instead")?;
        if let Some(reason) = log.read_only() {
            bail!("{reason}; restart this server instead");
        }
        ensure!(
            std::process::id() != 1,
            "this is process 1 of a container, which ends with it; start the new version with --standby on the same data \
             directory, and stop this server"
        );
        if let Condition::But(down) | Condition::Unfit(down) = self.shards.condition() {
            bail!("{down}; upgrade when it is rebuilt, or restart this server");
        }
        let no_swaps = self.swapper.hold().context("a swap is in progress; upgrade when its probation has ended")?;
        // The new process serves the guest that serves here, which is not the one on record after some takeovers.
        task::block_in_place(|| self.swapper.record());
        let no_spares = self.shards.make_room(memory::size()).await?;

        let (channel, theirs) = Channel::pair()?;
        let mut new = NewProcess::start(binary, theirs)?;
        let process = new.0.id();
        info!(process, binary = %binary.display(), "upgrade: the new process is started");
        systemd::reloading(self.env());
        let mut stop = self.stop.clone();
        let ready = tokio::select! {
            ready = self.is_ready(&channel, timeout) => ready,
            _ = stop.wait_for(|stop| *stop) => Err(anyhow!("this server is stopping")),
            reason = log.watermark().latched() => Err(anyhow!(reason)),
        };
        let begun = self.env().clock.now();
        let switched = match ready {
            Ok(()) => self.switch(&**log, &channel, &mut new).await,
            Err(error) => Err(error),
        };
        let pause = self.env().clock.elapsed(begun);
        let (paused, successor) = match switched {
            Ok(switched) => switched,
            Err(error) if log.watermark().failure().is_some() => {
                // This process ends. The new one finds the channel closed, and takes over as any standby, if it has not ended.
                systemd::replaced_by(self.env(), process);
                return Err(error);
            }
            // It may have ended already.
            Err(error) => return Err(error.context(format!("the new process failed, {}", new.end()))),
        };
        // Set once: the next process does the next upgrade.
        let _ = self.successor.set(successor);
        paused.hand_over();
        self.changes.end();
        // What is handed over takes no swap and builds no spares.
        std::mem::forget((no_swaps, no_spares));
        Ok(Upgraded { process, pause })
    }

    /// Gives the new process the listeners, and waits until it has caught up with the log.
    async fn is_ready(&self, channel: &Channel, timeout: Duration) -> Result<()> {
        let Listeners { http, admin, control, when_primary } = &self.listeners;
        let http: Option<Vec<_>> = http.iter().map(Weak::upgrade).collect();
        let http = http.context("this server is stopping")?;
        let (control, when_primary) = (control.listener(), when_primary());
        let name = |listener: &Listener| match listener {
            Listener::Unix(_, FileOwner::ServiceManager) => LISTEN_ACTIVATED,
            Listener::Unix(_, FileOwner::Server) | Listener::Tcp(_) => LISTEN,
        };
        let mut named: Vec<(&str, BorrowedFd<'_>)> =
            http.iter().map(|listener| (name(listener), listener.as_fd())).collect();
        named.push((ADMIN, admin.as_fd()));
        named.extend(control.map(|control| (CONTROL, control.as_fd())));
        named.extend(when_primary.as_ref().map(|when_primary| (WHEN_PRIMARY, when_primary.as_fd())));
        let (names, descriptors): (Vec<_>, Vec<_>) = named.into_iter().unzip();
        channel.send(&format!("{PROTOCOL} {}", names.join(" ")), &descriptors)?;
        expect(channel, READY, timeout).await
    }

    /// Stops making calls, closes the log, and waits until the new process serves. An error leaves this process serving, unless
    /// its log has failed.
    async fn switch(&self, log: &dyn HandOver, channel: &Channel, new: &mut NewProcess) -> Result<(Paused, Successor)> {
        let (ours, theirs) = UnixStream::pair()?;
        let successor = Successor::connect(ours, &self.env().tasks).await?;
        let begun = self.env().clock.now();
        // Makes calls again when it is dropped.
        let paused = timeout(PAUSE_TIMEOUT, self.shards.pause()).await.context("a call takes too long")??;
        let durable = timeout(PAUSE_TIMEOUT, log.watermark().reached(log.appended())).await;
        durable.context("the log is not durable in time")??;
        let appended = log.appended();
        // The new process reads the state before it serves.
        task::block_in_place(|| self.read_only.hold());
        // From here on, only this process or the new one may have the log open.
        let handed = match task::block_in_place(|| log.hand_over()) {
            Ok(handed) => handed,
            Err(error) if log.watermark().failure().is_some() => return Err(fail(log, "closed", error)),
            Err(error) => {
                self.resume_switch(log)?;
                return Err(error.context("the log cannot be closed for an upgrade"));
            }
        };
        let sent = {
            let lock = handed.lock.iter().flat_map(|lock| lock.descriptors());
            let descriptors: Vec<_> = lock.chain([theirs.as_fd()]).collect();
            channel.send(&format!("{LOG}{}", handed.position), &descriptors)
        };
        let serves = match sent {
            Ok(()) => expect(channel, SERVING, PAUSE_TIMEOUT).await,
            Err(error) => Err(error.into()),
        };
        let Err(error) = serves else { return Ok((paused, successor)) };
        let status = new.end();
        // A program that started the new process as its own child leaves it running. That has the log now.
        if !is_closed(channel).await {
            let error = anyhow!("a child of the new process still runs, and has the log");
            return Err(fail(log, "taken back", error));
        }
        warn!("upgrade: the new process failed after it was given the log, {status}; taking the log back");
        // What the new one has accepted is published to nobody. Watches resume with it.
        self.changes.dismiss();
        task::block_in_place(|| log.take_back(handed)).map_err(|error| fail(log, "taken back", error))?;
        // The new one may have recorded its own, which standbys would follow.
        task::block_in_place(|| self.swapper.record());
        self.resume_switch(log)?;
        if log.appended() != appended {
            // The new process has served for a moment.
            paused.rebuild();
        }
        let took = self.env().clock.elapsed(begun);
        Err(error.context(format!("no call was made for {took:.0?}")))
    }

    /// Continues with the state of the read-only switch, which the new process may have changed.
    fn resume_switch(&self, log: &dyn HandOver) -> Result<()> {
        let resumed = task::block_in_place(|| self.read_only.resume());
        resumed.map_err(|error| fail(log, "taken back", error))
    }
}

/// Fails the log: this process ends. Its lock is free, for the new process or for the next start.
fn fail(log: &dyn HandOver, done: &str, error: Error) -> Error {
    let error = error.context(format!("the log cannot be {done} for an upgrade"));
    error!("{error:#}");
    log.watermark().latch(format!("{error:#}"));
    error
}

/// Whether nobody has the other end of the channel any more.
async fn is_closed(channel: &Channel) -> bool {
    loop {
        match timeout(END_TIMEOUT, channel.received()).await {
            Ok(Ok(Some(_))) => {}
            Ok(Ok(None)) => return true,
            Ok(Err(_)) | Err(_) => return false,
        }
    }
}

/// Waits for a message of the new process.
async fn expect(channel: &Channel, expected: &str, time: Duration) -> Result<()> {
    let Ok(received) = timeout(time, channel.received()).await else {
        bail!("it did not report {expected:?} within {time:.0?}");
    };
    match received? {
        Some(Message { text, .. }) if text == expected => Ok(()),
        Some(Message { text, .. }) => bail!("it reports {text:?} in place of {expected:?}"),
        None => bail!("it ended before it reported {expected:?}; its log lines have the reason"),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use tokio::runtime::Builder;

    use super::*;

    #[test]
    fn message_is_received_while_all_blocking_threads_are_busy() {
        let runtime = Builder::new_current_thread().enable_all().max_blocking_threads(1).build().unwrap();
        let (ours, theirs) = Channel::pair().unwrap();
        let (end, ended) = mpsc::channel::<()>();
        let busy = runtime.spawn_blocking(move || ended.recv());
        Channel::new(theirs).send(SERVING, &[]).unwrap();
        runtime.block_on(expect(&ours, SERVING, Duration::from_secs(10))).unwrap();
        let error = runtime.block_on(expect(&ours, SERVING, Duration::from_secs(10))).unwrap_err();
        assert!(error.to_string().starts_with("it ended before"), "{error:#}");
        drop(end);
        runtime.block_on(busy).unwrap().unwrap_err();
    }
}
