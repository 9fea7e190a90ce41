//! Two instances of a guest: one serves all along, the other is rebuilt from the log now and then. Both must do the same.
//!
//! The serving instance alone appends. The other one gets each request at the same time and with the same randomness, and for
//! its appends the results of the first, as a candidate in shadow traffic does.

use std::sync::Arc;

use anyhow::Result;
use hyper::Method;
use kvs_txlog::TransactionLog;

use super::calls::{Called, call, kept_differs, repeat, statistics_differ, tick};
use super::log::MemoryLog;
use super::replays::{BATCHES, Builder};
use super::report::{Check, Fault, Report};
use super::requests::Request;
use crate::guest::replica::{Replica, unobserved};
use crate::guest::shadow::Difference;

pub struct Pair<'s> {
    pub with: &'s Builder<'s>,
    pub report: &'s mut Report,
    pub log: Arc<MemoryLog>,
    serving: Replica,
    rebuilt: Replica,
    /// The size of the batches in which it was rebuilt.
    pub batch: usize,
}

impl<'s> Pair<'s> {
    pub fn new(with: &'s Builder<'s>, report: &'s mut Report) -> Result<Self> {
        let log = MemoryLog::new();
        let serving = serving(with, &log)?;
        let rebuilt = with.build(&(Arc::clone(&log) as _), u64::MAX, BATCHES[0])?;
        let description = serving.instance.description();
        report.guest = format!("{} {}", description.name, description.version);
        let pair = Self { with, report, log, serving, rebuilt, batch: BATCHES[0] };
        pair.forget_responses();
        Ok(pair)
    }

    /// Begins a generation of the response cache: what was kept may be of a faulty state.
    fn forget_responses(&self) {
        self.with.guest.response_cache().serve(Arc::clone(self.serving.instance.wanted_headers()));
    }

    pub fn log(&self) -> Arc<dyn TransactionLog> {
        Arc::clone(&self.log) as _
    }

    /// Sends a request to the serving instance.
    pub fn call(&mut self, request: &Request, name: &str) -> Result<Option<Called>, Fault> {
        let Some(incoming) = request.incoming() else { return Ok(None) };
        let called = call(&mut self.serving.instance, &incoming)
            .map_err(|trapped| Fault::new(Check::Calls, format!("{name}: {trapped}")))?;
        self.report.held(Check::Calls, 1);
        self.check_metrics(name);
        match &called.message {
            Ok(_) => self.report.held(Check::Responses, 1),
            Err(error) => {
                let text = format!("{name}: the response is not valid HTTP, so the server responds 500: {error}");
                self.report.found(Fault::new(Check::Responses, text));
            }
        }
        Ok(Some(called))
    }

    /// Reports the first change of a metric that had no effect.
    fn check_metrics(&mut self, name: &str) {
        if let Some(fault) = self.with.guest.metrics().fault() {
            self.report.found(Fault::new(Check::Metrics, format!("{name}: {fault}")));
        }
    }

    /// Makes the same call of the other instance, and returns the first difference.
    pub fn repeat(&mut self, request: &Request, called: &mut Called, name: &str) -> Result<Option<Difference>, Fault> {
        let Some(incoming) = request.incoming() else { return Ok(None) };
        repeat(&mut self.rebuilt, &incoming, called).map_err(|trapped| {
            let text = format!("{name}: the instance that was rebuilt trapped, and the other one did not: {trapped}");
            Fault::new(Check::Rebuild, text)
        })
    }

    /// Sends a request to both, and compares the response with a kept one, where there is one.
    pub fn both(&mut self, request: &Request, name: &str) -> Result<Option<(Called, Option<Difference>)>, Fault> {
        let kept = request.incoming().and_then(|incoming| self.with.guest.response_cache().get(&incoming));
        let Some(mut called) = self.call(request, name)? else { return Ok(None) };
        if let Ok(now) = &called.message {
            let kept = kept.and_then(|answer| answer.response.message().ok());
            // That of a response to HEAD can lack its body.
            if let Some(kept) = kept.filter(|_| request.method != Method::HEAD) {
                if let Some(difference) = kept_differs(&kept, now) {
                    let text = format!("{name}: {}", difference.between("as it was declared reusable", "now"));
                    self.report.found(Fault::new(Check::Reuse, text));
                }
                self.report.held(Check::Reuse, 1);
            }
            if let Some(reusable) = called.reusable.take() {
                reusable.keep(now);
            }
        }
        let difference = self.repeat(request, &mut called, name)?;
        Ok(Some((called, difference)))
    }

    /// Housekeeping of both. Only the serving one can append in it.
    pub fn tick(&mut self, name: &str) -> Result<(), Fault> {
        tick(&mut self.serving.instance)
            .map_err(|trapped| Fault::new(Check::Calls, format!("tick after {name}: {trapped}")))?;
        self.check_metrics(&format!("tick after {name}"));
        let followed = self.rebuilt.follow().and_then(|_| Ok(tick(&mut self.rebuilt.instance)?));
        followed.map_err(|error| apply_failed(name, &error))
    }

    /// Kills the other instance, and rebuilds it from the log in batches of another size.
    pub fn rebuild(&mut self, batch: usize, name: &str) -> Result<(), Fault> {
        self.rebuilt = self.with.build(&self.log(), u64::MAX, batch).map_err(|error| apply_failed(name, &error))?;
        self.batch = batch;
        self.tick(name)
    }

    pub fn statistics_differ(&mut self, name: &str) -> Result<Option<Difference>, Fault> {
        statistics_differ(&mut self.serving.instance, &mut self.rebuilt.instance)
            .map_err(|trapped| Fault::new(Check::Calls, format!("stats after {name}: {trapped}")))
    }

    /// Builds both from the log, after a fault.
    pub fn begin_again(&mut self, name: &str) -> Result<(), Fault> {
        self.serving = serving(self.with, &self.log).map_err(|error| apply_failed(name, &error))?;
        self.rebuild(BATCHES[0], name)?;
        self.forget_responses();
        Ok(())
    }

    /// What is to be reported of a difference in what a path reads. Replays that differ from one another are another mistake than
    /// what no replay has.
    pub fn fault(&self, check: Check, path: &str, text: String) -> Fault {
        match self.with.compare(&self.log(), &[path.to_owned()]) {
            Ok(Err(text)) => Fault::new(Check::Apply, text),
            Ok(Ok(_)) | Err(_) => Fault::new(check, text),
        }
    }
}

/// An instance that has everything in the log, and appends to it.
fn serving(with: &Builder<'_>, log: &Arc<MemoryLog>) -> Result<Replica> {
    let log: Arc<dyn TransactionLog> = Arc::clone(log) as _;
    Ok(Replica::build(with.guest, &log, with.part.clone(), &unobserved)?.0)
}

fn apply_failed(name: &str, error: &anyhow::Error) -> Fault {
    Fault::new(Check::Apply, format!("after {name}: {error:#}"))
}
