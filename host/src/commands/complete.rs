//! Completion in shells: `COMPLETE=bash kvs` prints a script, which runs the binary again for what can follow the words of a
//! command line. Names of keys come from the server.

use std::ffi::OsStr;
use std::time::Duration;

use clap::{CommandFactory, Parser};
use clap_complete::{ArgValueCompleter, CompleteEnv, CompletionCandidate};
use kvs_client::{ListOptions, Output};

use super::Cli;
use super::client::ServerArgs;

/// Read timeout of the server, for which the shell waits.
const TIMEOUT: Duration = Duration::from_secs(2);
/// Maximum number of keys that are proposed.
const MAX_KEYS: u64 = 200;

/// Prints what a shell asks for, and ends the process. Returns when no shell does.
pub fn complete() {
    CompleteEnv::with_factory(Cli::command).complete();
}

/// Completes the name of a key, or a prefix of names.
pub fn keys() -> ArgValueCompleter {
    // A server that cannot be used has no keys to propose; the command itself reports why.
    ArgValueCompleter::new(|word: &OsStr| proposed(word).unwrap_or_default())
}

/// The server of the variables. The command line is not finished, and not parsed.
#[derive(Parser)]
struct Variables {
    #[command(flatten)]
    server: ServerArgs,
}

fn proposed(word: &OsStr) -> Option<Vec<CompletionCandidate>> {
    let server = Variables::try_parse_from(["kvs"]).ok()?.server.server_within(TIMEOUT).ok()?;
    let limit = Some(MAX_KEYS);
    let options = ListOptions { prefix: word.to_str()?, limit, reverse: false, long: false, output: Output::Text };
    let mut keys = Vec::new();
    kvs_client::list(&server, &options, &mut keys).ok()?;
    Some(str::from_utf8(&keys).ok()?.lines().map(CompletionCandidate::new).collect())
}
