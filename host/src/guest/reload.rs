//! Swaps the guest for what its file holds now: on SIGHUP, and with `--watch-guest` whenever the file changes. A standby that
//! shares the data directory of its primary follows the guest that the primary serves.
//!
//! Must never know: how a swap is made.

use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Result;
use kvs_runtime::{Env, Task};
use tokio::signal::unix::{Signal, SignalKind};
use tokio::task;
use tokio::time::{MissedTickBehavior, interval, sleep};
use tracing::{info, warn};

use super::source::{self, Digest, Source};
use super::swap::{Steps, SwapError, Swapper};
use crate::audit::{self, Actor};
use crate::changes::{Changes, LOOK};
use crate::signals::{Listen, listen};

pub struct Reload {
    named: Named,
    hangup: Listen,
    /// Of the file, when it is watched.
    changes: Option<Changes>,
    /// Of the files that decide which guest a standby serves.
    primary_changes: Option<Changes>,
}

/// Where the guest comes from after the start.
#[derive(Clone)]
struct Named {
    file: Option<PathBuf>,
    /// The data directory of the primary, until this process has taken over and serves the same guest.
    primary: Option<PathBuf>,
}

impl Named {
    fn source(&self) -> Option<Source> {
        match (&self.primary, &self.file) {
            // A primary of an older version records nothing.
            (Some(data), None) if source::recorded(data).is_none() => Some(Source::choose(None, data)),
            (Some(data), file) => Source::of_primary(file.as_deref(), data),
            (None, Some(file)) => Some(Source::File(file.clone())),
            (None, None) => {
                info!("SIGHUP: the guest is not read again, since no file was named at the start");
                None
            }
        }
    }
}

impl Reload {
    /// `file` is the guest that was named at the start, before it is read. A standby follows the guest of `primary`, the data
    /// directory that it shares. From here on SIGHUP does not end the process.
    pub fn new(file: Option<&Path>, watch: bool, primary: Option<&Path>) -> Result<Self> {
        let changes = file.filter(|_| watch).map(|file| Changes::of(vec![file.to_owned()]));
        let primary_changes = primary.map(|data| Changes::of(source::of_primary(file, data)));
        let named = Named { file: file.map(Path::to_owned), primary: primary.map(Path::to_owned) };
        Ok(Self { named, hangup: listen(SignalKind::hangup())?, changes, primary_changes })
    }

    /// Starts the task that swaps the guest. Started again, it compares the file with what it was at the start: a guest
    /// that serves already is not swapped.
    pub fn start(self, swapper: Arc<Swapper>, env: &Env) -> Task {
        let Self { named, mut hangup, changes, primary_changes } = self;
        env.tasks.restart("guest reload", &env.clock, move || {
            let (hangup, named, swapper) = (hangup(), named.clone(), Arc::clone(&swapper));
            let changes = (changes.clone(), primary_changes.clone());
            async move { run(hangup?, named, changes, swapper).await }
        })
    }
}

async fn run(
    mut hangup: Signal,
    mut named: Named,
    (mut changes, mut primary_changes): (Option<Changes>, Option<Changes>),
    swapper: Arc<Swapper>,
) -> Result<Infallible> {
    let mut interval = interval(LOOK);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let asked = tokio::select! {
            _ = hangup.recv() => true,
            _ = interval.tick() => false,
        };
        // After a takeover the guest is this server's own, once it is the one that the primary served.
        named.primary = named.primary.take().filter(|_| swapper.follows_primary() || swapper.differs().is_some());
        let changes = if named.primary.is_some() { &mut primary_changes } else { &mut changes };
        if !asked && !changes.as_mut().is_some_and(Changes::settled) {
            continue;
        }
        if let Some(changes) = changes {
            changes.reading();
        }
        reload(&named, &swapper, Actor::cause(if asked { "SIGHUP" } else { "file" })).await;
    }
}

async fn reload(named: &Named, swapper: &Arc<Swapper>, actor: Actor) {
    let mut waits = false;
    loop {
        let Some(source) = named.source() else { return };
        let (from, serving) = (source.clone(), swapper.serving());
        let read = task::spawn_blocking(move || from.read()).await;
        let component = match read.map_err(Into::into).flatten() {
            Err(error) => {
                audit::log(&actor, Steps::default().action(), &source, format_args!("{error:#}"));
                return warn!("the guest cannot be read again from {source}: {error:#}");
            }
            Ok(component) if Digest::of(&component) == *serving.guest.digest() => {
                return info!("the guest in {source} serves already");
            }
            Ok(component) => component,
        };
        if !waits {
            info!("the guest file {source} has changed");
        }
        match swapper.swap(source.clone(), component, Steps::default(), actor.clone()).await {
            Err(SwapError::Busy) if waits => {}
            Err(SwapError::Busy) => info!("another swap is in progress; the guest in {source} comes after it"),
            // The swap reports how it ended.
            Ok(_) | Err(_) => return,
        }
        waits = true;
        sleep(LOOK).await;
    }
}
