//! Entry point of the fuzz target for frames.
//!
//! Random bytes do not pass a checksum. So they come as the content of a segment, as the body of a frame whose checksums
//! are right, or as the head of one.

use std::io;
use std::sync::Arc;

use uuid::Uuid;

use super::disk::File;
use super::frame::{self, Builder};
use super::identity::Identity;
use super::scan::Scan;
use super::segment::VERSION;

/// Scans frames: nothing is read beyond the end, nothing panics, and what is decoded lies in what was read.
pub fn frames(bytes: &[u8]) {
    let Some((kind, bytes)) = bytes.split_first() else { return };
    match kind % 3 {
        0 => drop(scan(bytes.to_vec())),
        1 => {
            let Some((count, body)) = bytes.split_first() else { return };
            let mut frame = Builder::new(u64::MAX - 3, Vec::new());
            frame.body().extend_from_slice(body);
            frame.count = u32::from(*count).max(1);
            frame.seal(Uuid::nil(), 1, 1, 0);
            assert_eq!(scan(frame.bytes().to_vec()), 1, "its checksums are right");
        }
        _ => {
            let mut file = Builder::new(1, Vec::new()).bytes().to_vec();
            file[..4].copy_from_slice(b"FRME");
            let fields = bytes.len().min(36);
            file[4..4 + fields.min(28)].copy_from_slice(&bytes[..fields.min(28)]);
            // Kind, flags and epoch.
            file[52..52 + fields.saturating_sub(28)].copy_from_slice(&bytes[fields.min(28)..fields]);
            let checksum = crc32c::crc32c(&file[..frame::HEAD_BYTES - 4]);
            file[frame::HEAD_BYTES - 4..].copy_from_slice(&checksum.to_le_bytes());
            file.extend_from_slice(&bytes[fields..]);
            scan(file);
        }
    }
}

/// Goes over all frames and returns how many there are.
fn scan(bytes: Vec<u8>) -> usize {
    let size = bytes.len() as u64;
    let mut scan = Scan::new(Arc::new(Memory(bytes)), (VERSION, Uuid::nil()), (0, size), None);
    let mut count = 0;
    while scan.advance().expect("it reads what is there") {
        for frame in scan.frames() {
            count += 1;
            assert!(frame.incarnations().len() <= frame.body.len());
            let (mut pairs, mut decoded) = (Vec::new(), 0);
            for entry in frame.entries().map_while(|entry| entry) {
                decoded += entry.encoded.len();
                assert!(entry.bytes() < entry.encoded.len());
                assert!(entry.sequence >= frame.head.first);
                if let Some(range) = entry.metadata(&mut pairs) {
                    assert_eq!(entry.entry(&pairs[range]).sequence, entry.sequence);
                }
            }
            assert!(decoded <= frame.body.len());
        }
    }
    assert!(scan.offset() <= size);
    count
}

/// A file that cannot be written.
struct Memory(Vec<u8>);

impl File for Memory {
    fn size(&self) -> io::Result<u64> {
        Ok(self.0.len() as u64)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let bytes = self.0.get(offset as usize..).and_then(|rest| rest.get(..buffer.len()));
        buffer.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn write_at(&self, _: &[u8], _: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn allocate(&self, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn sync(&self) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn forget_cached(&self) -> io::Result<()> {
        Ok(())
    }

    fn identity(&self) -> io::Result<Identity> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::entry;
    use super::*;
    use crate::{Event, Put};

    fn event() -> impl Strategy<Value = Event> {
        let put = (any::<String>(), any::<Vec<u8>>(), any::<Vec<(String, String)>>(), any::<Option<u64>>());
        let put = put.prop_map(|(key, value, metadata, expires)| Event::Put(Put { key, value, metadata, expires }));
        prop_oneof![put, any::<String>().prop_map(Event::Delete)]
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(2000) })]

        #[test]
        fn arbitrary_bytes_are_scanned(bytes: Vec<u8>) {
            frames(&bytes);
        }

        /// Nearly right goes further than anything.
        #[test]
        fn frame_with_changed_entries_is_scanned(
            events in proptest::collection::vec(event(), 1..4),
            changes in proptest::collection::vec((any::<usize>(), any::<u8>()), 0..4),
        ) {
            let mut bytes = vec![1, events.len() as u8];
            for (offset, event) in (0..).zip(&events) {
                entry::encode(&mut bytes, offset, 7, event);
            }
            for (at, byte) in changes {
                let at = 1 + at % (bytes.len() - 1);
                bytes[at] = byte;
            }
            frames(&bytes);
        }
    }
}
