//! `kvs token`: creates tokens for clients.

use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::{Result, anyhow};
use kvs_runtime::Env;

use crate::audit::{self, Actor};
use crate::edge::auth::{self, Scope};

#[derive(Debug, clap::Subcommand)]
pub enum TokenCommand {
    /// Create a token: the file gets its hash, and the token itself is printed once
    Create {
        /// Name of the owner, the principal of its requests
        name: String,
        /// Scope
        #[arg(long, default_value = "read")]
        scope: Scope,
        /// Prefix of the allowed paths
        #[arg(long, value_name = "PREFIX")]
        path_prefix: Option<String>,
        /// Token file, created if it does not exist
        #[arg(long, env = "KVS_TOKENS", value_name = "FILE")]
        tokens: PathBuf,
    },
}

pub fn run(command: TokenCommand) -> Result<()> {
    let TokenCommand::Create { name, scope, path_prefix, tokens } = command;
    // A broken pipe is a failure here: nobody would know the token.
    let show = |token: &str| {
        writeln!(io::stdout(), "{token}").map_err(|error| anyhow!("cannot print the token, none was created: {error}"))
    };
    auth::create(&tokens, &name, scope, path_prefix.as_deref(), &Env::real().random, show)?;
    audit::log(&Actor::user(), "token-create", name, "success");
    Ok(())
}
