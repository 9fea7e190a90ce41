//! Servers whose background tasks and threads panic or are stuck, or whose clock is wrong. They run in a process of this test binary, since
//! the real binary cannot be made to panic: the same command line, in an environment of the test.

use std::env;
use std::io;
use std::mem;
use std::panic::catch_unwind;
use std::pin::Pin;
use std::process::{Command, abort, exit};
use std::sync::{Arc, Mutex};
use std::task::{Context, Wake, Waker};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use clap::Parser;
use kvs::commands::Cli;
use kvs::{commands, lines};
use kvs_runtime::{BoxedTask, BoxedWork, Clock, Env, Spawn, Tasks, Time};
use rustix::process::Signal;
use tempfile::TempDir;

use super::metrics::until;
use super::server::{Process, Server, serve, through};

/// Names of tasks and threads, separated by commas.
const TASKS: &str = "SABOTAGED_TASKS";
/// Arguments of the command, separated by line breaks.
const ARGUMENTS: &str = "SABOTAGED_ARGUMENTS";
/// The name of a [`Sabotage`]; without it they panic.
const KIND: &str = "SABOTAGED_HOW";
/// Seconds by which the clock is ahead.
const AHEAD: &str = "SABOTAGED_AHEAD";

/// What happens in a task or thread when it starts for the first time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Sabotage {
    Panic,
    /// A panic that aborts the process, as in the delivered build.
    Abort,
    /// A panic of the worker thread, after the task.
    PanicOfWorker,
    /// It never returns, and blocks its worker thread.
    Stick,
}

impl Sabotage {
    const ALL: [Self; 4] = [Self::Panic, Self::Abort, Self::PanicOfWorker, Self::Stick];

    fn happens(self, name: &str) {
        let sabotage = || panic!("sabotage of {name}");
        match self {
            Self::Panic => sabotage(),
            Self::Abort => {
                // The steps of a panic in the delivered build: the hook, which ends with the log lines, and the abort.
                let _ = catch_unwind(sabotage);
                lines::end();
                abort();
            }
            Self::PanicOfWorker => {
                // Workers wake those who wait for a timer, between two tasks.
                let waker = Waker::from(Arc::new(PanickingWaker(name.to_owned())));
                let mut timer = Box::pin(tokio::time::sleep(Duration::from_secs(1)));
                assert!(timer.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
                mem::forget(timer);
            }
            Self::Stick => loop {
                thread::park();
            },
        }
    }
}

struct PanickingWaker(String);

impl Wake for PanickingWaker {
    fn wake(self: Arc<Self>) {
        panic!("sabotage of {}", self.0);
    }
}

/// Lets something happen in each of these tasks and threads.
struct Saboteur {
    left: Mutex<Vec<String>>,
    kind: Sabotage,
}

impl Spawn for Saboteur {
    fn thread(&self, name: &str, work: BoxedWork) -> io::Result<()> {
        thread::Builder::new().name(name.into()).spawn(work).map(drop)
    }

    fn task(&self, _: &str, task: BoxedTask) {
        tokio::spawn(task);
    }

    fn begins(&self, name: &str) {
        let mut left = self.left.lock().expect("nobody panics with it");
        let Some(at) = left.iter().position(|left| left == name) else { return };
        left.remove(at);
        drop(left);
        self.kind.happens(name);
    }
}

/// A clock that is ahead of the system's by this time.
struct Ahead(Duration);

impl Time for Ahead {
    fn now(&self) -> Instant {
        Instant::now()
    }

    fn wall(&self) -> SystemTime {
        SystemTime::now() + self.0
    }

    fn sleep(&self, time: Duration) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        Box::pin(tokio::time::sleep(time))
    }
}

/// A command of `kvs`, run by this binary.
fn here(command: &Command) -> Command {
    let arguments: Vec<_> = command.get_args().map(|argument| argument.to_str().expect("it is text")).collect();
    let program = env::current_exe().expect("this program has a path");
    let mut other = through(program.to_str().expect("it is text"), command);
    other.env(ARGUMENTS, arguments.join("\n"));
    other.args(["--exact", "support::sabotage::command", "--ignored", "--nocapture"]);
    other
}

/// A command of `kvs` in which tasks and threads of these names panic once.
pub fn sabotaged(tasks: &[&str], command: &Command) -> Command {
    let mut other = here(command);
    other.env(TASKS, tasks.join(","));
    other
}

/// As `sabotaged`, but this happens.
pub fn sabotaged_by(kind: Sabotage, tasks: &[&str], command: &Command) -> Command {
    let mut other = sabotaged(tasks, command);
    other.env(KIND, format!("{kind:?}"));
    other
}

/// A command of `kvs`, whose clock is ahead by this time.
pub fn ahead(by: Duration, command: &Command) -> Command {
    let mut other = here(command);
    other.env(AHEAD, by.as_secs().to_string());
    other
}

#[test]
#[ignore = "the process that other tests start"]
fn command() {
    let Ok(arguments) = env::var(ARGUMENTS) else { return };
    let cli = Cli::parse_from(["kvs"].into_iter().chain(arguments.lines()));
    let mut env = Env::real();
    if let Ok(tasks) = env::var(TASKS) {
        let left = Mutex::new(tasks.split(',').map(str::to_owned).collect());
        let kind =
            env::var(KIND).ok().and_then(|name| Sabotage::ALL.into_iter().find(|kind| format!("{kind:?}") == name));
        env.tasks = Tasks::given(Arc::new(Saboteur { left, kind: kind.unwrap_or(Sabotage::Panic) }));
    }
    if let Ok(seconds) = env::var(AHEAD) {
        env.clock = Clock::given(Arc::new(Ahead(Duration::from_secs(seconds.parse().expect("it is a number")))));
    }
    let format = cli.log_format;
    if let Err(error) = commands::run(cli, &env) {
        lines::failed(format, &format!("{error:#}"));
        lines::end();
        exit(1);
    }
    lines::end();
}

/// A server in a directory of its own, whose tasks and threads of these names panic once. It need not become ready.
pub fn spawn(tasks: &[&str], args: &[&str]) -> (Process, TempDir) {
    let data = TempDir::new().expect("a temporary directory can be made");
    let mut command = serve(data.path());
    command.args(args);
    (Process::spawn(sabotaged(tasks, &command)), data)
}

/// A server whose tasks and threads of these names panic once.
pub fn start(tasks: &[&str], args: &[&str]) -> Server {
    let data = TempDir::new().expect("a temporary directory can be made");
    let mut command = serve(data.path());
    command.args(args);
    Server::spawn(sabotaged(tasks, &command), data)
}

/// Waits until a task of this name was started again.
pub fn starts_again(server: &Server, task: &str) {
    let name = format!("kvs_task_restarts_total{{task=\"{task}\"}}");
    until(server, &format!("{task} was started again"), |metrics| metrics.find(&name) == Some(1.0));
}

/// Waits for a line that contains all of this.
pub fn says(process: &Process, texts: &[&str]) {
    let has_all = |line: &str| texts.iter().all(|text| line.contains(text)).then_some(());
    process.stderr.find(has_all).unwrap_or_else(|said| panic!("it never said {texts:?}, but:\n{said}"));
}

/// Checks that a server ends when an essential task of the log panics.
pub fn ends_servers(args: &[&str]) {
    for (task, signal) in [("log writer", None), ("log closing", Some(Signal::TERM))] {
        let (mut process, _data) = spawn(&[task], args);
        if let Some(signal) = signal {
            says(&process, &["serving on http"]);
            process.signal(signal);
        }
        let status = process.wait();
        says(&process, &["kvs: ", &format!("sabotage of {task}")]);
        assert_eq!(status.code(), Some(1), "{task}");
    }
}
