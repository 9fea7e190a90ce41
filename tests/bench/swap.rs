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
const FEW_KEYS: u64 = 1_000;
const FEW_TIME: Duration = Duration::from_secs(240);
/// Clients beside the load that check what they read.
const CHECKING: usize = 4;
/// Upper ends of the classes that pauses are counted in, in milliseconds.
const CLASSES: [f64; 6] = [0.25, 0.5, 1.0, 2.0, 5.0, 10.0];

/// What the server says of one swap: seconds of replay, and seconds in which requests were held.
struct Swap {
    replay: f64,
    pause: f64,
}

/// Under full load, and all the keys there are: what clients see of it.
/// Many more of few keys, which takes no time: how long the rarest of the pauses are. What a pause waits for (the last
/// entries before the switch) does not depend on what was replayed before.
pub fn run(data: &Path) -> Result<()> {
    let server = server(&data.join("many"), KEYS, &[])?;
    println!("\nSwaps: {KEYS} keys, {CONNECTIONS} connections, 9 GETs to a PUT, {} s each\n", TIME.as_secs());
    println!("| | requests/s | half of them within | 99% | 99.9% | all |");
    println!("|---|---:|---:|---:|---:|---:|");
    let row = |name: &str, (load, report): (Load, String)| {
        let latency = report.lines().find_map(|line| line.strip_prefix("latency ")).context("no latencies")?;
        let milliseconds = latency.split(' ').map(|us| Ok(format!("{:.1} ms", us.parse::<f64>()? / 1e3)));
        println!("| {name} | {:.0} | {} |", load.per_second, milliseconds.collect::<Result<Vec<_>>>()?.join(" | "));
        Ok::<_, anyhow::Error>(())
    };
    row("without swaps", mixed(&server, KEYS, TIME)?)?;
    let many = under_load(&server, KEYS, TIME)?;
    drop(server);
    row(&format!("with {} swaps, one after the other", many.swaps.len()), many.load)?;
    println!(
        "\nRequests were held for {:.2} ms (median; at most {:.2} ms); a replay took {:.1} s; no request failed.",
        median(pauses(&many.swaps)),
        pauses(&many.swaps).fold(0.0, f64::max),
        median(many.swaps.iter().map(|swap| swap.replay)),
    );
    println!(
        "{} reads of clients' own last writes, none stale; the slowest pair of a write and a read took {:.1} ms.\n",
        many.checked.iter().map(|checked| checked.reads).sum::<u64>(),
        1e3 * many.checked.iter().map(|checked| checked.slowest.as_secs_f64()).fold(0.0, f64::max),
    );

    let server = self::server(&data.join("few"), FEW_KEYS, &["--segment-bytes", "4MiB"])?;
    let few = under_load(&server, FEW_KEYS, FEW_TIME)?;
    let mut sorted: Vec<_> = pauses(&few.swaps).collect();
    sorted.sort_by(f64::total_cmp);
    let at = |share: f64| sorted[((sorted.len() - 1) as f64 * share) as usize];
    println!(
        "The same with {FEW_KEYS} keys for {} s, {} swaps: requests were held for",
        FEW_TIME.as_secs(),
        sorted.len()
    );
    println!(
        "{:.2} ms (median), {:.2} ms (99%), {:.2} ms (99.9%), {:.2} ms (all)\n",
        at(0.5),
        at(0.99),
        at(0.999),
        at(1.0)
    );
    println!("| requests held, at most | swaps of {KEYS} keys | of {FEW_KEYS} |");
    println!("|---:|---:|---:|");
    let mut least = 0.0;
    for most in CLASSES.into_iter().chain([f64::INFINITY]) {
        let count = |swaps| pauses(swaps).filter(|pause| (least..most).contains(pause)).count();
        println!("| {most} ms | {} | {} |", count(&many.swaps), count(&few.swaps));
        least = most;
    }
    Ok(())
}

/// A server of so many keys, that lets a guest off its probation soon.
fn server(data: &Path, keys: u64, flags: &[&str]) -> Result<Server> {
    replay::write(data, keys, |number| format!("key-{number}"))?;
    Server::kvs("kvs", data, &[&["--probation", "10ms"], flags].concat())
}

fn mixed(server: &Server, keys: u64, time: Duration) -> Result<(Load, String)> {
    server.load_telling("mixed", &[keys.to_string()], CONNECTIONS, time)
}

/// In milliseconds.
fn pauses(swaps: &[Swap]) -> impl Iterator<Item = f64> {
    swaps.iter().map(|swap| 1e3 * swap.pause)
}

/// Swaps one after the other, and what was seen meanwhile.
struct Seen {
    load: (Load, String),
    swaps: Vec<Swap>,
    checked: Vec<Checked>,
}

fn under_load(server: &Server, keys: u64, time: Duration) -> Result<Seen> {
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let over = &over;
        let checking: Vec<_> = (0..CHECKING).map(|client| scope.spawn(move || check(server, client, over))).collect();
        let load = scope.spawn(|| mixed(server, keys, time));
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
        Ok(Seen { load: load.join().expect("the load does not panic")?, swaps, checked })
    })
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
        let mut component = std::fs::read(env!("DEFAULT_GUEST"))?;
        // A custom section: id, length, the length of its name, its name.
        component.extend(*b"\x00\x05\x04copy");
        ureq::put(&url).send(&component[..])?
    } else {
        ureq::delete(&url).call()?
    };
    let report: Value = serde_json::from_str(&response.body_mut().read_to_string()?)?;
    ensure!(report["entries"].as_u64() >= Some(FEW_KEYS), "{report}");
    let seconds = |name: &str| report[name].as_f64().with_context(|| format!("no {name} in {report}"));
    Ok(Swap { replay: seconds("seconds")?, pause: seconds("pause_seconds")? })
}
