//! `just bench`: what a request costs the server, beside a plain hyper map without guest or log, in one run.
//!
//! The machine is shared and noisy, so the servers take turns within each round, and what counts is the median of the
//! ratios of the rounds. Server CPU per request is user and system time of the server's process alone; wrk runs on the same
//! machine and takes its share of the throughput.

mod plain_map;

use std::env;
use std::fs;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};

const ROUNDS: usize = 5;
const SECONDS: u32 = 4;
const CONNECTIONS: u32 = 64;
/// Linux counts the CPU time of processes in these, whatever the kernel was built with.
const TICKS_PER_SECOND: f64 = 100.0;

fn main() -> Result<()> {
    // The plain map is this binary, started again as a process of its own.
    if env::args().nth(1).as_deref() == Some(plain_map::NAME) {
        return plain_map::serve();
    }
    let me = env::current_exe()?;
    let kvs = Path::new(env!("CARGO_BIN_EXE_kvs"));
    let data = tempfile::tempdir()?;
    let at = |name: &str| data.path().join(name).display().to_string();
    let serve = ["serve", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--data"].map(str::to_owned);
    let durable = [serve.as_slice(), &[at("sync")]].concat();
    let buffered = [serve.as_slice(), &[at("os"), "--durability".into(), "os".into()]].concat();
    let mut servers = [
        Server::start("plain hyper map", &me, &[plain_map::NAME.to_owned()])?,
        Server::start("kvs", kvs, &durable)?,
        Server::start("kvs --durability os", kvs, &buffered)?,
    ];
    println!(
        "{CONNECTIONS} connections, 100-byte values, 10,000 keys, {ROUNDS} rounds of {SECONDS} s each, {} cores shared with wrk\n",
        std::thread::available_parallelism()?
    );
    println!(
        "| request | server | requests/s | CPU us/request | throughput, of the plain map | CPU, of the plain map |"
    );
    println!("|---|---|---:|---:|---:|---:|");
    // PUT first: it fills the store that GET reads.
    for script in ["put", "get"] {
        let mut rounds: Vec<Vec<Load>> = Vec::new();
        for _ in 0..ROUNDS {
            rounds.push(servers.iter_mut().map(|server| server.load(script)).collect::<Result<_>>()?);
        }
        for (index, server) in servers.iter().enumerate() {
            let median = |of: &dyn Fn(&[Load]) -> f64| {
                let mut values: Vec<_> = rounds.iter().map(|round| of(round)).collect();
                values.sort_by(f64::total_cmp);
                values[ROUNDS / 2]
            };
            println!(
                "| {} | {} | {:.0} | {:.1} | {:.2} | {:.2} |",
                script.to_uppercase(),
                server.name,
                median(&|round| round[index].per_second),
                median(&|round| round[index].cpu_us),
                median(&|round| round[index].per_second / round[0].per_second),
                median(&|round| round[index].cpu_us / round[0].cpu_us),
            );
        }
    }
    Ok(())
}

struct Load {
    per_second: f64,
    cpu_us: f64,
}

struct Server {
    name: &'static str,
    process: Child,
    address: SocketAddr,
}

impl Server {
    /// Starts a server that says `... http://ADDRESS` on its standard error once it serves.
    fn start(name: &'static str, program: &Path, args: &[String]) -> Result<Self> {
        let mut process = Command::new(program).args(args).stderr(Stdio::piped()).spawn()?;
        let mut lines = BufReader::new(process.stderr.take().context("stderr is piped")?).lines();
        let address = loop {
            let line = lines.next().with_context(|| format!("{name} stopped at once"))??;
            if let Some((_, rest)) = line.split_once("serving on http://") {
                break rest.split_whitespace().next().context("no address")?.parse()?;
            }
        };
        // Nobody reads on, and a full pipe would stop the server.
        std::thread::spawn(move || lines.for_each(drop));
        Ok(Self { name, process, address })
    }

    fn load(&mut self, script: &str) -> Result<Load> {
        let script = format!("{}/tests/bench/{script}.lua", env!("CARGO_MANIFEST_DIR"));
        let before = self.cpu_seconds()?;
        let mut wrk = Command::new("wrk");
        wrk.args(["--threads", "1", "--connections", &CONNECTIONS.to_string(), "--duration", &format!("{SECONDS}s")]);
        wrk.args(["--script", &script, &format!("http://{}", self.address)]);
        let output = wrk.output().context("wrk does not start; `just bench` installs it")?;
        let cpu = self.cpu_seconds()? - before;
        // The script ends with one line: requests, microseconds, failures.
        let report = String::from_utf8(output.stdout)?;
        let line = report.lines().find_map(|line| line.strip_prefix("result ")).with_context(|| report.clone())?;
        let numbers = line.split(' ').map(str::parse).collect::<Result<Vec<f64>, _>>()?;
        let [requests, microseconds, failures] = numbers[..] else { anyhow::bail!("wrk said {line:?}") };
        ensure!(failures == 0.0 && requests > 0.0, "{}: {failures} of {requests} requests failed", self.name);
        Ok(Load { per_second: requests / microseconds * 1e6, cpu_us: cpu / requests * 1e6 })
    }

    fn cpu_seconds(&self) -> Result<f64> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.process.id()))?;
        // The name, in parentheses, may hold spaces; user and system time are the 12th and 13th field after it.
        let (_, fields) = stat.rsplit_once(") ").context("no such process")?;
        let times = fields.split(' ').skip(11).take(2).map(str::parse).collect::<Result<Vec<f64>, _>>()?;
        Ok(times.iter().sum::<f64>() / TICKS_PER_SECOND)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
