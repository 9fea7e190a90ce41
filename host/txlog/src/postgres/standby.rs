//! Standing by: another process writes the log, and this one looks how far it has come. When it is gone, this one writes.
//!
//! Owns: when it looks, and what is known of what is new. Must never know: who takes that in.

use std::sync::Arc;
use std::time::Duration;

use anyhow::anyhow;
use tokio_postgres::Statement;

use super::epoch::{self, Epoch, Holder};
use super::queue::{Company, Work};
use super::session::{Failure, Kind, Session};
use super::{Shared, incarnations, writer};

/// How often it looks, hence how old what it shows can be.
const LOOK: Duration = Duration::from_millis(100);
/// Longest wait for a look. A database that takes longer for it is away.
pub const LOOKED: Duration = Duration::from_secs(1);

/// What there is to be taken in.
#[derive(Clone)]
pub struct News {
    /// The newest entry of the log.
    pub newest: u64,
    /// Who writes. None when that is this process, or will be as soon as it has everything.
    pub holder: Option<String>,
}

/// Looks until the epoch is to be had, and then writes. Ends with the log.
pub async fn run(shared: Arc<Shared>, session: Session, append: Statement) {
    let (mut connection, mut holder) = (Some((session, append)), Holder::new(true, &shared.env.clock));
    while !matches!(shared.queue.take(LOOK, Company::default()).await, Work::Closed) {
        shared.breaker.try_again();
        match look(&shared, &mut holder, &mut connection).await {
            Ok(None) => shared.breaker.succeeded(),
            Ok(Some(epoch)) => {
                shared.breaker.succeeded();
                let Some(connection) = connection else { return };
                return shared.write(epoch, connection).await;
            }
            Err(Failure { reason, kind: Kind::Damaged }) => return shared.fail(&anyhow!(reason)),
            Err(failure) => {
                // Who could not be seen may have been there.
                (connection, holder) = (None, Holder::new(true, &shared.env.clock));
                shared.env.clock.sleep(shared.breaker.failed(&failure.reason)).await;
            }
        }
    }
}

/// Looks once, and takes the epoch if it is to be had.
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
    let look = holder.look(session).await?;
    let epoch = if look.is_free { epoch::take(session, &look).await? } else { None };
    let newest = epoch.as_ref().map_or(look.newest, |epoch| epoch.last);
    let known = shared.queue.appended();
    if newest < known {
        let reason =
            format!("its newest entry is {newest}, where there were {known} before: the database was set back");
        return Err(Failure { reason, kind: Kind::Damaged });
    }
    // Before whoever takes in the entries hears of them.
    if let Some(epoch) = &epoch {
        shared.set_history(epoch.history.clone());
        // Once in the life of a process.
        let _ = shared.epoch.set(epoch.number);
    } else if look.incarnations != shared.history().incarnations().len() {
        shared.set_history(incarnations::history(session).await?);
    }
    shared.news.send_replace(News { newest, holder: epoch.is_none().then_some(look.holder) });
    Ok(epoch)
}
