//! What puts servers under load: wrk, and redis-benchmark and h2load for what wrk does not speak.
//!
//! All of them take their time from the same cores as the servers, so each has one thread.

use std::path::Path;
use std::process::Command;
use std::time::Duration;
use std::{env, fs};

use anyhow::{Context, Result, bail, ensure};

use crate::process::{Server, quantile};

/// What is asked, from how many connections.
#[derive(Clone, Copy)]
pub struct Load<'s> {
    /// A kind of request that `load.lua` knows.
    pub kind: &'s str,
    pub keys: u64,
    pub bytes: usize,
    pub connections: u32,
    pub time: Duration,
}

/// What a server did under load.
pub struct Done {
    pub per_second: f64,
    /// CPU time of the server for one request, in microseconds.
    pub cpu_us: f64,
    /// Microseconds that half of the requests took at most, then 99%, 99.9%, and all. Empty where nobody counted.
    pub latency: Vec<f64>,
    /// Share of the requests that the response cache of kvs answered; not a number where none was looked up.
    pub hit_rate: f64,
    /// Entries of a batch of kvs; not a number where none was written.
    pub batch: f64,
}

/// What wrk reports.
pub struct Wrk {
    pub requests: f64,
    pub seconds: f64,
    pub latency: Vec<f64>,
}

impl Done {
    fn new(per_second: f64, cpu_us: f64, latency: Vec<f64>) -> Self {
        Self { per_second, cpu_us, latency, hit_rate: f64::NAN, batch: f64::NAN }
    }
}

/// 100-byte values.
pub fn load(kind: &str, keys: u64, connections: u32, time: Duration) -> Load<'_> {
    Load { kind, keys, bytes: 100, connections, time }
}

impl Load<'_> {
    /// HTTP/1.1.
    pub fn wrk(&self, server: &Server) -> Result<Done> {
        let before = server.cpu_seconds()?;
        let wrk = self.wrk_alone(server)?;
        let cpu_us = (server.cpu_seconds()? - before) / wrk.requests * 1e6;
        Ok(Done::new(wrk.requests / wrk.seconds, cpu_us, wrk.latency))
    }

    /// What wrk alone says: also of a server whose process is replaced meanwhile. No request may fail.
    pub fn wrk_alone(&self, server: &Server) -> Result<Wrk> {
        let mut wrk = Command::new("wrk");
        wrk.args(["--threads", "1", "--connections", &self.connections.to_string()]);
        wrk.args(["--duration", &format!("{}s", self.time.as_secs()), "--script"]);
        wrk.args([concat!(env!("CARGO_MANIFEST_DIR"), "/bench/load.lua"), &server.url()]);
        wrk.args(["--", self.kind, &self.keys.to_string(), &self.bytes.to_string()]);
        let report = output(wrk)?;
        // The script ends with three lines: requests, microseconds, failures; their kinds; and latencies.
        let numbers = |name: &str| {
            let line = report.lines().find_map(|line| line.strip_prefix(name)).with_context(|| report.clone())?;
            Ok::<_, anyhow::Error>(line.split(' ').map(str::parse).collect::<Result<Vec<f64>, _>>()?)
        };
        let [requests, microseconds, failures] = numbers("result ")?[..] else { bail!("wrk said {report:?}") };
        let kinds = report.lines().find(|line| line.starts_with("failures: ")).unwrap_or_default();
        ensure!(
            failures == 0.0 && requests > 0.0,
            "{}: of {requests} requests {failures} failed: {kinds}",
            server.name
        );
        Ok(Wrk { requests, seconds: microseconds / 1e6, latency: numbers("latency ")? })
    }

    /// The same, with what kvs counts meanwhile.
    pub fn wrk_of_kvs(&self, server: &Server) -> Result<Done> {
        const COUNTS: [&str; 4] = [
            "kvs_response_cache_hits_total",
            "kvs_response_cache_misses_total",
            "kvs_txlog_batch_entries_sum",
            "kvs_txlog_batch_entries_count",
        ];
        let before = server.metrics(COUNTS)?;
        let done = self.wrk(server)?;
        let after = server.metrics(COUNTS)?;
        let [hits, misses, entries, batches] = std::array::from_fn(|index| after[index] - before[index]);
        Ok(Done { hit_rate: hits / (hits + misses), batch: entries / batches, ..done })
    }

    /// HTTP/2, one stream in each connection at a time, and a thousand of the keys.
    pub fn h2load(&self, server: &Server, data: &Path) -> Result<Done> {
        let (mut h2load, _) = self.h2load_of(server, data)?;
        h2load.args(["--duration", &self.time.as_secs().to_string()]);
        let (report, cpu) = run(server, h2load)?;
        let requests = succeeded(&report)?;
        Ok(Done::new(requests / self.time.as_secs_f64(), cpu / requests * 1e6, Vec::new()))
    }

    /// HTTP/1.1, as many requests a second as there can be.
    pub fn most(&self, server: &Server, data: &Path) -> Result<f64> {
        let (mut h2load, _) = self.h2load_of(server, data)?;
        h2load.args(["--h1", "--duration", &self.time.as_secs().to_string()]);
        Ok(succeeded(&run(server, h2load)?.0)? / self.time.as_secs_f64())
    }

    /// HTTP/1.1 at this many requests a second, whether those before are answered or not. Gives the latency that 99% had
    /// at most, in microseconds.
    pub fn paced(&self, server: &Server, per_second: f64, data: &Path) -> Result<f64> {
        let (mut h2load, log) = self.h2load_of(server, data)?;
        let each = (per_second / f64::from(self.connections)).max(1.0).round();
        let requests = each * f64::from(self.connections) * self.time.as_secs_f64();
        h2load.args(["--h1", "--rps", &each.to_string(), "--requests", &requests.to_string()]);
        let _ = fs::remove_file(&log);
        h2load.arg("--log-file").arg(&log);
        let (report, _) = run(server, h2load)?;
        ensure!(succeeded(&report)? == requests, "h2load said {report:?}");
        // When it began, its status, and how long it took: all in microseconds.
        let taken = fs::read_to_string(&log)?;
        let taken = taken.lines().map(|line| line.rsplit('\t').next().unwrap_or_default().parse());
        Ok(quantile(taken.collect::<Result<_, _>>()?, 0.99))
    }

    /// h2load, before it knows how long; and where its log would be.
    fn h2load_of(&self, server: &Server, data: &Path) -> Result<(Command, std::path::PathBuf)> {
        let [addresses, value] = ["addresses", "value"].map(|name| data.join(name));
        let address = |key: u64| format!("{}/v1/key-{key}\n", server.url());
        fs::write(&addresses, (0..1_000.min(self.keys)).map(address).collect::<String>())?;
        fs::write(&value, "x".repeat(self.bytes))?;
        let mut h2load = Command::new("h2load");
        h2load.args(["--threads", "1", "--clients", &self.connections.to_string(), "--max-concurrent-streams", "1"]);
        h2load.arg("--input-file").arg(&addresses);
        if self.kind == "PUT" {
            h2load.args(["--header", ":method: PUT", "--data"]).arg(&value);
        }
        Ok((h2load, data.join("requests")))
    }

    /// The protocol of redis, by its own tool, which knows a number of requests and no time.
    pub fn redis(&self, server: &Server, requests: u64) -> Result<Done> {
        let (command, name) = if self.kind == "PUT" { ("set", "SET") } else { ("get", "GET") };
        let mut benchmark = Command::new("redis-benchmark");
        benchmark.args(["-p", &server.address.port().to_string(), "-c", &self.connections.to_string()]);
        benchmark.args(["-n", &requests.to_string(), "-d", &self.bytes.to_string(), "-r", &self.keys.to_string()]);
        let (report, cpu) = run(server, {
            benchmark.args(["-t", command, "--csv"]);
            benchmark
        })?;
        let line = report.lines().find_map(|line| line.strip_prefix(&format!("\"{name}\",\"")));
        let per_second = line.with_context(|| report.clone())?.split('"').next().unwrap_or_default().parse()?;
        Ok(Done::new(per_second, cpu / requests as f64 * 1e6, Vec::new()))
    }
}

/// What a load generator says, and the CPU time of the server meanwhile.
fn run(server: &Server, generator: Command) -> Result<(String, f64)> {
    let before = server.cpu_seconds()?;
    let report = output(generator)?;
    Ok((report, server.cpu_seconds()? - before))
}

fn output(mut generator: Command) -> Result<String> {
    let program = generator.get_program().to_string_lossy().into_owned();
    let output = generator.output().with_context(|| format!("{program} does not start; `just bench` installs it"))?;
    let report = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.success(), "{program} failed: {report}{}", String::from_utf8_lossy(&output.stderr));
    Ok(report)
}

/// How many requests h2load says were answered well; none may have failed.
fn succeeded(report: &str) -> Result<f64> {
    let line = report.lines().find(|line| line.starts_with("requests: ")).with_context(|| report.to_owned())?;
    let count = |what: &str| {
        let number = line.split(", ").find_map(|part| part.strip_suffix(what)).with_context(|| line.to_owned())?;
        Ok::<_, anyhow::Error>(number.trim().parse::<f64>()?)
    };
    ensure!(count("failed")? + count("errored")? == 0.0 && count("succeeded")? > 0.0, "{line}");
    count("succeeded")
}
