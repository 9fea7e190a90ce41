//! `kvs txlog`: verifies, prints, counts, exports, imports, compacts and forks a transaction log that no server uses.
//!
//! Owns: the output for operators. Must never know: the bytes in its files or the rows in its tables, which are behind
//! `kvs_txlog::file` and `kvs_txlog::postgres`.

mod cat;
mod import;
mod stats;

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::bail;
use bytesize::ByteSize;
use clap::builder::{PossibleValuesParser, TypedValueParser};

use kvs_client::Output;
#[cfg(feature = "nats")]
use kvs_txlog::cluster::{compaction::Outcome, copy, nats};
use kvs_txlog::file::{Finding, Offline, verify};
use kvs_txlog::postgres::{Existing, PostgresLog, Url};
use kvs_txlog::text::{self, Format};
use kvs_txlog::{Incarnation, TransactionLog};
use serde_json::{Value, json};

use super::client::OutputArgs;
use crate::entry_json;
use crate::lines::notice;
use crate::settings::TxlogStorage;
use crate::terminal::bar;

#[derive(Debug, clap::Subcommand)]
pub enum TxlogCommand {
    /// Check every checksum, the chain of frames and the sequences; change nothing
    ///
    /// Prints the contents of each file, and each corruption with its file and byte offset. Exit code 1 on corruption.
    Verify {
        #[command(flatten)]
        at: StorageArgs,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Print every entry, oldest first
    ///
    /// In JSON a value that is not UTF-8 is `value_base64`, and times are milliseconds since 1970.
    Cat {
        #[command(flatten)]
        at: StorageArgs,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Print what the log stores: live keys, the largest keys and prefixes, and garbage
    Stats(stats::Stats),
    /// Print the log as text that `import` reads: kvs txlog export > backup.txt
    ///
    /// Each entry is a line: sequence TAB type TAB key TAB value TAB time TAB expiry TAB name=value ..., with type 1 for a
    /// delete and 2 for a put. All but printable ASCII is percent-encoded, so that every key and value can be represented.
    Export {
        #[command(flatten)]
        at: StorageArgs,
    },
    /// Append the entries of a text, in order and under new sequences, to an existing or new log
    ///
    /// A file is validated completely before the first append. Lines from a pipe are appended as they arrive, up to the first
    /// malformed one.
    Import {
        #[command(flatten)]
        at: StorageArgs,
        /// Program that wrote the text
        #[arg(long, default_value = "kvs", value_name = "kvs|cloud-native-go", value_parser = format())]
        format: Format,
        /// Read the table of the service in *Cloud Native Go* instead: postgres://USER@HOST/DATABASE
        #[arg(long, value_name = "URL", conflicts_with_all = ["file", "format"])]
        from: Option<Url>,
        /// File to read; - is standard input
        #[arg(required_unless_present = "from")]
        file: Option<PathBuf>,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Drop superseded, deleted and expired entries
    Compact {
        #[command(flatten)]
        at: StorageArgs,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Begin an incarnation of a log that is a copy: its sequences continue far beyond those of the original
    ///
    /// A copied directory is recognised at its first start. Run this before the first start of a copy that cannot be
    /// distinguished from the original: a clone of a volume, a snapshot of a file system or of a virtual machine. Entity tags
    /// and watch positions of the original that are newer than the copy are then never reused, and are rejected.
    Fork {
        #[command(flatten)]
        at: StorageArgs,
        #[command(flatten)]
        output: OutputArgs,
    },
}

/// Storage of the log.
#[derive(Debug, clap::Args)]
pub struct StorageArgs {
    /// Directory of the transaction log
    #[arg(long, env = "KVS_DATA_DIR", value_name = "DIR", default_value = "./data")]
    pub data_dir: PathBuf,

    /// Storage of the transaction log: files, a database, postgres://USER@HOST/DATABASE, or NATS JetStream,
    /// nats://HOST,HOST,HOST/NAME
    #[arg(long, env = "KVS_TXLOG", value_name = "file|URL", default_value = "file", hide_env_values = true)]
    pub txlog: TxlogStorage,
}

impl StorageArgs {
    /// Opens a log that no server uses, to read it.
    pub fn open(&self) -> anyhow::Result<Arc<dyn TransactionLog>> {
        open_offline(&self.txlog, &self.data_dir)
    }
}

/// Opens a log that no server uses, to read it.
pub fn open_offline(txlog: &TxlogStorage, data: &Path) -> anyhow::Result<Arc<dyn TransactionLog>> {
    Ok(match txlog {
        #[cfg(feature = "nats")]
        TxlogStorage::File if copy::is_all(data) => {
            let (log, damage) = copy::read(data)?;
            if let Some(damage) = damage {
                notice(format_args!("warning: the copy of the log {damage}"));
            }
            Arc::new(log)
        }
        TxlogStorage::File => Arc::new(Offline::open(data)?),
        TxlogStorage::Postgres(url) => Arc::new(PostgresLog::at_rest(url, Existing::Required)?),
        #[cfg(feature = "nats")]
        TxlogStorage::Nats(url) => Arc::new(nats::read(url)?),
    })
}

pub fn run(command: TxlogCommand) -> anyhow::Result<()> {
    let out = &mut io::stdout().lock();
    match command {
        TxlogCommand::Verify { at, output } => match &at.txlog {
            #[cfg(feature = "nats")]
            TxlogStorage::File if copy::is_all(&at.data_dir) => verify_copy(&at.data_dir, output.output(), out),
            TxlogStorage::File => verify_log(&at.data_dir, output.output(), out),
            TxlogStorage::Postgres(url) => verify_rows(url, output.output(), out),
            #[cfg(feature = "nats")]
            TxlogStorage::Nats(url) => verify_frames(url, output.output(), out),
        },
        TxlogCommand::Cat { at, output } => match output.output() {
            Output::Text => cat::all(&at, out, cat::plain),
            Output::Json => cat::all(&at, out, entry_json::print),
        },
        TxlogCommand::Stats(args) => stats::run(&args, out),
        TxlogCommand::Export { at } => cat::all(&at, out, text::print),
        TxlogCommand::Import { at, format, from, file, output } => {
            import::run(&at, format, from.as_ref(), file.as_deref(), output.output())
        }
        TxlogCommand::Compact { at, output } => match &at.txlog {
            TxlogStorage::File => compact(&at.data_dir, output.output(), out),
            TxlogStorage::Postgres(url) => {
                let left = PostgresLog::at_rest(url, Existing::Required)?.compact()?;
                notice(format_args!("compacted: {left} entries remain"));
                output.output().print(None, || json!({ "entries": left }), out)?;
                Ok(())
            }
            #[cfg(feature = "nats")]
            TxlogStorage::Nats(url) => compact_frames(url, output.output(), out),
        },
        TxlogCommand::Fork { at, output } => fork(&at, output.output(), out),
    }
}

fn format() -> impl TypedValueParser<Value = Format> {
    PossibleValuesParser::new(["kvs", "cloud-native-go"])
        .map(|name| if name == "kvs" { Format::Kvs } else { Format::CloudNativeGo })
}

/// Verifies a log in a database, by a replay, which rejects corrupt rows.
fn verify_rows(url: &Url, output: Output, out: &mut dyn Write) -> anyhow::Result<()> {
    let log = PostgresLog::at_rest(url, Existing::Required)?;
    let (all, newest) = replayed(&log)?;
    let schema = log.schema();
    output.print(Some(&format!("schema kvs: {schema}")), || json!({ "schema": schema.to_string() }), out)?;
    print_sound(all, newest, output, out)?;
    Ok(())
}

/// Verifies a log in NATS, by a replay, which checks every frame and the chain of them.
#[cfg(feature = "nats")]
fn verify_frames(url: &nats::Url, output: Output, out: &mut dyn Write) -> anyhow::Result<()> {
    let log = nats::read(url)?;
    let (all, newest) = replayed(&log)?;
    if let Some(damage) = log.replica_damage() {
        bail!("the log can be read, but a replica of it is damaged: {damage}; see docs/jetstream.md");
    }
    print_sound(all, newest, output, out)?;
    Ok(())
}

/// Verifies the local copy of a log in NATS.
#[cfg(feature = "nats")]
fn verify_copy(data: &Path, output: Output, out: &mut dyn Write) -> anyhow::Result<()> {
    let (log, damage) = copy::read(data)?;
    let (all, newest) = replayed(&log)?;
    if let Some(damage) = damage {
        bail!("the copy of the log is sound up to sequence {newest} only: {damage}");
    }
    print_sound(all, newest, output, out)?;
    Ok(())
}

/// Reads a whole log, and returns the number of entries and the newest sequence.
fn replayed(log: &dyn TransactionLog) -> anyhow::Result<(u64, u64)> {
    let (bar, mut all) = (bar(log.appended(), "entries"), 0);
    let newest = log.replay(0, &mut |entries| {
        all += entries.len() as u64;
        bar.set_position(entries.last().map_or(0, |entry| entry.sequence));
        Ok(())
    })?;
    bar.finish_and_clear();
    Ok((all, newest))
}

/// Prints the last line about a log without corruption.
fn print_sound(entries: u64, newest: u64, output: Output, out: &mut dyn Write) -> io::Result<()> {
    let line = format!("the log is sound: {entries} entries, newest sequence {newest}");
    output.print(Some(&line), || json!({ "entries": entries, "sequence": newest.to_string() }), out)
}

fn verify_log(data: &Path, output: Output, out: &mut dyn Write) -> anyhow::Result<()> {
    let bar = bar(directory_bytes(data), "bytes checked");
    let mut corruptions = 0;
    let mut first = String::new();
    let (mut all, mut newest) = (0, 0);
    let mut printed = Ok(());
    let mut print = |line: &str, object: Value| {
        if printed.is_ok() {
            printed = bar.suspend(|| output.print(Some(line), || object, out));
        }
    };
    verify(
        data,
        &mut |finding| match finding {
            Finding::Sound { file, format, entries, first, last, bytes, incarnations } => {
                (all, newest) = (all + entries, newest.max(last));
                let (name, file) = (file.to_string(), format!("{file}: format {format}"));
                let mut object =
                    json!({ "file": name, "format": format.to_string(), "entries": entries, "bytes": bytes });
                if entries == 0 {
                    print(&format!("{file}, no entries, {bytes} bytes"), object);
                } else {
                    (object["first"], object["last"]) = (first.to_string().into(), last.to_string().into());
                    let line = format!("{file}, {entries} entries, sequences {first} to {last}, {bytes} bytes");
                    print(&line, object);
                }
                for Incarnation { id, fork, first, .. } in incarnations {
                    let object = json!({
                        "file": name, "incarnation": id.to_string(), "fork": fork.to_string(), "first": first.to_string(),
                    });
                    print(&format!("{file}, incarnation {id} after sequence {fork} with {first}"), object);
                }
            }
            Finding::Torn(what) => print(&format!("{what}; the next start truncates it"), json!({ "torn": what })),
            Finding::Corrupt(what) => {
                print(&format!("CORRUPT: {what}"), json!({ "corrupt": what }));
                if corruptions == 0 {
                    first = what;
                }
                corruptions += 1;
            }
        },
        &mut |bytes| bar.inc(bytes),
    )?;
    bar.finish_and_clear();
    // Before an error of the output: corruption must show in the exit code in any case.
    if corruptions > 0 {
        bail!(
            "the log in {} is corrupted in {corruptions} place(s), first: {first}; restore a backup, or start over in an empty \
             directory",
            data.display()
        );
    }
    printed.and_then(|()| print_sound(all, newest, output, out))?;
    Ok(())
}

fn fork(at: &StorageArgs, output: Output, out: &mut dyn Write) -> anyhow::Result<()> {
    let Incarnation { id, fork, first, .. } = match &at.txlog {
        TxlogStorage::File => Offline::fork(&at.data_dir)?,
        TxlogStorage::Postgres(url) => PostgresLog::at_rest(url, Existing::Required)?.fork()?,
        #[cfg(feature = "nats")]
        TxlogStorage::Nats(_) => bail!("a log in NATS cannot be forked: export it, and import it under another name"),
    };
    let line = format!("began incarnation {id}: the log continues after sequence {fork} with {first}");
    let object = || json!({ "incarnation": id.to_string(), "fork": fork.to_string(), "first": first.to_string() });
    output.print(Some(&line), object, out)?;
    Ok(())
}

fn compact(data: &Path, output: Output, out: &mut dyn Write) -> anyhow::Result<()> {
    let log = Offline::open(data)?;
    let before = directory_bytes(data);
    // One pass of analysis, and one that copies the live entries.
    let bar = bar(2 * before, "bytes read");
    log.compact(&mut |bytes| bar.inc(bytes))?;
    bar.finish_and_clear();
    let after = directory_bytes(data);
    let saved = before.saturating_sub(after);
    notice(format_args!("compacted: the log takes {}, saved {}", ByteSize(after), ByteSize(saved)));
    output.print(None, || json!({ "bytes": after, "saved_bytes": saved }), out)?;
    Ok(())
}

/// Compacts a log in NATS, also while it is in use.
#[cfg(feature = "nats")]
fn compact_frames(url: &nats::Url, output: Output, out: &mut dyn Write) -> anyhow::Result<()> {
    let Some(Outcome { entries, log_bytes, snapshot_bytes, .. }) = nats::read(url)?.compact()? else {
        notice(format_args!("nothing to compact: hardly anything was written since the last snapshot"));
        return Ok(output.print(None, || json!({ "entries": null }), out)?);
    };
    let (log, snapshot) = (ByteSize(log_bytes), ByteSize(snapshot_bytes));
    notice(format_args!(
        "compacted: {entries} entries remain in the snapshot, which takes {snapshot}; the rest takes {log}"
    ));
    let result = || json!({ "entries": entries, "bytes": log_bytes, "snapshot_bytes": snapshot_bytes });
    Ok(output.print(None, result, out)?)
}

/// Returns the size of the files of the log.
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

    pub fn at(data: &Path) -> StorageArgs {
        StorageArgs { data_dir: data.into(), txlog: TxlogStorage::File }
    }

    pub fn directory_with(events: &[Event]) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        let options = Options {
            data: directory.path().into(),
            segment_bytes: 1 << 18,
            group_bytes: 1 << 17,
            durability: Durability::Os,
            retain: Duration::ZERO,
            advertise: None,
            env: Env::real(),
        };
        let log = FileLog::open(options).unwrap();
        for (time, event) in (1000..).zip(events) {
            log.append(time, std::slice::from_ref(event)).unwrap();
        }
        // Preallocation is concurrent, and ends when the log is closed.
        let preallocated = directory.path().join("log/0000000002.seg");
        let started = Instant::now();
        while !preallocated.exists() {
            assert!(started.elapsed() < Duration::from_secs(60), "{} is not created", preallocated.display());
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
        let failed = verify_log(data, Output::Text, &mut out).err();
        (String::from_utf8(out).unwrap(), failed.map_or(String::new(), |error| format!("{error:#}")))
    }

    #[test]
    fn verify_locates_corruption() {
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
        assert!(text.contains(&format!("CORRUPT: {place}")), "{text}");
        assert!(failed.contains(&place) && failed.contains("1 place(s)"), "{failed}");
    }

    #[test]
    fn verify_fails_on_corruption_without_output() {
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
        let error = verify_log(directory.path(), Output::Text, &mut Closed).unwrap_err();
        assert!(error.is::<io::Error>(), "{error:#}");
        std::fs::write(directory.path().join("log/0000000001.seg"), [b'x'; 600]).unwrap();
        let error = verify_log(directory.path(), Output::Text, &mut Closed).unwrap_err();
        assert!(error.to_string().contains("is corrupted"), "{error:#}");
    }

    #[test]
    fn verify_rejects_what_recovery_rejects() {
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
        for (reason, spoil) in spoils {
            let directory = directory_with(&events());
            spoil(&directory.path().join("log"));
            let (text, failed) = verified(directory.path());
            let refused = format!("{:#}", Offline::open(directory.path()).err().expect(reason));
            assert!(failed.contains("is corrupted") && text.contains(reason), "{reason}: {failed:?}, {text:?}");
            assert!(refused.contains(reason), "{reason}: {refused:?}");
        }
    }

    #[test]
    fn verify_prints_range_of_compacted_log() {
        let kept = Event::Put(Put { key: "kept".into(), value: vec![], metadata: vec![], expires: None });
        let directory = directory_with(&[vec![kept], events()].concat());
        compact(directory.path(), Output::Text, &mut Vec::new()).unwrap();
        let (text, _) = verified(directory.path());
        // The second entry has expired, the third was deleted, and of the delete only its sequence is left.
        assert!(text.contains(".seg: format 2, 1 entries, sequences 1 to 4, "), "{text}");
        assert!(text.ends_with("the log is sound: 1 entries, newest sequence 4\n"), "{text}");
    }

    #[test]
    fn fork_prints_the_next_sequence() {
        let directory = directory_with(&events());
        let mut out = Vec::new();
        fork(&at(directory.path()), Output::Text, &mut out).unwrap();
        let out = String::from_utf8(out).unwrap();
        let (before, first) = out.trim_end().split_once(" after sequence 3 with ").expect(&out);
        let id = before.strip_prefix("began incarnation ").and_then(|line| line.split(':').next()).expect(&out);
        let first: u64 = first.parse().unwrap();
        assert!(first - 3 >= 1 << 40, "{out}");
        let (text, _) = verified(directory.path());
        assert!(text.contains(&format!("format 2, incarnation {id} after sequence 3 with {first}\n")), "{text}");
        assert!(text.ends_with("the log is sound: 3 entries, newest sequence 3\n"), "{text}");

        let empty = directory_with(&[]);
        let error = fork(&at(empty.path()), Output::Text, &mut Vec::new()).unwrap_err().to_string();
        assert!(error.ends_with("is empty: there is nothing to continue"), "{error}");
    }
}
