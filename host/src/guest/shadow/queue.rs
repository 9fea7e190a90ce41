//! The queue of a shard: its requests and entries in the order of its turns, on their way to a candidate.
//!
//! Owns: how much waits, and what happens when that is too much. Must never know: what is compared.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kvs_txlog::change::Change;

use super::record::{Append, Inputs, Recorded, Recording};
use crate::contract::Response;
use crate::guest::message::{Answer, Incoming};

/// Maximum number of bytes in the queue of one shard. Requests take at most half of them, since they can be dropped, and
/// entries cannot.
pub const QUEUE_BYTES: usize = 16 << 20;
/// Bytes that an item takes besides its parts, and the same of a header.
const ITEM_BYTES: usize = 512;
pub const HEADER_BYTES: usize = 64;

/// A call of the serving guest.
pub struct Item {
    pub time: u64,
    pub appends: Vec<Append>,
    /// The request, if it is one to compare.
    pub sample: Option<Box<Sample>>,
}

/// A request and what it got.
pub struct Sample {
    pub incoming: Incoming,
    /// End of the log when the call began.
    pub before: u64,
    pub given: Inputs,
    pub response: Response,
    /// A watch or a wait.
    pub asked: Option<String>,
    pub took: Duration,
}

impl Item {
    /// Returns its entries of the log.
    pub fn changes(self) -> Vec<Change> {
        self.appends.into_iter().flat_map(|append| append.changes(self.time)).collect()
    }

    fn bytes(&self) -> usize {
        ITEM_BYTES + self.appends.iter().map(Append::bytes).sum::<usize>()
    }
}

impl Sample {
    fn bytes(&self) -> usize {
        request_bytes(&self.incoming) + self.given.bytes() + response_bytes(&self.response)
    }
}

pub fn request_bytes(incoming: &Incoming) -> usize {
    let request = &incoming.request;
    let headers = request.headers().iter().map(|(name, value)| HEADER_BYTES + name.as_str().len() + value.len());
    ITEM_BYTES + request.body().len() + incoming.target().len() + headers.sum::<usize>()
}

pub fn response_bytes(response: &Response) -> usize {
    let headers = response.headers.iter().map(|header| HEADER_BYTES + header.name.len() + header.value.len());
    response.body.len() + headers.sum::<usize>()
}

/// Why a queue lacks entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Loss {
    /// The log has them.
    InLog,
    /// The serving instance was dropped, because it had more than the log. So can the candidate.
    Abandoned,
}

pub struct Queue(Mutex<State>);

struct State {
    items: Vec<Item>,
    bytes: usize,
    /// Set until the queue is opened: nothing is taken in.
    lost: Option<Loss>,
    /// Requests that were dropped.
    dropped: u64,
}

impl Default for Queue {
    /// A queue that is not open.
    fn default() -> Self {
        Self(Mutex::new(State { items: Vec::new(), bytes: 0, lost: Some(Loss::InLog), dropped: 0 }))
    }
}

impl Queue {
    /// Adds a call in its turn, with the request if it is sampled.
    pub fn add(&self, recorded: Recorded, sampled: Option<(Incoming, &Answer, Duration)>) {
        let Recorded { time, recording: Recording { appends, is_whole, .. }, given, asked } = recorded;
        if !is_whole {
            self.lose(Loss::InLog);
        }
        let is_sampled = sampled.is_some();
        let sample = sampled.filter(|_| given.is_whole()).and_then(|(incoming, answer, took)| {
            let (before, response) = answer.response.fresh()?;
            Some(Box::new(Sample { incoming, before, given, response: response.clone(), asked, took }))
        });
        if is_sampled && sample.is_none() {
            self.add_dropped(1);
        }
        self.push(Item { time, appends, sample });
    }

    /// Never waits: others hold the lock as briefly.
    fn push(&self, mut item: Item) {
        let mut state = self.state();
        let sample_bytes = item.sample.as_ref().map_or(0, |sample| sample.bytes());
        let mut bytes = item.bytes() + sample_bytes;
        if item.sample.is_some() && (state.lost.is_some() || state.bytes + bytes > QUEUE_BYTES / 2) {
            state.dropped += 1;
            item.sample = None;
            bytes -= sample_bytes;
        }
        if state.lost.is_some() || item.sample.is_none() && item.appends.is_empty() {
            return;
        }
        if state.bytes + bytes > QUEUE_BYTES {
            state.lost = Some(Loss::InLog);
            return;
        }
        state.bytes += bytes;
        state.items.push(item);
    }

    /// Closes the queue: it lacks entries from here on.
    pub fn lose(&self, loss: Loss) {
        let mut state = self.state();
        state.lost = state.lost.max(Some(loss));
    }

    /// Opens the queue, empty. Returns why it lacked entries.
    pub fn open(&self) -> Option<Loss> {
        let mut state = self.state();
        let lost = state.lost.take();
        let items = state.clear();
        drop(state);
        drop(items);
        lost
    }

    /// Takes all that waits. An error when it lacks entries.
    pub fn take(&self) -> Result<Vec<Item>, Loss> {
        let mut state = self.state();
        match state.lost {
            Some(loss) => Err(loss),
            None => {
                state.bytes = 0;
                Ok(std::mem::take(&mut state.items))
            }
        }
    }

    /// Closes the queue, and drops what is in it.
    pub fn close(&self) {
        self.lose(Loss::InLog);
        let items = self.state().clear();
        drop(items);
    }

    /// Counts requests that were taken and dropped.
    pub fn add_dropped(&self, count: usize) {
        self.state().dropped += count as u64;
    }

    /// Returns the number of requests dropped since the last call.
    pub fn dropped(&self) -> u64 {
        std::mem::take(&mut self.state().dropped)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change under this lock is whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn clear(&mut self) -> Vec<Item> {
        self.dropped += self.items.iter().filter(|item| item.sample.is_some()).count() as u64;
        self.bytes = 0;
        std::mem::take(&mut self.items)
    }
}
