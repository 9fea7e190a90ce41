//! Events: changes of one key each, in the schema that the contract with the guests fixes.
//!
//! Each type exists twice: owned, as appended, and borrowed, as replayed from a read buffer.

/// A put: a key with its value, metadata and expiry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Put {
    pub key: String,
    pub value: Vec<u8>,
    pub metadata: Vec<(String, String)>,
    /// Expiry, in milliseconds since 1970-01-01T00:00:00Z.
    pub expires: Option<u64>,
}

/// A change of one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    Put(Put),
    Delete(String),
}

/// [`Put`], borrowed.
#[derive(Clone, Copy, Debug)]
pub struct PutRef<'a> {
    pub key: &'a str,
    pub value: &'a [u8],
    pub metadata: &'a [(&'a str, &'a str)],
    pub expires: Option<u64>,
}

/// [`Event`], borrowed.
#[derive(Clone, Copy, Debug)]
pub enum EventRef<'a> {
    Put(PutRef<'a>),
    Delete(&'a str),
}

/// An entry of the log: an event with its sequence and time.
#[derive(Clone, Copy, Debug)]
pub struct Entry<'a> {
    pub sequence: u64,
    /// Time of the append, in milliseconds since 1970-01-01T00:00:00Z.
    pub time: u64,
    pub event: EventRef<'a>,
}

/// Why an append was rejected. Nothing changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AppendError {
    #[error("no space is left for the transaction log")]
    InsufficientStorage,
    #[error("the transaction log is unavailable")]
    Unavailable,
    #[error("the transaction log is read-only here")]
    ReadOnly,
    /// Contains the maximum size of a group of events, in bytes as the log counts them.
    #[error("the group of events exceeds {0} bytes")]
    TooLarge(u64),
}

impl Event {
    pub fn key(&self) -> &str {
        match self {
            Self::Put(put) => &put.key,
            Self::Delete(key) => key,
        }
    }
}

impl<'e> EventRef<'e> {
    pub fn key(&self) -> &'e str {
        match self {
            Self::Put(put) => put.key,
            Self::Delete(key) => key,
        }
    }
}
