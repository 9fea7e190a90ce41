//! Database settings that the durability of acknowledged writes depends on. They can change at any time, and with a failover.
//!
//! Settings of a session are set when it begins, and no later change of the configuration affects them. The others are
//! checked at the beginning of each session that writes, and with each heartbeat. Settings that prevent writes make the
//! session unusable; those that only weaken durability are reported.
//!
//! Owns: the list of these settings. Must never know: what is written.

use std::sync::{Mutex, PoisonError};

use tracing::{info, warn};

use super::session::{Failure, Session};
use crate::file::Durability;

const ISOLATION: &str = "SET default_transaction_isolation = 'read committed'";
/// Overrides the setting of the role, the database or the configuration. `remote_apply` is stricter, and kept.
const SYNC: &str = "SELECT set_config('synchronous_commit', CASE current_setting('synchronous_commit') \
     WHEN 'remote_apply' THEN 'remote_apply' ELSE 'on' END, false)";
const OS: &str = "SET synchronous_commit = off";

const CHECK: &str = "SELECT current_setting('server_encoding'), pg_is_in_recovery(), \
     current_setting('transaction_read_only'), current_setting('fsync'), current_setting('full_page_writes'), \
     current_setting('synchronous_commit'), current_setting('synchronous_standby_names'), \
     (SELECT string_agg(relname::text, ', ') FROM pg_class WHERE relpersistence = 'u' AND oid IN (to_regclass('kvs.transactions'), \
     to_regclass('kvs.writer'), to_regclass('kvs.incarnations'), to_regclass('kvs.identity')))";

const POWER_CUT: &str = "a power cut of the database loses acknowledged writes";
const FAILOVER: &str = "a failover of the database loses acknowledged writes";

/// The settings, and warnings about them.
pub struct Conditions {
    durability: Durability,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Weakened durability, for the operator.
    warnings: Vec<String>,
    /// Commits have waited for synchronous standbys of the database before.
    replicated: bool,
}

impl Conditions {
    pub fn new(durability: Durability) -> Self {
        Self { durability, state: Mutex::default() }
    }

    /// Returns the statements that a session begins with.
    pub fn settings(&self) -> String {
        let commit = if self.durability == Durability::Os { OS } else { SYNC };
        format!("{ISOLATION}; {commit}")
    }

    /// Checks a session for writes, outside of a transaction.
    pub async fn check(&self, session: &Session) -> Result<(), Failure> {
        let row = session.one(CHECK, &[]).await?;
        let encoding: &str = row.try_get(0)?;
        if encoding != "UTF8" {
            return Err(Failure::refused(format!("its encoding is {encoding}, but the log requires UTF8")));
        }
        if row.try_get(1)? {
            return Err(Failure::unusable("it is a standby of another database, and read-only".into()));
        }
        if row.try_get::<_, &str>(2)? == "on" {
            let reason = "it is read-only: default_transaction_read_only is on for this role or database";
            return Err(Failure::unusable(reason.into()));
        }
        if let Some(tables) = row.try_get::<_, Option<&str>>(7)? {
            return Err(Failure::unusable(format!(
                "it keeps these tables of the schema kvs UNLOGGED: {tables}, so that a crash of the database empties them: \
                 make each permanent by ALTER TABLE kvs.… SET LOGGED"
            )));
        }
        let mut warnings = Vec::new();
        for (index, name) in [(3, "fsync"), (4, "full_page_writes")] {
            if row.try_get::<_, &str>(index)? == "off" {
                warnings.push(format!("{name} is off: {POWER_CUT}"));
            }
        }
        let commit: &str = row.try_get(5)?;
        if self.durability == Durability::Sync && !["on", "remote_apply"].contains(&commit) {
            warnings.push(format!("synchronous_commit is {commit}: {POWER_CUT}"));
        }
        let is_replicated = !row.try_get::<_, &str>(6)?.trim().is_empty();
        self.note(warnings, is_replicated);
        Ok(())
    }

    /// Returns the warnings of the last check.
    pub fn durability_warnings(&self) -> Vec<String> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).warnings.clone()
    }

    fn note(&self, mut warnings: Vec<String>, is_replicated: bool) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.replicated |= is_replicated;
        if state.replicated && !is_replicated {
            warnings.push(format!("synchronous_standby_names is empty now: {FAILOVER}"));
        }
        for warning in warnings.iter().filter(|warning| !state.warnings.contains(warning)) {
            warn!("{warning}");
        }
        for warning in state.warnings.iter().filter(|warning| !warnings.contains(warning)) {
            info!("resolved: {warning}");
        }
        state.warnings = warnings;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loss_of_synchronous_standbys_is_reported() {
        let conditions = Conditions::new(Durability::Sync);
        conditions.note(Vec::new(), false);
        assert!(conditions.durability_warnings().is_empty());
        conditions.note(Vec::new(), true);
        assert!(conditions.durability_warnings().is_empty());
        conditions.note(vec!["fsync is off".into()], false);
        let warnings = conditions.durability_warnings();
        assert!(warnings.len() == 2 && warnings[1].contains("synchronous_standby_names is empty now"), "{warnings:?}");
        conditions.note(Vec::new(), true);
        assert!(conditions.durability_warnings().is_empty());
    }
}
