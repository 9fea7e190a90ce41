//! `kvs txlog stats`: prints what a log stores that no server uses.

use std::io::Write;

use anyhow::Result;
use kvs_runtime::Env;
use kvs_txlog::stats::measure;

use super::StorageArgs;
use crate::commands::stats::ReportArgs;
use crate::stats_report;
use crate::terminal::bar;

/// Size of the table of live keys: larger than that of a server, which has the store in memory.
const TABLE_BYTES: usize = 512 << 20;

#[derive(Debug, clap::Args)]
pub struct Stats {
    #[command(flatten)]
    at: StorageArgs,

    /// Count only keys that begin so
    #[arg(long, value_name = "PREFIX", default_value = "", hide_default_value = true)]
    prefix: String,

    #[command(flatten)]
    report: ReportArgs,
}

pub fn run(args: &Stats, out: &mut dyn Write) -> Result<()> {
    let log = args.at.open()?;
    let query = args.report.query(&args.prefix, Env::real().clock.unix_ms());
    let bar = bar(log.appended(), "entries");
    let mut current = 1;
    let stats = measure(&*log, &query, TABLE_BYTES, &mut |pass, sequence| {
        if pass != current {
            current = pass;
            bar.set_message(format!("entries in pass {pass}"));
        }
        bar.set_position(sequence);
        Ok(())
    })?;
    bar.finish_and_clear();
    args.report.print(&stats_report::json(&stats, &query), out)
}
