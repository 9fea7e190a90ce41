//! The group commit: durable PUTs from more and more connections, beside what the disk gives a program that does nothing
//! but write and sync, beside the same server without syncs, and beside redis. And how much the plain hyper map would take, which
//! keeps nothing: more than that no server behind hyper can do here.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::load::{Done, load};
use crate::process::{Server, median};
use crate::report::{Report, number};
use crate::{peers, plain_map};

const ROUNDS: usize = 5;
const TIME: Duration = Duration::from_secs(2);
const CONNECTIONS: [u32; 4] = [1, 8, 64, 256];
const KEYS: u64 = 10_000;

/// What was measured in one round, per second.
struct Round {
    bare: f64,
    sync: f64,
    os: f64,
    redis: f64,
    map: f64,
}

pub fn run(data: &Path, report: &mut Report) -> Result<()> {
    report.uses("wrk", &["-v"]);
    report.uses("redis-server", &["--version"]);
    let sync = Server::kvs("sync", &data.join("sync"), &[])?;
    let os = Server::kvs("os", &data.join("os"), &["--durability", "os"])?;
    let redis = peers::redis(data, true, KEYS, 100)?;
    let map = plain_map::start(KEYS, 100)?;
    report.table(
        format!("Durable PUTs: 100-byte values, {KEYS} keys, medians of {ROUNDS} rounds of {} s each", TIME.as_secs()),
        &[
            "connections",
            "PUT/s",
            "of bare `pwrite` and `fdatasync`",
            "of `--durability os`",
            "of redis, `appendfsync always`",
            "the plain map in memory, of redis",
        ],
    );
    for connections in CONNECTIONS {
        let mut rounds = Vec::new();
        // As much work as the round before took its time for.
        let mut redis_requests = 1_000 * u64::from(connections);
        let put = load("PUT", KEYS, connections, TIME);
        for _ in 0..ROUNDS {
            let redis = put.redis(&redis, redis_requests)?.per_second;
            redis_requests = (redis * TIME.as_secs_f64()) as u64;
            let per_second = |server| put.wrk(server).map(|done: Done| done.per_second);
            rounds.push(Round {
                bare: rate(&bare_syncs(&data.join("bare"), TIME / 2)?),
                sync: per_second(&sync)?,
                os: per_second(&os)?,
                redis,
                map: per_second(&map)?,
            });
        }
        let median = |of: fn(&Round) -> f64| median(rounds.iter().map(of));
        report.row(vec![
            connections.into(),
            number(median(|round| round.sync), 0),
            number(median(|round| round.sync / round.bare), 2),
            number(median(|round| round.sync / round.os), 2),
            number(median(|round| round.sync / round.redis), 2),
            number(median(|round| round.map / round.redis), 2),
        ]);
    }
    Ok(())
}

/// Writes of one small frame each into a file that is there already, every one synced: how many seconds each took.
pub fn bare_syncs(path: &Path, time: Duration) -> Result<Vec<f64>> {
    const BYTES: usize = 256;
    const FILE: u64 = 8 << 20;
    let file = File::create(path)?;
    file.write_all_at(&vec![0; FILE as usize], 0)?;
    file.sync_all()?;
    let (begun, mut taken) = (Instant::now(), Vec::new());
    while begun.elapsed() < time {
        let one = Instant::now();
        file.write_all_at(&[1; BYTES], taken.len() as u64 * BYTES as u64 % FILE)?;
        file.sync_data()?;
        taken.push(one.elapsed().as_secs_f64());
    }
    Ok(taken)
}

/// How many a second that were.
fn rate(taken: &[f64]) -> f64 {
    taken.len() as f64 / taken.iter().sum::<f64>()
}
