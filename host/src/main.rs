//! The binary: reads the command line, runs the command, and tells how it ended.

use std::io::{IsTerminal, stderr};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use kvs::cli::{Cli, Command};
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    // A usage error ends here, with 2.
    let cli = Cli::parse();
    match run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // One line, whatever the libraries below put into their messages.
            let message = format!("{error:#}");
            eprintln!("kvs: {}", message.split_whitespace().collect::<Vec<_>>().join(" "));
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<()> {
    let filter = EnvFilter::try_new(&cli.log_filter).with_context(|| format!("--log-filter {}", cli.log_filter))?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_target(false)
        .with_ansi(stderr().is_terminal())
        .with_writer(stderr)
        .init();
    match &cli.command {
        Command::Serve(args) => kvs::serve::run(args),
    }
}
