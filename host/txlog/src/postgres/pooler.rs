//! Detection of connection poolers that share a database session between clients after each transaction.
//!
//! The log requires a session of its own: settings, prepared statements and locks must last beyond a transaction. PgBouncer
//! with `pool_mode = transaction`, and similar poolers, keep none of these; `pool_mode = session` works.
//!
//! Must never know: what a session is used for.

use super::session::{Failure, Session};
use super::target::Target;

/// Number of attempts. One detects nearly every pooler; one under load of other clients assigns sessions by chance.
const ROUNDS: usize = 3;
const PID: &str = "SELECT pg_backend_pid()";

/// Fails if the two connections share database sessions. Neither may be in a transaction.
pub async fn refuse(session: &Session, other: &Session, target: &Target) -> Result<(), Failure> {
    for _ in 0..ROUNDS {
        let pid = session.text(PID).await?;
        // A round-robin pooler with several sessions assigns another one to the next transaction.
        let again = session.text(PID).await?;
        other.run("BEGIN").await?;
        let others = other.text(PID).await?;
        // A pooler that prefers the last used session has assigned this one to the other transaction.
        let is_own = pid == again && pid != others && session.text(PID).await? == pid;
        other.run("COMMIT").await?;
        if !is_own {
            return Err(Failure::refused(format!(
                "{} is a connection pooler, such as PgBouncer, that shares its sessions after each transaction, but the log \
                 requires a session of its own: connect to the database directly, or set pool_mode = session in PgBouncer",
                target.address()
            )));
        }
    }
    Ok(())
}
