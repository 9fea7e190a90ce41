//! A process as far as the log is concerned: it follows, takes over, serves writes and reads, and begins again when it was
//! deposed.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use super::engine::{Cluster, LOG};
use super::executor::{Executor, Locals, Process, Sim, WORLD};
use super::mutants;
use crate::cluster::mark::Mark;
use crate::cluster::{Options, Shared, Stored, replay};
use crate::{AppendError, Event, EventRef, News};

const GROUP_BYTES: u64 = 1 << 16;

/// The world of one history.
#[derive(Clone)]
pub struct World {
    pub sim: Sim,
    pub locals: Locals,
    pub cluster: Cluster,
    pub hosts: Rc<Vec<RefCell<Host>>>,
    pub seen: Rc<Seen>,
}

/// A host, and the process on it.
pub struct Host {
    pub process: Process,
    pub drift: i32,
    pub lease: Duration,
    /// The watermark file.
    pub mark: Mark,
    /// None until the log is open.
    pub log: Option<Arc<Shared>>,
    /// What the last read found: its lease is over.
    pub is_over: Cell<bool>,
}

/// What clients were answered.
#[derive(Default)]
pub struct Seen {
    pub processes: Cell<Process>,
    pub keys: Cell<u64>,
    /// Sequences and keys of acknowledged writes.
    pub acknowledged: RefCell<Vec<(u64, String)>>,
    pub newest: Cell<u64>,
    pub reads: Cell<u64>,
    pub takeovers: Cell<u64>,
}

impl World {
    /// Creates a world with this many hosts.
    pub fn new(executor: &Executor, hosts: usize) -> Self {
        let sim = executor.sim.clone();
        let host = || {
            RefCell::new(Host {
                process: WORLD,
                // Clocks run at rates that differ by a fifth at most.
                drift: sim.dice(17) as i32 - 8,
                lease: sim.millis(1_000..10_000),
                mark: Mark::new(LOG),
                log: None,
                is_over: Cell::default(),
            })
        };
        let world = Self {
            locals: executor.locals(),
            cluster: Cluster::new(),
            hosts: Rc::new((0..hosts).map(|_| host()).collect()),
            seen: Rc::default(),
            sim: sim.clone(),
        };
        (0..hosts).for_each(|host| world.start(host));
        world
    }

    pub fn violation(&self, what: String) {
        self.cluster.state().violations.push(format!("at {:?}: {what}", self.sim.now()));
    }

    /// Starts a process on a host.
    pub fn start(&self, host: usize) {
        let process = self.seen.processes.get() + 1;
        self.seen.processes.set(process);
        {
            let mut host = self.hosts[host].borrow_mut();
            (host.process, host.log) = (process, None);
        }
        let world = self.clone();
        self.locals.start(process, async move { world.run(host, process).await });
    }

    /// Kills the process of a host, and starts another one later.
    pub fn kill(&self, host: usize, down: Duration) {
        let process = self.hosts[host].borrow().process;
        self.sim.kill(process);
        {
            let mut host = self.hosts[host].borrow_mut();
            if let Some(log) = host.log.take() {
                host.mark = log.mark();
            }
        }
        let world = self.clone();
        self.locals.start(WORLD, async move {
            world.sim.sleep(down).await;
            if world.hosts[host].borrow().process == process {
                world.start(host);
            }
        });
    }

    /// Returns the log of a process on a host, not open yet.
    pub fn log(&self, host: usize, process: Process, standby: bool) -> Arc<Shared> {
        let Host { drift, lease, mark, .. } = *self.hosts[host].borrow();
        let env = self.sim.env(process, drift);
        let engine = self.cluster.connect(&self.sim, host);
        let stored = Stored { engine, name: "fake engine".into(), mark, mark_file: None, group_bytes: GROUP_BYTES };
        let options = Options { group_bytes: None, standby, lease, advertise: None, env: env.clone() };
        Arc::new(Shared::new(stored, &options, env).expect("the options are valid"))
    }

    async fn run(self, host: usize, process: Process) {
        let shared = self.log(host, process, true);
        loop {
            match shared.open(true).await {
                Ok(_) => break,
                Err(error) => {
                    // Reads can be damaged for as long as they are tried.
                    if error.to_string().contains("lost") {
                        self.violation(format!("process {process} cannot open the log: {error}"));
                    }
                    self.sim.sleep(Duration::from_secs(1)).await;
                }
            }
        }
        let (mut applied, mut news) = (0, shared.news.subscribe());
        loop {
            let News { newest, holder, .. } = news.borrow_and_update().clone();
            while applied < newest {
                if !self.apply(&shared, &mut applied).await {
                    self.sim.sleep(Duration::from_secs(1)).await;
                }
            }
            if holder.is_none() {
                break;
            }
            if self.hosts[host].borrow().log.is_none() {
                self.hosts[host].borrow_mut().log = Some(Arc::clone(&shared));
            }
            if news.changed().await.is_err() {
                return;
            }
        }
        shared.begin();
        self.seen.takeovers.set(self.seen.takeovers.get() + 1);
        self.hosts[host].borrow_mut().log = Some(Arc::clone(&shared));
        let reason = shared.watermark.latched().await;
        let is_holder = self.cluster.state().holder.as_ref().is_some_and(|holder| holder.id == shared.holder.id);
        if !reason.starts_with("lost the epoch") {
            self.violation(format!("process {process} failed: {reason}"));
        } else if is_holder {
            self.violation(format!("process {process} stepped down, but nobody has taken over"));
        }
        self.kill(host, Duration::from_millis(100));
    }

    /// Applies what is new, and checks that it is what is true.
    async fn apply(&self, shared: &Shared, applied: &mut u64) -> bool {
        let mut wrong = None;
        let after = *applied;
        let mut newest = after;
        let cluster = self.cluster.clone();
        let mut receive = |entries: &[crate::Entry<'_>]| {
            let state = cluster.state();
            for entry in entries {
                let EventRef::Delete(key) = entry.event else { continue };
                let truth = state.keys.get(entry.sequence as usize - 1);
                if entry.sequence != newest + 1 || truth.is_none_or(|truth| truth != key) {
                    wrong = Some(format!("entry {} after {newest} is {key}, but is {truth:?}", entry.sequence));
                }
                newest = entry.sequence;
            }
            Ok(())
        };
        let until = replay::replay(shared, after, &mut receive).await;
        if let Some(wrong) = wrong {
            self.violation(wrong);
        }
        let Ok(until) = until else { return false };
        if newest != until {
            self.violation(format!("a replay up to {until} ended with entry {newest}"));
        }
        *applied = until;
        shared.follow(until);
        true
    }

    /// Writes once, on any host that accepts it.
    pub async fn write(&self, host: usize) {
        let Some(shared) = self.hosts[host].borrow().log.clone() else { return };
        let key = format!("k{}", self.seen.keys.get());
        self.seen.keys.set(self.seen.keys.get() + 1);
        match shared.queue.append(&shared.breaker, 0, &[Event::Delete(key.clone())]) {
            Ok(sequence) => {
                let acknowledged = tokio::select! {
                    biased;
                    reached = shared.watermark.reached(sequence) => reached.is_ok(),
                    () = self.sim.sleep(Duration::from_secs(20)) => false,
                };
                if acknowledged {
                    self.seen.newest.set(self.seen.newest.get().max(sequence));
                    self.seen.acknowledged.borrow_mut().push((sequence, key));
                }
            }
            Err(AppendError::ReadOnly | AppendError::Unavailable | AppendError::InsufficientStorage) => {}
            Err(error) => self.violation(format!("a write was rejected: {error}")),
        }
        self.check_watermark(&shared);
    }

    /// Reads once, as the edge does: the guest's call, then the watermark, then the lease.
    pub async fn read(&self, host: usize) {
        let Some(shared) = self.hosts[host].borrow().log.clone() else { return };
        if shared.read_only().is_some() {
            return;
        }
        let newest = self.seen.newest.get();
        let shown = shared.queue.appended();
        // The call takes a moment, in which the process can be paused.
        let call = self.sim.millis(0..2);
        self.sim.sleep(call).await;
        if shared.watermark.reached(shown).await.is_err() {
            return;
        }
        let is_over = shared.reads_refused().is_some();
        let was_over = self.hosts[host].borrow().is_over.replace(is_over);
        // At any time during the request it is right: then nobody had claimed the log when the request came. Before is not.
        let is_refused = if mutants::is("LeaseCheckedBefore") { was_over } else { is_over };
        if is_refused {
            return;
        }
        self.seen.reads.set(self.seen.reads.get() + 1);
        if shown < newest {
            self.violation(format!("a read shows {shown}, but {newest} was acknowledged before it"));
        }
        self.check_watermark(&shared);
    }

    /// Watchers get what is below the watermark.
    fn check_watermark(&self, shared: &Shared) {
        let (durable, truth) = (shared.watermark.durable(), self.cluster.state().sequence());
        if durable > truth {
            self.violation(format!("{durable} counts as durable, but the log ends at {truth}"));
        }
    }
}
