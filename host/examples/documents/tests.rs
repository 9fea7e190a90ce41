//! Tests that hold README.md, the book in docs/ and the files in deploy/ to the command line, the justfile, the metrics, the
//! log messages, and each other.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use clap::Parser;

use super::*;

const JUSTFILE: &str = include_str!("../../../justfile");

/// A page, by its path in the repository.
struct Page {
    path: String,
    text: String,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().expect("the repository is there")
}

fn page(path: &str) -> Page {
    let text = fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"));
    Page { path: path.to_owned(), text }
}

/// Returns all pages that people read.
fn pages() -> Vec<Page> {
    let mut names: Vec<_> = ["README.md", "CONTRIBUTING.md", "SECURITY.md", "guest/README.md"].map(String::from).into();
    for file in fs::read_dir(root().join("docs")).expect("docs can be listed") {
        let name = file.expect("docs can be listed").file_name().into_string().expect("file names are UTF-8");
        names.extend(name.ends_with(".md").then(|| format!("docs/{name}")));
    }
    names.sort();
    names.iter().map(|name| page(name)).collect()
}

/// Splits a page into its lines outside of code blocks, and the lines of its code blocks with the language of each.
fn split(text: &str) -> (Vec<&str>, Vec<(&str, &str)>) {
    let (mut prose, mut blocks, mut fence) = (Vec::new(), Vec::new(), None);
    for line in text.lines() {
        match (fence, line.trim_start().strip_prefix("```")) {
            (None, Some(language)) => fence = Some(language),
            (Some(_), Some(_)) => fence = None,
            (Some(language), None) => blocks.push((language, line)),
            (None, None) => match line.strip_prefix("    ") {
                Some(typed) => blocks.push(("", typed)),
                None => prose.push(line),
            },
        }
    }
    (prose, blocks)
}

/// Returns the inline code of a page.
fn inline(text: &str) -> Vec<String> {
    let (prose, _) = split(text);
    prose.iter().flat_map(|line| line.split('`').skip(1).step_by(2)).map(String::from).collect()
}

/// Returns the inline code of a page, and what readers type: lines of a `sh` block, and those after `$ ` in other blocks.
fn code(text: &str) -> Vec<String> {
    let joined = text.replace("\\\n", " ");
    let (_, blocks) = split(&joined);
    let typed = blocks.into_iter().filter_map(|(language, line)| match language {
        "sh" => Some(line),
        // An indented line of `kvs` without `$` is output.
        "" if !line.starts_with("kvs ") => Some(line.trim_start_matches("$ ")),
        _ => line.strip_prefix("$ "),
    });
    inline(text).into_iter().chain(typed.map(String::from)).collect()
}

/// Splits code into commands, and these into words, as a shell does. Brackets mark optional words and are dropped.
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
    let below: Vec<_> = below.flat_map(|command| leaves(command, &format!("{path} {}", command.get_name()))).collect();
    if below.is_empty() { vec![path.to_owned()] } else { below }
}

fn flags(command: &Command) -> Vec<(String, Option<String>)> {
    let default = |argument: &Arg| Some(argument.get_default_values().first()?.to_string_lossy().into_owned());
    let own =
        command.get_arguments().filter_map(|argument| Some((format!("--{}", argument.get_long()?), default(argument))));
    own.chain(command.get_subcommands().flat_map(flags)).collect()
}

/// Returns the anchor that mdBook and forges give a heading.
fn anchor(heading: &str) -> String {
    let kept = heading.chars().filter(|character| character.is_alphanumeric() || " _-".contains(*character));
    kept.collect::<String>().to_lowercase().replace(' ', "-")
}

fn anchors(text: &str) -> Vec<String> {
    let (prose, _) = split(text);
    let headings = prose.into_iter().filter(|line| line.starts_with('#'));
    headings.map(|line| anchor(line.trim_start_matches('#').trim())).collect()
}

/// Returns the source of the programs, without tests, with strings that continue on the next line in one.
fn source() -> String {
    fn collect(path: &Path, all: &mut String) {
        for file in fs::read_dir(path).unwrap_or_else(|error| panic!("{}: {error}", path.display())) {
            let path = file.expect("the source can be listed").path();
            let name = path.file_stem().unwrap_or_default();
            if name == "tests" {
                continue;
            }
            if path.is_dir() {
                collect(&path, all);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
                all.push_str(text.split("#[cfg(test)]\nmod tests {").next().expect("text has a beginning"));
            }
        }
    }
    let mut all = String::new();
    for package in ["host/src", "host/txlog/src", "host/runtime/src"] {
        collect(&root().join(package), &mut all);
    }
    let parts: Vec<_> = all.split("\\\n").collect();
    parts.iter().enumerate().map(|(at, part)| if at == 0 { part } else { part.trim_start() }).collect()
}

/// Returns the string literals that come first after each occurrence of `call`.
fn literals<'a>(source: &'a str, call: &'a str) -> impl Iterator<Item = &'a str> {
    source.split(call).skip(1).filter_map(|rest| {
        let literal = rest.split_once('"')?.1;
        let end = literal.match_indices('"').find(|(at, _)| !literal[..*at].ends_with('\\'))?.0;
        Some(&literal[..end])
    })
}

/// Returns a log message with `…` in place of what varies.
fn pattern(message: &str) -> String {
    let mut parts = message.split('{');
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |all, part| all + "…" + part.split_once('}').map_or("", |(_, rest)| rest))
}

#[test]
fn settings_table_matches_the_code() {
    assert!(
        page("docs/settings.md").text == settings(),
        "docs/settings.md is stale; write it again with: just settings"
    );
}

#[test]
fn commands_of_pages_are_valid() {
    let mut seen = 0;
    for Page { path: page, text } in pages() {
        for code in code(&text) {
            for words in commands(&code).iter().filter(|words| words.len() > 1 && words[0] == "kvs") {
                // A page can also name a command without its arguments: `kvs txlog import`.
                let cli = Cli::command();
                let mut path = words[1..].iter();
                let is_name = path.try_fold(&cli, |command, word| command.find_subcommand(word)).is_some();
                if let Err(error) = Cli::try_parse_from(words) {
                    assert!(is_name, "{page}: {code}: {error}");
                }
                seen += 1;
            }
            for words in commands(&code).iter().filter(|words| words.len() > 1 && words[0] == "just") {
                let is_recipe = |line: &str| line.split([' ', ':']).next() == Some(&words[1]);
                assert!(JUSTFILE.lines().any(is_recipe), "{page}: {code}: no such recipe");
                seen += 1;
            }
        }
    }
    assert!(seen > 80, "{seen}");
}

#[test]
fn every_command_and_recipe_is_listed() {
    let text = page("docs/commands.md").text;
    let table: Vec<_> = text.lines().filter_map(|line| line.strip_prefix("| ")?.split('|').next()).collect();
    let is_listed = |code: &str| table.iter().any(|cell| cell.contains(&format!("`{code}")));
    for command in leaves(&Cli::command(), "kvs") {
        assert!(is_listed(&command), "`{command}` is missing in docs/commands.md");
    }
    let mut group = false;
    for line in JUSTFILE.lines() {
        let recipe = line.split([' ', ':']).next().filter(|_| group && !line.starts_with('['));
        if let Some(name) = recipe {
            assert!(is_listed(&format!("just {name}")), "`just {name}` is missing in docs/commands.md");
        }
        group = line.starts_with("[group(");
    }
}

#[test]
fn flags_of_pages_exist_and_have_the_stated_default() {
    let flags = flags(&Cli::command());
    // Of docker, cargo, systemctl and curl, and one that clap adds.
    let others = ["--env-file", "--stop-timeout", "--package", "--skip", "--help"];
    let mut seen = 0;
    for Page { path: page, text } in pages() {
        for code in code(&text).iter().filter(|code| code.starts_with("--")) {
            let flag = commands(code).swap_remove(0).swap_remove(0);
            assert!(others.contains(&&*flag) || flags.iter().any(|known| known.0 == flag), "{page}: {code}");
        }
        // `--txlog-timeout` (5 s)
        for (before, after) in text.match_indices("` (").map(|(at, _)| text.split_at(at)) {
            let flag = before.rsplit('`').next().expect("text has an end");
            let stated = after[3..].split([')', ',', ';']).next().expect("text has a beginning").replace(' ', "");
            let known: Vec<_> =
                flags.iter().filter(|known| known.0 == flag).filter_map(|known| known.1.as_deref()).collect();
            if !known.is_empty() {
                assert!(known.contains(&stated.as_str()), "{page}: the default of {flag} is {known:?}, not {stated}");
                seen += 1;
            }
        }
    }
    assert!(seen > 5, "{seen}");
}

#[test]
fn links_of_pages_resolve() {
    let (root, mut seen) = (root(), 0);
    for Page { path: page, text } in pages() {
        let folder = root.join(&page).parent().expect("a page is in a folder").to_owned();
        let (prose, _) = split(&text);
        // A link in inline code is text.
        let prose: Vec<_> = prose.iter().flat_map(|line| line.split('`').step_by(2).chain(["\n"])).collect();
        for link in prose.concat().split("](").skip(1).filter_map(|rest| rest.split(')').next().map(String::from)) {
            if link.contains("://") {
                continue;
            }
            let (path, anchor) = link.split_once('#').unwrap_or((&link, ""));
            let target = if path.is_empty() { root.join(&page) } else { folder.join(path) };
            let target = target.canonicalize().unwrap_or_else(|error| panic!("{page}: {link}: {error}"));
            let leaves = page.starts_with("docs/") && !target.starts_with(root.join("docs"));
            assert!(!leaves, "{page}: {link} leads out of the book; name the file in backticks instead");
            if !anchor.is_empty() {
                let text = fs::read_to_string(&target).unwrap_or_else(|error| panic!("{page}: {link}: {error}"));
                assert!(anchors(&text).iter().any(|known| known == anchor), "{page}: {link}: no such heading");
            }
            seen += 1;
        }
    }
    assert!(seen > 80, "{seen}");
}

#[test]
fn paths_named_in_pages_exist() {
    let root = root();
    for Page { path: page, text } in pages() {
        for code in inline(&text) {
            let is_path =
                ["deploy/", "docs/", "guest/", "host/", "tests/", "wit/"].iter().any(|top| code.starts_with(top));
            if is_path && !code.contains([' ', '*', '{', 'N']) {
                // Internals name the host's files by their path in host/src.
                let is_there = ["", "host/src"].iter().any(|top| root.join(top).join(&code).exists());
                assert!(is_there, "{page}: there is no {code}");
            }
        }
    }
}

#[test]
fn summary_lists_every_page() {
    let summary = page("docs/SUMMARY.md").text;
    for Page { path, .. } in pages() {
        let Some(name) = path.strip_prefix("docs/").filter(|name| *name != "SUMMARY.md") else { continue };
        assert!(summary.contains(&format!("]({name})")), "{path} is missing in docs/SUMMARY.md");
    }
}

#[test]
fn monitoring_page_lists_every_metric() {
    let (source, monitoring) = (source(), page("docs/monitoring.md").text);
    let mut names = BTreeSet::new();
    for (kind, suffix) in [("counter", "_total"), ("gauge", ""), ("histogram", ""), ("info", "_info")] {
        for call in [format!("page.{kind}("), format!("page.{kind}s(")] {
            names.extend(literals(&source, &call).map(|name| format!("kvs_{name}{suffix}")));
        }
    }
    assert!(names.len() > 40, "{names:?}");
    for name in &names {
        let is_listed = [format!("`{name}`"), format!("`{name}{{")].iter().any(|code| monitoring.contains(code));
        assert!(is_listed, "{name} is missing in docs/monitoring.md");
    }
    for Page { path, text } in pages() {
        for code in inline(&text).iter().filter(|code| code.starts_with("kvs_") && !code.contains("::")) {
            let name = code.split(['{', ' ', '>', '=']).next().expect("text has a beginning");
            let name = ["_bucket", "_count", "_sum"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name);
            let is_metric = names.contains(name) || name.ends_with(['_', '…', '*']);
            assert!(is_metric, "{path}: {code} is not a metric");
        }
    }
}

#[test]
fn log_messages_page_lists_every_warning_and_error() {
    let (source, text) = (source(), page("docs/log-messages.md").text);
    let headings = text.lines().filter_map(|line| line.strip_prefix("### `")?.split('`').next());
    let headings: BTreeSet<_> = headings.map(String::from).collect();
    for call in ["warn!(", "error!("] {
        // A message of variables alone is documented by the texts that these take.
        let messages = literals(&source, call).map(pattern).filter(|message| message.chars().any(char::is_alphabetic));
        for message in messages {
            assert!(headings.contains(&message), "`{message}` is missing in docs/log-messages.md");
        }
    }
    for heading in &headings {
        let is_logged = heading.split('…').all(|part| source.contains(part));
        assert!(is_logged, "docs/log-messages.md: nothing logs `{heading}`");
    }
}

#[test]
fn deployment_files_use_known_settings() {
    let settings = settings();
    for path in [
        "Dockerfile",
        "deploy/compose.yaml",
        "deploy/nats/compose.yaml",
        "deploy/pair/compose.yaml",
        "deploy/demo/compose.yaml",
        "deploy/pair/pair.conf",
        "deploy/kubernetes/kvs.yaml",
        "deploy/kubernetes/nats.yaml",
        "deploy/kubernetes/backup.yaml",
        "deploy/kvs-backup.service",
        "deploy/kvs.env",
        "deploy/kvs.service",
    ] {
        let text = page(path).text;
        let words = text.split(|character: char| !character.is_ascii_alphanumeric() && character != '_');
        for variable in words.filter(|word| word.len() > "KVS_".len() && word.starts_with("KVS_")) {
            assert!(settings.contains(&format!("| `{variable}` |")), "{variable} in {path} is not a setting");
        }
    }
}

#[test]
fn pod_limit_leaves_room_for_second_guest_of_swap() {
    let manifest = page("deploy/kubernetes/kvs.yaml").text;
    let mib = |before: &str| {
        let size = manifest.split_once(before).and_then(|(_, after)| after.split(' ').next()).expect(before);
        let (number, unit) = size.split_at(size.find(|c: char| !c.is_ascii_digit()).expect("a unit"));
        let number: u64 = number.parse().expect("a number");
        if unit.starts_with('G') { number << 10 } else { number }
    };
    let (guest, limit) = (mib("KVS_GUEST_MAX_MEMORY_BYTES, value: "), mib("limits: { memory: "));
    assert!(2 * guest + limit / 8 + 128 <= limit, "{guest} MiB twice, and requests, in {limit} MiB");
}
