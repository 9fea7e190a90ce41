//! Requests of connections that are still open when another process serves: forwarded to it, as HTTP/2 over a pair of sockets.
//!
//! Owns: both ends of that. Must never know: how the other process took over.

use std::convert::Infallible;
use std::error::Error;
use std::io;
use std::net::SocketAddr;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::sync::Arc;

use anyhow::{Context, Result};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming as Arriving;
use hyper::client::conn::http2::{Builder, SendRequest};
use hyper::header::{self, HeaderName, HeaderValue};
use hyper::rt::Executor;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode, Version};
use hyper_util::rt::TokioIo;
use kvs_runtime::Tasks;
use serde_json::{Value, json};
use tokio::net::UnixStream;
use tokio::time::{Instant, timeout_at};
use tracing::debug;

use super::connection::Peer;
use super::problem::OUTCOME_UNKNOWN;
use super::rejection::Rejection;
use super::reply::Reply;
use super::{Edge, head, request_id};
use crate::guest::{Client, Incoming};

/// Header with what the former process knows of a client.
const CLIENT: HeaderName = HeaderName::from_static("kvs-forwarded-client");
/// Headers that concern a connection, or a body that has been read: a long poll that waits has it no more.
const NOT_FORWARDED: [HeaderName; 8] = [
    header::CONNECTION,
    header::CONTENT_LENGTH,
    header::EXPECT,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    header::TE,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];
/// Flow-control windows of a stream and of the connection: nothing is gained by holding a body back.
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 16 << 20;
/// Size of a head beyond that which the client has sent, and what HTTP/2 counts for each header beside its bytes.
const EXTRA_HEADER_BYTES: usize = 4 << 10;
const HEADER_OVERHEAD: usize = 32;

/// The process that serves in place of this one.
pub struct Successor {
    requests: SendRequest<Full<Bytes>>,
}

/// Marks a response that another process has completed.
#[derive(Clone, Copy)]
pub struct Forwarded;

/// Starts tasks of a connection.
#[derive(Clone)]
struct Detached(Tasks);

impl<F: Future<Output = ()> + Send + 'static> Executor<F> for Detached {
    fn execute(&self, task: F) {
        self.0.detach("forwarded request", task);
    }
}

impl Successor {
    /// Takes one end of a pair of sockets; the other process serves at the other.
    pub async fn connect(socket: StdUnixStream, tasks: &Tasks) -> Result<Self> {
        let handshake = Builder::new(Detached(tasks.clone()))
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .handshake(TokioIo::new(tokio_socket(socket)?));
        let (requests, connection) = handshake.await.context("no connection to the new process")?;
        tasks.detach("forwarding", async move {
            if let Err(error) = connection.await {
                debug!("no requests can be forwarded any more: {error}");
            }
        });
        Ok(Self { requests })
    }

    /// Has the other process respond to a request.
    pub(super) async fn respond(&self, incoming: Incoming, deadline: Instant) -> Result<Response<Bytes>, Rejection> {
        let is_read = head::is_safe(incoming.request.method());
        let error = match timeout_at(deadline, self.forward(incoming)).await {
            Ok(Ok(response)) => return Ok(response),
            Ok(Err(error)) => error.to_string(),
            Err(_) => "it did not respond in time".to_owned(),
        };
        debug!("a request could not be forwarded: {error}");
        let reason = format!("another process serves, and the request could not be forwarded: {error}");
        if is_read {
            return Err(Rejection::new(StatusCode::SERVICE_UNAVAILABLE, reason));
        }
        let unknown = Rejection::new(StatusCode::GATEWAY_TIMEOUT, format!("outcome unknown: {reason}"));
        Err(unknown.with_code(OUTCOME_UNKNOWN))
    }

    async fn forward(&self, incoming: Incoming) -> hyper::Result<Response<Bytes>> {
        let client = describe(&incoming.client, incoming.request.version());
        let (mut head, body) = incoming.request.into_parts();
        for name in NOT_FORWARDED {
            head.headers.remove(name);
        }
        head.headers.insert(request_id::HEADER, incoming.id);
        head.headers.insert(CLIENT, client);
        let mut requests = self.requests.clone();
        requests.ready().await?;
        let response = requests.send_request(Request::from_parts(head, Full::new(body))).await?;
        let (mut head, body) = response.into_parts();
        head.version = Version::HTTP_11;
        head.extensions.insert(Forwarded);
        Ok(Response::from_parts(head, body.collect().await?.to_bytes()))
    }
}

impl Forwarded {
    /// Gives a response to HEAD the length that it states.
    pub fn head(mut response: Response<Reply>) -> Response<Reply> {
        let length = response.headers_mut().remove(header::CONTENT_LENGTH);
        match length.and_then(|length| length.to_str().ok()?.parse().ok()) {
            Some(length) => response.map(|_| Reply::Length(length)),
            None => response,
        }
    }
}

impl Edge {
    /// Serves the requests that the former process forwards, until it ends.
    pub async fn serve_forwarded(self: Arc<Self>, socket: StdUnixStream) -> Result<()> {
        let socket = TokioIo::new(tokio_socket(socket)?);
        // Until the former process ends, a graceful shutdown waits for it.
        let open = self.stage.subscribe();
        let limits = self.limits;
        let edge = Arc::clone(&self);
        let service = service_fn(move |request| {
            let edge = Arc::clone(&edge);
            async move { Ok::<_, Infallible>(edge.forwarded(request).await) }
        });
        let header_bytes = limits.header_bytes + HEADER_OVERHEAD * limits.headers + EXTRA_HEADER_BYTES;
        let mut http = http2::Builder::new(Detached(self.tasks.clone()));
        http.initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_concurrent_streams(u32::try_from(limits.requests).unwrap_or(u32::MAX))
            // Clients that leave together, or reach their deadlines, do not end the connection of the others.
            .max_pending_accept_reset_streams(limits.requests)
            .max_header_list_size(u32::try_from(header_bytes).unwrap_or(u32::MAX));
        let ended = http.serve_connection(socket, service).await;
        drop(open);
        match ended {
            // It does not read to the end, so its exit can look like a reset.
            Err(error) if error.source().is_some_and(|source| source.is::<io::Error>()) => {
                debug!("the former process has ended: {error}");
                Ok(())
            }
            ended => ended.context("the connection of the former process ended"),
        }
    }

    async fn forwarded(&self, mut request: Request<Arriving>) -> Response<Reply> {
        let described = request.headers_mut().remove(CLIENT);
        let described = described.and_then(|client| parse(client.as_bytes()));
        let Some((client, version)) = described else {
            return Rejection::new(StatusCode::INTERNAL_SERVER_ERROR, "malformed forwarded request").response();
        };
        *request.version_mut() = version;
        let peer = Peer { client: Arc::new(client), socket: None, account: self.budget.open() };
        self.service.respond(request, &peer).await
    }
}

fn tokio_socket(socket: StdUnixStream) -> Result<UnixStream> {
    socket.set_nonblocking(true)?;
    Ok(UnixStream::from_std(socket)?)
}

fn describe(client: &Client, version: Version) -> HeaderValue {
    let described = json!({
        "address": client.address.map(|address| address.to_string()),
        "tls": client.tls_version,
        "identity": client.identity.as_deref(),
        "http": match version {
            Version::HTTP_2 => 2,
            Version::HTTP_10 => 0,
            _ => 1,
        },
    });
    // JSON has no control characters; without any of it the request is rejected.
    HeaderValue::from_bytes(described.to_string().as_bytes()).unwrap_or(const { HeaderValue::from_static("") })
}

fn parse(described: &[u8]) -> Option<(Client, Version)> {
    let described: Value = serde_json::from_slice(described).ok()?;
    let address: Option<SocketAddr> = match &described["address"] {
        // A Unix socket.
        Value::Null => None,
        address => Some(address.as_str()?.parse().ok()?),
    };
    let tls_version = described["tls"].as_str().map(|version| if version == "TLSv1.3" { "TLSv1.3" } else { "TLSv1.2" });
    let identity = described["identity"].as_str().map(Arc::from);
    let version = match described["http"].as_u64()? {
        2 => Version::HTTP_2,
        0 => Version::HTTP_10,
        _ => Version::HTTP_11,
    };
    Some((Client { address, tls_version, identity, turn: Arc::default() }, version))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn client_is_forwarded_as_it_is_known() {
        let address = Some("[::1]:80".parse().unwrap());
        for (address, tls_version, identity) in [
            (None, None, None),
            (address, Some("TLSv1.3"), Some("CN=Zo\u{eb},O=\"a\" \u{1}")),
            (address, Some("TLSv1.2"), None),
        ] {
            let client = Client { address, tls_version, identity: identity.map(Arc::from), turn: Arc::default() };
            for sent in [Version::HTTP_2, Version::HTTP_11, Version::HTTP_10] {
                let (parsed, version) = parse(describe(&client, sent).as_bytes()).unwrap();
                assert_eq!((parsed.address, parsed.tls_version), (client.address, tls_version));
                assert_eq!((parsed.identity.as_deref(), version), (identity, sent));
            }
        }
        assert!(parse(b"").is_none() && parse(br#"{"address":"elsewhere"}"#).is_none());
    }
}
