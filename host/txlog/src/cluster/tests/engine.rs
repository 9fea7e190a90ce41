//! The fake engine: one log that is true, and every way in which the calls of a real one can go wrong.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::mem;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::oneshot;
use uuid::Uuid;

use super::executor::{Sim, WORLD};
use crate::cluster::engine::{Call, Ends, Engine, Put, ReadError};
use crate::cluster::frame::{Holder, Kind, Tip, decoded};

pub const LOG: Uuid = Uuid::from_u128(0x6b76_7300);
const ACK_TIMEOUT: Duration = Duration::from_millis(500);
const REPLICAS: usize = 3;
/// Chance that the end of the log is answered slowly, in percent.
const SLOW_ENDS: u64 = 5;

/// The engine, and what goes wrong with it at the moment.
#[derive(Clone)]
pub struct Cluster(Arc<Mutex<State>>);

#[derive(Default)]
pub struct State {
    pub frames: Vec<Bytes>,
    tip: Tip,
    pub holder: Option<Holder>,
    /// Values of the puts and keys of the deletes, by sequence: each is written once.
    pub keys: Vec<String>,
    /// Number of frames that were dropped from the beginning of these.
    pub dropped: usize,
    /// Frames of snapshots, by position.
    pub snapshots: BTreeMap<u64, Vec<Bytes>>,
    /// Frames that a replica has.
    replicas: [usize; REPLICAS],
    pub no_leader: bool,
    /// No space is left.
    pub is_full: bool,
    /// A former leader answers what the end of the log was when it led.
    pub former_end: Option<u64>,
    /// Hosts that are cut off.
    pub cut_off: Vec<usize>,
    /// Chances, in percent.
    pub lost_requests: u64,
    pub lost_acks: u64,
    pub late_requests: u64,
    pub refusals: u64,
    pub damaged_reads: u64,
    pub lag: u64,
    /// Frames that a replica lost.
    lost: Option<(usize, usize)>,
    pub violations: Vec<String>,
}

impl State {
    pub fn sequence(&self) -> u64 {
        self.tip.sequence
    }

    /// Loses a frame in one replica.
    pub fn lose_frame(&mut self, replica: usize, frame: usize) {
        self.lost = Some((replica, frame));
    }

    /// Repairs the replica that lost a frame.
    pub fn repair(&mut self) {
        self.lost = None;
    }

    /// Loses the last frames in all replicas.
    pub fn lose_end(&mut self, count: usize) {
        let mut frames = mem::take(&mut self.frames);
        frames.truncate(frames.len() - count);
        (self.tip, self.keys) = (Tip::default(), Vec::new());
        frames.iter().for_each(|frame| self.append(frame));
        self.replicas = [self.frames.len(); REPLICAS];
    }

    /// Ends all trouble but a lost frame.
    pub fn heal(&mut self) {
        (self.no_leader, self.is_full, self.former_end, self.lag) = (false, false, None, 0);
        self.cut_off.clear();
        (self.lost_requests, self.lost_acks, self.late_requests) = (0, 0, 0);
        (self.refusals, self.damaged_reads) = (0, 0);
    }

    fn commit(&mut self, sim: &Sim, snapshot: Option<u64>, after: u64, frame: &Bytes) -> Option<Put> {
        if self.no_leader {
            return None;
        }
        if self.is_full {
            return Some(Put::Full);
        }
        let is_refused = sim.chance(self.refusals);
        if let Some(position) = snapshot {
            let frames = self.snapshots.get_mut(&position)?;
            if frames.len() as u64 != after || is_refused {
                return Some(Put::Refused);
            }
            frames.push(frame.clone());
            return Some(Put::Durable);
        }
        if self.frames.len() as u64 != after || is_refused {
            return Some(Put::Refused);
        }
        self.append(frame);
        for replica in &mut self.replicas {
            if !sim.chance(self.lag) {
                *replica = self.frames.len();
            }
        }
        Some(Put::Durable)
    }

    fn append(&mut self, frame: &Bytes) {
        let mut is_void = false;
        match self.tip.accept(LOG, frame) {
            Ok(Kind::Held(holder)) => self.holder = Some(holder),
            Ok(kind) => is_void = kind == Kind::Void,
            Err(reason) => self.violations.push(format!("frame {} was put, but {reason}", self.frames.len() + 1)),
        }
        let entries = decoded(LOG, frame)
            .filter(|_| !is_void)
            .into_iter()
            .flat_map(|frame| frame.entries().flatten().collect::<Vec<_>>());
        self.keys.extend(entries.map(|entry| match entry.put {
            Some(put) => String::from_utf8_lossy(put.value).into_owned(),
            None => entry.key.to_owned(),
        }));
        self.frames.push(frame.clone());
    }
}

impl Cluster {
    pub fn new() -> Self {
        Self(Arc::default())
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("nothing panics under it")
    }

    pub fn connect(&self, sim: &Sim, host: usize) -> Arc<dyn Engine> {
        Arc::new(Connection { cluster: self.clone(), sim: sim.clone(), host, snapshot: None })
    }
}

/// The engine as one host reaches it.
#[derive(Clone)]
struct Connection {
    cluster: Cluster,
    sim: Sim,
    host: usize,
    /// Position of the snapshot, if it is not the log.
    snapshot: Option<u64>,
}

impl Connection {
    fn is_cut_off(&self) -> bool {
        self.cluster.state().cut_off.contains(&self.host)
    }

    /// Waits as long as a message takes. Returns false if it is lost.
    async fn pass(&self) -> bool {
        let delay = self.sim.millis(1..4);
        self.sim.sleep(delay).await;
        !self.is_cut_off()
    }

    fn unavailable() -> ReadError {
        ReadError::Unavailable("no answer".into())
    }

    fn gone() -> ReadError {
        ReadError::Gone("there is no such snapshot".into())
    }

    /// Makes a request to the leader, whose answer can be lost.
    fn ask<T: Send + Sync + 'static>(
        &self,
        act: impl FnOnce(&mut State) -> Result<T, ReadError> + Send + 'static,
    ) -> Call<'static, Result<T, ReadError>> {
        let this = self.clone();
        Box::pin(async move {
            let is_there = this.pass().await && !this.cluster.state().no_leader;
            let lost_acks = this.cluster.state().lost_acks;
            let answer = if is_there { Some(act(&mut this.cluster.state())) } else { None };
            match answer.filter(|_| !this.sim.chance(lost_acks)) {
                Some(answer) if this.pass().await => answer,
                _ => {
                    this.sim.sleep(ACK_TIMEOUT).await;
                    Err(Self::unavailable())
                }
            }
        })
    }
}

impl Engine for Connection {
    fn put(&self, after: u64, frame: Bytes) -> Call<'static, Put> {
        let this = self.clone();
        Box::pin(async move {
            let (answer, answered) = oneshot::channel();
            let there = this.clone();
            // The request goes its way whatever becomes of the process.
            this.sim.spawn(WORLD, async move {
                let Connection { cluster, sim, .. } = &there;
                let (lost_requests, lost_acks, late_requests) = {
                    let state = cluster.state();
                    (state.lost_requests, state.lost_acks, state.late_requests)
                };
                if !there.pass().await || sim.chance(lost_requests) {
                    return;
                }
                if sim.chance(late_requests) {
                    let delay = sim.millis(500..12_000);
                    sim.sleep(delay).await;
                }
                let outcome = cluster.state().commit(sim, there.snapshot, after, &frame);
                if there.pass().await
                    && !sim.chance(lost_acks)
                    && let Some(outcome) = outcome
                {
                    let _ = answer.send(outcome);
                }
            });
            tokio::select! {
                biased;
                Ok(outcome) = answered => outcome,
                () = this.sim.sleep(ACK_TIMEOUT) => Put::Unknown("no answer".into()),
            }
        })
    }

    fn read(&self, from: u64, wait: Duration) -> Call<'_, Result<Vec<Bytes>, ReadError>> {
        Box::pin(async move {
            let until = self.sim.now() + wait;
            loop {
                if !self.pass().await {
                    self.sim.sleep(ACK_TIMEOUT).await;
                    return Err(Self::unavailable());
                }
                let replica = self.sim.dice(REPLICAS as u64) as usize;
                let frames = {
                    let mut state = self.cluster.state();
                    if !self.sim.chance(state.lag) {
                        state.replicas[replica] = state.frames.len();
                    }
                    let from = from as usize - 1;
                    let (all, there) = match self.snapshot {
                        None if from < state.dropped => return Err(ReadError::Missing("it was dropped".into())),
                        None => (&state.frames, state.replicas[replica]),
                        Some(position) => match state.snapshots.get(&position) {
                            Some(frames) => (frames, frames.len()),
                            None => return Err(Self::gone()),
                        },
                    };
                    let until = there.min(from + 1 + self.sim.dice(16) as usize);
                    let mut frames: Vec<_> = all.get(from..until).unwrap_or_default().to_vec();
                    let lost = state.lost.filter(|_| self.snapshot.is_none());
                    if let Some((_, lost)) = lost.filter(|(in_replica, _)| *in_replica == replica)
                        && (from..until).contains(&lost)
                    {
                        if lost == from {
                            return Err(ReadError::Missing("a replica lacks it".into()));
                        }
                        frames.truncate(lost - from);
                    }
                    if !frames.is_empty() && self.sim.chance(state.damaged_reads) {
                        let index = self.sim.dice(frames.len() as u64) as usize;
                        // Not the first one: the engine knows which position it was asked for.
                        if index == 0 || self.sim.chance(50) {
                            let mut bytes = frames[index].to_vec();
                            let at = self.sim.dice(bytes.len() as u64) as usize;
                            bytes[at] ^= 1;
                            frames[index] = bytes.into();
                        } else {
                            // As a damaged replica that does not notice.
                            frames.remove(index);
                        }
                    }
                    frames
                };
                if !self.pass().await {
                    self.sim.sleep(ACK_TIMEOUT).await;
                    return Err(Self::unavailable());
                }
                if !frames.is_empty() || self.sim.now() >= until {
                    return Ok(frames);
                }
                self.sim.sleep(Duration::from_millis(120)).await;
            }
        })
    }

    fn ends(&self) -> Call<'_, Result<Ends, ReadError>> {
        Box::pin(async move {
            let is_there = self.pass().await && !self.cluster.state().no_leader;
            let ends = {
                let state = self.cluster.state();
                match self.snapshot {
                    None => {
                        let (dropped, last) = (state.dropped as u64, state.frames.len() as u64);
                        let last = state.former_end.filter(|end| *end > dropped).unwrap_or(last);
                        let kept = &state.frames[dropped as usize..last.min(state.frames.len() as u64) as usize];
                        let bytes = kept.iter().map(|frame| frame.len() as u64).sum();
                        Ok(Ends { first: dropped + 1, last, frames: last - dropped, bytes })
                    }
                    Some(position) => state.snapshots.get(&position).ok_or_else(Self::gone).map(|frames| {
                        let last = frames.len() as u64;
                        Ends {
                            first: 1,
                            last,
                            frames: last,
                            bytes: frames.iter().map(|frame| frame.len() as u64).sum(),
                        }
                    }),
                }
            };
            if self.sim.chance(SLOW_ENDS) {
                let delay = self.sim.millis(0..2_000);
                self.sim.sleep(delay).await;
            }
            if !is_there || !self.pass().await {
                self.sim.sleep(ACK_TIMEOUT).await;
                return Err(Self::unavailable());
            }
            ends
        })
    }

    fn drop_until(&self, position: u64) -> Call<'_, Result<(), ReadError>> {
        self.ask(move |state| {
            state.dropped = state.dropped.max(position as usize);
            Ok(())
        })
    }

    fn snapshots(&self) -> Call<'_, Result<Vec<u64>, ReadError>> {
        self.ask(|state| Ok(state.snapshots.keys().copied().collect()))
    }

    fn make_snapshot(&self, position: u64, _: Uuid) -> Call<'_, Result<(), ReadError>> {
        self.ask(move |state| match state.snapshots.entry(position) {
            Entry::Vacant(free) => {
                free.insert(Vec::new());
                Ok(())
            }
            Entry::Occupied(_) => Err(ReadError::Unavailable("there is one".into())),
        })
    }

    fn drop_snapshot(&self, position: u64) -> Call<'_, Result<(), ReadError>> {
        self.ask(move |state| {
            state.snapshots.remove(&position);
            Ok(())
        })
    }

    fn snapshot(&self, position: u64) -> Arc<dyn Engine> {
        Arc::new(Self { snapshot: Some(position), ..self.clone() })
    }
}
