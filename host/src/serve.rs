//! `kvs serve`: puts the house together, in the order data flows back (log, guest, edge), and takes it down again.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::net::{TcpListener, TcpSocket};
use tokio::runtime::Builder;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task;
use tokio::time::{MissedTickBehavior, interval, sleep};
use tracing::{info, warn};

use crate::admin::{Admin, Health, Phase};
use crate::cli::Serve;
use crate::edge::{self, Edge, Service};
use crate::guest::{self, Engine, Shard};
use crate::log::TransactionLog;
use crate::log::file::{FileLog, Options};

/// What an append group may hold beside the largest value: key, metadata, and what comes with them.
const GROUP_BYTES: u64 = 64 << 10;
/// How often the guest is asked to do its housekeeping.
const TICK: Duration = Duration::from_secs(1);
/// The pause before it goes on with what it left undone: longer than a tick takes, so that requests have most of the time.
const SOON: Duration = Duration::from_millis(10);
/// Connections that may wait to be accepted.
const BACKLOG: u32 = 1024;

/// Serves until the process is told to stop, or the log fails.
pub fn run(args: &Serve) -> Result<()> {
    let runtime = Builder::new_multi_thread().enable_all().build().context("no threads to serve with")?;
    let result = runtime.block_on(serve(args));
    // A replay that was given up may still be running; nobody waits for it.
    runtime.shutdown_background();
    result
}

async fn serve(args: &Serve) -> Result<()> {
    // Before anything slow, so that a stop is heard at any time.
    let mut stop = on_signal()?;
    let hangup = signal(SignalKind::hangup())?;
    let tls = args.tls.files().map(edge::tls::load).transpose()?;
    // A taken port is found before a long replay; clients can connect only after it.
    let socket = bind(args.listen, "--listen")?;
    let health = watched(args.admin)?;

    let log: Arc<dyn TransactionLog> = Arc::new(FileLog::open(Options {
        data: args.data.clone(),
        segment_bytes: args.segment_bytes.as_u64(),
        group_bytes: args.max_value_bytes.as_u64() + GROUP_BYTES,
        durability: args.durability,
    })?);

    health.set_log(Arc::clone(&log));

    let engine = Engine::new(guest::Limits {
        call: args.guest_call_timeout,
        memory_bytes: usize::try_from(args.guest_memory_bytes.as_u64())?,
        table_elements: args.guest_table_elements,
        instances: args.guest_instances,
        value_bytes: usize::try_from(args.max_value_bytes.as_u64())?,
        response_bytes: usize::try_from(args.max_response_bytes.max(args.max_value_bytes).as_u64())?,
        appends: args.guest_appends,
        log_bytes: usize::try_from(args.guest_log_bytes.as_u64())?,
        log_line_bytes: usize::try_from(args.guest_log_line_bytes.as_u64())?,
    })?;
    let guest = engine.load(args.guest.as_deref(), args.guest_config.clone())?;
    health.reached(Phase::Replaying);
    let building = {
        let log = Arc::clone(&log);
        task::spawn_blocking(move || Shard::build(guest, log))
    };
    let (shard, replayed) = tokio::select! {
        built = building => built??,
        _ = stop.changed() => {
            log.close()?;
            info!("stopped before the log was replayed");
            return Ok(());
        }
    };

    let (address, listener) = listen(socket).with_context(|| cannot_listen(args.listen, "--listen"))?;
    let description = shard.description().clone();
    let scheme = if tls.is_some() { "https" } else { "http" };
    info!(
        data = %args.data.display(),
        guest = description.name,
        version = description.version,
        entries = replayed.entries,
        keys = replayed.keys,
        took = ?replayed.took,
        "serving on {scheme}://{address}",
    );

    health.reached(Phase::Serving);
    let ticking = task::spawn(tick(Arc::clone(&shard)));
    if let Some(tls) = &tls {
        task::spawn(Arc::clone(tls).keep(hangup));
    }
    let limits = edge::Limits {
        connections: args.max_connections,
        handshake_timeout: args.tls.handshake_timeout,
        header_bytes: usize::try_from(args.max_header_bytes.as_u64())?,
        header_timeout: args.header_timeout,
        body_bytes: args.max_value_bytes.as_u64(),
        request_timeout: args.request_timeout,
        drain: args.drain,
    };
    let service = Service { shard, log: Arc::clone(&log), limits };
    let mut failure = None;
    let cut_off = Edge { tls, service, limits }.serve(listener, async {
        tokio::select! {
            _ = stop.changed() => {}
            reason = log.watermark().latched() => failure = Some(reason),
        }
        health.reached(Phase::Stopping);
        if failure.is_none() {
            info!("stopping: finishing what is under way");
        }
    });
    let cut_off = cut_off.await;
    ticking.abort();
    if cut_off > 0 {
        warn!("{cut_off} connections were cut off after {:?}", args.drain);
    }
    if let Some(reason) = failure {
        bail!(
            "the log in {} failed: {reason}; what was acknowledged is safe, start again to recover",
            args.data.display()
        );
    }
    log.close()?;
    info!(data = %args.data.display(), guest = description.name, sequence = log.appended(), "stopped serving on {address}");
    Ok(())
}

/// Changes when the process is told to stop. Told twice, it stops at once.
fn on_signal() -> Result<watch::Receiver<()>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let (stop, stopped) = watch::channel(());
    task::spawn(async move {
        let mut told = false;
        loop {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            if told {
                // What was acknowledged is durable already.
                warn!("stopping at once");
                std::process::exit(1);
            }
            told = true;
            stop.send_replace(());
        }
    });
    Ok(stopped)
}

/// Starts the admin listener, which speaks of the health it gives.
fn watched(address: SocketAddr) -> Result<Arc<Health>> {
    let listener = bind(address, "--admin")?;
    let (address, listener) = listen(listener).with_context(|| cannot_listen(address, "--admin"))?;
    let health = Arc::new(Health::new());
    Admin { health: Arc::clone(&health) }.start(listener.into_std()?)?;
    info!("admin on http://{address}");
    Ok(health)
}

fn bind(address: SocketAddr, flag: &str) -> Result<TcpSocket> {
    let bind = || {
        let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
        // Else a restart would have to wait for the connections of the run before to be forgotten.
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        Ok::<_, std::io::Error>(socket)
    };
    bind().with_context(|| cannot_listen(address, flag))
}

fn listen(socket: TcpSocket) -> std::io::Result<(SocketAddr, TcpListener)> {
    let listener = socket.listen(BACKLOG)?;
    Ok((listener.local_addr()?, listener))
}

fn cannot_listen(address: SocketAddr, flag: &str) -> String {
    format!("cannot listen on {address}; stop what listens there, or choose another address with {flag}")
}

async fn tick(shard: Arc<Shard>) {
    let mut interval = interval(TICK);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = interval.tick() => {}
            () = shard.more_to_tick() => sleep(SOON).await,
        }
        shard.tick();
    }
}
