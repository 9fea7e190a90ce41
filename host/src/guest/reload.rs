//! Swaps the guest for what its file holds now: on SIGHUP, and with `--watch` whenever the file changes.
//!
//! Must never know: how a swap is made.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use notify_debouncer_mini::notify::{RecommendedWatcher, RecursiveMode};
use notify_debouncer_mini::{DebounceEventResult, Debouncer, new_debouncer};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc::{Receiver, channel};
use tokio::task;
use tracing::{info, warn};

use super::source::{Digest, Source};
use super::swap::Swapper;

/// How long a file must be left alone: whoever writes it writes more than once.
const QUIET: Duration = Duration::from_millis(300);

pub struct Reload {
    file: Option<PathBuf>,
    hangup: Signal,
    changed: Receiver<()>,
    _watching: Option<Debouncer<RecommendedWatcher>>,
}

impl Reload {
    /// `file` is the guest that was named at the start. From here on SIGHUP does not end the process.
    pub fn new(file: Option<&Path>, watch: bool) -> Result<Self> {
        // One note is enough, however many changes there were.
        let (note, changed) = channel(1);
        let watching = file.filter(|_| watch).map(|file| {
            let path = file.to_owned();
            let changed = move |events: DebounceEventResult| {
                if events.is_ok_and(|events| events.iter().any(|event| event.path.file_name() == path.file_name())) {
                    let _ = note.try_send(());
                }
            };
            // The directory, since a file that is replaced is another one.
            let directory = file.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
            let mut watching = new_debouncer(QUIET, changed)?;
            watching.watcher().watch(directory, RecursiveMode::NonRecursive)?;
            Ok::<_, notify_debouncer_mini::notify::Error>(watching)
        });
        let watching = watching
            .transpose()
            .with_context(|| format!("cannot watch {}", file.unwrap_or(Path::new("")).display()))?;
        Ok(Self { file: file.map(Path::to_owned), hangup: signal(SignalKind::hangup())?, changed, _watching: watching })
    }

    pub async fn run(mut self, swapper: Arc<Swapper>) {
        loop {
            // Without a watcher nobody has a note to send.
            tokio::select! {
                _ = self.hangup.recv() => {}
                Some(()) = self.changed.recv() => {}
            }
            match &self.file {
                None => info!("told to read the guest again, but no file was named at the start"),
                Some(file) => reload(file.clone(), &swapper).await,
            }
        }
    }
}

async fn reload(file: PathBuf, swapper: &Arc<Swapper>) {
    let source = Source::File(file);
    let (from, serving) = (source.clone(), swapper.serving());
    let read = task::spawn_blocking(move || from.read()).await;
    match read.map_err(Into::into).flatten() {
        Err(error) => warn!("the guest cannot be read again from {source}: {error:#}"),
        Ok(component) if Digest::of(&component) == *serving.guest.digest() => {
            info!("the guest in {source} serves already")
        }
        Ok(component) => {
            info!("the guest in {source} is another now");
            // How it ended is told by the swap.
            let _ = swapper.swap(source, component, false).await;
        }
    }
}
