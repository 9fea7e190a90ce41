//! Calls that are made twice: of one instance, and the same way of another.

use bytes::Bytes;
use hyper::Response;

use crate::contract::{self, HeaderOwned};
use crate::guest::cache::Reusable;
use crate::guest::instance::Instance;
use crate::guest::message::Incoming;
use crate::guest::replica::Replica;
use crate::guest::shadow::{Difference, Record, Recorded, compare};
use crate::guest::trap::Trapped;

/// Calls of `tick` in a row; a guest that always has work left is called again later.
const TICKS: usize = 1_000;

/// A call that was made.
pub struct Called {
    /// The HTTP message that the response is.
    pub message: anyhow::Result<Response<Bytes>>,
    pub reusable: Option<Box<Reusable>>,
    /// Whether the response continues or comes later: a watch, or a wait.
    pub has_sequel: bool,
    pub appended: bool,
    made: Option<(contract::Response, Recorded)>,
}

/// Calls an instance, and records the call.
pub fn call(instance: &mut Instance, incoming: &Incoming) -> Result<Called, Trapped> {
    let answer = instance.handle(incoming, Record::All)?;
    let response = answer.response.fresh().map(|(_, response)| response.clone());
    Ok(Called {
        message: answer.response.message(),
        reusable: answer.reusable,
        has_sequel: answer.sequel.is_some(),
        appended: answer.appended,
        made: response.zip(instance.recorded()),
    })
}

/// Makes the same call of another instance, at the same time and with the same randomness, and returns the first difference.
/// Without one, it has the entries that the call appended.
pub fn repeat(other: &mut Replica, incoming: &Incoming, called: &mut Called) -> Result<Option<Difference>, Trapped> {
    let Some((response, Recorded { time, recording, given, asked })) = called.made.take() else { return Ok(None) };
    let again = other.instance.handle_scripted(incoming, time, recording.appends, given)?;
    Ok(match again.appends {
        Err(difference) => Some(difference),
        Ok(sequence) => {
            other.appended(sequence.unwrap_or_default());
            compare::whole_responses(&response, &again.response).or_else(|| compare::asked(asked, again.asked))
        }
    })
}

/// Compares a kept response with the one that the guest gives now.
pub fn kept_differs(kept: &Response<Bytes>, now: &Response<Bytes>) -> Option<Difference> {
    compare::whole_responses(&record(kept), &record(now))
}

fn record(message: &Response<Bytes>) -> contract::Response {
    let header = |(name, value): (&hyper::header::HeaderName, &hyper::header::HeaderValue)| HeaderOwned {
        name: name.to_string(),
        value: value.as_bytes().to_vec(),
    };
    contract::Response {
        status: message.status().as_u16(),
        headers: message.headers().iter().map(header).collect(),
        body: message.body().to_vec(),
        read_sequence: None,
    }
}

/// Compares what two instances count.
pub fn statistics_differ(one: &mut Instance, other: &mut Instance) -> Result<Option<Difference>, Trapped> {
    let counted = |instance: &mut Instance| {
        instance.stats_after_replay().map(|stats| format!("{} keys, {} bytes", stats.keys, stats.bytes))
    };
    let (ours, theirs) = (counted(one)?, counted(other)?);
    Ok((ours != theirs).then(|| Difference::new("statistics", ours, theirs)))
}

/// Has an instance do its housekeeping, all of it.
pub fn tick(instance: &mut Instance) -> Result<(), Trapped> {
    for _ in 0..TICKS {
        if !instance.tick(Record::Nothing)?.after.is_some_and(|pause| pause.is_zero()) {
            break;
        }
    }
    Ok(())
}
