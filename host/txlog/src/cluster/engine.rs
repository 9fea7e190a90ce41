//! The interface of an engine: a replicated service that stores the frames of one log under numbered positions.
//!
//! Owns: the guarantees that the log builds on. The only one that its safety depends on is that at most one frame is ever
//! committed at a position, and none before its predecessor. Must never know: what a frame contains.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use uuid::Uuid;

/// A call of the engine.
pub type Call<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

pub trait Engine: Send + Sync + 'static {
    /// Puts a frame at `after + 1`, if the log ends at `after`. The call is sent when it is first polled; others can be in
    /// flight, and those for later positions are refused when an earlier one is.
    fn put(&self, after: u64, frame: Bytes) -> Call<'static, Put>;

    /// Reads committed frames from a position on, in order and without a gap; none if there are none yet. Waits for one at
    /// most this long. They can be older than the newest, and damaged: the caller checks.
    fn read(&self, from: u64, wait: Duration) -> Call<'_, Result<Vec<Bytes>, ReadError>>;

    /// Returns the ends of the log. A hint, but that it succeeds shows that the engine can commit.
    fn ends(&self) -> Call<'_, Result<Ends, ReadError>>;

    /// Drops the frames up to a position. The next one is kept, whatever its number is.
    fn drop_until(&self, position: u64) -> Call<'_, Result<(), ReadError>>;

    /// Returns the positions of the snapshots that there are, whether they are complete or not.
    fn snapshots(&self) -> Call<'_, Result<Vec<u64>, ReadError>>;

    /// Makes the snapshot of a position, without frames. An error if there is one. `run` identifies who makes it.
    fn make_snapshot(&self, position: u64, run: Uuid) -> Call<'_, Result<(), ReadError>>;

    /// Drops a snapshot, if there is one.
    fn drop_snapshot(&self, position: u64) -> Call<'_, Result<(), ReadError>>;

    /// Returns the frames of a snapshot, which are stored like those of a log. It is gone if there is none.
    fn snapshot(&self, position: u64) -> Arc<dyn Engine>;

    /// Returns what weakens the durability of the log, for the operator, as of the last call of `ends`.
    fn warnings(&self) -> Vec<String> {
        Vec::new()
    }
}

/// Reason for which a put fails with [`Put::Full`].
pub const FULL: &str =
    "the stream is full: raise its max_bytes or the limit of the account, or make room on the disks of the nodes";
/// Reason for which a put fails that is refused more than once.
pub const REFUSED: &str = "the engine refuses to append, but nothing precedes";

/// Outcome of a put.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Put {
    Durable,
    /// The log ends at another position, or may do so: only a frame that is read there shows which one is.
    Refused,
    /// There was no response: the frame may be committed, now or later.
    Unknown(String),
    /// The engine has no space left.
    Full,
}

/// The ends of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ends {
    /// Positions of the oldest and the newest frame. The oldest is the newest plus one in an empty log.
    pub first: u64,
    pub last: u64,
    /// Number of frames. Less than the positions between the ends after the engine lost some.
    pub frames: u64,
    /// Bytes that they take.
    pub bytes: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    #[error("{0}")]
    Unavailable(String),
    /// The replica that answered lacks the frame, but has later ones.
    #[error("{0}")]
    Missing(String),
    /// The log is not there any more.
    #[error("{0}")]
    Gone(String),
}
