//! Swaps under load: how long requests are held, what their clients see of it, and that none of them reads what is stale.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::process::{Load, Server, median};
use crate::replay;

const KEYS: u64 = 1_000_000;
const CONNECTIONS: u32 = 64;
const TIME: Duration = Duration::from_secs(60);
/// Clients beside the load that check what they read.
const CHECKING: usize = 4;
/// Upper ends of the classes that pauses are counted in, in milliseconds.
const CLASSES: [f64; 6] = [0.25, 0.5, 1.0, 2.0, 5.0, 10.0];

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
    let over = AtomicBool::new(false);
    let (loaded, swaps, checked) = thread::scope(|scope| {
        let (server, over) = (&server, &over);
        let checking: Vec<_> = (0..CHECKING).map(|client| scope.spawn(move || check(server, client, over))).collect();
        let load = scope.spawn(|| server.load_telling("mixed", CONNECTIONS, TIME));
        let mut swaps = Vec::new();
        let swapped = loop {
            if load.is_finished() {
                break Ok(());
            }
            match swap(server, swaps.len() % 2 == 0) {
                Ok(swap) => swaps.push(swap),
                Err(error) => break Err(error),
            }
        };
        over.store(true, Ordering::Relaxed);
        let checked = checking.into_iter().map(|client| client.join().expect("a client does not panic"));
        let checked: Vec<Checked> = checked.collect::<Result<_>>()?;
        swapped?;
        Ok::<_, anyhow::Error>((load.join().expect("the load does not panic")?, swaps, checked))
    })?;
    row(&format!("with {} swaps, one after the other", swaps.len()), loaded)?;
    let pauses = || swaps.iter().map(|swap| 1e3 * swap.pause);
    println!(
        "\nRequests were held for {:.2} ms (median; at most {:.2} ms); a replay took {:.1} s; no request failed.",
        median(pauses()),
        pauses().fold(0.0, f64::max),
        median(swaps.iter().map(|swap| swap.replay)),
    );
    println!(
        "{} reads of clients' own last writes, none stale; the slowest pair of a write and a read took {:.1} ms.\n",
        checked.iter().map(|checked| checked.reads).sum::<u64>(),
        1e3 * checked.iter().map(|checked| checked.slowest.as_secs_f64()).fold(0.0, f64::max),
    );
    println!("| requests held, at most | swaps |");
    println!("|---:|---:|");
    let mut least = 0.0;
    for most in CLASSES.into_iter().chain([f64::INFINITY]) {
        let count = pauses().filter(|pause| (least..most).contains(pause)).count();
        println!("| {most} ms | {count} |");
        least = most;
    }
    Ok(())
}

/// What a client saw that reads what it has just written.
struct Checked {
    reads: u64,
    slowest: Duration,
}

/// Writes and reads keys of its own, spread over the others, until it is over.
fn check(server: &Server, client: usize, over: &AtomicBool) -> Result<Checked> {
    let agent = ureq::Agent::new_with_defaults();
    let mut checked = Checked { reads: 0, slowest: Duration::ZERO };
    while !over.load(Ordering::Relaxed) {
        let number = checked.reads;
        let url = format!("http://{}/v1/key-{}-of-{client}", server.address, number * 7919 % 100_000);
        let begun = Instant::now();
        let written = agent.put(&url).send(&number.to_string())?;
        let read = agent.get(&url).call()?;
        let tags = [&written, &read].map(|response| response.headers().get("etag").cloned());
        let value = read.into_body().read_to_string()?;
        checked.slowest = checked.slowest.max(begun.elapsed());
        ensure!(value == number.to_string() && tags[0] == tags[1], "{url} is {value}, and {number} was written");
        checked.reads += 1;
    }
    Ok(checked)
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
