//! Availability: for how long no read and no write succeeds, seen by a client that knows all servers and asks the next one ten
//! milliseconds after it got no answer. `BENCH_KEYS=1000,10000000` measures with these numbers of keys, `BENCH_LOG=files` or
//! `BENCH_LOG=Postgres` with this log, and leaves the other rows as they are.
//!
//! The table is in `docs/availability.md` too.

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use ureq::Agent;

use crate::process::{Server, median};
use crate::report::{Report, number};
use crate::{peers, replay};

const KEYS: [u64; 3] = [1_000, 1_000_000, 10_000_000];
const ROUNDS: usize = 3;
/// The time between two attempts, and the time that one may take. A server that is stopped accepts connections and is silent.
const RETRY: Duration = Duration::from_millis(10);
const ATTEMPT: Duration = Duration::from_millis(250);
/// What comes before and after what is measured.
const CALM: Duration = Duration::from_secs(1);
/// The longest that is waited for.
const PATIENCE: Duration = Duration::from_secs(300);

/// The name of the benchmark.
const NAME: &str = "availability";
const PAGE: &str = "docs/availability.md";
const BEGIN: &str = "<!-- Written by `just bench availability`. -->\n";
const END: &str = "<!-- The end of what is written. -->\n";

/// What happens to a server.
#[derive(Clone, Copy, PartialEq)]
enum Event {
    Trap,
    /// SIGKILL, and a start at once by a supervisor.
    Restart,
    /// SIGKILL, SIGTERM or SIGSTOP of a primary that has a standby.
    Takeover(Signal),
}

#[derive(Clone, Copy, PartialEq)]
enum Log {
    Files,
    Postgres,
}

impl Log {
    fn name(self) -> &'static str {
        match self {
            Self::Files => "files",
            Self::Postgres => "Postgres",
        }
    }
}

struct Case {
    name: &'static str,
    log: Log,
    event: Event,
    flags: &'static [&'static str],
    lost: &'static str,
}

const NOTHING: &str = "nothing";
const IN_FLIGHT: &str = "nothing acknowledged; outcomes of writes in flight are unknown";

const CASES: [Case; 10] = [
    Case {
        name: "trap",
        log: Log::Files,
        event: Event::Trap,
        flags: &[],
        lost: "the answer of the request that traps",
    },
    Case {
        name: "trap, with a spare",
        log: Log::Files,
        event: Event::Trap,
        flags: &["--spare"],
        lost: "the answer of the request that traps",
    },
    Case { name: "kill, restarted at once", log: Log::Files, event: Event::Restart, flags: &[], lost: IN_FLIGHT },
    Case {
        name: "kill, with a standby",
        log: Log::Files,
        event: Event::Takeover(Signal::KILL),
        flags: &["--standby"],
        lost: IN_FLIGHT,
    },
    Case {
        name: "clean stop, with a standby",
        log: Log::Files,
        event: Event::Takeover(Signal::TERM),
        flags: &["--standby"],
        lost: NOTHING,
    },
    Case {
        name: "SIGSTOP, with a standby",
        log: Log::Files,
        event: Event::Takeover(Signal::STOP),
        flags: &["--standby"],
        lost: "nothing; the primary continues with SIGCONT",
    },
    Case { name: "kill, restarted at once", log: Log::Postgres, event: Event::Restart, flags: &[], lost: IN_FLIGHT },
    Case {
        name: "kill, with a standby",
        log: Log::Postgres,
        event: Event::Takeover(Signal::KILL),
        flags: &["--standby"],
        lost: IN_FLIGHT,
    },
    Case {
        name: "clean stop, with a standby",
        log: Log::Postgres,
        event: Event::Takeover(Signal::TERM),
        flags: &["--standby"],
        lost: NOTHING,
    },
    Case {
        name: "SIGSTOP, with a standby",
        log: Log::Postgres,
        event: Event::Takeover(Signal::STOP),
        flags: &["--standby"],
        lost: IN_FLIGHT,
    },
];

pub fn run(data: &Path, report: &mut Report) -> Result<()> {
    let keys = match std::env::var("BENCH_KEYS") {
        Ok(keys) => keys.split(',').map(str::parse).collect::<Result<_, _>>().context("BENCH_KEYS")?,
        Err(_) => KEYS.to_vec(),
    };
    let only = std::env::var("BENCH_LOG").ok();
    let is_asked = |case: &Case| only.as_deref().is_none_or(|log| log == case.log.name()) && is_known(case);
    let cases: Vec<_> = CASES.iter().filter(|case| is_asked(case)).collect();
    ensure!(!cases.is_empty(), "BENCH_LOG is files or Postgres");
    let guest = kvs_tests::built("brittle");
    report.uses("psql", &["--version"]);
    report.table(
        format!("Availability: milliseconds without a success, medians and maxima of {ROUNDS} rounds"),
        &["keys", "log in", "what happens", "no read", "at most", "no write", "at most", "what can be lost"],
    );
    for keys in keys {
        let data = data.join(keys.to_string());
        let files = data.join("files");
        fs::create_dir_all(&data)?;
        replay::write(&files, keys, 100, |number| format!("key-{number}"))?;
        let postgres = peers::postgres(&data)?;
        let url = format!("postgres://postgres@{}/postgres?sslmode=disable", postgres.address);
        if cases.iter().any(|case| case.log == Log::Postgres) {
            import(&files, &url)?;
        }
        for case in &cases {
            let site = Site { case, guest: &guest, files: &files, url: &url };
            let mut row = vec![keys.into(), case.log.name().into(), case.name.into()];
            if case.log == Log::Files && case.event == Event::Takeover(Signal::STOP) {
                // It keeps the lock of the directory.
                row.extend(["until SIGCONT".into(), "".into(), "until SIGCONT".into(), "".into()]);
            } else {
                let rounds = site.measure()?;
                for of in [|gaps: &Gaps| gaps.read, |gaps: &Gaps| gaps.write] {
                    let all = || rounds.iter().map(|gaps| 1e3 * of(gaps).as_secs_f64());
                    row.extend([number(median(all()), 0), number(all().fold(0.0, f64::max), 0)]);
                }
            }
            row.push(case.lost.into());
            report.row(row);
        }
        drop(postgres);
        fs::remove_dir_all(&data)?;
    }
    report.keep_other_rows(NAME)?;
    let page = PathBuf::from(kvs_tests::ROOT).join(PAGE);
    let text = fs::read_to_string(&page)?;
    let parts = text.split_once(BEGIN).and_then(|(before, rest)| Some((before, rest.split_once(END)?.1)));
    let (before, after) = parts.with_context(|| format!("{PAGE} has no place for the table"))?;
    fs::write(page, [before, BEGIN, &report.text(), "\n", END, after].concat())?;
    Ok(())
}

/// Whether this binary has the flags of a case.
fn is_known(case: &Case) -> bool {
    let help = Command::new(kvs_tests::binary()).args(["serve", "--help"]).output();
    let help = help.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    case.flags.iter().all(|flag| help.contains(&format!("{flag}\n")) || help.contains(&format!("{flag} ")))
}

/// Puts the log in files into a database.
fn import(files: &Path, url: &str) -> Result<()> {
    let kvs = kvs_tests::binary();
    let export =
        format!("'{kvs}' txlog export --data-dir '{}' | '{kvs}' txlog import --txlog '{url}' -", files.display());
    ensure!(Command::new("sh").args(["-c", &export]).status()?.success(), "the log cannot be put into the database");
    Ok(())
}

/// The longest time between two successes.
#[derive(Clone, Copy)]
struct Gaps {
    read: Duration,
    write: Duration,
}

struct Site<'s> {
    case: &'s Case,
    guest: &'s str,
    files: &'s Path,
    url: &'s str,
}

impl Site<'_> {
    fn measure(&self) -> Result<Vec<Gaps>> {
        match self.case.event {
            Event::Trap => (0..ROUNDS).map(|_| self.trap()).collect(),
            Event::Restart => self.restart(),
            Event::Takeover(signal) => self.take_over(signal),
        }
    }

    /// A server is started for each: another trap soon after a rebuild would be answered later.
    fn trap(&self) -> Result<Gaps> {
        let server = self.start(None)?;
        let address = server.address;
        if self.case.flags.contains(&"--spare") {
            // A trap before that waits for it to be built.
            let begun = Instant::now();
            while server.metric("kvs_guest_spares")? < 1.0 {
                ensure!(begun.elapsed() < PATIENCE, "there is no spare");
                thread::sleep(RETRY);
            }
        }
        let gaps = watch(&[address], || {
            let agent = Agent::new_with_defaults();
            let answer = agent.put(format!("http://{address}/trap/v1/trap")).send_empty();
            ensure!(matches!(answer, Err(ureq::Error::StatusCode(500))), "the guest did not trap");
            Ok(())
        })?;
        server.stop()?;
        Ok(gaps)
    }

    fn restart(&self) -> Result<Vec<Gaps>> {
        let mut server = self.start(None)?;
        let address = server.address;
        let mut rounds = Vec::new();
        for _ in 0..ROUNDS {
            rounds.push(watch(&[address], || {
                server.signal(Signal::KILL)?;
                // A supervisor: the former process holds its lock until the system has freed its memory.
                let begun = Instant::now();
                server = loop {
                    match self.start(Some(address)) {
                        Err(_) if begun.elapsed() < PATIENCE => thread::sleep(RETRY),
                        started => break started?,
                    }
                };
                Ok(())
            })?);
        }
        server.stop()?;
        Ok(rounds)
    }

    /// The standby of one round is the primary of the next: at ten million keys each start takes half a minute.
    fn take_over(&self, signal: Signal) -> Result<Vec<Gaps>> {
        let mut primary = self.start(None)?;
        let mut rounds = Vec::new();
        for _ in 0..ROUNDS {
            let standby = self.start(None)?;
            rounds.push(watch(&[primary.address, standby.address], || primary.signal(signal))?);
            // The former primary, which may be stopped, is killed.
            primary = standby;
        }
        primary.stop()?;
        Ok(rounds)
    }

    /// Starts a server, at an address that was free before or is again.
    fn start(&self, address: Option<SocketAddr>) -> Result<Server> {
        let free = || TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
        let address = address.map_or_else(free, Ok)?.to_string();
        let data = self.files.to_str().context("a path that is not text")?;
        let mut args = vec!["serve", "--listen", &address, "--admin", "127.0.0.1:0", "--data-dir", data];
        args.extend(self.case.flags);
        match (self.case.event, self.case.log) {
            (Event::Trap, _) => args.push(self.guest),
            (_, Log::Files) => {}
            (_, Log::Postgres) => args.extend(["--txlog", self.url]),
        }
        let args: Vec<_> = args.into_iter().map(str::to_owned).collect();
        Server::start("kvs", Path::new(kvs_tests::binary()), &args)
    }
}

/// Has clients read and write while something happens, and for a while after that.
fn watch(servers: &[SocketAddr], happens: impl FnOnce() -> Result<()>) -> Result<Gaps> {
    let happened = OnceLock::new();
    thread::scope(|scope| {
        let client = |method: &'static str| scope.spawn(|| longest_gap(method, servers, &happened));
        let (read, write) = (client("GET"), client("PUT"));
        thread::sleep(CALM);
        let result = happens();
        // However it went, the clients end.
        happened.get_or_init(Instant::now);
        let [read, write] = [read, write].map(|client| client.join().expect("a client does not panic"));
        result?;
        Ok(Gaps { read: read?, write: write? })
    })
}

/// Asks until some time after that has happened, and gives the longest time between two successes.
fn longest_gap(method: &str, servers: &[SocketAddr], happened: &OnceLock<Instant>) -> Result<Duration> {
    let config = Agent::config_builder().timeout_global(Some(ATTEMPT)).http_status_as_error(false);
    let agent: Agent = config.build().into();
    let (begun, mut asked, mut last, mut longest) = (Instant::now(), 0, None, Duration::ZERO);
    loop {
        let url = format!("http://{}/v1/key-1", servers[asked % servers.len()]);
        let answer = if method == "GET" { agent.get(url).call() } else { agent.put(url).send("x") };
        let now = Instant::now();
        // A body that is read leaves the connection for the next attempt.
        if answer.is_ok_and(|answer| answer.status().is_success() && answer.into_body().read_to_vec().is_ok()) {
            longest = last.map_or(longest, |last| longest.max(now - last));
            last = Some(now);
            if happened.get().is_some_and(|happened| now > *happened + CALM) {
                return Ok(longest);
            }
        } else {
            asked += 1;
        }
        ensure!(begun.elapsed() < PATIENCE, "{method} does not succeed any more");
        thread::sleep(RETRY);
    }
}
