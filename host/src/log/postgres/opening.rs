//! What is done before anything is read or written: the schema, the settings of the database, and the epoch.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use tokio::time::sleep;
use tokio_postgres::Statement;
use tracing::{info, warn};

use super::session::{Failure, Session};
use super::target::Target;
use super::{schema, writer};
use crate::log::file::Durability;

/// A writer that was not seen for this long has lost its right.
pub const LEASE: Duration = Duration::from_secs(10);
/// The connection of a process that was just killed takes a moment to be missed.
const PATIENCE: Duration = Duration::from_secs(2);
const LOOK: Duration = Duration::from_millis(50);
/// How often one that stands by looks.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

pub struct Opened {
    pub epoch: i64,
    pub last: u64,
    pub compacted: u64,
    pub session: Session,
    pub append: Statement,
    pub doubts: Vec<String>,
}

/// Whether there may be no log yet, and what is done when another process writes it.
#[derive(Clone, Copy)]
pub struct Manner {
    pub begin: bool,
    /// To wait for as long as that takes, also for a database that is away.
    pub standby: bool,
}

pub async fn open(
    target: &Target,
    timeout: Duration,
    settings: &str,
    durability: Durability,
    manner: Manner,
) -> Result<Opened> {
    loop {
        let session = Session::connect(target, timeout, settings).await;
        let opened = match session {
            Ok(session) => take(session, durability, manner).await,
            Err(failure) => Err(failure.into()),
        };
        match opened {
            Err(error) if manner.standby && error.downcast_ref().is_some_and(Failure::is_silence) => {
                warn!("standing by, and the database is away: {error:#}");
                sleep(LOOK_AGAIN).await;
            }
            opened => return opened,
        }
    }
}

async fn take(session: Session, durability: Durability, Manner { begin, standby }: Manner) -> Result<Opened> {
    schema::prepare(&session, begin).await?;
    let shape = "the tables in the schema kvs are not those that this kvs makes";
    let append = writer::prepare(&session).await.context(shape)?;
    let doubts = doubts(&session, durability).await?;
    for doubt in &doubts {
        warn!("{doubt}");
    }
    await_turn(&session, standby).await?;
    let holder = format!("process {}", std::process::id());
    let take = "UPDATE kvs.writer SET epoch = epoch + 1, holder = $1 || coalesce(' at ' || host(inet_client_addr()), ''), \
         seen = clock_timestamp() RETURNING epoch, last, compacted";
    let row = session.one(take, &[&holder]).await.context("the epoch cannot be taken from kvs.writer")?;
    let (epoch, last): (i64, i64) = (row.try_get(0)?, row.try_get(1)?);
    let (last, compacted) = (last.cast_unsigned(), row.try_get::<_, i64>(2)?.cast_unsigned());
    Ok(Opened { epoch, last, compacted, session, append, doubts })
}

/// Waits until nobody else writes, or whoever does is not seen any more. One that stands by takes nothing from a writer that
/// has merely lost its connection, as all do when the database is started again: it goes by what it sees itself.
async fn await_turn(session: &Session, standby: bool) -> Result<()> {
    let begun = Instant::now();
    let (mut known, mut since, mut told) = (String::new(), begun, false);
    loop {
        let look = "SELECT holder, seen::text, extract(epoch FROM clock_timestamp() - seen)::float8 FROM kvs.writer";
        let row = session.one(look, &[]).await?;
        let (holder, seen, ago): (Option<String>, String, f64) = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
        if known != seen {
            (known, since) = (seen, Instant::now());
        }
        let unseen = if standby { since.elapsed() } else { Duration::try_from_secs_f64(ago).unwrap_or_default() };
        if (holder.is_none() || !standby || unseen > LEASE)
            && session.one("SELECT pg_try_advisory_lock($1)", &[&writer::LOCK]).await?.try_get(0)?
        {
            return Ok(());
        }
        let holder = holder.unwrap_or("another process".into());
        if unseen > LEASE {
            warn!("{holder} has not been seen for {unseen:.0?}: it writes no more");
            return Ok(());
        }
        if begun.elapsed() <= PATIENCE {
            sleep(LOOK).await;
        } else if standby {
            if !std::mem::replace(&mut told, true) {
                info!("standing by while {holder} writes the log");
            }
            sleep(LOOK_AGAIN).await;
        } else {
            bail!("{holder} writes it, and did so {ago:.1} s ago: stop that first");
        }
    }
}

/// What a committed transaction may not survive.
async fn doubts(session: &Session, durability: Durability) -> Result<Vec<String>> {
    let mut doubts = Vec::new();
    let cuts = "a power cut of the database takes acknowledged writes with it";
    for name in ["fsync", "full_page_writes", "synchronous_commit"] {
        let value: String = session.one(&format!("SELECT current_setting('{name}')"), &[]).await?.try_get(0)?;
        let wanted = name == "synchronous_commit" && durability == Durability::Os;
        if value == "off" && !wanted {
            doubts.push(format!("{name} is off: {cuts}"));
        }
    }
    Ok(doubts)
}
