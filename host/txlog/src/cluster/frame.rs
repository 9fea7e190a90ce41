//! Frames of a replicated log: those of the log in files, and two kinds more.
//!
//! Each names the checksum of the frame before it, so that a reader notices a frame that is missing or was replaced. A claim
//! begins an epoch: it can only be put at the end of the log, so the process that put it has read everything before it.
//!
//! A deposed primary can have had several frames in flight. The first was refused, since the claim has its position, but
//! each other one names the position before it and not what is there, so it is accepted when the log has just that length.
//! It can only get one of the [`WINDOW`] - 1 positions after the claim: these are a barrier, in which frames of an older epoch
//! are void, and which the new primary fills one frame after the other before it has several in flight itself.
//!
//! A heartbeat shows that the primary is alive while nothing is written. The frame that closes a log also releases it.
//!
//! A log that was restored from a backup begins with frames of epoch 0, which no process has claimed: the first says what was
//! restored, the last closes them. Their sequences have gaps, so each names the last of its own, where others name the newest
//! that was durable.
//!
//! A snapshot has frames like these, of its own, and ends with one that says up to where it has the entries of the log: the next
//! frame of the log names the checksum that is in it.
//!
//! Owns: the rules by which one frame follows another. Must never know: the engine.

use std::mem;
use std::sync::Arc;

use bytes::Bytes;
use uuid::Uuid;

use crate::file::bytes::{u32_at, u64_at};
use crate::file::frame::{Builder, CLAIM, CLOSE, ENTRIES, Frame, HEAD_BYTES, HEARTBEAT, Head, RESTORED, SNAPSHOT};
use crate::file::{entry, incarnations};
use crate::remote::queue::{Batch, Content};
use crate::{Event, History};

/// Maximum number of frames in flight, and so a part of the format: a claim makes the positions after it, one less than this,
/// a barrier.
pub const WINDOW: usize = 4;
/// Positions of a barrier.
const BARRIER: u64 = WINDOW as u64 - 1;

/// Size of a frame beside its entries: the header, and padding.
pub const OVERHEAD: u64 = HEAD_BYTES as u64 + 8;

/// Entries of a batch, encoded.
#[derive(Default)]
pub struct Entries {
    body: Vec<u8>,
    count: u32,
}

impl Content for Entries {
    fn size(event: &Event) -> u64 {
        entry::size(event) as u64
    }

    fn push(&mut self, time: u64, event: &Event) {
        entry::encode(&mut self.body, self.count, time, event);
        self.count += 1;
    }
}

/// A process that writes the log, or did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Of one run of the process.
    pub id: Uuid,
    pub name: String,
    /// URL at which it serves clients.
    pub url: Option<String>,
    /// Its lease, in milliseconds: others claim the log only when they have read no frame for that long.
    pub lease_ms: u32,
}

impl Holder {
    fn encode(&self, body: &mut Vec<u8>) {
        body.extend_from_slice(self.id.as_bytes());
        body.extend_from_slice(&self.lease_ms.to_le_bytes());
        // Neither contains a zero, nor does the padding of the frame contain anything else.
        for text in [self.name.as_str(), self.url.as_deref().unwrap_or_default()] {
            body.extend_from_slice(text.as_bytes());
            body.push(0);
        }
    }

    fn decode(body: &[u8]) -> Option<Self> {
        let (id, rest) = body.split_at_checked(16)?;
        let (lease, rest) = rest.split_at_checked(4)?;
        let mut texts = rest.split(|byte| *byte == 0).map(std::str::from_utf8);
        let name = texts.next()?.ok()?.to_owned();
        let url = texts.next()?.ok().filter(|url| !url.is_empty()).map(str::to_owned);
        Some(Self { id: Uuid::from_slice(id).ok()?, name, url, lease_ms: u32_at(lease, 0) })
    }
}

/// What a log was restored from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Restored {
    /// The newest sequence whose entry is missing, since it was compacted before: it may have been a delete.
    pub horizon: u64,
    /// The incarnations of the log; the last one continues what was restored.
    pub history: Arc<History>,
}

impl Restored {
    #[cfg(any(test, feature = "nats"))]
    pub fn encode(&self) -> Builder {
        let mut frame = Builder::new(1, Vec::new());
        frame.kind = RESTORED;
        frame.body().extend_from_slice(&self.horizon.to_le_bytes());
        incarnations::encode(frame.body(), self.history.incarnations());
        frame
    }

    fn decode(body: &[u8]) -> Option<Self> {
        let (_, records) = body.split_at_checked(8)?;
        if records.is_empty() || !incarnations::is_whole(records) {
            return None;
        }
        Some(Self { horizon: u64_at(body, 0), history: Arc::new(History::new(incarnations::decode(records))) })
    }
}

/// What a snapshot has the entries of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// The end of the log that it was made from, which continues there.
    pub tip: Tip,
    pub restored: Restored,
}

impl Snapshot {
    /// Makes its last frame, without which it is not complete.
    pub fn encode(&self) -> Builder {
        let Self { tip: Tip { position, sequence, barrier, epoch, checksum }, restored: Restored { horizon, history } } =
            self;
        let mut frame = Builder::new(sequence + 1, Vec::new());
        frame.kind = SNAPSHOT;
        let body = frame.body();
        [position, sequence, barrier, horizon]
            .into_iter()
            .for_each(|number| body.extend_from_slice(&number.to_le_bytes()));
        [epoch, checksum].into_iter().for_each(|number| body.extend_from_slice(&number.to_le_bytes()));
        incarnations::encode(body, history.incarnations());
        frame
    }

    fn decode(body: &[u8]) -> Option<Self> {
        let (fixed, records) = body.split_at_checked(40)?;
        if !incarnations::is_whole(records) {
            return None;
        }
        let [position, sequence, barrier, horizon] = [0, 8, 16, 24].map(|at| u64_at(fixed, at));
        let [epoch, checksum] = [32, 36].map(|at| u32_at(fixed, at));
        let history = Arc::new(History::new(incarnations::decode(records)));
        Some(Self {
            tip: Tip { position, sequence, epoch, checksum, barrier },
            restored: Restored { horizon, history },
        })
    }

    /// Returns the newest sequence up to which it replaces the log.
    pub fn newest(&self) -> u64 {
        self.restored.history.newest_given(self.tip.sequence)
    }

    /// Returns what the last frame of a snapshot says; None if it is not one.
    pub fn of_last(log: Uuid, bytes: &[u8]) -> Option<Self> {
        match kind(Head::decode(bytes, log)?, bytes) {
            Ok(Kind::Snapshot(snapshot)) => Some(snapshot),
            _ => None,
        }
    }
}

/// The end of the log as far as it was read or written, and what a frame after it must name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tip {
    pub position: u64,
    pub sequence: u64,
    pub epoch: u32,
    checksum: u32,
    /// The last position of the barrier after the newest claim.
    barrier: u64,
}

/// Meaning of a frame for those who follow the log.
#[derive(Debug, PartialEq, Eq)]
pub enum Kind {
    Entries,
    /// The holder has taken the log, or still has it.
    Held(Holder),
    Released,
    /// The log was restored from a backup.
    Restored(Restored),
    /// The snapshot is complete.
    Snapshot(Snapshot),
    /// It is of a deposed primary, and not in the log.
    Void,
}

impl Tip {
    /// Returns the first of the frames that [`of_last`](Self::of_last) needs, where this one is the last.
    pub fn first_of_last(position: u64) -> u64 {
        position.saturating_sub(BARRIER).max(1)
    }

    /// Returns the end of a log of which only the last frames are known, from this position on. Enough of them show which are
    /// void: those of an older epoch than another one, since a claim is never void.
    pub fn of_last<'b>(
        log: Uuid,
        first: u64,
        frames: impl Iterator<Item = &'b [u8]>,
    ) -> Result<(Self, Kind), &'static str> {
        let mut last = Err(NOT_A_FRAME);
        for (position, bytes) in (first..).zip(frames) {
            let head = Head::decode(bytes, log).ok_or(NOT_A_FRAME)?;
            let mut kind = kind(head, bytes)?;
            let mut tip = Self {
                position,
                sequence: newest(head),
                epoch: head.epoch,
                checksum: head.checksum,
                barrier: if head.kind == CLAIM { position + BARRIER } else { 0 },
            };
            if let Ok((before, known)) = last {
                let Self { epoch, barrier, .. } = before;
                if head.epoch < epoch {
                    (tip, kind) = (Self { position, ..before }, known);
                } else {
                    tip.barrier = tip.barrier.max(barrier);
                }
            }
            last = Ok((tip, kind));
        }
        last
    }

    /// Moves on to the next frame, which must follow this one.
    pub fn accept(&mut self, log: Uuid, bytes: &[u8]) -> Result<Kind, &'static str> {
        let head = Head::decode(bytes, log).ok_or(NOT_A_FRAME)?;
        let kind = kind(head, bytes)?;
        if head.epoch < self.epoch && self.is_in_barrier() {
            self.position += 1;
            return Ok(Kind::Void);
        }
        if self.checksum != head.previous && !is_mutant("PreviousIgnored") {
            return Err("it does not follow the frame before it");
        }
        if head.epoch != self.epoch + u32::from(head.kind == CLAIM) {
            return Err("it is of another epoch than the frame before it");
        }
        let follows = head.first == self.sequence + 1 || head.epoch == 0 && head.first > self.sequence;
        if !follows && !is_mutant("PreviousIgnored") {
            return Err("its sequences do not follow those of the frame before it");
        }
        if head.kind == RESTORED && self.position > 0 {
            return Err("it says what the log was restored from, but is not the first");
        }
        self.take(head.kind, head.epoch, newest(head), head.checksum);
        Ok(kind)
    }

    /// Returns whether both are the same end of one log. The barrier of one that [`of_last`](Self::of_last) found is not known.
    pub fn is_same_end(&self, other: &Self) -> bool {
        Self { barrier: 0, ..*self } == Self { barrier: 0, ..*other }
    }

    /// Returns whether the next position is in the barrier after a claim.
    pub fn is_in_barrier(&self) -> bool {
        self.position < self.barrier && !is_mutant("NoBarrier")
    }

    fn take(&mut self, kind: u8, epoch: u32, sequence: u64, checksum: u32) {
        (self.epoch, self.sequence, self.checksum) = (epoch, sequence, checksum);
        self.position += 1;
        if kind == CLAIM {
            self.barrier = self.position + BARRIER;
        }
    }

    /// Makes the frame of a batch that follows here, and moves on to it. Takes the entries: while the frame is in flight they
    /// would be in memory twice.
    pub fn entries(&mut self, log: Uuid, batch: &mut Batch<Entries>) -> Bytes {
        debug_assert_eq!(batch.first, self.sequence + 1);
        let Entries { body, count } = mem::take(&mut batch.content);
        let mut frame = Builder::new(batch.first, Vec::with_capacity(body.len() + OVERHEAD as usize));
        frame.body().extend_from_slice(&body);
        frame.count = count;
        self.seal(log, frame, ENTRIES)
    }

    /// Makes the frame with which a process begins the next epoch, and moves on to it.
    pub fn claim(&mut self, log: Uuid, holder: &Holder) -> Bytes {
        self.epoch += 1;
        let mut frame = Builder::new(self.sequence + 1, Vec::new());
        holder.encode(frame.body());
        self.seal(log, frame, CLAIM)
    }

    pub fn heartbeat(&mut self, log: Uuid, holder: &Holder) -> Bytes {
        let mut frame = Builder::new(self.sequence + 1, Vec::new());
        holder.encode(frame.body());
        self.seal(log, frame, HEARTBEAT)
    }

    pub fn release(&mut self, log: Uuid) -> Bytes {
        self.seal(log, Builder::new(self.sequence + 1, Vec::new()), CLOSE)
    }

    fn seal(&mut self, log: Uuid, mut frame: Builder, kind: u8) -> Bytes {
        frame.kind = kind;
        let last = frame.first + u64::from(frame.count) - 1;
        let checksum = frame.seal(log, self.epoch, self.sequence, self.checksum);
        self.take(kind, self.epoch, last, checksum);
        frame.into_buffer().into()
    }
}

/// Returns the newest sequence up to a frame.
fn newest(head: Head) -> u64 {
    if head.epoch == 0 { head.durable } else { head.last() }
}

const NOT_A_FRAME: &str = "it is not a frame of this log, or is damaged";

/// Checks a frame by itself.
fn kind(head: Head, bytes: &[u8]) -> Result<Kind, &'static str> {
    let body = &bytes[HEAD_BYTES..];
    if !head.accepts(body) {
        return Err("its checksum is wrong");
    }
    match (head.kind, head.count, head.flags) {
        (ENTRIES, 1.., 0) => Ok(Kind::Entries),
        (CLOSE, 0, 0) => Ok(Kind::Released),
        (RESTORED, 0, 0) => Restored::decode(body).map(Kind::Restored).ok_or("it does not say what was restored"),
        (SNAPSHOT, 0, 0) => {
            Snapshot::decode(body).map(Kind::Snapshot).ok_or("it does not say what it is a snapshot of")
        }
        (CLAIM | HEARTBEAT, 0, 0) => Holder::decode(body).map(Kind::Held).ok_or("it does not name its holder"),
        _ => Err("it is of a kind that this binary does not know; use a newer kvs"),
    }
}

/// Returns a frame that was accepted, for its entries.
pub fn decoded(log: Uuid, bytes: &[u8]) -> Option<Frame<'_>> {
    let head = Head::decode(bytes, log)?;
    Some(Frame { head, offset: 0, body: &bytes[HEAD_BYTES..] })
}

/// Returns whether a test has broken the log in this way.
#[cfg(test)]
pub fn is_mutant(name: &str) -> bool {
    super::tests::mutants::is(name)
}

#[cfg(not(test))]
pub const fn is_mutant(_: &str) -> bool {
    false
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    fn holder() -> Holder {
        Holder { id: Uuid::from_u128(7), name: "process 1".into(), url: Some("http://a:1".into()), lease_ms: 10_000 }
    }

    #[test]
    fn frames_follow_one_another_and_name_their_holder() {
        let log = Uuid::from_u128(1);
        let (mut written, mut read) = (Tip::default(), Tip::default());
        let mut batch = Batch::<Entries>::new(0, 1, Instant::now());
        batch.push(5, &Event::Delete("a".into()));
        batch.push(6, &Event::Delete("b".into()));
        let claim = written.claim(log, &holder());
        let entries = written.entries(log, &mut batch);
        assert!(batch.content.body.is_empty(), "the entries are in memory twice");
        let heartbeat = written.heartbeat(log, &Holder { url: None, ..holder() });
        let release = written.release(log);
        assert_eq!(read.accept(log, &claim), Ok(Kind::Held(holder())));
        assert!(read.accept(log, &heartbeat).is_err(), "a gap is accepted");
        assert_eq!(read.accept(log, &entries), Ok(Kind::Entries));
        assert_eq!((read.position, read.sequence, read.epoch), (2, 2, 1));
        assert!(read.accept(log, &entries).is_err(), "a frame is accepted twice");
        assert_eq!(read.accept(log, &heartbeat), Ok(Kind::Held(Holder { url: None, ..holder() })));
        assert_eq!(read.accept(log, &release), Ok(Kind::Released));
        assert_eq!(read, written);
        let last =
            |log| Tip::of_last(log, 1, [&claim, &entries, &heartbeat, &release].into_iter().map(|bytes| &**bytes));
        assert_eq!(last(log), Ok((written, Kind::Released)));
        assert!(last(Uuid::from_u128(2)).is_err());
        let sequences: Vec<_> =
            decoded(log, &entries).unwrap().entries().map(|entry| entry.unwrap().sequence).collect();
        assert_eq!(sequences, [1, 2]);
    }

    #[test]
    fn frames_of_deposed_primary_are_void_in_the_barrier_only() {
        let log = Uuid::from_u128(1);
        let mut deposed = Tip::default();
        let first = deposed.claim(log, &holder());
        let mut tip = Tip::default();
        assert_eq!(tip.accept(log, &first), Ok(Kind::Held(holder())));
        let mut in_flight: Vec<_> = (0..WINDOW).map(|_| deposed.heartbeat(log, &holder())).collect();
        // Another claim takes the position of the first.
        let second = tip.claim(log, &holder());
        in_flight[0] = second.clone();
        let mut end = tip;
        for void in &in_flight[1..] {
            assert_eq!(end.accept(log, void), Ok(Kind::Void));
        }
        let frames = in_flight.iter().map(|bytes| &**bytes);
        let (last, kind) = Tip::of_last(log, 2, frames).unwrap();
        assert_eq!((last.position, last, kind), (5, end, Kind::Held(holder())));
        assert!(end.accept(log, &deposed.heartbeat(log, &holder())).is_err());
        let next = end.heartbeat(log, &holder());
        assert_eq!(Tip::of_last(log, 5, [&*in_flight[3], &*next].into_iter()).unwrap().0.position, 6);
    }

    #[test]
    fn restored_log_with_incomplete_record_is_rejected() {
        let incarnation =
            crate::Incarnation { id: Uuid::from_u128(2), parent: Uuid::from_u128(1), fork: 5, first: 1 << 40 };
        let restored = Restored { horizon: 3, history: Arc::new(History::new(vec![incarnation; 2])) };
        let bytes = restored.encode().into_buffer();
        let body = &bytes[HEAD_BYTES..];
        assert_eq!(Restored::decode(body), Some(restored));
        for length in (0..body.len()).filter(|length| *length != body.len() - 48) {
            assert_eq!(Restored::decode(&body[..length]), None, "{length} bytes");
        }
    }

    #[test]
    fn snapshot_ends_with_what_the_log_goes_on_from() {
        let log = Uuid::from_u128(1);
        let mut tip = Tip::default();
        tip.claim(log, &holder());
        let incarnation =
            crate::Incarnation { id: Uuid::from_u128(2), parent: Uuid::from_u128(1), fork: 5, first: 1 << 40 };
        for history in [History::default(), History::new(vec![incarnation])] {
            let snapshot = Snapshot { tip, restored: Restored { horizon: 3, history: Arc::new(history) } };
            let mut frame = snapshot.encode();
            frame.seal(log, 0, tip.sequence, 0);
            assert_eq!(Snapshot::of_last(log, frame.bytes()), Some(snapshot));
        }
        let heartbeat = tip.heartbeat(log, &holder());
        assert_eq!(Snapshot::of_last(log, &heartbeat), None);
    }

    #[test]
    fn flipped_bits_are_noticed() {
        let log = Uuid::from_u128(1);
        let claim = Tip::default().claim(log, &holder());
        for bit in 0..claim.len() * 8 {
            let mut damaged = claim.to_vec();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(Tip::default().accept(log, &damaged).is_err(), "bit {bit}");
        }
    }
}
