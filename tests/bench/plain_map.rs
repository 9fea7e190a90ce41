//! The ceiling: the same requests answered by a hash map behind a lock, straight from hyper. No guest, no log.

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

/// The argument that makes the benchmark's binary this server.
pub const NAME: &str = "plain-map";

/// Starts it, in a process of its own.
pub fn start() -> Result<Server> {
    Server::start("plain hyper map", &std::env::current_exe()?, &[NAME.to_owned()])
}

type Map = Arc<Mutex<HashMap<String, Bytes>>>;

#[tokio::main]
pub async fn serve() -> Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    eprintln!("serving on http://{}", listener.local_addr()?);
    let map = Map::default();
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
                map.lock().expect("no panic under it").insert(head.uri.path().to_owned(), body.to_bytes());
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
