//! Whether the server is ready, and if not, which part of it is not.

use std::fmt;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use kvs_metrics::{Measured, Page};
use kvs_runtime::Tasks;
use kvs_txlog::{Condition, TransactionLog};

use crate::guest::Shards;
use crate::lines;

/// How far the server is in its life. It only goes forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// The log is being opened, the guest compiled.
    Starting,
    /// The guest is being given what the log holds.
    Replaying,
    Serving,
    /// Stopping: requests in progress are finished, and no new ones should be sent here.
    Stopping,
}

pub struct Health {
    phase: Mutex<Phase>,
    log: OnceLock<Arc<dyn TransactionLog>>,
    /// Why there is none yet, where that is known.
    log_waits: Mutex<Option<String>>,
    guest: OnceLock<Arc<Shards>>,
    /// Parts that this server has and others have not.
    others: Mutex<Vec<(&'static str, Check)>>,
    tasks: Tasks,
}

/// Tells how a part is.
type Check = Box<dyn Fn() -> Condition + Send>;

impl Health {
    pub fn new(tasks: Tasks) -> Self {
        Self {
            phase: Mutex::new(Phase::Starting),
            log: OnceLock::new(),
            log_waits: Mutex::default(),
            guest: OnceLock::new(),
            others: Mutex::default(),
            tasks,
        }
    }

    pub fn set_log(&self, log: Arc<dyn TransactionLog>) {
        // One log is opened in the life of a process.
        let _ = self.log.set(log);
    }

    /// Records why the log cannot be opened yet.
    pub fn log_waits(&self, reason: String) {
        *self.log_waits.lock().unwrap_or_else(PoisonError::into_inner) = Some(reason);
    }

    pub fn set_guest(&self, guest: Arc<Shards>) {
        // One store is built in the life of a process.
        let _ = self.guest.set(guest);
    }

    /// Adds a part.
    pub fn add(&self, name: &'static str, check: impl Fn() -> Condition + Send + 'static) {
        self.others.lock().unwrap_or_else(PoisonError::into_inner).push((name, Box::new(check)));
    }

    pub fn reached(&self, phase: Phase) {
        let mut current = self.phase.lock().unwrap_or_else(PoisonError::into_inner);
        *current = phase.max(*current);
    }

    /// Returns true if this server is primary and ready, for a proxy that sends everything to the primary, and a line with the
    /// reason.
    pub fn primary(&self) -> (bool, String) {
        let Some(log) = self.log.get() else { return (false, "not open yet\n".to_owned()) };
        match (log.read_only(), self.report()) {
            (Some(reason), _) => (false, format!("{reason}\n")),
            (None, (true, _)) => (true, "primary\n".to_owned()),
            (None, (false, report)) => (false, report),
        }
    }

    /// Returns true if this server follows a primary and is ready, for a proxy that spreads stale reads, and a line with the
    /// reason.
    pub fn replica(&self) -> (bool, String) {
        let read_only = self.log.get().is_some_and(|log| log.read_only().is_some());
        match self.report() {
            (true, _) if read_only => (true, "replica\n".to_owned()),
            (true, _) => (false, "primary\n".to_owned()),
            (false, report) => (false, report),
        }
    }

    /// Returns true if requests should be sent here, and a line for each part that this depends on.
    pub fn report(&self) -> (bool, String) {
        let mut ready = true;
        let mut report = String::new();
        for (name, check) in self.parts() {
            match check {
                Ok(condition) => report.push_str(&format!("[+]{name} {condition}\n")),
                Err(reason) => {
                    ready = false;
                    report.push_str(&format!("[-]{name} {reason}\n"));
                }
            }
        }
        (ready, report)
    }

    /// The parts, in the order of the report.
    fn parts(&self) -> Vec<(&'static str, Result<String, String>)> {
        let phase = *self.phase.lock().unwrap_or_else(PoisonError::into_inner);
        let log = match self.log.get() {
            None => {
                let reason = self.log_waits.lock().unwrap_or_else(PoisonError::into_inner);
                Err(reason.as_ref().map_or("not open yet".to_owned(), |reason| format!("not open yet: {reason}")))
            }
            Some(log) => line(log.condition()),
        };
        let guest = match phase {
            Phase::Starting => Err("not started yet".to_owned()),
            Phase::Replaying => Err("replaying the log".to_owned()),
            Phase::Serving | Phase::Stopping => {
                line(self.guest.get().map_or(Condition::Well, |guest| guest.condition()))
            }
        };
        let edge = match phase {
            Phase::Starting | Phase::Replaying => Err("not listening yet".to_owned()),
            Phase::Serving => Ok("ok".to_owned()),
            Phase::Stopping => Err("stopping".to_owned()),
        };
        let others = self.others.lock().unwrap_or_else(PoisonError::into_inner);
        let others = others.iter().map(|(name, check)| (*name, line(check())));
        // They come back by themselves, and requests do not wait for them.
        let tasks = line(self.tasks.condition().map_or(Condition::Well, Condition::But));
        let lost = lines::failure().map(|reason| format!("log lines are lost: {reason}"));
        let diagnostics = line(lost.map_or(Condition::Well, Condition::But));
        let own = [("log", log), ("guest", guest), ("edge", edge)].into_iter();
        own.chain(others).chain([("tasks", tasks), ("diagnostics", diagnostics)]).collect()
    }
}

impl Measured for Health {
    fn measure(&self, page: &mut Page<'_>) -> fmt::Result {
        let parts = self.parts();
        let ready = parts.iter().all(|(_, check)| check.is_ok());
        page.gauge("ready", "1 when requests should be sent here, as /readyz says", u64::from(ready))?;
        let parts = parts.iter().map(|(name, check)| ([("part", *name)], u64::from(check.is_ok())));
        page.gauges("part_ready", "1 for each part that is ready", parts)
    }
}

/// The line of a part: an error when requests should be sent elsewhere.
fn line(condition: Condition) -> Result<String, String> {
    match condition {
        Condition::Well => Ok("ok".to_owned()),
        Condition::But(reason) => Ok(format!("ok, but {reason}")),
        Condition::Unfit(reason) => Err(reason),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use kvs_runtime::Env;
    use kvs_txlog::file::{Durability, FileLog, Options};

    const OTHERS: &str = "[+]tasks ok\n[+]diagnostics ok\n";

    #[test]
    fn it_is_ready_from_the_time_it_serves_until_it_stops_or_the_log_fails() {
        let data = tempfile::tempdir().expect("a temporary directory can be made");
        let health = Health::new(Tasks::system());
        assert_eq!(
            health.report(),
            (false, format!("[-]log not open yet\n[-]guest not started yet\n[-]edge not listening yet\n{OTHERS}"))
        );
        let data = data.path().to_owned();
        let (durability, env) = (Durability::Sync, Env::real());
        let (segment_bytes, group_bytes, advertise) = (1 << 20, 1 << 10, None);
        let retain = Duration::ZERO;
        let options = Options { data, segment_bytes, group_bytes, durability, retain, advertise, env };
        let log: Arc<dyn TransactionLog> = Arc::new(FileLog::open(options).expect("a new log can be opened"));
        health.set_log(Arc::clone(&log));
        health.reached(Phase::Replaying);
        assert_eq!(
            health.report(),
            (false, format!("[+]log ok\n[-]guest replaying the log\n[-]edge not listening yet\n{OTHERS}"))
        );
        health.reached(Phase::Serving);
        assert_eq!(health.report(), (true, format!("[+]log ok\n[+]guest ok\n[+]edge ok\n{OTHERS}")));
        assert_eq!(health.primary(), (true, "primary\n".into()));
        assert_eq!(health.replica(), (false, "primary\n".into()));
        log.watermark().latch("input/output error".into());
        let failed = format!("[-]log failed: input/output error\n[+]guest ok\n[+]edge ok\n{OTHERS}");
        assert_eq!(health.report(), (false, failed.clone()));
        assert_eq!(health.primary(), (false, failed));
        health.reached(Phase::Stopping);
        health.reached(Phase::Serving);
        assert!(health.report().1.ends_with(&format!("[-]edge stopping\n{OTHERS}")));
    }
}
