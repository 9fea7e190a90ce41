//! Whether the server is ready, and if not, which part of it is not.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use kvs_runtime::Tasks;
use kvs_txlog::{Condition, TransactionLog};

/// How far the server is in its life. It only goes forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// The log is being opened, the guest compiled.
    Starting,
    /// The guest is being given what the log holds.
    Replaying,
    Serving,
    /// Told to stop: what is under way is finished, nothing new should be sent here.
    Stopping,
}

pub struct Health {
    phase: Mutex<Phase>,
    log: OnceLock<Arc<dyn TransactionLog>>,
    tasks: Tasks,
}

impl Health {
    pub fn new(tasks: Tasks) -> Self {
        Self { phase: Mutex::new(Phase::Starting), log: OnceLock::new(), tasks }
    }

    pub fn set_log(&self, log: Arc<dyn TransactionLog>) {
        // One log is opened in the life of a process.
        let _ = self.log.set(log);
    }

    pub fn reached(&self, phase: Phase) {
        let mut current = self.phase.lock().unwrap_or_else(PoisonError::into_inner);
        *current = phase.max(*current);
    }

    /// Whether requests should be sent here, and a line for each part that has a say in it.
    pub fn report(&self) -> (bool, String) {
        let phase = *self.phase.lock().unwrap_or_else(PoisonError::into_inner);
        let log = match self.log.get() {
            None => Err("not open yet".to_owned()),
            Some(log) => match log.condition() {
                Condition::Well => Ok("ok".to_owned()),
                Condition::But(reason) => Ok(format!("ok, but {reason}")),
                Condition::Unfit(reason) => Err(reason),
            },
        };
        let guest = match phase {
            Phase::Starting => Err("not started yet".to_owned()),
            Phase::Replaying => Err("replaying the log".to_owned()),
            Phase::Serving | Phase::Stopping => Ok("ok".to_owned()),
        };
        let edge = match phase {
            Phase::Starting | Phase::Replaying => Err("not listening yet".to_owned()),
            Phase::Serving => Ok("ok".to_owned()),
            Phase::Stopping => Err("stopping".to_owned()),
        };
        let mut ready = true;
        let mut report = String::new();
        for (name, check) in [("log", log), ("guest", guest), ("edge", edge)] {
            match check {
                Ok(condition) => report.push_str(&format!("[+]{name} {condition}\n")),
                Err(reason) => {
                    ready = false;
                    report.push_str(&format!("[-]{name} {reason}\n"));
                }
            }
        }
        // They come back by themselves, and requests do not wait for them.
        if let Some(condition) = self.tasks.condition() {
            report.push_str(&format!("[+]tasks ok, but {condition}\n"));
        }
        (ready, report)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvs_runtime::Env;
    use kvs_txlog::file::{Durability, FileLog, Options};

    #[test]
    fn it_is_ready_from_the_time_it_serves_until_it_stops_or_the_log_fails() {
        let data = tempfile::tempdir().expect("a temporary directory can be made");
        let health = Health::new(Tasks::system());
        assert_eq!(
            health.report(),
            (false, "[-]log not open yet\n[-]guest not started yet\n[-]edge not listening yet\n".into())
        );
        let data = data.path().to_owned();
        let (durability, env) = (Durability::Sync, Env::real());
        let options = Options { data, segment_bytes: 1 << 20, group_bytes: 1 << 10, durability, env };
        let log: Arc<dyn TransactionLog> = Arc::new(FileLog::open(options).expect("a new log can be opened"));
        health.set_log(Arc::clone(&log));
        health.reached(Phase::Replaying);
        assert_eq!(
            health.report(),
            (false, "[+]log ok\n[-]guest replaying the log\n[-]edge not listening yet\n".into())
        );
        health.reached(Phase::Serving);
        assert_eq!(health.report(), (true, "[+]log ok\n[+]guest ok\n[+]edge ok\n".into()));
        log.watermark().latch("input/output error".into());
        assert_eq!(health.report(), (false, "[-]log failed: input/output error\n[+]guest ok\n[+]edge ok\n".into()));
        health.reached(Phase::Stopping);
        health.reached(Phase::Serving);
        assert!(health.report().1.ends_with("[-]edge stopping\n"));
    }
}
