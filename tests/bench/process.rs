//! The servers that are measured: started, put under load, and gone in the end.
//!
//! Server CPU is user and system time of the server's process alone; the load generators run on the same machine and take
//! their share of the throughput.

use std::fs::{self, Permissions};
use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, geteuid, kill_process};

/// Linux counts the CPU time of processes in these, whatever the kernel was built with.
const TICKS_PER_SECOND: f64 = 100.0;

pub struct Server {
    pub name: &'static str,
    process: Child,
    pub address: SocketAddr,
    /// Where the admin listener of kvs is.
    pub admin: Option<SocketAddr>,
}

/// What a server did under load.
pub struct Load {
    pub per_second: f64,
    pub cpu_us: f64,
}

impl Server {
    /// Starts a server that says `... http://ADDRESS` on its standard error once it serves.
    pub fn start(name: &'static str, program: &Path, args: &[String]) -> Result<Self> {
        let mut process = Command::new(program).args(args).stderr(Stdio::piped()).spawn()?;
        let mut lines = BufReader::new(process.stderr.take().context("stderr is piped")?).lines();
        let mut admin = None;
        let address = loop {
            let line = lines.next().with_context(|| format!("{name} stopped at once"))??;
            admin = admin.or(address_in(&line, "admin on http://"));
            if let Some(address) = address_in(&line, "serving on http://") {
                break address;
            }
        };
        // Nobody reads on, and a full pipe would stop the server.
        std::thread::spawn(move || lines.for_each(drop));
        Ok(Self { name, process, address, admin })
    }

    /// `kvs serve` on a data directory, with these flags beside.
    pub fn kvs(name: &'static str, data: &Path, flags: &[&str]) -> Result<Self> {
        let data = data.to_str().context("a path that is not text")?;
        let args = ["serve", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--data", data];
        let args: Vec<_> = args.iter().chain(flags).map(|arg| (*arg).to_owned()).collect();
        Self::start(name, Path::new(env!("CARGO_BIN_EXE_kvs")), &args)
    }

    /// redis-server, which has every write on disk before it answers it, and does nothing else beside.
    pub fn redis(data: &Path) -> Result<Self> {
        let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let port = address.port().to_string();
        let mut redis = Command::new("redis-server");
        redis.args(["--bind", "127.0.0.1", "--port", &port, "--dir"]).arg(data);
        redis.args(["--appendonly", "yes", "--appendfsync", "always", "--auto-aof-rewrite-percentage", "0"]);
        redis.args(["--save", ""]).stdout(Stdio::null());
        let process = redis.spawn().context("redis-server does not start; `just bench` installs it")?;
        let began = Instant::now();
        while TcpStream::connect(address).is_err() {
            ensure!(began.elapsed() < Duration::from_secs(10), "redis-server does not serve");
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(Self { name: "redis, appendfsync always", process, address, admin: None })
    }

    /// A PostgreSQL of its own, with the settings it comes with.
    pub fn postgres(data: &Path) -> Result<Self> {
        let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
        let newest = versions.map(|version| version.path().join("bin")).max();
        let programs = newest.context("there is no PostgreSQL; `just bench` installs it")?;
        let (home, root) = (data.join("postgres"), geteuid().is_root());
        fs::create_dir(&home)?;
        if root {
            // It does not run as root, and has to reach its own directory.
            let owner = fs::metadata("/var/lib/postgresql")?;
            chown(&home, Some(owner.uid()), Some(owner.gid()))?;
            fs::set_permissions(data, Permissions::from_mode(0o755))?;
        }
        let program = |name: &str| {
            let mut command = Command::new(if root { "setpriv".into() } else { programs.join(name) });
            if root {
                command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups", "--"]).arg(programs.join(name));
            }
            command.arg("-D").arg(home.join("cluster")).stdout(Stdio::null()).stderr(Stdio::null());
            command
        };
        ensure!(program("initdb").args(["-U", "postgres", "-A", "trust"]).status()?.success(), "initdb failed");
        let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let mut postgres = program("postgres");
        postgres.args(["-h", "127.0.0.1", "-p", &address.port().to_string(), "-c", "unix_socket_directories="]);
        let mut postgres = Self { name: "postgres", process: postgres.spawn()?, address, admin: None };
        let mut ready = Command::new(programs.join("pg_isready"));
        ready.args(["-q", "-h", "127.0.0.1", "-p", &address.port().to_string()]);
        let began = Instant::now();
        while !ready.status()?.success() {
            let ended = postgres.process.try_wait()?.is_some();
            ensure!(!ended && began.elapsed() < Duration::from_secs(30), "postgres does not serve");
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(postgres)
    }

    /// Requests from so many connections for a time. The script is one of those beside this file.
    pub fn load(&self, script: &str, connections: u32, time: Duration) -> Result<Load> {
        self.load_telling(script, &[], connections, time).map(|(load, _)| load)
    }

    /// As `load`, with arguments for the script; also gives what else it tells in the end.
    pub fn load_telling(
        &self,
        script: &str,
        args: &[String],
        connections: u32,
        time: Duration,
    ) -> Result<(Load, String)> {
        let script = format!("{}/tests/bench/{script}.lua", env!("CARGO_MANIFEST_DIR"));
        let before = self.cpu_seconds()?;
        let mut wrk = Command::new("wrk");
        wrk.args(["--threads", "1", "--connections", &connections.to_string()]);
        wrk.args(["--duration", &format!("{}s", time.as_secs()), "--script", &script]);
        let output = wrk.arg(format!("http://{}", self.address)).arg("--").args(args).output();
        let output = output.context("wrk does not start; `just bench` installs it")?;
        let cpu = self.cpu_seconds()? - before;
        // The script ends with one line: requests, microseconds, failures.
        let report = String::from_utf8(output.stdout)?;
        let line = report.lines().find_map(|line| line.strip_prefix("result ")).with_context(|| report.clone())?;
        let numbers = line.split(' ').map(str::parse).collect::<Result<Vec<f64>, _>>()?;
        let [requests, microseconds, failures] = numbers[..] else { bail!("wrk said {line:?}") };
        ensure!(failures == 0.0 && requests > 0.0, "{}: {failures} of {requests} requests failed", self.name);
        Ok((Load { per_second: requests / microseconds * 1e6, cpu_us: cpu / requests * 1e6 }, report))
    }

    /// As `load` with PUTs, by redis's own tool, which knows a number of requests and no time.
    pub fn redis_load(&self, connections: u32, requests: u32) -> Result<Load> {
        let before = self.cpu_seconds()?;
        let mut benchmark = Command::new("redis-benchmark");
        benchmark.args(["-p", &self.address.port().to_string(), "-c", &connections.to_string()]);
        benchmark.args(["-n", &requests.to_string(), "-d", "100", "-r", "10000", "-t", "set", "--csv"]);
        let output = benchmark.output().context("redis-benchmark does not start; `just bench` installs it")?;
        let cpu = self.cpu_seconds()? - before;
        let report = String::from_utf8(output.stdout)?;
        let line = report.lines().find_map(|line| line.strip_prefix("\"SET\",\"")).with_context(|| report.clone())?;
        let per_second = line.split('"').next().unwrap_or_default().parse()?;
        Ok(Load { per_second, cpu_us: cpu / f64::from(requests) * 1e6 })
    }

    /// Tells it to stop, and waits until it has.
    pub fn stop(mut self) -> Result<()> {
        let id = Pid::from_raw(self.process.id().try_into()?).context("it has an id")?;
        kill_process(id, Signal::TERM)?;
        self.process.wait()?;
        Ok(())
    }

    pub fn id(&self) -> String {
        self.process.id().to_string()
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

/// The address in a line that holds this before it.
fn address_in(line: &str, before: &str) -> Option<SocketAddr> {
    let (_, rest) = line.split_once(before)?;
    rest.split_whitespace().next()?.parse().ok()
}

/// A line of `/proc/PROCESS/status` that is a size.
pub fn status_bytes(process: &str, line: &str) -> Result<f64> {
    let status = fs::read_to_string(format!("/proc/{process}/status"))?;
    let kilobytes = status.lines().find_map(|text| text.strip_prefix(line)).context("no such line")?;
    Ok(kilobytes.trim().trim_end_matches(" kB").parse::<f64>()? * 1024.0)
}

/// The CPU time of the threads of a process whose names begin like this, in seconds.
pub fn thread_seconds(process: &str, name: &str) -> Result<f64> {
    let mut nanoseconds = 0.0;
    for thread in fs::read_dir(format!("/proc/{process}/task"))? {
        let thread = thread?.path();
        if fs::read_to_string(thread.join("comm"))?.starts_with(name) {
            let times = fs::read_to_string(thread.join("schedstat"))?;
            nanoseconds += times.split(' ').next().unwrap_or_default().parse::<f64>()?;
        }
    }
    Ok(nanoseconds / 1e9)
}

/// The middle one.
pub fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<_> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
