//! Entry points of the fuzz targets: decoders of bytes from outside. Tests run them briefly, `just fuzz` for as long as given.

pub use super::file::fuzz::frames;
use super::text::{Format, Line, parse, print};
use crate::{Entry, Event, EventRef, Put, PutRef};

/// Reads text: each line is rejected, or means the same after it was printed.
pub fn text(text: &[u8]) {
    for line in text.split(|byte| *byte == b'\n') {
        for format in [Format::CloudNativeGo, Format::Kvs] {
            if let Ok(read) = parse(line, format, 1) {
                let again = parse(printed(&read).as_bytes(), Format::Kvs, 2);
                assert_eq!(format!("{again:?}"), format!("{:?}", Ok::<_, String>(read)));
            }
        }
    }
}

fn printed(Line { sequence, time, event }: &Line) -> String {
    let mut metadata = Vec::new();
    let event = match event {
        Event::Put(Put { key, value, metadata: pairs, expires }) => {
            metadata.extend(pairs.iter().map(|(name, value)| (&name[..], &value[..])));
            EventRef::Put(PutRef { key, value, metadata: &metadata, expires: *expires })
        }
        Event::Delete(key) => EventRef::Delete(key),
    };
    let mut line = String::new();
    print(&Entry { sequence: *sequence, time: *time, event }, &mut line);
    line.trim_end_matches('\n').into()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(2000) })]

        #[test]
        fn arbitrary_text_is_read(text: Vec<u8>) {
            super::text(&text);
        }

        /// Nearly valid input reaches further than random bytes.
        #[test]
        fn line_with_changed_bytes_is_read(
            (key, value, time, expires) in any::<(String, Vec<u8>, u64, Option<u64>)>(),
            changes in proptest::collection::vec((any::<usize>(), any::<u8>()), 0..4),
        ) {
            let put = Put { key: key.clone(), value, metadata: vec![("name".into(), key)], expires };
            let mut line = printed(&Line { sequence: 7, time, event: Event::Put(put) }).into_bytes();
            for (at, byte) in changes {
                let at = at % line.len();
                line[at] = byte;
            }
            super::text(&line);
        }
    }
}
