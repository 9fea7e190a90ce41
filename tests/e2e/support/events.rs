//! Watches: streams of events.

use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;

use serde_json::Value;

use super::server::Server;
use super::wire::{Connection, Response};

/// A stream of events.
pub struct Events<S: Read + Write = TcpStream> {
    connection: Connection<S>,
    text: String,
    /// First position, to resume from before any event.
    pub begin: u64,
}

#[derive(Debug, PartialEq)]
pub struct Event {
    pub id: u64,
    pub event: String,
    pub data: Value,
}

impl Events {
    pub fn open(server: &Server, target: &str, headers: &[(&str, &str)]) -> Self {
        let events = Self::over(Connection::open(server.address()), target, headers).expect("it is answered");
        events.unwrap_or_else(|refused| panic!("{refused:?} in place of events"))
    }
}

impl<S: Read + Write> Events<S> {
    /// Requests events on this connection. Returns the stream, or the error response.
    pub fn over(
        mut connection: Connection<S>,
        target: &str,
        headers: &[(&str, &str)],
    ) -> io::Result<Result<Self, Response>> {
        let head = connection.try_ask_for_head("GET", target, headers)?;
        if head.status != 200 {
            return Ok(Err(head));
        }
        assert_eq!(head.header("content-type"), Some("text/event-stream"));
        let mut events = Self { connection, text: String::new(), begin: 0 };
        let begin = events.block()?.ok_or(ErrorKind::UnexpectedEof)?;
        events.begin = begin.strip_prefix("id: ").and_then(|id| id.parse().ok()).expect(&begin);
        Ok(Ok(events))
    }

    /// The next comment or event, as sent. None at the end of the stream.
    pub fn block(&mut self) -> io::Result<Option<String>> {
        loop {
            if let Some((block, rest)) = self.text.split_once("\n\n") {
                let (block, rest) = (block.to_owned(), rest.to_owned());
                self.text = rest;
                return Ok(Some(block));
            }
            let Some(chunk) = self.connection.try_chunk()? else { return Ok(None) };
            self.text += str::from_utf8(&chunk).expect("text");
        }
    }

    pub fn next(&mut self) -> Option<Event> {
        self.try_next().unwrap_or_else(|error| panic!("the stream broke: {error}"))
    }

    /// As `next`, without comments and positions; an error when the connection broke.
    pub fn try_next(&mut self) -> io::Result<Option<Event>> {
        loop {
            let Some(block) = self.block()? else { return Ok(None) };
            if block == ":" || !block.contains('\n') {
                continue;
            }
            let mut fields = block.lines();
            let mut field = |name| fields.next().and_then(|line| line.strip_prefix(name)).expect(name).to_owned();
            let (id, event, data) = (field("id: "), field("event: "), field("data: "));
            assert_eq!(fields.next(), None, "{block}");
            let (id, data) = (id.parse().expect("a sequence"), serde_json::from_str(&data).expect("JSON"));
            return Ok(Some(Event { id, event, data }));
        }
    }
}
