//! Condition of the log, for `/readyz` and for reads.

use std::sync::PoisonError;

use super::Shared;
use crate::remote::queue::End;
use crate::{Condition, News};

impl Shared {
    pub(super) fn reads_refused(&self) -> Option<&'static str> {
        if self.queue.ended() == Some(End::ReadOnly) {
            Some("another server took the log over from this one, and answers reads")
        } else if self.queue.ended() == Some(End::HandedOver) && self.watermark.failure().is_some() {
            Some("another process may have taken the log over from this one")
        } else if self.lease.is_over() {
            Some(
                "another server may have taken the log over from this one: the engine of the log does not answer in time",
            )
        } else {
            None
        }
    }

    pub(super) fn condition(&self) -> Condition {
        if self.queue.ended() == Some(End::ReadOnly) {
            return Condition::Unfit("read-only: another process is primary".into());
        }
        if let Some(reason) = self.watermark.failure() {
            return Condition::Unfit(format!("failed: {reason}"));
        }
        if let Some(reason) = self.reads_refused() {
            return Condition::Unfit(format!("reads are refused: {reason}"));
        }
        let damage = self.damage();
        let begun = self.queue.begun();
        if let Some(damage) = damage.as_ref().filter(|_| !begun) {
            return Condition::Unfit(format!("damaged: {damage}"));
        }
        let mut conditions = self.engine.warnings();
        conditions.extend(damage.map(|damage| format!("damaged: {damage}")));
        conditions.extend(self.replica_damage().map(|damage| format!("damaged in a replica: {damage}")));
        let compaction = self.compaction_failure.lock().unwrap_or_else(PoisonError::into_inner).clone();
        conditions.extend(compaction.map(|reason| format!("compaction fails and the log keeps growing: {reason}")));
        conditions.extend(self.copy_failure().map(|reason| format!("there is no local copy of it: {reason}")));
        if !begun {
            let News { newest, holder, .. } = &*self.news.borrow();
            let behind = self.restored().history.entries(self.queue.appended(), *newest);
            conditions.push(match holder {
                Some(holder) => format!("standby of {holder}, replication lag {behind} entries"),
                None => format!("failover in progress, replication lag {behind} entries"),
            });
        }
        // Not unfit: reads are still served, and all servers would be taken out of service at once.
        conditions
            .extend(self.breaker.reason().map(|reason| format!("engine unavailable, rejecting writes: {reason}")));
        if conditions.is_empty() { Condition::Well } else { Condition::But(conditions.join("; ")) }
    }

    pub(super) fn set_compaction_failure(&self, reason: Option<String>) {
        *self.compaction_failure.lock().unwrap_or_else(PoisonError::into_inner) = reason;
    }
}
