//! Text format of the log: one line per entry, fields separated by tabs.
//!
//! ```text
//! sequence  2  key  value  time  expires, or nothing  name=value  name=value ...
//! sequence  1  key
//! sequence  1  key         time
//! ```
//!
//! The first four fields are those of the service in *Cloud Native Go*: 1 is a delete, 2 a put. Every byte that is not a
//! printable ASCII character is percent-encoded, and so are `%`, `+` and `=`: any key and any value can be represented, and
//! that service decodes the values correctly. Sequences increase from line to line.
//!
//! Parsing is strict: a line that neither program writes is an error, and is never interpreted in another way.

use std::fmt::Write;

use crate::{Entry, Event, EventRef, Put};

/// Dialect of the text, by the program that wrote it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// `kvs txlog export`
    #[default]
    Kvs,
    /// The service in *Cloud Native Go*: the key is as it is, a + in the value is a space, and no other fields follow
    CloudNativeGo,
}

/// A parsed line.
#[derive(Debug)]
pub struct Line {
    /// Sequence in the log that was exported.
    pub sequence: u64,
    pub time: u64,
    pub event: Event,
}

/// Appends the line of an entry.
pub fn print(entry: &Entry<'_>, line: &mut String) {
    let (sequence, time) = (entry.sequence, entry.time);
    // Writing to a string cannot fail.
    let _ = match &entry.event {
        EventRef::Delete(key) => {
            let _ = write!(line, "{sequence}\t1\t");
            escape(key.as_bytes(), line);
            write!(line, "\t\t{time}")
        }
        EventRef::Put(put) => {
            let _ = write!(line, "{sequence}\t2\t");
            escape(put.key.as_bytes(), line);
            line.push('\t');
            escape(put.value, line);
            let _ = write!(line, "\t{time}\t");
            if let Some(expires) = put.expires {
                let _ = write!(line, "{expires}");
            }
            for (name, value) in put.metadata {
                line.push('\t');
                escape(name.as_bytes(), line);
                line.push('=');
                escape(value.as_bytes(), line);
            }
            Ok(())
        }
    };
    line.push('\n');
}

/// Parses a line without its newline. `now` is the time of an entry whose line has none.
pub fn parse(line: &[u8], format: Format, now: u64) -> Result<Line, String> {
    let mut fields = line.split(|byte| *byte == b'\t');
    let mut field = |what: &str| fields.next().ok_or_else(|| format!("the {what} is missing"));
    let sequence = number(field("sequence")?, "sequence")?;
    let kind = field("type")?;
    let raw_key = field("key")?;
    let key = match format {
        Format::Kvs => unescape(raw_key, "key", false)?,
        Format::CloudNativeGo => raw_key.to_vec(),
    };
    let key = String::from_utf8(key).map_err(|_| "the key is not UTF-8")?;
    let value = match kind {
        b"1" => Vec::new(),
        b"2" => unescape(field("value")?, "value", format == Format::CloudNativeGo)?,
        kind => return Err(format!("the type is {}, but must be 1 or 2", quoted(kind))),
    };
    let delete = kind == b"1";
    if delete && fields.next().is_some_and(|value| !value.is_empty()) {
        return Err("a delete has a value".into());
    }
    if format == Format::CloudNativeGo && fields.next().is_some() {
        return Err("unexpected field after the value".into());
    }
    let time = fields.next().map_or(Ok(now), |time| number(time, "time"))?;
    if delete {
        return match fields.next() {
            None => Ok(Line { sequence, time, event: Event::Delete(key) }),
            Some(_) => Err("unexpected field after the time of a delete".into()),
        };
    }
    let expires = fields.next().filter(|expires| !expires.is_empty());
    let expires = expires.map(|expires| number(expires, "expiry")).transpose()?;
    let mut metadata = Vec::new();
    for pair in fields {
        let at = pair.iter().position(|byte| *byte == b'=').ok_or("metadata is not name=value")?;
        let text = |bytes| {
            String::from_utf8(unescape(bytes, "metadata", false)?).map_err(|_| "the metadata is not UTF-8".to_owned())
        };
        let pair = (text(&pair[..at])?, text(&pair[at + 1..])?);
        metadata.push(pair);
    }
    Ok(Line { sequence, time, event: Event::Put(Put { key, value, metadata, expires }) })
}

fn number(field: &[u8], what: &str) -> Result<u64, String> {
    let text = std::str::from_utf8(field).ok().filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()));
    let wrong = || format!("the {what} is {}, not a number", quoted(field));
    text.and_then(|text| text.parse().ok()).ok_or_else(wrong)
}

fn escape(bytes: &[u8], line: &mut String) {
    for &byte in bytes {
        match byte {
            b'%' | b'+' | b'=' => {}
            b'!'..=b'~' => {
                line.push(byte.into());
                continue;
            }
            _ => {}
        }
        let _ = write!(line, "%{byte:02X}");
    }
}

fn unescape(field: &[u8], what: &str, plus_is_space: bool) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [byte, after @ ..] = rest {
        rest = after;
        match byte {
            b'%' => {
                let digit = |digit: u8| char::from(digit).to_digit(16);
                let byte = rest.split_at_checked(2).and_then(|(digits, after)| {
                    rest = after;
                    Some((digit(digits[0])? * 16 + digit(digits[1])?) as u8)
                });
                let wrong = || format!("the {what} has a % that is not followed by two hexadecimal digits");
                bytes.push(byte.ok_or_else(wrong)?);
            }
            b'+' if plus_is_space => bytes.push(b' '),
            // Such as the carriage return of a Windows line ending.
            byte if byte.is_ascii_control() => {
                return Err(format!("the {what} has the control character {byte:#04x}, which would be escaped"));
            }
            byte => bytes.push(*byte),
        }
    }
    Ok(bytes)
}

/// Quotes a field for an error message, with a bounded length.
fn quoted(field: &[u8]) -> String {
    const ENOUGH: usize = 40;
    let text = String::from_utf8_lossy(&field[..field.len().min(ENOUGH)]);
    if field.len() > ENOUGH { format!("{text:?}...") } else { format!("{text:?}") }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::PutRef;

    fn words(line: &[u8], format: Format) -> String {
        match parse(line, format, 9) {
            Ok(Line { time, event: Event::Delete(key), .. }) => format!("{time} delete {key:?}"),
            Ok(Line { time, event: Event::Put(put), .. }) => {
                format!("{time} put {:?} {:?} {:?} {:?}", put.key, put.value, put.metadata, put.expires)
            }
            Err(error) => error,
        }
    }

    #[test]
    fn parse_reads_cloud_native_go() {
        let read = |line: &str| words(line.as_bytes(), Format::CloudNativeGo);
        assert_eq!(
            read("1\t2\tkey-a\tHello%2C+world%21"),
            r#"9 put "key-a" [72, 101, 108, 108, 111, 44, 32, 119, 111, 114, 108, 100, 33] [] None"#
        );
        assert_eq!(read("2\t1\tkey%a\t"), r#"9 delete "key%a""#);
        assert_eq!(read("2\t1\tkey"), r#"9 delete "key""#);
    }

    #[test]
    fn print_writes_percent_encoded_fields() {
        let metadata = [("content-type", "text/plain; x=1")];
        let put = PutRef { key: "käy+1~", value: b"100% of !\0", metadata: &metadata, expires: Some(9) };
        let mut lines = String::new();
        print(&Entry { sequence: 7, time: 8, event: EventRef::Put(put) }, &mut lines);
        print(&Entry { sequence: 8, time: 8, event: EventRef::Delete("a b") }, &mut lines);
        let expected =
            ["7\t2\tk%C3%A4y%2B1~\t100%25%20of%20!%00\t8\t9\tcontent-type=text/plain;%20x%3D1\n", "8\t1\ta%20b\t\t8\n"];
        assert_eq!(lines, expected.concat());
        assert_eq!(words(b"1\t2\ta+b\tc+d\t8\t", Format::Kvs), r#"8 put "a+b" [99, 43, 100] [] None"#);
    }

    #[test]
    fn parse_rejects_malformed_lines() {
        for (line, what) in [
            ("", "the sequence is \"\", not a number"),
            ("x\t2\ta\tb", "the sequence is \"x\", not a number"),
            ("18446744073709551616\t2\ta\tb", "the sequence is \"18446744073709551616\", not a number"),
            ("1", "the type is missing"),
            ("1\t2", "the key is missing"),
            ("1\t2\ta", "the value is missing"),
            ("1\t3\ta\tb", "the type is \"3\", but must be 1 or 2"),
            ("1\t2\ta%4\tb", "the key has a % that is not followed by two hexadecimal digits"),
            ("1\t2\ta\t%zz", "the value has a % that is not followed by two hexadecimal digits"),
            ("1\t2\t%FF\tb", "the key is not UTF-8"),
            ("1\t1\ta\tb", "a delete has a value"),
            ("1\t1\ta\t\t5\t6", "unexpected field after the time of a delete"),
            ("1\t2\ta\tb\tnow", "the time is \"now\", not a number"),
            ("1\t2\ta\tb\t1\t-", "the expiry is \"-\", not a number"),
            ("1\t2\ta\tb\t1\t\tname", "metadata is not name=value"),
            ("1\t2\ta\tb\t1\t\tn=%F", "the metadata has a % that is not followed by two hexadecimal digits"),
            ("1\t2\ta\tb\t1\t\tn=%FF", "the metadata is not UTF-8"),
            ("1\t2\ta\tb\r", "the value has the control character 0x0d, which would be escaped"),
            ("1\t2\ta\0\tb", "the key has the control character 0x00, which would be escaped"),
            ("1\t1\ta\r", "the key has the control character 0x0d, which would be escaped"),
        ] {
            assert_eq!(words(line.as_bytes(), Format::Kvs), what, "{line:?}");
        }
        assert_eq!(words(b"1\t2\ta\tb\tc", Format::CloudNativeGo), "unexpected field after the value");
        assert_eq!(
            words(b"1\t2\ta\tb\r", Format::CloudNativeGo),
            "the value has the control character 0x0d, which would be escaped"
        );
        let long = [&[b'x'; 100][..], b"\t2\ta\tb"].concat();
        assert_eq!(words(&long, Format::Kvs), format!("the sequence is {:?}..., not a number", "x".repeat(40)));
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn printed_entry_parses_to_itself(
            key: String, value: Vec<u8>, metadata: Vec<(String, String)>, time: u64, expires: Option<u64>,
        ) {
            let pairs: Vec<_> = metadata.iter().map(|(name, value)| (&name[..], &value[..])).collect();
            let put = PutRef { key: &key, value: &value, metadata: &pairs, expires };
            for event in [EventRef::Put(put), EventRef::Delete(&key)] {
                let mut line = String::new();
                let delete = matches!(event, EventRef::Delete(_));
                print(&Entry { sequence: 7, time, event }, &mut line);
                let line = line.strip_suffix('\n').unwrap();
                prop_assert!(!line.contains('\n'));
                let expected = match delete {
                    true => format!("{time} delete {key:?}"),
                    false => format!("{time} put {key:?} {value:?} {metadata:?} {expires:?}"),
                };
                prop_assert_eq!(words(line.as_bytes(), Format::Kvs), expected);
                prop_assert_eq!(parse(line.as_bytes(), Format::Kvs, 9).unwrap().sequence, 7);
            }
        }
    }
}
