//! Opening the log: connects, migrates the schema, checks the settings, and takes the epoch or becomes a standby.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use kvs_runtime::Clock;
use tokio_postgres::Statement;
use tracing::warn;
use uuid::Uuid;

use super::conditions::Conditions;
use super::epoch::{self, Epoch, Holder, Look};
use super::incarnations::Identity;
use super::session::{Failure, Session};
use super::target::Target;
use super::{incarnations, pooler, schema, writer};
use crate::History;

/// Time to wait for the epoch: the server notices the end of a killed process with a delay.
const EPOCH_TIMEOUT: Duration = Duration::from_secs(2);
const POLL_INTERVAL: Duration = Duration::from_millis(50);
/// Minimum timeout of a call before the log is open: a database that is slow to accept a connection, or to migrate the tables,
/// must not end the process.
const MIN_TIMEOUT: Duration = Duration::from_secs(10);
/// Delay between attempts of a standby to connect.
const RETRY_DELAY: Duration = Duration::from_secs(1);

pub struct Opened {
    pub session: Session,
    pub append: Statement,
    pub holding: Holding,
    /// Version of the schema before its migration.
    pub schema: usize,
}

/// Who writes.
pub enum Holding {
    Ours(Epoch),
    /// Another process, which has come as far as the last look showed, in this history of the log with this UUID.
    Theirs(Look, History, Option<Uuid>),
}

/// Whether there may be a log in the database.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Existing {
    Required,
    /// One is begun where there is none.
    Allowed,
    Refused,
}

/// Whether there may be no log yet, and what is done when another process writes it.
#[derive(Clone, Copy)]
pub struct Manner {
    pub existing: Existing,
    /// To follow it meanwhile, and to wait for a database that is away.
    pub standby: bool,
}

pub async fn open(
    target: &Target,
    timeout: Duration,
    conditions: &Conditions,
    manner: Manner,
    url: Option<&str>,
    clock: &Clock,
) -> Result<Opened> {
    loop {
        let opened = async {
            let session = connect(target, timeout.max(MIN_TIMEOUT), conditions).await?;
            let mut opened = begin(session, manner, url, clock).await?;
            opened.session.set_timeout(timeout).await?;
            Ok(opened)
        };
        let opened: Result<_> = opened.await;
        match opened {
            Err(error) if manner.standby && error.downcast_ref().is_some_and(Failure::is_silence) => {
                warn!("database unavailable, standby retries to connect: {error:#}");
                clock.sleep(RETRY_DELAY).await;
            }
            opened => return opened,
        }
    }
}

/// Opens a session for writes. A pooler can come between at any time, so each session is checked.
pub async fn connect(target: &Target, timeout: Duration, conditions: &Conditions) -> Result<Session, Failure> {
    let session = Session::connect(target, timeout, &conditions.settings()).await?;
    let other = Session::connect(target, timeout, &conditions.settings()).await?;
    pooler::refuse(&session, &other, target).await?;
    conditions.check(&session).await?;
    Ok(session)
}

async fn begin(session: Session, manner: Manner, url: Option<&str>, clock: &Clock) -> Result<Opened> {
    let Manner { existing, standby } = manner;
    let schema = schema::prepare(&session, existing).await?;
    let shape = "the tables in the schema kvs have an unexpected shape";
    let append = writer::prepare(&session).await.context(shape)?;
    if standby {
        epoch::stand_by(&session).await?;
    }
    let (begun, mut holder) = (clock.now(), Holder::new(standby, clock));
    let holding = loop {
        let look = holder.look(&session).await?;
        if look.is_free {
            let taken =
                epoch::take(&session, &look, url, false).await.context("the epoch cannot be taken from kvs.writer")?;
            match taken {
                Some(epoch) => break Holding::Ours(epoch),
                None => continue,
            }
        }
        if standby {
            let history = incarnations::history(&session).await?;
            let log = Identity::read(&session).await?.log;
            break Holding::Theirs(look, history, log);
        }
        // A primary that is gone may still have a read lease.
        if look.is_alive && clock.elapsed(begun) > EPOCH_TIMEOUT {
            bail!(
                "it is in use by {} (last heartbeat {:.1?} ago); stop it first, or serve with --standby",
                look.holder,
                look.unseen
            );
        }
        clock.sleep(POLL_INTERVAL).await;
    };
    Ok(Opened { session, append, holding, schema })
}
