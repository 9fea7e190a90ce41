//! What is done before anything is read or written: the schema, the settings of the database, and whether the epoch is to
//! be had.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use kvs_runtime::Clock;
use tokio_postgres::Statement;
use tracing::warn;

use super::epoch::{self, Epoch, Holder, Look};
use super::session::{Failure, Session};
use super::target::Target;
use super::{incarnations, schema, writer};
use crate::History;
use crate::file::Durability;

/// The connection of a process that was just killed takes a moment to be missed.
const PATIENCE: Duration = Duration::from_secs(2);
const LOOK: Duration = Duration::from_millis(50);
/// How often one that stands by tries a database that is away.
const TRY_AGAIN: Duration = Duration::from_secs(1);

pub struct Opened {
    pub session: Session,
    pub append: Statement,
    pub doubts: Vec<String>,
    pub holding: Holding,
}

/// Who writes.
pub enum Holding {
    Ours(Epoch),
    /// Another process, which has come as far as this look tells, in this history.
    Theirs(Look, History),
}

/// Whether there may be no log yet, and what is done when another process writes it.
#[derive(Clone, Copy)]
pub struct Manner {
    pub begin: bool,
    /// To follow it meanwhile, and to wait for a database that is away.
    pub standby: bool,
}

pub async fn open(
    target: &Target,
    timeout: Duration,
    settings: &str,
    durability: Durability,
    manner: Manner,
    clock: &Clock,
) -> Result<Opened> {
    loop {
        let session = Session::connect(target, timeout, settings).await;
        let opened = match session {
            Ok(session) => begin(session, durability, manner, clock).await,
            Err(failure) => Err(failure.into()),
        };
        match opened {
            Err(error) if manner.standby && error.downcast_ref().is_some_and(Failure::is_silence) => {
                warn!("standing by, and the database is away: {error:#}");
                clock.sleep(TRY_AGAIN).await;
            }
            opened => return opened,
        }
    }
}

async fn begin(session: Session, durability: Durability, manner: Manner, clock: &Clock) -> Result<Opened> {
    let Manner { begin, standby } = manner;
    schema::prepare(&session, begin).await?;
    let shape = "the tables in the schema kvs are not those that this kvs makes";
    let append = writer::prepare(&session).await.context(shape)?;
    let doubts = doubts(&session, durability).await?;
    for doubt in &doubts {
        warn!("{doubt}");
    }
    if standby {
        epoch::confirm(&session).await?;
    }
    let (begun, mut holder) = (clock.now(), Holder::new(standby, clock));
    let holding = loop {
        let look = holder.look(&session).await?;
        if look.is_free {
            let taken = epoch::take(&session, &look).await.context("the epoch cannot be taken from kvs.writer")?;
            match taken {
                Some(epoch) => break Holding::Ours(epoch),
                None => continue,
            }
        }
        if standby {
            let history = incarnations::history(&session).await?;
            break Holding::Theirs(look, history);
        }
        if clock.elapsed(begun) > PATIENCE {
            bail!("{} writes it, and did so {:.1?} ago: stop that first", look.holder, look.unseen);
        }
        clock.sleep(LOOK).await;
    };
    Ok(Opened { session, append, doubts, holding })
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
