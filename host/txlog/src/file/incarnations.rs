//! The records of incarnations in frames, and what follows from them for sequences.
//!
//! The format is described in `docs/txlog-format.md`. Must never know: why an incarnation begins, which is the business of
//! `begin`.

use uuid::Uuid;

use super::bytes::{array, u64_at};
use super::frame::{Builder, INCARNATION};
use crate::Incarnation;
use crate::incarnation::JUMP;

const RECORD_BYTES: usize = 48;

/// The bytes of the frame that lists this many incarnations, 0 for none.
pub fn frame_bytes(incarnations: usize) -> u64 {
    let records = (incarnations * RECORD_BYTES) as u64;
    if incarnations == 0 { 0 } else { super::frame::HEAD_BYTES as u64 + records }
}

/// A frame that lists incarnations, oldest first; None when there are none.
pub fn frame(incarnations: &[Incarnation]) -> Option<Builder> {
    let mut frame = Builder::new(incarnations.first()?.first, Vec::new());
    frame.kind = INCARNATION;
    encode(frame.body(), incarnations);
    Some(frame)
}

pub fn encode(body: &mut Vec<u8>, incarnations: &[Incarnation]) {
    for Incarnation { id, parent, fork, first } in incarnations {
        body.extend_from_slice(id.as_bytes());
        body.extend_from_slice(parent.as_bytes());
        body.extend_from_slice(&fork.to_le_bytes());
        body.extend_from_slice(&first.to_le_bytes());
    }
}

/// Whether this is the size of whole records.
pub fn is_whole(body: &[u8]) -> bool {
    body.len().is_multiple_of(RECORD_BYTES)
}

pub fn decode(body: &[u8]) -> Vec<Incarnation> {
    let records = body.chunks_exact(RECORD_BYTES);
    let record = |bytes: &[u8]| Incarnation {
        id: Uuid::from_bytes(array(bytes, 0)),
        parent: Uuid::from_bytes(array(bytes, 16)),
        fork: u64_at(bytes, 32),
        first: u64_at(bytes, 40),
    };
    records.map(record).collect()
}

/// Checks the records of one segment: each begins far beyond its fork, and after the one before it. `parent` is the
/// incarnation before them, where it is known.
pub fn check(incarnations: &[Incarnation], parent: Option<Uuid>) -> Result<(), &'static str> {
    let (mut parent, mut previous) = (parent, 0);
    for incarnation in incarnations {
        if incarnation.first.checked_sub(incarnation.fork).is_none_or(|distance| distance < JUMP) {
            return Err("an incarnation begins too close to its fork");
        }
        if incarnation.fork.saturating_add(1) < previous {
            return Err("incarnations are out of order");
        }
        if parent.is_some_and(|parent| parent != incarnation.parent) {
            return Err("an incarnation does not continue the one before it");
        }
        parent = Some(incarnation.id);
        previous = incarnation.first;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn incarnation(id: u128, parent: u128, fork: u64, first: u64) -> Incarnation {
        Incarnation { id: Uuid::from_u128(id), parent: Uuid::from_u128(parent), fork, first }
    }

    #[test]
    fn records_are_read_as_written() {
        let all = [incarnation(2, 1, 7, JUMP + 7), incarnation(3, 2, JUMP + 6, 3 * JUMP)];
        let frame = frame(&all).expect("there are some");
        assert_eq!(frame.sealed_len(), frame_bytes(all.len()));
        assert_eq!(decode(&frame.bytes()[super::super::frame::HEAD_BYTES..]), all);
        assert!(super::frame(&[]).is_none());
    }

    #[test]
    fn wrong_records_are_found() {
        let sound = [incarnation(2, 1, 7, JUMP + 7), incarnation(3, 2, JUMP + 6, 3 * JUMP)];
        assert_eq!(check(&sound, Some(Uuid::from_u128(1))), Ok(()));
        assert_eq!(check(&sound, None), Ok(()));
        assert!(check(&sound, Some(Uuid::from_u128(9))).is_err());
        let wrong = [(2, JUMP + 6, 3 * JUMP - 1 - JUMP), (2, JUMP + 5, 3 * JUMP), (1, JUMP + 6, 3 * JUMP)];
        for (parent, fork, first) in wrong {
            let records = [sound[0], incarnation(3, parent, fork, first)];
            assert!(check(&records, None).is_err(), "{parent} {fork} {first}");
        }
    }
}
