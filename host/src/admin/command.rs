//! `kvs swap`: asks the admin listener of a running server for another guest.

use std::io::Read;
use std::path::PathBuf;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;
use ureq::{Agent, RequestBuilder};

use crate::guest::read_component;

/// How often a swap is asked how far it is.
const PROGRESS: Duration = Duration::from_millis(200);
/// How long the server may take to say anything at all of itself.
const ANSWER: Duration = Duration::from_secs(10);

#[derive(Debug, clap::Args)]
pub struct Swap {
    /// The component that is to serve; without it, the store that came with the server's binary
    #[arg(value_name = "GUEST.wasm")]
    guest: Option<PathBuf>,

    /// The admin listener of the server: an address or a URL
    #[arg(long, env = "KVS_ADMIN", value_name = "URL", default_value = "127.0.0.1:9090")]
    admin: String,

    /// A token of scope admin, for a listener that asks for one
    #[arg(long, env = "KVS_TOKEN", hide_env_values = true)]
    token: Option<String>,

    /// Do everything but the switch: check it, give it the log, and tell how that went
    #[arg(long)]
    dry_run: bool,
}

pub fn swap(args: &Swap) -> Result<()> {
    let base = if args.admin.contains("://") { args.admin.clone() } else { format!("http://{}", args.admin) };
    let base = base.trim_end_matches('/').to_owned();
    let url = format!("{base}/guest{}", if args.dry_run { "?dry-run" } else { "" });
    let component = match &args.guest {
        Some(file) => Some(read_component(file).with_context(|| format!("cannot read {}", file.display()))?),
        None => None,
    };

    let bar = ProgressBar::new_spinner().with_style(ProgressStyle::default_spinner());
    bar.enable_steady_tick(PROGRESS);
    let (ended, end) = channel();
    let (asked, token) = (url.clone(), args.token.clone());
    // Nobody waits for the thread when there is no answer: the process ends.
    thread::spawn(move || {
        let agent = agent(None);
        let response = match component {
            Some(component) => bearing(agent.put(&asked), token.as_deref()).send(&component[..]),
            None => bearing(agent.delete(&asked), token.as_deref()).call(),
        };
        let _ = ended.send(response);
    });
    let response = loop {
        match end.recv_timeout(PROGRESS) {
            Ok(response) => break response,
            Err(RecvTimeoutError::Timeout) => {
                bar.set_message(progress(&base, args.token.as_deref()).unwrap_or_default())
            }
            Err(RecvTimeoutError::Disconnected) => bail!("the request to {url} ended half-way"),
        }
    };
    bar.finish_and_clear();

    let mut response =
        response.with_context(|| format!("no answer from {url}; is the server running, and is this its --admin?"))?;
    let mut body = String::new();
    response
        .body_mut()
        .as_reader()
        .take(1 << 20)
        .read_to_string(&mut body)
        .with_context(|| format!("no answer from {url}"))?;
    if response.status() != 200 {
        bail!("not swapped, the server says {}: {}", response.status().as_u16(), body.trim());
    }
    let report: Value = serde_json::from_str(&body).with_context(|| format!("{url} is no admin listener of kvs"))?;
    println!("{}", tell(&report));
    Ok(())
}

/// One line for people.
fn tell(report: &Value) -> String {
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

fn progress(base: &str, token: Option<&str>) -> Option<String> {
    let asking = bearing(agent(Some(ANSWER)).get(format!("{base}/guest")), token);
    let mut response = asking.call().ok()?;
    let status: Value = serde_json::from_str(&response.body_mut().read_to_string().ok()?).ok()?;
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

fn agent(timeout: Option<Duration>) -> Agent {
    Agent::config_builder().http_status_as_error(false).timeout_global(timeout).proxy(None).build().into()
}

fn bearing<B>(request: RequestBuilder<B>, token: Option<&str>) -> RequestBuilder<B> {
    match token {
        Some(token) => request.header("authorization", format!("Bearer {token}")),
        None => request,
    }
}
