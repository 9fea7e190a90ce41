//! Histories for power cuts: appends, commits, compactions, failures, copies and forks, and what each may leave.

use std::sync::{Arc, Mutex};

use fastrand::Rng;

use super::beside::Beside;
use super::content::{Appended, Model, Outcome, check_content};
use super::disk::Promise;
use super::mutants::Mutant;
use super::*;
use crate::file::compact::{self, CompactionParams};
use crate::file::offline;
use crate::file::preallocate;
use crate::file::recovery::Known;
use crate::file::writer::Writer;

/// One history, as far as it has come.
pub struct History {
    pub disk: FakeDisk,
    pub options: Options,
    pub mutant: Option<Mutant>,
    dice: Rng,
    time: u64,
    pub model: Model,
    /// The models of earlier lives, and the operation up to which each holds.
    pub lives: Vec<(usize, Model)>,
    /// The newest sequence that a client has seen, of this log or of the one that it was copied from.
    seen: u64,
    /// The newest sequence when this life began.
    begun: u64,
    shared: Arc<Shared>,
    writer: Writer,
    /// It looks now and then before something is done to the disk.
    standby: Arc<Mutex<Beside>>,
    /// How far it was then: before which operation.
    pub followed: Arc<Mutex<Vec<(usize, Beside)>>>,
}

impl History {
    /// Lives through some steps. The promise is what holds when it begins.
    pub fn run(
        disk: &FakeDisk,
        options: &Options,
        (model, promised): (Model, Promise),
        mutant: Option<Mutant>,
        steps: usize,
        mut dice: Rng,
    ) -> Outcome<Self> {
        disk.record();
        disk.set_promised(move || promised);
        let standby = Arc::new(Mutex::new(Beside::new(Arc::new(disk.clone()), options)));
        let (beside, looks) = (standby.clone(), Mutex::new(dice.fork()));
        let followed = Arc::new(Mutex::new(Vec::new()));
        let (seen_by, copied, home) = (followed.clone(), disk.clone(), options.clone());
        disk.before_each(move |_| {
            // The mutant that does something itself.
            if let (Ok(mut looks), Ok(mut beside)) = (looks.try_lock(), beside.try_lock())
                && looks.u8(0..5) == 0
            {
                beside.pass();
                seen_by.lock().unwrap().push((copied.recorded(), beside.on(Arc::new(copied.clone()), &home)));
            }
            Ok(())
        });
        let (shared, writer) = recover(disk, options, mutant, None)?;
        let time = model.entries.last().map_or(0, |entry| entry.time);
        let (disk, options, lives) = (disk.clone(), options.clone(), Vec::new());
        let (seen, begun) = (promised.seen, 0);
        let mut history =
            Self { disk, options, mutant, dice, time, model, lives, seen, begun, shared, writer, standby, followed };
        history.begin_life(promised)?;
        for _ in 0..steps {
            history.time += history.dice.u64(0..3);
            // Sometimes the process is killed in the middle of what it does next.
            let kill = history.dice.u8(0..6) == 0;
            history.disk.kill_after(kill.then(|| history.dice.usize(0..12)));
            if let Err(error) = history.step()
                && !history.disk.is_killed()
            {
                return Err(format!("a sound disk was not good enough: {error:#}"));
            }
            history.standby.lock().unwrap().check(&history.model)?;
            if kill {
                history.start_again()?;
            }
        }
        Ok(history)
    }

    fn step(&mut self) -> anyhow::Result<()> {
        match self.dice.u8(0..24) {
            21 => self.copy(),
            22 => self.fork(),
            0..12 => self.append_and_commit(),
            12..15 => self.compact(),
            15..17 => preallocate::preallocate_one(&self.shared).map(drop),
            17 => self.writer.mark(&self.shared),
            19 if self.options.durability == Durability::Sync => self.fail(),
            18 => {
                // What is in memory only is lost with the process, and nobody has seen it.
                self.append()?;
                self.start_again().map_err(anyhow::Error::msg)
            }
            _ => {
                self.close()?;
                self.start_again().map_err(anyhow::Error::msg)
            }
        }
    }

    fn close(&mut self) -> anyhow::Result<()> {
        self.shared.queue.close();
        preallocate::preallocate_one(&self.shared)?;
        while self.writer.step(&self.shared)? {
            preallocate::preallocate_one(&self.shared)?;
        }
        Ok(())
    }

    /// What runs next is a copy, and the other continues for a while.
    fn copy(&mut self) -> anyhow::Result<()> {
        if self.dice.bool() {
            self.close()?;
        }
        self.disk.become_copy();
        self.see_others();
        self.start_again().map_err(anyhow::Error::msg)
    }

    /// What runs next is a copy that only the operator knows to be one.
    fn fork(&mut self) -> anyhow::Result<()> {
        if self.dice.bool() {
            self.close()?;
        }
        if self.promised().durable > 0 {
            self.disk.set_lie(self.mutant.and_then(Mutant::lie_in_recovery));
            let forked = offline::fork(Arc::new(self.disk.clone()), self.options.clone());
            self.disk.set_lie(self.mutant.and_then(Mutant::lie));
            forked?;
            self.see_others();
        }
        self.start_again().map_err(anyhow::Error::msg)
    }

    /// Some entries were appended to the log that this one is a copy of.
    fn see_others(&mut self) {
        let promised = self.promised();
        if promised.durable > 0 {
            self.seen = promised.seen + self.dice.u64(1..1_000);
        }
        let promised = self.promised_after_power_cut();
        self.disk.set_promised(move || promised);
    }

    /// A sync fails, and the log with it.
    fn fail(&mut self) -> anyhow::Result<()> {
        self.disk.lose_at_next_sync(Some(self.dice.fork()));
        let done = if self.dice.bool() { self.append_and_commit() } else { self.compact() };
        self.disk.lose_at_next_sync(None);
        match done {
            Err(_) if !self.disk.is_killed() => self.start_again().map_err(anyhow::Error::msg),
            done => done,
        }
    }

    fn append_and_commit(&mut self) -> anyhow::Result<()> {
        for _ in 0..self.dice.usize(1..4) {
            self.append()?;
        }
        self.commit()
    }

    fn commit(&mut self) -> anyhow::Result<()> {
        while self.shared.watermark.durable() < self.shared.queue.appended() {
            preallocate::preallocate_one(&self.shared)?;
            self.writer.step(&self.shared)?;
        }
        Ok(())
    }

    fn append(&mut self) -> anyhow::Result<()> {
        let group: Vec<_> = (0..self.dice.usize(1..4)).map(|_| self.event()).collect();
        let mut appended = self.shared.queue.append(self.time, &group);
        if appended.is_err() {
            // Too much waits, or nobody has asked yet whether there is room for more.
            self.commit()?;
            preallocate::preallocate_one(&self.shared)?;
            appended = self.shared.queue.append(self.time, &group);
        }
        let first = appended.map_err(|error| anyhow::anyhow!("{error:?}"))?;
        assert_eq!(first, self.shared.history.next(self.model.newest()));
        let (time, ends_group) = (self.time, false);
        let appended = |(sequence, event)| Appended { sequence, time, event, ends_group };
        self.model.entries.extend((first..).zip(group).map(appended));
        self.model.entries.last_mut().unwrap().ends_group = true;
        Ok(())
    }

    fn event(&mut self) -> Event {
        let dice = &mut self.dice;
        let key = format!("key {}", dice.u8(0..7));
        if dice.u8(0..4) == 0 {
            return Event::Delete(key);
        }
        let size = if dice.u8(0..4) == 0 { dice.usize(0..380) } else { dice.usize(0..90) };
        let expires = (dice.u8(0..5) == 0).then(|| self.time + dice.u64(0..20));
        let metadata = if dice.bool() { Vec::new() } else { vec![("content-type".into(), "text".into())] };
        Event::Put(Put { key, value: vec![dice.u8(..); size], metadata, expires })
    }

    /// Others write meanwhile.
    fn compact(&mut self) -> anyhow::Result<()> {
        let now = self.time.saturating_sub(self.dice.u64(0..10));
        self.model.compactions.push((self.disk.recorded(), now));
        let min_yield_percent = if self.dice.bool() { 0 } else { self.dice.u64(0..50) };
        let shared = self.shared.clone();
        // Enough for all keys: how often the log is read must not rest on the secret of the hash.
        let params = CompactionParams { retain_from: u64::MAX, now, min_yield_percent, keys: 100 };
        let done = compact::run(&shared, &shared.catalog.sealed(), &params, &mut |_| match self.dice.u8(0..8) {
            0 => self.append_and_commit(),
            _ => Ok(()),
        });
        done.map(drop)
    }

    fn start_again(&mut self) -> Outcome<()> {
        let promised = self.promised_after_power_cut();
        self.disk.set_promised(move || promised);
        let promised = self.promised();
        // Killed again while it starts, now and then.
        let kill = self.dice.u8(0..4) == 0;
        self.disk.kill_after(kill.then(|| self.dice.usize(0..6)));
        // The standby may take over.
        let known = self.standby.lock().unwrap().known();
        let started = recover(&self.disk, &self.options, self.mutant, known.clone());
        (self.shared, self.writer) = match started {
            Err(_) if self.disk.is_killed() => {
                self.disk.kill_after(None);
                recover(&self.disk, &self.options, self.mutant, known)?
            }
            started => started?,
        };
        self.disk.kill_after(None);
        self.begin_life(promised)
    }

    /// What a process that was just started found is the truth from now on.
    fn begin_life(&mut self, promised: Promise) -> Outcome<()> {
        let at = self.disk.recorded();
        check_content(&self.shared, &self.model, at, promised)?;
        self.lives.push((at, self.model.clone()));
        let begun = self.shared.watermark.durable();
        self.model.entries.truncate(self.model.until(begun).len());
        self.model.incarnations = self.shared.history.incarnations().to_vec();
        (self.seen, self.begun) = (promised.seen, begun);
        let (shared, durability) = (Arc::downgrade(&self.shared), self.options.durability);
        let standby = self.standby.clone();
        // What a response depends on is a promise to its writer and its reader.
        let gate = self.mutant != Some(Mutant::NoGate);
        self.disk.set_promised(move || {
            let answered = shared
                .upgrade()
                .map_or(begun, |shared| if gate { shared.watermark.durable() } else { shared.queue.appended() });
            // So is what a standby shows.
            let answered = answered.max(standby.try_lock().map_or(0, |standby| standby.applied));
            let durable = if durability == Durability::Sync { answered } else { begun };
            Promise { durable, seen: answered.max(promised.seen) }
        });
        Ok(())
    }

    /// What must be there if the process ends now and the system does not.
    fn promised(&self) -> Promise {
        let durable = self.shared.watermark.durable().max(self.standby.lock().unwrap().applied);
        Promise { durable, seen: durable.max(self.seen) }
    }

    /// The same if the system ends too.
    pub fn promised_after_power_cut(&self) -> Promise {
        let promised = self.promised();
        let durable = if self.options.durability == Durability::Sync { promised.durable } else { self.begun };
        Promise { durable, ..promised }
    }
}

pub fn recover(
    disk: &FakeDisk,
    options: &Options,
    mutant: Option<Mutant>,
    known: Option<Known>,
) -> Outcome<(Arc<Shared>, Writer)> {
    disk.set_lie(mutant.and_then(Mutant::lie_in_recovery));
    let before = Before { known, ..Before::default() };
    let recovered = Shared::begin(Arc::new(disk.clone()), options.clone(), before);
    disk.set_lie(mutant.and_then(Mutant::lie));
    recovered.map_err(|error| format!("refused: {error:#}"))
}
