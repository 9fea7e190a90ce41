//! Restore of a backup into a stream that is made for it.
//!
//! The stream is a log once it names one. Until then no server and no restore uses it, so one that was interrupted leaves
//! nothing that looks like a log.

use anyhow::{Context, Result, bail, ensure};
use kvs_runtime::Env;
use serde_json::{Value, json};
use tokio::runtime::Builder;
use tokio::sync::watch;
use uuid::Uuid;

use super::connection::Connection;
use super::opening::{self, Checks, find, largest_frame};
use super::target::{Target, Url};
use super::{LOG, Names, RESTORING, Stream, api, error};
use crate::Restoration;
use crate::cluster::engine::ReadError;
use crate::cluster::puts::Puts;
use crate::cluster::restore;

/// Writes a restored log, and the beginning of its new incarnation. Blocks, so must not be called from a task.
pub fn restore(url: &Url, restoration: &Restoration<'_>) -> Result<()> {
    let target = Target::new(url).context("the URL of the log cannot be used")?;
    let name = target.name();
    let mut builder = Builder::new_multi_thread();
    let runtime = kvs_runtime::runtime(builder.worker_threads(1).thread_name("log nats"));
    let runtime = runtime.context("no thread for the log")?;
    let env = Env::real();
    let env = Env { tasks: env.tasks.in_runtime(runtime.handle()), ..env };
    let (stream, made) = runtime.block_on(make(&target, restoration.log, &env))?;
    let client = &stream.connection.client;
    let puts = Puts { engine: &stream, env: &env, position: 0 };
    let target = restore::Target { puts, handle: runtime.handle(), frame_bytes: largest_frame(client) };
    let restored = restore::restore(target, restoration);
    let restored = restored.and_then(|()| runtime.block_on(complete(&stream, made, &env)));
    if restored.is_err() {
        // Another one is refused while it is there, which says what to do.
        let (call, body) = (format!("STREAM.DELETE.{}", stream.names.stream), json!({}));
        let _ = runtime.block_on(api(client, &call, &body));
    }
    restored.with_context(|| format!("cannot restore into the {name}"))
}

/// Connects, and makes the stream, which must not be there yet. Returns its state and configuration too.
async fn make(target: &Target, log: Uuid, env: &Env) -> Result<(Stream, Value)> {
    let connection = Connection::open(target, false, env).await?;
    let (client, names) = (&connection.client, Names::new(&target.log));
    let stream = &names.stream;
    if let Some(info) = find(client, &names, false, env).await? {
        ensure!(
            info["config"]["metadata"][RESTORING].is_null(),
            "a restore into the stream {stream} was not completed; delete the stream, and restore again"
        );
        bail!("there is a stream {stream} already: a backup is restored under a new name; give another with --txlog");
    }
    let id = env.random.uuid()?;
    let made = opening::make(client, &names, &Checks::unchecked(), (RESTORING, id), env).await?;
    ensure!(
        made["config"]["metadata"][RESTORING] == id.to_string(),
        "another process has made the stream {stream} in the meantime"
    );
    let (connection, conditions, noted) = (connection.into(), None, watch::Sender::new(0));
    Ok((Stream { connection, names, log, conditions, noted }, made))
}

/// Makes the stream that of the log.
async fn complete(stream: &Stream, made: Value, env: &Env) -> Result<()> {
    let Stream { connection, names, log, .. } = stream;
    let mut config = made["config"].clone();
    config["metadata"] = json!({ LOG: log.to_string() });
    let mut attempts = 1;
    loop {
        let reason = match api(&connection.client, &format!("STREAM.UPDATE.{}", names.stream), &config).await {
            Ok(answer) if answer["error"].is_null() => return Ok(()),
            Ok(answer) => error(&answer),
            Err(ReadError::Unavailable(reason)) => reason,
            Err(error) => return Err(error.into()),
        };
        ensure!(attempts < opening::ATTEMPTS, "cannot complete the stream {}: {reason}", names.stream);
        attempts += 1;
        env.clock.sleep(opening::RETRY_DELAY).await;
    }
}
