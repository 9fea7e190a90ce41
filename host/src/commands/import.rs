//! `kvs import`: puts the keys and values of JSON lines, or of another store.

use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::ensure;
use kvs_client::{Copied, ImportHooks, Origin, Output};
use kvs_txlog::subscribers::GUEST_KEY;
use serde_json::json;

use super::client::{OutputArgs, ServerArgs};
use crate::guest::check_key;
use crate::lines::notice;
use crate::terminal::bar;

#[derive(Debug, clap::Args)]
pub struct Import {
    /// File to read; - is standard input
    #[arg(default_value = "-", hide_default_value = true)]
    file: PathBuf,

    /// Copy all keys of another store once: redis://[USER:PASSWORD@]HOST[:PORT][/DATABASE], etcd://[USER:PASSWORD@]HOST[:PORT] or
    /// consul://[TOKEN@]HOST[:PORT]; rediss, etcds and consuls over TLS
    #[arg(long, env = "KVS_IMPORT_FROM", hide_env_values = true, value_name = "URL", conflicts_with_all = ["file", "resume"])]
    from: Option<Origin>,

    /// Resume an interrupted import of this file, if there was one
    #[arg(long)]
    resume: bool,

    #[command(flatten)]
    output: OutputArgs,

    #[command(flatten)]
    server: ServerArgs,
}

pub fn run(args: &Import) -> anyhow::Result<()> {
    let report = |line: &str| notice(format_args!("kvs: {line}"));
    let check_key = |key: &str| match check_key(key) {
        Ok(()) if key.starts_with(GUEST_KEY) => Err("keys that begin with U+0001 are kept for guests".to_owned()),
        checked => checked.map_err(|error| error.to_string()),
    };
    let hooks = ImportHooks { bar, check_key, report };
    let server = args.server.server()?;
    let output = args.output.output();
    if let Some(origin) = &args.from {
        let Copied { imported, left_out } = kvs_client::import_from(&server, origin, args.server.authorities(), hooks)?;
        let printed = match output {
            Output::Text => {
                notice(format_args!("imported {imported} keys"));
                Ok(())
            }
            Output::Json => writeln!(io::stdout(), "{}", json!({ "imported": imported, "left_out": left_out })),
        };
        ensure!(left_out == 0, "{left_out} keys of {origin} were left out");
        return Ok(printed?);
    }
    let lines = kvs_client::import(&server, &args.file, args.resume, hooks)?;
    match output {
        Output::Text => notice(format_args!("imported {lines} lines")),
        Output::Json => writeln!(io::stdout(), "{}", json!({ "imported": lines }))?,
    }
    Ok(())
}
