//! Requests of the admin listener to the HTTP interface: admitted, limited and served like those of a client, on the threads
//! that serve clients.
//!
//! Must never know: sockets of the admin listener beyond noticing that a client has left.

use std::net::SocketAddr;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use hyper::body::Incoming;
use hyper::{Request, Response, StatusCode};
use kvs_runtime::Tasks;
use tokio::net::TcpStream;
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use super::connection::Peer;
use super::rejection::Rejection;
use super::reply::Reply;
use super::{Edge, Stage};
use crate::guest::Client;

/// Maximum number of connections of the admin listener that use the HTTP interface: its other connections stay free for
/// probes, however many watches and long polls there are.
const CALLERS: usize = 32;

/// Passes requests on.
pub struct Forwarder {
    edge: Arc<Edge>,
    runtime: Handle,
    /// In the runtime where requests are served.
    tasks: Tasks,
    callers: Arc<Semaphore>,
}

/// A connection of the admin listener that uses the HTTP interface, until its last request has ended.
pub struct Caller {
    peer: Peer,
    _place: OwnedSemaphorePermit,
}

impl Forwarder {
    /// To be called where requests are served.
    pub fn new(edge: Arc<Edge>) -> Self {
        let runtime = Handle::current();
        let tasks = edge.tasks.in_runtime(&runtime);
        Self { edge, runtime, tasks, callers: Arc::new(Semaphore::new(CALLERS)) }
    }

    /// Registers a connection. A rejection is sent as the response.
    pub fn open(&self, socket: BorrowedFd<'_>, address: SocketAddr) -> Result<Arc<Caller>, Rejection> {
        let Ok(_place) = Arc::clone(&self.callers).try_acquire_owned() else {
            let reason = format!("more than {CALLERS} connections of the admin listener use the HTTP interface");
            return Err(Rejection::new(StatusCode::SERVICE_UNAVAILABLE, reason));
        };
        let _runtime = self.runtime.enter();
        let socket = socket.try_clone_to_owned().and_then(|socket| TcpStream::from_std(socket.into()));
        let socket = socket.map_err(|error| {
            let reason = format!("no second handle of the connection: {error}");
            Rejection::new(StatusCode::SERVICE_UNAVAILABLE, reason)
        })?;
        let client = Client { address: Some(address), tls_version: None, identity: None, turn: Arc::default() };
        let account = self.edge.budget.open();
        let peer = Peer { client: Arc::new(client), socket: Some(Arc::new(socket)), account };
        Ok(Arc::new(Caller { peer, _place }))
    }

    /// Responds to a request of a caller. Nothing continues when the returned future is dropped.
    pub async fn respond(&self, request: Request<Incoming>, caller: Arc<Caller>) -> Response<Reply> {
        let edge = Arc::clone(&self.edge);
        let (mut done, response) = oneshot::channel();
        // Held until the response is written: a graceful shutdown waits for it.
        let open = edge.stage.subscribe();
        if *open.borrow() == Stage::Stopping {
            return Rejection::new(StatusCode::SERVICE_UNAVAILABLE, "the server is stopping").response();
        }
        self.tasks.detach("forwarded request", async move {
            tokio::select! {
                response = edge.service.respond(request, &caller.peer) => drop(done.send((response, open))),
                () = done.closed() => {}
            }
        });
        let Ok((response, open)) = response.await else {
            return Rejection::new(StatusCode::INTERNAL_SERVER_ERROR, "the request panicked").response();
        };
        // The calling task writes the response before others of its thread have their turn.
        self.edge.tasks.detach("forwarded response", async move { drop(open) });
        response
    }
}

impl Caller {
    /// Returns when the connection is to be cut, since it holds too much memory.
    pub async fn cut(&self) {
        self.peer.account.cut().await;
    }
}
