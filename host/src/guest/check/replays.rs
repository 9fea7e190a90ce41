//! Replays of one log, compared with one another: in batches of different sizes, at different times and with different
//! randomness before the first entry.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use kvs_txlog::change::Change;
use kvs_txlog::{Entry, REPLAY_ENTRIES, TransactionLog};

use super::calls::{call, repeat, statistics_differ, tick};
use super::log::View;
use super::requests::Request;
use super::world::World;
use crate::guest::engine::Guest;
use crate::guest::owner::Part;
use crate::guest::replica::{Replica, unobserved};
use crate::guest::shadow::compare;

/// Sizes of batches.
pub const BATCHES: [usize; 4] = [REPLAY_ENTRIES, 1, 2, 7];
/// Time between two replays.
const PAUSE: Duration = Duration::from_millis(1_500);

/// Builds instances of a guest from a log.
pub struct Builder<'b> {
    pub guest: &'b Guest,
    pub world: &'b World,
    pub part: Part,
}

impl Builder<'_> {
    /// An instance with everything in the log up to a sequence, which cannot append. It has done its housekeeping, as one that
    /// serves.
    pub fn build(&self, log: &Arc<dyn TransactionLog>, until: u64, batch: usize) -> Result<Replica> {
        self.world.pass(PAUSE);
        let view: Arc<dyn TransactionLog> = Arc::new(View { log: Arc::clone(log), until, batch });
        let (mut replica, _) = Replica::build(self.guest, &view, self.part.clone(), &unobserved)?;
        tick(&mut replica.instance)?;
        Ok(replica)
    }

    /// Compares replays of the log, by what these requests read. Returns how many agree, or the first entry with which they
    /// do not.
    pub fn compare(&self, log: &Arc<dyn TransactionLog>, probes: &[String]) -> Result<Result<u64, String>> {
        for batch in BATCHES {
            let (mut good, mut bad) = (0, log.appended());
            let Some(mut shown) = self.differ(log, bad, batch, probes)? else { continue };
            // The shortest beginning of the log that shows it.
            while bad - good > 1 {
                let middle = good + (bad - good) / 2;
                match self.differ(log, middle, batch, probes)? {
                    Some(difference) => (bad, shown) = (middle, difference),
                    None => good = middle,
                }
            }
            let entry = Self::entry(log, bad)?;
            return Ok(Err(format!("two replays differ from {entry} on, {shown}")));
        }
        Ok(Ok(BATCHES.len() as u64 + 1))
    }

    /// The first difference between a replay in the largest batches and another one.
    fn differ(
        &self,
        log: &Arc<dyn TransactionLog>,
        until: u64,
        batch: usize,
        probes: &[String],
    ) -> Result<Option<String>> {
        let mut one = self.build(log, until, REPLAY_ENTRIES)?;
        let mut other = self.build(log, until, batch)?;
        let name = |what: &str, difference: &compare::Difference| {
            let names = match batch {
                REPLAY_ENTRIES => ("in one".to_owned(), "in the other".to_owned()),
                _ => (format!("in batches of {REPLAY_ENTRIES}"), format!("in batches of {batch}")),
            };
            format!("{what}: {}", difference.between(&names.0, &names.1))
        };
        for probe in probes {
            let request = Request::get(probe);
            let Some(incoming) = request.incoming() else { continue };
            let mut called = call(&mut one.instance, &incoming)?;
            if let Some(difference) = repeat(&mut other, &incoming, &mut called)? {
                return Ok(Some(name(&request.to_string(), &difference)));
            }
        }
        let difference = statistics_differ(&mut one.instance, &mut other.instance)?;
        Ok(difference.map(|difference| name("stats", &difference)))
    }

    /// Names an entry.
    fn entry(log: &Arc<dyn TransactionLog>, sequence: u64) -> Result<String> {
        let mut name = format!("entry {sequence}");
        let view = View { log: Arc::clone(log), until: sequence, batch: REPLAY_ENTRIES };
        view.replay(0, &mut |batch: &[Entry<'_>]| {
            if let Some(entry) = batch.last() {
                name = format!("entry {} ({})", entry.sequence, compare::event(Some(&Change::of(entry).event)));
            }
            Ok(())
        })?;
        Ok(name)
    }
}
