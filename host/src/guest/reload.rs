//! Swaps the guest for what its file holds now: on SIGHUP, and with `--watch-guest` whenever the file changes. A standby that
//! shares the data directory of its primary follows the file in which that remembers its guest.
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
}

/// Where the guest comes from after the start.
#[derive(Clone)]
enum Named {
    Nowhere,
    File(PathBuf),
    /// The data directory of the primary.
    ByPrimary(PathBuf),
}

impl Named {
    fn source(&self) -> Option<Source> {
        match self {
            Self::Nowhere => None,
            Self::File(file) => Some(Source::File(file.clone())),
            Self::ByPrimary(data) => Some(Source::choose(None, data)),
        }
    }
}

impl Reload {
    /// `file` is the guest that was named at the start, before it is read. Where none was, a standby follows that of `primary`,
    /// the data directory that it shares. From here on SIGHUP does not end the process.
    pub fn new(file: Option<&Path>, watch: bool, primary: Option<&Path>) -> Result<Self> {
        let (named, watched) = match (file, primary) {
            (Some(file), _) => (Named::File(file.to_owned()), watch.then(|| file.to_owned())),
            (None, Some(data)) => (Named::ByPrimary(data.to_owned()), Some(source::remembered(data))),
            (None, None) => (Named::Nowhere, None),
        };
        let changes = watched.map(|file| Changes::of(vec![file]));
        Ok(Self { named, hangup: listen(SignalKind::hangup())?, changes })
    }

    /// Starts the task that swaps the guest. Started again, it compares the file with what it was at the start: a guest
    /// that serves already is not swapped.
    pub fn start(self, swapper: Arc<Swapper>, env: &Env) -> Task {
        let Self { named, mut hangup, changes } = self;
        env.tasks.restart("guest reload", &env.clock, move || {
            let (hangup, named, changes, swapper) = (hangup(), named.clone(), changes.clone(), Arc::clone(&swapper));
            async move { run(hangup?, named, changes, swapper).await }
        })
    }
}

async fn run(
    mut hangup: Signal,
    named: Named,
    mut changes: Option<Changes>,
    swapper: Arc<Swapper>,
) -> Result<Infallible> {
    let mut interval = interval(LOOK);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let asked = tokio::select! {
            _ = hangup.recv() => true,
            _ = interval.tick() => false,
        };
        if !asked && !changes.as_mut().is_some_and(Changes::settled) {
            continue;
        }
        if let Some(changes) = &mut changes {
            changes.reading();
        }
        reload(&named, &swapper, Actor::cause(if asked { "SIGHUP" } else { "file" })).await;
    }
}

async fn reload(named: &Named, swapper: &Arc<Swapper>, actor: Actor) {
    let mut waits = false;
    loop {
        let Some(source) = named.source() else {
            return info!("SIGHUP: the guest is not read again, since no file was named at the start");
        };
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
