//! Routing of a request, with several shards: to the one that owns its key, to all, whose answers the guest makes one of, or to any.
//!
//! Owns: what the guest is asked about a request beside its handling. Must never know: whose turn it is in a shard.

use std::sync::atomic::Ordering;

use futures_util::future::join_all;
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
                let calls = self.shards.iter().map(|shard| shard.call(incoming.clone(), routed_by, deadline));
                let mut answers = Vec::with_capacity(self.shards.len());
                for called in join_all(calls).await {
                    match called? {
                        Called::Answered(answer) => answers.push(answer),
                        Called::Moved(_) if answers.iter().any(|answer| answer.appended) => {
                            return Err(CallError::Replaced);
                        }
                        Called::Moved(moved) => return Ok(Called::Moved(moved)),
                    }
                }
                self.merge(routers, &incoming, &answers)
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
        Ok(Called::Answered(merged))
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

    /// Asks a router. A candidate is asked the same about a sampled request.
    fn ask<T>(
        &self,
        routers: &Routers,
        incoming: &Incoming,
        what: &str,
        question: impl FnOnce(&mut Instance) -> Result<T, Trapped>,
        decision: impl FnOnce(&T) -> Decision,
    ) -> Result<T, CallError> {
        let answer = routers.ask(question).map_err(|error| {
            let (request_id, method, target) = (incoming.id(), incoming.request.method(), incoming.request.uri());
            error!(request_id, %method, %target, "the guest trapped in {what}: {error:#}");
            let reason = format!("in {what}: {error:#}");
            self.shared.trapped(&reason);
            self.shared.alarm.raise(Raised { reason, turn: None });
            CallError::Trapped
        })?;
        if incoming.is_sampled {
            self.shared.shadow.decisions().add(incoming, decision(&answer));
        }
        Ok(answer)
    }
}
