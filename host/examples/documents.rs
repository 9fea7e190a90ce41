//! Documents out of the definition of the command line: man pages, completions for shells, and the table of settings.
//!
//! `cargo run --release --example documents -- DIR` writes them all. The table is deploy/settings.md too, which a test below
//! compares: `just settings` writes it again. What people wrote by hand, README and the like, is held against the same
//! definition by the other tests.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::{env, fs};

use anyhow::{Context, Result};
use clap::{Arg, Command, CommandFactory};
use clap_complete::Shell;
use kvs::commands::Cli;

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
    use clap::Parser;

    use super::*;

    #[test]
    fn the_table_of_settings_is_what_the_code_says() {
        let written = include_str!("../../deploy/settings.md");
        assert!(written == settings(), "deploy/settings.md is stale; write it again with: just settings");
    }

    const README: &str = include_str!("../../README.md");
    const JUSTFILE: &str = include_str!("../../justfile");
    /// Who tells people what to type.
    const PAGES: [(&str, &str); 5] = [
        ("README.md", README),
        ("CONTRIBUTING.md", include_str!("../../CONTRIBUTING.md")),
        ("guest/README.md", include_str!("../../guest/README.md")),
        ("docs/backup.md", include_str!("../../docs/backup.md")),
        ("docs/read-only.md", include_str!("../../docs/read-only.md")),
    ];

    /// What stands between backticks, and the lines that are typed; one of `kvs` without `$` is what it answers.
    fn code(page: &str) -> impl Iterator<Item = &str> {
        let inline =
            page.lines().filter(|line| !line.starts_with("    ")).flat_map(|line| line.split('`').skip(1).step_by(2));
        let typed = page.lines().filter_map(|line| line.strip_prefix("    ").filter(|line| !line.starts_with("kvs ")));
        let typed = typed.map(|line| line.trim_start_matches("$ "));
        inline.chain(typed)
    }

    /// The commands in a piece of code, each in words, as a shell takes them; what is in brackets can be there.
    fn commands(code: &str) -> Vec<Vec<String>> {
        let (mut all, mut words, mut word, mut quote) = (Vec::new(), Vec::new(), String::new(), None);
        for character in code.chars().chain([' ', ';']) {
            match (quote, character) {
                (Some(open), close) if open == close => quote = None,
                (None, '\'' | '"') => quote = Some(character),
                (None, '#') if word.is_empty() => break,
                (None, '[' | ']') => {}
                (None, ' ' | '|' | ';' | '>' | '&') => {
                    words.extend(Some(std::mem::take(&mut word)).filter(|word| !word.is_empty()));
                    if character != ' ' {
                        all.push(std::mem::take(&mut words));
                    }
                }
                _ => word.push(character),
            }
        }
        all.push(words);
        all
    }

    fn leaves(command: &Command, path: &str) -> Vec<String> {
        let below = command.get_subcommands().filter(|command| command.get_name() != "help");
        let below: Vec<_> =
            below.flat_map(|command| leaves(command, &format!("{path} {}", command.get_name()))).collect();
        if below.is_empty() { vec![path.to_owned()] } else { below }
    }

    fn flags(command: &Command) -> Vec<(String, Option<String>)> {
        let default = |argument: &Arg| Some(argument.get_default_values().first()?.to_string_lossy().into_owned());
        let own = command
            .get_arguments()
            .filter_map(|argument| Some((format!("--{}", argument.get_long()?), default(argument))));
        own.chain(command.get_subcommands().flat_map(flags)).collect()
    }

    #[test]
    fn what_the_pages_say_to_type_is_understood() {
        let mut seen = 0;
        for (page, text) in PAGES {
            for code in code(text) {
                for words in commands(code).iter().filter(|words| words.len() > 1 && words[0] == "kvs") {
                    // Not when it is only spoken of by its name: `kvs txlog import`.
                    let (cli, path) = (Cli::command(), &words[1..]);
                    let is_name = path.iter().try_fold(&cli, |command, word| command.find_subcommand(word)).is_some();
                    if let Err(error) = Cli::try_parse_from(words) {
                        assert!(is_name, "{page}: {code}: {error}");
                    }
                    seen += 1;
                }
                for words in commands(code).iter().filter(|words| words.len() > 1 && words[0] == "just") {
                    let is_recipe = |line: &str| line.split([' ', ':']).next() == Some(&words[1]);
                    assert!(JUSTFILE.lines().any(is_recipe), "{page}: {code}: no such recipe");
                    seen += 1;
                }
            }
        }
        assert!(seen > 80, "{seen}");
    }

    #[test]
    fn every_command_and_recipe_is_in_the_readme() {
        let table: Vec<_> = README.lines().filter_map(|line| line.strip_prefix("| ")?.split('|').next()).collect();
        for command in leaves(&Cli::command(), "kvs") {
            let name = command.rsplit(' ').next().expect("it has a name");
            // Short in a row that begins with another: `kvs get KEY`, `put KEY [VALUE]`.
            let is_told =
                |cell: &&str| cell.contains(&format!("`{command}")) || (cell.contains("`kvs ") && cell.contains(name));
            assert!(table.iter().any(is_told), "`{command}`");
        }
        let mut group = false;
        for line in JUSTFILE.lines() {
            let recipe = line.split([' ', ':']).next().filter(|_| group && !line.starts_with('['));
            if let Some(name) = recipe {
                assert!(table.iter().any(|cell| cell.contains(&format!("`just {name}"))), "`just {name}`");
            }
            group = line.starts_with("[group(");
        }
    }

    #[test]
    fn every_flag_of_the_pages_is_one_and_has_the_default_they_say() {
        let flags = flags(&Cli::command());
        // Of docker and cargo, and one that clap has of its own.
        let others = ["--stop-timeout", "--package", "--help"];
        for (page, text) in PAGES {
            for code in code(text).filter(|code| code.starts_with("--")) {
                let flag = commands(code).swap_remove(0).swap_remove(0);
                assert!(others.contains(&&*flag) || flags.iter().any(|known| known.0 == flag), "{page}: {code}");
            }
        }
        let mut seen = 0;
        // `--txlog-timeout` (5 s)
        for (before, after) in README.match_indices("` (").map(|(at, _)| README.split_at(at)) {
            let flag = before.rsplit('`').next().expect("text has an end");
            let said = after[3..].split([')', ',', ';']).next().expect("text has a beginning").replace(' ', "");
            let known: Vec<_> =
                flags.iter().filter(|known| known.0 == flag).filter_map(|known| known.1.as_deref()).collect();
            if !known.is_empty() {
                assert!(known.contains(&said.as_str()), "{flag} is {known:?}, and {said} in README.md");
                seen += 1;
            }
        }
        assert!(seen > 1, "{seen}");
    }

    #[test]
    fn what_is_in_deploy_has_no_other_settings() {
        let settings = settings();
        for (file, text) in [
            ("Dockerfile", include_str!("../../Dockerfile")),
            ("compose.yaml", include_str!("../../deploy/compose.yaml")),
            ("pair/compose.yaml", include_str!("../../deploy/pair/compose.yaml")),
            ("pair/pair.conf", include_str!("../../deploy/pair/pair.conf")),
            ("kubernetes/kvs.yaml", include_str!("../../deploy/kubernetes/kvs.yaml")),
            ("kubernetes/backup.yaml", include_str!("../../deploy/kubernetes/backup.yaml")),
            ("kvs-backup.service", include_str!("../../deploy/kvs-backup.service")),
            ("kvs.env", include_str!("../../deploy/kvs.env")),
            ("kvs.service", include_str!("../../deploy/kvs.service")),
        ] {
            let words = text.split(|character: char| !character.is_ascii_alphanumeric() && character != '_');
            for variable in words.filter(|word| word.len() > "KVS_".len() && word.starts_with("KVS_")) {
                assert!(settings.contains(&format!("| `{variable}` |")), "{variable} in {file} is no setting");
            }
        }
    }
}
