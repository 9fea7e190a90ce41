//! What is done before anything is read or written: the schema, the settings of the database, and the epoch.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use tokio::time::sleep;
use tokio_postgres::Statement;
use tracing::warn;

use super::session::Session;
use super::target::Target;
use super::{schema, writer};
use crate::log::file::Durability;

/// A writer that was not seen for this long has lost its right.
pub const LEASE: Duration = Duration::from_secs(10);
/// The connection of a process that was just killed takes a moment to be missed.
const PATIENCE: Duration = Duration::from_secs(2);
const LOOK: Duration = Duration::from_millis(50);

pub struct Opened {
    pub epoch: i64,
    pub last: u64,
    pub compacted: u64,
    pub session: Session,
    pub append: Statement,
    pub doubts: Vec<String>,
}

pub async fn open(target: &Target, timeout: Duration, settings: &str, durability: Durability) -> Result<Opened> {
    let session = Session::connect(target, timeout, settings).await?;
    schema::prepare(&session).await?;
    let shape = "the tables in the schema kvs are not those that this kvs makes";
    let append = writer::prepare(&session).await.context(shape)?;
    let doubts = doubts(&session, durability).await?;
    for doubt in &doubts {
        warn!("{doubt}");
    }
    await_turn(&session).await?;
    let holder = format!("process {}", std::process::id());
    let take = "UPDATE kvs.writer SET epoch = epoch + 1, holder = $1 || coalesce(' at ' || host(inet_client_addr()), ''), \
         seen = clock_timestamp() RETURNING epoch, last, compacted";
    let row = session.one(take, &[&holder]).await.context("the epoch cannot be taken from kvs.writer")?;
    let (epoch, last): (i64, i64) = (row.try_get(0)?, row.try_get(1)?);
    let (last, compacted) = (last.cast_unsigned(), row.try_get::<_, i64>(2)?.cast_unsigned());
    Ok(Opened { epoch, last, compacted, session, append, doubts })
}

/// Waits until nobody else writes, or whoever does is not seen any more.
async fn await_turn(session: &Session) -> Result<()> {
    let begun = Instant::now();
    loop {
        let locked = session.one("SELECT pg_try_advisory_lock($1)", &[&writer::LOCK]).await?;
        if locked.try_get(0)? {
            return Ok(());
        }
        let seen = "SELECT holder, extract(epoch FROM clock_timestamp() - seen)::float8 FROM kvs.writer";
        let row = session.one(seen, &[]).await?;
        let (holder, ago): (Option<String>, f64) = (row.try_get(0)?, row.try_get(1)?);
        if ago > LEASE.as_secs_f64() {
            warn!("{} has not been seen for {ago:.0} s: it writes no more", holder.unwrap_or_default());
            return Ok(());
        }
        if begun.elapsed() > PATIENCE {
            bail!(
                "{} writes it, and did so {ago:.1} s ago: stop that first",
                holder.unwrap_or("another process".into())
            );
        }
        sleep(LOOK).await;
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
