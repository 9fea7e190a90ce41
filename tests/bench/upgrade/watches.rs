//! Watches of a key each, that are resumed by position whenever they end, and a client that writes these keys.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use futures_util::future::try_join_all;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper::{Request, Response, StatusCode, header};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::runtime::Builder;
use tokio::time::{sleep, timeout};

/// Between two writes.
const PACE: Duration = Duration::from_millis(1);
/// For the last event, after the last write.
const PATIENCE: Duration = Duration::from_secs(60);
/// The value that ends a watch.
const END: &str = "end";

/// Writes and watches this many keys until it is over, and compares. Returns the number of events.
pub fn check(address: SocketAddr, watches: usize, over: &AtomicBool) -> Result<usize> {
    Builder::new_current_thread().enable_all().build()?.block_on(async {
        let keys: Vec<_> = (0..watches).map(|number| format!("watched-{number}")).collect();
        let begin = position(address).await?;
        let seen: Vec<_> = keys.iter().map(|key| tokio::spawn(watch(address, key.clone(), begin.clone()))).collect();
        let written = write(address, &keys, over).await?;
        let seen = timeout(PATIENCE, try_join_all(seen)).await.context("an event did not come")??;
        let mut events = 0;
        for (key, seen) in keys.iter().zip(seen) {
            let (seen, written) = (seen.with_context(|| format!("watch of {key}"))?, &written[key]);
            ensure!(seen == *written, "{key} was written at {written:?}, and its watch saw {seen:?}");
            events += seen.len();
        }
        Ok(events)
    })
}

/// Writes one key after the other until it is over, then each once more to end its watch. Returns the sequences.
async fn write(address: SocketAddr, keys: &[String], over: &AtomicBool) -> Result<BTreeMap<String, Vec<u64>>> {
    let mut connection = Client { address, sender: None };
    let mut written: BTreeMap<String, Vec<u64>> = keys.iter().map(|key| (key.clone(), Vec::new())).collect();
    let begin = keys.iter().cycle().take_while(|_| !over.load(Ordering::Relaxed)).map(|key| (key, "value"));
    for (key, value) in begin.chain(keys.iter().map(|key| (key, END))) {
        let request = Request::put(format!("/v1/{key}")).body(Full::from(value))?;
        let response = connection.ask(request).await?;
        ensure!(response.status() == StatusCode::CREATED, "PUT {key}: {}", response.status());
        let etag = response.headers().get(header::ETAG).and_then(|etag| etag.to_str().ok());
        let sequence = etag.and_then(|etag| etag.trim_matches('"').parse().ok()).context("no entity tag")?;
        response.into_body().collect().await?;
        written.get_mut(key).context("a key of these")?.push(sequence);
        sleep(PACE).await;
    }
    Ok(written)
}

/// Returns the position to watch from.
async fn position(address: SocketAddr) -> Result<String> {
    let request = Request::get("/v1?limit=1").body(Full::default())?;
    let response = Client { address, sender: None }.ask(request).await?;
    let position = response.headers().get("kvs-position").context("no kvs-position")?;
    Ok(position.to_str()?.to_owned())
}

/// Watches a key from a position on, until it has the value that ends it. Returns the sequences of its events.
async fn watch(address: SocketAddr, key: String, begin: String) -> Result<Vec<u64>> {
    let (mut seen, mut since) = (Vec::new(), begin);
    loop {
        let request = Request::get(format!("/v1?watch&key={key}&since={since}")).body(Full::default())?;
        let response = Client { address, sender: None }.ask(request).await?;
        ensure!(response.status() == StatusCode::OK, "{}", response.status());
        let (mut body, mut rest) = (response.into_body(), String::new());
        while let Some(frame) = body.frame().await {
            let Ok(data) = frame?.into_data() else { continue };
            rest += std::str::from_utf8(&data)?;
            while let Some((block, later)) = rest.split_once("\n\n") {
                if let Some(id) = block.lines().find_map(|line| line.strip_prefix("id: ")) {
                    id.clone_into(&mut since);
                }
                if block.contains("event: ") {
                    seen.push(since.parse()?);
                }
                let is_last = block.contains(&format!("\"value\":\"{END}\""));
                rest = later.to_owned();
                if is_last {
                    return Ok(seen);
                }
            }
        }
        ensure!(rest.is_empty(), "it ended within an event: {rest:?}");
    }
}

/// A client that opens a new connection where the server closes one.
struct Client {
    address: SocketAddr,
    sender: Option<SendRequest<Full<Bytes>>>,
}

impl Client {
    async fn ask(&mut self, mut request: Request<Full<Bytes>>) -> Result<Response<Incoming>> {
        request.headers_mut().insert(header::HOST, header::HeaderValue::from_str(&self.address.to_string())?);
        let mut sender = match self.sender.take() {
            Some(sender) => sender,
            None => {
                let stream = TcpStream::connect(self.address).await.context("a connection is refused")?;
                let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
                tokio::spawn(connection);
                sender
            }
        };
        sender.ready().await?;
        let response = sender.send_request(request).await?;
        let closes = response.headers().get(header::CONNECTION).is_some_and(|value| value == "close");
        self.sender = (!closes).then_some(sender);
        Ok(response)
    }
}
