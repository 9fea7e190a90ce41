//! The log, and the shards that are built from it.

use std::sync::Arc;

use anyhow::{Context, Result};
use kvs_runtime::Env;
use kvs_txlog::change_feed::ChangeFeed;
#[cfg(feature = "nats")]
use kvs_txlog::cluster::{self, nats};
use kvs_txlog::file::{self, FileLog, StandbyLog};
use kvs_txlog::postgres::{self, Existing, PostgresLog};
use kvs_txlog::{HandOver, PastLog, Standby, TransactionLog};
use tokio::runtime::Handle;
use tokio::task;

use super::prepare::shares_data;
use crate::admin::{Admin, DataUsers, ReadOnly};
use crate::commands::txlog::open_offline;
use crate::follow::Followed;
use crate::guest::{Arrangement, Engine, Guest, GuestIdentity, Replayed, Shards, Source, record_guest};
use crate::settings::{Serve, TxlogStorage};
use crate::workers::Workers;

pub fn file_options(args: &Serve, advertise: Option<String>, env: Env) -> file::Options {
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

/// An open log, and what else it is.
pub struct Opened {
    pub log: Arc<dyn TransactionLog>,
    /// Where another process writes it, and it is to be followed.
    pub followed: Option<Arc<dyn Standby>>,
    /// Where it can be handed over to another process.
    pub handed_over: Option<Arc<dyn HandOver>>,
}

/// The log, with its change feed in front.
pub struct Store {
    pub log: Arc<dyn TransactionLog>,
    pub changes: Arc<ChangeFeed>,
    pub read_only: Arc<ReadOnly>,
    /// The log of another process, as far as it is followed.
    pub followed: Option<Arc<Followed>>,
    /// Where it can be handed over to another process.
    pub handed_over: Option<Arc<dyn HandOver>>,
}

impl Store {
    /// Starts the change feed of a log, and what the admin interface offers of it.
    pub fn start(opened: Opened, args: &Serve, workers: &Workers, admin: &Admin, env: &Env) -> Result<Self> {
        let buffer = usize::try_from(args.watch_buffer_bytes.as_u64())?;
        let Opened { log, followed, handed_over } = opened;
        let changes = ChangeFeed::new(log, buffer, env.clone());
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
        let users = if args.read_only {
            DataUsers::Others
        } else if shares_data(args) {
            DataUsers::Pair
        } else {
            DataUsers::This
        };
        let read_only = ReadOnly::open(Arc::clone(&changes), &args.data_dir, users)?;
        admin.set_read_only(Arc::clone(&read_only));
        let followed = followed.map(|log| Arc::new(Followed::new(log, env.clock.clone())));
        Ok(Self { log, changes, read_only, followed, handed_over })
    }
}

/// Opens the log. `inherits` while a server runs that this one replaces.
pub async fn open_log(
    args: &Serve,
    inherits: bool,
    advertise: Option<String>,
    admin: &Admin,
    env: &Env,
) -> Result<Opened> {
    if args.read_only {
        let (txlog, data, until) = (args.txlog.clone(), args.data_dir.clone(), args.until);
        let opened = task::spawn_blocking(move || PastLog::open(open_offline(&txlog, &data)?, until)).await??;
        return Ok(Opened { log: Arc::new(opened), followed: None, handed_over: None });
    }
    let (metrics, env) = (&admin.metrics, env.clone());
    match &args.txlog {
        TxlogStorage::File => {
            let options = file_options(args, advertise, env);
            if args.standby || inherits {
                let health = Arc::clone(&admin.health);
                let opening = move || StandbyLog::open(options, |reason| health.log_waits(reason));
                let log = Arc::new(task::spawn_blocking(opening).await??);
                metrics.add(log.clone());
                let followed = log.read_only().is_some().then(|| log.clone() as Arc<dyn Standby>);
                return Ok(Opened { log: log.clone(), followed, handed_over: Some(log) });
            }
            let log = Arc::new(FileLog::open(options)?);
            metrics.add(log.clone());
            Ok(Opened { log: log.clone(), followed: None, handed_over: Some(log) })
        }
        TxlogStorage::Postgres(url) => {
            make_data_dir(args)?;
            let manner = postgres::Manner { existing: Existing::Allowed, standby: args.standby || inherits };
            let (url, timeout, retain) = (url.clone(), args.txlog_timeout, args.backup.retain);
            let lease = args.read_lease.unwrap_or(postgres::READ_LEASE);
            let (group_bytes, durability) = (args.guest.group_bytes(args.max_value_bytes), args.durability);
            let options =
                postgres::Options { url, group_bytes, durability, timeout, manner, lease, retain, advertise, env };
            let log = Arc::new(task::spawn_blocking(move || PostgresLog::open(&options)).await??);
            metrics.add(log.clone());
            let followed = log.read_only().is_some().then(|| log.clone() as Arc<dyn Standby>);
            Ok(Opened { log: log.clone(), followed, handed_over: Some(log) })
        }
        #[cfg(feature = "nats")]
        TxlogStorage::Nats(url) => {
            make_data_dir(args)?;
            let (url, data, standby) = (url.clone(), args.data_dir.clone(), args.standby || inherits);
            let lease = args.read_lease.unwrap_or(cluster::READ_LEASE);
            let group_bytes = Some(args.guest.group_bytes(args.max_value_bytes));
            let retain = args.backup.retain;
            let options = cluster::Options { group_bytes, standby, lease, retain, advertise, env };
            let (monitors, allow_unsafe) = (args.nats.txlog_monitor.clone(), args.nats.allow_unsafe_txlog);
            let checks = nats::Checks { begin: true, allow_unsafe, monitors };
            let opened = task::spawn_blocking(move || nats::open(&url, &checks, Some(&data), &options));
            let log = Arc::new(opened.await??);
            metrics.add(log.clone());
            let followed = log.read_only().is_some().then(|| log.clone() as Arc<dyn Standby>);
            Ok(Opened { log: log.clone(), followed, handed_over: Some(log) })
        }
    }
}

fn make_data_dir(args: &Serve) -> Result<()> {
    let data = args.data_dir.display();
    std::fs::create_dir_all(&args.data_dir).with_context(|| format!("cannot make the directory {data}"))
}

/// Loads the guest that is to serve: on a standby that shares the data directory of its primary, and in a process that replaces
/// another one, the same as there.
pub fn load(args: &Serve, log: &dyn TransactionLog, inherits: bool, env: &Env) -> Result<(Engine, Guest)> {
    let engine = Engine::new(
        args.guest.limits(args.max_value_bytes, args.shards)?,
        args.guest.guest_config.clone(),
        Some(&args.data_dir.join("cache")),
        args.response_cache_bytes.as_u64(),
        env,
    )?;
    let (named, data) = (args.guest.file.as_deref(), &*args.data_dir);
    // A log that is only looked at is not changed, nor is what is beside it.
    let is_primary = log.read_only().is_none() && !args.read_only;
    let of_primary = if inherits {
        Some(Source::of_former(named, data)?)
    } else if shares_data(args) && !is_primary {
        Source::of_primary(named, data).context("cannot find the guest of the primary")?
    } else {
        None
    };
    let guest = engine.load(of_primary.unwrap_or_else(|| Source::choose(named, data)))?;
    if is_primary {
        record_guest(data, &GuestIdentity::of(guest.source(), guest.digest()));
    }
    Ok((engine, guest))
}

/// Builds the shards of a guest from the log.
pub async fn build(
    args: &Serve,
    engine: Engine,
    guest: Guest,
    log: Arc<dyn TransactionLog>,
    env: &Env,
) -> Result<(Engine, Arc<Shards>, Replayed)> {
    let arrangement = Arrangement { count: usize::from(args.shards), with_spares: args.spare };
    let env = env.clone();
    task::spawn_blocking(move || {
        let (shards, replayed) = Shards::build(guest, log, arrangement, env)?;
        engine.keep(&shards.serving().guest);
        Ok((engine, shards, replayed))
    })
    .await?
}
