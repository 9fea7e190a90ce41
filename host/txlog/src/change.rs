//! A change: an owned entry of the log.

use std::sync::OnceLock;

use bytes::Bytes;

use crate::{Entry, Event, EventRef, Put, PutRef};

/// An owned entry of the log, as it is published to subscribers.
pub struct Change {
    pub sequence: u64,
    /// Time of the append, in milliseconds since 1970.
    pub time: u64,
    pub event: Event,
    /// The change as a server-sent event, formatted once for all subscribers.
    pub text: OnceLock<Bytes>,
}

impl Change {
    pub fn new(sequence: u64, time: u64, event: Event) -> Self {
        Self { sequence, time, event, text: OnceLock::new() }
    }

    pub fn of(entry: &Entry<'_>) -> Self {
        let event = match &entry.event {
            EventRef::Delete(key) => Event::Delete((*key).to_owned()),
            EventRef::Put(put) => Event::Put(Put {
                key: put.key.to_owned(),
                value: put.value.to_owned(),
                metadata: put.metadata.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect(),
                expires: put.expires,
            }),
        };
        Self::new(entry.sequence, entry.time, event)
    }

    /// Returns the metadata in the form that [`Change::entry`] needs.
    pub fn metadata(&self) -> Vec<(&str, &str)> {
        match &self.event {
            Event::Delete(_) => Vec::new(),
            Event::Put(put) => put.metadata.iter().map(|(name, value)| (&**name, &**value)).collect(),
        }
    }

    /// Returns the entry of the log.
    pub fn entry<'c>(&'c self, metadata: &'c [(&'c str, &'c str)]) -> Entry<'c> {
        let event = match &self.event {
            Event::Delete(key) => EventRef::Delete(key),
            Event::Put(Put { key, value, expires, .. }) => {
                EventRef::Put(PutRef { key, value, metadata, expires: *expires })
            }
        };
        Entry { sequence: self.sequence, time: self.time, event }
    }

    pub fn key(&self) -> &str {
        self.event.key()
    }

    pub fn bytes(&self) -> usize {
        match &self.event {
            Event::Put(put) => put.key.len() + put.value.len(),
            Event::Delete(key) => key.len(),
        }
    }
}
