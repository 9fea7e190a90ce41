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
use crate::{AppendError, Event, EventRef, Forgotten, News, Put};

const GROUP_BYTES: u64 = 1 << 16;
/// Small, so that each history has several compactions: heartbeats and single entries take about a hundred bytes each.
const COMPACTION_BYTES: u64 = 2 << 10;
/// Number of keys that are put again and again. Each put has a value of its own.
const KEYS: u64 = 20;

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
    /// Minimum growth between two compactions, if it is more than usual.
    pub compaction_bytes: Cell<u64>,
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
        let compaction_bytes = COMPACTION_BYTES.max(self.seen.compaction_bytes.get());
        let stored = Stored {
            engine,
            name: "fake engine".into(),
            mark,
            mark_file: None,
            copies: None,
            group_bytes: GROUP_BYTES,
            compaction_bytes,
        };
        let options =
            Options { group_bytes: None, standby, lease, retain: Duration::ZERO, advertise: None, env: env.clone() };
        Arc::new(Shared::new(stored, &options, env).expect("the options are valid"))
    }

    async fn run(self, host: usize, process: Process) {
        let shared = self.log(host, process, true);
        loop {
            match shared.open(true).await {
                Ok(_) => break,
                Err(error) => {
                    // Reads can be damaged for as long as they are tried.
                    if error.to_string().contains("lost") || error.to_string().contains("are gone") {
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

    /// Applies what is new, and checks that it is what is true. From the start, what was superseded or deleted since can be left
    /// out; where more than that was dropped, all is applied again from the start.
    async fn apply(&self, shared: &Shared, applied: &mut u64) -> bool {
        let mut wrong = None;
        let after = *applied;
        let mut newest = after;
        let mut left_out = Vec::new();
        let cluster = self.cluster.clone();
        let mut receive = |entries: &[crate::Entry<'_>]| {
            let state = cluster.state();
            for entry in entries {
                let is = match entry.event {
                    EventRef::Delete(key) => key,
                    EventRef::Put(put) => std::str::from_utf8(put.value)?,
                };
                let truth = state.keys.get(entry.sequence as usize - 1);
                if entry.sequence <= newest || truth.is_none_or(|truth| truth != is) {
                    wrong = Some(format!("entry {} after {newest} is {is}, but is {truth:?}", entry.sequence));
                }
                left_out.extend(newest + 1..entry.sequence);
                newest = entry.sequence;
            }
            Ok(())
        };
        let until = replay::replay(shared, after, &mut receive).await;
        if let Some(wrong) = wrong {
            self.violation(wrong);
        }
        let until = match until {
            Ok(until) => until,
            Err(error) => {
                if error.is::<Forgotten>() {
                    *applied = 0;
                }
                return false;
            }
        };
        left_out.extend(newest + 1..until + 1);
        if let Some(missed) = left_out.into_iter().find(|missed| after > 0 || !self.is_superseded(*missed, until)) {
            self.violation(format!("a replay from {after} to {until} leaves out entry {missed}"));
        }
        *applied = until;
        shared.follow(until);
        true
    }

    /// Returns whether the state at `until` is the same without this entry.
    fn is_superseded(&self, entry: u64, until: u64) -> bool {
        let keys = &self.cluster.state().keys;
        let Some(number) = number(&keys[entry as usize - 1]) else { return false };
        let mut later = keys[entry as usize..until as usize].iter().filter_map(|key| self::number(key));
        is_delete(number) || later.any(|later| !is_delete(later) && later % KEYS == number % KEYS)
    }

    /// Writes once, on any host that accepts it.
    pub async fn write(&self, host: usize) {
        let Some(shared) = self.hosts[host].borrow().log.clone() else { return };
        let number = self.seen.keys.get();
        let key = format!("k{number}");
        self.seen.keys.set(number + 1);
        let event = if is_delete(number) {
            Event::Delete(key.clone())
        } else {
            let value = key.clone().into_bytes();
            Event::Put(Put { key: format!("key {}", number % KEYS), value, metadata: Vec::new(), expires: None })
        };
        match shared.queue.append(&shared.breaker, 0, &[event]) {
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

/// The number of a write.
fn number(key: &str) -> Option<u64> {
    key.strip_prefix('k')?.parse().ok()
}

/// Some writes delete a key that there never was.
fn is_delete(number: u64) -> bool {
    number % 7 == 3
}
