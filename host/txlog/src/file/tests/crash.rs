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

use super::beside::Beside;
use super::content::{Model, Outcome, check_content, former};
use super::disk::Promise;
use super::history::{History, recover};
use super::mutants::{self, Mutant};
use super::surface::Surface;
use super::*;
use crate::file::Finding;
use crate::file::home::Home;
use crate::file::preallocate;
use crate::file::verify::verify_in;

/// What is done in a history, and in one that begins on what a power cut left.
const STEPS: usize = 30;
const STEPS_AFTER: usize = 8;
/// Disks tried at each operation where something can be lost.
const IMAGES: usize = 3;
/// One in this many disks is the beginning of another history.
const SECOND: u64 = 80;

/// A power cut in a history.
#[derive(Clone, Copy)]
struct Cut<'a> {
    options: &'a Options,
    model: &'a Model,
    /// Before which operation.
    at: usize,
    promised: Promise,
    mutant: Option<Mutant>,
    /// A standby as it was then, if what it had applied is on disk.
    followed: Option<&'a Beside>,
}

/// Opens what a power cut left: with a start, or a standby that begins there, and with one that had followed so far.
fn check_image(cut: &Cut<'_>, image: &FakeDisk) -> Outcome<()> {
    let disk = image.copy();
    let mut standby = Beside::new(Arc::new(disk.clone()), cut.options);
    standby.pass();
    // A start knows nothing of the log; the takeover of a standby begins where that had read.
    let takes_over = cut.at.is_multiple_of(2);
    check_opened(cut, &disk, standby, takes_over)?;
    let Some(followed) = cut.followed else { return Ok(()) };
    let disk = image.copy();
    let mut standby = followed.on(Arc::new(disk.clone()), cut.options);
    standby.pass();
    if standby.applied < followed.applied {
        return Err(format!("a standby that had applied {} went back to {}", followed.applied, standby.applied));
    }
    check_opened(cut, &disk, standby, true).map_err(|what| format!("a standby had followed so far: {what}"))
}

/// Recovers a log, looks at it, writes more and looks again.
fn check_opened(cut: &Cut<'_>, disk: &FakeDisk, mut standby: Beside, takes_over: bool) -> Outcome<()> {
    let Cut { options, model, at, promised, mutant, .. } = *cut;
    let known = standby.known().filter(|_| takes_over);
    let (shared, mut writer) = recover(disk, options, mutant, known)?;
    check_content(&shared, model, at, promised)?;
    let newest = shared.watermark.durable();
    if standby.applied > newest {
        return Err(format!("a standby applied {}, and {newest} is the newest", standby.applied));
    }
    standby.check(model)?;
    standby.take_over(&shared)?;
    standby.check(model)?;
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
        return Err(format!("it continues and is not sound: {wrong}"));
    }
    let newest = recover(disk, options, mutant, None)?.0.watermark.durable();
    if newest != sequence { Err(format!("{sequence} was written after it and {newest} is the newest")) } else { Ok(()) }
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
    history.disk.before_each(|_| Ok(()));
    let History { disk, options, mutant, mut lives, model, followed, .. } = history;
    let (record, followed) = (disk.take_record(), followed.lock().unwrap());
    lives.push((usize::MAX, model));
    let mut lives = lives.into_iter().peekable();
    for at in 0..=record.len() {
        while lives.peek().is_some_and(|(until, _)| *until < at) {
            lives.next();
        }
        let Some((_, model)) = lives.peek() else { break };
        let promised = record.get(at).map_or(end, |next| next.promised);
        // Without a sync, what a standby had applied can be lost, and so is the standby.
        let followed = followed[..followed.partition_point(|(before, _)| *before <= at)].last().map(|(_, one)| one);
        let followed = followed.filter(|_| options.durability == Durability::Sync);
        for _ in 0..if surface.is_certain() { 1 } else { images } {
            let image = surface.after_power_cut(dice);
            let checked = check_image(&Cut { options: &options, model, at, promised, mutant, followed }, &image);
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

/// Runs histories, on all processors, until this many disks were tried or something was found.
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
