//! `kvs upgrade`: replaces the process of a running server, without downtime.

use std::io;
use std::path::{self, PathBuf};
use std::time::Duration;

use anyhow::Result;
use serde_json::json;

use super::client::OutputArgs;
use crate::parse::duration;
use crate::upgrade::{Upgraded, request};

#[derive(Debug, clap::Args)]
pub struct Upgrade {
    /// Data directory of the server, which runs as the same user
    #[arg(long, env = "KVS_DATA_DIR", value_name = "DIR", default_value = "./data")]
    data_dir: PathBuf,

    /// Binary to run; without it, the one at the path that the server was started by
    #[arg(long, value_name = "FILE")]
    binary: Option<PathBuf>,

    /// Timeout of the start of the new process, which replays the log
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = duration)]
    timeout: Duration,

    #[command(flatten)]
    output: OutputArgs,
}

pub fn run(args: &Upgrade) -> Result<()> {
    let binary = args.binary.as_deref().map(path::absolute).transpose()?;
    let Upgraded { process, pause } = request(&args.data_dir, binary.as_deref(), args.timeout)?;
    let seconds = pause.as_secs_f64();
    let line = format!("process {process} serves; no call was made for {:.1}ms", seconds * 1e3);
    let object = || json!({ "process": process, "pause_seconds": seconds });
    args.output.output().print(Some(&line), object, &mut io::stdout())?;
    Ok(())
}
