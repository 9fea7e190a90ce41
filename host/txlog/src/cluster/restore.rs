//! Restore of a backup into an engine without a log.
//!
//! Owns: the frames of the restored part. Must never know: how it becomes a log once it is complete.

use std::sync::Arc;

use anyhow::{Result, ensure};
use bytes::Bytes;
use tokio::runtime::Handle;

use super::frame::Restored;
use super::puts::Puts;
use crate::file::entry;
use crate::file::frame::{ALIGNMENT, Builder, CLOSE};
use crate::file::packer::Packer;
use crate::{Entry, Restoration};

/// Where the frames are put.
pub struct Target<'t> {
    pub puts: Puts<'t>,
    /// Runtime of the engine.
    pub handle: &'t Handle,
    /// Maximum size of a frame.
    pub frame_bytes: u64,
}

/// Writes the restored part of a log. Reads the entries twice: what is missing comes first, and is known last. Blocks, so must
/// not be called from a task.
pub fn restore(mut target: Target<'_>, restoration: &Restoration<'_>) -> Result<()> {
    let Restoration { log, ref history, last, incarnation, replay } = *restoration;
    let mut all = history.clone();
    all.push(incarnation);
    let restored = Restored { horizon: horizon(restoration)?, history: Arc::new(all) };
    let mut packer = Packer::new(log, 0, 0);
    // A sealed frame is padded.
    let largest = usize::try_from(target.frame_bytes)? / ALIGNMENT * ALIGNMENT;
    packer.frame_bytes = packer.frame_bytes.min(largest);
    let write = &mut |frame: &[u8]| target.put(frame);
    packer.put(restored.encode(), write)?;
    replay(&mut |entries| {
        for Entry { sequence, time, event } in entries {
            let encode = |body: &mut Vec<u8>, offset: u32| entry::encode_ref(body, offset, *time, event);
            packer.push(*sequence, entry::size_ref(event), encode, write)?;
            packer.durable = *sequence;
        }
        Ok(())
    })?;
    packer.flush(write)?;
    ensure!(packer.durable <= last, "the backup has entries after sequence {last}");
    packer.durable = incarnation.first - 1;
    let mut close = Builder::new(incarnation.first, Vec::new());
    close.kind = CLOSE;
    packer.put(close, write)
}

/// Returns the newest sequence whose entry is missing.
fn horizon(restoration: &Restoration<'_>) -> Result<u64> {
    let Restoration { ref history, last, replay, .. } = *restoration;
    let (mut end, mut horizon) = (0, 0);
    let mut reach = |sequence| {
        horizon = history.missing(end, sequence).unwrap_or(horizon);
        end = sequence;
    };
    replay(&mut |entries| {
        entries.iter().for_each(|entry| reach(entry.sequence));
        Ok(())
    })?;
    reach(history.next(last));
    Ok(horizon)
}

impl Target<'_> {
    fn put(&mut self, frame: &[u8]) -> Result<()> {
        let size = frame.len() as u64;
        ensure!(
            size <= self.frame_bytes,
            "a frame of the log takes {size} bytes, but max_payload of the server allows {}: raise it",
            self.frame_bytes
        );
        self.handle.block_on(self.puts.put(Bytes::copy_from_slice(frame)))
    }
}

#[cfg(test)]
mod tests {
    use std::future::ready;
    use std::sync::{Mutex, PoisonError};
    use std::time::Duration;

    use kvs_runtime::{Env, Random};
    use tokio::runtime::{Builder, Runtime};
    use uuid::Uuid;

    use super::*;
    use crate::cluster::engine::{Call, Ends, Engine, Put, ReadError};
    use crate::cluster::mark::Mark;
    use crate::cluster::{ClusterLog, Options, READ_LEASE, Stored};
    use crate::{Event, EventRef, Forgotten, History, Incarnation, TransactionLog};

    const LOG: Uuid = Uuid::from_u128(7);

    /// An engine that stores every frame, and does not answer every third put.
    #[derive(Clone, Default)]
    struct Frames(Arc<Mutex<Vec<Bytes>>>);

    impl Engine for Frames {
        fn put(&self, after: u64, frame: Bytes) -> Call<'static, Put> {
            let mut frames = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let outcome = match frames.len() as u64 {
                last if last != after => Put::Refused,
                last if last % 3 == 2 => Put::Unknown("no answer".into()),
                _ => Put::Durable,
            };
            if outcome != Put::Refused {
                frames.push(frame);
            }
            Box::pin(ready(outcome))
        }

        fn read(&self, from: u64, _: Duration) -> Call<'_, Result<Vec<Bytes>, ReadError>> {
            let frames = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            Box::pin(ready(Ok(frames[from as usize - 1..].to_vec())))
        }

        fn ends(&self) -> Call<'_, Result<Ends, ReadError>> {
            let last = self.0.lock().unwrap_or_else(PoisonError::into_inner).len() as u64;
            Box::pin(ready(Ok(Ends { first: 1, last, frames: last, bytes: 0 })))
        }

        fn drop_until(&self, _: u64) -> Call<'_, Result<(), ReadError>> {
            unreachable!("nothing is dropped")
        }

        fn snapshots(&self) -> Call<'_, Result<Vec<u64>, ReadError>> {
            Box::pin(ready(Ok(Vec::new())))
        }

        fn make_snapshot(&self, _: u64, _: Uuid) -> Call<'_, Result<(), ReadError>> {
            unreachable!("no snapshot is made")
        }

        fn drop_snapshot(&self, _: u64) -> Call<'_, Result<(), ReadError>> {
            unreachable!("there is none")
        }

        fn snapshot(&self, _: u64) -> Arc<dyn Engine> {
            unreachable!("there is none")
        }
    }

    fn runtime() -> Runtime {
        Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
    }

    fn stored(frames: &Frames) -> Stored {
        let (name, engine) = ("frames".to_owned(), Arc::new(frames.clone()));
        Stored {
            engine,
            name,
            mark: Mark::new(LOG),
            mark_file: None,
            copies: None,
            group_bytes: 1 << 16,
            compaction_bytes: 1 << 20,
        }
    }

    fn options() -> Options {
        let (lease, retain) = (READ_LEASE, Duration::ZERO);
        Options { group_bytes: None, standby: false, lease, retain, advertise: None, env: Env::real() }
    }

    fn entries(log: &ClusterLog, after: u64) -> Result<Vec<(u64, u64, String)>> {
        let mut all = Vec::new();
        log.replay(after, &mut |entries| {
            all.extend(entries.iter().map(|entry| (entry.sequence, entry.time, entry.event.key().to_owned())));
            Ok(())
        })?;
        Ok(all)
    }

    /// Restores these sequences, and returns the incarnation that continues them.
    fn restore_into(frames: &Frames, sequences: &[u64], history: &History, last: u64) -> Incarnation {
        let (runtime, random) = (runtime(), Random::system());
        let parent = history.at(LOG, last);
        let incarnation = Incarnation::after(parent, last, random.uuid().unwrap(), random.u64().unwrap());
        let keys: Vec<_> = sequences.iter().map(|sequence| format!("key-{sequence}")).collect();
        let replay = |receive: &mut crate::Receive<'_>| {
            let entries = sequences.iter().zip(&keys).map(|(&sequence, key)| {
                let event = EventRef::Delete(key);
                Entry { sequence, time: sequence % 1_000, event }
            });
            let all: Vec<_> = entries.collect();
            all.chunks(2).try_for_each(&mut *receive)
        };
        let restoration = Restoration { log: LOG, history: history.clone(), last, incarnation, replay: &replay };
        let (env, handle) = (Env::real(), runtime.handle());
        let puts = Puts { engine: frames, env: &env, position: 0 };
        let target = Target { puts, handle, frame_bytes: 1 << 20 };
        restore(target, &restoration).unwrap();
        incarnation
    }

    #[test]
    fn restored_log_has_gaps_and_continues_far_beyond() {
        let jump = 1 << 41;
        let before = Incarnation { id: Uuid::from_u128(8), parent: LOG, fork: 5, first: jump };
        let history = History::new(vec![before]);
        // Compaction had dropped 2, 4 and the one after `jump`.
        let sequences = [1, 3, 5, jump, jump + 2, jump + 3];
        let frames = Frames::default();
        let incarnation = restore_into(&frames, &sequences, &history, jump + 4);
        assert_eq!(incarnation.parent, before.id);

        let log = ClusterLog::open(runtime(), stored(&frames), &options()).unwrap();
        let expected: Vec<_> = sequences.map(|sequence| (sequence, sequence % 1_000, format!("key-{sequence}"))).into();
        assert_eq!(entries(&log, 0).unwrap(), expected);
        assert_eq!((log.appended(), log.watermark().durable(), log.retained()), (jump + 4, jump + 4, jump + 4));
        assert_eq!(log.history().incarnations(), [before, incarnation]);
        // The one after the last entry is missing too.
        assert!(entries(&log, jump + 3).unwrap_err().is::<Forgotten>());
        assert_eq!(entries(&log, jump + 4).unwrap(), []);
        assert_eq!(log.append(9, &[Event::Delete("new".into())]).unwrap(), incarnation.first);
        log.close().unwrap();
        drop(log);

        let log = ClusterLog::read(runtime(), stored(&frames), &options()).unwrap();
        assert_eq!(entries(&log, jump + 4).unwrap(), [(incarnation.first, 9, "new".to_owned())]);
        assert_eq!(entries(&log, 0).unwrap().len(), 7);
        assert_eq!(log.appended(), incarnation.first);
    }

    #[test]
    fn restored_log_is_resumed_within_a_frame_with_gaps() {
        let frames = Frames::default();
        restore_into(&frames, &[1, 100, 101, 102], &History::default(), 102);
        let log = ClusterLog::read(runtime(), stored(&frames), &options()).unwrap();
        // From the second on, positions of frames are known.
        for _ in 0..2 {
            assert!(entries(&log, 98).unwrap_err().is::<Forgotten>());
            for (after, left) in [(0, 4), (99, 3), (100, 2), (101, 1), (102, 0)] {
                assert_eq!(entries(&log, after).unwrap().len(), left, "{after}");
            }
        }
    }

    #[test]
    fn restored_log_without_gaps_can_be_resumed_anywhere() {
        let frames = Frames::default();
        let incarnation = restore_into(&frames, &[1, 2, 3], &History::default(), 3);
        let log = ClusterLog::read(runtime(), stored(&frames), &options()).unwrap();
        for after in 0..=3 {
            assert_eq!(entries(&log, after).unwrap().len() as u64, 3 - after);
        }
        assert_eq!((log.appended(), log.retained()), (3, 1));
        assert_eq!(log.history().incarnations(), [incarnation]);
    }
}
