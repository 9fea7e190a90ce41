//! Long polls: a request that waits for a change of its key is called again after each change.

use std::future::pending;
use std::time::Duration;

use hyper::StatusCode;
use kvs_txlog::subscribers::{Keys, Selection};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};

use super::admission::Counted;
use super::auth::{Standing, revoked};
use super::counted::left;
use super::head;
use super::rejection::Rejection;
use super::service::{Answered, Called, Record, Service};
use crate::guest::{Answer, Sequel, Wait};

impl Service {
    /// Calls again after every change of the key, until the guest no longer waits, the client sends no more or may not ask any
    /// more, or the timeout is over. A request that is not safe is not called again for a client that sends no more: that would
    /// change something for nobody. `appended` is the newest sequence that the first call appended. Returns the deadline of the
    /// last call too.
    pub(super) async fn wait(
        &self,
        mut wait: Box<Wait>,
        mut appended: Option<u64>,
        socket: Option<&TcpStream>,
        standing: Option<&Standing>,
        record: &mut Record,
    ) -> Result<(Called, Instant), Rejection> {
        record.waited = true;
        let _waiting = Counted::new(&self.metrics.waiting);
        // A forwarded request does not wait: the former process is about to end.
        let longest = if socket.is_some() { wait.timeout.min(self.limits.hold) } else { Duration::ZERO };
        let mut until = Instant::now() + longest;
        let is_safe = head::is_safe(wait.incoming.request.method());
        loop {
            tokio::select! {
                biased;
                () = client_left(socket), if !is_safe => {
                    let reason = "the connection was closed on the side of the client, which waited for a change";
                    return Err(Rejection::new(StatusCode::REQUEST_TIMEOUT, reason));
                }
                () = std::future::ready(()) => {}
            }
            // Before the guest is asked, so that nothing is missed of what happens from then on.
            let watcher = self.changes.watch(Selection::of([Keys::One(wait.key.into())]));
            let deadline = Instant::now() + self.limits.request_timeout;
            let called = self.call(wait.incoming, deadline, record).await;
            let called = called.map_err(|rejection| rejection.with_effect(appended.is_some()))?;
            let Called::Here(Answered { answer, as_of, .. }) = called else { return Ok((called, deadline)) };
            match (answer.sequel, watcher) {
                (Some(Sequel::Wait(again)), Some(mut watcher)) if Instant::now() < until => {
                    appended = appended.max(answer.appended.then_some(answer.read_sequence));
                    tokio::select! {
                        biased;
                        rejection = revoked(standing) => return Err(rejection.with_effect(appended.is_some())),
                        // A client that has closed its side has probably left.
                        () = client_left(socket) => until = Instant::now(),
                        _ = timeout_at(until, watcher.next()) => {}
                    }
                    wait = again;
                }
                (sequel, _) => {
                    // The response acknowledges what all calls appended.
                    let read_sequence = answer.read_sequence.max(appended.unwrap_or(0));
                    let answer = Answer { sequel, read_sequence, ..answer };
                    return Ok((
                        Called::Here(Answered { answer, as_of, appended_before: appended.is_some() }),
                        deadline,
                    ));
                }
            }
        }
    }
}

/// Waits until the client closes its side of the connection. A forwarded request has none.
async fn client_left(socket: Option<&TcpStream>) {
    match socket {
        Some(socket) => left(socket).await,
        None => pending().await,
    }
}
