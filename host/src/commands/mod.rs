//! The command line: one file per command, and the dispatch between them.
//!
//! Owns: names, flags and output of commands. Must never know: how a server or a log does its work.

mod add;
mod backup;
mod client;
mod compile;
mod complete;
mod delete;
mod export;
mod get;
#[cfg(feature = "compiler")]
mod guest;
mod health;
mod history;
mod import;
mod inspect;
mod list;
mod put;
mod read_only;
mod restore;
mod serve;
mod stats;
mod swap;
mod token;
mod touch;
mod txlog;
mod txn;
mod upgrade;
mod watch;

use std::collections::BTreeSet;
use std::env;

pub use self::complete::complete;
use anyhow::Result;
use clap::{CommandFactory, Parser, Subcommand};
use kvs_runtime::Env;
use rustix::fs::Mode;
use rustix::process::umask;
use strsim::jaro;

use crate::lines::{self, Format};
use crate::renamed;
use crate::settings::Serve;
use crate::terminal::ignore_broken_pipe;
use crate::upgrade::VARIABLE;

/// An in-memory key-value store with a durable transaction log, whose logic is a WebAssembly component.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 120, arg_required_else_help = true)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,

    /// Filter of diagnostics: error, warn, info, debug or trace, or directives like `info,kvs::edge=debug`
    #[arg(long, global = true, env = "KVS_LOG_FILTER", value_name = "FILTER", default_value = "info")]
    pub log_filter: String,

    /// Format of diagnostics: text, or json with an object per line
    #[arg(long, global = true, env = "KVS_LOG_FORMAT", value_name = "FORMAT", default_value = "text")]
    pub log_format: Format,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve a store over HTTP
    Serve(Box<Serve>),
    /// Create, list and revoke tokens of clients
    #[command(subcommand)]
    Token(token::TokenCommand),
    /// Replace the serving guest, without downtime
    Swap(swap::Swap),
    /// Replace the process of a running server by another binary, without downtime
    ///
    /// The new process gets the flags, the listeners and the log. If it fails, the server continues to serve. SIGUSR2 to the
    /// server does the same with the binary at the path that it was started by.
    Upgrade(upgrade::Upgrade),
    /// Check whether a server is ready; exit code 1 if it is not
    Health(health::Health),
    /// Compile a guest ahead of time, for a binary without a compiler
    Compile(compile::Compile),
    /// Describe a component, and check whether this host can run it
    Inspect(Box<inspect::Inspect>),
    /// Test a guest, without a server
    #[cfg(feature = "compiler")]
    #[command(subcommand)]
    Guest(guest::GuestCommand),
    /// Verify, print, count, export, import and compact a transaction log that no server uses
    #[command(subcommand)]
    Txlog(txlog::TxlogCommand),
    /// Take a backup of the log of a running server, in full or since a sequence, or check one
    ///
    /// Prints the sequence that the backup ends with.
    Backup(backup::Backup),
    /// Make a new log, in files or in a database, out of backups
    Restore(restore::Restore),
    /// Have a running server reject writes, for maintenance, or accept them again; kept over restarts
    ReadOnly(read_only::ReadOnly),
    /// Print every entry of a key that the log still has, oldest first, as JSON lines
    History(history::History),
    /// Print what a running server stores: live keys, the largest keys and prefixes, and garbage in the log
    ///
    /// The server reads its log at a sixteenth of a core, so that this can take minutes.
    Stats(stats::Stats),
    /// Print the value of a key, unchanged
    Get(get::Get),
    /// Put a value: kvs put KEY VALUE, kvs put KEY @FILE, or kvs put KEY < FILE; prints its entity tag
    Put(Box<put::Put>),
    /// Add to the number at a key, which counts as 0 if it does not exist; prints the sum
    Add(add::Add),
    /// Give the value of a key another time to live; prints its entity tag
    Touch(touch::Touch),
    /// Delete a key, or all keys with a prefix
    Delete(delete::Delete),
    /// Do several operations, all or nothing; prints the result of each
    Txn(txn::Txn),
    /// Print all keys, or those with a PREFIX, in order
    List(list::List),
    /// Print changes of all keys, or of those with one of the prefixes, as they happen
    Watch(watch::Watch),
    /// Print all keys, or those with a PREFIX, with their values, as JSON lines that `kvs import` reads
    ///
    /// The export is not a snapshot: a key that changes during the export is printed with its old or new value.
    Export(export::Export),
    /// Put the keys and values of JSON lines: {"key": "a", "value": "1"}, as `kvs export` prints them
    ///
    /// Beside `value`, or `value_base64`, a line can have `content_type`, and `ttl` in seconds or `expires` in milliseconds
    /// since 1970. Blank lines are skipped. A file is validated completely before the first put; the server can still reject a
    /// value, for its size or its type, and then the lines before it are stored. Progress is saved in FILE.kvs-import.
    Import(import::Import),
}

/// Runs a command to its end, in these surroundings.
pub fn run(cli: Cli, env: &Env) -> Result<()> {
    lines::begin(cli.log_format, &cli.log_filter, env)?;
    if matches!(cli.command, Command::Serve(_) | Command::Txlog(_) | Command::Backup(_) | Command::Restore(_)) {
        // Directories of data are 0700, and their files 0600, backups too.
        umask(Mode::RWXG | Mode::RWXO);
    }
    // Output that nobody reads any more is no failure: `kvs txlog cat | head`.
    ignore_broken_pipe(match cli.command {
        Command::Serve(args) => return serve::run(&args, env),
        Command::Token(command) => token::run(command),
        Command::Swap(args) => swap::run(&args),
        Command::Upgrade(args) => upgrade::run(&args),
        Command::Health(args) => health::run(&args),
        Command::Compile(args) => compile::run(&args),
        Command::Inspect(args) => inspect::run(&args),
        #[cfg(feature = "compiler")]
        Command::Guest(command) => guest::run(command, env),
        Command::Txlog(command) => txlog::run(command),
        Command::Backup(args) => backup::run(&args),
        Command::Restore(args) => restore::run(&args),
        Command::ReadOnly(args) => read_only::run(&args),
        Command::History(args) => history::run(&args),
        Command::Stats(args) => stats::run(&args),
        Command::Get(args) => get::run(&args),
        Command::Put(args) => put::run(*args),
        Command::Add(args) => add::run(&args),
        Command::Touch(args) => touch::run(&args),
        Command::Delete(args) => delete::run(&args),
        Command::Txn(args) => txn::run(&args),
        Command::List(args) => list::run(&args),
        Command::Watch(args) => watch::run(&args),
        Command::Export(args) => export::run(&args),
        Command::Import(args) => import::run(&args),
    })
}

/// Common prefix of the variables of all settings.
const PREFIX: &str = "KVS_";

/// Returns the reason to reject an environment variable with the prefix of the settings that is not one of them. In a pod,
/// only a server rejects the variables of a service: they would be in the way of every other command in the namespace.
pub fn unknown_variable(command: &Command) -> Option<String> {
    let is_server = matches!(command, Command::Serve(_));
    let mut known = BTreeSet::new();
    add_variables(&Cli::command(), &mut known);
    let given: BTreeSet<_> = env::vars_os().map(|(name, _)| name.to_string_lossy().into_owned()).collect();
    // Not a setting, but from the server that this one is to replace.
    known.insert(VARIABLE.to_owned());
    let mut unknown = given.into_iter().filter(|name| name.starts_with(PREFIX) && !known.contains(name));
    let unknown = unknown.find(|name| is_server || !is_service_link(name))?;
    if let Some(renamed) = renamed::variable(&unknown) {
        return Some(format!("the variable {renamed}"));
    }
    let nearest = known.iter().max_by(|a, b| jaro(a, &unknown).total_cmp(&jaro(b, &unknown)))?;
    let advice = if is_service_link(&unknown) {
        "give the pod enableServiceLinks: false".to_owned()
    } else {
        format!("is {nearest} meant? Unset it, or see kvs serve --help")
    };
    Some(format!("the variable {unknown} is not a setting of kvs; {advice}"))
}

/// Returns whether Kubernetes may have set this variable, as it does in every pod beside a service whose name begins with
/// `kvs`: `KVS_SERVICE_HOST`, `KVS_SERVICE_PORT_HTTP`, `KVS_PORT`, `KVS_PORT_8080_TCP_ADDR`.
fn is_service_link(name: &str) -> bool {
    let service = ["_SERVICE_HOST", "_SERVICE_PORT"].iter().any(|part| name.contains(part));
    let docker = name.ends_with("_PORT") || name.contains("_PORT_") && (name.contains("_TCP") || name.contains("_UDP"));
    env::var_os("KUBERNETES_SERVICE_HOST").is_some() && (service || docker)
}

fn add_variables(command: &clap::Command, known: &mut BTreeSet<String>) {
    let named = command.get_arguments().filter_map(|argument| argument.get_env());
    known.extend(named.map(|name| name.to_string_lossy().into_owned()));
    command.get_subcommands().for_each(|command| add_variables(command, known));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_line_definition_is_consistent() {
        Cli::command().debug_assert();
    }
}
