//! Conditions of what an acknowledged write has behind it: settings of the database, which can change at any time, and with
//! a failover.
//!
//! What a session can set for itself is set when it begins, and no later change of the configuration reaches it. The rest is
//! checked at the beginning of each session that writes, and whenever the writer renews its claim. Where nothing can be
//! written, or not what the log needs, the session is of no use; what only lowers the promise is reported.
//!
//! Owns: which settings these are. Must never know: what is written.

use std::sync::{Mutex, PoisonError};

use tracing::{info, warn};

use super::session::{Failure, Session};
use crate::file::Durability;

const ISOLATION: &str = "SET default_transaction_isolation = 'read committed'";
/// Also where a role, a database or the configuration says otherwise. `remote_apply` is more than that.
const SYNC: &str = "SELECT set_config('synchronous_commit', CASE current_setting('synchronous_commit') \
     WHEN 'remote_apply' THEN 'remote_apply' ELSE 'on' END, false)";
const OS: &str = "SET synchronous_commit = off";

const CHECK: &str = "SELECT current_setting('server_encoding'), pg_is_in_recovery(), \
     current_setting('transaction_read_only'), current_setting('fsync'), current_setting('full_page_writes'), \
     current_setting('synchronous_commit'), current_setting('synchronous_standby_names')";

const CUTS: &str = "a power cut of the database takes acknowledged writes with it";
const FAILOVERS: &str = "a failover of the database takes acknowledged writes with it";

pub struct Conditions {
    durability: Durability,
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    /// What an operator should know of the database, however well it is.
    doubts: Vec<String>,
    /// Commits have waited for standbys of the database.
    replicated: bool,
}

impl Conditions {
    pub fn new(durability: Durability) -> Self {
        Self { durability, known: Mutex::default() }
    }

    /// Statements that a session begins with.
    pub fn settings(&self) -> String {
        let commit = if self.durability == Durability::Os { OS } else { SYNC };
        format!("{ISOLATION}; {commit}")
    }

    /// Checks a session that is to write, outside of a transaction.
    pub async fn check(&self, session: &Session) -> Result<(), Failure> {
        let row = session.one(CHECK, &[]).await?;
        let encoding: &str = row.try_get(0)?;
        if encoding != "UTF8" {
            return Err(Failure::refused(format!("its encoding is {encoding}, and the log needs UTF8")));
        }
        if row.try_get(1)? {
            return Err(Failure::unusable("it is a standby of another database, and read-only".into()));
        }
        if row.try_get::<_, &str>(2)? == "on" {
            let reason = "it is read-only: default_transaction_read_only is on for this role or database";
            return Err(Failure::unusable(reason.into()));
        }
        let mut doubts = Vec::new();
        for (index, name) in [(3, "fsync"), (4, "full_page_writes")] {
            if row.try_get::<_, &str>(index)? == "off" {
                doubts.push(format!("{name} is off: {CUTS}"));
            }
        }
        let commit: &str = row.try_get(5)?;
        if self.durability == Durability::Sync && !["on", "remote_apply"].contains(&commit) {
            doubts.push(format!("synchronous_commit is {commit}: {CUTS}"));
        }
        let is_replicated = !row.try_get::<_, &str>(6)?.trim().is_empty();
        self.note(doubts, is_replicated);
        Ok(())
    }

    /// What the promise lacks, as of the last check.
    pub fn doubts(&self) -> Vec<String> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).doubts.clone()
    }

    fn note(&self, mut doubts: Vec<String>, is_replicated: bool) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.replicated |= is_replicated;
        if known.replicated && !is_replicated {
            doubts.push(format!("synchronous_standby_names is empty now: {FAILOVERS}"));
        }
        for doubt in doubts.iter().filter(|doubt| !known.doubts.contains(doubt)) {
            warn!("{doubt}");
        }
        for doubt in known.doubts.iter().filter(|doubt| !doubts.contains(doubt)) {
            info!("no longer so: {doubt}");
        }
        known.doubts = doubts;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loss_of_standbys_is_noted_once_there_were_some() {
        let conditions = Conditions::new(Durability::Sync);
        conditions.note(Vec::new(), false);
        assert!(conditions.doubts().is_empty());
        conditions.note(Vec::new(), true);
        assert!(conditions.doubts().is_empty());
        conditions.note(vec!["fsync is off".into()], false);
        let doubts = conditions.doubts();
        assert!(doubts.len() == 2 && doubts[1].contains("synchronous_standby_names is empty now"), "{doubts:?}");
        conditions.note(Vec::new(), true);
        assert!(conditions.doubts().is_empty());
    }
}
