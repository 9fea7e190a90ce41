//! Opening: connects, makes the stream if there is none, and checks everything that the durability of the log depends on.
//!
//! Owns: the settings of the nodes among that. Must never know: what is written.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use async_nats::Client;
use kvs_runtime::Env;
use serde_json::{Value, json};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::watch;
use tracing::{info, warn};
use uuid::Uuid;

use super::conditions::{Conditions, REPLICAS};
use super::connection::Connection;
use super::target::{Target, Url};
use super::{LOG, NOT_CLUSTERED, Names, RESTORING, Stream, api, error, stream_info};
use crate::cluster::copy::Directory;
use crate::cluster::engine::ReadError;
use crate::cluster::frame::OVERHEAD;
use crate::cluster::mark::{Mark, MarkFile};
use crate::cluster::{ClusterLog, Options, Stored, compaction};

/// Timeout of a request to a monitoring port.
const MONITOR_TIMEOUT: Duration = Duration::from_secs(5);
/// Attempts to reach the leader at the start, a second apart: it may be being elected.
pub const ATTEMPTS: u32 = 15;
pub const RETRY_DELAY: Duration = Duration::from_secs(1);
/// Headers of a message.
const HEADER_BYTES: u64 = 1 << 10;
/// Watermark file in the data directory.
const FILE: &str = "txlog-nats";

/// Conditions under which a log is opened.
#[derive(Clone, Debug, Default)]
pub struct Checks {
    /// There may be no log yet.
    pub begin: bool,
    /// Serve although acknowledged writes may be lost.
    pub allow_unsafe: bool,
    /// URLs of the monitoring ports of all nodes.
    pub monitors: Vec<String>,
}

/// Opens the log of a URL. `data` is a directory that remembers which log it is.
pub fn open(url: &Url, checks: &Checks, data: Option<&Path>, options: &Options) -> Result<ClusterLog> {
    open_by(url, checks, data, options, ClusterLog::open)
}

/// Opens a log that no server uses, or that does not exist, for writing.
pub fn at_rest(url: &Url) -> Result<ClusterLog> {
    open(url, &Checks { begin: true, ..Checks::unchecked() }, None, &Options::at_rest())
}

/// Opens a log for reading what is in it now. A server may use it.
pub fn read(url: &Url) -> Result<ClusterLog> {
    open_by(url, &Checks::unchecked(), None, &Options::at_rest(), ClusterLog::read)
}

impl Checks {
    /// Commands that read or import a log are not warned about its durability: the server is.
    pub fn unchecked() -> Self {
        Self { begin: false, allow_unsafe: true, monitors: Vec::new() }
    }
}

type Open = fn(Runtime, Stored, &Options) -> Result<ClusterLog>;

fn open_by(url: &Url, checks: &Checks, data: Option<&Path>, options: &Options, open: Open) -> Result<ClusterLog> {
    let target = Target::new(url).context("the URL of the log cannot be used")?;
    let name = target.name();
    let mut builder = Builder::new_multi_thread();
    let runtime = kvs_runtime::runtime(builder.worker_threads(1).thread_name("log nats"));
    let runtime = runtime.context("no thread for the log")?;
    let tasks = options.env.tasks.in_runtime(runtime.handle());
    let env = Env { tasks, ..options.env.clone() };
    let stored = runtime.block_on(prepare(&target, checks, data, options, &env));
    let stored = stored.with_context(|| format!("cannot open the log in the {name}"))?;
    open(runtime, stored, options)
}

/// Connects, and makes or checks the stream.
async fn prepare(
    target: &Target,
    checks: &Checks,
    data: Option<&Path>,
    options: &Options,
    env: &Env,
) -> Result<Stored> {
    let sync = loop {
        match synced(&checks.monitors) {
            Err(error) if options.standby => warn!("engine of the log unavailable, standby retries: {error:#}"),
            asked => break asked?,
        }
        env.clock.sleep(RETRY_DELAY).await;
    };
    let connection = Connection::open(target, options.standby, env).await?;
    let client = &connection.client;
    let names = Names::new(&target.log);
    let mark_file = data.map(|data| MarkFile::new(data.join(FILE)));
    let known = mark_file.as_ref().map(MarkFile::read).transpose()?.flatten();
    let info = match find(client, &names, options.standby, env).await? {
        Some(info) => info,
        None => {
            let stream = &names.stream;
            ensure!(
                known.is_none(),
                "the stream {stream} is gone, which this data directory was used with; restore it, or give another --data-dir for a new one"
            );
            ensure!(checks.begin, "there is no stream {stream}; check the name of the log");
            make(client, &names, checks, (LOG, env.random.uuid()?), env).await?
        }
    };
    let metadata = &info["config"]["metadata"];
    ensure!(
        metadata[RESTORING].is_null(),
        "a restore into the stream {} was not completed; delete the stream, and restore again",
        names.stream
    );
    let log = metadata[LOG].as_str().and_then(|log| log.parse::<Uuid>().ok());
    let log = log.with_context(|| format!("the stream {} was not made by kvs; choose another name", names.stream))?;
    let mark = known.unwrap_or(Mark::new(log));
    if mark.log != log {
        let known = mark.log;
        bail!(
            "it is the log {log}, but this data directory was used with the log {known}; give another --data-dir, or the right name"
        );
    }
    let conditions = Conditions::new(&info["config"], &names, sync.warning())?;
    let warnings = conditions.warnings();
    if !warnings.is_empty() && !checks.allow_unsafe {
        bail!("{}; set it, or serve with --allow-unsafe-txlog", warnings.join("; "));
    }
    let payload = client.max_payload() as u64;
    let largest = largest_frame(client).saturating_sub(OVERHEAD);
    let group_bytes = options.group_bytes.unwrap_or(largest);
    let needed = group_bytes + OVERHEAD + HEADER_BYTES;
    ensure!(
        group_bytes <= largest,
        "max_payload of the server is {payload} bytes, but the largest write needs {needed}: set max_payload to {}MB, or \
         lower --max-value-bytes",
        needed.div_ceil(1 << 20).max(8)
    );
    if let Some(file) = &mark_file {
        for warning in &warnings {
            warn!("unsafe: {warning}");
        }
        file.write(mark)?;
    }
    let (connection, noted, conditions) = (Arc::new(connection), watch::Sender::new(0), Some(conditions));
    let stream = Arc::new(Stream { connection, names, log, conditions, noted });
    stream.start(env);
    let compaction_bytes = compaction::MIN_BYTES;
    let copies = data.map(Directory::new);
    Ok(Stored { engine: stream, name: target.name(), mark, mark_file, copies, group_bytes, compaction_bytes })
}

/// Returns the state and configuration of the stream; None if there is none.
pub async fn find(client: &Client, names: &Names, waits: bool, env: &Env) -> Result<Option<Value>> {
    let mut attempts = 1;
    loop {
        match stream_info(client, names).await {
            Ok(info) => return Ok(info),
            Err(error) if !waits && attempts >= ATTEMPTS => return Err(error.into()),
            Err(error) if attempts == 1 => warn!("engine of the log unavailable, retrying: {error}"),
            Err(_) => {}
        }
        attempts += 1;
        env.clock.sleep(RETRY_DELAY).await;
    }
}

/// Makes the stream, with an item of metadata. With one replica where the engine is a single node, and that is allowed: in a
/// cluster that has no room for three at the moment it would stay without replicas for ever.
pub async fn make(
    client: &Client,
    names: &Names,
    checks: &Checks,
    (item, id): (&str, Uuid),
    env: &Env,
) -> Result<Value> {
    let config = |replicas: u64| {
        json!({
            "name": names.stream,
            "description": "transaction log of kvs",
            "subjects": [names.subject],
            "retention": "limits",
            "storage": "file",
            "num_replicas": replicas,
            "discard": "new",
            "max_consumers": -1, "max_msgs": -1, "max_bytes": -1, "max_age": 0, "max_msgs_per_subject": -1, "max_msg_size": -1,
            "duplicate_window": 100_000_000,
            "deny_delete": true,
            "allow_direct": true,
            "republish": { "src": ">", "dest": format!("{}.>", names.notes), "headers_only": true },
            "metadata": { item: id.to_string() },
        })
    };
    let mut replicas = REPLICAS;
    let mut attempts = 1;
    loop {
        let made = api(client, &format!("STREAM.CREATE.{}", names.stream), &config(replicas)).await;
        let (why, code) = match made {
            Ok(answer) if answer["error"].is_null() => {
                info!("made the stream {} with {replicas} replicas", names.stream);
                return Ok(answer);
            }
            Ok(answer) => (error(&answer), answer["error"]["err_code"].as_u64()),
            Err(ReadError::Unavailable(reason)) => (reason, None),
            Err(error) => return Err(error.into()),
        };
        // Another process may have made it, or the answer was lost.
        if let Ok(Some(info)) = stream_info(client, names).await {
            return Ok(info);
        }
        let is_fallback = code == Some(NOT_CLUSTERED) && checks.allow_unsafe;
        // A node that has just started is not known to the leader yet.
        if attempts == ATTEMPTS || is_fallback && replicas == 1 {
            bail!("cannot make the stream {} with {replicas} replicas: {why}", names.stream);
        }
        attempts += 1;
        if is_fallback {
            replicas = 1;
        } else {
            env.clock.sleep(RETRY_DELAY).await;
        }
    }
}

/// Returns the size of the largest frame that the server accepts.
pub fn largest_frame(client: &Client) -> u64 {
    (client.max_payload() as u64).saturating_sub(HEADER_BYTES)
}

/// Whether the nodes sync what they acknowledge.
enum Sync {
    Always,
    Unknown,
    Not(String),
}

impl Sync {
    fn warning(self) -> Option<String> {
        const LOSS: &str = "a power cut of all nodes loses acknowledged writes";
        match self {
            Self::Always => None,
            Self::Unknown => Some(format!(
                "sync_interval of the nodes is unknown, and where it is not always {LOSS}: give the monitoring ports of all nodes with --txlog-monitor"
            )),
            Self::Not(url) => Some(format!("sync_interval of the node at {url} is not always: {LOSS}")),
        }
    }
}

/// Asks the monitoring ports of the nodes whether they sync what they acknowledge. Most of them must answer, not all: a
/// server must be able to start while a node is away.
fn synced(monitors: &[String]) -> Result<Sync> {
    let mut failures = Vec::new();
    for url in monitors {
        match is_synced(url) {
            Ok(true) => {}
            Ok(false) => return Ok(Sync::Not(url.clone())),
            Err(error) => failures.push(error),
        }
    }
    if 2 * failures.len() >= monitors.len()
        && let Some(error) = failures.pop()
    {
        return Err(error);
    }
    for error in failures {
        warn!("sync_interval of a node is unknown: {error:#}");
    }
    Ok(if monitors.is_empty() { Sync::Unknown } else { Sync::Always })
}

fn is_synced(url: &str) -> Result<bool> {
    let cannot_ask = || format!("cannot ask the monitoring port {url} of a node (--txlog-monitor)");
    let request = ureq::get(format!("{}/jsz", url.trim_end_matches('/')));
    let request = request.config().timeout_global(Some(MONITOR_TIMEOUT)).build();
    let mut answer = request.call().with_context(cannot_ask)?;
    let answer = answer.body_mut().read_to_string().with_context(cannot_ask)?;
    let answer: Value = serde_json::from_str(&answer).with_context(cannot_ask)?;
    ensure!(!answer["config"].is_null(), "the node at {url} has no JetStream");
    Ok(answer["config"]["sync_always"] == true)
}
