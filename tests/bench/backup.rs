//! What operators cost clients: how many requests fewer there are while a backup is taken, and for how long `/livez` waits while
//! the console asks for all there is.

use std::io::Read;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::load::load;
use crate::process::{Server, median, quantile};
use crate::replay;
use crate::report::{Report, number};

const KEYS: u64 = 1_000_000;
const CONNECTIONS: u32 = 64;
const ROUNDS: usize = 9;
const TIME: Duration = Duration::from_secs(8);
const CONSOLE_TIME: Duration = Duration::from_secs(10);
/// Clients of the console that ask at the same time.
const ASKING: usize = 4;
/// The pause between two requests for `/livez`.
const PAUSE: Duration = Duration::from_millis(1);

/// A component as large as few are; it is none.
const COMPONENT_BYTES: usize = 64 << 20;
const SWAP: &str = "/guest?dry-run";

/// Requests of the console, by what they do.
const CONSOLE: [(&str, &[&str]); 8] = [
    ("nothing", &[]),
    ("a page of 100 keys", &["/v1?limit=100"]),
    ("a page of folders", &["/v1?limit=100&delimiter=9"]),
    ("a count of all keys", &["/v1?count=true"]),
    ("metrics", &["/metrics"]),
    ("a backup", &["/backup"]),
    ("a component of 64 MiB", &[SWAP]),
    (
        "all of these, a history and statistics",
        &[
            "/v1?limit=100",
            "/v1?limit=100&delimiter=9",
            "/v1?count=true",
            "/metrics",
            "/backup",
            "/history?key=key-1",
            "/stats",
            "/guest",
            "/readyz",
        ],
    ),
];

pub fn run(data: &Path, report: &mut Report) -> Result<()> {
    report.uses("wrk", &["-v"]);
    replay::write(data, KEYS, 100, |number| format!("key-{number}"))?;
    let server = Server::kvs("kvs", data, &[])?;
    report.table(
        format!(
            "While backups are taken, one after the other: {KEYS} keys, {CONNECTIONS} connections, medians of {ROUNDS} rounds of \
             {} s each",
            TIME.as_secs()
        ),
        &["", "requests/s without", "with a backup", "of those without", "of the worst round", "complete backups"],
    );
    for kind in ["GET", "PUT", "mixed"] {
        compare(&server, kind, report)?;
    }
    report.table(
        format!(
            "`/livez`, asked each ms, while {ASKING} clients ask for this on the admin listener for {} s",
            CONSOLE_TIME.as_secs()
        ),
        &["", "requests of the clients", "99% of `/livez` within ms", "all"],
    );
    for (name, paths) in CONSOLE {
        let (asked, late) = livez(&server, paths)?;
        report.row(vec![
            name.into(),
            asked.into(),
            number(quantile(late.clone(), 0.99), 2),
            number(quantile(late, 1.0), 2),
        ]);
    }
    Ok(())
}

/// With and without, in turns.
fn compare(server: &Server, kind: &str, report: &mut Report) -> Result<()> {
    let (mut rounds, mut backups) = (Vec::new(), 0);
    for round in 0..ROUNDS {
        let without = || Ok::<_, anyhow::Error>(load(kind, KEYS, CONNECTIONS, TIME).wrk(server)?.per_second);
        let mut with = || {
            let over = AtomicBool::new(false);
            thread::scope(|scope| {
                let taking = scope.spawn(|| ask(server, &["/backup"], &over));
                let loaded = without();
                over.store(true, Ordering::Relaxed);
                backups += taking.join().expect("it does not panic")?;
                loaded
            })
        };
        // What comes first is the same for both, over all rounds but one.
        rounds.push(if round % 2 == 0 {
            (without()?, with()?)
        } else {
            let with = with()?;
            (without()?, with)
        });
    }
    let ratio = |(without, with): &(f64, f64)| with / without;
    report.row(vec![
        kind.into(),
        number(median(rounds.iter().map(|round| round.0)), 0),
        number(median(rounds.iter().map(|round| round.1)), 0),
        number(median(rounds.iter().map(ratio)), 3),
        number(rounds.iter().map(ratio).fold(f64::INFINITY, f64::min), 3),
        backups.into(),
    ]);
    Ok(())
}

/// Asks for these in turn, and reads all of each, until it is over. Gives the number of those that were complete.
fn ask(server: &Server, paths: &[&str], over: &AtomicBool) -> Result<u64> {
    let agent: ureq::Agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
    let admin = server.admin.context("no admin listener")?;
    let component = if paths.contains(&SWAP) { vec![b'x'; COMPONENT_BYTES] } else { Vec::new() };
    let mut complete = 0;
    while !over.load(Ordering::Relaxed) {
        for path in paths {
            let url = format!("http://{admin}{path}");
            let response = if *path == SWAP { agent.put(url).send(&component[..])? } else { agent.get(url).call()? };
            let status = response.status().as_u16();
            // Of backups and the like there is one at a time.
            ensure!(matches!(status, 200 | 409) || (status == 422 && *path == SWAP), "{path}: {status}");
            let is_complete = status != 409;
            let mut body = response.into_body().into_reader();
            let mut bytes = [0; 1 << 16];
            while body.read(&mut bytes)? > 0 && !over.load(Ordering::Relaxed) {}
            complete += u64::from(is_complete && !over.load(Ordering::Relaxed));
        }
    }
    Ok(complete)
}

/// The number of requests that were answered meanwhile, and the milliseconds of each `/livez`.
fn livez(server: &Server, paths: &'static [&str]) -> Result<(u64, Vec<f64>)> {
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let clients: Vec<_> =
            (0..if paths.is_empty() { 0 } else { ASKING }).map(|_| scope.spawn(|| ask(server, paths, &over))).collect();
        let (agent, mut late, begun) = (ureq::Agent::new_with_defaults(), Vec::new(), Instant::now());
        let url = format!("http://{}/livez", server.admin.context("no admin listener")?);
        let mut measured = Ok(());
        while begun.elapsed() < CONSOLE_TIME && measured.is_ok() {
            let sent = Instant::now();
            measured = agent.get(&url).call().map(drop);
            late.push(1e3 * sent.elapsed().as_secs_f64());
            thread::sleep(PAUSE);
        }
        over.store(true, Ordering::Relaxed);
        let asked = clients.into_iter().map(|client| client.join().expect("it does not panic"));
        let asked: u64 = asked.sum::<Result<_>>()?;
        measured?;
        Ok((asked, late))
    })
}
