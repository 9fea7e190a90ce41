//! Documents out of the definition of the command line: man pages, completions for shells, and the table of settings.
//!
//! `cargo run --release --example documents -- DIR` writes them all. The table is deploy/settings.md too, which a test below
//! compares: `just settings` writes it again.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::{env, fs};

use anyhow::{Context, Result};
use clap::{Arg, Command, CommandFactory};
use clap_complete::Shell;
use kvs::cli::Cli;

fn main() -> Result<()> {
    let directory = PathBuf::from(env::args_os().nth(1).context("which directory to write to?")?);
    let (pages, completions) = (directory.join("man"), directory.join("completions"));
    fs::create_dir_all(&pages)?;
    fs::create_dir_all(&completions)?;
    let mut command = Cli::command();
    for shell in [Shell::Bash, Shell::Fish, Shell::Zsh] {
        clap_complete::generate_to(shell, &mut command, "kvs", &completions)?;
    }
    clap_mangen::generate_to(Cli::command(), &pages)?;
    fs::write(directory.join("settings.md"), settings())?;
    Ok(())
}

/// All flags that have a variable, in one table.
fn settings() -> String {
    let mut settings = Vec::new();
    collect("all", &Cli::command(), &mut settings);
    let mut text = "# Settings\n\n\
        Every setting is a flag, and a variable of the environment; the flag goes before. A file of such variables, a line\n\
        each, configures a service ([kvs.env](kvs.env)) or a container (`--env-file`). A variable that begins with `KVS_` and\n\
        is not in this table is refused. Secrets are in files, whose names are settings (*FILE*).\n\n\
        This table is made from the code, by `just settings`.\n\n\
        | variable | flag | default | of `kvs …` | what |\n|---|---|---|---|---|\n"
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
    /// Those that have it.
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
mod tests {
    use super::*;

    #[test]
    fn the_table_of_settings_is_what_the_code_says() {
        let written = include_str!("../deploy/settings.md");
        assert!(written == settings(), "deploy/settings.md is stale; write it again with: just settings");
    }

    #[test]
    fn what_is_in_deploy_has_no_other_settings() {
        let settings = settings();
        for (file, text) in [
            ("Dockerfile", include_str!("../Dockerfile")),
            ("compose.yaml", include_str!("../deploy/compose.yaml")),
            ("kubernetes/kvs.yaml", include_str!("../deploy/kubernetes/kvs.yaml")),
            ("kvs.env", include_str!("../deploy/kvs.env")),
            ("kvs.service", include_str!("../deploy/kvs.service")),
        ] {
            let words = text.split(|character: char| !character.is_ascii_alphanumeric() && character != '_');
            for variable in words.filter(|word| word.len() > "KVS_".len() && word.starts_with("KVS_")) {
                assert!(settings.contains(&format!("| `{variable}` |")), "{variable} in {file} is no setting");
            }
        }
    }
}
