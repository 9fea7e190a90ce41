//! Swaps under load: how long requests are held, and what their clients see of it.

use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::process::{Load, Server, median};
use crate::replay;

const KEYS: u64 = 1_000_000;
const CONNECTIONS: u32 = 64;
const TIME: Duration = Duration::from_secs(30);

/// What the server says of one swap: seconds of replay, and seconds in which requests were held.
struct Swap {
    replay: f64,
    pause: f64,
}

pub fn run(data: &Path) -> Result<()> {
    replay::write(data, KEYS, |number| format!("key-{number}"))?;
    let server = Server::kvs("kvs", data, &["--probation", "200ms"])?;
    println!("\nSwaps: {KEYS} keys, {CONNECTIONS} connections, 9 GETs to a PUT, {} s each\n", TIME.as_secs());
    println!("| | requests/s | half of them within | 99% | 99.9% | all |");
    println!("|---|---:|---:|---:|---:|---:|");
    let row = |name: &str, (load, report): (Load, String)| {
        let latency = report.lines().find_map(|line| line.strip_prefix("latency ")).context("no latencies")?;
        let milliseconds = latency.split(' ').map(|us| Ok(format!("{:.1} ms", us.parse::<f64>()? / 1e3)));
        println!("| {name} | {:.0} | {} |", load.per_second, milliseconds.collect::<Result<Vec<_>>>()?.join(" | "));
        Ok::<_, anyhow::Error>(())
    };
    row("without swaps", server.load_telling("mixed", CONNECTIONS, TIME)?)?;
    let (loaded, swaps) = thread::scope(|scope| {
        let load = scope.spawn(|| server.load_telling("mixed", CONNECTIONS, TIME));
        let mut swaps = Vec::new();
        while !load.is_finished() {
            swaps.push(swap(&server, swaps.len() % 2 == 0)?);
        }
        Ok::<_, anyhow::Error>((load.join().expect("the load does not panic")?, swaps))
    })?;
    row(&format!("with {} swaps, one after the other", swaps.len()), loaded)?;
    let most = swaps.iter().map(|swap| swap.pause).fold(0.0, f64::max);
    println!(
        "\nRequests were held for {:.2} ms (median; at most {:.2} ms); a replay took {:.1} s; no request failed.",
        1e3 * median(swaps.iter().map(|swap| swap.pause)),
        1e3 * most,
        median(swaps.iter().map(|swap| swap.replay)),
    );
    Ok(())
}

/// Puts in a copy of the default guest, or the default guest itself.
fn swap(server: &Server, copy: bool) -> Result<Swap> {
    let url = format!("http://{}/guest", server.admin.context("no admin listener")?);
    let mut response = if copy {
        let mut component = std::fs::read(env!("KVS_DEFAULT_GUEST"))?;
        // A custom section: id, length, the length of its name, its name.
        component.extend(*b"\x00\x05\x04copy");
        ureq::put(&url).send(&component[..])?
    } else {
        ureq::delete(&url).call()?
    };
    let report: Value = serde_json::from_str(&response.body_mut().read_to_string()?)?;
    ensure!(report["entries"].as_u64() >= Some(KEYS), "{report}");
    let seconds = |name: &str| report[name].as_f64().with_context(|| format!("no {name} in {report}"));
    Ok(Swap { replay: seconds("seconds")?, pause: seconds("pause_seconds")? })
}
