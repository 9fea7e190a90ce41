//! A database session: connecting, timeouts, and the classification of errors.
//!
//! Owns: the protocol. Must never know: the purpose of a statement, or whether to retry it.

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
use super::tls::TlsMode;

/// The server function that warns when the wait for a synchronous standby was canceled; it is the same in every language.
const STANDBY_WAIT: &str = "SyncRepWaitForLSN";

/// A failed database call.
#[derive(Debug, thiserror::Error)]
#[error("{reason}")]
pub struct Failure {
    pub reason: String,
    pub kind: Kind,
}

/// Class of a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The session is unusable. If it gave no response, the outcome of the call is unknown.
    Silent,
    /// The database rejected the statement, for a reason independent of the session.
    Refused,
    /// The database rejected the statement because its disk is full.
    Full,
    /// The database rejected the statement because of unexpected or missing rows.
    Damaged,
}

impl Failure {
    pub fn damaged(reason: String) -> Self {
        Self { reason, kind: Kind::Damaged }
    }

    pub fn refused(reason: String) -> Self {
        Self { reason, kind: Kind::Refused }
    }

    /// Returns the error for a session that cannot write.
    pub fn unusable(reason: String) -> Self {
        Self { reason, kind: Kind::Silent }
    }

    /// Returns whether another connection may succeed.
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
            // The connection is broken.
            return Self { reason, kind: Kind::Silent };
        };
        Self { reason: format!("{} ({})", answer.message(), answer.code().code()), kind: kind(answer.code()) }
    }
}

/// Classifies an SQLSTATE. Its first two digits are its class.
fn kind(state: &SqlState) -> Kind {
    let code = state.code();
    match code.get(..2).unwrap_or_default() {
        _ if state == &SqlState::DISK_FULL => Kind::Full,
        "23" => Kind::Damaged,
        // The connection or the server is shutting down.
        "08" => Kind::Silent,
        "57" if code.starts_with("57P") => Kind::Silent,
        // An unexpected transaction state; read-only after a failover, which a session survives behind a virtual address.
        "25" => Kind::Silent,
        // A prepared statement or a cursor is missing, exists already, or does not match the tables any more.
        "26" | "34" | "0A" => Kind::Silent,
        _ if state == &SqlState::DUPLICATE_PSTATEMENT => Kind::Silent,
        // Out of memory or of connections, an I/O error, or an internal error.
        "53" | "58" | "XX" => Kind::Silent,
        _ => Kind::Refused,
    }
}

/// A session, closed on drop.
pub struct Session {
    client: Client,
    /// Task that drives the connection.
    connection: AbortHandle,
    /// A transaction was committed without confirmation of a synchronous standby.
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
    /// Connects. `timeout` applies to every call, and is set on the server too. `settings` run first.
    pub async fn connect(target: &Target, timeout: Duration, settings: &str) -> Result<Self, Failure> {
        let failed = |reason: String| Failure { reason, kind: Kind::Silent };
        let unconfirmed = Arc::<AtomicBool>::default();
        let connecting = async {
            if target.tls.mode == TlsMode::Disable {
                let (client, connection) = target.config.connect(NoTls).await?;
                return Ok((client, drive(connection, &unconfirmed)));
            }
            let tls = target.tls.config().map_err(|error| failed(format!("{error:#}")))?;
            let (client, connection) = target.config.connect(MakeRustlsConnect::new(tls)).await?;
            Ok((client, drive(connection, &unconfirmed)))
        };
        let connected: Result<_, Failure> = match time::timeout(timeout, connecting).await {
            Ok(connected) => connected,
            Err(_) => Err(failed(format!("no connection within {timeout:?}"))),
        };
        let (client, connection) = connected.map_err(|mut failure| {
            if target.tls.mode > TlsMode::Prefer && failure.reason.contains("server does not support TLS") {
                failure.reason.push_str("; if the network is trusted, add sslmode=disable");
            }
            failure
        })?;
        let mut session = Self { client, connection, unconfirmed, timeout };
        session.set_timeout(timeout).await?;
        session.run(settings).await?;
        Ok(session)
    }

    /// Sets the timeout of the calls after this one.
    pub async fn set_timeout(&mut self, timeout: Duration) -> Result<(), Failure> {
        self.run(&format!("SET statement_timeout = {}", on_server(timeout))).await?;
        self.timeout = timeout;
        Ok(())
    }

    /// The timeout of calls in milliseconds, as the server gets it.
    pub fn milliseconds(&self) -> u128 {
        on_server(self.timeout)
    }

    async fn within<T>(&self, call: impl Future<Output = Result<T, Error>>) -> Result<T, Failure> {
        match time::timeout(self.timeout, call).await {
            Ok(answered) => {
                let answered = answered?;
                // An operator can cancel the wait for a standby, and the server reports the commit as a success.
                if self.unconfirmed.load(Ordering::Acquire) {
                    let reason =
                        "the wait for a synchronous standby was canceled, which may not have the committed transaction";
                    return Err(Failure { reason: reason.into(), kind: Kind::Silent });
                }
                Ok(answered)
            }
            Err(_) => Err(Failure { reason: format!("no response within {:?}", self.timeout), kind: Kind::Silent }),
        }
    }

    /// Runs statements without parameters.
    pub async fn run(&self, statements: &str) -> Result<(), Failure> {
        self.within(self.client.batch_execute(statements)).await
    }

    /// Returns the first column of the only row of a statement as text, without a prepared statement.
    pub async fn text(&self, statement: &str) -> Result<String, Failure> {
        let messages = self.within(self.client.simple_query(statement)).await?;
        let text = messages.iter().find_map(|message| match message {
            SimpleQueryMessage::Row(row) => row.get(0),
            _ => None,
        });
        Ok(text.unwrap_or_default().to_owned())
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

    /// Streams the rows of a statement.
    pub async fn rows(&self, statement: &str, with: &[i64]) -> Result<Rows<'_>, Failure> {
        let rows = self.within(self.client.query_raw(statement, with)).await?;
        Ok(Rows { rows: Box::pin(rows), session: self })
    }
}

/// The timeout of the server in milliseconds. It is a little shorter than the client's, so that the server can still report
/// that.
fn on_server(timeout: Duration) -> u128 {
    (timeout * 4 / 5).as_millis().max(1)
}

/// Drives a connection in its own task, and notes warnings of the server, which precede the response they are about.
#[expect(
    clippy::disallowed_methods,
    reason = "its end, by panic or not, closes the connection, which the session notices"
)]
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

/// A stream of rows.
pub struct Rows<'s> {
    rows: Pin<Box<RowStream>>,
    session: &'s Session,
}

impl Rows<'_> {
    /// Returns the next row, None after the last.
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
