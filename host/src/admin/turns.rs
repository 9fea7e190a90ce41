//! Turns on the thread of the admin listener: all its connections share it, and none keeps `/livez` waiting.
//!
//! Must never know: what is requested.

use std::io;

use hyper::StatusCode;
use hyper::server::conn::http1;
use hyper_util::rt::TokioTimer;
use tokio::runtime::{Builder, Runtime};
use tokio::task;

use super::connections::HEADER_TIMEOUT;
use super::{Answer, text};

/// Most bytes that a connection reads in a turn, also those of a head: those of the HTTP interface by default.
pub const BUFFER_BYTES: usize = 64 << 10;

/// Builds the runtime of the thread. It looks for connections and requests after each turn, not after 61: a client that sends
/// many megabytes always has something to read.
pub fn runtime() -> io::Result<Runtime> {
    kvs_runtime::runtime(Builder::new_current_thread().event_interval(1))
}

pub fn http() -> http1::Builder {
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT).half_close(true).max_buf_size(BUFFER_BYTES);
    http
}

/// Responds from another thread, for what waits for locks or for a disk, or formats much.
pub async fn elsewhere(work: impl FnOnce() -> Answer + Send + 'static) -> Answer {
    let done = task::spawn_blocking(work).await;
    done.unwrap_or_else(|error| text(StatusCode::INTERNAL_SERVER_ERROR, format!("no response: {error}\n")))
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::io::{Read, Write};
    use std::net::{SocketAddr, TcpListener, TcpStream};
    use std::os::unix::net::UnixStream as Socket;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::sync::mpsc::channel;
    use std::task::Poll;
    use std::thread;
    use std::time::Duration;

    use kvs_runtime::Env;
    use kvs_txlog::Condition;
    use tokio::io::AsyncReadExt;
    use tokio::net::UnixStream;
    use tokio::task::yield_now;

    use super::*;
    use crate::admin::Admin;

    const PATIENCE: Duration = Duration::from_secs(60);

    #[test]
    fn busy_task_gives_way_after_each_turn() {
        let turns = Arc::new(AtomicU64::new(0));
        runtime().unwrap().block_on(async {
            // As a connection whose socket always has something to read.
            let busy = Arc::clone(&turns);
            tokio::spawn(poll_fn::<(), _>(move |context| {
                busy.fetch_add(1, Ordering::Relaxed);
                context.waker().wake_by_ref();
                Poll::Pending
            }));
            let (mut client, socket) = Socket::pair().unwrap();
            socket.set_nonblocking(true).unwrap();
            let (mut socket, counted) = (UnixStream::from_std(socket).unwrap(), Arc::clone(&turns));
            let served = tokio::spawn(async move {
                socket.read_u8().await.unwrap();
                counted.load(Ordering::Relaxed)
            });
            for _ in 0..10 {
                yield_now().await;
            }
            let sent = turns.load(Ordering::Relaxed);
            client.write_all(b"x").unwrap();
            let waited = served.await.unwrap() - sent;
            assert!(waited <= 3, "the request waited for {waited} turns of another connection");
        });
    }

    fn ask(admin: SocketAddr, path: &str) -> io::Result<String> {
        let mut stream = TcpStream::connect(admin)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        write!(stream, "GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    }

    #[test]
    fn alive_while_a_report_waits() {
        // Where it would log rejected requests.
        let runtime = runtime().unwrap();
        let _entered = runtime.enter();
        let admin = Arc::new(Admin::new(&[], None, None, &Env::real()));
        let ((waits, waiting), (release, released)) = (channel(), channel());
        admin.health.add("stuck", move || {
            waits.send(()).unwrap();
            released.recv().unwrap();
            Condition::Well
        });
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        admin.start(listener).unwrap();
        for path in ["/readyz", "/replica", "/metrics"] {
            let asking = thread::spawn(move || ask(address, path));
            waiting.recv_timeout(PATIENCE).unwrap();
            let alive = ask(address, "/livez").unwrap_or_else(|error| panic!("{path}: {error}"));
            assert!(alive.starts_with("HTTP/1.1 200 "), "{path}: {alive}");
            release.send(()).unwrap();
            assert!(asking.join().unwrap().unwrap().starts_with("HTTP/1.1 "));
        }
    }
}
