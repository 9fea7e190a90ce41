//! Recording of a call of the serving guest, and the script by which a candidate is called the same way.
//!
//! Owns: what a call read of clocks and randomness, and what it appended. Must never know: requests, or where a recording goes.

use std::collections::VecDeque;

use kvs_txlog::Event;
use kvs_txlog::change::Change;

use super::compare::{self, Difference};
use super::queue::QUEUE_BYTES;
use crate::contract::AppendError;

/// Maximum number of bytes that are recorded of the clocks and the randomness of a call.
const SURROUNDINGS_BYTES: usize = 1 << 20;
/// Bytes that an event takes besides its key, value and metadata.
const EVENT_BYTES: usize = 128;

/// Extent of a recording.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Record {
    Nothing,
    /// What the log accepted.
    Entries,
    All,
}

/// One call of `append`.
pub struct Append {
    pub events: Vec<Event>,
    pub result: Result<u64, AppendError>,
}

impl Append {
    /// Returns the entries that it made of the log.
    pub fn changes(self, time: u64) -> impl Iterator<Item = Change> {
        let first = self.result.ok();
        let numbered = first.into_iter().flat_map(|first| first..).zip(self.events);
        numbered.map(move |(sequence, event)| Change::new(sequence, time, event))
    }

    /// Returns the sequence of its last entry.
    pub fn last(&self) -> Option<u64> {
        Some(self.result.as_ref().ok()? + self.events.len().checked_sub(1)? as u64)
    }

    pub fn bytes(&self) -> usize {
        self.events.iter().map(event_bytes).sum()
    }
}

fn event_bytes(event: &Event) -> usize {
    let rest = match event {
        Event::Delete(_) => 0,
        Event::Put(put) => {
            put.value.len() + put.metadata.iter().map(|(name, value)| name.len() + value.len()).sum::<usize>()
        }
    };
    EVENT_BYTES + event.key().len() + rest
}

/// The appends of a call.
#[derive(Default)]
pub enum Appends {
    #[default]
    Real,
    Recorded(Recording),
    Scripted(Script),
}

/// Appends that are recorded.
pub struct Recording {
    with_failed: bool,
    pub appends: Vec<Append>,
    bytes: usize,
    /// False when there were too many.
    pub is_whole: bool,
}

impl Appends {
    pub fn new(record: Record) -> Self {
        if record == Record::Nothing {
            return Self::Real;
        }
        let with_failed = record == Record::All;
        Self::Recorded(Recording { with_failed, appends: Vec::new(), bytes: 0, is_whole: true })
    }
}

impl Recording {
    pub fn add(&mut self, append: Append) {
        if !self.is_whole || append.result.is_err() && !self.with_failed {
            return;
        }
        // One that failed can be empty, and there is no limit for those.
        self.bytes += EVENT_BYTES + append.bytes();
        if self.bytes > QUEUE_BYTES {
            (self.is_whole, self.appends) = (false, Vec::new());
        } else {
            self.appends.push(append);
        }
    }
}

/// Appends of the serving guest, whose results a candidate gets for its own.
pub struct Script {
    appends: Vec<Append>,
    made: usize,
    difference: Option<Difference>,
}

impl Script {
    pub fn new(appends: Vec<Append>) -> Self {
        Self { appends, made: 0, difference: None }
    }

    /// Compares an append, and returns the result of the one in its place.
    pub fn append(&mut self, events: &[Event]) -> Result<u64, AppendError> {
        let number = self.made;
        self.made += 1;
        let expected = self.appends.get(number);
        if self.difference.is_none() {
            self.difference = compare::events(number, expected.map(|append| &*append.events), Some(events));
        }
        expected.map_or(Err(AppendError::Unavailable), |append| append.result)
    }

    /// Returns the first difference. Without one, the entries up to the returned sequence are the candidate's own too.
    pub fn end(self) -> Result<Option<u64>, Difference> {
        let missing = self.appends.get(self.made);
        let missing = missing.and_then(|append| compare::events(self.made, Some(&append.events), None));
        match self.difference.or(missing) {
            Some(difference) => Err(difference),
            None => Ok(self.appends.iter().filter_map(Append::last).max()),
        }
    }
}

/// Clocks and randomness of a call.
#[derive(Default)]
pub enum Surroundings {
    #[default]
    Real,
    Recorded(Inputs),
    Scripted(Inputs),
}

/// Inputs of a call that a second one would not get: readings of clocks and randomness, in order.
#[derive(Default)]
pub struct Inputs {
    wall: VecDeque<u64>,
    monotonic: VecDeque<u64>,
    random: VecDeque<u8>,
}

impl Inputs {
    pub fn bytes(&self) -> usize {
        size_of::<u64>() * (self.wall.len() + self.monotonic.len()) + self.random.len()
    }

    /// Whether nothing was left out.
    pub fn is_whole(&self) -> bool {
        self.bytes() < SURROUNDINGS_BYTES
    }
}

impl Surroundings {
    pub fn new(record: Record) -> Self {
        if record == Record::All { Self::Recorded(Inputs::default()) } else { Self::Real }
    }

    pub fn wall(&mut self, real: impl FnOnce() -> u64) -> u64 {
        self.time(|given| &mut given.wall, real)
    }

    pub fn monotonic(&mut self, real: impl FnOnce() -> u64) -> u64 {
        self.time(|given| &mut given.monotonic, real)
    }

    fn time(&mut self, which: fn(&mut Inputs) -> &mut VecDeque<u64>, real: impl FnOnce() -> u64) -> u64 {
        match self {
            Self::Real => real(),
            Self::Recorded(given) => {
                let time = real();
                if given.is_whole() {
                    which(given).push_back(time);
                }
                time
            }
            Self::Scripted(given) => which(given).pop_front().unwrap_or_else(real),
        }
    }

    /// Fills `bytes` with randomness. A script that has ended gives real one.
    pub fn fill<E>(&mut self, bytes: &mut [u8], real: impl FnOnce(&mut [u8]) -> Result<(), E>) -> Result<(), E> {
        match self {
            Self::Real => real(bytes),
            Self::Recorded(given) => {
                real(bytes)?;
                if given.is_whole() {
                    given.random.extend(&*bytes);
                }
                Ok(())
            }
            Self::Scripted(given) => {
                let count = bytes.len().min(given.random.len());
                let (scripted, rest) = bytes.split_at_mut(count);
                scripted.iter_mut().zip(given.random.drain(..count)).for_each(|(byte, random)| *byte = random);
                if rest.is_empty() { Ok(()) } else { real(rest) }
            }
        }
    }
}

/// A recorded call.
pub struct Recorded {
    /// The time that it was given, in milliseconds since 1970.
    pub time: u64,
    pub recording: Recording,
    pub given: Inputs,
    /// A watch or a wait.
    pub asked: Option<String>,
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    fn delete(key: &str) -> Vec<Event> {
        vec![Event::Delete(key.to_owned())]
    }

    fn append(key: &str, sequence: u64) -> Append {
        Append { events: delete(key), result: Ok(sequence) }
    }

    #[test]
    fn scripted_append_gets_the_result_of_the_one_in_its_place() {
        let mut script = Script::new(vec![append("a", 7), append("b", 9)]);
        assert_eq!(script.append(&delete("a")).ok(), Some(7));
        assert_eq!(script.append(&delete("b")).ok(), Some(9));
        assert_eq!(script.end().ok(), Some(Some(9)));
    }

    #[test]
    fn first_different_append_is_reported() {
        let different = |keys: &[&str]| {
            let mut script = Script::new(vec![append("a", 7), append("b", 9)]);
            for key in keys {
                let _ = script.append(&delete(key));
            }
            script.end().expect_err("it is different").what
        };
        assert_eq!(different(&["a", "c"]), "event 1 of append 2");
        assert_eq!(different(&["a"]), "append 2");
        assert_eq!(different(&["a", "b", "c"]), "append 3");
        assert_eq!(different(&["b", "c"]), "event 1 of append 1");
    }

    #[test]
    fn recording_without_bounds_is_given_up() {
        let Appends::Recorded(mut recording) = Appends::new(Record::All) else { panic!("nothing is recorded") };
        for _ in 0..QUEUE_BYTES / EVENT_BYTES {
            recording.add(Append { events: Vec::new(), result: Err(AppendError::Unavailable) });
        }
        assert!(recording.is_whole);
        recording.add(append("a", 7));
        assert!(!recording.is_whole && recording.appends.is_empty());

        let mut recorded = Surroundings::new(Record::All);
        for time in 0..SURROUNDINGS_BYTES as u64 {
            recorded.wall(|| time);
        }
        assert!(
            matches!(recorded, Surroundings::Recorded(given) if !given.is_whole() && given.bytes() == SURROUNDINGS_BYTES)
        );
    }

    #[test]
    fn scripted_surroundings_are_the_recorded_ones() {
        let mut recorded = Surroundings::new(Record::All);
        let real = |bytes: &mut [u8]| {
            bytes.fill(7);
            Ok::<_, Infallible>(())
        };
        let mut bytes = [0; 3];
        assert_eq!((recorded.wall(|| 1), recorded.monotonic(|| 2), recorded.wall(|| 3)), (1, 2, 3));
        recorded.fill(&mut bytes, real).unwrap();
        let Surroundings::Recorded(given) = recorded else { panic!("nothing is recorded") };
        let mut scripted = Surroundings::Scripted(given);
        assert_eq!(
            (scripted.monotonic(|| 0), scripted.wall(|| 0), scripted.wall(|| 0), scripted.wall(|| 9)),
            (2, 1, 3, 9)
        );
        let mut bytes = [0; 4];
        let other = |bytes: &mut [u8]| {
            bytes.fill(8);
            Ok::<_, Infallible>(())
        };
        scripted.fill(&mut bytes, other).unwrap();
        assert_eq!(bytes, [7, 7, 7, 8]);
    }
}
