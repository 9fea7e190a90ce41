//! `kvs txlog`: verifies, prints, exports, imports, compacts and forks a transaction log that no server uses.
//!
//! Owns: the output for operators. Must never know: the bytes in its files or the rows in its tables, which are behind
//! `kvs_txlog::file` and `kvs_txlog::postgres`.

mod cat;
mod import;

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::bail;
use bytesize::ByteSize;
use clap::builder::{PossibleValuesParser, TypedValueParser};

use kvs_txlog::file::{Finding, Offline, verify};
use kvs_txlog::postgres::{PostgresLog, Url};
use kvs_txlog::text::{self, Format};
use kvs_txlog::{Incarnation, TransactionLog};

use crate::lines::notice;
use crate::settings::TxlogStorage;
use crate::terminal::bar;

#[derive(Debug, clap::Subcommand)]
pub enum TxlogCommand {
    /// Check every checksum, the chain of frames and the sequences; change nothing
    ///
    /// Prints what each file holds, and what is wrong with which file at which byte. Exit code 1 when something is.
    Verify {
        #[command(flatten)]
        at: At,
    },
    /// Print every entry, oldest first, for people or as JSON
    Cat {
        #[command(flatten)]
        at: At,
        /// One object a line; a value that is not text is `value_base64`, times are milliseconds since 1970
        #[arg(long)]
        json: bool,
    },
    /// Print the log as text that `import` reads: kvs txlog export > backup.txt
    ///
    /// An entry is a line: sequence TAB type TAB key TAB value TAB time TAB expiry TAB name=value ..., with type 1 for a
    /// delete and 2 for a put. All but printable ASCII is written as in URLs, so that every key and value survives.
    Export {
        #[command(flatten)]
        at: At,
    },
    /// Append what a text says, in its order and under new sequences, to a log that is there or is begun
    ///
    /// A file is checked whole before anything is appended. What comes through a pipe is appended as it comes, up to the
    /// first line that is malformed.
    Import {
        #[command(flatten)]
        at: At,
        /// Who wrote the text
        #[arg(long, default_value = "kvs", value_name = "kvs|cloud-native-go", value_parser = format())]
        format: Format,
        /// Read the table of the service in *Cloud Native Go* instead: postgres://USER@HOST/DATABASE
        #[arg(long, value_name = "URL", conflicts_with_all = ["file", "format"])]
        from: Option<Url>,
        /// The file to read; - is standard input
        #[arg(required_unless_present = "from")]
        file: Option<PathBuf>,
    },
    /// Drop what the store does not need any more: what was overwritten, deleted or has expired
    Compact {
        #[command(flatten)]
        at: At,
    },
    /// Begin an incarnation of a log that is a copy: its sequences go on far beyond those that the original gives
    ///
    /// A copied directory is recognised at its first start. Run this before the first start of a copy that looks like the
    /// original from within: a clone of a volume, a snapshot of a file system or of a virtual machine. Entity tags and
    /// watch positions of the original that are newer than the copy are then never given again, and are refused.
    Fork {
        #[command(flatten)]
        at: At,
    },
}

#[derive(Debug, clap::Args)]
pub struct At {
    /// Directory of the transaction log
    #[arg(long, env = "KVS_DATA_DIR", value_name = "DIR", default_value = "./data")]
    data_dir: PathBuf,

    /// Storage of the transaction log: files, or a database, postgres://USER@HOST/DATABASE
    #[arg(long, env = "KVS_TXLOG", value_name = "file|URL", default_value = "file", hide_env_values = true)]
    txlog: TxlogStorage,
}

pub fn run(command: TxlogCommand) -> anyhow::Result<()> {
    let out = &mut io::stdout().lock();
    match command {
        TxlogCommand::Verify { at } => match &at.txlog {
            TxlogStorage::File => verify_log(&at.data_dir, out),
            TxlogStorage::Postgres(url) => verify_rows(url, out),
        },
        TxlogCommand::Cat { at, json: true } => cat::all(&at, out, cat::json),
        TxlogCommand::Cat { at, json: false } => cat::all(&at, out, cat::plain),
        TxlogCommand::Export { at } => cat::all(&at, out, text::print),
        TxlogCommand::Import { at, format, from, file } => import::run(&at, format, from.as_ref(), file.as_deref()),
        TxlogCommand::Compact { at } => match &at.txlog {
            TxlogStorage::File => compact(&at.data_dir),
            TxlogStorage::Postgres(url) => {
                let left = PostgresLog::at_rest(url, false)?.compact()?;
                notice(format_args!("compacted: {left} entries are left"));
                Ok(())
            }
        },
        TxlogCommand::Fork { at } => fork(&at, out),
    }
}

fn format() -> impl TypedValueParser<Value = Format> {
    PossibleValuesParser::new(["kvs", "cloud-native-go"])
        .map(|name| if name == "kvs" { Format::Kvs } else { Format::CloudNativeGo })
}

/// Reads all rows as a start does, which refuses what is damaged.
fn verify_rows(url: &Url, out: &mut dyn Write) -> anyhow::Result<()> {
    let log = PostgresLog::at_rest(url, false)?;
    let (bar, mut all) = (bar(log.appended(), "entries"), 0);
    let newest = log.replay(0, &mut |entries| {
        all += entries.len();
        bar.set_position(entries.last().map_or(0, |entry| entry.sequence));
        Ok(())
    })?;
    bar.finish_and_clear();
    writeln!(out, "the log is sound: {all} entries, newest sequence {newest}")?;
    Ok(())
}

fn verify_log(data: &Path, out: &mut dyn Write) -> anyhow::Result<()> {
    let bar = bar(directory_bytes(data), "bytes checked");
    let (mut wrong, mut first_wrong, mut all, mut newest, mut printed) = (0, String::new(), 0, 0, Ok(()));
    let mut say = |line: String| {
        if printed.is_ok() {
            printed = bar.suspend(|| writeln!(out, "{line}"));
        }
    };
    verify(
        data,
        &mut |finding| match finding {
            Finding::Sound { file, format, entries, first, last, bytes, incarnations } => {
                (all, newest) = (all + entries, newest.max(last));
                let file = format!("{file}: format {format}");
                match entries {
                    0 => say(format!("{file}, no entries, {bytes} bytes")),
                    _ => say(format!("{file}, {entries} entries, sequences {first} to {last}, {bytes} bytes")),
                }
                for Incarnation { id, fork, first, .. } in incarnations {
                    say(format!("{file}, incarnation {id} after sequence {fork} with {first}"));
                }
            }
            Finding::Torn(what) => say(format!("{what}; the next start cuts it off")),
            Finding::Corrupt(what) => {
                say(format!("WRONG: {what}"));
                if wrong == 0 {
                    first_wrong = what;
                }
                wrong += 1;
            }
        },
        &mut |bytes| bar.inc(bytes),
    )?;
    bar.finish_and_clear();
    // Before a failure to print: whoever looks at the exit code alone must learn of damage.
    if wrong > 0 {
        bail!(
            "the log in {} is damaged in {wrong} place(s), first: {first_wrong}; restore a backup, or begin anew in an \
             empty directory",
            data.display()
        );
    }
    printed.and_then(|()| writeln!(out, "the log is sound: {all} entries, newest sequence {newest}"))?;
    Ok(())
}

fn fork(at: &At, out: &mut dyn Write) -> anyhow::Result<()> {
    let Incarnation { id, fork, first, .. } = match &at.txlog {
        TxlogStorage::File => Offline::fork(&at.data_dir)?,
        TxlogStorage::Postgres(url) => PostgresLog::at_rest(url, false)?.fork()?,
    };
    writeln!(out, "begun incarnation {id}: the log goes on after sequence {fork} with {first}")?;
    Ok(())
}

fn compact(data: &Path) -> anyhow::Result<()> {
    let log = Offline::open(data)?;
    let before = directory_bytes(data);
    // Read once to find what can go, and once to write the rest.
    let bar = bar(2 * before, "bytes read");
    log.compact(&mut |bytes| bar.inc(bytes))?;
    bar.finish_and_clear();
    let after = directory_bytes(data);
    let saved = ByteSize(before.saturating_sub(after));
    notice(format_args!("compacted: the log takes {}, {saved} less than before", ByteSize(after)));
    Ok(())
}

/// What the files of the log take.
fn directory_bytes(data: &Path) -> u64 {
    let files = data.join("log").read_dir().into_iter().flatten().flatten();
    files.filter_map(|file| file.metadata().ok()).map(|metadata| metadata.len()).sum()
}

#[cfg(test)]
pub mod tests {
    use std::thread::sleep;
    use std::time::{Duration, Instant};

    use kvs_runtime::Env;
    use kvs_txlog::file::{Durability, FileLog, Options};
    use kvs_txlog::{Event, Put};

    use super::*;

    pub fn at(data: &Path) -> At {
        At { data_dir: data.into(), txlog: TxlogStorage::File }
    }

    pub fn directory_with(events: &[Event]) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        let options = Options {
            data: directory.path().into(),
            segment_bytes: 1 << 18,
            group_bytes: 1 << 17,
            durability: Durability::Os,
            env: Env::real(),
        };
        let log = FileLog::open(options).unwrap();
        for (time, event) in (1000..).zip(events) {
            log.append(time, std::slice::from_ref(event)).unwrap();
        }
        // The spare is made beside what is appended, and not any more once the log is closed.
        let spare = directory.path().join("log/0000000002.seg");
        let started = Instant::now();
        while !spare.exists() {
            assert!(started.elapsed() < Duration::from_secs(60), "{} is not made", spare.display());
            sleep(Duration::from_millis(1));
        }
        log.close().unwrap();
        directory
    }

    pub fn events() -> Vec<Event> {
        let metadata = vec![("content-type".into(), "text/plain; charset=utf-8".into())];
        vec![
            Event::Put(Put { key: "a\tb\n%ü".into(), value: (0..=255).collect(), metadata, expires: Some(5) }),
            Event::Put(Put { key: "plain".into(), value: b"1\t2\tx\ty\n".to_vec(), metadata: vec![], expires: None }),
            Event::Delete("plain".into()),
        ]
    }

    fn verified(data: &Path) -> (String, String) {
        let mut out = Vec::new();
        let failed = verify_log(data, &mut out).err();
        (String::from_utf8(out).unwrap(), failed.map_or(String::new(), |error| format!("{error:#}")))
    }

    #[test]
    fn verification_fails_with_the_place() {
        let directory = directory_with(&events());
        let (text, failed) = verified(directory.path());
        assert!(text.ends_with("the log is sound: 3 entries, newest sequence 3\n"), "{text}");
        assert_eq!(failed, "");

        let segment = directory.path().join("log/0000000001.seg");
        let mut bytes = std::fs::read(&segment).unwrap();
        bytes[600] ^= 1;
        std::fs::write(&segment, bytes).unwrap();
        let (text, failed) = verified(directory.path());
        let place = format!("{} at byte 512: ", segment.display());
        assert!(text.contains(&format!("WRONG: {place}")), "{text}");
        assert!(failed.contains(&place) && failed.contains("1 place(s)"), "{failed}");
    }

    #[test]
    fn damage_is_told_even_where_nothing_can_be_printed() {
        struct Closed;
        impl Write for Closed {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let directory = directory_with(&events());
        let error = verify_log(directory.path(), &mut Closed).unwrap_err();
        assert!(error.is::<io::Error>(), "{error:#}");
        std::fs::write(directory.path().join("log/0000000001.seg"), [b'x'; 600]).unwrap();
        let error = verify_log(directory.path(), &mut Closed).unwrap_err();
        assert!(error.to_string().contains("is damaged"), "{error:#}");
    }

    #[test]
    fn nothing_that_a_start_refuses_is_sound() {
        type Spoil = fn(&Path);
        let spoils: [(&str, Spoil); 6] = [
            ("is missing", |log| std::fs::remove_file(log.join("0000000001.seg")).unwrap()),
            ("the log has no segments", |log| {
                for number in 1..=2 {
                    std::fs::remove_file(log.join(format!("000000000{number}.seg"))).unwrap();
                }
            }),
            ("is not a segment of a log", |log| std::fs::write(log.join("1.seg"), "").unwrap()),
            ("was named 0000000002.seg", |log| {
                std::fs::rename(log.join("0000000002.seg"), log.join("0000000003.seg")).unwrap();
            }),
            ("belongs to another log", |log| {
                let other = directory_with(&events());
                std::fs::copy(other.path().join("log/0000000002.seg"), log.join("0000000002.seg")).unwrap();
            }),
            ("is truncated", |log| std::fs::write(log.join("0000000002.seg"), "").unwrap()),
        ];
        for (told, spoil) in spoils {
            let directory = directory_with(&events());
            spoil(&directory.path().join("log"));
            let (text, failed) = verified(directory.path());
            let refused = format!("{:#}", Offline::open(directory.path()).err().expect(told));
            assert!(failed.contains("is damaged") && text.contains(told), "{told}: {failed:?}, {text:?}");
            assert!(refused.contains(told), "{told}: {refused:?}");
        }
    }

    #[test]
    fn a_compacted_log_covers_what_it_did() {
        let kept = Event::Put(Put { key: "kept".into(), value: vec![], metadata: vec![], expires: None });
        let directory = directory_with(&[vec![kept], events()].concat());
        compact(directory.path()).unwrap();
        let (text, _) = verified(directory.path());
        // The second has expired, the third was deleted, and nothing is left of the delete but that it was the fourth.
        assert!(text.contains(".seg: format 2, 1 entries, sequences 1 to 4, "), "{text}");
        assert!(text.ends_with("the log is sound: 1 entries, newest sequence 4\n"), "{text}");
    }

    #[test]
    fn fork_prints_where_the_log_goes_on() {
        let directory = directory_with(&events());
        let mut out = Vec::new();
        fork(&at(directory.path()), &mut out).unwrap();
        let out = String::from_utf8(out).unwrap();
        let (before, first) = out.trim_end().split_once(" after sequence 3 with ").expect(&out);
        let id = before.strip_prefix("begun incarnation ").and_then(|line| line.split(':').next()).expect(&out);
        let first: u64 = first.parse().unwrap();
        assert!(first - 3 >= 1 << 40, "{out}");
        let (text, _) = verified(directory.path());
        assert!(text.contains(&format!("format 2, incarnation {id} after sequence 3 with {first}\n")), "{text}");
        assert!(text.ends_with("the log is sound: 3 entries, newest sequence 3\n"), "{text}");

        let empty = directory_with(&[]);
        let error = fork(&at(empty.path()), &mut Vec::new()).unwrap_err().to_string();
        assert!(error.ends_with("is empty: there is nothing to continue"), "{error}");
    }
}
