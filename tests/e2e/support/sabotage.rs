//! Servers of which background tasks and threads panic. They run in another process of this test binary, since nothing in the
//! binary under test can make it panic: the same command line, in surroundings that are the test's.

use std::env;
use std::io;
use std::process::{Command, exit};
use std::sync::{Arc, Mutex};
use std::thread;

use clap::Parser;
use kvs::commands::Cli;
use kvs::{commands, lines};
use kvs_runtime::{BoxedTask, BoxedWork, Env, Spawn, Tasks};
use tempfile::TempDir;

use super::metrics::until;
use super::server::{Process, Server, serve, through};

/// Names of tasks and threads, separated by commas.
const TASKS: &str = "SABOTAGED_TASKS";
/// Arguments of the command, separated by line breaks.
const ARGUMENTS: &str = "SABOTAGED_ARGUMENTS";

/// Ends each of these by panic when it begins for the first time.
struct Saboteur(Mutex<Vec<String>>);

impl Spawn for Saboteur {
    fn thread(&self, name: &str, work: BoxedWork) -> io::Result<()> {
        thread::Builder::new().name(name.into()).spawn(work).map(drop)
    }

    fn task(&self, _: &str, task: BoxedTask) {
        tokio::spawn(task);
    }

    fn begins(&self, name: &str) {
        let mut left = self.0.lock().expect("nobody panics with it");
        let Some(at) = left.iter().position(|left| left == name) else { return };
        left.remove(at);
        drop(left);
        panic!("sabotage of {name}");
    }
}

/// A command of `kvs`, whose tasks and threads of these names panic once.
pub fn sabotaged(tasks: &[&str], command: &Command) -> Command {
    let arguments: Vec<_> = command.get_args().map(|argument| argument.to_str().expect("it is text")).collect();
    let program = env::current_exe().expect("this program has a path");
    let mut other = through(program.to_str().expect("it is text"), command);
    other.env(TASKS, tasks.join(",")).env(ARGUMENTS, arguments.join("\n"));
    other.args(["--exact", "support::sabotage::command", "--ignored", "--nocapture"]);
    other
}

#[test]
#[ignore = "the process that other tests start"]
fn command() {
    let (Ok(tasks), Ok(arguments)) = (env::var(TASKS), env::var(ARGUMENTS)) else { return };
    let saboteur = Saboteur(Mutex::new(tasks.split(',').map(str::to_owned).collect()));
    let cli = Cli::parse_from(["kvs"].into_iter().chain(arguments.lines()));
    let env = Env { tasks: Tasks::given(Arc::new(saboteur)), ..Env::real() };
    let format = cli.log_format;
    if let Err(error) = commands::run(cli, &env) {
        lines::failed(format, &format!("{error:#}"));
        lines::end();
        exit(1);
    }
    lines::end();
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

/// Waits for a line that holds all of this.
pub fn says(process: &Process, texts: &[&str]) {
    let has_all = |line: &str| texts.iter().all(|text| line.contains(text)).then_some(());
    process.stderr.find(has_all).unwrap_or_else(|said| panic!("it never said {texts:?}, but:\n{said}"));
}
