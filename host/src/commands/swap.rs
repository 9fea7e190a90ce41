//! `kvs swap`: replaces the guest of a running server.

use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;

use super::client::AdminArgs;
use super::health::READ_TIMEOUT;
use crate::guest::read_component;
use kvs_client::{ApiRequest, ClientError, Server};
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
    let target = if args.dry_run { "/guest?dry-run" } else { "/guest" };
    // The thread is not joined: without a response the process just exits.
    let _ = Env::real().tasks.detach_thread("swap", move || {
        let method = if component.is_some() { "PUT" } else { "DELETE" };
        let _ = ended.send(server.send(&ApiRequest { method, target, headers: &[], body: component.as_deref() }));
    });
    let result = loop {
        match end.recv_timeout(PROGRESS) {
            Ok(result) => break result,
            Err(RecvTimeoutError::Timeout) => bar.set_message(progress(&watched).unwrap_or_default()),
            Err(RecvTimeoutError::Disconnected) => bail!("the request to {base} was aborted"),
        }
    };
    bar.finish_and_clear();

    let response = match result {
        Err(refused @ ClientError::Status { .. }) => return Err(refused).context("not swapped"),
        result => result?,
    };
    let mut body = Vec::new();
    let read = response.into_body().into_reader().take(1 << 20).read_to_end(&mut body);
    read.map_err(|error| watched.transport_error(&error))?;
    let report: Value =
        serde_json::from_slice(&body).with_context(|| format!("{base} is not an admin listener of kvs"))?;
    writeln!(io::stdout(), "{}", summary(&report))?;
    Ok(())
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

fn progress(server: &Server) -> Option<String> {
    let response = server.send(&ApiRequest { method: "GET", target: "/guest", headers: &[], body: None }).ok()?;
    let status: Value = serde_json::from_reader(response.into_body().into_reader().take(1 << 20)).ok()?;
    let swap = status.get("swap").filter(|swap| !swap.is_null())?;
    let phase = swap["phase"].as_str()?;
    Some(match phase {
        "replaying" => format!(
            "{phase}: {} entries, sequence {} of {}, {} entries/s",
            swap["entries"], swap["sequence"], swap["newest"], swap["entries_per_second"]
        ),
        _ => format!("{phase}: {:.0} s", swap["seconds"].as_f64()?),
    })
}
