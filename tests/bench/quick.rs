//! `just bench-quick`: how many instructions of its own the server spends on a request and on an entry of a replay, guest and
//! host together, beside what it spent when `quick.json` was written.
//!
//! They are counted by valgrind, on one worker thread, so the noise of the machine matters little: there is the chance of hash
//! seeds, a percent or two, and a PUT takes up to a seventh less where the machine is busy, as threads find their work done
//! before they sleep. So the numbers on record are those of a quiet machine, where a PUT takes most. A count is the difference
//! of two runs, so that the start is not in it. What the kernel does for a request is not in it either.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::plain_map;
use crate::process::Server;
use crate::replay;

/// What was counted before, in the order of names.
const BEFORE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/bench/quick.json");
/// More than this, and it fails.
const MOST: f64 = 1.10;
/// What one run does less than the other.
const FEW: u64 = 1_000;
const MANY: u64 = 4_000;
/// More processes that want to run than this, and nothing is recorded. This program and the server are two.
const QUIET: f64 = 2.5;
/// Requests that are on their way at once, so that waking up for them is not what is counted.
const AT_ONCE: u64 = 50;

const GET: &str = "GET /v1/key-1 HTTP/1.1\r\nhost: kvs\r\n\r\n";
/// A GET that is equal to no other: what the guest reads of it has a number in it that grows, in the place of `NUMBER`.
const UNLIKE: &str = "GET /v1/key-1 HTTP/1.1\r\nhost: kvs\r\nif-range: NUMBER\r\n\r\n";
const NUMBER: &str = "NUMBER";
const PUT: &str = "PUT /v1/key-1 HTTP/1.1\r\nhost: kvs\r\ncontent-length: 100\r\n\r\n";

/// Counts, and compares. With `update`, what was counted is what the next runs are compared with.
pub fn run(data: &Path, update: bool) -> Result<()> {
    let load = fs::read_to_string("/proc/loadavg")?;
    let load: f64 = load.split(' ').next().unwrap_or_default().parse().context("the load of the machine")?;
    ensure!(
        !update || load < QUIET,
        "the machine is busy (load {load}), so that a PUT takes less; record it on a quiet one"
    );
    let value = "x".repeat(100);
    let put = format!("{PUT}{value}");
    let list = "GET /v1?limit=100 HTTP/1.1\r\nhost: kvs\r\n\r\n";
    // A start compiles the guest, and keeps it for the next ones.
    let kvs = data.join("kvs");
    replay::write(&kvs, 1_000, 100, |number| format!("key-{number}"))?;
    counted(data, Program::Kvs(&kvs), "", 0)?;
    let each = |program: Program<'_>, request: &str| {
        let [few, many] = [FEW, MANY].map(|times| counted(data, program, request, times));
        Ok::<_, anyhow::Error>((many? - few?) / (MANY - FEW))
    };
    let entry = || {
        let [few, many] = [FEW, MANY].map(|entries| {
            let log = data.join(entries.to_string());
            replay::write(&log, 10 * entries, 100, |number| format!("key-{number}"))?;
            fs::create_dir_all(log.join("cache"))?;
            for compiled in fs::read_dir(kvs.join("cache"))? {
                let compiled = compiled?;
                fs::copy(compiled.path(), log.join("cache").join(compiled.file_name()))?;
            }
            counted(data, Program::Kvs(&log), "", 0)
        });
        Ok::<_, anyhow::Error>((many? - few?) / (10 * (MANY - FEW)))
    };
    let now = BTreeMap::from([
        ("GET, a hit".to_owned(), each(Program::Kvs(&kvs), GET)?),
        ("GET, a miss".to_owned(), each(Program::Kvs(&kvs), UNLIKE)?),
        ("GET, cache off".to_owned(), each(Program::NoCache(&kvs), GET)?),
        ("GET, another header, cache off".to_owned(), each(Program::NoCache(&kvs), UNLIKE)?),
        ("GET of 100 keys".to_owned(), each(Program::Kvs(&kvs), list)?),
        ("GET, plain hyper map".to_owned(), each(Program::PlainMap, GET)?),
        ("PUT".to_owned(), each(Program::Kvs(&kvs), &put)?),
        ("PUT, plain hyper map".to_owned(), each(Program::PlainMap, &put)?),
        ("an entry of a replay".to_owned(), entry()?),
    ]);
    let before: BTreeMap<String, u64> = serde_json::from_str(&fs::read_to_string(BEFORE).unwrap_or("{}".into()))?;
    println!("\n| | instructions | before | change |\n|---|---:|---:|---:|");
    let mut worse = Vec::new();
    for (name, now) in &now {
        let Some(before) = before.get(name) else {
            println!("| {name} | {now} | | |");
            continue;
        };
        let change = *now as f64 / *before as f64;
        println!("| {name} | {now} | {before} | {:+.1}% |", 100.0 * (change - 1.0));
        if change > MOST {
            worse.push(name.as_str());
        }
    }
    if update {
        fs::write(BEFORE, serde_json::to_string_pretty(&now)? + "\n")?;
        return Ok(());
    }
    let worse = worse.join(", ");
    ensure!(
        worse.is_empty(),
        "more than 10% slower than before: {worse}; when that is its price: just bench-quick update"
    );
    Ok(())
}

#[derive(Clone, Copy)]
enum Program<'d> {
    Kvs(&'d Path),
    NoCache(&'d Path),
    PlainMap,
}

/// The instructions of a server that starts, answers this many requests, and stops.
fn counted(data: &Path, program: Program<'_>, request: &str, times: u64) -> Result<u64> {
    let report = data.join("report");
    let text = |path: &Path| path.to_str().map(str::to_owned).context("a path that is not text");
    let mut args =
        ["TOKIO_WORKER_THREADS=1", "valgrind", "--tool=cachegrind", "--cache-sim=no"].map(str::to_owned).to_vec();
    args.extend(["--cachegrind-out-file=/dev/null".to_owned(), format!("--log-file={}", text(&report)?)]);
    match program {
        Program::Kvs(log) | Program::NoCache(log) => {
            let serve =
                ["serve", "--durability", "os", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--data-dir"];
            args.push(kvs_tests::binary().to_owned());
            args.extend(serve.map(str::to_owned));
            args.push(text(log)?);
            if matches!(program, Program::NoCache(_)) {
                args.extend(["--response-cache-bytes", "0"].map(str::to_owned));
            }
        }
        Program::PlainMap => {
            args.push(text(&std::env::current_exe()?)?);
            args.extend(plain_map::args(10, 100));
        }
    }
    let server = Server::start("valgrind", Path::new("env"), &args)?;
    ask(server.address, request, times)?;
    server.stop()?;
    let report = fs::read_to_string(report)?;
    let count = report.lines().find_map(|line| line.split_once(" refs:")).with_context(|| report.clone())?;
    Ok(count.1.trim().replace(',', "").parse()?)
}

/// Sends a request this many times, and reads the answers, none of which may be a refusal.
fn ask(address: SocketAddr, request: &str, times: u64) -> Result<()> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    let mut left = times;
    while left > 0 {
        let now = left.min(AT_ONCE);
        // Of one length, whatever the number.
        let requests = (0..now).map(|n| request.replace(NUMBER, &format!("\"{:08}\"", left - n)));
        stream.write_all(requests.collect::<String>().as_bytes())?;
        (0..now).try_for_each(|_| read(&mut stream))?;
        left -= now;
    }
    Ok(())
}

/// One answer.
fn read(stream: &mut TcpStream) -> Result<()> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    let head = String::from_utf8(head)?.to_lowercase();
    ensure!(head.starts_with("http/1.1 2"), "{head}");
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
    let mut body = vec![0; length.unwrap_or("0").parse()?];
    stream.read_exact(&mut body)?;
    Ok(())
}
