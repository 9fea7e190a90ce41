//! A session: requests to a pair of instances, kills between calls, and appends that are refused.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use bytes::Bytes;
use hyper::header;
use kvs_txlog::{AppendError, TransactionLog};

use super::pair::Pair;
use super::replays::{BATCHES, Builder};
use super::report::{Check, Fault, Report};
use super::requests::{Generator, Request};

/// One in this many requests has its appends refused.
const REFUSED: u64 = 8;
/// Housekeeping, and rebuilds without another reason, after this many requests.
const TICK: u64 = 10;
const REBUILD: u64 = 40;
/// Rebuilds right after a request that was acknowledged without an entry.
const UNLOGGED: u64 = 60;
/// Paths that are read after a rebuild, and after an append that was refused.
const PROBES: usize = 200;
const FEW_PROBES: usize = 10;
/// Faults after which a session ends: the rest follows from them.
const FAULTS: u32 = 10;
/// Results of appends that are refused.
const REFUSALS: [(AppendError, &str); 4] = [
    (AppendError::InsufficientStorage, "insufficient-storage"),
    (AppendError::Unavailable, "unavailable"),
    (AppendError::ReadOnly, "read-only"),
    (AppendError::TooLarge(1), "too-large"),
];

pub struct Session<'s> {
    pair: Pair<'s>,
    rng: fastrand::Rng,
    /// Requests so far.
    number: u64,
    /// The request before which an instance was rebuilt.
    rebuilt_before: u64,
    rebuilds: usize,
    unlogged: u64,
    /// Paths of requests.
    probes: Vec<String>,
    /// The last request to a path that was acknowledged and was no read.
    writes: HashMap<String, String>,
}

impl<'s> Session<'s> {
    pub fn new(with: &'s Builder<'s>, report: &'s mut Report, rng: fastrand::Rng) -> Result<Self> {
        let pair = Pair::new(with, report)?;
        let (probes, writes) = (vec!["/v1".to_owned()], HashMap::new());
        Ok(Self { pair, rng, number: 0, rebuilt_before: 1, rebuilds: 0, unlogged: 0, probes, writes })
    }

    /// The response to a request before the session.
    pub fn get(&mut self, path: &str) -> Option<Bytes> {
        let name = format!("GET {path}");
        let (called, _) = match self.pair.both(&Request::get(path), &name) {
            Ok(answered) => answered?,
            Err(fault) => {
                self.pair.report.found(fault);
                if let Err(fault) = self.pair.begin_again(&name) {
                    self.pair.report.found(fault);
                }
                return None;
            }
        };
        Some(called.message.ok().filter(|message| message.status().is_success())?.into_body())
    }

    /// Sends this many requests. Returns the log that they made, and the paths to read from it.
    pub fn run(
        mut self,
        requests: u64,
        generator: &mut Generator,
        progress: &dyn Fn(u64),
    ) -> (Arc<dyn TransactionLog>, Vec<String>) {
        let mut faults = 0;
        while self.number < requests && faults < FAULTS {
            self.number += 1;
            progress(self.number);
            let request = generator.next();
            let Err(fault) = self.step(&request, generator, requests) else { continue };
            faults += 1;
            self.pair.report.found(fault);
            self.rebuilt_before = self.number + 1;
            if let Err(fault) = self.pair.begin_again(&self.name()) {
                self.pair.report.found(fault);
                break;
            }
        }
        self.pair.report.requests = self.number;
        self.pair.report.entries = self.pair.log.appended();
        (self.pair.log(), self.probes)
    }

    fn name(&self) -> String {
        format!("request {}", self.number)
    }

    fn step(&mut self, request: &Request, generator: &mut Generator, requests: u64) -> Result<(), Fault> {
        self.pair.with.world.pass(self.pause());
        self.read_later(request.path());
        let is_unlogged = if self.number.is_multiple_of(REFUSED) && !request.method.is_safe() {
            self.refused(request)?;
            false
        } else {
            self.accepted(request, generator)?
        };
        if self.number.is_multiple_of(TICK) {
            self.pair.tick(&self.name())?;
        }
        self.unlogged += u64::from(is_unlogged);
        if is_unlogged && self.unlogged <= UNLOGGED || self.number.is_multiple_of(REBUILD) || self.number == requests {
            self.rebuild()?;
        }
        Ok(())
    }

    /// Times between requests: most are short, and some long enough for what expires.
    fn pause(&mut self) -> Duration {
        Duration::from_millis(match self.rng.u8(..50) {
            0 => self.rng.u64(..100_000),
            1..10 => self.rng.u64(..3_000),
            _ => self.rng.u64(..20),
        })
    }

    /// Adds a path to those that are read after a rebuild, in place of another when there are many.
    fn read_later(&mut self, path: &str) {
        if self.probes.iter().any(|probe| probe == path) {
            return;
        }
        if self.probes.len() < PROBES {
            self.probes.push(path.to_owned());
        } else {
            let place = self.rng.usize(..PROBES);
            path.clone_into(&mut self.probes[place]);
        }
    }

    /// A request whose appends are accepted. Returns whether it was acknowledged as a change and appended nothing.
    fn accepted(&mut self, request: &Request, generator: &mut Generator) -> Result<bool, Fault> {
        let name = format!("{}, {request}", self.name());
        let Some((called, difference)) = self.pair.both(request, &name)? else { return Ok(false) };
        if let Some(difference) = difference {
            let (before, batch) = (self.rebuilt_before, self.pair.batch);
            let other = format!("in one that was rebuilt before request {before}, in batches of {batch}");
            let text = format!("{name}: {}", difference.between("in the instance that served all along", &other));
            return Err(self.pair.fault(Check::Rebuild, request.path(), text));
        }
        let Ok(message) = &called.message else { return Ok(false) };
        if let Some(tag) = message.headers().get(header::ETAG) {
            generator.saw(tag);
        }
        let is_acknowledged = message.status().as_u16() < 400 && !called.has_sequel && !request.method.is_safe();
        if is_acknowledged {
            self.writes.insert(request.path().to_owned(), name);
        }
        Ok(is_acknowledged && !called.appended)
    }

    /// A request whose appends are refused, which the other instance does not get: both are the same after it.
    fn refused(&mut self, request: &Request) -> Result<(), Fault> {
        let (refusal, reason) = REFUSALS[self.rng.usize(..REFUSALS.len())];
        let name = format!("{}, {request}, whose append got {reason}", self.name());
        self.pair.log.refuse(refusal);
        let called = self.pair.call(request, &name);
        let was_refused = self.pair.log.accept() > 0;
        let called = called.map_err(|fault| if was_refused { Fault { check: Check::Refused, ..fault } } else { fault });
        let Some(mut called) = called? else { return Ok(()) };
        if !was_refused {
            // It is a request as any other.
            let name = format!("{}, {request}", self.name());
            let difference = self.pair.repeat(request, &mut called, &name)?;
            return difference.map_or(Ok(()), |difference| {
                let text = format!("{name}: {}", difference.between("before a rebuild", "after it"));
                Err(self.pair.fault(Check::Rebuild, request.path(), text))
            });
        }
        let status = called.message.map_or(500, |message| message.status().as_u16());
        if status < 400 {
            let text = format!("{name}: the response is {status}, which acknowledges it");
            return Err(Fault::new(Check::Refused, text));
        }
        let few = self.rng.choose_multiple(&self.probes, FEW_PROBES).into_iter().cloned();
        let probes: Vec<_> = [request.path().to_owned()].into_iter().chain(few).collect();
        for probe in probes {
            let read = Request::get(&probe);
            let Some((_, Some(difference))) = self.pair.both(&read, &format!("{read}, after {}", self.name()))? else {
                continue;
            };
            let text = format!("{name}, changed the state: {read}: {}", difference.between("after it", "without it"));
            return Err(self.pair.fault(Check::Refused, &probe, text));
        }
        if let Some(difference) = self.pair.statistics_differ(&name)? {
            let text = format!("{name}, changed the state: {}", difference.between("after it", "without it"));
            return Err(Fault::new(Check::Refused, text));
        }
        self.pair.report.held(Check::Refused, 1);
        Ok(())
    }

    /// Kills the other instance, rebuilds it from the log, and compares what both read.
    fn rebuild(&mut self) -> Result<(), Fault> {
        let name = self.name();
        self.rebuilds += 1;
        self.pair.rebuild(BATCHES[self.rebuilds % BATCHES.len()], &name)?;
        self.rebuilt_before = self.number + 1;
        for probe in self.probes.clone() {
            let read = Request::get(&probe);
            let Some((_, Some(difference))) = self.pair.both(&read, &format!("{read}, after {name}"))? else {
                continue;
            };
            let write = self.writes.get(&probe).map(|write| format!("; the last to change it was {write}"));
            let (difference, write) = (difference.between("before", "after"), write.unwrap_or_default());
            let text = format!("{read}, before and after a rebuild that followed {name}: {difference}{write}");
            return Err(self.pair.fault(Check::Rebuild, &probe, text));
        }
        if let Some(difference) = self.pair.statistics_differ(&name)? {
            let text = format!("rebuild that followed {name}: {}", difference.between("before", "after"));
            return Err(Fault::new(Check::Rebuild, text));
        }
        if self.pair.log.appended() > 0 {
            self.pair.report.held(Check::Rebuild, 1);
        }
        Ok(())
    }
}
