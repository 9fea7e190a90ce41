//! Swaps under load: how long requests are held, what their clients see of it, and that none of them reads what is stale.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::load::{Done, load};
use crate::process::{Server, median, quantile};
use crate::replay;
use crate::report::{Report, number};

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
pub fn run(data: &Path, report: &mut Report) -> Result<()> {
    report.uses("wrk", &["-v"]);
    let server = server(&data.join("many"), KEYS, &[])?;
    report.table(
        format!("Swaps: {KEYS} keys, {CONNECTIONS} connections, 9 GETs to a PUT, {} s each", TIME.as_secs()),
        &["", "requests/s", "half of them within ms", "99%", "99.9%", "all"],
    );
    let mut row = |name: String, done: &Done| {
        let latency = done.latency.iter().map(|us| number(us / 1e3, 1));
        report.row([name.into(), number(done.per_second, 0)].into_iter().chain(latency).collect());
    };
    row("without swaps".to_owned(), &mixed(&server, KEYS, TIME)?);
    let many = under_load(&server, KEYS, TIME)?;
    drop(server);
    row(format!("with {} swaps, one after the other", many.swaps.len()), &many.load);

    let server = self::server(&data.join("few"), FEW_KEYS, &["--segment-bytes", "4MiB"])?;
    let few = under_load(&server, FEW_KEYS, FEW_TIME)?;
    let both = [(KEYS, &many), (FEW_KEYS, &few)];
    report.table(
        "What swaps did meanwhile; no request failed, and no read of a client's own last write was stale",
        &[
            "keys",
            "swaps",
            "a replay took s",
            "requests were held for ms, median",
            "99%",
            "99.9%",
            "all",
            "reads of own last writes",
            "the slowest pair of both, ms",
        ],
    );
    for (keys, seen) in both {
        let pause = |share| number(quantile(pauses(&seen.swaps).collect(), share), 2);
        let slowest = seen.checked.iter().map(|checked| checked.slowest.as_secs_f64()).fold(0.0, f64::max);
        report.row(vec![
            keys.into(),
            seen.swaps.len().into(),
            number(median(seen.swaps.iter().map(|swap| swap.replay)), 1),
            pause(0.5),
            pause(0.99),
            pause(0.999),
            pause(1.0),
            seen.checked.iter().map(|checked| checked.reads).sum::<u64>().into(),
            number(1e3 * slowest, 1),
        ]);
    }
    report.table("Swaps that held requests for so long", &["at most ms", "a million keys", "a thousand keys"]);
    let mut least = 0.0;
    for most in CLASSES.into_iter().chain([f64::INFINITY]) {
        let count = |seen: &Seen| pauses(&seen.swaps).filter(|pause| (least..most).contains(pause)).count();
        let most_text = if most.is_finite() { number(most, 2) } else { "more".into() };
        report.row(vec![most_text, count(&many).into(), count(&few).into()]);
        least = most;
    }
    Ok(())
}

/// A server of this many keys, with a short probation.
fn server(data: &Path, keys: u64, flags: &[&str]) -> Result<Server> {
    replay::write(data, keys, 100, |number| format!("key-{number}"))?;
    Server::kvs("kvs", data, &[&["--probation", "10ms"], flags].concat())
}

fn mixed(server: &Server, keys: u64, time: Duration) -> Result<Done> {
    load("mixed", keys, CONNECTIONS, time).wrk(server)
}

/// In milliseconds.
fn pauses(swaps: &[Swap]) -> impl Iterator<Item = f64> {
    swaps.iter().map(|swap| 1e3 * swap.pause)
}

/// Swaps one after the other, and what was seen meanwhile.
struct Seen {
    load: Done,
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

/// A component like the default guest, with another digest.
pub fn copy() -> Result<Vec<u8>> {
    let mut component = std::fs::read(kvs_tests::DEFAULT_GUEST)?;
    // A custom section: id, length, the length of its name, its name.
    component.extend(*b"\x00\x05\x04copy");
    Ok(component)
}

/// Puts in a copy of the default guest, or the default guest itself.
fn swap(server: &Server, copy: bool) -> Result<Swap> {
    let url = format!("http://{}/guest", server.admin.context("no admin listener")?);
    let mut response = if copy { ureq::put(&url).send(&self::copy()?[..])? } else { ureq::delete(&url).call()? };
    let report: Value = serde_json::from_str(&response.body_mut().read_to_string()?)?;
    ensure!(report["entries"].as_u64() >= Some(FEW_KEYS), "{report}");
    let seconds = |name: &str| report[name].as_f64().with_context(|| format!("no {name} in {report}"));
    Ok(Swap { replay: seconds("seconds")?, pause: seconds("pause_seconds")? })
}
