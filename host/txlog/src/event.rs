//! Events: changes of one key each, in the schema that the contract with the guests fixes.
//!
//! Each type comes twice, owned (as appended) and borrowed (as replayed, straight from the buffer it lies in).

/// A value, and all that belongs to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Put {
    pub key: String,
    pub value: Vec<u8>,
    pub metadata: Vec<(String, String)>,
    /// Milliseconds since 1970-01-01T00:00:00Z, from which on the key is gone.
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

/// An event of the log with its place in it.
#[derive(Clone, Copy, Debug)]
pub struct Entry<'a> {
    pub sequence: u64,
    /// Milliseconds since 1970-01-01T00:00:00Z at which it was appended.
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
    /// With the largest group of events that is accepted, in bytes as the log counts them.
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
