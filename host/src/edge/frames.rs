//! Frames of HTTP/2 in a stream of bytes, and how many of a client's the connection puts up with.
//!
//! Frames are those of RFC 9113, section 4.1.

use std::time::Duration;

use h2::Reason;
use tokio::time::Instant;

/// What a client sends before its first frame.
pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Of a frame: three bytes of length, one that says what it is, one of flags, and four of the stream.
const HEAD: usize = 9;
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;

const SECOND: Duration = Duration::from_secs(1);
/// Control frames that come with a request: more headers, its priority, its end, a window.
const OF_REQUEST: u32 = 4;
/// Windows, of the stream and of the connection, that come for each frame of a response.
const OF_RESPONSE: u32 = 2;
/// So many times the rate can be left over from these.
const LEFT_OVER: u32 = 10;
/// A part of a body that is smaller than this, and not the last, is as good as none.
pub const SMALL: usize = 16;
const END_STREAM: u8 = 1;

/// A frame whose head has come, and, of one that ends a stream, the reason.
#[derive(Clone, Copy)]
pub struct Frame {
    kind: u8,
    flags: u8,
    length: usize,
    reason: Option<Reason>,
}

impl Frame {
    pub fn is_refusal(&self) -> bool {
        self.reason == Some(Reason::REFUSED_STREAM)
    }

    pub fn is_data(&self) -> bool {
        self.kind == DATA
    }

    fn is_headers(&self) -> bool {
        self.kind == HEADERS
    }

    /// Whether it is neither a request nor a part of one worth its frame.
    fn is_control(&self) -> bool {
        let is_part = self.kind == DATA && (self.length >= SMALL || self.flags & END_STREAM != 0);
        !is_part && !self.is_headers()
    }
}

/// Where in a frame the bytes are that come next.
#[derive(Default)]
pub struct Frames {
    /// What has come of the head and, of a frame that ends a stream, of the reason.
    head: Vec<u8>,
    /// Bytes to the end of the frame that are of no interest.
    skip: usize,
}

impl Frames {
    /// Those that a client sends, which begin after its preface.
    pub fn of_client() -> Self {
        Self { skip: PREFACE.len(), ..Self::default() }
    }

    /// Finds the frames in these bytes, which go on where those before ended.
    pub fn find(&mut self, mut bytes: &[u8], mut found: impl FnMut(Frame)) {
        loop {
            let skipped = self.skip.min(bytes.len());
            (self.skip, bytes) = (self.skip - skipped, &bytes[skipped..]);
            if bytes.is_empty() {
                return;
            }
            let wanted = match self.head[..] {
                [_, _, _, RST_STREAM, ..] => HEAD + 4,
                _ => HEAD,
            };
            let (part, rest) = bytes.split_at(bytes.len().min(wanted - self.head.len()));
            self.head.extend_from_slice(part);
            bytes = rest;
            let length = |a, b, c| u32::from_be_bytes([0, a, b, c]) as usize;
            match self.head[..] {
                [x, y, z, RST_STREAM, flags, _, _, _, _, a, b, c, d] => {
                    let reason = Some(Reason::from(u32::from_be_bytes([a, b, c, d])));
                    found(Frame { kind: RST_STREAM, flags, length: length(x, y, z), reason });
                    self.head.clear();
                }
                [a, b, c, kind, flags, _, _, _, _] if kind != RST_STREAM => {
                    self.skip = length(a, b, c);
                    found(Frame { kind, flags, length: self.skip, reason: None });
                    self.head.clear();
                }
                _ => {}
            }
        }
    }
}

/// Control frames that a client may still send: so many a second, and some for each request and each part of a response.
pub struct Allowance {
    per_second: u32,
    left: u32,
    since: Instant,
}

impl Allowance {
    pub fn new(per_second: u32) -> Self {
        Self { per_second, left: per_second, since: Instant::now() }
    }

    /// A part of a response was sent.
    pub fn sent(&mut self) {
        self.earn(OF_RESPONSE);
    }

    /// A frame has come. Returns whether it may.
    pub fn admit(&mut self, frame: Frame) -> bool {
        if frame.is_headers() {
            self.earn(OF_REQUEST);
        }
        if !frame.is_control() {
            return true;
        }
        if self.left == 0 && self.since.elapsed() >= SECOND {
            (self.left, self.since) = (self.per_second, Instant::now());
        }
        self.left.checked_sub(1).map(|left| self.left = left).is_some()
    }

    fn earn(&mut self, frames: u32) {
        self.left = self.left.saturating_add(frames).min(self.per_second.saturating_mul(LEFT_OVER).max(self.left));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PING: u8 = 6;

    fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).expect("a frame is short").to_be_bytes();
        [&length[1..], &[kind, 0, 0, 0, 0, 1], payload].concat()
    }

    fn of(kind: u8, flags: u8, length: usize) -> Frame {
        Frame { kind, flags, length, reason: None }
    }

    #[test]
    fn control_frames_are_allowed_by_time_and_by_work() {
        let mut allowance = Allowance::new(10);
        let admitted = |allowance: &mut Allowance, frame| (0..1_000).take_while(|_| allowance.admit(frame)).count();
        assert_eq!(admitted(&mut allowance, of(PING, 0, 8)), 10);
        // What requests are made of costs nothing.
        assert_eq!(admitted(&mut allowance, of(DATA, 0, SMALL)), 1_000);
        assert_eq!(admitted(&mut allowance, of(DATA, END_STREAM, 0)), 1_000);
        assert_eq!(admitted(&mut allowance, of(DATA, 0, 1)), 0);
        allowance.sent();
        assert_eq!(admitted(&mut allowance, of(PING, 0, 8)), 2);
        assert!(allowance.admit(of(HEADERS, 0, 100)));
        assert_eq!(admitted(&mut allowance, of(PING, 0, 8)), 4);
        assert_eq!(admitted(&mut allowance, of(HEADERS, 0, 100)), 1_000);
        assert_eq!(admitted(&mut allowance, of(PING, 0, 8)), 100, "not without end");
        allowance.since -= SECOND;
        assert_eq!(admitted(&mut allowance, of(PING, 0, 8)), 10);
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn frames_are_found_wherever_the_bytes_are_cut(
            frames in prop::collection::vec(prop_oneof![
                (0..10_u8, prop::collection::vec(0..8_u8, 0..40)).prop_filter("ends no stream", |(kind, _)| *kind != RST_STREAM),
                (6..9_u32).prop_map(|reason| (RST_STREAM, reason.to_be_bytes().to_vec())),
            ], 0..20),
            cuts in prop::collection::vec(0..30_usize, 0..40),
        ) {
            let bytes: Vec<_> = frames.iter().flat_map(|(kind, payload)| frame(*kind, payload)).collect();
            let bytes = [PREFACE, &bytes].concat();
            let (mut parser, mut rest, mut found) = (Frames::of_client(), &bytes[..], Vec::new());
            for cut in cuts {
                let (part, others) = rest.split_at(cut.min(rest.len()));
                parser.find(part, |frame| found.push((frame.kind, frame.length, frame.is_refusal())));
                rest = others;
            }
            parser.find(rest, |frame| found.push((frame.kind, frame.length, frame.is_refusal())));
            let sent = frames.iter().map(|(kind, payload)| (*kind, payload.len(), *kind == RST_STREAM && payload[3] == 7));
            prop_assert_eq!(found, sent.collect::<Vec<_>>());
        }
    }
}
