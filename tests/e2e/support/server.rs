//! Starts the real binary, waits for its log lines, and stops it. The only place that spawns `kvs`.
//!
//! Owns: processes, data directories, output on stderr. Must never know: requests over HTTP.
//!
//! Nothing here sleeps: it waits for lines of stderr, or for its end, which is that of the process.

use std::fmt::Display;
use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use super::compiled;
use super::log::kvs_at;

/// Timeout that is longer than anything here takes on a busy machine. Reaching it is a failure.
pub const PATIENCE: Duration = Duration::from_secs(180);

/// A server that serves. It is killed when this is dropped, and its log lines are printed when the test fails.
pub struct Server {
    process: Process,
    data: TempDir,
    address: SocketAddr,
    admin: SocketAddr,
}

/// A server that has ended, and its directory.
pub struct Stopped {
    data: TempDir,
    stderr: Vec<String>,
}

/// Failure of a command: its exit code and its one-line error.
pub struct Refused {
    pub code: i32,
    pub line: String,
}

impl Server {
    /// Serves a new, empty directory, with these additional flags.
    pub fn start(args: &[&str]) -> Self {
        Self::start_in(TempDir::new().expect("a temporary directory can be made"), args)
    }

    fn start_in(data: TempDir, args: &[&str]) -> Self {
        let mut command = serve(data.path());
        command.args(args);
        Self::spawn(command, data)
    }

    /// Runs a command that is to serve `data`.
    pub fn spawn(command: Command, data: TempDir) -> Self {
        Self::try_spawn(command, data)
            .unwrap_or_else(|(_, stopped)| panic!("it ended without serving; it said:\n{}", stopped.stderr.join("\n")))
    }

    /// As `spawn`; an error when it ended before it served.
    pub fn try_spawn(command: Command, data: TempDir) -> Result<Self, (ExitStatus, Stopped)> {
        compiled::prepare(&command);
        let mut process = Process::spawn(command);
        let serving = |line: &str| address(line, "serving on http://").or_else(|| address(line, "serving on https://"));
        match process.stderr.find(serving) {
            Ok(address) => Ok(Self { admin: process.admin(), process, data, address }),
            Err(_) => Err((process.wait(), Stopped { data, stderr: process.stderr.so_far() })),
        }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Address of the admin listener.
    pub fn admin(&self) -> SocketAddr {
        self.admin
    }

    /// The URL of a path.
    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    pub fn pid(&self) -> u32 {
        self.process.child.id()
    }

    pub fn data(&self) -> &Path {
        self.data.path()
    }

    pub fn signal(&self, signal: Signal) {
        self.process.signal(signal);
    }

    /// Waits for a line of stderr that contains this.
    pub fn says(&self, text: &str) -> String {
        let found = self.process.stderr.find(|line| line.contains(text).then(|| line.to_owned()));
        found.unwrap_or_else(|said| panic!("it never said {text:?}, but:\n{said}"))
    }

    /// Waits until this many lines of stderr contain a text, and returns the last of them.
    pub fn says_again(&self, text: &str, times: usize) -> String {
        let mut seen = 0;
        let found = self.process.stderr.find(|line| {
            seen += usize::from(line.contains(text));
            (seen == times).then(|| line.to_owned())
        });
        found.unwrap_or_else(|said| panic!("it did not say {text:?} {times} times, but:\n{said}"))
    }

    /// Lines of stderr so far.
    pub fn stderr(&self) -> Vec<String> {
        self.process.stderr.so_far()
    }

    /// Waits until the same process has restarted and serves, on other ports.
    pub fn restarts_in_place(&mut self) {
        let again = |after: &[&str]| {
            let mut seen = 0;
            let found = self.process.stderr.find(|line| {
                let address = after.iter().find_map(|after| address(line, after))?;
                seen += 1;
                (seen == 2).then_some(address)
            });
            found.unwrap_or_else(|said| panic!("it did not restart, but printed:\n{said}"))
        };
        (self.admin, self.address) =
            (again(&["admin on http://"]), again(&["serving on http://", "serving on https://"]));
    }

    /// SIGTERM. It must shut down gracefully.
    pub fn terminate(self) -> Stopped {
        self.signal(Signal::TERM);
        self.ends_well()
    }

    /// Waits for the end of a stopped server: a log line of the stop, and exit code 0.
    pub fn ends_well(mut self) -> Stopped {
        let status = self.process.wait();
        let stderr = self.stderr();
        let last = stderr.last().map_or("", String::as_str);
        assert!(status.success(), "{status}, after saying:\n{}", stderr.join("\n"));
        assert!(last.contains("stopped serving on"), "its last line is not that it stopped:\n{}", stderr.join("\n"));
        Stopped { data: self.data, stderr }
    }

    /// Waits for its end, with any exit code.
    pub fn ends(mut self) -> (ExitStatus, Stopped) {
        let status = self.process.wait();
        let stderr = self.stderr();
        (status, Stopped { data: self.data, stderr })
    }

    /// SIGKILL: nothing is finished, nothing is flushed.
    pub fn kill(self) -> Stopped {
        self.signal(Signal::KILL);
        self.ends().1
    }
}

impl Stopped {
    /// Serves the same directory again.
    pub fn restart(self, args: &[&str]) -> Server {
        Server::start_in(self.data, args)
    }

    /// Tries to serve the same directory again, which must fail.
    pub fn refuses(&self, args: &[&str]) -> Refused {
        let mut command = serve(self.data.path());
        command.args(args);
        refused(command)
    }

    pub fn stderr(&self) -> &[String] {
        &self.stderr
    }

    pub fn data(&self) -> &Path {
        self.data.path()
    }

    pub fn into_data(self) -> TempDir {
        self.data
    }
}

/// The address that follows this on a line.
fn address(line: &str, after: &str) -> Option<SocketAddr> {
    let address = line.split_once(after)?.1;
    // Up to the next word, or to the end of a string in JSON.
    address.split([' ', '"']).next()?.parse().ok()
}

/// `kvs`, with none of the settings that happen to be in the environment, and a free port for its admin listener.
/// Backtraces are enabled, so that tests detect those that would be visible to clients.
pub fn kvs() -> Command {
    let mut command = Command::new(kvs_tests::binary());
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("KVS_")) {
        command.env_remove(name);
    }
    command.env("KVS_ADMIN", "127.0.0.1:0");
    // The `Host` of requests in tests.
    command.env("KVS_ADMIN_HOST", "kvs");
    // The same tests on several shards.
    if let Ok(shards) = std::env::var("KVS_TEST_SHARDS") {
        command.env("KVS_SHARDS", shards);
    }
    command.env("RUST_BACKTRACE", "1").stdin(Stdio::null()).stdout(Stdio::null());
    command
}

/// Another program that runs `kvs`, with the environment of `command`.
pub fn through(program: &str, command: &Command) -> Command {
    let mut other = Command::new(program);
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => other.env(name, value),
            None => other.env_remove(name),
        };
    }
    other.stdin(Stdio::null()).stdout(Stdio::null());
    other
}

/// `kvs serve` on a free port.
pub fn serve(data: &Path) -> Command {
    let mut command = kvs_at(data);
    command.args(["serve", "--listen", "127.0.0.1:0"]);
    command
}

/// Runs a command that must fail, with exactly one line in addition to those of earlier success.
pub fn refused(command: Command) -> Refused {
    let mut process = Process::spawn(command);
    if let Ok(line) = process.stderr.find(|line| line.contains("serving on").then(|| line.to_owned())) {
        panic!("it was to fail, but serves: {line}");
    }
    let status = process.wait();
    let said = process.stderr.so_far();
    let code = status.code().unwrap_or_else(|| panic!("{status}, after saying:\n{}", said.join("\n")));
    assert_ne!(code, 0, "it was to fail, but ended well, after saying:\n{}", said.join("\n"));
    let is_info = |line: &str| line.contains(" INFO ") || line.contains("\"INFO\"");
    // A start that can wait for something says so before it gives up.
    let is_retry = |line: &str| {
        line.contains(" WARN ") && (line.contains("retrying") || line.contains("expired, claiming the log"))
    };
    let failed: Vec<_> = said.iter().filter(|line| !is_info(line) && !is_retry(line)).collect();
    let [line] = failed[..] else {
        panic!("it failed with {code} as it should, but with {} lines instead of one:\n{}", said.len(), said.join("\n"))
    };
    Refused { code, line: line.clone() }
}

/// `kvs serve` on a new directory, with flags that must be rejected.
pub fn serve_refused(args: &[&str]) -> Refused {
    let data = TempDir::new().expect("a temporary directory can be made");
    let mut command = serve(data.path());
    command.args(args);
    refused(command)
}

impl Refused {
    /// Checks the exit code, and that the line contains all of this.
    #[track_caller]
    pub fn with(&self, code: i32, expected: &[&str]) {
        assert_eq!(self.code, code, "exit code; it said: {}", self.line);
        for text in expected {
            assert!(self.line.contains(text), "{text:?} is not in: {}", self.line);
        }
        assert!(self.line.len() < 600, "longer than a line for people: {}", self.line);
    }
}

impl Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "exit code {}: {}", self.code, self.line)
    }
}

/// A child process and its output. Killed when dropped.
pub struct Process {
    child: Child,
    pub stderr: Arc<Lines>,
}

impl Process {
    pub fn spawn(mut command: Command) -> Self {
        let mut child = command.stderr(Stdio::piped()).spawn().expect("the binary under test can be started");
        let stderr = Lines::of(child.stderr.take().expect("stderr is piped"));
        Self { child, stderr }
    }

    /// Waits until its admin listener is there.
    pub fn admin(&self) -> SocketAddr {
        let admin =
            self.stderr.find(|line| address(line, "admin on http://").or_else(|| address(line, "admin on https://")));
        admin.unwrap_or_else(|said| panic!("it ended before its admin listener was there; it said:\n{said}"))
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("a child that was not waited for can be signalled");
    }

    /// The processes it has started.
    pub fn children(&self) -> Vec<i32> {
        let id = self.child.id();
        let children = std::fs::read_to_string(format!("/proc/{id}/task/{id}/children")).expect("it is running");
        children.split_whitespace().map(|child| child.parse().expect("it is a number")).collect()
    }

    pub fn wait(&mut self) -> ExitStatus {
        self.stderr.end();
        self.child.wait().expect("a child can be waited for")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Fails only when it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() {
            eprintln!("the server said:\n{}", self.stderr.so_far().join("\n"));
        }
    }
}

/// Lines of a process, as it writes them.
#[derive(Default)]
pub struct Lines {
    state: Mutex<(Vec<String>, bool)>,
    changed: Condvar,
}

impl Lines {
    fn of(pipe: impl Read + Send + 'static) -> Arc<Self> {
        let lines = Arc::new(Self::default());
        let writer = Arc::clone(&lines);
        thread::spawn(move || {
            for line in BufReader::new(pipe).split(b'\n').map_while(Result::ok) {
                writer.state.lock().unwrap().0.push(String::from_utf8_lossy(&line).into_owned());
                writer.changed.notify_all();
            }
            writer.state.lock().unwrap().1 = true;
            writer.changed.notify_all();
        });
        lines
    }

    fn so_far(&self) -> Vec<String> {
        self.state.lock().unwrap().0.clone()
    }

    /// Waits for a line for which `Some` is returned; if the output ends before, returns all lines.
    pub fn find<T>(&self, mut wanted: impl FnMut(&str) -> Option<T>) -> Result<T, String> {
        let deadline = Instant::now() + PATIENCE;
        let mut seen = 0;
        let mut state = self.state.lock().unwrap();
        loop {
            let (lines, ended) = &*state;
            if let Some(found) = lines[seen..].iter().find_map(|line| wanted(line)) {
                return Ok(found);
            }
            seen = lines.len();
            let left = deadline.saturating_duration_since(Instant::now());
            if *ended || left.is_zero() {
                return Err(lines.join("\n"));
            }
            state = self.changed.wait_timeout(state, left).unwrap().0;
        }
    }

    fn end(&self) {
        let _ = self.find(|_| None::<()>);
        let ended = self.state.lock().unwrap().1;
        assert!(ended, "it did not end within {PATIENCE:?}; it said:\n{}", self.so_far().join("\n"));
    }
}
