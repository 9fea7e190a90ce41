//! `kvs swap`: replaces the guest of a running server.

use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use super::client::{AdminArgs, OutputArgs};
use super::health::READ_TIMEOUT;
use crate::guest::read_component;
use crate::parse;
use kvs_client::{ApiRequest, ClientError, Output, Server};
use kvs_runtime::Env;

/// Interval of the progress display.
const PROGRESS: Duration = Duration::from_millis(200);

#[derive(Debug, clap::Args)]
pub struct Swap {
    /// Component file; without it, the server's built-in store
    #[arg(value_name = "GUEST.wasm")]
    guest: Option<PathBuf>,

    #[command(flatten)]
    admin: AdminArgs,

    /// Validate the component and replay the log into it, but do not switch
    #[arg(long)]
    dry_run: bool,

    /// Duration of shadow traffic, at most 1h: first the component is given real requests too, and compared with the serving store
    #[arg(long, value_name = "TIME", value_parser = parse::shadow)]
    shadow: Option<Duration>,

    /// Percentage of the requests that are compared
    #[arg(long, value_name = "PERCENT", value_parser = parse::percent, default_value = "10%", requires = "shadow")]
    sample: f64,

    /// Number of requests that may differ; with more, the component does not serve
    #[arg(long, value_name = "COUNT", default_value_t = 0, requires = "shadow")]
    max_differences: u64,

    #[command(flatten)]
    output: OutputArgs,
}

impl Swap {
    fn target(&self) -> String {
        let mut parameters: Vec<_> = self.dry_run.then(|| "dry-run".to_owned()).into_iter().collect();
        if let Some(shadow) = self.shadow {
            let (sample, max_differences) = (self.sample, self.max_differences);
            parameters.push(format!("shadow={}ms", shadow.as_millis()));
            parameters.push(format!("sample={sample}&max-differences={max_differences}"));
        }
        format!("/guest{}{}", if parameters.is_empty() { "" } else { "?" }, parameters.join("&"))
    }
}

pub fn run(args: &Swap) -> Result<()> {
    // No read timeout: the server responds when the probation of the new guest is over.
    let server = args.admin.server(None)?;
    let watched = args.admin.server(Some(READ_TIMEOUT))?;
    let base = server.base().to_owned();
    let component = match &args.guest {
        Some(file) => Some(read_component(file).with_context(|| format!("cannot read {}", file.display()))?),
        None => None,
    };

    let bar = ProgressBar::new_spinner().with_style(ProgressStyle::default_spinner());
    bar.enable_steady_tick(PROGRESS);
    let (ended, end) = channel();
    let target = args.target();
    // The thread is not joined: without a response the process just exits.
    let _ = Env::real().tasks.detach_thread("swap", move || {
        let method = if component.is_some() { "PUT" } else { "DELETE" };
        let _ =
            ended.send(server.send(&ApiRequest { method, target: &target, headers: &[], body: component.as_deref() }));
    });
    let result = loop {
        match end.recv_timeout(PROGRESS) {
            Ok(result) => break result,
            Err(RecvTimeoutError::Timeout) => {
                bar.set_message(status(&watched).as_ref().and_then(progress).unwrap_or_default());
            }
            Err(RecvTimeoutError::Disconnected) => bail!("the request to {base} was aborted"),
        }
    };
    bar.finish_and_clear();

    let response = match result {
        Err(refused @ ClientError::Status { .. }) => {
            // With another status, the last swap is not this one.
            let is_unfit = matches!(refused, ClientError::Status { status: 422, .. });
            if is_unfit && let Some(status) = args.shadow.and_then(|_| status(&watched)) {
                let shadow = &status["last_swap"]["shadow"];
                // The failure is reported in any case.
                let _ = match args.output.output() {
                    Output::Text => print_shadow(shadow),
                    Output::Json => writeln!(io::stdout(), "{}", json!({ "shadow": shadow })).map_err(Into::into),
                };
            }
            return Err(refused).context("not swapped");
        }
        result => result?,
    };
    let mut body = Vec::new();
    let read = response.into_body().into_reader().take(1 << 20).read_to_end(&mut body);
    read.map_err(|error| watched.transport_error(&error))?;
    let report: Value =
        serde_json::from_slice(&body).with_context(|| format!("{base} is not an admin listener of kvs"))?;
    match args.output.output() {
        Output::Text => {
            writeln!(io::stdout(), "{}", summary(&report))?;
            print_shadow(&report["shadow"])
        }
        Output::Json => Ok(writeln!(io::stdout(), "{report}")?),
    }
}

/// Prints the report of shadow traffic, if there is one.
fn print_shadow(report: &Value) -> Result<()> {
    if report.is_null() {
        return Ok(());
    }
    let mut out = io::stdout().lock();
    writeln!(out, "shadow traffic: {}, {} rebuilds of the candidate", counts(report), report["rebuilds"])?;
    for side in ["serving", "candidate"] {
        let times = &report[side];
        let time = |name: &str| times[name].as_f64().map_or("-".to_owned(), |time| format!("{:.3} ms", 1e3 * time));
        let (half, most, max) = (time("p50_seconds"), time("p99_seconds"), time("max_seconds"));
        let memory = times["memory_bytes"].as_u64().unwrap_or_default() >> 20;
        writeln!(out, "  {side:9}  p50 {half}, p99 {most}, max {max}, {memory} MiB of memory")?;
    }
    for example in report["examples"].as_array().into_iter().flatten() {
        let text = |name: &str| example[name].as_str().unwrap_or("-").to_owned();
        let (method, target, id) = (text("method"), text("target"), text("request_id"));
        let (what, serving, candidate) = (text("difference"), text("serving"), text("candidate"));
        writeln!(out, "  {method} {target} ({id}): {what}: {serving}, candidate: {candidate}")?;
    }
    Ok(())
}

fn counts(shadow: &Value) -> String {
    format!("{} compared, {} different, {} dropped", shadow["compared"], shadow["different"], shadow["dropped"])
}

/// Summarizes the report of a swap in one line.
fn summary(report: &Value) -> String {
    let text = |name: &str| report[name].as_str().unwrap_or("?").to_owned();
    let seconds = |name: &str| report[name].as_f64().unwrap_or_default();
    let (name, version) = (text("name"), text("version"));
    let replayed = format!(
        "{} entries replayed in {:.1} s, {} keys, {} MiB of memory",
        report["entries"],
        seconds("seconds"),
        report["keys"],
        report["memory_bytes"].as_u64().unwrap_or_default() >> 20,
    );
    if report["pause_seconds"].is_null() {
        format!("{name} {version} could serve: {replayed}")
    } else {
        format!("{name} {version} serves: {replayed}, requests held for {:.1} ms", 1e3 * seconds("pause_seconds"))
    }
}

/// Returns the document of `GET /guest`.
fn status(server: &Server) -> Option<Value> {
    let response = server.send(&ApiRequest { method: "GET", target: "/guest", headers: &[], body: None }).ok()?;
    serde_json::from_reader(response.into_body().into_reader().take(1 << 20)).ok()
}

/// Returns the line for the phase of the swap in progress.
fn progress(status: &Value) -> Option<String> {
    let swap = status.get("swap").filter(|swap| !swap.is_null())?;
    let phase = swap["phase"].as_str()?;
    Some(match phase {
        "replaying" => format!(
            "{phase}: {} entries, sequence {} of {}, {} entries/s",
            swap["entries"],
            swap["sequence"].as_str()?,
            swap["newest"].as_str()?,
            swap["entries_per_second"]
        ),
        "shadow" => {
            let (seconds, all) = (swap["seconds"].as_f64()?, swap["shadow"]["seconds"].as_f64()?);
            format!("{phase}: {seconds:.0} of {all:.0} s, {}", counts(&swap["shadow"]))
        }
        _ => format!("{phase}: {:.0} s", swap["seconds"].as_f64()?),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_shows_each_phase() {
        let of = |swap: Value| progress(&json!({ "swap": swap }));
        let shadow = json!({ "seconds": 60.0, "compared": 7, "different": 1, "dropped": 2 });
        assert_eq!(
            of(json!({ "phase": "shadow", "seconds": 12.4, "shadow": shadow })).as_deref(),
            Some("shadow: 12 of 60 s, 7 compared, 1 different, 2 dropped")
        );
        let replaying = json!({
            "phase": "replaying", "seconds": 1.0, "entries": 5, "sequence": "8", "newest": "9", "entries_per_second": 5.0,
        });
        assert_eq!(of(replaying).as_deref(), Some("replaying: 5 entries, sequence 8 of 9, 5.0 entries/s"));
        assert_eq!(of(json!({ "phase": "probation", "seconds": 3.0 })).as_deref(), Some("probation: 3 s"));
        assert_eq!(of(Value::Null), None);
    }
}
