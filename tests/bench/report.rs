//! What was measured: printed as it comes, and kept under `tests/bench/` as JSON, as tables in Markdown and as a plot.
//!
//! A benchmark that runs alone replaces its own part of what is there; each part says on which machine it was measured,
//! when, with what.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Result;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::plot;

/// What there is in one part.
#[derive(Default, Serialize, Deserialize)]
pub struct Part {
    /// Seconds since 1970.
    time: u64,
    command: String,
    machine: String,
    versions: Vec<String>,
    pub tables: Vec<Table>,
}

#[derive(Default, Serialize, Deserialize)]
pub struct Table {
    pub title: String,
    pub columns: Vec<String>,
    /// Numbers and words.
    pub rows: Vec<Vec<Value>>,
}

impl Part {
    fn text(&self) -> String {
        let time = humantime::format_rfc3339_seconds(UNIX_EPOCH + std::time::Duration::from_secs(self.time));
        let mut text = format!("\n{time}, {}; {}.\n", self.machine, self.versions.join("; "));
        for table in &self.tables {
            text += &head(table);
            text.extend(table.rows.iter().map(|row| line(row) + "\n"));
        }
        text
    }
}

pub struct Report {
    part: Part,
}

impl Report {
    pub fn new(name: &str) -> Self {
        let cores = std::thread::available_parallelism().map_or(0, usize::from);
        let processor = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = processor.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or_default();
        let model = model.trim_start_matches([' ', '\t', ':']);
        let kernel = first_line("uname", &["-sr"]);
        let part = Part {
            time: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
            command: format!("just bench {name}"),
            machine: format!("{cores} cores of {model}, {kernel}"),
            versions: Vec::new(),
            tables: Vec::new(),
        };
        let mut report = Self { part };
        println!("\n## {}\n\n{}, shared with the load generators", report.part.command, report.part.machine);
        report.uses("git", &["describe", "--always", "--dirty", "--abbrev=9"]);
        report.uses("rustc", &["--version"]);
        report
    }

    /// A program that takes part, and how it is asked for its version.
    pub fn uses(&mut self, program: &str, asked: &[&str]) {
        let version = first_line(program, asked);
        let version = if version.contains(program) { version } else { format!("{program} {version}") };
        self.part.versions.push(version);
    }

    /// Begins a table.
    pub fn table(&mut self, title: impl Into<String>, columns: &[&str]) {
        let columns = columns.iter().map(|&column| column.to_owned()).collect();
        let table = Table { title: title.into(), columns, rows: Vec::new() };
        print!("{}", head(&table));
        self.part.tables.push(table);
    }

    /// One row more of the table that was begun last.
    pub fn row(&mut self, cells: Vec<Value>) {
        println!("{}", line(&cells));
        if let Some(table) = self.part.tables.last_mut() {
            table.rows.push(cells);
        }
    }

    /// Keeps the rows of the former table whose first number is none of those measured now, in the order of these numbers.
    pub fn keep_other_rows(&mut self, name: &str) -> Result<()> {
        let former = parts()?.remove(name).and_then(|part| part.tables.into_iter().next());
        let Some(table) = self.part.tables.first_mut() else { return Ok(()) };
        let measured: Vec<_> = table.rows.iter().filter_map(|row| row.get(..2)).map(<[_]>::to_vec).collect();
        let is_other = |row: &Vec<Value>| row.get(..2).is_some_and(|of| measured.iter().all(|known| known != of));
        table.rows.extend(former.into_iter().flat_map(|former| former.rows).filter(is_other));
        table.rows.sort_by_key(|row| row.first().and_then(Value::as_u64));
        Ok(())
    }

    /// What was measured, on which machine, when, with what.
    pub fn text(&self) -> String {
        self.part.text()
    }

    /// Keeps it beside what other benchmarks left.
    pub fn keep(self, name: &str) -> Result<()> {
        let mut parts = parts()?;
        parts.insert(name.to_owned(), self.part);
        fs::write(results("json"), serde_json::to_string_pretty(&parts)? + "\n")?;
        fs::write(results("md"), written(&parts))?;
        if let Some(requests) = parts.get("requests") {
            fs::write(results("svg"), plot::of(requests))?;
        }
        Ok(())
    }
}

fn results(kind: &str) -> PathBuf {
    PathBuf::from(kvs_tests::ROOT).join("tests/bench/results").with_extension(kind)
}

/// What benchmarks left.
fn parts() -> Result<BTreeMap<String, Part>> {
    let text = fs::read_to_string(results("json")).unwrap_or_else(|_| "{}".to_owned());
    Ok(serde_json::from_str(&text)?)
}

/// A number with this many decimal digits.
pub fn number(value: f64, digits: usize) -> Value {
    let text = format!("{value:.digits$}");
    // What is no number was not counted.
    serde_json::from_str(&text).unwrap_or_else(|_| "".into())
}

fn written(parts: &BTreeMap<String, Part>) -> String {
    let mut text = "# What `just bench` measured\n".to_owned();
    for part in parts.values() {
        text += &format!("\n## `{}`\n{}", part.command, part.text());
    }
    text
}

fn head(table: &Table) -> String {
    let (columns, kinds) = (table.columns.join(" | "), vec!["---:"; table.columns.len()].join("|"));
    format!("\n{}\n\n| {columns} |\n|{kinds}|\n", table.title)
}

fn line(cells: &[Value]) -> String {
    let cells = cells.iter().map(|cell| match cell {
        Value::String(word) => word.clone(),
        Value::Number(number) => grouped(&number.to_string()),
        other => other.to_string(),
    });
    format!("| {} |", cells.collect::<Vec<_>>().join(" | "))
}

/// 52500 as 52,500.
fn grouped(number: &str) -> String {
    let (whole, rest) = number.split_at(number.find('.').unwrap_or(number.len()));
    let mut text = String::new();
    for (index, digit) in whole.char_indices() {
        if index > 0 && (whole.len() - index).is_multiple_of(3) && !text.ends_with('-') {
            text.push(',');
        }
        text.push(digit);
    }
    text + rest
}

/// What a program says first, on either output.
fn first_line(program: &str, args: &[&str]) -> String {
    let Ok(output) = Command::new(program).args(args).output() else { return String::new() };
    let said = [output.stdout, output.stderr].concat();
    String::from_utf8_lossy(&said).lines().next().unwrap_or_default().trim().to_owned()
}
