//! The report of a test: a line for each check, with the first thing that it found.

use std::fmt::Write as _;

use serde_json::{Value, json};

/// What is checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Check {
    Calls,
    Responses,
    Rebuild,
    Apply,
    Refused,
    Reuse,
    Metrics,
    Log,
}

impl Check {
    const ALL: [Self; 8] = [
        Self::Calls,
        Self::Responses,
        Self::Rebuild,
        Self::Apply,
        Self::Refused,
        Self::Reuse,
        Self::Metrics,
        Self::Log,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Calls => "calls",
            Self::Responses => "responses",
            Self::Rebuild => "rebuild",
            Self::Apply => "apply",
            Self::Refused => "refused",
            Self::Reuse => "reuse",
            Self::Metrics => "metrics",
            Self::Log => "log",
        }
    }

    /// What holds when nothing was found, with how often it was seen to hold.
    fn holds(self, count: u64) -> String {
        match self {
            Self::Calls => format!("{count} calls neither trapped nor exceeded a limit"),
            Self::Responses => format!("{count} responses are valid HTTP"),
            Self::Rebuild => format!("{count} instances that were rebuilt from the log do what the one before did"),
            Self::Apply => format!("{count} replays, in batches of different sizes, have the same result"),
            Self::Refused => format!("{count} requests whose append was refused changed nothing"),
            Self::Reuse => format!("{count} responses declared reusable were right when they were reused"),
            Self::Metrics => format!("{count} metrics of the guest are valid and within the limit"),
            Self::Log => format!("{count} replays of the given log have the same result"),
        }
    }

    /// Why it was not checked.
    fn unchecked(self) -> &'static str {
        match self {
            Self::Calls | Self::Responses => "no request reached the guest",
            Self::Rebuild | Self::Apply => "no request appended an entry; --requests-from gives requests that do",
            Self::Refused => "no request tried to append; --requests-from gives requests that do",
            Self::Reuse => "no response was declared reusable",
            Self::Metrics => "the guest defined no metric",
            Self::Log => "no log was given (--data-dir)",
        }
    }
}

/// Something that a guest does wrong.
pub struct Fault {
    pub check: Check,
    pub text: String,
}

impl Fault {
    pub fn new(check: Check, text: impl Into<String>) -> Self {
        Self { check, text: text.into() }
    }
}

/// Result of a check.
#[derive(Default)]
struct Line {
    /// How often it was seen to hold.
    count: u64,
    found: Option<String>,
}

#[derive(Default)]
pub struct Report {
    pub guest: String,
    pub seed: u64,
    pub requests: u64,
    pub entries: u64,
    lines: [Line; Check::ALL.len()],
}

impl Report {
    pub fn new(seed: u64) -> Self {
        Self { seed, ..Self::default() }
    }

    pub fn held(&mut self, check: Check, count: u64) {
        self.lines[check as usize].count += count;
    }

    /// Keeps the first fault of each check: the others may follow from it.
    pub fn found(&mut self, Fault { check, text }: Fault) {
        self.lines[check as usize].found.get_or_insert(text);
    }

    pub fn has_found(&self, check: Check) -> bool {
        self.lines[check as usize].found.is_some()
    }

    pub fn failed(&self) -> usize {
        self.lines.iter().filter(|line| line.found.is_some()).count()
    }

    pub fn text(&self) -> String {
        let Self { guest, seed, requests, entries, .. } = self;
        let mut text = format!("guest     {guest}, {requests} requests, {entries} entries, seed {seed}\n");
        for (check, line) in self.each() {
            let (result, detail) = match &line.found {
                Some(found) => ("FAILED", found.clone()),
                None if line.count == 0 => ("none", check.unchecked().to_owned()),
                None => ("ok", check.holds(line.count)),
            };
            let _ = writeln!(text, "{:<9} {result:<7}{detail}", check.name());
        }
        text
    }

    pub fn json(&self) -> Value {
        let Self { guest, seed, requests, entries, .. } = self;
        let checks = self.each().map(|(check, Line { count, found })| {
            let result = if found.is_some() {
                "failed"
            } else if *count == 0 {
                "none"
            } else {
                "ok"
            };
            json!({ "check": check.name(), "result": result, "count": count, "found": found })
        });
        let checks: Vec<_> = checks.collect();
        json!({ "guest": guest, "seed": seed, "requests": requests, "entries": entries, "checks": checks })
    }

    fn each(&self) -> impl Iterator<Item = (Check, &Line)> {
        Check::ALL.into_iter().zip(&self.lines)
    }
}
