//! HTTP/2 frame headers (RFC 9113, section 4.1) in a stream of bytes, and the limit of control frames of a client.

use std::time::Duration;

use h2::Reason;
use tokio::time::Instant;

/// Connection preface of a client.
pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Size of a frame header: three bytes of length, one of type, one of flags, and four of the stream.
const HEADER_BYTES: usize = 9;
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const GOAWAY: u8 = 7;

const SECOND: Duration = Duration::from_secs(1);
/// Control frames per request: continuations, priority, reset, window updates.
const PER_REQUEST: u32 = 4;
/// Window updates, of the stream and of the connection, per frame of a response.
const PER_RESPONSE_FRAME: u32 = 2;
/// Maximum allowance earned by these, as a multiple of the rate.
const MAX_EARNED: u32 = 10;
/// Size below which a DATA frame counts as a control frame, unless it ends the stream.
pub const SMALL_DATA: usize = 16;
const END_STREAM: u8 = 1;

/// Header of a frame, and the reason of an RST_STREAM or a GOAWAY.
#[derive(Clone, Copy)]
pub struct Frame {
    kind: u8,
    flags: u8,
    length: usize,
    reason: Option<Reason>,
}

impl Frame {
    pub fn is_refusal(&self) -> bool {
        self.kind == RST_STREAM && self.reason == Some(Reason::REFUSED_STREAM)
    }

    /// Returns whether the frame ends the connection because of an error.
    pub fn is_fatal(&self) -> bool {
        self.kind == GOAWAY && self.reason != Some(Reason::NO_ERROR)
    }

    pub fn is_data(&self) -> bool {
        self.kind == DATA
    }

    fn is_headers(&self) -> bool {
        self.kind == HEADERS
    }

    /// Returns whether the frame carries neither a request nor a relevant part of one.
    fn is_control(&self) -> bool {
        let is_part = self.kind == DATA && (self.length >= SMALL_DATA || self.flags & END_STREAM != 0);
        !is_part && !self.is_headers()
    }
}

/// Parser of frame headers.
#[derive(Default)]
pub struct Frames {
    /// Received part of the header, and of the payload up to the end of the reason.
    head: Vec<u8>,
    /// Remaining bytes of the frame, which are skipped.
    skip: usize,
}

impl Frames {
    /// Creates a parser for the frames of a client, which follow its preface.
    pub fn of_client() -> Self {
        Self { skip: PREFACE.len(), ..Self::default() }
    }

    /// Finds the frames in the next bytes of the stream.
    pub fn find(&mut self, mut bytes: &[u8], mut found: impl FnMut(Frame)) {
        loop {
            let skipped = self.skip.min(bytes.len());
            (self.skip, bytes) = (self.skip - skipped, &bytes[skipped..]);
            if bytes.is_empty() {
                return;
            }
            let wanted = HEADER_BYTES + self.reason_end();
            let (part, rest) = bytes.split_at(bytes.len().min(wanted - self.head.len()));
            self.head.extend_from_slice(part);
            bytes = rest;
            let reason_end = self.reason_end();
            if let [a, b, c, kind, flags, _, _, _, _, payload @ ..] = &self.head[..]
                && payload.len() == reason_end
            {
                let reason = match (*kind, payload) {
                    (RST_STREAM, [a, b, c, d]) | (GOAWAY, [_, _, _, _, a, b, c, d]) => {
                        Some(Reason::from(u32::from_be_bytes([*a, *b, *c, *d])))
                    }
                    _ => None,
                };
                let length = u32::from_be_bytes([0, *a, *b, *c]) as usize;
                found(Frame { kind: *kind, flags: *flags, length, reason });
                self.skip = length - reason_end;
                self.head.clear();
            }
        }
    }

    /// Returns where the reason ends in the payload of a frame that has one, 0 for others.
    fn reason_end(&self) -> usize {
        let [a, b, c, kind, ..] = self.head[..] else { return 0 };
        let end = match kind {
            RST_STREAM => 4,
            GOAWAY => 8,
            _ => 0,
        };
        end.min(u32::from_be_bytes([0, a, b, c]) as usize)
    }
}

/// Allowance of control frames: a rate per second, and some for each request and each frame of a response.
pub struct Allowance {
    per_second: u32,
    left: u32,
    since: Instant,
}

impl Allowance {
    pub fn new(per_second: u32) -> Self {
        Self { per_second, left: per_second, since: Instant::now() }
    }

    /// Notes a sent frame of a response.
    pub fn sent(&mut self) {
        self.earn(PER_RESPONSE_FRAME);
    }

    /// Notes a received frame. Returns whether it is within the allowance.
    pub fn admit(&mut self, frame: Frame) -> bool {
        if frame.is_headers() {
            self.earn(PER_REQUEST);
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
        self.left = self.left.saturating_add(frames).min(self.per_second.saturating_mul(MAX_EARNED).max(self.left));
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
    fn control_frames_are_limited_by_time_and_work() {
        let mut allowance = Allowance::new(10);
        let admitted = |allowance: &mut Allowance, frame| (0..1_000).take_while(|_| allowance.admit(frame)).count();
        assert_eq!(admitted(&mut allowance, of(PING, 0, 8)), 10);
        // Parts of requests are free.
        assert_eq!(admitted(&mut allowance, of(DATA, 0, SMALL_DATA)), 1_000);
        assert_eq!(admitted(&mut allowance, of(DATA, END_STREAM, 0)), 1_000);
        assert_eq!(admitted(&mut allowance, of(DATA, 0, 1)), 0);
        allowance.sent();
        assert_eq!(admitted(&mut allowance, of(PING, 0, 8)), 2);
        assert!(allowance.admit(of(HEADERS, 0, 100)));
        assert_eq!(admitted(&mut allowance, of(PING, 0, 8)), 4);
        assert_eq!(admitted(&mut allowance, of(HEADERS, 0, 100)), 1_000);
        assert_eq!(admitted(&mut allowance, of(PING, 0, 8)), 100, "the earned allowance is bounded");
        allowance.since -= SECOND;
        assert_eq!(admitted(&mut allowance, of(PING, 0, 8)), 10);
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn frames_are_found_across_any_split(
            frames in prop::collection::vec(prop_oneof![
                (0..10_u8, prop::collection::vec(0..8_u8, 0..40)),
                (6..9_u32).prop_map(|reason| (RST_STREAM, reason.to_be_bytes().to_vec())),
                (0..2_u64).prop_map(|reason| (GOAWAY, reason.to_be_bytes().to_vec())),
            ], 0..20),
            cuts in prop::collection::vec(0..30_usize, 0..40),
        ) {
            let bytes: Vec<_> = frames.iter().flat_map(|(kind, payload)| frame(*kind, payload)).collect();
            let bytes = [PREFACE, &bytes].concat();
            let (mut parser, mut rest, mut found) = (Frames::of_client(), &bytes[..], Vec::new());
            for cut in cuts {
                let (part, others) = rest.split_at(cut.min(rest.len()));
                parser.find(part, |frame| found.push((frame.kind, frame.length, frame.is_refusal(), frame.is_fatal())));
                rest = others;
            }
            parser.find(rest, |frame| found.push((frame.kind, frame.length, frame.is_refusal(), frame.is_fatal())));
            let sent = frames.iter().map(|(kind, payload)| {
                let is_refusal = *kind == RST_STREAM && payload.starts_with(&[0, 0, 0, 7]);
                let is_fatal = *kind == GOAWAY && payload.get(4..8) != Some(&[0; 4]);
                (*kind, payload.len(), is_refusal, is_fatal)
            });
            prop_assert_eq!(found, sent.collect::<Vec<_>>());
        }
    }
}
