//! An HTTP/1.1 client for tests in which bytes, order and the end of a connection matter; and paths of keys.
//!
//! Owns: one blocking connection. Must never know: how a server works.

use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::Duration;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use socket2::{Domain, Socket, Type};

use super::server::PATIENCE;

/// All characters except letters, digits and `/`.
const LONG_FORM: &AsciiSet = &NON_ALPHANUMERIC.remove(b'/');

/// Header that requests a stale read, which a standby serves.
pub const STALE: [(&str, &str); 1] = [("kvs-consistency", "stale")];

/// Returns the path of a key in the short form: slashes are escaped.
pub fn short(key: &str) -> String {
    format!("/v1/{}", utf8_percent_encode(key, NON_ALPHANUMERIC))
}

/// Returns the path of a key in the long form: slashes stay.
pub fn long(key: &str) -> String {
    format!("/v1/key/{}", utf8_percent_encode(key, LONG_FORM))
}

/// A plain stream, or one over TLS.
pub struct Connection<S: Read = TcpStream> {
    stream: BufReader<S>,
    /// Header lines of every request.
    headers: String,
}

/// Transport of a connection.
pub trait Stream: Read + Write + Send {}

impl<S: Read + Write + Send> Stream for S {}

type Connect = dyn Fn(SocketAddr) -> io::Result<Box<dyn Stream>> + Send + Sync;

/// Way to connect to a server, and the headers that authenticate the client.
pub struct Way {
    connect: Box<Connect>,
    headers: String,
}

impl Way {
    pub fn new(
        connect: impl Fn(SocketAddr) -> io::Result<Box<dyn Stream>> + Send + Sync + 'static,
        headers: &str,
    ) -> Self {
        Self { connect: Box::new(connect), headers: headers.to_owned() }
    }

    pub fn try_open(&self, address: SocketAddr) -> io::Result<Connection<Box<dyn Stream>>> {
        Ok(Connection { headers: self.headers.clone(), ..Connection::over((self.connect)(address)?) })
    }
}

impl Default for Way {
    fn default() -> Self {
        Self::new(|address| Ok(Box::new(plain(address)?)), "")
    }
}

/// Connection with a timeout on every read and write.
pub fn plain(address: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    ready(&stream)?;
    Ok(stream)
}

fn ready(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))
}

#[derive(Debug)]
pub struct Response {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Response {
    /// Returns the value of a header that occurs once.
    pub fn header(&self, name: &str) -> Option<&str> {
        let mut values = self.headers.iter().filter(|(other, _)| other.eq_ignore_ascii_case(name));
        let value = values.next().map(|(_, value)| value.as_str());
        assert!(values.next().is_none(), "{name} is there twice: {:?}", self.headers);
        value
    }

    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).expect("the body is text")
    }

    /// Returns the sequence in the ETag.
    pub fn etag(&self) -> Option<u64> {
        let quoted = self.header("etag")?;
        let sequence = quoted.strip_prefix('"').and_then(|quoted| quoted.strip_suffix('"')?.parse().ok());
        Some(sequence.unwrap_or_else(|| panic!("the ETag is not a sequence in quotes: {quoted}")))
    }

    /// Checks a response of one line of text.
    #[track_caller]
    pub fn says(&self, status: u16, text: &str) {
        assert_eq!((self.status, self.text()), (status, format!("{text}\n").as_str()));
        assert_eq!(self.header("content-type"), Some("text/plain; charset=utf-8"));
    }
}

impl Connection {
    pub fn open(address: SocketAddr) -> Self {
        Self::try_open(address).unwrap_or_else(|error| panic!("no connection to {address}: {error}"))
    }

    pub fn try_open(address: SocketAddr) -> io::Result<Self> {
        plain(address).map(Self::over)
    }

    /// Connects from another address of this machine.
    pub fn open_from(local: &str, address: SocketAddr) -> Self {
        let connect = || {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
            socket.bind(&SocketAddr::new(local.parse().expect("an address"), 0).into())?;
            socket.connect(&address.into())?;
            let stream = socket.into();
            ready(&stream).map(|()| Self::over(stream))
        };
        connect().unwrap_or_else(|error| panic!("no connection from {local} to {address}: {error}"))
    }

    /// Closes the sending side; responses can still be read.
    pub fn finish(&self) {
        self.stream.get_ref().shutdown(Shutdown::Write).expect("a connection can be shut down");
    }

    /// Checks that nothing has arrived, and nothing arrives for a while.
    pub fn is_silent_for(&mut self, time: Duration) -> bool {
        self.stream.get_ref().set_read_timeout(Some(time)).expect("the time is not zero");
        let waited = self.stream.fill_buf().map(<[u8]>::len);
        self.stream.get_ref().set_read_timeout(Some(PATIENCE)).expect("the time is not zero");
        matches!(waited, Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut))
    }

    /// Returns the local port, by which the server's log lines name the connection.
    pub fn port(&self) -> u16 {
        self.stream.get_ref().local_addr().expect("a connected socket has an address").port()
    }
}

impl<S: Read + Write> Connection<S> {
    pub fn over(stream: S) -> Self {
        Self { stream: BufReader::new(stream), headers: String::new() }
    }

    /// Returns the transport.
    pub fn stream(&self) -> &S {
        self.stream.get_ref()
    }

    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.get_mut().write_all(bytes.as_ref()).expect("the connection takes what is sent");
    }

    /// Sends bytes that the peer may not read any more.
    pub fn try_send(&mut self, bytes: impl AsRef<[u8]>) -> io::Result<()> {
        self.stream.get_mut().write_all(bytes.as_ref())
    }

    /// Sends a request with a body and returns its response.
    #[track_caller]
    pub fn ask(&mut self, method: &str, path: &str, body: &[u8]) -> Response {
        self.try_ask(method, path, body).unwrap_or_else(|error| panic!("no answer to {method} {path}: {error}"))
    }

    /// As `ask`, with additional headers.
    #[track_caller]
    pub fn ask_with(&mut self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Response {
        let headers: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
        self.try_ask_with(method, path, &headers, body)
            .unwrap_or_else(|error| panic!("no answer to {method} {path}: {error}"))
    }

    /// Sends a request and reads the head of the response only.
    #[track_caller]
    pub fn ask_for_head(&mut self, method: &str, path: &str, headers: &[(&str, &str)]) -> Response {
        self.try_ask_for_head(method, path, headers)
            .unwrap_or_else(|error| panic!("no answer to {method} {path}: {error}"))
    }

    pub fn try_ask_for_head(&mut self, method: &str, path: &str, headers: &[(&str, &str)]) -> io::Result<Response> {
        let headers: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
        self.try_send(format!("{method} {path} HTTP/1.1\r\nhost: kvs\r\n{}{headers}\r\n", self.headers))?;
        self.try_read(true)
    }

    /// Returns the next chunk of a body; `None` at its end.
    #[track_caller]
    pub fn chunk(&mut self) -> Option<Vec<u8>> {
        self.try_chunk().unwrap_or_else(|error| panic!("no chunk: {error}"))
    }

    pub fn try_chunk(&mut self) -> io::Result<Option<Vec<u8>>> {
        let length = self.line()?;
        let length =
            usize::from_str_radix(&length, 16).map_err(|_| io::Error::other(format!("not a length: {length:?}")))?;
        let mut chunk = vec![0; length + 2];
        self.stream.read_exact(&mut chunk)?;
        assert_eq!(chunk.split_off(length), b"\r\n");
        Ok((length > 0).then_some(chunk))
    }

    /// Reads this many bytes of a body.
    pub fn try_read_exact(&mut self, length: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    /// As `ask`; an error when the connection ended before the whole response arrived.
    pub fn try_ask(&mut self, method: &str, path: &str, body: &[u8]) -> io::Result<Response> {
        self.try_ask_with(method, path, "", body)
    }

    /// As `try_ask`, with additional header lines.
    pub fn try_ask_with(&mut self, method: &str, path: &str, lines: &str, body: &[u8]) -> io::Result<Response> {
        let (standing, length) = (&self.headers, body.len());
        let head =
            format!("{method} {path} HTTP/1.1\r\nhost: kvs\r\n{standing}{lines}content-length: {length}\r\n\r\n");
        // In one write, so that small requests are one packet.
        if length <= 64 << 10 {
            self.try_send([head.as_bytes(), body].concat())?;
        } else {
            self.try_send(head)?;
            self.try_send(body)?;
        }
        self.try_read(method == "HEAD")
    }

    /// Reads the next response.
    #[track_caller]
    pub fn read(&mut self) -> Response {
        self.try_read(false).unwrap_or_else(|error| panic!("no response: {error}"))
    }

    pub fn try_read(&mut self, head_only: bool) -> io::Result<Response> {
        let status_line = self.line()?;
        let status = status_line.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3)?.parse().ok());
        let status = status.ok_or_else(|| io::Error::other(format!("not a status line: {status_line:?}")))?;
        let mut headers = Vec::new();
        loop {
            let line = self.line()?;
            if line.is_empty() {
                break;
            }
            let (name, value) =
                line.split_once(':').ok_or_else(|| io::Error::other(format!("not a header: {line:?}")))?;
            headers.push((name.to_owned(), value.trim().to_owned()));
        }
        let mut response = Response { status, headers, body: Vec::new() };
        if !head_only && status >= 200 && !matches!(status, 204 | 304) {
            let length = response.header("content-length").and_then(|length| length.parse().ok());
            response.body.resize(length.ok_or_else(|| io::Error::other("the response has no length"))?, 0);
            self.stream.read_exact(&mut response.body)?;
        }
        Ok(response)
    }

    fn line(&mut self) -> io::Result<String> {
        let mut line = Vec::new();
        self.stream.read_until(b'\n', &mut line)?;
        if !line.ends_with(b"\r\n") {
            let seen = String::from_utf8_lossy(&line);
            return Err(io::Error::new(ErrorKind::UnexpectedEof, format!("the connection ended after {seen:?}")));
        }
        line.truncate(line.len() - 2);
        String::from_utf8(line).map_err(io::Error::other)
    }

    /// Waits until the peer closes, and returns what it sent before.
    pub fn end(&mut self) -> String {
        let mut rest = Vec::new();
        match self.stream.read_to_end(&mut rest) {
            // A reset is a close too: the peer had not read everything.
            Err(error) if error.kind() != ErrorKind::ConnectionReset => {
                panic!("not closed but {error}, after {:?}", String::from_utf8_lossy(&rest))
            }
            _ => String::from_utf8_lossy(&rest).into_owned(),
        }
    }
}

/// The response to a GET without headers.
pub fn get(client: &mut Connection, path: &str) -> Response {
    client.ask("GET", path, b"")
}
