//! `kvs guest`: tests a guest.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use bytesize::ByteSize;
use kvs_runtime::Env;
use kvs_txlog::TransactionLog;
use kvs_txlog::file::Offline;

use super::client::OutputArgs;
use crate::guest::{TestPlan, TestRequest, test};
use crate::settings::Guest;
use crate::terminal::bar;

#[derive(Debug, clap::Subcommand)]
pub enum GuestCommand {
    /// Find the mistakes of a guest that its own tests miss; exit code 1 if there are any
    ///
    /// Sends generated requests to two instances of the guest, of which one is rebuilt from the log again and again, and compares
    /// what they do: what was acknowledged is there after a rebuild, replays have one result, a refused append changes nothing,
    /// and responses declared reusable are right. Nothing is listened on or stored.
    Test(Box<Test>),
}

#[derive(Debug, clap::Args)]
pub struct Test {
    #[command(flatten)]
    guest: Guest,

    /// Number of requests
    #[arg(long, value_name = "COUNT", default_value = "3000", value_parser = clap::value_parser!(u64).range(1..))]
    requests: u64,

    /// Seed of the requests; the report has it. Without it, a random one
    #[arg(long, value_name = "NUMBER")]
    seed: Option<u64>,

    /// File of requests to send among the generated ones: METHOD TARGET [BODY] in each line
    #[arg(long, value_name = "FILE")]
    requests_from: Option<PathBuf>,

    /// Replay the log of this directory too, which no server may use; it is not changed
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,

    #[command(flatten)]
    output: OutputArgs,
}

pub fn run(command: GuestCommand, env: &Env) -> Result<()> {
    let GuestCommand::Test(args) = command;
    let Test { guest, requests, seed, requests_from, data_dir, output } = *args;
    // The usual maximum size of a value: the memory that a guest must leave free depends on it.
    let limits = guest.limits(ByteSize::mib(1), 1)?;
    let seed = seed.map_or_else(|| env.random.u64().map(|seed| seed % 1_000_000), Ok)?;
    let given = match requests_from {
        None => Vec::new(),
        Some(file) => {
            let text = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
            TestRequest::parse_all(&text).with_context(|| file.display().to_string())?
        }
    };
    let log = data_dir.map(|directory| Offline::open(&directory)).transpose()?;
    let log = log.map(|log| Arc::new(log) as Arc<dyn TransactionLog>);
    let bar = bar(requests, "requests");
    let plan = TestPlan { seed, requests, given, log };
    let report =
        test(guest.source(), limits, guest.guest_config.clone(), plan, env, &|number| bar.set_position(number))?;
    bar.finish_and_clear();
    let printed = output.output().print(Some(report.text().trim_end()), || report.json(), &mut io::stdout().lock());
    let failed = report.failed();
    ensure!(failed == 0, "{failed} of the checks failed; repeat with --seed {seed} --requests {requests}");
    Ok(printed?)
}
