//! Poolers that give a session of the database to another client after each transaction.
//!
//! The log needs a session of its own: what it sets, prepares and locks there must be there in the next transaction. PgBouncer
//! with `pool_mode = transaction`, and what does the same, keeps none of that, and the log would never be written. With
//! `pool_mode = session` it can be.
//!
//! Must never know: what a session is used for.

use super::session::{Failure, Session};

/// Each finds nearly all; a pooler that others use too gives sessions out by chance.
const ROUNDS: usize = 3;
const PID: &str = "SELECT pg_backend_pid()";

/// An error when two connections share the sessions of the database. Neither is in a transaction.
pub async fn refuse(session: &Session, other: &Session) -> Result<(), Failure> {
    for _ in 0..ROUNDS {
        let pid = session.word(PID).await?;
        // One that gives them out in turn has another for the next transaction, if it has several.
        let again = session.word(PID).await?;
        other.run("BEGIN").await?;
        let others = other.word(PID).await?;
        // One that gives out the last used has given this one to the other transaction.
        let is_own = pid == again && pid != others && session.word(PID).await? == pid;
        other.run("COMMIT").await?;
        if !is_own {
            return Err(Failure::refused(
                "a pooler in front of it gives its sessions to others after each transaction, and the log needs one of its \
                 own: connect to the database itself, or set pool_mode = session in PgBouncer"
                    .into(),
            ));
        }
    }
    Ok(())
}
