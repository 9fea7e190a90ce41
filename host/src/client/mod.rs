//! The client: `kvs get`, `put`, `delete`, `list`, `watch`, `load` and `dump`, for people at a terminal and for pipes.
//!
//! Knows a server by its interface alone: nothing here reads a log or calls a guest.

mod list;
mod load;
mod mark;
mod record;
mod server;
mod value;
mod watch;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;

pub use self::server::{Ask, Failure, Server, Token};
use self::value::{Condition, Put};
use crate::terminal::unless_nobody_reads;

/// How long a server may say nothing; one that streams says something far more often.
const SILENCE: Duration = Duration::from_secs(60);

#[derive(Debug, clap::Subcommand)]
pub enum ClientCommand {
    /// Print the value of a key, as it is
    Get {
        key: String,
        #[command(flatten)]
        at: At,
    },
    /// Put a value: kvs put KEY VALUE, kvs put KEY @FILE, or kvs put KEY < FILE; prints its entity tag
    Put {
        key: String,
        #[command(flatten)]
        put: Box<Put>,
        #[command(flatten)]
        at: At,
    },
    /// Delete a key
    Delete {
        key: String,
        #[command(flatten)]
        condition: Condition,
        #[command(flatten)]
        at: At,
    },
    /// Print all keys, or those that begin with PREFIX, in order
    List {
        #[arg(default_value = "", hide_default_value = true)]
        prefix: String,
        /// One object a line, with entity tag, size, and when the key expires in milliseconds since 1970
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        at: At,
    },
    /// Print what happens to all keys, or those that begin with PREFIX, as it happens
    Watch {
        #[arg(default_value = "", hide_default_value = true)]
        prefix: String,
        /// Begin after this sequence, rather than now
        #[arg(long, value_name = "SEQUENCE")]
        since: Option<u64>,
        /// One object a line; a value that is not text is `value_base64`
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        at: At,
    },
    /// Put what lines of JSON say: {"key": "a", "value": "1"}, as `kvs dump` prints them
    ///
    /// Beside `value`, or `value_base64`, a line can have `content_type`, and `ttl` in seconds or `expires` in milliseconds
    /// since 1970. A file is checked whole before anything is put. How far a load came is kept in FILE.kvs-load.
    Load {
        /// The file to read; - is standard input
        #[arg(default_value = "-", hide_default_value = true)]
        file: PathBuf,
        /// Go on where a load of this file was interrupted, if it was
        #[arg(long)]
        resume: bool,
        #[command(flatten)]
        at: At,
    },
    /// Print all keys, or those that begin with PREFIX, with their values, as JSON that `kvs load` reads
    ///
    /// Keys that change meanwhile are printed as they are before or after.
    Dump {
        #[arg(default_value = "", hide_default_value = true)]
        prefix: String,
        #[command(flatten)]
        at: At,
    },
}

/// Which server, and how it is told who asks.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Server")]
pub struct At {
    /// The server
    #[arg(long, env = "KVS_URL", value_name = "URL", default_value = "http://127.0.0.1:8080")]
    url: String,

    #[command(flatten)]
    token: Token,

    /// Trust servers whose certificates these authorities issued, in PEM, in place of those that the system trusts
    #[arg(long, env = "KVS_CACERT", value_name = "FILE")]
    cacert: Option<PathBuf>,
}

impl At {
    fn server(&self) -> Result<Server> {
        Server::new(&self.url, "--url", &self.token, self.cacert.as_deref(), Some(SILENCE))
    }
}

pub fn run(command: ClientCommand) -> Result<()> {
    unless_nobody_reads(match command {
        ClientCommand::Get { key, at } => value::get(&at.server()?, &key),
        ClientCommand::Put { key, put, at } => value::put(&at.server()?, &key, &put),
        ClientCommand::Delete { key, condition, at } => value::delete(&at.server()?, &key, &condition),
        ClientCommand::List { prefix, json, at } => list::list(&at.server()?, &prefix, json),
        ClientCommand::Watch { prefix, since, json, at } => watch::watch(&at.server()?, &prefix, since, json),
        ClientCommand::Load { file, resume, at } => load::load(&at.server()?, &file, resume),
        ClientCommand::Dump { prefix, at } => list::dump(&at.server()?, &prefix),
    })
}
