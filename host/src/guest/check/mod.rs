//! `kvs guest test`: finds the mistakes of a guest that nobody notices before a server stops.
//!
//! The guest is run by the same code as in a server, over a log in memory, in surroundings of which nothing changes by itself
//! (`world`). A session (`session`) sends requests (`requests`, `openapi`) to two instances (`pair`), of which one is rebuilt from
//! the log again and again, and compares all that they do. Replays of a log are compared with one another (`replays`).
//!
//! Owns: what is compared with what, and what is reported. Must never know: sockets, how a server reacts to a mistake.

mod calls;
mod log;
mod openapi;
mod pair;
mod replays;
mod report;
mod requests;
mod session;
mod world;

use std::sync::Arc;

use anyhow::{Context, Result};
use kvs_runtime::Env;
use kvs_txlog::{Entry, TransactionLog};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};

use self::replays::Builder;
pub use self::report::Report;
use self::report::{Check, Fault};
use self::requests::Generator;
pub use self::requests::Request;
use self::session::Session;
use self::world::World;
use super::clock::Clock;
use super::engine::Engine;
use super::limits::Limits;
use super::owner::Owners;
use super::source::Source;

/// Size of the response cache.
const CACHE_BYTES: u64 = 64 << 20;
/// Keys of a given log that are read from it.
const KEYS: usize = 200;

/// Extent of a test.
pub struct Plan {
    pub seed: u64,
    pub requests: u64,
    /// Requests that are sent among those that are generated.
    pub given: Vec<Request>,
    /// A log that is replayed too.
    pub log: Option<Arc<dyn TransactionLog>>,
}

/// Tests a guest. `progress` is called with the number of each request.
pub fn test(
    source: Source,
    limits: Limits,
    config: Vec<(String, String)>,
    plan: Plan,
    env: &Env,
    progress: &dyn Fn(u64),
) -> Result<Report> {
    let Plan { seed, requests, given, log } = plan;
    let mut rng = fastrand::Rng::with_seed(seed);
    let world = World::new(env, rng.u64(..));
    let clock = Clock::new(world.env(env));
    let guest = Engine::with_clock(limits, config, None, CACHE_BYTES, env, clock)?.load(source)?;
    let part = Owners::new(1, &guest.env().random)?.part(0);
    let with = Builder { guest: &guest, world: &world, part };
    let mut report = Report::new(seed);

    let mut session = Session::new(&with, &mut report, rng.fork()).context("the guest does not start")?;
    let operations = session.get(openapi::PATH).map(|document| openapi::operations(&document)).unwrap_or_default();
    let mut generator = Generator::new(rng.fork(), given, operations);
    let (made, probes) = session.run(requests, &mut generator, progress);
    report.held(Check::Metrics, guest.metrics().count() as u64);
    if made.appended() > 0 && !report.has_found(Check::Apply) {
        compare(&with, &made, &probes, Check::Apply, &mut report);
    }
    if let Some(log) = log {
        compare(&with, &log, &paths_of_keys(&log, &mut rng)?, Check::Log, &mut report);
    }
    Ok(report)
}

fn compare(with: &Builder<'_>, log: &Arc<dyn TransactionLog>, probes: &[String], check: Check, report: &mut Report) {
    match with.compare(log, probes) {
        Ok(Ok(count)) => report.held(check, count),
        Ok(Err(text)) => report.found(Fault::new(check, text)),
        Err(error) => report.found(Fault::new(check, format!("{error:#}"))),
    }
}

/// Paths of keys of a log, and of the list of all: any of them, however many there are.
fn paths_of_keys(log: &Arc<dyn TransactionLog>, rng: &mut fastrand::Rng) -> Result<Vec<String>> {
    let (mut keys, mut seen) = (Vec::new(), 0);
    log.replay(0, &mut |batch: &[Entry<'_>]| {
        for entry in batch {
            seen += 1;
            match rng.usize(..seen) {
                _ if keys.len() < KEYS => keys.push(entry.event.key().to_owned()),
                place if place < KEYS => entry.event.key().clone_into(&mut keys[place]),
                _ => {}
            }
        }
        Ok(())
    })?;
    keys.sort_unstable();
    keys.dedup();
    let paths = keys.iter().map(|key| format!("/v1/{}", utf8_percent_encode(key, NON_ALPHANUMERIC)));
    Ok(paths.chain(["/v1".to_owned()]).collect())
}
