//! `kvs serve`: starts the log, the guest and the listeners, and stops them in the opposite order.

mod check;
mod guests;
mod http;
mod listeners;
mod prepare;
mod running;
mod stop;
mod store;

use std::env;
use std::mem;
use std::net::TcpListener as StdListener;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use kvs_runtime::Env;
use tokio::runtime::{Builder, Handle};
use tokio::signal::unix::SignalKind;
use tokio::sync::{Mutex, RwLock, watch};
use tracing::{info, warn};

use self::check::check;
use self::guests::Guests;
use self::http::Served;
use self::listeners::{Reserved, WhenPrimary, advertised, open, reserve};
use self::prepare::Prepared;
use self::running::Running;
use self::stop::Stop;
use self::store::{Store, open_log};
use crate::admin::{Admin, Phase, Process};
use crate::edge::Forwarder;
use crate::edge::auth::Tokens;
use crate::edge::listener::Listener;
use crate::edge::tls::Tls;
use crate::lines;
use crate::settings::{Serve, TxlogStorage};
use crate::signals::listen as listen_for;
use crate::systemd::{self, Activated};
use crate::upgrade::{self, Control, Inherited, Upgrader, VARIABLE};
use crate::watchdog::Watchdog;
use crate::workers::Workers;

/// Serves until the process is stopped, or the log fails.
pub fn run(args: &Serve, env: &Env) -> Result<()> {
    let workers = Arc::new(Workers::default());
    let (parks, unparks) = (Arc::clone(&workers), Arc::clone(&workers));
    let mut builder = Builder::new_multi_thread();
    builder.on_thread_park(move || parks.park()).on_thread_unpark(move || unparks.unpark());
    let runtime = kvs_runtime::runtime(&mut builder).context("no threads to serve with")?;
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
    // Before anything slow, so that a signal can stop the process at any time.
    let mut stop = Stop::on_signal(env)?;
    // Handled from here on, even if there is nothing to reload: otherwise it would end the process.
    let _hangup = listen_for(SignalKind::hangup())?;
    match start(args, env, workers, &mut stop).await? {
        Some(running) => running.until_stopped(args, env, stop).await,
        None => Ok(Ended::Stopped),
    }
}

/// Starts the server. Returns None if it was stopped meanwhile, or only its settings were to be checked.
async fn start(args: &Serve, env: &Env, workers: &Workers, stop: &mut Stop) -> Result<Option<Running>> {
    let upgrade_signal = listen_for(SignalKind::user_defined2())?;
    let mut inherited = Inherited::receive()?;
    let mut activated = Activated::take(&args.listen.listen)?;
    let is_activated = activated.http.is_some();
    let Prepared { reload, tls, tokens, exposures, connections, budget } = Prepared::new(args, env)?;
    if args.check {
        check(args, env)?;
        return Ok(None);
    }
    let (reserved, admin_listener) = sockets(args, &mut inherited, &mut activated)?;
    let admin = Arc::new(admin(args, tls.as_ref(), tokens.as_ref(), env));
    let watchdog = Watchdog::start(&Handle::current(), env).context("cannot start a thread that watches the others")?;
    admin.health.add("workers", move || watchdog.condition());
    if inherited.is_none() {
        start_admin(&admin, &admin_listener, args)?;
    }

    let advertise = advertised(args, &reserved);
    let opening = open_log(args, inherited.is_some(), advertise, &admin, env);
    let Some(opened) = stop.or(opening).await else {
        info!("stopped before the log was opened");
        return Ok(None);
    };
    let store = Store::start(opened?, args, workers, &admin, env)?;
    let (engine, guest) = store::load(args, &*store.log, inherited.is_some(), env)?;
    admin.health.reached(Phase::Replaying);
    let building = store::build(args, engine, guest, Arc::clone(&store.log), env);
    let Some(built) = stop.or(building).await else {
        store.log.close()?;
        info!("stopped before the log was replayed");
        return Ok(None);
    };
    let (engine, shards, replayed) = built?;

    let listeners = open(reserved, args)?;
    for exposure in exposures {
        warn!("{exposure}");
    }
    let guests = Guests::start(args, engine, shards, (&store, inherited.is_some()), reload, &admin, env);
    let when_primary = Arc::new(WhenPrimary::default());
    if args.listen_when_primary.is_some() {
        let when_primary = Arc::clone(&when_primary);
        admin.health.add("primary listener", move || when_primary.condition());
    }
    let addresses = addresses(&listeners, tls.is_some());
    let successor = Arc::default();
    let served = Served { tls, tokens, connections, budget, successor: Arc::clone(&successor) };
    let edge = http::edge(args, served, &guests.shards, &store, &admin, env)?;
    admin.set_forwarder(Forwarder::new(Arc::clone(&edge)));

    let (mut control, mut inherited_when_primary, mut former) = (None, None, None);
    if let Some(inherited) = &mut inherited {
        // Before that this process is a standby that nobody knows of.
        let Some(taken) = stop.or(take_over(inherited, &store)).await else {
            store.log.close()?;
            info!("stopped before the log was taken over");
            return Ok(None);
        };
        former = taken?;
        start_admin(&admin, &admin_listener, args)?;
        control = inherited.control.take();
        inherited_when_primary = inherited.when_primary.take();
    }
    let is_reported_by_former = former.is_some();
    if let Some(former) = former {
        http::serve_former(&edge, former, env);
    }
    let guest = guests.shards.serving().description;
    info!(
        data = %args.data_dir.display(),
        guest = guest.name,
        version = guest.version,
        entries = replayed.entries,
        keys = replayed.keys,
        took = ?replayed.took,
        "serving on {addresses}",
    );

    let is_locked = matches!(args.txlog, TxlogStorage::File);
    let control = Control::new(&args.data_dir, is_locked, control)?;
    let opened_when_primary = Arc::clone(&when_primary);
    let upgrader = Arc::new(Upgrader {
        shards: Arc::clone(&guests.shards),
        swapper: Arc::clone(&guests.swapper),
        read_only: Arc::clone(&store.read_only),
        changes: Arc::clone(&store.changes),
        log: store.handed_over.clone(),
        listeners: upgrade::Listeners {
            http: listeners.iter().map(Arc::downgrade).collect(),
            admin: admin_listener,
            control: Arc::clone(&control),
            when_primary: Box::new(move || opened_when_primary.listener()),
        },
        successor,
        handed_over: watch::Sender::new(false),
        stop: stop.signal(),
        alone: Mutex::default(),
        answering: RwLock::default(),
    });
    Arc::clone(&upgrader).start(upgrade_signal, store.followed.clone());
    if let Some(inherited) = &inherited {
        inherited.serves();
    }
    if !is_reported_by_former {
        systemd::ready(env);
    }
    Ok(Some(Running {
        is_activated,
        admin,
        store,
        guests,
        edge,
        listeners,
        addresses,
        when_primary,
        inherited_when_primary,
        control,
        upgrader,
    }))
}

/// Takes the log over from the process that this one replaces, unless that has ended. Returns the connection on which that
/// process forwards its last requests.
async fn take_over(inherited: &Inherited, store: &Store) -> Result<Option<UnixStream>> {
    let Some(followed) = &store.followed else { return Ok(None) };
    tokio::select! {
        taken = inherited.take_over(followed) => taken,
        reason = store.log.watermark().latched() => bail!("{reason}"),
    }
}

/// The listeners of an inherited process or of the service manager, or new ones. A taken port is found before a long replay;
/// clients can connect only after it.
fn sockets(
    args: &Serve,
    inherited: &mut Option<Inherited>,
    activated: &mut Activated,
) -> Result<(Vec<Reserved>, StdListener)> {
    let given = inherited.as_mut().map(|inherited| mem::take(&mut inherited.http)).or(activated.http.take());
    let reserved = reserve(args, given)?;
    let given = inherited.as_mut().and_then(|inherited| inherited.admin.take()).or(activated.admin.take());
    Ok((reserved, listeners::admin(given, args.admin)?))
}

/// The admin interface, as it is before the log is open.
fn admin(args: &Serve, tls: Option<&Arc<Tls>>, tokens: Option<&Arc<Tokens>>, env: &Env) -> Admin {
    let tokens = tokens.filter(|_| !args.access.admin_open).cloned();
    let tls = tls.filter(|_| args.tls.admin_tls).cloned();
    let admin = Admin::new(&args.admin_host, tokens, tls, env);
    lines::measure(&admin.metrics);
    admin.metrics.add(Arc::new(Process { data: args.data_dir.clone() }));
    admin
}

/// The addresses of the HTTP interface as log lines have them.
fn addresses(listeners: &[Arc<Listener>], is_tls: bool) -> String {
    let scheme = if is_tls { "https://" } else { "http://" };
    let address = |listener: &Arc<Listener>| match **listener {
        Listener::Tcp(_) => format!("{scheme}{listener}"),
        Listener::Unix(..) => listener.to_string(),
    };
    listeners.iter().map(address).collect::<Vec<_>>().join(" and ")
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
