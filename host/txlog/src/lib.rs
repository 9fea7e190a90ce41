//! The transaction log: events are appended, become durable, and are replayed in one order.
//!
//! Owns: the sequences, hence the order of the whole service, and the watermark up to which they are durable.
//! Must never know: what a key or a value means, which guest appended it, or that HTTP exists.

#![cfg_attr(not(test), warn(clippy::disallowed_methods))]

use std::future::ready;
use std::pin::Pin;
use std::sync::Arc;

use uuid::Uuid;

pub mod backup;
pub mod change;
pub mod change_feed;
#[cfg(feature = "cluster")]
pub mod cluster;
mod event;
pub mod file;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
mod group_commit;
mod handover;
mod incarnation;
mod past;
#[cfg(feature = "postgres")]
pub mod postgres;
#[cfg(feature = "remote")]
mod remote;
mod restoration;
mod standby;
pub mod stats;
pub mod subscribers;
mod sync;
#[cfg(test)]
mod tests;
pub mod text;
mod watermark;

pub use event::{AppendError, Entry, Event, EventRef, Put, PutRef};
pub use handover::{HandOver, Handed};
pub use incarnation::{History, Incarnation};
pub use past::PastLog;
pub use restoration::Restoration;
pub use standby::{News, Standby};
pub use watermark::{OutcomeUnknown, Watermark};

/// Promises of every log, in files or elsewhere.
///
/// The seam between a log and those who use it: [`change_feed::ChangeFeed`], and the shards, the replicas and the swap of the
/// server take it as `Arc<dyn TransactionLog>`, and know of no file and no database behind it. An engine of its own needs
/// this trait and a [`Watermark`], nothing else.
///
/// One process writes a log at a time; opening it fences the others off. Sequences start at 1 and grow; an implementation
/// gives each out once. One that was lost in a crash before anybody could see it may be given again.
pub trait TransactionLog: Send + Sync + 'static {
    /// Puts a group of events into the open batch, all or none, and returns the sequence of the first; the others follow
    /// without gaps. `time` is stored with each. Never waits for the disk: an append that could not become durable for a
    /// foreseeable reason fails here, before anything changed.
    fn append(&self, time: u64, events: &[Event]) -> Result<u64, AppendError>;

    /// Notes whether all threads that append are idle, so that an open batch can be committed without delay: `group_commit`.
    /// Cheap, to be called whenever this changes. A log whose host never calls it takes them for idle.
    fn set_idle(&self, _idle: bool) {}

    /// The newest sequence given out, durable or not; 0 in an empty log.
    fn appended(&self) -> u64;

    /// The newest sequence of the log, also where another process writes it and this one has not taken in everything. None
    /// while that cannot be found out.
    fn end_of_log(&self) -> Pin<Box<dyn Future<Output = Option<u64>> + Send + '_>> {
        Box::pin(ready(Some(self.appended())))
    }

    /// How far the log is durable.
    fn watermark(&self) -> &Watermark;

    /// Hands over every entry after the sequence `after` that is durable when this is called, oldest first, in batches
    /// of at most [`REPLAY_ENTRIES`] and about [`REPLAY_BYTES`]. Returns the newest durable sequence it covered: calling
    /// again with that as `after` catches up. Reads beside the writer.
    ///
    /// Stops with the first error, its own (damage, with file and offset; [`Forgotten`]) or the receiver's.
    fn replay(&self, after: u64, receive: &mut Receive<'_>) -> anyhow::Result<u64>;

    /// The UUID of the log, which its copies have too; nil where there is none.
    fn id(&self) -> Uuid {
        Uuid::nil()
    }

    /// The oldest sequence from which on every state of the log can be restored; `u64::MAX` where that is not known.
    fn retained(&self) -> u64 {
        u64::MAX
    }

    /// The incarnations of the log: which sequences are not in its history.
    fn history(&self) -> Arc<History> {
        Arc::default()
    }

    /// Why nothing can be appended, where another process writes it.
    fn read_only(&self) -> Option<&'static str> {
        None
    }

    /// Why nothing that was read may be answered, where another process may write the log by now. Asked after the read.
    fn reads_refused(&self) -> Option<&'static str> {
        None
    }

    /// Condition of the log, for `/readyz`.
    fn condition(&self) -> Condition {
        let failure = self.watermark().failure();
        failure.map_or(Condition::Well, |reason| Condition::Unfit(format!("failed: {reason}")))
    }

    /// Makes what was appended durable, then gives the log up. Appends fail from the moment this is called.
    fn close(&self) -> anyhow::Result<()>;
}

/// Condition of a log.
#[derive(Debug, PartialEq, Eq)]
pub enum Condition {
    Well,
    /// It can be served from, but there is something to know.
    But(String),
    /// Requests are better sent elsewhere.
    Unfit(String),
}

/// Entries after a sequence were dropped by compaction, so that a replay from there would miss them. Replay from the start.
#[derive(Debug, thiserror::Error)]
#[error(
    "the changes since sequence {after} are not in the log any more: it was compacted up to {newest}; replay it from the start"
)]
pub struct Forgotten {
    pub after: u64,
    pub newest: u64,
}

/// The log was closed while it was read.
#[derive(Debug, thiserror::Error)]
#[error("the log is closed")]
pub struct Closed;

/// Takes a batch of replayed entries; an error stops the replay.
pub type Receive<'r> = dyn FnMut(&[Entry<'_>]) -> anyhow::Result<()> + 'r;

/// Entries in one batch of a replay, at most: enough to make the cost of a call vanish.
pub const REPLAY_ENTRIES: usize = 1_000;

/// Bytes of keys and values after which a batch of a replay ends, so that a guest's memory need not hold many large
/// values twice. One entry larger than this makes a batch of its own.
pub const REPLAY_BYTES: usize = 1 << 20;
