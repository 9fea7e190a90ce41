//! `kvs stats`: prints what a running server stores, counted in its log.

use std::io::{self, Write};

use anyhow::{Context, Result};
use clap::builder::NonEmptyStringValueParser;
use kvs_client::{ApiRequest, Output, add_parameter};
use kvs_txlog::stats::Query;
use serde_json::Value;

use super::client::{AdminArgs, OutputArgs};
use super::complete::keys;
use crate::admin::MAX_TOP;
use crate::stats_report;

#[derive(Debug, clap::Args)]
pub struct Stats {
    /// Count only keys that begin so
    #[arg(long, value_name = "PREFIX", default_value = "", hide_default_value = true, add = keys())]
    prefix: String,

    #[command(flatten)]
    report: ReportArgs,

    #[command(flatten)]
    admin: AdminArgs,
}

/// Contents and format of statistics.
#[derive(Debug, clap::Args)]
pub struct ReportArgs {
    /// End of the prefixes by which keys are grouped: the first one after PREFIX
    #[arg(long, value_name = "TEXT", default_value = "/", value_parser = NonEmptyStringValueParser::new())]
    delimiter: String,

    /// Number of largest keys, and of largest prefixes, 1 to 1000
    #[arg(long, value_name = "COUNT", default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_TOP)))]
    top: u16,

    #[command(flatten)]
    output: OutputArgs,
}

impl ReportArgs {
    pub fn query(&self, prefix: &str, now: u64) -> Query {
        Query { prefix: prefix.to_owned(), delimiter: self.delimiter.clone(), top: self.top.into(), now }
    }

    pub fn print(&self, report: &Value, out: &mut dyn Write) -> Result<()> {
        match self.output.output() {
            Output::Text => write!(out, "{}", stats_report::tables(report)?)?,
            Output::Json => writeln!(out, "{report}")?,
        }
        Ok(())
    }
}

pub fn run(args: &Stats) -> Result<()> {
    // No read timeout: the server reads its whole log before it responds.
    let server = args.admin.server(None)?;
    let mut target = "/stats".to_owned();
    add_parameter(&mut target, "prefix", &args.prefix);
    add_parameter(&mut target, "delimiter", &args.report.delimiter);
    add_parameter(&mut target, "top", &args.report.top.to_string());
    let request = ApiRequest { method: "GET", target: &target, headers: &[], body: None };
    let response = server.send(&request).context("no statistics")?;
    let report = serde_json::from_reader(response.into_body().into_reader()).context("no statistics")?;
    args.report.print(&report, &mut io::stdout().lock())
}
