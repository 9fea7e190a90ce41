//! Incarnations in the database: when one begins, and how the history is read.
//!
//! A process that takes the epoch compares the place of the log with the place that the last primary recorded. A restored
//! dump, a copied database, a point-in-time recovery and a failover of the database all change the place, and acknowledged
//! entries may be missing then. The same holds after an unclean end of a primary whose commits need not survive a power cut.
//! In both cases the log continues with a new incarnation. A superfluous one is harmless: earlier entries are unaffected.
//!
//! A place is the identifier of the database system, the OID of the database, the OID of the table `kvs.writer`, and the
//! timeline of the write-ahead log. Every role may read these, unless the privilege was revoked or the service lacks the
//! function; unreadable ones are not compared. The timeline is that of the current write position: in the control file it
//! changes with the first checkpoint after a failover, which can be minutes later.
//!
//! A copy of the files of a whole database system that starts by crash recovery, such as a snapshot of a volume, and rows that
//! were restored into existing tables, have the same place. `kvs txlog fork` begins an incarnation there.
//!
//! Owns: the tables `kvs.incarnations` and `kvs.identity`. Must never know: which process is primary.

use tokio_postgres::Row;
use tracing::{debug, warn};
use uuid::Uuid;

use super::session::{Failure, Session};
use crate::{History, Incarnation};

/// Queries for the numbers of a place. Each may return nothing, or fail independently.
const PLACE: [(&str, &str); 4] = [
    ("database system", "SELECT system_identifier FROM pg_control_system()"),
    ("database", "SELECT oid::bigint FROM pg_database WHERE datname = current_database()"),
    ("table kvs.writer", "SELECT 'kvs.writer'::regclass::oid::bigint"),
    ("timeline", "SELECT ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::bigint"),
];

const SELECT: &str = "SELECT id::text, parent::text, fork, first FROM kvs.incarnations ORDER BY first";

/// Place of a log: a number for each of [`PLACE`], as far as they are known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place([Option<i64>; 4]);

/// The row of `kvs.identity`.
pub struct Identity {
    /// The UUID of the log, which its copies have too.
    pub log: Option<Uuid>,
    pub place: Place,
    /// Whether the commits of the last primary survive a power cut.
    pub durable: Option<bool>,
}

impl Place {
    /// Reads each number separately, outside of a transaction, so that one failure does not affect the others.
    pub async fn of(session: &Session) -> Result<Self, Failure> {
        let mut place = [None; 4];
        for ((name, query), number) in PLACE.iter().zip(&mut place) {
            *number = match session.one(*query, &[]).await {
                Ok(row) => row.try_get(0)?,
                Err(failure) if failure.is_silence() => return Err(failure),
                Err(failure) => {
                    debug!("cannot read the identity of the {name} from the database: {failure}");
                    None
                }
            };
        }
        Ok(Self(place))
    }

    /// Returns the name of the first number that differs. Only numbers known in both places are compared.
    pub fn differs(&self, here: &Self) -> Option<&'static str> {
        let differing = |(before, now): (&Option<i64>, &Option<i64>)| before.zip(*now).is_some_and(|(a, b)| a != b);
        let index = self.0.iter().zip(&here.0).position(differing)?;
        Some(PLACE[index].0)
    }

    /// Returns the numbers of this place, and those of `other` where this one has none.
    pub fn or(self, other: Self) -> Self {
        let mut numbers = self.0;
        for (number, other) in numbers.iter_mut().zip(other.0) {
            *number = number.or(other);
        }
        Self(numbers)
    }
}

impl Identity {
    pub async fn read(session: &Session) -> Result<Self, Failure> {
        let select = "SELECT log::text, durable, system, database, relation, timeline FROM kvs.identity";
        let row = session.one(select, &[]).await?;
        let log: Option<&str> = row.try_get(0)?;
        let log = log.map(uuid).transpose()?;
        let place = Place([row.try_get(2)?, row.try_get(3)?, row.try_get(4)?, row.try_get(5)?]);
        Ok(Self { log, place, durable: row.try_get(1)? })
    }

    pub async fn write(&self, session: &Session) -> Result<(), Failure> {
        let update = "UPDATE kvs.identity SET log = $1::text::uuid, durable = $2, system = $3, database = $4, relation = $5, \
             timeline = $6";
        let log = self.log.map(|log| log.to_string());
        let [system, database, relation, timeline] = self.place.0;
        session.execute(update, &[&log, &self.durable, &system, &database, &relation, &timeline]).await?;
        Ok(())
    }
}

/// Reads all incarnations of the log.
pub async fn history(session: &Session) -> Result<History, Failure> {
    let mut rows = session.rows(SELECT, &[]).await?;
    let mut incarnations = Vec::new();
    while let Some(row) = rows.next().await? {
        incarnations.push(incarnation(&row)?);
    }
    Ok(History::new(incarnations))
}

#[expect(clippy::disallowed_methods, reason = "no simulation has a database")]
/// Begins an incarnation after the last entry of the log. The caller's transaction holds the row of `kvs.writer`.
pub async fn begin(
    session: &Session,
    history: &History,
    log: Uuid,
    last: u64,
    cause: &str,
) -> Result<Incarnation, Failure> {
    let parent = history.incarnations().last().map_or(log, |incarnation| incarnation.id);
    // If the newest incarnation has no entry here, it may have some in another copy: these are excluded too.
    let fork = history.next(last) - 1;
    let (random, _) = Uuid::new_v4().as_u64_pair();
    let incarnation = Incarnation::after(parent, fork, Uuid::new_v4(), random);
    record(session, &incarnation, cause).await?;
    warn!(
        "beginning incarnation {id} of the log, since {cause}: sequence {} follows on {last}",
        incarnation.first,
        id = incarnation.id
    );
    Ok(incarnation)
}

/// Adds an incarnation to the history.
pub async fn record(session: &Session, incarnation: &Incarnation, cause: &str) -> Result<(), Failure> {
    let insert = "INSERT INTO kvs.incarnations (id, parent, fork, first, cause) VALUES ($1::text::uuid, $2::text::uuid, $3, $4, $5)";
    let [id, parent] = [incarnation.id, incarnation.parent].map(|uuid| uuid.to_string());
    let numbers = [incarnation.fork, incarnation.first].map(u64::cast_signed);
    session.execute(insert, &[&id, &parent, &numbers[0], &numbers[1], &cause]).await?;
    Ok(())
}

fn incarnation(row: &Row) -> Result<Incarnation, Failure> {
    let [fork, first]: [i64; 2] = [row.try_get(2)?, row.try_get(3)?];
    Ok(Incarnation {
        id: uuid(row.try_get(0)?)?,
        parent: uuid(row.try_get(1)?)?,
        fork: fork.cast_unsigned(),
        first: first.cast_unsigned(),
    })
}

fn uuid(text: &str) -> Result<Uuid, Failure> {
    text.parse().map_err(|error| Failure::damaged(format!("{text:?} is not a UUID: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn place_differs_only_where_both_are_known() {
        let place = |system, timeline| Place([system, Some(5), None, timeline]);
        let before = place(Some(7), None);
        assert_eq!(before.differs(&place(Some(7), Some(2))), None);
        assert_eq!(before.differs(&place(None, Some(2))), None);
        assert_eq!(before.differs(&place(Some(8), None)), Some("database system"));
        assert_eq!(place(None, Some(1)).differs(&place(Some(8), Some(2))), Some("timeline"));
        assert_eq!(place(None, Some(2)).or(before), place(Some(7), Some(2)));
    }
}
