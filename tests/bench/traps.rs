//! Traps under half load, with a spare: for how long the shard makes no call, by the server's own measure, and that no request
//! fails but those that trap. A trap follows a second after the next spare is ready: how long a promotion takes does not depend
//! on the time before it. `BENCH_KEYS=1000` measures with another number of keys, `BENCH_TRAPS=30` fewer traps.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::load::{Load, load};
use crate::process::{Server, quantile};
use crate::replay;
use crate::report::{Report, number};
use crate::setting;

const KEYS: u64 = 1_000_000;
const TRAPS: usize = 100;
const CONNECTIONS: u32 = 16;
/// Of each round of load, one after the other.
const TIME: Duration = Duration::from_secs(10);
/// The time between a spare and the next trap.
const CALM: Duration = Duration::from_secs(1);
/// What a trap should cost at most.
const GOAL: f64 = 0.02;
const PATIENCE: Duration = Duration::from_secs(300);

const PAUSES: &str = "kvs_guest_promotion_duration_seconds_sum";
const PROMOTED: &str = "kvs_guest_promotions_total{cause=\"spare\"}";

pub fn run(data: &Path, report: &mut Report) -> Result<()> {
    let (keys, traps) = (setting("BENCH_KEYS", KEYS)?, setting("BENCH_TRAPS", TRAPS)?);
    report.uses("h2load", &["--version"]);
    replay::write(data, keys, 100, |number| format!("key-{number}"))?;
    let guest = kvs_tests::built("brittle");
    let server = Server::kvs("kvs", data, &[guest.as_str(), "--shards", "1", "--spare"])?;
    let puts = load("PUT", keys, CONNECTIONS, TIME);
    let half = puts.most(&server, data)? / 2.0;
    let pauses = under_load(&server, &puts, half, data, traps)?;
    ensure!(server.metric(PROMOTED)? == traps as f64, "not every trap had a spare");
    report.table(
        format!(
            "Traps with a spare: PUTs over {CONNECTIONS} connections at half the highest rate; no other request failed"
        ),
        &["keys", "requests/s", "traps", "no call for ms, median", "99%", "all", "under 20 ms"],
    );
    let pause = |share| number(1e3 * quantile(pauses.clone(), share), 1);
    let short = pauses.iter().filter(|pause| **pause < GOAL).count();
    report.row(vec![keys.into(), number(half, 0), traps.into(), pause(0.5), pause(0.99), pause(1.0), short.into()]);
    Ok(())
}

/// Seconds that each trap took.
fn under_load(server: &Server, load: &Load<'_>, per_second: f64, data: &Path, traps: usize) -> Result<Vec<f64>> {
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let loading = scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                load.paced(server, per_second, data)?;
            }
            Ok::<_, anyhow::Error>(())
        });
        let pauses = (0..traps).map(|_| trap(server)).collect();
        over.store(true, Ordering::Relaxed);
        loading.join().expect("the load does not panic")?;
        pauses
    })
}

fn trap(server: &Server) -> Result<f64> {
    await_metric(server, "kvs_guest_spares", 1.0)?;
    thread::sleep(CALM);
    let [before, promoted] = server.metrics([PAUSES, PROMOTED])?;
    let answer = ureq::put(format!("http://{}/trap/v1/trap", server.address)).send_empty();
    ensure!(matches!(answer, Err(ureq::Error::StatusCode(500))), "the guest did not trap");
    await_metric(server, PROMOTED, promoted + 1.0)?;
    Ok(server.metric(PAUSES)? - before)
}

fn await_metric(server: &Server, name: &str, value: f64) -> Result<()> {
    let begun = Instant::now();
    while server.metric(name)? < value {
        ensure!(begun.elapsed() < PATIENCE, "{name} does not become {value}");
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}
