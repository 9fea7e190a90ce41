//! An HTTP/2 client that sends arbitrary frames, and attacks made of them.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};

use super::server::{PATIENCE, Server};

pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const PRIORITY: u8 = 2;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const WINDOW_UPDATE: u8 = 8;
pub const CONTINUATION: u8 = 9;
pub const END_STREAM: u8 = 1;
pub const ACK: u8 = 1;
pub const END_HEADERS: u8 = 4;
pub const ENHANCE_YOUR_CALM: u32 = 11;

/// `:method: GET`, `:scheme: http`, `:path: /v1/a`, `:authority: kvs`, in HPACK.
pub const GET: &[u8] = b"\x82\x86\x04\x05/v1/a\x41\x03kvs";

/// The same for PUT, of one byte.
pub const PUT: &[u8] = b"\x02\x03PUT\x86\x04\x05/v1/a\x41\x03kvs";

/// A client that sends arbitrary frames.
pub struct Frames<S = TcpStream> {
    pub stream: S,
}

#[derive(Debug)]
pub struct Frame {
    pub kind: u8,
    pub flags: u8,
    pub stream: u32,
    pub payload: Vec<u8>,
}

impl Frame {
    /// Error code of the end of a connection or stream.
    pub fn error(&self) -> u32 {
        let from = if self.kind == GOAWAY { 4 } else { 0 };
        u32::from_be_bytes(self.payload[from..from + 4].try_into().expect("four bytes"))
    }

    /// The status of the first response of a connection, which its head begins with: indexed, or in the Huffman code of HPACK, in
    /// which digits have five or six bits.
    pub fn status(&self) -> u16 {
        const INDEXED: [u16; 7] = [200, 204, 206, 304, 400, 404, 500];
        match self.payload[..] {
            [index @ 0x88..=0x8e, ..] => INDEXED[usize::from(index - 0x88)],
            [0x48, 0x82 | 0x83, a, b, c, ..] => {
                let mut bits = u32::from_be_bytes([a, b, c, 0]);
                (0..3).fold(0, |status, _| {
                    let (digit, length) = if bits >> 27 < 3 { (bits >> 27, 5) } else { ((bits >> 26) - 22, 6) };
                    bits <<= length;
                    10 * status + digit as u16
                })
            }
            _ => panic!("no status begins {self:?}"),
        }
    }
}

impl Frames {
    pub fn open(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).expect("the server listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("the time is not zero");
        stream.set_write_timeout(Some(PATIENCE)).expect("the time is not zero");
        Self::over(stream)
    }
}

impl<S: Read + Write> Frames<S> {
    /// Begins the connection on a stream.
    pub fn over(stream: S) -> Self {
        let mut frames = Self { stream };
        frames.stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").expect("it is taken");
        assert!(frames.send(SETTINGS, 0, 0, b""));
        frames
    }

    /// False when the server does not listen any more.
    pub fn send(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) -> bool {
        self.send_many(kind, flags, stream, payload, 1)
    }

    /// The same frame this many times, in one write.
    pub fn send_many(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8], times: usize) -> bool {
        let length = u32::try_from(payload.len()).expect("a frame is short").to_be_bytes();
        let frame = [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat();
        self.stream.write_all(&frame.repeat(times)).is_ok()
    }

    /// The next frame, or `None` at the end of the connection.
    pub fn next(&mut self) -> Option<Frame> {
        let mut head = [0; 9];
        match self.stream.read_exact(&mut head) {
            Ok(()) => {}
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => panic!("silence"),
            Err(_) => return None,
        }
        let [a, b, c, kind, flags, stream @ ..] = head;
        let mut payload = vec![0; u32::from_be_bytes([0, a, b, c]) as usize];
        self.stream.read_exact(&mut payload).ok()?;
        Some(Frame { kind, flags, stream: u32::from_be_bytes(stream), payload })
    }

    /// The next frame of one of these kinds.
    pub fn wait(&mut self, kinds: &[u8]) -> Option<Frame> {
        loop {
            let frame = self.next()?;
            if kinds.contains(&frame.kind) {
                return Some(frame);
            }
        }
    }

    /// Waits for the end of the connection by the server, and returns its error code.
    pub fn ended(mut self) -> Option<u32> {
        let mut reason = None;
        while let Some(frame) = self.next() {
            if frame.kind == GOAWAY {
                reason = Some(frame.error());
            }
        }
        reason
    }
}

/// Opens and resets streams, this many or until the connection ends. Returns the error code of that.
pub fn takes_back(server: &Server, times: u32) -> Option<u32> {
    let mut client = Frames::open(server.address());
    for stream in (1..2 * times).step_by(2) {
        let cancel = 8_u32.to_be_bytes();
        if !client.send(HEADERS, END_STREAM | END_HEADERS, stream, GET) || !client.send(RST_STREAM, 0, stream, &cancel)
        {
            break;
        }
    }
    client.ended()
}

/// A head that continues for this many frames or until the connection ends. Returns the number of accepted bytes.
pub fn goes_on_with_headers(server: &Server, times: usize) -> usize {
    let mut client = Frames::open(server.address());
    client.send(HEADERS, END_STREAM, 1, GET);
    // A name and a value without compression, and not for a table.
    let line = [b"\x00\x01x\x7f\x81\x7e".as_slice(), &[b'y'; 16_000]].concat();
    let sent = (0..times).take_while(|_| client.send(CONTINUATION, 0, 1, &line)).count();
    client.ended();
    sent
}

/// The body of a request, of this many frames without content.
pub fn sends_nothing(server: &Server, times: usize) {
    let mut client = Frames::open(server.address());
    client.send(HEADERS, END_HEADERS, 1, PUT);
    let all = (0..times).all(|_| client.send(DATA, 0, 1, b""));
    if all && client.send(DATA, END_STREAM, 1, b"") {
        client.wait(&[HEADERS, GOAWAY]);
    }
}

/// 100,000 frames of a kind in one write.
pub fn sends_many(server: &Server, kind: u8, payload: &[u8]) {
    let mut client = Frames::open(server.address());
    client.send_many(kind, 0, 0, payload, 100_000);
    client.ended();
}

/// Sends this many requests with a window of zero for their bodies, and waits for the first response.
pub fn takes_nothing(server: &Server, times: u32) -> Frames {
    let mut client = Frames::open(server.address());
    // INITIAL_WINDOW_SIZE: nothing may be sent to it.
    client.send(SETTINGS, 0, 0, &[0, 4, 0, 0, 0, 0]);
    for stream in (1..2 * times).step_by(2) {
        client.send(HEADERS, END_STREAM | END_HEADERS, stream, GET);
    }
    client.wait(&[HEADERS]).expect("the first head comes all the same");
    client
}

/// A field in HPACK, in no table.
pub fn field(name: &str, value: &str) -> Vec<u8> {
    [&[0, name.len() as u8], name.as_bytes(), &[value.len() as u8], value.as_bytes()].concat()
}
