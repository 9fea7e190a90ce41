//! Upgrades under full load: for how long no call is made, that no request of wrk fails, and that each of a thousand watches gets
//! each of its events once. The new process is the same binary. `BENCH_KEYS=1000` measures with another number of keys,
//! `BENCH_UPGRADES=10` fewer upgrades.

mod watches;

use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};

use crate::load::load;
use crate::process::{Server, quantile};
use crate::replay;
use crate::report::{Report, number};
use crate::setting;

const KEYS: u64 = 1_000_000;
const UPGRADES: usize = 100;
const CONNECTIONS: u32 = 64;
const WATCHES: usize = 1_000;
/// Of each round of load, one after the other.
const TIME: Duration = Duration::from_secs(10);
/// What an upgrade should cost at most.
const GOAL: f64 = 0.1;

pub fn run(data: &Path, report: &mut Report) -> Result<()> {
    let (keys, upgrades) = (setting("BENCH_KEYS", KEYS)?, setting("BENCH_UPGRADES", UPGRADES)?);
    report.uses("wrk", &["-v"]);
    replay::write(data, keys, 100, |number| format!("key-{number}"))?;
    // The old process ends when none of its connections is left, or when this has passed.
    let drain = ["--drain-timeout", "5s"];
    // The watches resume together, beside the load.
    let limits = ["--max-connections", "2000", "--max-connections-per-address", "2000", "--max-requests", "2000"];
    let server = Server::kvs("kvs", data, &[&drain[..], &limits[..]].concat())?;
    let last = AtomicU64::new(server.id().parse()?);
    let seen = under_load(&server, keys, data, upgrades, &last);
    let last = i32::try_from(last.into_inner())?;
    kill_process(Pid::from_raw(last).context("it has an id")?, Signal::TERM)?;
    let Seen { pauses, requests, seconds, events } = seen?;
    report.table(
        format!(
            "Upgrades: {CONNECTIONS} connections, 9 GETs to a PUT, and {WATCHES} watches; no request failed, \
             no event was lost or repeated"
        ),
        &["keys", "upgrades", "requests/s", "events", "no call for ms, median", "99%", "all", "under 100 ms"],
    );
    let pause = |share| number(1e3 * quantile(pauses.clone(), share), 1);
    let short = pauses.iter().filter(|pause| **pause < GOAL).count();
    report.row(vec![
        keys.into(),
        upgrades.into(),
        number(requests / seconds, 0),
        events.into(),
        pause(0.5),
        pause(0.99),
        pause(1.0),
        short.into(),
    ]);
    Ok(())
}

struct Seen {
    /// Seconds without a call.
    pauses: Vec<f64>,
    requests: f64,
    seconds: f64,
    events: usize,
}

fn under_load(server: &Server, keys: u64, data: &Path, upgrades: usize, last: &AtomicU64) -> Result<Seen> {
    let (over, load) = (AtomicBool::new(false), load("mixed", keys, CONNECTIONS, TIME));
    thread::scope(|scope| {
        let loading = scope.spawn(|| {
            let (begun, mut requests) = (Instant::now(), 0.0);
            while !over.load(Ordering::Relaxed) {
                requests += load.wrk_alone(server)?.requests;
            }
            Ok::<_, anyhow::Error>((requests, begun.elapsed().as_secs_f64()))
        });
        let watching = scope.spawn(|| watches::check(server.address, WATCHES, &over));
        let mut pauses = Vec::new();
        let upgraded = (0..upgrades).try_for_each(|_| {
            let (process, pause) = upgrade(data)?;
            last.store(process, Ordering::Relaxed);
            pauses.push(pause);
            Ok::<_, anyhow::Error>(())
        });
        over.store(true, Ordering::Relaxed);
        let (requests, seconds) = loading.join().expect("the load does not panic")?;
        let events = watching.join().expect("a watch does not panic")?;
        upgraded?;
        Ok(Seen { pauses, requests, seconds, events })
    })
}

/// Replaces the process. Returns the new one, and for how long no call was made.
fn upgrade(data: &Path) -> Result<(u64, f64)> {
    let output = Command::new(kvs_tests::binary()).arg("upgrade").arg("--data-dir").arg(data).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let printed = String::from_utf8(output.stdout)?;
    let numbers = printed.strip_prefix("process ").and_then(|rest| {
        let (process, rest) = rest.split_once(" serves; no call was made for ")?;
        Some((process.parse().ok()?, rest.trim().strip_suffix("ms")?.parse::<f64>().ok()? / 1e3))
    });
    numbers.with_context(|| format!("kvs upgrade printed {printed:?}"))
}
