//! Swaps the guest for what its file holds now: on SIGHUP, and with `--watch-guest` whenever the file changes. A standby that
//! shares the data directory of its primary follows the guest that the primary serves.
//!
//! Must never know: how a swap is made.

use std::convert::Infallible;
use std::io;
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
    hangup: Listen,
    files: Files,
}

/// The files that are looked at.
#[derive(Clone)]
struct Files {
    named: Named,
    /// Of the file, when it is watched.
    changes: Option<Changes>,
    /// Of the files that decide which guest a standby serves.
    primary_changes: Option<Changes>,
    /// Whether this server followed its primary at the last look.
    followed: bool,
}

impl Files {
    /// Returns whether the guest is to be read again. `follows` is whether this server follows its primary, `differs` whether it
    /// serves another guest than that did.
    fn look(&mut self, follows: bool, differs: bool) -> bool {
        let has_taken_over = self.followed && !follows;
        self.followed = follows;
        if let Some(changes) = self.changes.as_mut().filter(|_| has_taken_over) {
            // What the primary did not serve is not swapped in by a takeover.
            changes.reading();
        }
        let is_changed = !follows && self.changes.as_mut().is_some_and(Changes::settled);
        // From then on the guest is this server's own: it is the one that the primary served, or the operator replaces it.
        self.named.primary = self.named.primary.take().filter(|_| follows || differs && !is_changed);
        match self.named.primary {
            Some(_) => self.primary_changes.as_mut().is_some_and(Changes::settled),
            None => is_changed,
        }
    }

    /// Returns the changes of the files that the guest is read from.
    fn changes(&mut self) -> Option<&mut Changes> {
        if self.named.primary.is_some() { self.primary_changes.as_mut() } else { self.changes.as_mut() }
    }
}

/// Where the guest comes from after the start.
#[derive(Clone)]
struct Named {
    file: Option<PathBuf>,
    /// The data directory of the primary, until this process has taken over and serves the same guest.
    primary: Option<PathBuf>,
}

/// A guest that could not be read: where it was to come from, and why.
struct Unread(String, anyhow::Error);

impl Named {
    fn source(&self) -> Result<Option<Source>> {
        Ok(match (&self.primary, &self.file) {
            // A primary of an older version records nothing.
            (Some(data), None) if source::recorded(data)?.is_none() => Some(Source::choose(None, data)),
            (Some(data), file) => Source::of_primary(file.as_deref(), data)?,
            (None, Some(file)) => Some(Source::File(file.clone())),
            (None, None) => {
                info!("SIGHUP: the guest is not read again, since no file was named at the start");
                None
            }
        })
    }
}

impl Reload {
    /// `file` is the guest that was named at the start, before it is read. A standby follows the guest of `primary`, the data
    /// directory that it shares. From here on SIGHUP does not end the process.
    pub fn new(file: Option<&Path>, watch: bool, primary: Option<&Path>) -> Result<Self> {
        let changes = file.filter(|_| watch).map(|file| Changes::of(vec![file.to_owned()]));
        let primary_changes = primary.map(|data| Changes::of(source::of_primary(file, data)));
        let named = Named { file: file.map(Path::to_owned), primary: primary.map(Path::to_owned) };
        let files = Files { named, changes, primary_changes, followed: false };
        Ok(Self { hangup: listen(SignalKind::hangup())?, files })
    }

    /// Starts the task that swaps the guest. Started again, it compares the file with what it was at the start: a guest
    /// that serves already is not swapped.
    pub fn start(self, swapper: Arc<Swapper>, env: &Env) -> Task {
        let Self { mut hangup, files } = self;
        env.tasks.restart("guest reload", &env.clock, move || {
            let (hangup, files, swapper) = (hangup(), files.clone(), Arc::clone(&swapper));
            async move { run(hangup?, files, swapper).await }
        })
    }
}

async fn run(mut hangup: Signal, mut files: Files, swapper: Arc<Swapper>) -> Result<Infallible> {
    let mut interval = interval(LOOK);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // Why the guest could not be read last.
    let mut failure = None;
    loop {
        let asked = tokio::select! {
            _ = hangup.recv() => true,
            _ = interval.tick() => false,
        };
        // A record that cannot be read may be that of another guest.
        let differs = !matches!(swapper.differs(), Ok(None));
        if !files.look(swapper.follows_primary(), differs) && !asked {
            continue;
        }
        if let Some(changes) = files.changes() {
            changes.reading();
        }
        let actor = Actor::cause(if asked { "SIGHUP" } else { "file" });
        let Err(Unread(source, error)) = reload(&files.named, &swapper, &actor).await else {
            failure = None;
            continue;
        };
        // The files may be well, and not change again.
        if let (Some(changes), true) = (files.changes(), error.is::<io::Error>()) {
            changes.unread();
        }
        let reason = Some(format!("{error:#}"));
        // Once, however often it is tried.
        if asked || failure != reason {
            audit::log(&actor, Steps::default().action(), &source, format_args!("{error:#}"));
            warn!("the guest cannot be read again from {source}: {error:#}");
        }
        failure = reason;
    }
}

async fn reload(named: &Named, swapper: &Arc<Swapper>, actor: &Actor) -> Result<(), Unread> {
    let mut waits = false;
    loop {
        let source = named.source().map_err(|error| Unread("the data directory of the primary".to_owned(), error))?;
        let Some(source) = source else { return Ok(()) };
        let (from, serving) = (source.clone(), swapper.serving());
        let read = task::spawn_blocking(move || from.read()).await;
        let component = match read.map_err(Into::into).flatten() {
            Err(error) => return Err(Unread(source.to_string(), error)),
            Ok(component) if Digest::of(&component) == *serving.guest.digest() => {
                info!("the guest in {source} serves already");
                return Ok(());
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
            Ok(_) | Err(_) => return Ok(()),
        }
        waits = true;
        sleep(LOOK).await;
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use tempfile::TempDir;

    use super::*;

    fn files(data: &TempDir) -> (Files, PathBuf) {
        let file = data.path().join("guest.wasm");
        fs::write(&file, "1").unwrap();
        let named = Named { file: Some(file.clone()), primary: Some(data.path().to_owned()) };
        let changes = Changes::of(vec![file.clone()]);
        let primary_changes = Changes::of(source::of_primary(Some(&file), data.path()));
        let files = Files { named, changes: Some(changes), primary_changes: Some(primary_changes), followed: false };
        (files, file)
    }

    /// Looks until the files can have settled.
    fn looks(files: &mut Files, follows: bool, differs: bool) -> bool {
        let changed = (0..3).any(|_| files.look(follows, differs));
        files.changes().unwrap().reading();
        changed
    }

    #[test]
    fn file_of_the_primary_is_not_swapped_in_by_a_takeover() {
        let data = TempDir::new().unwrap();
        let (mut files, file) = files(&data);
        assert!(!looks(&mut files, true, false));
        fs::write(&file, "22").unwrap();
        assert!(looks(&mut files, true, false), "a standby follows no change");
        assert!(!looks(&mut files, false, false), "it is swapped in by the takeover");
        fs::write(&file, "333").unwrap();
        assert!(looks(&mut files, false, false));
        assert!(matches!(files.named.source(), Ok(Some(Source::File(named))) if named == file));
    }

    #[test]
    fn file_that_changes_after_a_takeover_replaces_another_guest() {
        let data = TempDir::new().unwrap();
        let (mut files, file) = files(&data);
        assert!(!looks(&mut files, true, true));
        assert!(!looks(&mut files, false, true));
        assert!(files.named.primary.is_some(), "it waits for the guest that the primary served");
        fs::write(&file, "22").unwrap();
        assert!(looks(&mut files, false, true), "the file is not watched any more");
        assert!(matches!(files.named.source(), Ok(Some(Source::File(named))) if named == file));
    }

    #[test]
    fn file_that_changes_during_the_start_of_a_primary_is_read() {
        let data = TempDir::new().unwrap();
        let (mut files, file) = files(&data);
        fs::write(&file, "22").unwrap();
        assert!(looks(&mut files, false, false));
    }
}
