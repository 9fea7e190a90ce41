//! A proxy that loses responses: the server has done what was requested, and the client never learns that.

use std::io::{self, Read, Write, copy, sink};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

/// Loses the response to every second PUT with a condition, and to every second transaction with a marker: a client can find out
/// what became of them.
pub struct Lossy {
    pub address: SocketAddr,
    writes: Arc<AtomicUsize>,
}

impl Lossy {
    /// Starts in front of a server. It lasts as long as the process.
    pub fn start(server: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("there is a free port");
        let address = listener.local_addr().expect("a listener has an address");
        let writes = Arc::<AtomicUsize>::default();
        let counted = Arc::clone(&writes);
        thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let writes = Arc::clone(&counted);
                // A client that leaves ends its request.
                thread::spawn(move || forward(client, server, &writes));
            }
        });
        Self { address, writes }
    }

    /// Number of lost responses.
    pub fn lost(&self) -> usize {
        self.writes.load(Ordering::Relaxed) / 2
    }
}

/// Forwards one request, and closes the connection after the response.
fn forward(mut client: TcpStream, server: SocketAddr, writes: &AtomicUsize) -> io::Result<()> {
    let mut request = Vec::new();
    let end = loop {
        if let Some(end) = request.windows(4).position(|window| window == b"\r\n\r\n") {
            break end;
        }
        let mut bytes = [0; 1 << 12];
        match client.read(&mut bytes)? {
            0 => return Ok(()),
            read => request.extend_from_slice(&bytes[..read]),
        }
    };
    let head = String::from_utf8_lossy(&request[..end]).into_owned();
    let mut body = request.split_off(end + 4);
    let value = |name: &str| head.lines().find_map(|line| line.to_lowercase().strip_prefix(name).map(str::to_owned));
    let length = value("content-length:").and_then(|length| length.trim().parse().ok()).unwrap_or(0);
    let read = body.len();
    body.resize(length, 0);
    client.read_exact(&mut body[read..])?;

    let lines = head.lines().filter(|line| !line.to_lowercase().starts_with("connection:"));
    let head_sent = lines.chain(["connection: close", "", ""]).collect::<Vec<_>>().join("\r\n");
    let mut upstream = TcpStream::connect(server)?;
    upstream.write_all(&[head_sent.as_bytes(), &body].concat())?;
    let has_condition = value("if-match:").is_some() || value("if-none-match:").is_some();
    let has_marker = String::from_utf8_lossy(&body).contains("/done/");
    if (head.starts_with("PUT ") && has_condition || has_marker) && writes.fetch_add(1, Ordering::Relaxed) % 2 == 1 {
        // The response comes when the write is done.
        copy(&mut upstream, &mut sink())?;
        return Ok(());
    }
    copy(&mut upstream, &mut client).map(drop)
}
