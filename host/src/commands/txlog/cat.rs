//! `kvs txlog cat` and `kvs txlog export`: prints every entry of a log, as text, as JSON, or in the format of `import`.

use std::fmt::Write as _;
use std::io::{BufWriter, Write};
use std::time::{Duration, UNIX_EPOCH};

use anyhow::Context;
use kvs_txlog::{Entry, EventRef};

use super::StorageArgs;
use crate::terminal::bar_beside_output;

/// Prints all entries of a log, up to the first corruption.
pub fn all(at: &StorageArgs, out: &mut dyn Write, print: fn(&Entry<'_>, &mut String)) -> anyhow::Result<()> {
    const WRITE_ERROR: &str = "cannot write to standard output";
    let log = at.open()?;
    let bar = bar_beside_output(log.appended(), "entries");
    let mut out = BufWriter::new(out);
    let mut line = String::new();
    log.replay(0, &mut |entries| {
        for entry in entries {
            line.clear();
            print(entry, &mut line);
            out.write_all(line.as_bytes()).context(WRITE_ERROR)?;
        }
        bar.set_position(entries.last().map_or(0, |entry| entry.sequence));
        Ok(())
    })?;
    out.flush().context(WRITE_ERROR)?;
    bar.finish_and_clear();
    Ok(())
}

/// Formats an entry as text.
pub fn plain(entry: &Entry<'_>, line: &mut String) {
    let time = timestamp(entry.time);
    // Writing to a string cannot fail.
    let _ = write!(line, "{} {time} ", entry.sequence);
    let _ = match &entry.event {
        EventRef::Delete(key) => write!(line, "delete {key:?}"),
        EventRef::Put(put) => {
            let _ = write!(line, "put {:?} = ", put.key);
            let _ = match std::str::from_utf8(put.value) {
                Ok(text) => write!(line, "{text:?}"),
                Err(_) => write!(line, "b\"{}\"", put.value.escape_ascii()),
            };
            if let Some(expires) = put.expires {
                let _ = write!(line, ", expires {}", timestamp(expires));
            }
            put.metadata.iter().try_for_each(|(name, value)| write!(line, ", {name:?}: {value:?}"))
        }
    };
    line.push('\n');
}

/// Formats milliseconds since 1970 as RFC 3339, but as a number after the year 9999.
fn timestamp(milliseconds: u64) -> String {
    const LAST: u64 = 253_402_300_799_999;
    if milliseconds > LAST {
        return milliseconds.to_string();
    }
    humantime::format_rfc3339_millis(UNIX_EPOCH + Duration::from_millis(milliseconds)).to_string()
}

#[cfg(test)]
pub mod tests {
    use std::path::Path;

    use base64::Engine;
    use base64::engine::general_purpose::STANDARD;

    use super::super::tests::{at, directory_with, events};
    use super::*;
    use crate::entry_json;

    pub fn printed(data: &Path, print: fn(&Entry<'_>, &mut String)) -> String {
        let mut out = Vec::new();
        all(&at(data), &mut out, print).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn json_output_has_one_object_per_line() {
        let directory = directory_with(&events());
        let text = printed(directory.path(), entry_json::print);
        let lines: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let value = STANDARD.decode(lines[0]["value_base64"].as_str().unwrap()).unwrap();
        assert_eq!(value, (0..=255).collect::<Vec<u8>>());
        assert_eq!(lines[0]["expires"], 5);
        assert_eq!(lines[0]["metadata"][0][1], "text/plain; charset=utf-8");
        assert_eq!(lines[1]["value"], "1\t2\tx\ty\n");
        assert_eq!((lines[2]["sequence"].as_str(), lines[2]["type"].as_str()), (Some("3"), Some("delete")));
    }

    #[test]
    fn text_output_has_one_line_per_entry() {
        let directory = directory_with(&events());
        let text = printed(directory.path(), plain);
        let lines: Vec<_> = text.lines().collect();
        assert!(lines[0].starts_with(r#"1 1970-01-01T00:00:01.000Z put "a\tb\n%ü" = b"\x00\x01"#), "{}", lines[0]);
        let end = r#"\xff", expires 1970-01-01T00:00:00.005Z, "content-type": "text/plain; charset=utf-8""#;
        assert!(lines[0].ends_with(end), "{}", lines[0]);
        assert_eq!(lines[1], r#"2 1970-01-01T00:00:01.001Z put "plain" = "1\t2\tx\ty\n""#);
        assert_eq!(lines[2], r#"3 1970-01-01T00:00:01.002Z delete "plain""#);
    }

    #[test]
    fn timestamp_after_year_9999_is_a_number() {
        assert_eq!(timestamp(253_402_300_799_999), "9999-12-31T23:59:59.999Z");
        assert_eq!(timestamp(253_402_300_800_000), "253402300800000");
        assert_eq!(timestamp(u64::MAX), u64::MAX.to_string());
    }
}
