//! The connection to one of the nodes of the engine, and the choice of another one.

use std::future::ready;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Result, bail};
use async_nats::{Client, Event, ReconnectToServer};
use kvs_runtime::Env;
use tokio::time::timeout;
use tracing::{info, warn};

use super::target::Target;

/// Timeout of an attempt to connect. With a node that is paused each takes that long, and writes wait meanwhile.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Delay between attempts to connect at the start.
const RETRY_DELAY: Duration = Duration::from_secs(1);
/// Maximum time to wait for a place in the queue of the client, which is full after a long outage.
const QUEUE_TIMEOUT: Duration = Duration::from_millis(500);
/// Consecutive timeouts after which the client connects to another node: the one that it has may be paused.
const OVERDUE: u32 = 2;

/// A client, connected to one node at a time.
pub struct Connection {
    pub client: Client,
    /// Consecutive timeouts.
    overdue: AtomicU32,
    /// How often another node was asked for.
    turns: Arc<AtomicUsize>,
}

impl Connection {
    /// Connects. A standby waits until it can.
    pub async fn open(target: &Target, waits: bool, env: &Env) -> Result<Self> {
        let turns = Arc::new(AtomicUsize::new(0));
        loop {
            let is_lost = AtomicBool::new(false);
            let (asked, taken) = (Arc::clone(&turns), AtomicUsize::new(0));
            let options = target.options().await?.connection_timeout(CONNECT_TIMEOUT).event_callback(move |event| {
                log(&event, &is_lost);
                ready(())
            });
            // By itself, the client prefers the nodes that it could connect to so far. Each of the others has its turn.
            let options = options.reconnect_to_server_callback(move |servers, _| {
                let turn = asked.load(Ordering::Relaxed);
                let is_asked = taken.swap(turn, Ordering::Relaxed) != turn && !servers.is_empty();
                let addr = is_asked.then(|| servers[turn % servers.len()].addr.clone());
                ready(addr.map(|addr| ReconnectToServer { addr, delay: Some(Duration::ZERO) }))
            });
            match options.connect(&*target.servers).await {
                Ok(client) => return Ok(Self { client, overdue: AtomicU32::new(0), turns }),
                Err(error) if waits => warn!("engine of the log unavailable, standby retries to connect: {error}"),
                Err(error) => bail!("cannot connect to any server: {error}"),
            }
            env.clock.sleep(RETRY_DELAY).await;
        }
    }

    /// Notes that the node answers.
    pub fn answered(&self) {
        self.overdue.store(0, Ordering::Relaxed);
    }

    /// Counts a timeout, and connects to another node after several.
    pub async fn timed_out(&self) {
        if self.overdue.fetch_add(1, Ordering::Relaxed) + 1 >= OVERDUE {
            self.answered();
            self.connect_elsewhere().await;
        }
    }

    /// Connects to the next node, which can be the same once.
    pub async fn connect_elsewhere(&self) {
        self.turns.fetch_add(1, Ordering::Relaxed);
        // An error means that the client is closed, which the next call reports.
        let _ = timeout(QUEUE_TIMEOUT, self.client.force_reconnect()).await;
    }
}

fn log(event: &Event, is_lost: &AtomicBool) {
    match event {
        // The first time is no news, nor is the end.
        Event::Connected if is_lost.swap(false, Ordering::Relaxed) => {
            info!("resolved: connected to the engine of the log again");
        }
        Event::Connected | Event::Closed => {}
        Event::Disconnected => {
            is_lost.store(true, Ordering::Relaxed);
            warn!("connection to the engine of the log lost, reconnecting");
        }
        Event::ServerError(error) => warn!("the engine of the log reports: {error}"),
        event => info!("the connection to the engine of the log: {event}"),
    }
}
