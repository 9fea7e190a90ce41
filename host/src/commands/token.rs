//! `kvs token`: creates, lists and revokes tokens of clients.

use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::SystemTime;

use anyhow::{Result, anyhow, ensure};
use bytesize::ByteSize;
use kvs_runtime::Env;
use rustix::fs::{fstat, stat};
use serde_json::json;

use super::client::OutputArgs;
use crate::audit;
use crate::edge::auth::{self, Limits, Prefix, Scope, check_key_prefix};
use crate::guest::Quota;
use crate::parse::expiry;

#[derive(Debug, clap::Subcommand)]
pub enum TokenCommand {
    /// Create a token: the file gets its hash, and the token itself is printed once
    ///
    /// Several tokens can have one name: create the next, give it to the client, then revoke the old one by its id.
    Create {
        /// Name of the owner, the principal of its requests
        name: String,
        /// Scope
        #[arg(long, default_value = "read")]
        scope: Scope,
        /// Prefix of the allowed paths
        #[arg(long, value_name = "PREFIX")]
        path_prefix: Option<String>,
        /// Prefix of the allowed keys, with guests that declare the capability key-prefix
        #[arg(long, value_name = "PREFIX", value_parser = check_key_prefix, conflicts_with = "path_prefix")]
        key_prefix: Option<String>,
        /// Quota: number of keys with the key prefix. Beyond it, puts of new keys get 507
        #[arg(long, value_name = "COUNT", requires = "key_prefix")]
        max_keys: Option<u64>,
        /// Quota: size of the keys with the key prefix and their values. Beyond it, puts that add to it get 507
        #[arg(long, value_name = "SIZE", requires = "key_prefix")]
        max_bytes: Option<ByteSize>,
        /// Expiry: a time from now such as 90days or 3600 (seconds), or a date such as 2027-01-31
        #[arg(long, value_name = "TIME", value_parser = expiry)]
        expires: Option<SystemTime>,
        #[command(flatten)]
        output: OutputArgs,
        #[command(flatten)]
        file: TokenFile,
    },
    /// List the tokens: id, name, scope, expiry, prefix and quota
    List {
        #[command(flatten)]
        output: OutputArgs,
        #[command(flatten)]
        file: TokenFile,
    },
    /// Revoke all tokens of a name, or the one with an id that `kvs token list` prints
    Revoke {
        #[arg(value_name = "NAME|ID")]
        name: String,
        #[command(flatten)]
        output: OutputArgs,
        #[command(flatten)]
        file: TokenFile,
    },
}

#[derive(Debug, clap::Args)]
pub struct TokenFile {
    /// Token file; `create` makes it if it does not exist
    #[arg(long, env = "KVS_TOKENS", value_name = "FILE")]
    tokens: PathBuf,
}

pub fn run(command: TokenCommand) -> Result<()> {
    match command {
        TokenCommand::Create { name, scope, path_prefix, key_prefix, max_keys, max_bytes, expires, output, file } => {
            // A broken pipe is a failure here, and so is /dev/null, which stands in for a closed output: nobody would know the token.
            let show = |token: &str| {
                ensure!(!is_null(&io::stdout()), "the token would be printed to /dev/null, none was created");
                let printed = output.output().print(Some(token), || json!({ "token": token }), &mut io::stdout());
                printed.map_err(|error| anyhow!("cannot print the token, none was created: {error}"))
            };
            let prefix = key_prefix.map(|prefix| Prefix::Key(prefix.into()));
            let quota = Quota { keys: max_keys, bytes: max_bytes.map(|bytes| bytes.as_u64()) };
            let quota = (quota != Quota::default()).then_some(quota);
            let limits = Limits { prefix: prefix.or(path_prefix.map(Prefix::Path)), quota, expires };
            let created = auth::create(&file.tokens, &name, scope, &limits, &Env::real().random, show);
            audit::outcome("token-create", name, created)
        }
        TokenCommand::List { output, file } => auth::list(&file.tokens, output.output(), &mut io::stdout().lock()),
        TokenCommand::Revoke { name, output, file } => {
            let revoked = auth::revoke(&file.tokens, &name);
            // With their ids, since several can have one name.
            let words = |(name, id): &(String, String)| format!("{name} {id}");
            let tokens =
                revoked.as_ref().map_or(name, |revoked| revoked.iter().map(words).collect::<Vec<_>>().join(", "));
            for (name, id) in audit::outcome("token-revoke", tokens, revoked)? {
                output.output().print(None, || json!({ "revoked": id, "name": name }), &mut io::stdout())?;
            }
            Ok(())
        }
    }
}

/// Returns whether this is the null device.
fn is_null(output: &impl AsFd) -> bool {
    let null = stat("/dev/null").map(|null| null.st_rdev);
    fstat(output).is_ok_and(|output| Ok(output.st_rdev) == null)
}
