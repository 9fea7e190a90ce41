//! The binary: reads the command line, runs the command, and reports how it ended.

use std::process::ExitCode;

use clap::Parser;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use kvs::commands::{self, Cli, unknown_variable};
use kvs::lines::{self, Format};
use kvs::renamed;
use kvs_runtime::Env;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Exit codes beside 0: the command failed, or was not understood.
const FAILED: u8 = 1;
const USAGE: u8 = 2;

fn main() -> ExitCode {
    commands::complete();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) if error.use_stderr() && error.kind() != ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            if let Some(renamed) = renamed_in(&error) {
                return fail(USAGE, Format::Text, &format!("{renamed}; see kvs --help"));
            }
            // What is wrong and what was perhaps meant; how else to use it is a command away.
            let rendered = error.to_string();
            let paragraphs = rendered.split("\n\n").map(str::trim);
            let reason = paragraphs.take_while(|text| !text.starts_with("Usage:") && !text.starts_with("For more"));
            let reason = reason.collect::<Vec<_>>().join("; ");
            return fail(USAGE, Format::Text, &format!("{}; see kvs --help", reason.trim_start_matches("error: ")));
        }
        Err(help_or_version) => help_or_version.exit(),
    };
    let format = cli.log_format;
    if let Some(unknown) = unknown_variable(&cli.command) {
        return fail(USAGE, format, &unknown);
    }
    match commands::run(cli, &Env::real()) {
        Ok(()) => {
            lines::end();
            ExitCode::SUCCESS
        }
        Err(error) => fail(FAILED, format, &format!("{error:#}")),
    }
}

/// Tells it in one line, whatever the libraries below put into their messages.
fn fail(code: u8, format: Format, reason: &str) -> ExitCode {
    lines::failed(format, &reason.split_whitespace().collect::<Vec<_>>().join(" "));
    lines::end();
    ExitCode::from(code)
}

/// The new name of what was not understood, when it is a former name.
fn renamed_in(error: &clap::Error) -> Option<String> {
    let text = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.as_str()),
        _ => None,
    };
    match error.kind() {
        ErrorKind::UnknownArgument => renamed::flag(text(ContextKind::InvalidArg)?),
        ErrorKind::InvalidSubcommand => {
            let name = text(ContextKind::InvalidSubcommand)?;
            // The words before it are in the usage.
            let usage = error.get(ContextKind::Usage)?.to_string();
            let before = usage.split_whitespace().skip_while(|word| *word != "kvs");
            let before = before.take_while(|word| !word.starts_with(['[', '<', '-']));
            renamed::command(&before.chain([name]).collect::<Vec<_>>().join(" "))
        }
        _ => None,
    }
}
