//! Routing of a request, with several shards: to the shard that owns its key, to all, whose responses the guest merges, or to
//! any.
//!
//! Owns: what the guest is asked about a request beside its handling. Must never know: whose turn it is in a shard.

use std::sync::atomic::Ordering;

use futures_util::future::join_all;
use tokio::time::timeout_at;
use tracing::error;

use super::super::instance::Instance;
use super::super::message::{Answer, Incoming};
use super::super::routers::Routers;
use super::super::shadow::Decision;
use super::super::shard::{CallError, Called, Raised};
use super::super::trap::Trapped;
use super::Shards;
use crate::contract::Target;

/// Shards that a request is routed to.
enum Route {
    One(usize),
    All,
    /// None: its keys lie in several shards.
    CrossShard,
}

impl Shards {
    pub(super) async fn call_routed(
        &self,
        incoming: Incoming,
        deadline: tokio::time::Instant,
    ) -> Result<Called, CallError> {
        let routers = &*self.routers.load_full();
        let routed_by = Some(routers.guest());
        match self.route(routers, &incoming)? {
            Route::One(shard) => self.shards[shard].call(incoming, routed_by, deadline).await,
            Route::All => {
                // Were another guest or process to serve before all shards are called, it would have half of its effect.
                let _broadcast = if incoming.request.method().is_safe() {
                    None
                } else {
                    Some(timeout_at(deadline, self.broadcasts.read()).await.map_err(|_| CallError::Late)?)
                };
                let calls = self.shards.iter().map(|shard| shard.call(incoming.clone(), routed_by, deadline));
                match of_all(join_all(calls).await)? {
                    Ok(answers) => self.merge(routers, &incoming, &answers),
                    Err(moved) => Ok(Called::Moved(moved)),
                }
            }
            Route::CrossShard => self.merge(routers, &incoming, &[]),
        }
    }

    fn merge(&self, routers: &Routers, incoming: &Incoming, answers: &[Answer]) -> Result<Called, CallError> {
        let time = routers.now();
        let merged = self.ask(
            routers,
            incoming,
            "merge-responses",
            |instance| instance.merge_responses(incoming, answers, time),
            |merged| Decision::merged(answers, merged, time),
        )?;
        outcome(merged)
    }

    fn route(&self, routers: &Routers, incoming: &Incoming) -> Result<Route, CallError> {
        let any = || Route::One(self.next.fetch_add(1, Ordering::Relaxed) % self.shards.len());
        let target = self.ask(
            routers,
            incoming,
            "route",
            |instance| instance.route(incoming),
            |to| Decision::Route(to.clone()),
        )?;
        Ok(match target {
            Target::Key(key) => Route::One(self.owners.of(&key)),
            Target::AllShards => Route::All,
            Target::AnyShard => any(),
            Target::KeysInBody => {
                let keys = self.ask(
                    routers,
                    incoming,
                    "extract-keys",
                    |instance| instance.extract_keys(incoming),
                    |keys| Decision::Keys(keys.clone()),
                )?;
                let mut owners = keys.iter().map(|key| self.owners.of(key));
                match owners.next() {
                    None => any(),
                    Some(first) if owners.all(|owner| owner == first) => Route::One(first),
                    Some(_) => Route::CrossShard,
                }
            }
        })
    }

    /// Asks a router, unless its guest may not get the request. A candidate is asked the same about a sampled request.
    fn ask<T>(
        &self,
        routers: &Routers,
        incoming: &Incoming,
        what: &str,
        question: impl FnOnce(&mut Instance) -> Result<T, Trapped>,
        decision: impl FnOnce(&T) -> Decision,
    ) -> Result<T, CallError> {
        let clock = &self.shared.env.clock;
        let begun = clock.now();
        let asked = routers.ask(|instance| match incoming.key_prefix {
            Some(_) if !instance.enforces_key_prefix() => Ok(None),
            _ => question(instance).map(Some),
        });
        let answer = asked.map_err(|error| {
            let guest_time = clock.elapsed(begun);
            let (request_id, method, target) = (incoming.id(), incoming.request.method(), incoming.request.uri());
            error!(request_id, %method, %target, "the guest trapped in {what}: {error:#}");
            let reason = format!("in {what}: {error:#}");
            self.shared.trapped(&reason);
            self.shared.alarm.raise(Raised { reason, turn: None });
            CallError::Trapped { guest_time }
        })?;
        let answer = answer.ok_or(CallError::KeyPrefix)?;
        if incoming.is_sampled {
            self.shared.shadow.decisions().add(incoming, decision(&answer));
        }
        Ok(answer)
    }
}

/// Returns what shards gave together. An error means to clients that nothing was changed, so it is not given when some appended.
fn outcome(merged: Answer) -> Result<Called, CallError> {
    let is_error = merged.response.fresh().is_some_and(|(_, response)| response.status >= 400);
    if merged.appended && is_error { Err(CallError::Partial) } else { Ok(Called::Answered(merged)) }
}

/// Returns the answers of all shards, or the request when a shard was not called because its guest was replaced.
fn of_all(called: Vec<Result<Called, CallError>>) -> Result<Result<Vec<Answer>, Incoming>, CallError> {
    let mut answers = Vec::with_capacity(called.len());
    let mut lacking = None;
    for called in called {
        match called {
            Ok(Called::Answered(answer)) => answers.push(answer),
            Ok(Called::Moved(incoming)) => lacking = lacking.or(Some(Ok(incoming))),
            // After it the outcome is unknown in any case.
            Err(error @ CallError::Trapped { .. }) => return Err(error),
            Err(error) => lacking = Some(Err(error)),
        }
    }
    match lacking {
        None => Ok(Ok(answers)),
        // The request had an effect, and called again it would have that twice.
        Some(_) if answers.iter().any(|answer| answer.appended) => Err(CallError::Partial),
        Some(lacking) => lacking.map(Err),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::super::message::Given;
    use super::*;
    use crate::contract::Response;

    fn answer(status: u16, appended: bool) -> Answer {
        let record = Response { status, headers: Vec::new(), body: Vec::new(), read_sequence: None };
        Answer {
            response: Given::Fresh { record, most: 0, end: 0 },
            read_sequence: 0,
            guest_time: Duration::ZERO,
            appended,
            is_over_quota: false,
            sequel: None,
            reusable: None,
        }
    }

    fn answered(appended: bool) -> Result<Called, CallError> {
        Ok(Called::Answered(answer(200, appended)))
    }

    #[test]
    fn error_after_an_effect_has_an_unknown_outcome() {
        assert!(matches!(outcome(answer(200, true)), Ok(Called::Answered(_))));
        for status in [409, 413, 503, 507] {
            assert!(matches!(outcome(answer(status, false)), Ok(Called::Answered(_))));
            assert!(matches!(outcome(answer(status, true)), Err(CallError::Partial)));
        }
    }

    #[test]
    fn failure_of_one_shard_is_the_outcome_only_without_an_effect_in_another() {
        let outcome = |called| of_all(called).map(|answers| answers.map(|answers| answers.len()).ok());
        assert!(matches!(outcome(vec![answered(false), answered(true)]), Ok(Some(2))));
        assert!(matches!(outcome(vec![Err(CallError::Late), answered(false)]), Err(CallError::Late)));
        assert!(matches!(outcome(vec![answered(false), Err(CallError::Down)]), Err(CallError::Down)));
        assert!(matches!(outcome(vec![Err(CallError::Late), answered(true)]), Err(CallError::Partial)));
        assert!(matches!(outcome(vec![answered(true), Err(CallError::Down)]), Err(CallError::Partial)));
        let trapped = CallError::Trapped { guest_time: Duration::ZERO };
        assert!(matches!(outcome(vec![Err(CallError::Late), Err(trapped)]), Err(CallError::Trapped { .. })));
    }
}
