//! A restoration: what a new log is made from, whatever holds it.

use uuid::Uuid;

use crate::{History, Incarnation, Receive};

/// A prefix of a log that is to be continued elsewhere.
pub struct Restoration<'r> {
    /// UUID of the log, which its copies have too.
    pub log: Uuid,
    /// The incarnations up to `last`.
    pub history: History,
    /// The newest sequence of the prefix.
    pub last: u64,
    /// The incarnation that continues it.
    pub incarnation: Incarnation,
    /// Hands over the entries, of which compaction may have dropped some.
    pub replay: &'r dyn Fn(&mut Receive<'_>) -> anyhow::Result<()>,
}
