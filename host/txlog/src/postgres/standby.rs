//! Standby: polls the end of the log, and takes over when the claim of the primary has expired.
//!
//! Owns: the polling, and the status of the primary. Must never know: how new entries are applied.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, anyhow};
use tokio::sync::watch;
use tokio_postgres::Statement;
use tracing::info;

use super::epoch::{self, Epoch, Holder};
use super::handover::Position;
use super::session::{Failure, Kind, Session};
use super::{News, PostgresLog, Shared, incarnations, writer};
use crate::remote::queue::WriterCommand;
use crate::{Handed, Standby, TransactionLog};

/// Polling interval, hence a bound for the staleness of reads.
const LOOK: Duration = Duration::from_millis(100);

impl Standby for PostgresLog {
    fn news(&self) -> watch::Receiver<News> {
        self.shared.news.subscribe()
    }

    fn follow(&self, sequence: u64) {
        self.shared.queue.follow(sequence);
        self.shared.watermark.advance(sequence);
    }

    fn receive(&self, handed: Handed) {
        match handed.position.parse() {
            Ok(position) => drop(self.shared.handed.send_replace(Some(position))),
            Err(error) => self.shared.fail(&error),
        }
    }

    fn begin(&self) -> Result<()> {
        self.shared.begin();
        *self.shared.idle() = None;
        info!("promoted to primary, accepting writes after sequence {}", self.appended());
        Ok(())
    }
}

/// Standby task: polls until it can take the epoch, and then writes. Ends with the log.
pub async fn run(shared: Arc<Shared>, session: Session, append: Statement) {
    let (mut connection, mut holder) = (Some((session, append)), Holder::new(true, &shared.env.clock));
    let mut handed = shared.handed.subscribe();
    loop {
        tokio::select! {
            command = shared.queue.take(LOOK) => match command {
                WriterCommand::Closed => return,
                WriterCommand::Idle | WriterCommand::Write(_) => {}
            },
            // The sender is in `shared`.
            _ = handed.changed() => {}
        }
        shared.breaker.on_attempt();
        match look(&shared, &mut holder, &mut connection).await {
            Ok(None) => shared.breaker.succeeded(),
            Ok(Some(epoch)) => {
                shared.breaker.succeeded();
                let Some(connection) = connection else { return };
                return shared.write(epoch, connection).await;
            }
            Err(Failure { reason, kind: Kind::Damaged }) => return shared.fail(&anyhow!(reason)),
            Err(failure) => {
                // A primary that could not be observed may have sent heartbeats.
                (connection, holder) = (None, Holder::new(true, &shared.env.clock));
                shared.env.clock.sleep(shared.breaker.failed(&failure.reason)).await;
            }
        }
    }
}

/// Polls once, and takes the epoch if it is available.
async fn look(
    shared: &Shared,
    holder: &mut Holder,
    connection: &mut Option<(Session, Statement)>,
) -> Result<Option<Epoch>, Failure> {
    let (session, _) = match connection {
        Some(connection) => connection,
        None => {
            shared.metrics.connections.add(1);
            let session = shared.connect_to_write().await?;
            let append = writer::prepare(&session).await?;
            epoch::stand_by(&session).await?;
            connection.insert((session, append))
        }
    };
    let as_of = shared.env.clock.now();
    let look = holder.look(session).await?;
    let handed = *shared.handed.borrow();
    let found = Position { epoch: look.epoch, last: look.newest };
    if let Some(handed) = handed.filter(|handed| *handed != found) {
        return Err(Failure::damaged(format!("it was handed over at {handed}, and is at {found}")));
    }
    let epoch = if look.is_free || handed.is_some() {
        epoch::take(session, &look, shared.url.as_deref(), handed.is_some()).await?
    } else {
        None
    };
    let newest = epoch.as_ref().map_or(look.newest, |epoch| epoch.last);
    let known = shared.queue.appended();
    if newest < known {
        let reason = format!(
            "its newest entry is {newest}, but was {known} before: the database was rolled back, by a restore or a failover"
        );
        return Err(Failure { reason, kind: Kind::Damaged });
    }
    // Before the receivers of new entries are notified.
    if let Some(epoch) = &epoch {
        shared.set_history(epoch.history.clone());
        shared.set_epoch(epoch.number);
        // Until the first heartbeat says whether there is another standby, which may take over from this process.
        shared.lease.renew_with(as_of, false, true);
    } else if look.incarnations != shared.history().incarnations().len() {
        shared.set_history(incarnations::history(session).await?);
    }
    let holder = epoch.is_none().then_some(look.holder);
    shared.news.send_replace(News { newest, holder, primary: look.primary, as_of });
    Ok(epoch)
}
