//! Swaps the guest for what its file holds now: on SIGHUP, and with `--watch-guest` whenever the file changes.
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

use super::source::{Digest, Source};
use super::swap::{SwapError, Swapper};
use crate::changes::{Changes, LOOK};
use crate::signals::{Listen, listen};

pub struct Reload {
    file: Option<PathBuf>,
    hangup: Listen,
    /// Of the file, when it is watched.
    changes: Option<Changes>,
}

impl Reload {
    /// `file` is the guest that was named at the start, before it is read. From here on SIGHUP does not end the process.
    pub fn new(file: Option<&Path>, watch: bool) -> Result<Self> {
        let file = file.map(Path::to_owned);
        let changes = file.clone().filter(|_| watch).map(|file| Changes::of(vec![file]));
        Ok(Self { file, hangup: listen(SignalKind::hangup())?, changes })
    }

    /// Starts the task that swaps the guest. Started again, it compares the file with what it was at the start: a guest
    /// that serves already is not swapped.
    pub fn start(self, swapper: Arc<Swapper>, env: &Env) -> Task {
        let Self { file, mut hangup, changes } = self;
        env.tasks.restart("guest reload", &env.clock, move || {
            let (hangup, file, changes, swapper) = (hangup(), file.clone(), changes.clone(), Arc::clone(&swapper));
            async move { run(hangup?, file, changes, swapper).await }
        })
    }
}

async fn run(
    mut hangup: Signal,
    file: Option<PathBuf>,
    mut changes: Option<Changes>,
    swapper: Arc<Swapper>,
) -> Result<Infallible> {
    let mut interval = interval(LOOK);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let told = tokio::select! {
            _ = hangup.recv() => true,
            _ = interval.tick() => false,
        };
        if !told && !changes.as_mut().is_some_and(Changes::settled) {
            continue;
        }
        if let Some(changes) = &mut changes {
            changes.reading();
        }
        match &file {
            None => info!("told to read the guest again, but no file was named at the start"),
            Some(file) => reload(file.clone(), &swapper).await,
        }
    }
}

async fn reload(file: PathBuf, swapper: &Arc<Swapper>) {
    let source = Source::File(file);
    let mut waits = false;
    loop {
        let (from, serving) = (source.clone(), swapper.serving());
        let read = task::spawn_blocking(move || from.read()).await;
        let component = match read.map_err(Into::into).flatten() {
            Err(error) => return warn!("the guest cannot be read again from {source}: {error:#}"),
            Ok(component) if Digest::of(&component) == *serving.guest.digest() => {
                return info!("the guest in {source} serves already");
            }
            Ok(component) => component,
        };
        if !waits {
            info!("the guest in {source} is another now");
        }
        match swapper.swap(source.clone(), component, false).await {
            Err(SwapError::Busy) if waits => {}
            Err(SwapError::Busy) => info!("another swap is under way; the guest in {source} comes after it"),
            // How it ended is told by the swap.
            Ok(_) | Err(_) => return,
        }
        waits = true;
        sleep(LOOK).await;
    }
}
