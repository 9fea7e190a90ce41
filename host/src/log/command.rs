//! `kvs log`: looks at a log that nobody uses, and carries one from place to place.

use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail};
use indicatif::{ProgressBar, ProgressStyle};

use super::TransactionLog;
use super::file::{DEFAULT_SEGMENT_BYTES, Durability, FileLog, Finding, Offline, Options, largest_group, verify};
use super::text::{self, Format};
use crate::contract::{AppendError, Entry, EventRef};

#[derive(Debug, clap::Subcommand)]
pub enum LogCommand {
    /// Check every checksum, the chain of frames and the sequences; change nothing.
    Verify {
        #[command(flatten)]
        at: At,
    },
    /// Print every entry.
    Dump {
        #[command(flatten)]
        at: At,
        /// One JSON object a line.
        #[arg(long)]
        json: bool,
    },
    /// Print the log as text that `import` reads.
    Export {
        #[command(flatten)]
        at: At,
    },
    /// Append what a file says, under new sequences.
    Import {
        #[command(flatten)]
        at: At,
        /// Who wrote the file.
        #[arg(long, value_enum, default_value_t)]
        format: Format,
        /// The file to read. It is read twice: nothing is appended when a line of it is malformed.
        file: PathBuf,
    },
    /// Drop what the store does not need any more.
    Compact {
        #[command(flatten)]
        at: At,
    },
}

#[derive(Debug, clap::Args)]
pub struct At {
    /// The data directory.
    #[arg(long, env = "KVS_DATA", value_name = "DIR", default_value = "./data")]
    data: PathBuf,
}

pub fn run(command: LogCommand) -> anyhow::Result<()> {
    let done = match command {
        LogCommand::Verify { at } => verify_log(&at.data, &mut io::stdout().lock()),
        LogCommand::Dump { at, json } => {
            let print = if json { print_json } else { print_plain };
            print_log(&at.data, &mut io::stdout().lock(), print)
        }
        LogCommand::Export { at } => print_log(&at.data, &mut io::stdout().lock(), text::print),
        LogCommand::Import { at, format, file } => import(&at.data, format, &file),
        LogCommand::Compact { at } => compact(&at.data),
    };
    match done {
        // `kvs log dump | head`
        Err(error) if error.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe) => {
            Ok(())
        }
        done => done,
    }
}

fn verify_log(data: &Path, out: &mut dyn Write) -> anyhow::Result<()> {
    let bar = bar(directory_bytes(&data.join("log")), "bytes checked");
    let (mut wrong, mut all, mut newest, mut failed) = (0, 0, 0, Ok(()));
    let mut say = |line: String| {
        if failed.is_ok() {
            failed = writeln!(out, "{line}");
        }
    };
    verify(
        data,
        &mut |finding| match finding {
            Finding::Sound { file, entries: 0, bytes, .. } => say(format!("{file}: no entries, {bytes} bytes")),
            Finding::Sound { file, entries, first, last, bytes } => {
                (all, newest) = (all + entries, last);
                say(format!("{file}: {entries} entries, sequences {first} to {last}, {bytes} bytes"));
            }
            Finding::Torn(what) => say(format!("{what}; the next start cuts it off")),
            Finding::Wrong(what) => {
                wrong += 1;
                say(format!("WRONG: {what}"));
            }
        },
        &mut |bytes| bar.inc(bytes),
    )?;
    bar.finish_and_clear();
    failed?;
    if wrong > 0 {
        bail!("the log in {} is damaged in {wrong} place(s), named above; restore it from a backup", data.display());
    }
    writeln!(out, "the log is sound: {all} entries, newest sequence {newest}")?;
    Ok(())
}

fn print_log(data: &Path, out: &mut dyn Write, print: fn(&Entry<'_>, &mut String)) -> anyhow::Result<()> {
    let log = Offline::open(data)?;
    let bar = bar(log.newest(), "entries");
    let mut out = BufWriter::new(out);
    let mut line = String::new();
    log.replay(&mut |entries| {
        for entry in entries {
            line.clear();
            print(entry, &mut line);
            out.write_all(line.as_bytes())?;
        }
        bar.set_position(entries.last().map_or(0, |entry| entry.sequence));
        Ok(())
    })?;
    out.flush()?;
    bar.finish_and_clear();
    Ok(())
}

fn print_plain(entry: &Entry<'_>, line: &mut String) {
    let (sequence, time) = (entry.sequence, entry.time);
    *line = match &entry.event {
        EventRef::Delete(key) => format!("{sequence} at {time}: delete {key:?}\n"),
        EventRef::Put(put) => {
            let expires = put.expires.map_or(String::new(), |expires| format!(", expires {expires}"));
            let metadata: String = put.metadata.iter().map(|(name, value)| format!(", {name:?}: {value:?}")).collect();
            let value = put.value.escape_ascii();
            format!("{sequence} at {time}: put {:?} = \"{value}\"{expires}{metadata}\n", put.key)
        }
    };
}

fn print_json(entry: &Entry<'_>, line: &mut String) {
    let (sequence, time) = (entry.sequence, entry.time);
    let value = match &entry.event {
        EventRef::Delete(key) => {
            serde_json::json!({ "sequence": sequence, "time": time, "type": "delete", "key": key })
        }
        EventRef::Put(put) => {
            let mut object = serde_json::json!({
                "sequence": sequence, "time": time, "type": "put", "key": put.key,
                "metadata": put.metadata, "expires": put.expires,
            });
            // Any bytes can be a value; most are text, and are easier to read as such.
            match std::str::from_utf8(put.value) {
                Ok(text) => object["value"] = text.into(),
                Err(_) => object["value_bytes"] = put.value.into(),
            }
            object
        }
    };
    *line = format!("{value}\n");
}

fn import(data: &Path, format: Format, file: &Path) -> anyhow::Result<()> {
    let size = file.metadata().map_or(0, |metadata| metadata.len());
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
    let reading = bar(size, "bytes read");
    let lines = each_line(file, format, now, &reading, &mut |_| Ok(()))?;
    reading.finish_and_clear();

    let group_bytes = largest_group(DEFAULT_SEGMENT_BYTES);
    let (segment_bytes, durability) = (DEFAULT_SEGMENT_BYTES, Durability::Sync);
    let log = FileLog::open(Options { data: data.into(), segment_bytes, group_bytes, durability })?;
    let writing = bar(size, "bytes imported");
    each_line(file, format, now, &writing, &mut |line| append(&log, &line))?;
    log.close()?;
    writing.finish_and_clear();
    eprintln!("imported {lines} entries; the newest sequence is {}", log.appended());
    Ok(())
}

/// Hands over what each line of a file says, and returns how many there are.
fn each_line(
    file: &Path,
    format: Format,
    now: u64,
    bar: &ProgressBar,
    each: &mut dyn FnMut(text::Line) -> anyhow::Result<()>,
) -> anyhow::Result<u64> {
    let cannot = || format!("cannot read {}", file.display());
    let mut reader = BufReader::new(File::open(file).with_context(cannot)?);
    let (mut line, mut count) = (Vec::new(), 0);
    loop {
        line.clear();
        let read = reader.read_until(b'\n', &mut line).with_context(cannot)?;
        if read == 0 {
            return Ok(count);
        }
        count += 1;
        bar.inc(read as u64);
        let text = line.strip_suffix(b"\n").unwrap_or(&line);
        let parsed = text::parse(text, format, now);
        let place = || format!("line {count} of {}", file.display());
        each(parsed.map_err(anyhow::Error::msg).with_context(place)?).with_context(place)?;
    }
}

/// Waits where the log is only behind.
fn append(log: &FileLog, line: &text::Line) -> anyhow::Result<()> {
    loop {
        return match log.append(line.time, std::slice::from_ref(&line.event)) {
            Ok(_) => Ok(()),
            Err(AppendError::Unavailable) => match log.failure() {
                Some(reason) => bail!("{reason}"),
                None => {
                    std::thread::sleep(Duration::from_millis(1));
                    continue;
                }
            },
            Err(AppendError::Full) => bail!("the disk is full; what is before was imported"),
            Err(AppendError::TooLarge(limit)) => bail!("it is larger than {limit} bytes"),
            Err(AppendError::ReadOnly) => bail!("the log is read-only"),
        };
    }
}

fn compact(data: &Path) -> anyhow::Result<()> {
    let log = Offline::open(data)?;
    let before = log.bytes();
    // Read once to find what can go, and once to write the rest.
    let bar = bar(2 * before, "bytes read");
    let saved = log.compact(&mut |bytes| bar.inc(bytes))?;
    bar.finish_and_clear();
    eprintln!("compacted: {saved} bytes less, {} left", log.bytes());
    Ok(())
}

fn directory_bytes(directory: &Path) -> u64 {
    let files = directory.read_dir().into_iter().flatten().flatten();
    files.filter_map(|file| file.metadata().ok()).map(|metadata| metadata.len()).sum()
}

/// On standard error, and only where that is a terminal.
fn bar(length: u64, what: &'static str) -> ProgressBar {
    let bar = ProgressBar::new(length).with_message(what);
    let style = ProgressStyle::with_template("{bar:40} {human_pos} of {human_len} {msg}, {eta} left");
    bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contract::{Event, Put};

    fn directory_with(events: &[Event]) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        let options = Options {
            data: directory.path().into(),
            segment_bytes: 1 << 16,
            group_bytes: 1 << 15,
            durability: Durability::Os,
        };
        let log = FileLog::open(options).unwrap();
        for (time, event) in (1000..).zip(events) {
            log.append(time, std::slice::from_ref(event)).unwrap();
        }
        log.close().unwrap();
        directory
    }

    fn events() -> Vec<Event> {
        let metadata = vec![("content-type".into(), "text/plain; charset=utf-8".into())];
        vec![
            Event::Put(Put { key: "a\tb\n%ü".into(), value: (0..=255).collect(), metadata, expires: Some(5) }),
            Event::Put(Put { key: "plain".into(), value: b"1\t2\tx\ty\n".to_vec(), metadata: vec![], expires: None }),
            Event::Delete("plain".into()),
        ]
    }

    fn printed(data: &Path, print: fn(&Entry<'_>, &mut String)) -> String {
        let mut out = Vec::new();
        print_log(data, &mut out, print).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn what_is_exported_can_be_imported_and_is_the_same() {
        let from = directory_with(&events());
        let exported = printed(from.path(), text::print);
        assert_eq!(exported.lines().count(), 3);
        let file = from.path().join("export");
        std::fs::write(&file, &exported).unwrap();
        let to = tempfile::tempdir().unwrap();
        import(to.path(), Format::Kvs, &file).unwrap();
        assert_eq!(printed(to.path(), text::print), exported);
    }

    #[test]
    fn a_malformed_line_is_told_and_nothing_is_imported() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        std::fs::write(&file, "1\t2\tkey-a\tHello%2C+world\n2\t1\tkey-a\t\n3\t2\tkey-b\n").unwrap();
        let data = directory.path().join("data");
        let error = format!("{:#}", import(&data, Format::Book, &file).unwrap_err());
        assert_eq!(error, format!("line 3 of {}: the value is missing", file.display()));
        assert!(!data.exists());
        std::fs::write(&file, "1\t2\tkey-a\tHello%2C+world\n2\t1\tkey-a\t\n3\t2\tkey-b\t").unwrap();
        import(&data, Format::Book, &file).unwrap();
        let text = printed(&data, print_plain);
        assert!(text.lines().next().unwrap().ends_with("put \"key-a\" = \"Hello, world\""), "{text}");
        assert!(text.lines().nth(1).unwrap().ends_with("delete \"key-a\""), "{text}");
        assert!(text.lines().nth(2).unwrap().ends_with("put \"key-b\" = \"\""), "{text}");
    }

    #[test]
    fn a_dump_in_json_is_an_object_a_line() {
        let directory = directory_with(&events());
        let text = printed(directory.path(), print_json);
        let lines: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines[0]["value_bytes"][255], 255);
        assert_eq!(lines[0]["metadata"][0][1], "text/plain; charset=utf-8");
        assert_eq!(lines[1]["value"], "1\t2\tx\ty\n");
        assert_eq!((lines[2]["sequence"].as_u64(), lines[2]["type"].as_str()), (Some(3), Some("delete")));
    }

    #[test]
    fn verification_fails_with_the_place() {
        let directory = directory_with(&events());
        let mut out = Vec::new();
        verify_log(directory.path(), &mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        assert!(text.ends_with("the log is sound: 3 entries, newest sequence 3\n"), "{text}");

        let segment = directory.path().join("log/0000000001.seg");
        let mut bytes = std::fs::read(&segment).unwrap();
        bytes[600] ^= 1;
        std::fs::write(&segment, bytes).unwrap();
        let mut out = Vec::new();
        assert!(verify_log(directory.path(), &mut out).is_err());
        let text = String::from_utf8(out).unwrap();
        assert!(text.contains(&format!("WRONG: {} at byte 512: ", segment.display())), "{text}");
    }
}
