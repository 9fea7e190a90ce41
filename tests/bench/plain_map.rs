//! The ceiling: the same requests answered by a hash map behind a lock, straight from hyper. No guest, no log.
//!
//! Values are copied: a slice of hyper's read buffer would keep the whole of that buffer for each value, which makes PUTs
//! three times as expensive.

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex};

use anyhow::Result;
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;

use crate::process::Server;

/// The argument that makes the benchmark's binary this server, before the number of keys and the bytes of each.
pub const NAME: &str = "plain-map";

/// What it is called in tables.
pub const TITLE: &str = "plain hyper map";

/// Starts it, in a process of its own, with this many keys.
pub fn start(keys: u64, bytes: usize) -> Result<Server> {
    Server::start(TITLE, &std::env::current_exe()?, &args(keys, bytes))
}

/// What makes the benchmark's binary this server.
pub fn args(keys: u64, bytes: usize) -> [String; 3] {
    [NAME.to_owned(), keys.to_string(), bytes.to_string()]
}

type Map = Arc<Mutex<HashMap<String, Bytes>>>;

#[tokio::main]
pub async fn serve(keys: &str, bytes: &str) -> Result<()> {
    let (keys, value) = (keys.parse::<u64>()?, "x".repeat(bytes.parse()?));
    let filled = (0..keys).map(|number| (format!("/v1/key-{number}"), Bytes::from(value.clone())));
    let map: Map = Arc::new(Mutex::new(filled.collect()));
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    eprintln!("serving on http://{}", listener.local_addr()?);
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        let map = Arc::clone(&map);
        tokio::spawn(async move {
            let service = service_fn(move |request| {
                let map = Arc::clone(&map);
                async move { Ok::<_, Infallible>(respond(request, &map).await) }
            });
            let mut http = http1::Builder::new();
            let _ = http.timer(TokioTimer::new()).serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

async fn respond(request: Request<Incoming>, map: &Map) -> Response<Full<Bytes>> {
    let (head, body) = request.into_parts();
    let mut response = Response::default();
    match head.method {
        Method::PUT => match body.collect().await {
            Ok(body) => {
                let value = Bytes::copy_from_slice(&body.to_bytes());
                map.lock().expect("no panic under it").insert(head.uri.path().to_owned(), value);
                *response.status_mut() = StatusCode::CREATED;
            }
            Err(_) => *response.status_mut() = StatusCode::BAD_REQUEST,
        },
        Method::GET => match map.lock().expect("no panic under it").get(head.uri.path()) {
            Some(value) => *response.body_mut() = Full::new(value.clone()),
            None => *response.status_mut() = StatusCode::NOT_FOUND,
        },
        _ => *response.status_mut() = StatusCode::METHOD_NOT_ALLOWED,
    }
    response
}
