//! One connection to the database: made, bounded in time, and what its errors mean.
//!
//! Owns: the words of the protocol. Must never know: what is asked for, or whether to ask again.

use std::error::Error as _;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::TryStreamExt;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::{self, AbortHandle};
use tokio::time;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::ToSql;
use tokio_postgres::{
    AsyncMessage, Client, Connection, Error, NoTls, Row, RowStream, SimpleQueryMessage, Statement, ToStatement,
};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::target::Target;
use super::tls::Verify;

/// The function of the server that warns when it no longer waits for a synchronous standby, in any language.
const STANDBY_WAIT: &str = "SyncRepWaitForLSN";

/// What did not go well.
#[derive(Debug, thiserror::Error)]
#[error("{reason}")]
pub struct Failure {
    pub reason: String,
    pub kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The session is of no more use. Where it gave no answer, what was asked may have been done or not.
    Silent,
    /// The database answered that it did not do it, and the session has no part in that.
    Refused,
    /// That, for want of space on its disk.
    Full,
    /// That, since rows are there that should not be, or the other way round.
    Damaged,
}

impl Failure {
    pub fn damaged(reason: String) -> Self {
        Self { reason, kind: Kind::Damaged }
    }

    pub fn refused(reason: String) -> Self {
        Self { reason, kind: Kind::Refused }
    }

    /// On this session nothing can be written.
    pub fn unusable(reason: String) -> Self {
        Self { reason, kind: Kind::Silent }
    }

    /// Whether it may be another matter on another connection.
    pub fn is_silence(&self) -> bool {
        self.kind == Kind::Silent
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let Some(answer) = error.as_db_error() else {
            let reason = match error.source() {
                Some(source) => source.to_string(),
                None => error.to_string(),
            };
            // What cannot be written or read never will be.
            return Self { reason, kind: Kind::Silent };
        };
        Self { reason: format!("{} ({})", answer.message(), answer.code().code()), kind: kind(answer.code()) }
    }
}

/// The meaning of an SQLSTATE. Its first two digits are its class.
fn kind(state: &SqlState) -> Kind {
    let code = state.code();
    match code.get(..2).unwrap_or_default() {
        _ if state == &SqlState::DISK_FULL => Kind::Full,
        "23" => Kind::Damaged,
        // The connection, or the server, comes to its end.
        "08" => Kind::Silent,
        "57" if code.starts_with("57P") => Kind::Silent,
        // A transaction in a state that nobody here has begun; read-only after a failover, which a session outlives behind a
        // virtual address.
        "25" => Kind::Silent,
        // A prepared statement or a cursor is missing, is there already, or no longer fits the tables.
        "26" | "34" | "0A" => Kind::Silent,
        _ if state == &SqlState::DUPLICATE_PSTATEMENT => Kind::Silent,
        // It has no memory or no room for a session, cannot read its files, or has an error of its own.
        "53" | "58" | "XX" => Kind::Silent,
        _ => Kind::Refused,
    }
}

/// A connection. Gone when it is dropped.
pub struct Session {
    client: Client,
    /// What is made of every connection runs beside.
    connection: AbortHandle,
    /// A transaction was committed, and a synchronous standby may not have it.
    unconfirmed: Arc<AtomicBool>,
    timeout: Duration,
}

impl Drop for Session {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

pub type Parameters<'p> = &'p [&'p (dyn ToSql + Sync)];

impl Session {
    /// `timeout` is for every call, and the server is told so. `settings` are run before all else.
    pub async fn connect(target: &Target, timeout: Duration, settings: &str) -> Result<Self, Failure> {
        let failed = |reason: String| Failure { reason, kind: Kind::Silent };
        let unconfirmed = Arc::<AtomicBool>::default();
        let connecting = async {
            if target.trust.verify == Verify::Disable {
                let (client, connection) = target.config.connect(NoTls).await?;
                return Ok((client, drive(connection, &unconfirmed)));
            }
            let tls = target.trust.config().map_err(|error| failed(format!("{error:#}")))?;
            let (client, connection) = target.config.connect(MakeRustlsConnect::new(tls)).await?;
            Ok((client, drive(connection, &unconfirmed)))
        };
        let connected: Result<_, Failure> = match time::timeout(timeout, connecting).await {
            Ok(connected) => connected,
            Err(_) => Err(failed(format!("no connection within {timeout:?}"))),
        };
        let (client, connection) = connected.map_err(|mut failure| {
            if target.trust.verify > Verify::Prefer && failure.reason.contains("server does not support TLS") {
                failure.reason.push_str("; if the way to it is safe, add sslmode=disable");
            }
            failure
        })?;
        let mut session = Self { client, connection, unconfirmed, timeout };
        session.set_timeout(timeout).await?;
        session.run(settings).await?;
        Ok(session)
    }

    /// Changes the timeout of every call.
    pub async fn set_timeout(&mut self, timeout: Duration) -> Result<(), Failure> {
        // The server gives up a little earlier than this side, so that it can still say so.
        let milliseconds = (timeout * 4 / 5).as_millis().max(1);
        self.run(&format!("SET statement_timeout = {milliseconds}")).await?;
        self.timeout = timeout;
        Ok(())
    }

    async fn within<T>(&self, call: impl Future<Output = Result<T, Error>>) -> Result<T, Failure> {
        match time::timeout(self.timeout, call).await {
            Ok(answered) => {
                let answered = answered?;
                // An operator can cancel the wait for a standby, and the server reports the commit as a success.
                if self.unconfirmed.load(Ordering::Acquire) {
                    let reason = "a wait for a synchronous standby was canceled, which may not have what was committed";
                    return Err(Failure { reason: reason.into(), kind: Kind::Silent });
                }
                Ok(answered)
            }
            Err(_) => Err(Failure { reason: format!("no answer within {:?}", self.timeout), kind: Kind::Silent }),
        }
    }

    /// Statements without parameters.
    pub async fn run(&self, statements: &str) -> Result<(), Failure> {
        self.within(self.client.batch_execute(statements)).await
    }

    /// The first column of a statement that gives one row, as text, without anything prepared.
    pub async fn word(&self, statement: &str) -> Result<String, Failure> {
        let messages = self.within(self.client.simple_query(statement)).await?;
        let word = messages.iter().find_map(|message| match message {
            SimpleQueryMessage::Row(row) => row.get(0),
            _ => None,
        });
        Ok(word.unwrap_or_default().to_owned())
    }

    pub async fn prepare(&self, statement: &str) -> Result<Statement, Failure> {
        self.within(self.client.prepare(statement)).await
    }

    pub async fn execute(
        &self,
        statement: &(impl ToStatement + Sync + ?Sized),
        with: Parameters<'_>,
    ) -> Result<u64, Failure> {
        self.within(self.client.execute(statement, with)).await
    }

    pub async fn one(
        &self,
        statement: &(impl ToStatement + Sync + ?Sized),
        with: Parameters<'_>,
    ) -> Result<Row, Failure> {
        self.within(self.client.query_one(statement, with)).await
    }

    pub async fn at_most_one(
        &self,
        statement: &(impl ToStatement + Sync + ?Sized),
        with: Parameters<'_>,
    ) -> Result<Option<Row>, Failure> {
        self.within(self.client.query_opt(statement, with)).await
    }

    /// Rows as they come, never all at once.
    pub async fn rows(&self, statement: &str, with: &[i64]) -> Result<Rows<'_>, Failure> {
        let rows = self.within(self.client.query_raw(statement, with)).await?;
        Ok(Rows { rows: Box::pin(rows), session: self })
    }
}

/// Runs a connection in a task of its own, and notes what the server warns of before the answer that it is about.
#[expect(clippy::disallowed_methods, reason = "its end, by panic or not, is that of the connection, which is noticed")]
fn drive<S, T>(mut connection: Connection<S, T>, unconfirmed: &Arc<AtomicBool>) -> AbortHandle
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let unconfirmed = Arc::clone(unconfirmed);
    let driving = async move {
        while let Some(Ok(message)) = poll_fn(|context| connection.poll_message(context)).await {
            if let AsyncMessage::Notice(notice) = message
                && notice.routine() == Some(STANDBY_WAIT)
            {
                unconfirmed.store(true, Ordering::Release);
            }
        }
    };
    task::spawn(driving).abort_handle()
}

pub struct Rows<'s> {
    rows: Pin<Box<RowStream>>,
    session: &'s Session,
}

impl Rows<'_> {
    /// None after the last.
    pub async fn next(&mut self) -> Result<Option<Row>, Failure> {
        self.session.within(self.rows.try_next()).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sqlstate_decides_whether_session_is_kept() {
        let lost = [
            "08006", "25006", "25P02", "26000", "0A000", "34000", "42P05", "53200", "53300", "57P01", "58030", "XX000",
        ];
        for code in lost {
            assert_eq!(kind(&SqlState::from_code(code)), Kind::Silent, "{code}");
        }
        for code in ["40001", "40P01", "42501", "42P01", "55P03", "57014", "28P01", "3D000"] {
            assert_eq!(kind(&SqlState::from_code(code)), Kind::Refused, "{code}");
        }
        assert_eq!(kind(&SqlState::from_code("53100")), Kind::Full);
        assert_eq!(kind(&SqlState::from_code("23505")), Kind::Damaged);
    }
}
