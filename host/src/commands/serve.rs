//! `kvs serve`: puts the house together, in the order data flows back (log, guest, edge), and takes it down again.

mod listeners;

use std::convert::Infallible;
use std::env;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use bytesize::ByteSize;
use kvs_metrics::Metrics;
use kvs_runtime::Env;
use kvs_txlog::change_feed::ChangeFeed;
use kvs_txlog::file::{self, FileLog, StandbyLog};
use kvs_txlog::postgres::{self, PostgresLog};
use kvs_txlog::{Standby, TransactionLog};
use tokio::runtime::{Builder, Handle};
use tokio::signal::unix::{Signal, SignalKind};
use tokio::sync::watch;
use tokio::task;
use tracing::{info, warn};

use self::listeners::{WhenPrimary, advertised, bind, cannot_listen, distinct, exposed, listen, open, reserve};
use crate::admin::{Admin, Phase, Process, ReadOnly};
use crate::descriptors;
use crate::edge::access_log::AccessLog;
use crate::edge::auth::Tokens;
use crate::edge::budget::Budget;
use crate::edge::cors::Cors;
use crate::edge::fresh::Reloads;
use crate::edge::listener::{Listener, Listeners};
use crate::edge::proxy::TrustedProxies;
use crate::edge::slow_log::SlowLog;
use crate::edge::throttle::Throttle;
use crate::edge::tls::Tls;
use crate::edge::{self, Edge, Forwarder, RequestIds, Service};
use crate::follow::{self, Followed};
use crate::guest::{Arrangement, Engine, Reload, Shards, Source, Swapper};
use crate::lines;
use crate::memory;
use crate::settings::{Serve, TxlogStorage};
use crate::signals::listen as listen_for;
use crate::workers::Workers;

/// The share of the memory that requests and responses in flight may take, and what they may take in any case.
const MEMORY_SHARE: u64 = 8;
const LEAST_INFLIGHT: u64 = 64 << 20;

/// Serves until the process is told to stop, or the log fails.
pub fn run(args: &Serve, env: &Env) -> Result<()> {
    let workers = Arc::new(Workers::default());
    let (parks, unparks) = (Arc::clone(&workers), Arc::clone(&workers));
    let mut builder = Builder::new_multi_thread();
    builder.enable_all().on_thread_park(move || parks.park()).on_thread_unpark(move || unparks.unpark());
    let runtime = builder.build().context("no threads to serve with")?;
    let ended = runtime.block_on(serve(args, env, &workers));
    // A replay that was given up may still be running; nobody waits for it.
    runtime.shutdown_background();
    match ended? {
        Ended::Stopped => Ok(()),
        Ended::Deposed => begin_anew(),
    }
}

/// How serving ended.
#[derive(Debug)]
enum Ended {
    Stopped,
    /// Another process writes the log, and this one is to stand by.
    Deposed,
}

/// Runs the same command in the place of this process: of what it holds, some may not be in the log, and nothing is kept.
fn begin_anew() -> Result<()> {
    let mut arguments = env::args_os();
    let mut command = Command::new("/proc/self/exe");
    command.arg0(arguments.next().unwrap_or_default()).args(arguments);
    lines::end();
    Err(command.exec()).context("cannot stand by: the process could not be started anew; start it again")
}

async fn serve(args: &Serve, env: &Env, workers: &Workers) -> Result<Ended> {
    let Env { clock, tasks, .. } = env;
    // Before anything slow, so that a stop is heard at any time.
    let mut stop = on_signal(env)?;
    // Heard from here on, whether there is anything to read again or not: unheard, it would end the process.
    let hangup = || listen_for(SignalKind::hangup());
    let _heard = hangup()?;
    let shares_data = args.standby && matches!(args.txlog, TxlogStorage::File);
    let primary = shares_data.then_some(&*args.data_dir);
    let reload = Reload::new(args.guest.file.as_deref(), args.watch_guest, primary)?;
    let tls = args.tls.files().map(|files| edge::tls::load(files, clock.clone())).transpose()?;
    let tokens = args.access.tokens.as_deref().map(|file| edge::auth::load(file, clock.clone())).transpose()?;
    let exposures = exposed(args)?;
    distinct(args)?;
    if let Some(excess) = too_large_with_spares(args, memory::size()) {
        warn!("{excess}");
    }
    let connections = descriptors::connections(args.max_connections)?;
    let budget = Budget::new(inflight_bytes(args)?);
    if args.check {
        check(args, env)?;
        return Ok(Ended::Stopped);
    }
    // A taken port is found before a long replay; clients can connect only after it.
    let reserved = reserve(args)?;
    let admin = watched(args, tokens.clone(), tls.clone(), env)?;
    let health = &admin.health;
    lines::measure(&admin.metrics);
    admin.metrics.add(Arc::new(Process { data: args.data_dir.clone() }));

    let advertise = advertised(args, &reserved);
    let (log, followed) = tokio::select! {
        opened = open_log(args, advertise, &admin.metrics, env) => opened?,
        _ = stop.changed() => {
            info!("stopped before the log was opened");
            return Ok(Ended::Stopped);
        }
    };
    let changes = ChangeFeed::new(log, usize::try_from(args.watch_buffer_bytes.as_u64())?, env.clone());
    let log: Arc<dyn TransactionLog> = changes.clone();
    changes.start();
    // Weak: the threads of the runtime outlive the log.
    let idling = Arc::downgrade(&log);
    workers.observe(Handle::current().metrics().num_workers(), move |idle| {
        if let Some(log) = idling.upgrade() {
            log.set_idle(idle);
        }
    });

    admin.set_log(Arc::clone(&log), args.backup.backup_timeout);
    let read_only = ReadOnly::open(Arc::clone(&changes), &args.data_dir)?;
    admin.set_read_only(Arc::clone(&read_only));

    let engine = Engine::new(
        args.guest.limits(args.max_value_bytes, args.shards)?,
        args.guest.guest_config.clone(),
        Some(&args.data_dir.join("cache")),
        args.response_cache_bytes.as_u64(),
        env,
    )?;
    let guest = engine.load(Source::choose(args.guest.file.as_deref(), &args.data_dir))?;
    health.reached(Phase::Replaying);
    let building = {
        let arrangement = Arrangement { count: usize::from(args.shards), with_spares: args.spare };
        let (log, env) = (Arc::clone(&log), env.clone());
        task::spawn_blocking(move || {
            let (shards, replayed) = Shards::build(guest, log, arrangement, env)?;
            engine.keep(&shards.serving().guest);
            Ok::<_, anyhow::Error>((engine, shards, replayed))
        })
    };
    let (engine, shards, replayed) = tokio::select! {
        built = building => built??,
        _ = stop.changed() => {
            log.close()?;
            info!("stopped before the log was replayed");
            return Ok(Ended::Stopped);
        }
    };

    let listeners = open(reserved, args)?;
    let description = shards.serving().description;
    for exposure in exposures {
        warn!("{exposure}");
    }
    let scheme = if tls.is_some() { "https://" } else { "http://" };
    let address = |listener: &Listener| match listener {
        Listener::Tcp(_) => format!("{scheme}{listener}"),
        Listener::Unix(..) => listener.to_string(),
    };
    let addresses = listeners.iter().map(address).collect::<Vec<_>>().join(" and ");
    admin.metrics.add(shards.clone());
    health.set_guest(Arc::clone(&shards));
    let timed = Arc::clone(&shards);
    health.add("clock", move || timed.clock_condition());
    if args.spare {
        let spared = Arc::clone(&shards);
        health.add("spare", move || spared.spare_condition());
        shards.keep_spares(memory::size());
    }
    let metrics = Arc::new(edge::Metrics::default());
    admin.metrics.add(metrics.clone());
    let data = (args.data_dir.clone(), shares_data);
    let swapper = Swapper::new(engine, Arc::clone(&shards), Arc::clone(&log), data, args.probation);
    admin.set_swapper(Arc::clone(&swapper));
    let reloading = reload.start(swapper, env);
    health.reached(Phase::Serving);
    info!(
        data = %args.data_dir.display(),
        guest = description.name,
        version = description.version,
        entries = replayed.entries,
        keys = replayed.keys,
        took = ?replayed.took,
        "serving on {addresses}",
    );

    let followed = followed.map(|log| Arc::new(Followed::new(log)));
    if let Some(followed) = followed.clone() {
        let (changes, shards) = (Arc::clone(&changes), Arc::clone(&shards));
        tasks.restart("follow", clock, move || {
            follow::run(Arc::clone(&followed), Arc::clone(&changes), Arc::clone(&shards), Arc::clone(&read_only))
        });
    }
    let housekeeping = {
        let shards = Arc::clone(&shards);
        tasks.restart("housekeeping", clock, move || {
            let shards = Arc::clone(&shards);
            async move { shards.keep_house().await }
        })
    };
    if let Some(tls) = &tls {
        tls.start("TLS reload", hangup()?, env);
        admin.metrics.add(tls.clone());
        let tls = Arc::clone(tls);
        health.add("tls", move || tls.condition());
    }
    if let Some(tokens) = &tokens {
        tokens.start("token reload", hangup()?, env);
        let tokens = Arc::clone(tokens);
        health.add("tokens", move || tokens.condition());
    }
    let reloads = tls.iter().map(|tls| ("tls", tls.last_reload()));
    let reloads = reloads.chain(tokens.iter().map(|tokens| ("tokens", tokens.last_reload())));
    admin.metrics.add(Arc::new(Reloads(reloads.collect())));
    let throttle = args.access.rate().map(Throttle::new);
    if let Some(throttle) = &throttle {
        throttle.start(env);
    }
    let limits = edge::Limits {
        connections,
        connections_per_address: args.max_connections_per_address,
        handshake_timeout: args.tls.handshake_timeout,
        header_bytes: usize::try_from(args.max_header_bytes.as_u64())?,
        headers: args.max_headers,
        target_bytes: usize::try_from(args.max_target_bytes.as_u64())?,
        header_timeout: args.header_timeout,
        idle_timeout: args.idle_timeout,
        body_bytes: args.max_value_bytes.as_u64(),
        body_rate: args.min_body_rate.as_u64(),
        requests: args.max_requests,
        streams: args.http2_max_streams,
        resets: args.http2_max_resets,
        control_frames: args.http2_max_control_frames,
        request_timeout: args.request_timeout,
        stream_heartbeat: args.watch_keep_alive,
        hold: args.max_wait,
        drain: args.drain_timeout,
    };
    let access_log = args.access_log_rate.map(AccessLog::new);
    if let Some(access_log) = &access_log {
        access_log.start(env);
        admin.metrics.add(access_log.clone());
    }
    let slow_log = args.slow_request.map(SlowLog::new);
    if let Some(slow_log) = &slow_log {
        slow_log.start(env);
        admin.metrics.add(slow_log.clone());
    }
    let service = Service {
        shards,
        changes: Arc::clone(&changes),
        followed: followed.clone(),
        stale_reads: args.stale_reads,
        limits,
        tokens,
        throttle,
        cors: Cors::new(args.access.cors_origin.clone()),
        metrics,
        ids: RequestIds::default(),
        access_log,
        slow_log,
        proxies: TrustedProxies::new(&args.proxy.trusted_proxy),
    };
    admin.metrics.add(budget.clone());
    let when_primary = Arc::new(WhenPrimary::default());
    if args.listen_when_primary.is_some() {
        let when_primary = Arc::clone(&when_primary);
        health.add("primary listener", move || when_primary.condition());
    }
    let second = when_primary.open(args.listen_when_primary, followed, clock);
    let mut failure = None;
    let (proxy_protocol, stopping) = (args.proxy.proxy_protocol, watch::Sender::new(false));
    let edge = Arc::new(Edge { tls, service, limits, budget, proxy_protocol, tasks: tasks.clone(), stopping });
    admin.set_forwarder(Forwarder::new(Arc::clone(&edge)));
    let cut_off = edge.serve(Listeners::new(listeners), second, async {
        tokio::select! {
            _ = stop.changed() => {}
            reason = log.watermark().latched() => failure = Some(reason),
        }
        health.reached(Phase::Stopping);
        changes.end();
        if failure.is_none() {
            info!("stopping: finishing what is under way");
        }
    });
    let cut_off = cut_off.await;
    housekeeping.abort();
    reloading.abort();
    if cut_off > 0 {
        warn!("{cut_off} connections were cut off after {:?}", args.drain_timeout);
    }
    if let Some(reason) = failure {
        if args.standby && log.read_only().is_some() {
            warn!("{reason}: beginning anew, to stand by");
            return Ok(Ended::Deposed);
        }
        bail!("{reason}; what was acknowledged is safe, start again to recover");
    }
    log.close()?;
    info!(data = %args.data_dir.display(), guest = description.name, sequence = log.appended(), "stopped serving on {addresses}");
    Ok(Ended::Stopped)
}

/// Checks the settings that are used only when the server has begun, and the guest.
fn check(args: &Serve, env: &Env) -> Result<()> {
    let data = &args.data_dir;
    ensure!(data.is_dir() || !data.exists(), "--data-dir {} is not a directory; give another", data.display());
    listeners::check(args)?;
    match &args.txlog {
        TxlogStorage::File => file_options(args, None, env.clone()).check()?,
        TxlogStorage::Postgres(url) => url.check()?,
    }
    let limits = args.guest.limits(args.max_value_bytes, args.shards)?;
    let engine = Engine::new(limits, args.guest.guest_config.clone(), None, 0, env)?;
    engine.load(Source::choose(args.guest.file.as_deref(), &args.data_dir))?;
    info!("the settings are valid");
    Ok(())
}

/// What clients may hold in memory: as configured, or a share of what there is. Never so little that no value fits.
fn inflight_bytes(args: &Serve) -> Result<usize> {
    let least = 2 * args.max_value_bytes.as_u64();
    let Some(configured) = args.max_inflight_bytes else {
        return Ok(usize::try_from((memory::size() / MEMORY_SHARE).max(LEAST_INFLIGHT).max(least))?);
    };
    ensure!(
        configured.as_u64() >= least,
        "--max-inflight-bytes {configured} is less than twice --max-value-bytes {}; give at least that",
        args.max_value_bytes
    );
    Ok(usize::try_from(configured.as_u64())?)
}

/// The warning that the instances and their spares, of which each may grow to its limit, do not fit into the memory.
fn too_large_with_spares(args: &Serve, memory: u64) -> Option<String> {
    let (limit, instances) = (args.guest.memory_limit(memory, args.shards), 2 * u64::from(args.shards));
    let most = limit.as_u64().saturating_mul(instances);
    (args.spare && most > memory).then(|| {
        format!(
            "with --spare {instances} instances may take {} together, and the memory is {}: when the spares do not fit they \
             are left out; a lower --guest-max-memory-bytes, now {limit}, refuses data before",
            ByteSize(most),
            ByteSize(memory)
        )
    })
}

fn file_options(args: &Serve, advertise: Option<String>, env: Env) -> file::Options {
    file::Options {
        data: args.data_dir.clone(),
        segment_bytes: args.segment_bytes.as_u64(),
        group_bytes: args.guest.group_bytes(args.max_value_bytes),
        durability: args.durability,
        retain: args.backup.retain,
        advertise,
        env,
    }
}

/// Opens the log. Given twice when another process writes it, and it is to be followed.
async fn open_log(
    args: &Serve,
    advertise: Option<String>,
    metrics: &Metrics,
    env: &Env,
) -> Result<(Arc<dyn TransactionLog>, Option<Arc<dyn Standby>>)> {
    let env = env.clone();
    match &args.txlog {
        TxlogStorage::File => {
            let options = file_options(args, advertise, env);
            if args.standby {
                let log = Arc::new(task::spawn_blocking(move || StandbyLog::open(options)).await??);
                metrics.add(log.clone());
                let followed = log.read_only().is_some().then(|| log.clone() as Arc<dyn Standby>);
                return Ok((log, followed));
            }
            let log = Arc::new(FileLog::open(options)?);
            metrics.add(log.clone());
            Ok((log, None))
        }
        TxlogStorage::Postgres(url) => {
            let data = args.data_dir.display();
            std::fs::create_dir_all(&args.data_dir).with_context(|| format!("cannot make the directory {data}"))?;
            let manner = postgres::Manner { begin: true, standby: args.standby };
            let (url, timeout, lease, retain) = (url.clone(), args.txlog_timeout, args.read_lease, args.backup.retain);
            let (group_bytes, durability) = (args.guest.group_bytes(args.max_value_bytes), args.durability);
            let options =
                postgres::Options { url, group_bytes, durability, timeout, manner, lease, retain, advertise, env };
            let log = Arc::new(task::spawn_blocking(move || PostgresLog::open(&options)).await??);
            metrics.add(log.clone());
            let followed = log.read_only().is_some().then(|| log.clone() as Arc<dyn Standby>);
            Ok((log, followed))
        }
    }
}

/// Changes when the process is told to stop. Told twice, it stops at once.
fn on_signal(env: &Env) -> Result<watch::Receiver<bool>> {
    let mut terminate = listen_for(SignalKind::terminate())?;
    let mut interrupt = listen_for(SignalKind::interrupt())?;
    let (stop, stopped) = watch::channel(false);
    env.tasks.restart("signals", &env.clock, move || {
        let (terminate, interrupt, stop) = (terminate(), interrupt(), stop.clone());
        async move { heed(terminate?, interrupt?, &stop).await }
    });
    Ok(stopped)
}

async fn heed(mut terminate: Signal, mut interrupt: Signal, stop: &watch::Sender<bool>) -> Result<Infallible> {
    loop {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        if stop.send_replace(true) {
            // What was acknowledged is durable already.
            warn!("stopping at once");
            lines::end();
            std::process::exit(1);
        }
    }
}

/// Starts the admin listener, which speaks of the health it gives.
fn watched(args: &Serve, tokens: Option<Arc<Tokens>>, tls: Option<Arc<Tls>>, env: &Env) -> Result<Arc<Admin>> {
    let tokens = tokens.filter(|_| !args.access.admin_open);
    let tls = tls.filter(|_| args.tls.admin_tls);
    let scheme = if tls.is_some() { "https" } else { "http" };
    let listener = bind(args.admin, "--admin")?;
    let (address, listener) = listen(listener).with_context(|| cannot_listen(args.admin, "--admin"))?;
    let admin = Arc::new(Admin::new(&args.admin_host, tokens, tls, env));
    Arc::clone(&admin).start(listener.into_std()?)?;
    info!("admin on {scheme}://{address}");
    Ok(admin)
}

#[cfg(test)]
mod tests;
