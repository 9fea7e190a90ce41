//! Routing in shadow traffic, with several shards: what the serving guest decided about sampled requests, and what a candidate
//! decides about them.
//!
//! Owns: how many decisions wait. Must never know: what follows from a decision.

use std::fmt::Debug;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::compare::{self, Difference};
use super::queue;
use super::report::Report;
use crate::contract::{Response, Target};
use crate::guest::message::{Answer, Given, Incoming};
use crate::guest::routers::Routers;
use crate::guest::trap;

/// Maximum number of bytes of the decisions that wait.
const WAITING_BYTES: usize = 4 << 20;

/// What a routing function of the serving guest returned.
pub enum Decision {
    Route(Target),
    Keys(Vec<String>),
    /// Of these responses, at this time.
    Merged {
        parts: Vec<Response>,
        merged: Response,
        time: u64,
    },
    /// Not to be compared.
    None,
}

impl Decision {
    pub fn merged(answers: &[Answer], merged: &Answer, time: u64) -> Self {
        let fresh = |answer: &Answer| answer.response.fresh().map(|(_, response)| response.clone());
        match (answers.iter().map(fresh).collect(), fresh(merged)) {
            (Some(parts), Some(merged)) => Self::Merged { parts, merged, time },
            _ => Self::None,
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Route(_) | Self::None => 0,
            Self::Keys(keys) => keys.iter().map(|key| queue::HEADER_BYTES + key.len()).sum(),
            Self::Merged { parts, merged, .. } => parts.iter().chain([merged]).map(queue::response_bytes).sum(),
        }
    }

    /// Has the candidate decide, and returns the difference.
    fn compare(self, incoming: &Incoming, candidate: &Routers) -> Option<Difference> {
        let (what, difference) = match self {
            Self::None => return None,
            Self::Route(target) => (
                "route",
                candidate.ask(|instance| instance.route(incoming)).map(|theirs| different("route", &target, &theirs)),
            ),
            Self::Keys(keys) => (
                "extract-keys",
                candidate
                    .ask(|instance| instance.extract_keys(incoming))
                    .map(|theirs| different("extract-keys", &keys, &theirs)),
            ),
            Self::Merged { parts, merged, time } => {
                let answer = |record| Answer {
                    response: Given::Fresh { record, most: usize::MAX, end: 0 },
                    read_sequence: 0,
                    appended: false,
                    is_over_quota: false,
                    sequel: None,
                    reusable: None,
                    guest_time: Duration::ZERO,
                };
                let answers: Vec<_> = parts.into_iter().map(answer).collect();
                let theirs = candidate.ask(|instance| instance.merge_responses(incoming, &answers, time));
                let difference = theirs.map(|theirs| {
                    let (_, theirs) = theirs.response.fresh()?;
                    let difference = compare::responses(&merged, theirs)?;
                    Some(Difference { what: format!("merge-responses: {}", difference.what), ..difference })
                });
                ("merge-responses", difference)
            }
        };
        difference.unwrap_or_else(|error| {
            let trap = trap::without_printed(&format!("{error:#}")).to_owned();
            Some(Difference::new(format!("trap in {what}"), "none", trap))
        })
    }
}

/// Compares by all that `Debug` shows, which is every field of what a routing function returns.
fn different(what: &str, serving: &impl Debug, candidate: &impl Debug) -> Option<Difference> {
    let (serving, candidate) = (format!("{serving:?}"), format!("{candidate:?}"));
    let shown = |decision: &str| compare::text(decision.as_bytes(), 0);
    (serving != candidate).then(|| Difference::new(what, shown(&serving), shown(&candidate)))
}

/// Decisions that wait for a candidate.
#[derive(Default)]
pub struct Decisions(Mutex<Waiting>);

#[derive(Default)]
struct Waiting {
    items: Vec<(Incoming, Decision)>,
    bytes: usize,
    dropped: u64,
}

impl Decisions {
    pub fn add(&self, incoming: &Incoming, decision: Decision) {
        let bytes = decision.bytes() + queue::request_bytes(incoming);
        let mut waiting = self.waiting();
        if waiting.bytes + bytes > WAITING_BYTES {
            waiting.dropped += 1;
            return;
        }
        waiting.bytes += bytes;
        waiting.items.push((incoming.clone(), decision));
    }

    /// Drops all, and returns how many were dropped since the last call.
    pub fn clear(&self) -> u64 {
        let Waiting { items, dropped, .. } = std::mem::take(&mut *self.waiting());
        dropped + items.len() as u64
    }

    /// Compares all that wait, and returns the number of comparisons, of differences and of those dropped.
    pub fn compare(&self, candidate: &Routers, report: &Report) -> (u64, u64, u64) {
        let Waiting { items, dropped, .. } = std::mem::take(&mut *self.waiting());
        let (compared, mut different) = (items.len() as u64, 0);
        for (incoming, decision) in items {
            let difference = decision.compare(&incoming, candidate);
            different += u64::from(difference.is_some());
            report.decided(&incoming, difference);
        }
        (compared, different, dropped)
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        // Every change under this lock is whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
