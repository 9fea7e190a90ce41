//! The writer: the one thread that writes the log, frame by frame.
//!
//! Owns: the end of the log. A frame is written only after the sync of the one before it has returned; recovery rests
//! on that.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use anyhow::bail;
use kvs_runtime::Clock;
use uuid::Uuid;

use super::catalog::Segment;
use super::disk::{File, is_full, is_shortage};
use super::frame::{Builder, CLOSE, NOT_SYNCED};
use super::hang::Cause;
use super::position::Position;
use super::queue::Work;
use super::{Durability, Shared, mark};

/// How long nothing must come before the watermark file is written: it must not cost those who write.
const IDLE: Duration = Duration::from_secs(1);

/// How often, and after which pause each time, a frame is written again for which there was no memory.
const AGAIN: u32 = 50;
const PAUSE: Duration = Duration::from_millis(100);

pub struct Writer {
    /// The newest segment.
    pub number: u64,
    pub file: Arc<dyn File>,
    pub size: u64,
    /// Where the next frame goes: always here, never "at the end of the file". Bytes appended after torn ones would be
    /// out of reach.
    pub end: u64,
    /// The checksum of the last frame.
    pub chain: u32,
    /// Of this run: one more than that of the last frame before it.
    pub epoch: u32,
    /// The newest sequence written, and the newest known to be on disk. Where an incarnation has no entries yet, the one
    /// before its first.
    pub last: u64,
    pub synced: u64,
    /// Whether the last frame says that the log was closed.
    pub closed: bool,
    /// A frame of this run is on disk. The first is synced whatever the durability: it says which that is.
    pub announced: bool,
    /// What the watermark file says.
    pub marked: u64,
    /// The position file; None if the disk was full.
    pub position: Option<Arc<dyn File>>,
}

impl Writer {
    /// Writes until the log is closed or fails.
    pub fn run(mut self, shared: &Shared) -> anyhow::Result<()> {
        while self.step(shared)? {}
        Ok(())
    }

    /// Waits for something to do and does it; false when nothing will come any more.
    pub fn step(&mut self, shared: &Shared) -> anyhow::Result<bool> {
        let idle = (self.marked < self.synced).then_some(IDLE);
        let work = shared.queue.take(idle);
        shared.hangs.begin(shared.clock(), Cause::Disk);
        let goes_on = match work {
            Work::Write(frame) => self.commit(shared, frame).map(|()| true),
            Work::Idle => self.mark(shared).map(|()| true),
            Work::Closed => self.close(shared).map(|()| false),
            Work::Failed => Ok(false),
        };
        shared.hangs.end();
        goes_on
    }

    /// Writes one frame, makes it durable, and only then lets go of the responses that wait for it.
    fn commit(&mut self, shared: &Shared, mut frame: Builder) -> anyhow::Result<()> {
        let left = self.size - self.end;
        let unused = if frame.sealed_len() > left { left } else { 0 };
        shared.compactor.stall_if_needed(shared, unused + super::segment::HEAD_BYTES + frame.sealed_len());
        while self.end + frame.sealed_len() > self.size {
            if !self.rotate(shared)? {
                bail!("no room for another segment of the log");
            }
        }
        let last = frame.first + u64::from(frame.count) - 1;
        if shared.durability == Durability::Os {
            frame.flags = NOT_SYNCED;
        }
        let clock = shared.clock();
        let begun = clock.now();
        self.write(shared, &mut frame)?;
        let written = clock.now();
        self.last = last;
        self.closed = false;
        #[cfg(test)]
        if super::tests::mutants::is(super::tests::mutants::Mutant::PublishedEarly) {
            self.publish(shared.log, clock)?;
        }
        #[cfg(test)]
        if super::tests::mutants::is(super::tests::mutants::Mutant::EarlyAnswer) {
            shared.watermark.advance(last);
        }
        if shared.durability == Durability::Sync || !self.is_announced() {
            self.sync()?;
            self.announced = true;
            shared.metrics.sync.observe_time(clock.elapsed(written));
        }
        // Before the acknowledgement: a standby that finds nothing new knows that nothing was acknowledged.
        self.publish(shared.log, shared.clock())?;
        // The catalogue first: a reader that sees the watermark must find the entries it covers.
        shared.catalog.extend(self.end, self.last, self.chain, frame.deletes);
        shared.watermark.advance(self.last);
        // Those who waited for it are on their way.
        let metrics = &shared.metrics;
        frame.begun.into_iter().for_each(|begun| metrics.append.observe_time(clock.elapsed(begun)));
        metrics.write.observe_time(written - begun);
        metrics.batch.observe(frame.count.into());
        metrics.written.add(frame.sealed_len());
        shared.queue.written(frame, self.size - self.end, clock.elapsed(begun));
        Ok(())
    }

    fn is_announced(&self) -> bool {
        #[cfg(test)]
        if super::tests::mutants::is(super::tests::mutants::Mutant::OsNotRecorded) {
            return true;
        }
        self.announced
    }

    fn write(&mut self, shared: &Shared, frame: &mut Builder) -> anyhow::Result<()> {
        let checksum = frame.seal(shared.log, self.epoch, self.synced, self.chain);
        // The same bytes at the same place, and nothing rests on them yet.
        despite_shortage(shared.clock(), || self.file.write_at(frame.bytes(), self.end))?;
        self.end += frame.bytes().len() as u64;
        self.chain = checksum;
        Ok(())
    }

    /// Publishes the durable watermark to standbys. They would take the last published one for the end of the log, so a
    /// failure here fails the log.
    pub fn publish(&self, log: Uuid, clock: &Clock) -> io::Result<()> {
        let Some(file) = &self.position else { return Ok(()) };
        let (sequence, segment, offset, chain) = (self.last, self.number, self.end, self.chain);
        let position = Position { log, sequence, segment, offset, chain };
        despite_shortage(clock, || position.write(&**file))
    }

    /// A sync that failed is final, whatever a second one would say: the caller gives up.
    fn sync(&mut self) -> anyhow::Result<()> {
        self.file.sync()?;
        self.synced = self.last;
        Ok(())
    }

    /// Continues in the next segment; false when there is none.
    fn rotate(&mut self, shared: &Shared) -> anyhow::Result<bool> {
        // Whatever the durability: only the newest segment can have a torn tail.
        if self.synced < self.last {
            self.sync()?;
        }
        let Some(spare) = shared.preallocator.take(shared)? else { return Ok(false) };
        shared.catalog.push(Segment::empty(spare.number, self.last, self.chain, spare.size));
        self.number = spare.number;
        (self.file, self.size, self.end) = (spare.file, spare.size, super::segment::HEAD_BYTES);
        shared.compactor.sealed(shared);
        Ok(true)
    }

    /// Ends with a frame that says so: a frame that follows the last one proves that to have been durable, so damage to
    /// it cannot pass for a torn tail, and nothing that clients have seen can be missing.
    fn close(&mut self, shared: &Shared) -> anyhow::Result<()> {
        let mut trailer = Builder::new(self.last + 1, Vec::new());
        trailer.kind = CLOSE;
        if self.synced < self.last {
            self.sync()?;
        }
        let fits = |writer: &Self| writer.end + trailer.sealed_len() <= writer.size;
        if !self.closed && (fits(self) || self.rotate(shared)?) && fits(self) {
            self.write(shared, &mut trailer)?;
            self.sync()?;
            shared.catalog.extend(self.end, self.last, self.chain, 0);
        }
        if self.marked < self.synced { self.mark(shared) } else { Ok(()) }
    }

    /// Notes in the watermark file how far the log is durable.
    pub fn mark(&mut self, shared: &Shared) -> anyhow::Result<()> {
        self.marked = self.synced;
        match mark::write(&*shared.home.disk, shared.log, self.synced) {
            // It is a help. Where one of its syncs failed, the log fails.
            Err(error) if is_full(&error) || is_shortage(&error) => {
                tracing::warn!("the watermark file was not written: {error}");
            }
            written => written?,
        }
        Ok(())
    }
}

/// Retries a write that failed for lack of memory.
fn despite_shortage(clock: &Clock, write: impl Fn() -> io::Result<()>) -> io::Result<()> {
    let mut tries = 0;
    loop {
        match write() {
            Err(error) if is_shortage(&error) && tries < AGAIN => {
                tries += 1;
                clock.pause(PAUSE);
            }
            written => return written,
        }
    }
}
