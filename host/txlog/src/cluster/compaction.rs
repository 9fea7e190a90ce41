//! Compaction: makes a snapshot of the log, and lets the engine drop the frames that it replaces.
//!
//! The order makes a crash harmless at each step: the snapshot is written, read back and verified, and only then are frames
//! dropped. A server keeps the snapshot before it, and the frames since that one, so that a reader need not begin again. A
//! run that fails drops its own snapshot; what a killed one leaves is not complete, and is dropped by a later run.
//!
//! A run is due when the log has grown by as much as the newest snapshot takes, and by [`MIN_BYTES`] at least. So the engine
//! holds at most about four times the live entries, and twice [`MIN_BYTES`].
//!
//! Owns: when and how far. Must never know: which snapshot a replay uses.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use bytes::Bytes;
use kvs_runtime::Env;
use tracing::{info, warn};

use super::Shared;
use super::frame::{Kind, Snapshot, Tip, decoded, is_mutant};
use super::liveness::{Analysis, Dropped};
use super::puts::Puts;
use super::reader::{Failure, Read};
use super::snapshot::Scan;
use crate::file::entry;
use crate::file::packer::Packer;
use crate::remote::queue::End;

/// Minimum growth of the log between two runs.
pub const MIN_BYTES: u64 = 64 << 20;
/// Interval of the check whether a run is due, and delay after a failed one.
const POLL_INTERVAL: Duration = Duration::from_secs(10);
const RETRY_DELAY: Duration = Duration::from_secs(60);
/// Frames at the end of the log that no snapshot replaces: a start needs the last ones.
const KEPT_FRAMES: u64 = 8;
/// Size of the table of keys.
const KEYS: usize = 800_000;
/// Grace period after the expiry of an entry: clocks differ.
const EXPIRY_GRACE: Duration = Duration::from_secs(3600);
/// Idle time of a run in a server as a multiple of its work, and the longest pause.
const IDLE_RATIO: u32 = 3;
const MAX_IDLE: Duration = Duration::from_millis(100);
/// Maximum time without a frame that must be there.
const PATIENCE: Duration = Duration::from_secs(30);
const READ_DELAY: Duration = Duration::from_millis(100);
/// Size of a frame of a snapshot, unless one entry is larger.
const FRAME_BYTES: u64 = 1 << 20;

/// Result of a run.
#[derive(Clone, Copy, Debug)]
pub struct Outcome {
    /// Number of entries in the snapshot, and the newest sequence that it replaces.
    pub entries: u64,
    pub sequence: u64,
    /// Bytes of the log and of the snapshot in the engine.
    pub log_bytes: u64,
    pub snapshot_bytes: u64,
}

/// Who compacts.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Manner {
    /// The primary, beside its writes.
    Server,
    /// An operator, at once and as far as possible.
    Command,
}

/// Compaction task: compacts whenever a run is due, as long as this process is primary.
pub(super) async fn run(shared: Arc<Shared>) -> Result<()> {
    let (mut before, mut snapshot) = (0, 0);
    // A process that handed the log over may get it back.
    while matches!(shared.queue.ended(), None | Some(End::HandedOver)) {
        shared.env.clock.sleep(POLL_INTERVAL).await;
        if !shared.queue.begun() || shared.queue.ended().is_some() {
            continue;
        }
        let bytes = shared.bytes();
        // What is left by the run of a former primary is no reason for another one.
        if (before, snapshot) == (0, 0)
            && let Some(known) = shared.snapshot()
            && let Ok(ends) = shared.engine.snapshot(known.tip.position).ends().await
        {
            (before, snapshot) = (ends.bytes, ends.bytes);
        }
        before = bytes.min(before);
        if bytes - before < shared.compaction_bytes.max(snapshot) {
            // Also after `kvs txlog compact` has made room.
            shared.set_compaction_failure(None);
            continue;
        }
        match compact(&shared, Manner::Server).await {
            Ok(Some(outcome)) => {
                info!("compacted the log: {} entries up to sequence {} remain", outcome.entries, outcome.sequence);
                (before, snapshot) = (outcome.log_bytes, outcome.snapshot_bytes);
                shared.set_compaction_failure(None);
            }
            // Everything is retained: the next run is due when the log has grown.
            Ok(None) => {
                before = bytes;
                shared.set_compaction_failure(None);
            }
            Err(_) if shared.queue.ended().is_some() => {}
            // The log is whole, only larger than necessary.
            Err(error) => {
                warn!("compaction of the log failed, retrying in {RETRY_DELAY:?}: {error:#}");
                shared.set_compaction_failure(Some(format!("{error:#}")));
                shared.env.clock.sleep(RETRY_DELAY).await;
            }
        }
    }
    Ok(())
}

/// Compacts the log. Returns None if nothing is new since the last run.
pub(super) async fn compact(shared: &Shared, manner: Manner) -> Result<Option<Outcome>> {
    let positions = shared.engine.snapshots().await.map_err(Failure::from)?;
    let previous = shared.find_snapshot().await?;
    let begin = previous.as_ref().map_or(0, |previous| previous.tip.position);
    let mut position = shared.mark().position.saturating_sub(KEPT_FRAMES);
    // One that is not complete can be of another process that writes it now.
    while positions.contains(&position) {
        position -= 1;
    }
    if position <= begin {
        return Ok(None);
    }
    let retain_from = match manner {
        Manner::Server if !shared.retain.is_zero() => {
            shared.env.clock.steady_ms().saturating_sub(u64::try_from(shared.retain.as_millis())?)
        }
        _ => u64::MAX,
    };
    let mut prefix = Prefix { shared, previous: previous.as_ref(), position, retain_from, manner };
    if is_mutant("DroppedBeforeSnapshot") {
        shared.engine.drop_until(position).await.map_err(Failure::from)?;
    }
    let dropped = prefix.analyse().await?;
    let position = prefix.position;
    if position <= begin {
        return Ok(None);
    }
    // That of another run is an error, and stays.
    shared.engine.make_snapshot(position, shared.env.random.uuid()?).await.map_err(Failure::from)?;
    let (snapshot, entries) = match fill(&prefix, &dropped).await {
        Ok(filled) => filled,
        Err(error) => {
            // Nothing else uses it. It takes space, which may be what was missing, and what was not verified must not be used.
            let _ = shared.engine.drop_snapshot(position).await;
            return Err(error);
        }
    };
    shared.set_snapshot(snapshot.clone());
    let kept = if manner == Manner::Server { begin } else { position };
    let end = if is_mutant("DroppedBeyondSnapshot") { position + 1 } else { kept };
    shared.engine.drop_until(end).await.map_err(Failure::from)?;
    for older in positions.into_iter().filter(|older| *older < position && *older != kept) {
        shared.engine.drop_snapshot(older).await.map_err(Failure::from)?;
    }
    shared.metrics.compactions.add(1);
    let snapshot_bytes = shared.engine.snapshot(position).ends().await.map_err(Failure::from)?.bytes;
    Ok(Some(Outcome { entries, sequence: snapshot.newest(), log_bytes: shared.ends().await?.bytes, snapshot_bytes }))
}

/// Writes the snapshot of a prefix, and verifies it. Returns it and the number of its entries.
async fn fill(prefix: &Prefix<'_>, dropped: &Dropped) -> Result<(Snapshot, u64)> {
    let shared = prefix.shared;
    let (snapshot, entries) = prefix.write(dropped).await?;
    let written = verify(shared, &snapshot).await?;
    ensure!(written == entries, "the snapshot has {written} entries, but {entries} were written to it");
    Ok((snapshot, entries))
}

/// Reads a snapshot back, and returns the number of its entries.
async fn verify(shared: &Shared, snapshot: &Snapshot) -> Result<u64> {
    ensure!(
        shared.read_snapshot(snapshot.tip.position).await?.as_ref() == Some(snapshot),
        "the snapshot cannot be read back"
    );
    let (mut scan, mut entries) = (Scan::from_snapshot(shared, Some(snapshot)), 0);
    while scan.tip().is_none() {
        for frame in next(shared, &mut scan).await?.1 {
            entries += decoded(shared.log, &frame.bytes).map_or(0, |frame| u64::from(frame.head.count));
        }
    }
    Ok(entries)
}

/// Reads the next frames, which must be there.
async fn next(shared: &Shared, scan: &mut Scan<'_>) -> Result<(bool, Vec<Read>), Failure> {
    let begun = shared.env.clock.now();
    loop {
        let failure = match scan.next(Duration::ZERO).await {
            Ok((_, frames)) if frames.is_empty() => {
                Failure::Silent("a frame is missing in the replica that answers".into())
            }
            Err(failure @ Failure::Silent(_)) => failure,
            read => return read,
        };
        if shared.env.clock.elapsed(begun) > PATIENCE {
            return Err(failure);
        }
        shared.env.clock.sleep(READ_DELAY).await;
    }
}

/// A prefix of the log, and the snapshot of the beginning of it.
#[derive(Clone, Copy)]
struct Prefix<'p> {
    shared: &'p Shared,
    previous: Option<&'p Snapshot>,
    position: u64,
    /// It ends before the first frame with an entry that is newer than this, in milliseconds since 1970.
    retain_from: u64,
    manner: Manner,
}

impl Prefix<'_> {
    /// Finds the end of the prefix, and the entries that are not needed.
    async fn analyse(&mut self) -> Result<Dropped> {
        let Env { clock, random, .. } = &self.shared.env;
        let grace = u64::try_from(EXPIRY_GRACE.as_millis())?;
        let mut analysis = Analysis::new(random.uuid()?, KEYS, clock.steady_ms().saturating_sub(grace));
        loop {
            let mut pass = Pass::new(*self);
            while let Some(frames) = pass.next().await? {
                for frame in &frames {
                    let frame = decoded(self.shared.log, &frame.bytes).ok_or_else(invalid)?;
                    for entry in frame.entries() {
                        analysis.visit(&entry.ok_or_else(invalid)?);
                    }
                }
            }
            self.position = pass.end.position;
            if let Some(dropped) = analysis.end_pass() {
                return Ok(dropped);
            }
        }
    }

    /// Returns whether a frame has an entry that is retained.
    fn is_retained(&self, frame: &Read) -> bool {
        self.retain_from < u64::MAX
            && frame.kind == Kind::Entries
            && decoded(self.shared.log, &frame.bytes)
                .is_some_and(|frame| frame.entries().flatten().any(|entry| entry.time > self.retain_from))
    }

    /// Writes the snapshot. Returns it and the number of its entries.
    async fn write(self, dropped: &Dropped) -> Result<(Snapshot, u64)> {
        let Self { shared, position, .. } = self;
        let engine = shared.engine.snapshot(position);
        let mut puts = Puts { engine: &*engine, env: &shared.env, position: 0 };
        let mut packer = Packer::new(shared.log, 0, 0);
        packer.frame_bytes = usize::try_from(FRAME_BYTES.min(shared.frame_bytes))?;
        let (mut number, mut entries) = (0, 0);
        let mut full = Vec::new();
        let mut pass = Pass::new(self);
        while let Some(frames) = pass.next().await? {
            for frame in &frames {
                let frame = decoded(shared.log, &frame.bytes).ok_or_else(invalid)?;
                for entry in frame.entries() {
                    let entry = entry.ok_or_else(invalid)?;
                    if !dropped.contains(number) {
                        let copy = |body: &mut Vec<u8>, offset: u32| entry::copy(body, offset, entry.encoded);
                        packer.push(entry.sequence, entry.encoded.len(), copy, &mut |frame| {
                            full.push(Bytes::copy_from_slice(frame));
                            Ok(())
                        })?;
                        packer.durable = entry.sequence;
                        entries += 1;
                    }
                    number += 1;
                }
            }
            for frame in full.drain(..) {
                puts.put(frame).await?;
            }
        }
        let snapshot = Snapshot { tip: pass.end, restored: shared.restored() };
        let write = &mut |frame: &[u8]| {
            full.push(Bytes::copy_from_slice(frame));
            Ok(())
        };
        packer.flush(write)?;
        packer.durable = snapshot.tip.sequence;
        packer.put(snapshot.encode(), write)?;
        for frame in full {
            puts.put(frame).await?;
        }
        Ok((snapshot, entries))
    }
}

/// A pass over the entries of a prefix.
struct Pass<'p> {
    prefix: Prefix<'p>,
    scan: Scan<'p>,
    /// The end of the log at the position, once that is reached.
    end: Tip,
    is_over: bool,
    since: Instant,
}

impl<'p> Pass<'p> {
    fn new(prefix: Prefix<'p>) -> Self {
        let scan = Scan::from_snapshot(prefix.shared, prefix.previous);
        Self { prefix, scan, end: Tip::default(), is_over: false, since: prefix.shared.env.clock.now() }
    }

    /// Reads the next frames, without those that are void; None at the end.
    async fn next(&mut self) -> Result<Option<Vec<Read>>> {
        let Prefix { shared, position, manner, .. } = self.prefix;
        let clock = &shared.env.clock;
        if self.is_over {
            return Ok(None);
        }
        if manner == Manner::Server {
            if shared.queue.ended().is_some() {
                bail!("this process is not primary any more");
            }
            // The engine has other work too.
            clock.sleep((clock.elapsed(self.since) * IDLE_RATIO).min(MAX_IDLE)).await;
            self.since = clock.now();
        }
        let (is_log, mut frames) = next(shared, &mut self.scan).await?;
        if is_log {
            let is_after = |frame: &Read| frame.before.position >= position || self.prefix.is_retained(frame);
            if let Some(first) = frames.iter().position(is_after) {
                (self.end, self.is_over) = (frames[first].before, true);
                frames.truncate(first);
            } else if let Some(tip) = self.scan.tip().filter(|tip| tip.position == position) {
                (self.end, self.is_over) = (tip, true);
            }
        }
        frames.retain(|frame| frame.kind != Kind::Void);
        Ok(Some(frames))
    }
}

fn invalid() -> Failure {
    Failure::Damaged("a frame contains an invalid entry".into())
}
