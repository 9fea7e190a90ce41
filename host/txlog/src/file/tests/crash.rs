//! Power cuts and kills at every step of histories nobody thought of.
//!
//! A history appends, commits, compacts, fails, closes, is killed, copied or forked and starts again, on a disk that
//! remembers; some begin with a log of format 1. Then, before each thing that was done to the disk, the power is cut, in
//! several ways each time; what can be left is said at the head of `surface`. On every disk that is left the log must
//! open, hold what was promised and nothing that was not appended, give no sequence again that a client can have seen,
//! and be fit to go on. Some of these disks are the beginning of another history, with power cuts of its own.
//!
//! One thread does the work of writer, spare and compactor by turns, so a history is the same whenever it is run.
//! `KVS_CRASH_IMAGES` says how many disks to try. `just soak` tries many and prints what became of the mutants.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use fastrand::Rng;

use super::content::{Appended, Model, Outcome, check_content};
use super::disk::Promise;
use super::mutants::{self, Mutant};
use super::surface::Surface;
use super::*;
use crate::file::compact::{self, CompactionParams};
use crate::file::preallocate;
use crate::file::verify::verify_in;
use crate::file::writer::Writer;
use crate::file::{Finding, Home, offline};

/// What is done in a history, and in one that begins on what a power cut left.
const STEPS: usize = 30;
const STEPS_AFTER: usize = 8;
/// Disks tried at each operation where something can be lost.
const IMAGES: usize = 3;
/// One in so many disks is the beginning of another history.
const SECOND: u64 = 80;

struct History {
    disk: FakeDisk,
    options: Options,
    mutant: Option<Mutant>,
    dice: Rng,
    time: u64,
    model: Model,
    /// The models of earlier lives, and the operation up to which each holds.
    lives: Vec<(usize, Model)>,
    /// The newest sequence that a client has seen, of this log or of the one that it was copied from.
    seen: u64,
    /// The newest sequence when this life began.
    begun: u64,
    shared: Arc<Shared>,
    writer: Writer,
}

impl History {
    /// Lives through some steps. The promise is what holds when it begins.
    fn run(
        disk: &FakeDisk,
        options: &Options,
        (model, promised): (Model, Promise),
        mutant: Option<Mutant>,
        steps: usize,
        dice: Rng,
    ) -> Outcome<Self> {
        disk.record();
        disk.set_promised(move || promised);
        let (shared, writer) = recover(disk, options, mutant)?;
        let time = model.entries.last().map_or(0, |entry| entry.time);
        let (disk, options, lives) = (disk.clone(), options.clone(), Vec::new());
        let (seen, begun) = (promised.seen, 0);
        let mut history = Self { disk, options, mutant, dice, time, model, lives, seen, begun, shared, writer };
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
                // What is in memory only is lost with the process, and nobody was told of it.
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

    /// What runs next is a copy, and the other goes on for a while.
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
        let params = CompactionParams { now, min_yield_percent, keys: 100 };
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
        let started = recover(&self.disk, &self.options, self.mutant);
        (self.shared, self.writer) = match started {
            Err(_) if self.disk.is_killed() => {
                self.disk.kill_after(None);
                recover(&self.disk, &self.options, self.mutant)?
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
        // What an answer rests on is a promise, to whoever wrote it and to whoever reads it.
        let gate = self.mutant != Some(Mutant::NoGate);
        self.disk.set_promised(move || {
            let answered = shared
                .upgrade()
                .map_or(begun, |shared| if gate { shared.watermark.durable() } else { shared.queue.appended() });
            let durable = if durability == Durability::Sync { answered } else { begun };
            Promise { durable, seen: answered.max(promised.seen) }
        });
        Ok(())
    }

    /// What must be there if the process ends now and the system does not.
    fn promised(&self) -> Promise {
        let durable = self.shared.watermark.durable();
        Promise { durable, seen: durable.max(self.seen) }
    }

    /// The same if the system ends too.
    fn promised_after_power_cut(&self) -> Promise {
        let promised = self.promised();
        let durable = if self.options.durability == Durability::Sync { promised.durable } else { self.begun };
        Promise { durable, ..promised }
    }
}

fn recover(disk: &FakeDisk, options: &Options, mutant: Option<Mutant>) -> Outcome<(Arc<Shared>, Writer)> {
    disk.set_lie(mutant.and_then(Mutant::lie_in_recovery));
    let recovered = Shared::recover(Arc::new(disk.clone()), options.clone());
    disk.set_lie(mutant.and_then(Mutant::lie));
    recovered.map_err(|error| format!("refused: {error:#}"))
}

/// A power cut in a history.
#[derive(Clone, Copy)]
struct Cut<'a> {
    options: &'a Options,
    model: &'a Model,
    /// Before which operation.
    at: usize,
    promised: Promise,
    mutant: Option<Mutant>,
}

/// Opens what a power cut left, looks at it, writes more and looks again.
fn check_image(cut: &Cut<'_>, disk: &FakeDisk) -> Outcome<()> {
    let Cut { options, model, at, promised, mutant } = *cut;
    let (shared, mut writer) = recover(disk, options, mutant)?;
    check_content(&shared, model, at, promised)?;
    let more = put("more", &[0x5a; 100]);
    preallocate::preallocate_one(&shared).map_err(|error| format!("there is no going on: {error:#}"))?;
    let sequence = shared.queue.append(u64::MAX, std::slice::from_ref(&more)).map_err(|error| format!("{error:?}"))?;
    writer.step(&shared).map_err(|error| format!("it cannot go on: {error:#}"))?;
    if shared.watermark.durable() != sequence {
        return Err("what was written after it is not durable".into());
    }
    drop((shared, writer));
    let home = Home { disk: Arc::new(disk.clone()), data: options.data.clone(), env: options.env.clone() };
    let mut wrong = None;
    let mut report = |finding| match finding {
        Finding::Sound { .. } => {}
        Finding::Torn(what) | Finding::Corrupt(what) => wrong = Some(what),
    };
    verify_in(&home, &mut report, &mut |_| ()).map_err(|error| error.to_string())?;
    if let Some(wrong) = wrong {
        return Err(format!("it goes on and is not sound: {wrong}"));
    }
    let newest = recover(disk, options, mutant)?.0.watermark.durable();
    if newest != sequence { Err(format!("{sequence} was written after it and {newest} is the newest")) } else { Ok(()) }
}

/// A log that a former version wrote, in format 1.
fn former(name: &str) -> (FakeDisk, Model) {
    let disk = formats::load(&formats::directory(1, name));
    let mut model = Model::default();
    let shared = Shared::read(
        Home { disk: Arc::new(disk.clone()), data: "data".into(), env: kvs_runtime::Env::real() },
        &options(),
    )
    .unwrap();
    replay::replay(&shared, 0, &mut |entries| {
        model.entries.extend(entries.iter().map(|entry| Appended {
            sequence: entry.sequence,
            time: entry.time,
            event: owned(&entry.event),
            ends_group: true,
        }));
        Ok(())
    })
    .unwrap();
    (disk, model)
}

fn owned(event: &EventRef<'_>) -> Event {
    match event {
        EventRef::Delete(key) => Event::Delete((*key).into()),
        EventRef::Put(put) => {
            let metadata = put.metadata.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
            Event::Put(Put { key: put.key.into(), value: put.value.into(), metadata, expires: put.expires })
        }
    }
}

#[derive(Default)]
struct Counts {
    histories: AtomicU64,
    images: AtomicU64,
    second: AtomicU64,
}

/// Cuts the power all along a history, and along those that begin there.
fn cut_everywhere(seed: u64, mutant: Option<Mutant>, counts: &Counts) -> Outcome<()> {
    let mut dice = Rng::with_seed(seed);
    let segment_bytes = [2048, 4096, 8192][dice.usize(0..3)];
    let durability = if dice.u8(0..6) == 0 { Durability::Os } else { Durability::Sync };
    let options = Options { segment_bytes, group_bytes: 1400, durability, ..options() };
    let (disk, model) = match dice.u8(0..8) {
        0 => former(dice.choice(["killed", "clean"]).unwrap()),
        _ => (FakeDisk::default(), Model::default()),
    };
    let promised = Promise { durable: model.newest(), seen: model.newest() };
    let begin = Surface::new(&disk);
    mutants::set(mutant);
    let history = History::run(&disk, &options, (model, promised), mutant, STEPS, dice.fork());
    let in_history = |what| format!("{what}; in history {seed}");
    let mut done = cut(begin, history.map_err(in_history)?, IMAGES, &mut dice, &mut |disk, model, promised, dice| {
        counts.images.fetch_add(1, Ordering::Relaxed);
        if dice.u64(0..SECOND) > 0 {
            return Ok(());
        }
        let begin = Surface::new(disk);
        let after = History::run(disk, &options, (model, promised), mutant, STEPS_AFTER, dice.fork())?;
        cut(begin, after, 1, dice, &mut |_, _, _, _| {
            counts.second.fetch_add(1, Ordering::Relaxed);
            Ok(())
        })
    });
    mutants::set(None);
    counts.histories.fetch_add(1, Ordering::Relaxed);
    if let Err(what) = &mut done {
        *what = in_history(std::mem::take(what));
    }
    done
}

type Each<'a> = dyn FnMut(&FakeDisk, Model, Promise, &mut Rng) -> Outcome<()> + 'a;

fn cut(mut surface: Surface, history: History, images: usize, dice: &mut Rng, each: &mut Each<'_>) -> Outcome<()> {
    let end = history.promised_after_power_cut();
    let History { disk, options, mutant, mut lives, model, .. } = history;
    let record = disk.take_record();
    lives.push((usize::MAX, model));
    let mut lives = lives.into_iter().peekable();
    for at in 0..=record.len() {
        while lives.peek().is_some_and(|(until, _)| *until < at) {
            lives.next();
        }
        let Some((_, model)) = lives.peek() else { break };
        let promised = record.get(at).map_or(end, |next| next.promised);
        for _ in 0..if surface.is_certain() { 1 } else { images } {
            let image = surface.after_power_cut(dice);
            let checked = check_image(&Cut { options: &options, model, at, promised, mutant }, &image.copy());
            checked.and_then(|()| each(&image, model.at_the_begin(at), promised, dice)).map_err(|what| {
                let before: Vec<_> =
                    record[at.saturating_sub(6)..at].iter().map(|done| brief(&done.operation)).collect();
                format!("{what}; power cut after operation {at}, after {}", before.join(", "))
            })?;
        }
        if let Some(next) = record.get(at) {
            surface.apply(&next.operation);
        }
    }
    Ok(())
}

fn brief(operation: &super::disk::Operation) -> String {
    use super::disk::Operation;
    match operation {
        Operation::Write { file, offset, bytes } => format!("write {} at {offset} of file {file}", bytes.len()),
        other => format!("{other:?}"),
    }
}

/// Runs histories, on all processors, until so many disks were tried or something was found.
fn search(wanted: u64, mutant: Option<Mutant>) -> (Counts, Outcome<()>) {
    let (counts, seeds, found) = (Counts::default(), AtomicU64::new(0), Mutex::new(Ok(())));
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                while counts.images.load(Ordering::Relaxed) < wanted && found.lock().unwrap().is_ok() {
                    let done = cut_everywhere(seeds.fetch_add(1, Ordering::Relaxed), mutant, &counts);
                    if done.is_err() {
                        *found.lock().unwrap() = done;
                    }
                }
            });
        }
    });
    (counts, found.into_inner().unwrap())
}

#[test]
fn nothing_promised_is_lost_in_a_power_cut() {
    let images = super::count("KVS_CRASH_IMAGES", 20_000);
    let (counts, found) = search(images, None);
    let Counts { histories, images, second } = counts;
    println!("{images:?} power cuts in {histories:?} histories, and {second:?} after one");
    assert_eq!(found, Ok(()));
}

#[test]
fn every_mutant_is_found() {
    println!("| mutant | found after | as |\n|---|---|---|");
    let mut missed = Vec::new();
    for (mutant, name) in Mutant::ALL {
        let (counts, found) = search(300_000, Some(mutant));
        let images = counts.images.into_inner();
        match found {
            Ok(()) => missed.push(name),
            Err(what) => println!("| {name} | {images} power cuts | {} |", what.split("; ").next().unwrap_or_default()),
        }
    }
    assert!(missed.is_empty(), "not found: {missed:?}");
}
