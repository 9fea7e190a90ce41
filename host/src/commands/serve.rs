//! `kvs serve`: starts the log, the guest and the listeners, and stops them in the opposite order.

mod check;
mod listeners;
mod stop;
mod store;

use std::env;
use std::mem;
use std::net::TcpListener as StdListener;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::{Arc, OnceLock};

use anyhow::{Context, Result, bail, ensure};
use kvs_runtime::Env;
use kvs_txlog::TransactionLog;
use kvs_txlog::change_feed::ChangeFeed;
use tokio::runtime::{Builder, Handle};
use tokio::signal::unix::SignalKind;
use tokio::sync::{Mutex, RwLock, watch};
use tracing::{info, warn};

use self::check::{check, inflight_bytes, too_large_with_spares};
use self::listeners::{WhenPrimary, advertised, distinct, exposed, open, reserve};
use self::stop::on_signal;
use self::store::{Opened, open_log};
use crate::admin::{Admin, Phase, Process, ReadOnly};
use crate::descriptors;
use crate::edge::access_log::AccessLog;
use crate::edge::auth::Tokens;
use crate::edge::budget::Budget;
use crate::edge::cors::Cors;
use crate::edge::fresh::Reloads;
use crate::edge::listener::{Listener, Listeners, SocketFile};
use crate::edge::proxy::TrustedProxies;
use crate::edge::slow_log::SlowLog;
use crate::edge::throttle::Throttle;
use crate::edge::tls::Tls;
use crate::edge::{self, Edge, Forwarder, RequestIds, Service, Stage, Successor};
use crate::follow::{self, Followed};
use crate::guest::{Reload, Shards, Swapper};
use crate::lines;
use crate::memory;
use crate::settings::{Serve, TxlogStorage};
use crate::signals::listen as listen_for;
use crate::systemd::{self, Activated};
use crate::upgrade::{self, Control, Inherited, Upgrader, VARIABLE};
use crate::workers::Workers;

/// Serves until the process is stopped, or the log fails.
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
        Ended::Deposed => restart(),
    }
}

/// How serving ended.
#[derive(Debug)]
enum Ended {
    Stopped,
    /// Another process writes the log, and this one becomes a standby.
    Deposed,
}

/// Runs the same command in the place of this process: of what it holds, some may not be in the log, and nothing is kept.
fn restart() -> Result<()> {
    let mut arguments = env::args_os();
    let mut command = Command::new("/proc/self/exe");
    command.arg0(arguments.next().unwrap_or_default()).args(arguments).env_remove(VARIABLE);
    lines::end();
    Err(command.exec()).context("cannot become a standby: the process could not start itself again; start it")
}

async fn serve(args: &Serve, env: &Env, workers: &Workers) -> Result<Ended> {
    let Env { clock, tasks, .. } = env;
    // Before anything slow, so that a signal can stop the process at any time.
    let mut stop = on_signal(env)?;
    // Heard from here on, whether there is anything to read again or not: unheard, it would end the process.
    let _heard = listen_for(SignalKind::hangup())?;
    let upgrade_signal = listen_for(SignalKind::user_defined2())?;
    let mut inherited = Inherited::receive()?;
    let activated = Activated::take(&args.listen.listen)?;
    let is_activated = activated.http.is_some();
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
    let given = inherited.as_mut().map(|inherited| mem::take(&mut inherited.http)).or(activated.http);
    let reserved = reserve(args, given)?;
    let given_admin = inherited.as_mut().and_then(|inherited| inherited.admin.take()).or(activated.admin);
    let admin_listener = listeners::admin(given_admin, args.admin)?;
    let tokens_of_admin = tokens.clone().filter(|_| !args.access.admin_open);
    let tls_of_admin = tls.clone().filter(|_| args.tls.admin_tls);
    let admin = Arc::new(Admin::new(&args.admin_host, tokens_of_admin, tls_of_admin, env));
    if inherited.is_none() {
        start_admin(&admin, &admin_listener, args)?;
    }
    let health = &admin.health;
    lines::measure(&admin.metrics);
    admin.metrics.add(Arc::new(Process { data: args.data_dir.clone() }));

    let advertise = advertised(args, &reserved);
    let Opened { log, followed, handed_over, standby } = tokio::select! {
        opened = open_log(args, inherited.is_some(), advertise, &admin.metrics, env) => opened?,
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

    let (engine, guest) = store::load(args, env)?;
    health.reached(Phase::Replaying);
    let (engine, shards, replayed) = tokio::select! {
        built = store::build(args, engine, guest, Arc::clone(&log), env) => built?,
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
    let address = |listener: &Arc<Listener>| match **listener {
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
    let data = (args.data_dir.clone(), shares_data);
    let swapper = Swapper::new(engine, Arc::clone(&shards), Arc::clone(&log), data, args.probation);
    admin.set_swapper(Arc::clone(&swapper));
    let reloading = reload.start(Arc::clone(&swapper), env);
    health.reached(Phase::Serving);
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
    reload_files(&admin, tls.as_ref(), tokens.as_ref(), env)?;
    let successor = Arc::new(OnceLock::new());
    let limits = limits(args, connections)?;
    let store = (Arc::clone(&shards), Arc::clone(&changes), followed.clone());
    let service = service(args, env, &admin, store, tokens, limits, Arc::clone(&successor));
    admin.metrics.add(budget.clone());
    let when_primary = Arc::new(WhenPrimary::default());
    if args.listen_when_primary.is_some() {
        let when_primary = Arc::clone(&when_primary);
        health.add("primary listener", move || when_primary.condition());
    }
    let (proxy_protocol, stage) = (args.proxy.proxy_protocol, watch::Sender::new(Stage::Serving));
    let edge = Arc::new(Edge { tls, service, limits, budget, proxy_protocol, tasks: tasks.clone(), stage });
    admin.set_forwarder(Forwarder::new(Arc::clone(&edge)));

    // Before that this process is a standby that nobody knows of.
    let mut former = None;
    if let (Some(inherited), Some(standby), Some(followed)) = (&inherited, &standby, &followed) {
        former = tokio::select! {
            taken = inherited.take_over(standby, followed) => taken?,
            reason = log.watermark().latched() => bail!("{reason}"),
            _ = stop.changed() => {
                log.close()?;
                info!("stopped before the log was taken over");
                return Ok(Ended::Stopped);
            }
        };
    }
    let is_reported_by_former = former.is_some();
    if let Some(former) = former {
        let forwarded = Arc::clone(&edge).serve_forwarded(former);
        tasks.detach("forwarded connection", async move {
            if let Err(error) = forwarded.await {
                warn!("requests of the former process: {error:#}");
            }
        });
    }
    let (mut control, mut second) = (None, None);
    if let Some(inherited) = &mut inherited {
        start_admin(&admin, &admin_listener, args)?;
        control = inherited.control.take();
        second = inherited.when_primary.take();
    }
    info!(
        data = %args.data_dir.display(),
        guest = description.name,
        version = description.version,
        entries = replayed.entries,
        keys = replayed.keys,
        took = ?replayed.took,
        "serving on {addresses}",
    );

    let control = Control::new(&args.data_dir, control)?;
    let (stop_of_upgrade, opened_when_primary) = (stop.clone(), Arc::clone(&when_primary));
    let upgrader = Arc::new(Upgrader {
        shards,
        swapper,
        changes: Arc::clone(&changes),
        log: handed_over,
        listeners: upgrade::Listeners {
            http: listeners.iter().map(Arc::downgrade).collect(),
            admin: admin_listener,
            control: Arc::clone(&control),
            when_primary: Box::new(move || opened_when_primary.listener()),
        },
        successor,
        handed_over: watch::Sender::new(false),
        stop: stop_of_upgrade,
        alone: Mutex::default(),
        answering: RwLock::default(),
    });
    Arc::clone(&upgrader).start(upgrade_signal, followed.clone());
    let second = when_primary.open(args.listen_when_primary, second, followed, clock);
    if let Some(inherited) = &inherited {
        inherited.serves();
    }
    // Those of an upgrade belong to the former process until then.
    let files: Vec<_> = listeners.iter().filter_map(|listener| listener.file()).collect();
    if !is_reported_by_former {
        systemd::ready();
    }
    let mut handed_over = upgrader.handed_over.subscribe();
    let handed_over = async {
        // The sender is in the upgrader.
        let _ = handed_over.wait_for(|handed_over| *handed_over).await;
        admin.hand_over();
    };
    let mut failure = None;
    let stopped = async {
        tokio::select! {
            _ = stop.changed() => info!("stopping: finishing requests in progress"),
            reason = log.watermark().latched() => failure = Some(reason),
        }
        health.reached(Phase::Stopping);
        // Another process may serve, or take over from this one if its log has failed: then the service does not stop.
        if failure.is_none() && !*upgrader.handed_over.borrow() {
            systemd::stopping();
        }
        changes.end();
    };
    let cut_off = edge.serve(Listeners::new(listeners), second, handed_over, stopped).await;
    housekeeping.abort();
    reloading.abort();
    if cut_off > 0 {
        warn!("{cut_off} connections were cut off after {:?}", args.drain_timeout);
    }
    // An upgrade that was begun before the end, and its answer.
    let _upgraded = upgrader.alone.lock().await;
    let _answered = upgrader.answering.write().await;
    if let Some(reason) = failure {
        if args.standby && log.read_only().is_some() {
            ensure!(
                !is_activated,
                "{reason}; ending, since only the service manager can open the listeners again: start this server as a standby"
            );
            warn!("{reason}: restarting as a standby");
            return Ok(Ended::Deposed);
        }
        bail!("{reason}; what was acknowledged is safe, start again to recover");
    }
    if !*upgrader.handed_over.borrow() {
        control.remove();
        files.into_iter().for_each(SocketFile::remove);
    }
    log.close()?;
    info!(data = %args.data_dir.display(), guest = description.name, sequence = log.appended(), "stopped serving on {addresses}");
    Ok(Ended::Stopped)
}

/// Starts to read the files of TLS and of the tokens again when they change, or at SIGHUP.
fn reload_files(admin: &Admin, tls: Option<&Arc<Tls>>, tokens: Option<&Arc<Tokens>>, env: &Env) -> Result<()> {
    let hangup = || listen_for(SignalKind::hangup());
    let mut reloads = Vec::new();
    if let Some(tls) = tls {
        tls.start("TLS reload", hangup()?, env);
        admin.metrics.add(tls.clone());
        reloads.push(("tls", tls.last_reload()));
        let tls = Arc::clone(tls);
        admin.health.add("tls", move || tls.condition());
    }
    if let Some(tokens) = tokens {
        tokens.start("token reload", hangup()?, env);
        reloads.push(("tokens", tokens.last_reload()));
        let tokens = Arc::clone(tokens);
        admin.health.add("tokens", move || tokens.condition());
    }
    admin.metrics.add(Arc::new(Reloads(reloads)));
    Ok(())
}

/// Assembles the service of requests, and starts what it uses.
fn service(
    args: &Serve,
    env: &Env,
    admin: &Admin,
    (shards, changes, followed): (Arc<Shards>, Arc<ChangeFeed>, Option<Arc<Followed>>),
    tokens: Option<Arc<Tokens>>,
    limits: edge::Limits,
    successor: Arc<OnceLock<Successor>>,
) -> Service {
    let metrics = Arc::new(edge::Metrics::default());
    admin.metrics.add(metrics.clone());
    let throttle = args.access.rate().map(Throttle::new);
    if let Some(throttle) = &throttle {
        throttle.start(env);
    }
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
    Service {
        shards,
        changes,
        followed,
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
        successor,
    }
}

/// Limits of connections and requests.
fn limits(args: &Serve, connections: usize) -> Result<edge::Limits> {
    Ok(edge::Limits {
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
    })
}

/// Starts the admin listener.
fn start_admin(admin: &Arc<Admin>, listener: &StdListener, args: &Serve) -> Result<()> {
    let address = listener.local_addr()?;
    Arc::clone(admin).start(listener.try_clone()?)?;
    let scheme = if args.tls.admin_tls { "https" } else { "http" };
    info!("admin on {scheme}://{address}");
    Ok(())
}

#[cfg(test)]
mod tests;
