//! Shadow traffic of a tenth of the requests: what it costs the threads that answer requests, and what the candidate takes beside.
//! The candidate is a copy of the guest that serves.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::load::load;
use crate::process::{Server, median, thread_seconds};
use crate::replay;
use crate::report::{Report, number};
use crate::{setting, swap};

const KEYS: u64 = 1_000_000;
const ROUNDS: usize = 5;
const CONNECTIONS: u32 = 64;
const TIME: Duration = Duration::from_secs(10);
const PATIENCE: Duration = Duration::from_secs(300);
/// Threads that answer requests.
const WORKERS: &str = "tokio";

/// What one round took.
struct Round {
    per_second: f64,
    /// CPU time of the threads that answer requests, for one request, in microseconds.
    worker_us: f64,
}

pub fn run(data: &Path, report: &mut Report) -> Result<()> {
    let keys = setting("BENCH_KEYS", KEYS)?;
    report.uses("wrk", &["-v"]);
    replay::write(data, keys, 100, |number| format!("key-{number}"))?;
    let server = Server::kvs("kvs", data, &[])?;
    let round = || {
        let before = thread_seconds(&server.id(), WORKERS)?;
        let wrk = load("mixed", keys, CONNECTIONS, TIME).wrk_alone(&server)?;
        let worker_us = (thread_seconds(&server.id(), WORKERS)? - before) / wrk.requests * 1e6;
        Ok::<_, anyhow::Error>(Round { per_second: wrk.requests / wrk.seconds, worker_us })
    };
    // The response cache is warm in both.
    round()?;
    let (mut rounds, mut candidate_us, mut last) = (Vec::new(), Vec::new(), Value::Null);
    for _ in 0..ROUNDS {
        let without = round()?;
        let (with, shown) = beside_shadow_traffic(&server, round)?;
        ensure!(shown["different"] == 0, "{shown}");
        let [busy, compared] = [&shown["candidate"]["busy_seconds"], &shown["compared"]].map(Value::as_f64);
        candidate_us.push(1e6 * busy.context("no busy_seconds")? / compared.context("nothing compared")?);
        rounds.push((without, with));
        last = shown;
    }
    report.table(
        format!("Shadow traffic: {CONNECTIONS} connections, 9 GETs to a PUT, a tenth of them compared"),
        &["keys", "", "requests/s", "CPU of the worker threads, µs/request", "of that without"],
    );
    let mut row = |name: &str, of: fn(&(Round, Round)) -> &Round| {
        let ratios = rounds.iter().map(|round| of(round).worker_us / round.0.worker_us);
        let (ratio, per_second) = (median(ratios), median(rounds.iter().map(|round| of(round).per_second)));
        let worker_us = median(rounds.iter().map(|round| of(round).worker_us));
        report.row(vec![keys.into(), name.into(), number(per_second, 0), number(worker_us, 2), number(ratio, 3)]);
    };
    row("without", |round| &round.0);
    row("with", |round| &round.1);
    report.table(
        "What the candidate did in the last of these rounds",
        &["compared", "different", "dropped", "CPU of the candidate, µs/compared request, median of all rounds"],
    );
    let counts = ["compared", "different", "dropped"].map(|name| last[name].clone());
    report.row(counts.into_iter().chain([number(median(candidate_us.into_iter()), 2)]).collect());
    Ok(())
}

/// Measures while a candidate is given shadow traffic. Returns its report, too.
fn beside_shadow_traffic<T>(server: &Server, measure: impl FnOnce() -> Result<T>) -> Result<(T, Value)> {
    let guest = format!("http://{}/guest", server.admin.context("no admin listener")?);
    thread::scope(|scope| {
        let asked = scope.spawn(|| {
            let agent = ureq::Agent::config_builder().http_status_as_error(false).build().new_agent();
            let url = format!("{guest}?shadow=3600s&sample=10&dry-run");
            let mut response = agent.put(&url).send(&swap::copy()?[..])?;
            Ok::<_, anyhow::Error>(response.body_mut().read_to_string()?)
        });
        let begun = Instant::now();
        while !status(&guest)?["swap"]["shadow"].is_object() {
            ensure!(begun.elapsed() < PATIENCE && !asked.is_finished(), "the shadow traffic does not begin");
            thread::sleep(Duration::from_millis(10));
        }
        let measured = measure();
        let shown = status(&guest)?["swap"]["shadow"].clone();
        ureq::delete(format!("{guest}?rollback")).call()?;
        let ended = asked.join().expect("the request does not panic")?;
        ensure!(shown.is_object(), "it ended by itself: {ended}");
        Ok((measured?, shown))
    })
}

fn status(guest: &str) -> Result<Value> {
    Ok(serde_json::from_str(&ureq::get(guest).call()?.body_mut().read_to_string()?)?)
}
