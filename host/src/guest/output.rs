//! Log lines of a guest: what it prints, which has no level, and what it logs.
//!
//! Owns: their limits, and the fields that each has. Must never know: streams, or what the lines say.

use std::sync::Arc;
use std::time::{Duration, Instant};

use hyper::header::HeaderValue;
use kvs_runtime::Clock;
use tracing::{Level, debug, enabled, error, info, trace, warn};

use super::limits::Limits;
use super::metrics::LimitExceeded;
use super::trap::{Printed, printable};

/// Lines are limited in spans of this length; what is too much in one is dropped, and that is said.
const SPAN: Duration = Duration::from_secs(1);

pub struct Lines {
    guest: String,
    limits: Limits,
    exceeded: Arc<LimitExceeded>,
    clock: Clock,
    /// Line that is printed and not finished.
    line: Vec<u8>,
    span: Span,
    /// Of the call in progress.
    request_id: Option<HeaderValue>,
    printed: Printed,
}

struct Span {
    begun: Instant,
    /// Bytes and lines that may follow in it.
    bytes: usize,
    lines: u32,
    /// Whether it was said that some are dropped.
    bytes_reported: bool,
    lines_reported: bool,
}

impl Span {
    fn new(begun: Instant, limits: &Limits) -> Self {
        let (bytes, lines) = (limits.log_bytes, limits.log_lines);
        Self { begun, bytes, lines, bytes_reported: false, lines_reported: false }
    }
}

impl Lines {
    pub fn new(limits: Limits, exceeded: Arc<LimitExceeded>, clock: Clock) -> Self {
        let span = Span::new(clock.now(), &limits);
        let (guest, line, printed) = (String::new(), Vec::new(), Printed::default());
        Self { guest, limits, exceeded, clock, line, span, request_id: None, printed }
    }

    /// The name of the guest, which its lines have.
    pub fn set_name(&mut self, guest: &str) {
        self.guest = guest.to_owned();
    }

    /// A call begins, for a request where there is one.
    pub fn begin_call(&mut self, request_id: Option<HeaderValue>) {
        self.request_id = request_id;
        self.printed.clear();
    }

    /// Identifier of the request of the call in progress.
    pub fn request_id(&self) -> Option<&str> {
        self.request_id.as_ref()?.to_str().ok()
    }

    /// The end of what the call printed and logged.
    pub fn printed(&self) -> &[u8] {
        self.printed.bytes()
    }

    pub fn print(&mut self, bytes: &[u8]) {
        self.printed.add(bytes);
        let taken = self.take(bytes.len());
        for &byte in &bytes[..taken] {
            match byte {
                b'\n' => self.flush(),
                _ => {
                    self.line.push(byte);
                    if self.line.len() == self.limits.log_line_bytes {
                        self.flush();
                    }
                }
            }
        }
        if taken < bytes.len() {
            self.flush();
            self.report_bytes();
        }
    }

    /// Writes a message, when lines of its level are shown.
    pub fn log(&mut self, level: Level, message: &str) {
        self.printed.add(message.as_bytes());
        self.printed.add(b"\n");
        if !is_shown(level) {
            return;
        }
        let taken = self.take(message.len());
        for part in message.as_bytes()[..taken].chunks(self.limits.log_line_bytes) {
            self.write(level, part);
        }
        if taken < message.len() {
            self.report_bytes();
        }
    }

    /// Ends the line that is printed.
    pub fn flush(&mut self) {
        let line = std::mem::take(&mut self.line);
        self.write(Level::INFO, &line);
        self.line = line;
        self.line.clear();
    }

    /// Takes as many bytes of this many as the span has left.
    fn take(&mut self, bytes: usize) -> usize {
        let now = self.clock.now();
        if now.saturating_duration_since(self.span.begun) >= SPAN {
            self.span = Span::new(now, &self.limits);
        }
        let taken = bytes.min(self.span.bytes);
        self.span.bytes -= taken;
        taken
    }

    fn report_bytes(&mut self) {
        self.exceeded.log_bytes.add(1);
        if !std::mem::replace(&mut self.span.bytes_reported, true) {
            warn!(guest = self.guest, "output beyond {} bytes in {SPAN:?} is dropped", self.limits.log_bytes);
        }
    }

    fn write(&mut self, level: Level, line: &[u8]) {
        let Some(line) = printable(&String::from_utf8_lossy(line)) else { return };
        let guest = &*self.guest;
        if self.span.lines == 0 {
            self.exceeded.log_lines.add(1);
            if !std::mem::replace(&mut self.span.lines_reported, true) {
                warn!(guest, "output beyond {} lines in {SPAN:?} is dropped", self.limits.log_lines);
            }
            return;
        }
        self.span.lines -= 1;
        let request_id = self.request_id();
        match level {
            Level::ERROR => error!(guest, request_id, "{line}"),
            Level::WARN => warn!(guest, request_id, "{line}"),
            Level::INFO => info!(guest, request_id, "{line}"),
            Level::DEBUG => debug!(guest, request_id, "{line}"),
            Level::TRACE => trace!(guest, request_id, "{line}"),
        }
    }
}

/// Whether the filter shows lines of this level.
fn is_shown(level: Level) -> bool {
    match level {
        Level::ERROR => enabled!(Level::ERROR),
        Level::WARN => enabled!(Level::WARN),
        Level::INFO => enabled!(Level::INFO),
        Level::DEBUG => enabled!(Level::DEBUG),
        Level::TRACE => enabled!(Level::TRACE),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::limits;

    fn lines(log_bytes: usize, log_lines: u32) -> (Lines, Arc<LimitExceeded>) {
        let exceeded = Arc::<LimitExceeded>::default();
        let limits = Limits { log_bytes, log_lines, log_line_bytes: 10, ..limits::tests::limits(1, None) };
        (Lines::new(limits, Arc::clone(&exceeded), Clock::system()), exceeded)
    }

    /// Runs this with a subscriber that shows lines up to a level.
    fn shown(level: Level, run: impl FnOnce()) {
        let subscriber = tracing_subscriber::fmt().with_max_level(level).with_writer(std::io::sink).finish();
        tracing::subscriber::with_default(subscriber, run);
    }

    #[test]
    fn bytes_and_lines_of_a_span_are_limited_and_counted() {
        shown(Level::TRACE, || {
            let (mut lines, exceeded) = lines(100, 3);
            lines.print(b"one\ntwo\n");
            lines.log(Level::WARN, "three");
            assert_eq!(exceeded.log_lines.get(), 0);
            lines.log(Level::ERROR, "four");
            lines.print(b"five\n");
            assert_eq!((exceeded.log_lines.get(), exceeded.log_bytes.get()), (2, 0));
            lines.log(Level::INFO, &"x".repeat(100));
            assert_eq!(exceeded.log_bytes.get(), 1);
            assert_eq!(lines.span.bytes, 0);
        });
    }

    #[test]
    fn long_message_is_several_lines() {
        shown(Level::TRACE, || {
            let (mut lines, _) = lines(100, 10);
            lines.log(Level::DEBUG, &"x".repeat(25));
            assert_eq!(lines.span.lines, 7);
        });
    }

    #[test]
    fn message_that_is_not_shown_takes_nothing() {
        shown(Level::INFO, || {
            let (mut lines, _) = lines(100, 10);
            lines.log(Level::DEBUG, "text");
            assert_eq!((lines.span.bytes, lines.span.lines), (100, 10));
            assert_eq!(lines.printed(), b"text\n");
            lines.log(Level::INFO, "text");
            assert_eq!((lines.span.bytes, lines.span.lines), (96, 9));
        });
    }

    #[test]
    fn request_id_ends_with_the_call() {
        let (mut lines, _) = lines(1, 1);
        lines.begin_call(Some(HeaderValue::from_static("id")));
        assert_eq!(lines.request_id(), Some("id"));
        lines.begin_call(None);
        assert_eq!(lines.request_id(), None);
    }
}
