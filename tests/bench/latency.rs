//! How late the slowest hundredth of the requests is when a server has half as much to do as it can: GETs beside those of the
//! plain map, durable PUTs beside a bare `pwrite` and `fdatasync`, which they cannot do without.

use std::path::Path;
use std::time::Duration;

use anyhow::Result;

use crate::commit::bare_syncs;
use crate::load::{Load, load};
use crate::plain_map;
use crate::process::{Server, median, quantile};
use crate::replay;
use crate::report::{Report, number};

const ROUNDS: usize = 5;
const TIME: Duration = Duration::from_secs(3);
const CONNECTIONS: u32 = 64;
const KEYS: u64 = 1_000_000;

/// The latencies of one round, in milliseconds.
struct Round {
    map: f64,
    get: f64,
    bare: f64,
    put: f64,
}

pub fn run(data: &Path, report: &mut Report) -> Result<()> {
    report.uses("h2load", &["--version"]);
    let kvs = data.join("kvs");
    replay::write(&kvs, KEYS, 100, |number| format!("key-{number}"))?;
    let (map, kvs) = (plain_map::start(KEYS, 100)?, Server::kvs("kvs", &kvs, &[])?);
    let [get, put] = ["GET", "PUT"].map(|kind| load(kind, KEYS, CONNECTIONS, TIME));
    // Half of what h2load gets out of each, which is not what wrk does.
    let [of_map, of_get, of_put] = [(&map, &get), (&kvs, &get), (&kvs, &put)];
    let half = |(server, load): (&Server, &Load<'_>)| load.most(server, data).map(|most| most / 2.0);
    let rates = [half(of_map)?, half(of_get)?, half(of_put)?];
    let mut rounds = Vec::new();
    for _ in 0..ROUNDS {
        let late = |(server, load): (&Server, &Load<'_>), rate| load.paced(server, rate, data).map(|us| us / 1e3);
        rounds.push(Round {
            map: late(of_map, rates[0])?,
            get: late(of_get, rates[1])?,
            bare: 1e3 * quantile(bare_syncs(&data.join("bare"), TIME)?, 0.99),
            put: late(of_put, rates[2])?,
        });
    }
    report.table(
        format!(
            "At half load: {CONNECTIONS} connections, {KEYS} keys, medians of {ROUNDS} rounds of {} s",
            TIME.as_secs()
        ),
        &["", "requests/s", "99% within ms", "of the one above"],
    );
    let median = |of: fn(&Round) -> f64| median(rounds.iter().map(of));
    let mut row = |name: &str, rate: Option<f64>, late: f64, ratio: Option<f64>| {
        let rate = rate.map_or("".into(), |rate| number(rate, 0));
        report.row(vec![name.into(), rate, number(late, 2), ratio.map_or("".into(), |ratio| number(ratio, 2))]);
    };
    row("GET, plain hyper map", Some(rates[0]), median(|round| round.map), None);
    row("GET, kvs", Some(rates[1]), median(|round| round.get), Some(median(|round| round.get / round.map)));
    row("bare `pwrite` and `fdatasync`", None, median(|round| round.bare), None);
    row("durable PUT, kvs", Some(rates[2]), median(|round| round.put), Some(median(|round| round.put / round.bare)));
    Ok(())
}
