//! The group commit: durable PUTs from more and more connections, beside what the disk gives a program that does nothing
//! but write and sync, beside the same server without syncs, and beside redis. And how much the plain hyper map would take, which
//! keeps nothing: more than that no server behind hyper can do here.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::plain_map;
use crate::process::{Server, median};

const ROUNDS: usize = 5;
const TIME: Duration = Duration::from_secs(2);
const CONNECTIONS: [u32; 4] = [1, 8, 64, 256];

/// What was measured in one round, per second.
struct Round {
    bare: f64,
    sync: f64,
    os: f64,
    redis: f64,
    map: f64,
}

pub fn run(data: &Path) -> Result<()> {
    let sync = Server::kvs("sync", &data.join("sync"), &[])?;
    let os = Server::kvs("os", &data.join("os"), &["--durability", "os"])?;
    let redis = Server::redis(data)?;
    let map = plain_map::start()?;
    println!("\nDurable PUTs: 100-byte values, 10,000 keys, {ROUNDS} rounds of {} s each\n", TIME.as_secs());
    println!(
        "| connections | PUT/s | of bare `pwrite` and `fdatasync` | of `--durability os` | of redis, `appendfsync always` | the plain map in memory, of redis |"
    );
    println!("|---:|---:|---:|---:|---:|---:|");
    for connections in CONNECTIONS {
        let mut rounds = Vec::new();
        // As much work as the round before took its time for.
        let mut redis_requests = 1_000 * connections;
        for _ in 0..ROUNDS {
            let redis = redis.redis_load(connections, redis_requests)?.per_second;
            redis_requests = (redis * TIME.as_secs_f64()) as u32;
            rounds.push(Round {
                bare: bare_syncs(&data.join("bare"))?,
                sync: sync.load("put", connections, TIME)?.per_second,
                os: os.load("put", connections, TIME)?.per_second,
                redis,
                map: map.load("put", connections, TIME)?.per_second,
            });
        }
        let median = |of: fn(&Round) -> f64| median(rounds.iter().map(of));
        println!(
            "| {connections} | {:.0} | {:.2} | {:.2} | {:.2} | {:.2} |",
            median(|round| round.sync),
            median(|round| round.sync / round.bare),
            median(|round| round.sync / round.os),
            median(|round| round.sync / round.redis),
            median(|round| round.map / round.redis),
        );
    }
    Ok(())
}

/// Writes of one small frame each into a file that is there already, every one synced: how many a second.
fn bare_syncs(path: &Path) -> Result<f64> {
    const BYTES: usize = 256;
    const FILE: u64 = 8 << 20;
    let file = File::create(path)?;
    file.write_all_at(&vec![0; FILE as usize], 0)?;
    file.sync_all()?;
    let (begun, mut count) = (Instant::now(), 0_u64);
    while begun.elapsed() < TIME / 2 {
        file.write_all_at(&[1; BYTES], count * BYTES as u64 % FILE)?;
        file.sync_data()?;
        count += 1;
    }
    Ok(count as f64 / begun.elapsed().as_secs_f64())
}
