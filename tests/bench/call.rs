//! A call into the guest and back, with nothing to do there: what the sandbox itself costs. It is asked how much it holds, which
//! is nothing.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use kvs::guest::{Arrangement, Engine, Limits, Shards, Source};
use kvs_runtime::Env;
use kvs_txlog::file::{DEFAULT_SEGMENT_BYTES, Durability, FileLog, Options};

use crate::process::median;
use crate::report::{Report, number};

const ROUNDS: usize = 5;
const CALLS: u32 = 1_000_000;

pub fn run(data: &Path, report: &mut Report) -> Result<()> {
    let limits = Limits {
        call: Duration::from_secs(5),
        replay: Duration::from_secs(5),
        memory_bytes: 1 << 30,
        memory_source: None,
        table_elements: 1 << 20,
        instances: 16,
        value_bytes: 1 << 20,
        response_bytes: 1 << 20,
        appends: 1,
        log_bytes: 1 << 10,
        log_lines: 1_000,
        log_line_bytes: 1 << 10,
        metrics: 100,
        tick_interval: Duration::from_millis(10),
    };
    let env = Env::real();
    let engine = Engine::new(limits, Vec::new(), None, 0, &env)?;
    let guest = engine.load(Source::choose(None, data))?;
    let (segment_bytes, group_bytes) = (DEFAULT_SEGMENT_BYTES, 1 << 20);
    let durability = Durability::Os;
    let log = Options {
        data: data.into(),
        segment_bytes,
        group_bytes,
        durability,
        retain: Duration::ZERO,
        advertise: None,
        env: env.clone(),
    };
    let arrangement = Arrangement { count: 1, with_spares: false };
    let (shards, _) = Shards::build(guest, Arc::new(FileLog::open(log)?), arrangement, env)?;
    let mut replica = shards.replicas(&shards.serving().guest)?.pop().context("there is one shard")?;
    let mut rounds = Vec::new();
    for _ in 0..ROUNDS {
        let begun = Instant::now();
        for _ in 0..CALLS {
            replica.instance.stats()?;
        }
        rounds.push(begun.elapsed().as_nanos() as f64 / f64::from(CALLS));
    }
    report.table(format!("A call with nothing to do, median of {ROUNDS} rounds of {CALLS}"), &["ns"]);
    report.row(vec![number(median(rounds.into_iter()), 0)]);
    Ok(())
}
