//! Documents generated from the definition of the command line: man pages, shell completions, and the table of settings.
//!
//! `cargo run --release --example documents -- DIR` writes all of them. The table is also docs/settings.md, which a test
//! compares; `just settings` writes it again. The other tests check the pages that people write, README.md and the book.

use std::fmt::Write as _;
use std::fs::File;
use std::path::PathBuf;
use std::{env, fs};

use anyhow::{Context, Result};
use clap::{Arg, Command, CommandFactory};
use clap_complete::env::Shells;
use kvs::commands::Cli;

fn main() -> Result<()> {
    let directory = PathBuf::from(env::args_os().nth(1).context("missing argument: the directory to write to")?);
    let (pages, completions) = (directory.join("man"), directory.join("completions"));
    fs::create_dir_all(&pages)?;
    fs::create_dir_all(&completions)?;
    let shells = Shells::builtins();
    for (shell, file) in [("bash", "kvs.bash"), ("fish", "kvs.fish"), ("zsh", "_kvs")] {
        let shell = shells.completer(shell).with_context(|| format!("clap_complete knows no {shell}"))?;
        shell.write_registration("COMPLETE", "kvs", "kvs", "kvs", &mut File::create(completions.join(file))?)?;
    }
    clap_mangen::generate_to(Cli::command(), &pages)?;
    fs::write(directory.join("settings.md"), settings())?;
    Ok(())
}

/// Returns the table of all flags that have a variable.
fn settings() -> String {
    let mut settings = Vec::new();
    collect("all", &Cli::command(), &mut settings);
    let mut text = "# Settings\n\n\
        Every setting is a flag and an environment variable; the flag takes precedence. A file of variables, one per line,\n\
        configures a service (`deploy/kvs.env`) or a container (`--env-file`). A variable that begins with `KVS_` and is not\n\
        in this table is rejected at the start. Secrets are read from files, whose names are settings (*FILE*).\n\n\
        A flag that can be repeated has all its values in one variable, separated by commas; those of `KVS_GUEST_CONFIG` are on lines\n\
        of their own.\n\n\
        This table is generated from the code by `just settings`.\n\n\
        | variable | flag | default | commands | meaning |\n|---|---|---|---|---|\n"
        .to_owned();
    for Setting { variable, flag, default, what, commands } in settings {
        let _ = writeln!(text, "| `{variable}` | `{flag}` | {default} | {} | {what} |", commands.join(", "));
    }
    text
}

struct Setting {
    variable: String,
    flag: String,
    default: String,
    what: String,
    /// The commands that have it.
    commands: Vec<String>,
}

fn collect(name: &str, command: &Command, settings: &mut Vec<Setting>) {
    for argument in command.get_arguments().filter(|argument| argument.get_env().is_some()) {
        let new = setting(argument);
        let same = |other: &&mut Setting| (&other.variable, &other.what) == (&new.variable, &new.what);
        match settings.iter_mut().find(same) {
            Some(known) => known.commands.push(name.to_owned()),
            None => settings.push(Setting { commands: vec![name.to_owned()], ..new }),
        }
    }
    for command in command.get_subcommands() {
        let before = if name == "all" { String::new() } else { format!("{name} ") };
        collect(&format!("{before}{}", command.get_name()), command, settings);
    }
}

fn setting(argument: &Arg) -> Setting {
    let takes_values = argument.get_action().takes_values();
    let value = argument.get_value_names().filter(|_| takes_values).unwrap_or_default().join(" ");
    let flag = argument.get_long().map_or(value.clone(), |long| format!("--{long} {value}"));
    let default = argument.get_default_values().first().filter(|_| takes_values);
    let mut what = argument.get_help().map(ToString::to_string).unwrap_or_default().replace('|', "\\|");
    if takes_values && !argument.get_possible_values().is_empty() {
        let values = argument.get_possible_values();
        let values: Vec<_> = values.iter().map(|value| format!("`{}`", value.get_name())).collect();
        what += &format!(": {}", values.join(", "));
    }
    Setting {
        variable: argument.get_env().unwrap_or_default().to_string_lossy().into_owned(),
        flag: flag.trim_end().replace('|', "\\|"),
        default: default.map_or(String::new(), |default| format!("`{}`", default.to_string_lossy())),
        what,
        commands: Vec::new(),
    }
}

#[cfg(test)]
mod tests;
