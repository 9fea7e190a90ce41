//! The servers that are measured: started, looked at, and gone in the end.
//!
//! Server CPU is user and system time of the server's process and its workers alone; the load generators run on the same
//! machine and take their share of the throughput.

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};

/// Linux counts the CPU time of processes in these, whatever the kernel was built with.
const TICKS_PER_SECOND: f64 = 100.0;

pub struct Server {
    pub name: &'static str,
    process: Child,
    pub address: SocketAddr,
    pub is_tls: bool,
    /// Where the admin listener of kvs is.
    pub admin: Option<SocketAddr>,
}

impl Server {
    /// Starts a server that says `serving on http://ADDRESS` on its standard error once it serves, or `https`.
    pub fn start(name: &'static str, program: &Path, args: &[String]) -> Result<Self> {
        let mut process = Command::new(program).args(args).stderr(Stdio::piped()).spawn()?;
        let mut lines = BufReader::new(process.stderr.take().context("stderr is piped")?).lines();
        let mut admin = None;
        let (address, is_tls) = loop {
            let line = lines.next().with_context(|| format!("{name} stopped at once"))??;
            admin = admin.or(address_in(&line, "admin on http://"));
            let plain = address_in(&line, "serving on http://").map(|address| (address, false));
            if let Some(found) = plain.or(address_in(&line, "serving on https://").map(|address| (address, true))) {
                break found;
            }
        };
        // Nobody reads on, and a full pipe would stop the server.
        std::thread::spawn(move || lines.for_each(drop));
        Ok(Self { name, process, address, is_tls, admin })
    }

    /// Starts a server that says nothing, and waits until somebody accepts connections there.
    pub fn at(name: &'static str, address: SocketAddr, mut command: Command) -> Result<Self> {
        let program = command.get_program().to_string_lossy().into_owned();
        let process = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let process = process.with_context(|| format!("{program} does not start; `just bench` installs it"))?;
        let mut server = Self { name, process, address, is_tls: false, admin: None };
        let began = Instant::now();
        while TcpStream::connect(address).is_err() {
            let has_ended = server.process.try_wait()?.is_some();
            ensure!(!has_ended && began.elapsed() < Duration::from_secs(60), "{program} does not serve");
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(server)
    }

    /// `kvs serve` on a data directory, with these flags beside.
    pub fn kvs(name: &'static str, data: &Path, flags: &[&str]) -> Result<Self> {
        let data = data.to_str().context("a path that is not text")?;
        let args = ["serve", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--data-dir", data];
        let args: Vec<_> = args.iter().chain(flags).map(|arg| (*arg).to_owned()).collect();
        Self::start(name, Path::new(kvs_tests::binary()), &args)
    }

    pub fn over_tls(mut self, is_tls: bool) -> Self {
        self.is_tls = is_tls;
        self
    }

    pub fn signal(&self, signal: Signal) -> Result<()> {
        let id = Pid::from_raw(self.process.id().try_into()?).context("it has an id")?;
        kill_process(id, signal)?;
        Ok(())
    }

    /// Stops it, and waits for its end.
    pub fn stop(mut self) -> Result<()> {
        self.signal(Signal::TERM)?;
        self.process.wait()?;
        Ok(())
    }

    pub fn url(&self) -> String {
        format!("{}://{}", if self.is_tls { "https" } else { "http" }, self.address)
    }

    /// One of the numbers of kvs.
    pub fn metric(&self, name: &str) -> Result<f64> {
        self.metrics([name]).map(|[value]| value)
    }

    /// Numbers of kvs, of one moment.
    pub fn metrics<const N: usize>(&self, names: [&str; N]) -> Result<[f64; N]> {
        let page = ureq::get(format!("http://{}/metrics", self.admin.context("no admin listener")?)).call()?;
        let page = page.into_body().read_to_string()?;
        let mut values = [0.0; N];
        for (value, name) in values.iter_mut().zip(names) {
            let line = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            *value = line.with_context(|| format!("no {name} in the metrics"))?.parse()?;
        }
        Ok(values)
    }

    pub fn id(&self) -> String {
        self.process.id().to_string()
    }

    pub fn cpu_seconds(&self) -> Result<f64> {
        let workers = fs::read_to_string(format!("/proc/{0}/task/{0}/children", self.process.id()))?;
        workers.split_whitespace().chain([self.id().as_str()]).map(cpu_seconds).sum()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Of one process.
fn cpu_seconds(process: &str) -> Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat"))?;
    // The name, in parentheses, may hold spaces; user and system time are the 12th and 13th field after it.
    let (_, fields) = stat.rsplit_once(") ").context("no such process")?;
    let times = fields.split(' ').skip(11).take(2).map(str::parse).collect::<Result<Vec<f64>, _>>()?;
    Ok(times.iter().sum::<f64>() / TICKS_PER_SECOND)
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
    quantile(values.collect(), 0.5)
}

/// The value that this share of them is at most.
pub fn quantile(mut values: Vec<f64>, share: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    values[((values.len() - 1) as f64 * share).round() as usize]
}
