//! The follower: reads the log concurrently with the primary, up to the durable watermark that the primary publishes.
//!
//! Owns: consistent reads of files that another process writes, compacts and removes meanwhile. Must never know: the lock.
//! It changes nothing in the directory.
//!
//! Segments are opened before the position is read, the newest first. Compaction drops an entry only when a newer one is
//! durable, and then the position covers that. It drops a delete only after all older puts of its key, from segments before
//! it: a reader that opened a segment without the delete finds no older puts either. An open segment stays readable after it
//! was replaced.
//!
//! The open segments are a part of the files that the process may open, and replays from the start share them. Where
//! there are more segments, the oldest are closed again, since they are read first. One that was replaced before it was read
//! may lack deletes of what was read before: the replay continues like one that begins there, which is an error before the
//! compaction horizon.
//!
//! The position is valid if the frames up to it have the checksum that it names: see `position`.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use anyhow::{Context, anyhow, ensure};
use uuid::Uuid;

use super::catalog::{MARK_BYTES, Mark, Marks, Segment, marks_in};
use super::disk::open_files;
use super::found::{Found, Replaced};
use super::listing::Listing;
use super::position::{self, Position};
use super::recovery::{self, Known};
use super::replay::{self, Span};
use super::scan::ScanEnd;
use super::segment::HEAD_BYTES;
#[cfg(test)]
use super::tests::mutants::{self, Mutant};
use super::{Home, tail};
use crate::{Forgotten, History, Incarnation, Receive};

/// Number of attempts to read a consistent state, since rotation and compaction can interfere. An inconsistency that remains is
/// an error.
const ATTEMPTS: u32 = 5;
/// Part of the open files of the process that the segments of one replay are, at most: a quarter.
const OPEN_PART: u64 = 4;

pub struct Follower {
    home: Home,
    state: Mutex<State>,
    /// The view of the replays from the start that are in progress. Held while one is made.
    full: Mutex<Weak<View>>,
    /// Maximum number of open segments of a view.
    max_open: u64,
}

/// State of the log as it was found so far.
#[derive(Default)]
#[cfg_attr(test, derive(Clone))]
struct State {
    /// The last valid position.
    position: Option<Position>,
    /// The newest durable sequence.
    newest: u64,
    /// The sequence of the position that was read last, valid or not.
    published: u64,
    history: Arc<History>,
    /// See [`Compacted::retained`](super::segment::Compacted::retained); of all segments that were read.
    retained: u64,
    /// Offsets at which a read can begin. The newest is that of the position, unless that is in a compacted segment.
    marks: Marks,
}

impl State {
    /// Adds a mark, and keeps at most one for each `MARK_BYTES`.
    fn mark(&mut self, segment: u64, mark: Mark) {
        let before = self.marks.len().checked_sub(2).map(|at| self.marks[at]);
        if before.is_some_and(|(number, before)| number == segment && mark.offset - before.offset < MARK_BYTES) {
            self.marks.pop_back();
        }
        self.marks.push_back((segment, mark));
    }
}

/// The segments that hold entries after some sequence, the newest of them open.
struct View {
    log: Uuid,
    segments: Vec<(Segment, Found)>,
    until: u64,
    newest: u64,
}

impl Follower {
    pub fn new(home: Home) -> Self {
        Self { home, state: Mutex::default(), full: Mutex::default(), max_open: open_files() / OPEN_PART }
    }

    #[cfg(test)]
    pub fn with_open(self, max_open: u64) -> Self {
        Self { max_open, ..self }
    }

    /// The same, as if it had followed another disk with this content.
    #[cfg(test)]
    pub fn on(&self, home: Home) -> Self {
        Self { state: Mutex::new(self.state().clone()), ..Self::new(home) }
    }

    /// Reads the position. Returns the newest durable sequence.
    pub fn look(&self) -> anyhow::Result<u64> {
        let known = self.state().position;
        if known.is_some() && position::read(&*self.home.disk)? == known {
            return Ok(self.newest());
        }
        Ok(self.view(self.newest())?.newest)
    }

    /// See [`TransactionLog::replay`](crate::TransactionLog::replay); up to the published position.
    pub fn replay(&self, after: u64, receive: &mut Receive<'_>) -> anyhow::Result<u64> {
        let (mut position, mut attempts) = (after, 1);
        loop {
            let view = if position == 0 { self.full_view()? } else { Arc::new(self.view(position)?) };
            let horizon = view.segments.iter().map(|(segment, _)| segment.horizon).max().unwrap_or(0);
            #[cfg(test)]
            let horizon = if mutants::is(Mutant::ForgottenIgnored) { 0 } else { horizon };
            if position > 0 && position < horizon {
                return Err(Forgotten { after: position, newest: horizon }.into());
            }
            let retained = view.segments.iter().map(|(segment, _)| segment.retained).max().unwrap_or(0);
            {
                let mut state = self.state();
                state.retained = state.retained.max(retained);
            }
            let begun = position;
            match self.read(&view, &mut position, receive) {
                Err(error) if error.is::<Replaced>() && (position > begun || attempts < ATTEMPTS) => {
                    attempts = if position > begun { 1 } else { attempts + 1 };
                    self.drop_full(&view);
                }
                read => return read.map(|()| view.newest.max(after)),
            }
        }
    }

    /// Hands over the entries of a view after `position`, and advances it with each segment.
    fn read(&self, view: &View, position: &mut u64, receive: &mut Receive<'_>) -> anyhow::Result<()> {
        let span = Span { after: *position, until: view.until };
        for (segment, found) in view.segments.iter().filter(|(segment, _)| segment.last > span.after) {
            replay::read(&self.home, view.log, segment, found.file(&self.home)?, span, receive)?;
            *position = segment.last.min(view.until);
        }
        Ok(())
    }

    /// Returns a view of the whole log, at least up to the newest sequence that is known now.
    fn full_view(&self) -> anyhow::Result<Arc<View>> {
        let newest = self.newest();
        let mut full = self.full();
        if let Some(view) = full.upgrade().filter(|view| view.newest >= newest) {
            return Ok(view);
        }
        let view = Arc::new(self.view(0)?);
        *full = Arc::downgrade(&view);
        Ok(view)
    }

    /// Lets no other replay begin with this view.
    fn drop_full(&self, view: &Arc<View>) {
        let mut full = self.full();
        if full.as_ptr() == Arc::as_ptr(view) {
            *full = Weak::new();
        }
    }

    fn full(&self) -> MutexGuard<'_, Weak<View>> {
        // Every change under this lock is whole.
        self.full.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Drops the marks before this sequence but two: later reads begin after it, or at the start of the log, and a takeover
    /// before the last frame.
    pub fn passed(&self, sequence: u64) {
        let mut state = self.state();
        let passed = state.marks.partition_point(|(_, mark)| mark.sequence <= sequence);
        state.marks.drain(..passed.saturating_sub(2));
    }

    pub fn newest(&self) -> u64 {
        self.state().newest
    }

    /// Returns the last valid position.
    pub fn position(&self) -> Option<Position> {
        self.state().position
    }

    pub fn history(&self) -> Arc<History> {
        Arc::clone(&self.state().history)
    }

    /// Returns the oldest sequence from which on the replays so far have every state.
    pub fn retained(&self) -> u64 {
        self.state().retained
    }

    /// Returns the state that a recovery must find; None if there is none yet. What the primary has published is durable, so
    /// where it cannot be read it is corrupt, and no torn write.
    pub fn known(&self) -> Option<Known> {
        let state = self.state();
        let mut marks = state.marks.clone();
        // Not that of the position: recovery must find the last frame, which says how the log ends.
        marks.pop_back();
        let durable = state.newest.max(state.published);
        state.position.map(|position| Known { log: position.log, durable, marks })
    }

    fn view(&self, after: u64) -> anyhow::Result<View> {
        let mut attempts = 1;
        loop {
            match self.survey(after) {
                Err(_) if attempts < ATTEMPTS => attempts += 1,
                view => return view,
            }
        }
    }

    /// Opens the log once. An error can be due to concurrent changes by the primary.
    fn survey(&self, after: u64) -> anyhow::Result<View> {
        let Self { home, .. } = self;
        let (known, marks) = {
            let state = self.state();
            (state.position, state.marks.clone())
        };
        let passed = marks.partition_point(|(_, mark)| mark.sequence <= after);
        let oldest = passed.checked_sub(1).map_or(1, |at| marks[at].0);

        let listing = Listing::read(home)?;
        listing.is_whole(home)?;
        #[cfg(test)]
        if mutants::is(Mutant::FollowerCleans) {
            recovery::clean_up(home, &[], &listing)?;
        }
        #[cfg(test)]
        let early = position::read(&*home.disk)?;
        let mut needed: Vec<_> = listing.segments.into_iter().filter(|numbers| numbers.last >= oldest).collect();
        needed.reverse();
        #[cfg(test)]
        if mutants::is(Mutant::OldestOpenedFirst) {
            needed.reverse();
        }
        let found = (0..).zip(needed).map(|(at, numbers)| {
            let found = Found::open_shared(home, numbers)?;
            Ok(if at < self.max_open { found } else { found.closed() })
        });
        let mut found: Vec<_> = found.collect::<anyhow::Result<_>>()?;
        found.sort_unstable_by_key(|found| found.numbers.first);
        let published = || format!("the primary has published no position in {}", home.path(position::NAME).display());
        let position = position::read(&*home.disk)?.with_context(published)?;
        #[cfg(test)]
        let position = early.filter(|_| mutants::is(Mutant::PositionReadFirst)).unwrap_or(position);
        recovery::one_log(home, &found, Some(known.map_or(position.log, |known| known.log)))?;
        let went_back = known.is_some_and(|known| {
            position.log != known.log || (position.segment, position.offset) < (known.segment, known.offset)
        });
        ensure!(
            !went_back || is_believed_at_once(),
            "the log in {} is not the one that was followed, or was replaced by an older copy; bring back the right one",
            home.path("").display()
        );
        self.state().published = position.sequence;

        let holds = |found: &Found| (found.numbers.first..=found.numbers.last).contains(&position.segment);
        let at = found.iter().position(holds);
        let at = at.with_context(|| format!("segment {} is missing from the log", position.segment))?;
        let (newest, seen) = newest(home, &found[at], position, marks_in(&marks, position.segment))?;
        let segments = recovery::join(home, &found[..=at], newest, &marks)?;
        let begun = segments.iter().flat_map(|segment| segment.incarnations.clone()).collect();
        let newest = self.believe(position, begun, seen);
        Ok(View {
            log: position.log,
            segments: segments.into_iter().zip(found).collect(),
            until: position.sequence,
            newest,
        })
    }

    /// Records a valid position. Returns the newest sequence that was given out.
    fn believe(&self, position: Position, incarnations: Vec<Incarnation>, seen: Vec<Mark>) -> u64 {
        let mut state = self.state();
        let known = state.history.incarnations();
        let added: Vec<_> = incarnations.into_iter().filter(|one| !known.contains(one)).collect();
        if !added.is_empty() {
            state.history = Arc::new(History::new([known, &added[..]].concat()));
        }
        let newest = state.history.newest_given(position.sequence);
        if state.position.is_none_or(|known| (known.segment, known.offset) < (position.segment, position.offset)) {
            (state.position, state.newest) = (Some(position), newest);
            for mark in seen {
                state.mark(position.segment, mark);
            }
        }
        newest
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change under this lock is whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reads the segment of the position up to it, and returns it with the new marks in it.
fn newest(home: &Home, found: &Found, position: Position, marks: Vec<Mark>) -> anyhow::Result<(Segment, Vec<Mark>)> {
    let Position { log, sequence, segment: number, offset, chain } = position;
    let is_not_there = || {
        let file = home.path(&found.name);
        anyhow!("{} does not hold what the primary has published: sequence {sequence} at byte {offset}", file.display())
    };
    if let Some(compacted) = &found.compacted {
        let is_end = (found.numbers.last, compacted.last, compacted.after) == (number, sequence, chain);
        ensure!(is_end || is_believed_at_once(), is_not_there());
        let first = tail::first_frame(home, found)?.map_or_else(Vec::new, |(_, incarnations)| incarnations);
        return Ok((Segment::compacted(found.numbers, found.version, compacted, first), Vec::new()));
    }
    let end = Mark { sequence, offset, chain };
    let mut segment = Segment { version: found.version, marks, ..Segment::empty(number, sequence, chain, found.size) };
    if offset > HEAD_BYTES {
        let (first, incarnations) = tail::first_frame(home, found)?.with_context(is_not_there)?;
        (segment.first, segment.before) = (first.first, first.previous);
        (segment.end, segment.incarnations) = (offset, incarnations);
    }
    let mut scan = segment.scan_after(sequence, found.file(home)?, log);
    let begin = segment.marks.last().map_or(HEAD_BYTES, |mark| mark.offset);
    let (mut last, mut seen, mut marked) = (segment.marks.last().map(|mark| mark.sequence), Vec::new(), begin);
    while scan.advance()? {
        last = scan.frames().last().map(|frame| frame.head.last());
        if let (true, Some(sequence), Some(chain)) = (scan.offset() - marked >= MARK_BYTES, last, scan.chain()) {
            marked = scan.offset();
            seen.push(Mark { sequence, offset: marked, chain });
        }
    }
    if let ScanEnd::Unsupported(why) = scan.end() {
        return Err(home.refused(&found.name, scan.offset(), &why));
    }
    let is_end = scan.offset() == offset && scan.chain() == Some(chain) && last.is_none_or(|last| last == sequence);
    ensure!(is_end || is_believed_at_once(), is_not_there());
    if seen.last() != Some(&end) {
        seen.push(end);
    }
    Ok((segment, seen))
}

fn is_believed_at_once() -> bool {
    #[cfg(test)]
    if mutants::is(Mutant::PositionBelieved) {
        return true;
    }
    false
}
