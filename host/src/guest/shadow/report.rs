//! The report of shadow traffic.
//!
//! Owns: what is counted, and the examples that are kept. Must never know: how requests are compared.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};

use super::Plan;
use super::compare::{self, Difference};
use crate::guest::fixed;
use crate::guest::message::Incoming;

/// Maximum number of examples, and of those with the same difference.
const EXAMPLES: usize = 10;
const OF_ONE_KIND: usize = 3;
/// Number of calls whose times are kept: more are sampled evenly.
const TIMES: usize = 10_000;
/// Maximum number of bytes of a target that are shown.
const TARGET_BYTES: usize = 200;

pub struct Report {
    plan: Plan,
    /// Whether one difference more than allowed ends it.
    stops_when_exceeded: bool,
    is_stopped: AtomicBool,
    tally: Mutex<Tally>,
}

#[derive(Default)]
struct Tally {
    compared: u64,
    /// Decisions of routing that were compared.
    decided: u64,
    different: u64,
    dropped: u64,
    rebuilds: u64,
    examples: Vec<(Difference, Value)>,
    serving: Times,
    candidate: Times,
    /// Time in the candidate, with what it applied.
    busy: Duration,
    /// The request that took the candidate the longest, and both times.
    slowest: Option<(Value, Duration, Duration)>,
    /// Of the candidate in each shard.
    memory: Vec<u64>,
}

impl Report {
    pub fn new(plan: Plan, stops_when_exceeded: bool) -> Self {
        Self { plan, stops_when_exceeded, is_stopped: AtomicBool::new(false), tally: Mutex::default() }
    }

    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Ends the shadow traffic.
    pub fn stop(&self) {
        self.is_stopped.store(true, Ordering::Relaxed);
    }

    pub fn is_stopped(&self) -> bool {
        self.is_stopped.load(Ordering::Relaxed) || self.stops_when_exceeded && self.is_exceeded()
    }

    /// Counts a comparison. `times` are those of the serving guest and of the candidate.
    pub fn compared(&self, incoming: &Incoming, times: (Duration, Duration), difference: Option<Difference>) {
        let mut tally = self.tally();
        tally.compared += 1;
        tally.serving.add(times.0);
        tally.candidate.add(times.1);
        if tally.slowest.as_ref().is_none_or(|slowest| times.1 > slowest.2) {
            tally.slowest = Some((request(incoming), times.0, times.1));
        }
        if let Some(difference) = difference {
            tally.different(incoming, difference);
        }
    }

    /// Counts the comparison of a decision of routing.
    pub fn decided(&self, incoming: &Incoming, difference: Option<Difference>) {
        let mut tally = self.tally();
        tally.decided += 1;
        if let Some(difference) = difference {
            tally.different(incoming, difference);
        }
    }

    pub fn busy(&self, time: Duration) {
        self.tally().busy += time;
    }

    pub fn dropped(&self, count: u64) {
        self.tally().dropped += count;
    }

    pub fn rebuilt(&self) {
        self.tally().rebuilds += 1;
    }

    pub fn set_memory(&self, shard: usize, bytes: u64) {
        let mut tally = self.tally();
        if tally.memory.len() <= shard {
            tally.memory.resize(shard + 1, 0);
        }
        tally.memory[shard] = bytes;
    }

    /// Whether more differ than are allowed.
    pub fn is_exceeded(&self) -> bool {
        self.tally().different > self.plan.max_differences
    }

    /// Says in one line why the candidate must not serve. It is logged, so it has no values.
    pub fn verdict(&self) -> String {
        let tally = self.tally();
        let Tally { compared, different, .. } = &*tally;
        let most = self.plan.max_differences;
        let first = tally.examples.first().map(|(difference, example)| {
            let text = |name: &str| example[name].as_str().unwrap_or_default();
            format!("; the first: {} {}: {}", text("method"), text("target"), difference.what)
        });
        format!(
            "in shadow traffic {different} of {compared} requests differed, and at most {most} may (--max-differences){}",
            first.unwrap_or_default()
        )
    }

    /// Returns the report, with the memory of the serving guest.
    pub fn json(&self, serving_memory: u64) -> Value {
        let tally = self.tally();
        let slowest = tally.slowest.as_ref().map(|(request, serving, candidate)| {
            with(
                request,
                json!({
                    "serving_seconds": serving.as_secs_f64(),
                    "candidate_seconds": candidate.as_secs_f64(),
                }),
            )
        });
        let mut candidate = tally.candidate.json(tally.memory.iter().sum());
        candidate["busy_seconds"] = tally.busy.as_secs_f64().into();
        json!({
            "seconds": self.plan.duration.as_secs_f64(),
            "sample_percent": self.plan.sample,
            "max_differences": self.plan.max_differences,
            "compared": tally.compared,
            "routing_compared": tally.decided,
            "different": tally.different,
            "dropped": tally.dropped,
            "rebuilds": tally.rebuilds,
            "serving": tally.serving.json(serving_memory),
            "candidate": candidate,
            "slowest": slowest,
            "examples": tally.examples.iter().map(|(_, example)| example).collect::<Vec<_>>(),
        })
    }

    fn tally(&self) -> MutexGuard<'_, Tally> {
        // Every change under this lock is whole.
        self.tally.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Tally {
    fn different(&mut self, incoming: &Incoming, difference: Difference) {
        self.different += 1;
        let alike = self.examples.iter().filter(|(kept, _)| kept.what == difference.what).count();
        if self.examples.len() < EXAMPLES && alike < OF_ONE_KIND {
            let Difference { what, serving, candidate } = &difference;
            let shown = json!({ "difference": what, "serving": serving, "candidate": candidate });
            let example = with(&request(incoming), shown);
            self.examples.push((difference, example));
        }
    }
}

/// Shows a request without its headers and its body, which can be secret.
fn request(incoming: &Incoming) -> Value {
    let target = incoming.target();
    let shown = target.char_indices().take_while(|(at, _)| *at < TARGET_BYTES).map(|(_, letter)| letter).collect();
    let shown: String = shown;
    let cut = if shown.len() < target.len() { "…" } else { "" };
    json!({
        "request_id": incoming.id(),
        "method": incoming.request.method().as_str(),
        "target": format!("{}{cut}", compare::redacted(&shown)),
        "principal": incoming.principal.as_deref(),
    })
}

/// Returns the members of both objects.
fn with(one: &Value, other: Value) -> Value {
    let mut all = one.clone();
    if let (Value::Object(all), Value::Object(other)) = (&mut all, other) {
        all.extend(other);
    }
    all
}

/// Times of calls: a sample of them, in which each is as likely as any other.
#[derive(Default)]
struct Times {
    kept: Vec<Duration>,
    count: usize,
    max: Duration,
}

impl Times {
    fn add(&mut self, time: Duration) {
        self.max = self.max.max(time);
        self.count += 1;
        if self.kept.len() < TIMES {
            return self.kept.push(time);
        }
        // Algorithm R.
        let place = usize::try_from(fixed::nth(self.count as u64)).unwrap_or_default() % self.count;
        if let Some(kept) = self.kept.get_mut(place) {
            *kept = time;
        }
    }

    fn json(&self, memory_bytes: u64) -> Value {
        let mut sorted = self.kept.clone();
        sorted.sort_unstable();
        let at = |share: usize| sorted.get(sorted.len().saturating_sub(1) * share / 100).map(Duration::as_secs_f64);
        let max = (self.count > 0).then_some(self.max.as_secs_f64());
        json!({ "p50_seconds": at(50), "p99_seconds": at(99), "max_seconds": max, "memory_bytes": memory_bytes })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_bounded_and_sampled_evenly() {
        let mut times = Times::default();
        (1..=200_000).for_each(|n| times.add(Duration::from_millis(n)));
        assert_eq!(times.kept.len(), TIMES);
        let shown = times.json(7);
        let near = |name: &str, expected: f64| (shown[name].as_f64().unwrap() - expected).abs() < 10.0;
        assert!(near("p50_seconds", 100.0) && near("p99_seconds", 198.0), "{shown}");
        assert_eq!((&shown["max_seconds"], &shown["memory_bytes"]), (&200.0.into(), &7.into()));
    }
}
