//! The binary: reads the command line, runs the command, and tells how it ended.

use std::process::ExitCode;

use anyhow::Result;
use bytesize::ByteSize;
use clap::Parser;
use clap::error::ErrorKind;
use kvs::cli::{Cli, Command, unknown_variable};
use kvs::lines::{self, Format};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Exit codes beside 0: the command failed, or was not understood.
const FAILED: u8 = 1;
const USAGE: u8 = 2;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) if error.use_stderr() && error.kind() != ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            // What is wrong and what was perhaps meant; how else to use it is a command away.
            let rendered = error.to_string();
            let paragraphs = rendered.split("\n\n").map(str::trim);
            let told = paragraphs.take_while(|text| !text.starts_with("Usage:") && !text.starts_with("For more"));
            let told = told.collect::<Vec<_>>().join("; ");
            return fail(USAGE, Format::Text, &format!("{}; see kvs --help", told.trim_start_matches("error: ")));
        }
        Err(help_or_version) => help_or_version.exit(),
    };
    let format = cli.log_format;
    if let Some(unknown) = unknown_variable() {
        return fail(USAGE, format, &unknown);
    }
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(FAILED, format, &format!("{error:#}")),
    }
}

/// Tells it in one line, whatever the libraries below put into their messages.
fn fail(code: u8, format: Format, reason: &str) -> ExitCode {
    lines::failed(format, &reason.split_whitespace().collect::<Vec<_>>().join(" "));
    ExitCode::from(code)
}

fn run(cli: Cli) -> Result<()> {
    lines::begin(cli.log_format, &cli.log_filter)?;
    match cli.command {
        Command::Serve(args) => kvs::serve::run(&args),
        Command::Token(command) => kvs::edge::auth::run(command),
        Command::Swap(args) => kvs::admin::command::swap(&args),
        Command::Health(args) => kvs::admin::command::health(&args),
        Command::Compile(args) => kvs::guest::compile(&args),
        Command::Inspect(args) => {
            // What is sent to it makes no difference to whether it fits.
            let limits = args.guest.limits(ByteSize(0))?;
            kvs::guest::inspect(&args.guest.source(), limits, args.guest.guest_config)
        }
        Command::Log(command) => kvs::log::command::run(command),
        Command::Client(command) => kvs::client::run(command),
    }
}
