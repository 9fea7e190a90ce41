//! `kvs txlog import`: appends the entries of a text, line by line.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use indicatif::ProgressBar;
use kvs_client::Output;
use serde_json::json;

use kvs_runtime::Env;
#[cfg(feature = "nats")]
use kvs_txlog::cluster::nats;
use kvs_txlog::file::{DEFAULT_SEGMENT_BYTES, Durability, FileLog, Options, largest_group};
use kvs_txlog::postgres::{Existing, PostgresLog, Url, cloud_native_go};
use kvs_txlog::text::{self, Format};
use kvs_txlog::{AppendError, Event, Put, TransactionLog};

use super::StorageArgs;
use crate::lines::notice;
use crate::settings::TxlogStorage;
use crate::terminal::bar;

/// Maximum length of a line: more than the largest entry with every byte escaped. It bounds memory.
const LINE_BYTES: u64 = 4 * DEFAULT_SEGMENT_BYTES;

pub fn run(
    at: &StorageArgs,
    format: Format,
    from: Option<&Url>,
    file: Option<&Path>,
    output: Output,
) -> anyhow::Result<()> {
    let source = match (from, file) {
        (Some(url), _) => Source::Table(url),
        (None, file) => Source::Text(Text::open(file.unwrap_or(Path::new("-")), format)?),
    };
    source.check()?;
    match &at.txlog {
        TxlogStorage::File => {
            let (data, segment_bytes, durability) = (at.data_dir.clone(), DEFAULT_SEGMENT_BYTES, Durability::Sync);
            let group_bytes = largest_group(segment_bytes);
            let (retain, advertise, env) = (Duration::ZERO, None, Env::real());
            let options = Options { data, segment_bytes, group_bytes, durability, retain, advertise, env };
            import(&source, &FileLog::open(options)?, output)
        }
        TxlogStorage::Postgres(url) => import(&source, &PostgresLog::at_rest(url, Existing::Allowed)?, output),
        #[cfg(feature = "nats")]
        TxlogStorage::Nats(url) => import(&source, &nats::at_rest(url)?, output),
    }
}

fn import(source: &Source<'_>, log: &dyn TransactionLog, output: Output) -> anyhow::Result<()> {
    let (mut count, mut late) = (0_u64, 0_u64);
    let now = now();
    let imported = source.each(&mut |time, event| {
        late += u64::from(time > now);
        let (time, event) = clamp_time(now, time, event);
        append(log, time, &event)?;
        count += 1;
        Ok(())
    });
    // Makes the appended entries durable even after an error.
    log.close()?;
    imported.map_err(|error| anyhow!("{error:#}; the {count} entries before it were imported"))?;
    if late > 0 {
        notice(format_args!("{late} entries had a time in the future: their times and expiries were moved to now"));
    }
    let newest = log.appended();
    notice(format_args!("imported {count} entries; the newest sequence is {newest}"));
    output.print(None, || json!({ "imported": count, "sequence": newest.to_string() }), &mut io::stdout())?;
    Ok(())
}

/// Moves an entry with a time in the future to now, with the same remaining time to live. Otherwise an entry written under
/// a fast clock would advance the clock of this log.
fn clamp_time(now: u64, time: u64, mut event: Event) -> (u64, Event) {
    let ahead = time.saturating_sub(now);
    if let Event::Put(Put { expires: Some(expires), .. }) = &mut event {
        *expires = expires.saturating_sub(ahead);
    }
    (time - ahead, event)
}

/// Source of an import.
enum Source<'s> {
    Text(Text),
    /// The table of *Cloud Native Go*, in a database.
    Table(&'s Url),
}

impl Source<'_> {
    /// Validates everything before the first append, if the source can be read twice.
    fn check(&self) -> anyhow::Result<()> {
        match self {
            Self::Text(Text { size: Some(size), .. }) => self.read(&bar(*size, "bytes checked"), &mut |_, _| Ok(())),
            Self::Text(_) => Ok(()),
            Self::Table(_) => self.read(&ProgressBar::no_length(), &mut |_, _| Ok(())),
        }
    }

    fn each(&self, each: &mut dyn FnMut(u64, Event) -> anyhow::Result<()>) -> anyhow::Result<()> {
        let size = if let Self::Text(text) = self { text.size } else { None };
        self.read(&size.map_or_else(ProgressBar::no_length, |size| bar(size, "bytes imported")), each)
    }

    fn read(&self, bar: &ProgressBar, each: &mut dyn FnMut(u64, Event) -> anyhow::Result<()>) -> anyhow::Result<()> {
        let read = match self {
            Self::Text(text) => text.each_line(bar, &mut |line| each(line.time, line.event)),
            Self::Table(url) => {
                let now = now();
                cloud_native_go::each(url, &mut |event| each(now, event))
            }
        };
        bar.finish_and_clear();
        read
    }
}

fn now() -> u64 {
    Env::real().clock.unix_ms()
}

/// An open text file or pipe.
struct Text {
    file: File,
    name: String,
    format: Format,
    /// Time of entries that have none.
    now: u64,
    /// Start offset and size. A pipe has no size, and can be read only once.
    begin: u64,
    size: Option<u64>,
}

impl Text {
    fn open(path: &Path, format: Format) -> anyhow::Result<Self> {
        let standard = path == Path::new("-");
        let name = if standard { "standard input".into() } else { path.display().to_string() };
        let opened = || {
            let mut file = if standard { io::stdin().as_fd().try_clone_to_owned()?.into() } else { File::open(path)? };
            let metadata = file.metadata()?;
            let begin = if metadata.is_file() { file.stream_position()? } else { 0 };
            let size = metadata.is_file().then(|| metadata.len().saturating_sub(begin));
            Ok::<_, io::Error>((file, begin, size))
        };
        let (file, begin, size) = opened().with_context(|| format!("cannot read {name}"))?;
        Ok(Self { file, name, format, now: now(), begin, size })
    }

    /// Calls `each` with every line. An error names the line.
    fn each_line(
        &self,
        bar: &ProgressBar,
        each: &mut dyn FnMut(text::Line) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let context = || format!("cannot read {}", self.name);
        if self.size.is_some() {
            (&self.file).seek(SeekFrom::Start(self.begin)).with_context(context)?;
        }
        let mut reader = BufReader::with_capacity(1 << 16, &self.file);
        let (mut bytes, mut number, mut previous) = (Vec::new(), 0_u64, None);
        loop {
            bytes.clear();
            let read = reader.by_ref().take(LINE_BYTES).read_until(b'\n', &mut bytes).with_context(context)? as u64;
            if read == 0 {
                return Ok(());
            }
            number += 1;
            bar.inc(read);
            let place = || format!("line {number} of {}", self.name);
            let Some(text) = bytes.strip_suffix(b"\n").or((read < LINE_BYTES).then_some(&bytes)) else {
                return Err(anyhow!("the line exceeds the maximum length")).with_context(place);
            };
            let line = text::parse(text, self.format, self.now).map_err(anyhow::Error::msg).with_context(place)?;
            // Like the service in the book: a reordered or merged text would build a different store.
            if previous.is_some_and(|previous| line.sequence <= previous) {
                let (sequence, previous) = (line.sequence, previous.unwrap_or_default());
                return Err(anyhow!("sequence {sequence} follows {previous}, but must be larger")).with_context(place);
            }
            previous = Some(line.sequence);
            each(line).with_context(place)?;
        }
    }
}

/// Appends an event, and waits while the queue of the log is full.
fn append(log: &dyn TransactionLog, time: u64, event: &Event) -> anyhow::Result<()> {
    loop {
        return match log.append(time, std::slice::from_ref(event)) {
            Ok(_) => Ok(()),
            Err(AppendError::Unavailable) => match log.watermark().failure().or(log.read_only().map(Into::into)) {
                Some(reason) => bail!("{reason}"),
                None => {
                    Env::real().clock.pause(Duration::from_millis(1));
                    continue;
                }
            },
            Err(AppendError::InsufficientStorage) => bail!("the disk is full"),
            Err(AppendError::TooLarge(limit)) => bail!("the entry exceeds {limit} bytes"),
            Err(AppendError::ReadOnly) => bail!("the log is read-only"),
        };
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::fs;

    use proptest::prelude::*;

    use super::super::cat::{self, tests::printed};
    use super::super::tests::{at, directory_with, events};
    use super::*;
    use crate::entry_json;

    #[test]
    fn entry_from_the_future_is_moved_to_now() {
        let put = |expires| Event::Put(Put { key: "a".into(), value: vec![], metadata: vec![], expires });
        assert_eq!(clamp_time(1_000, 900, put(Some(5_000))), (900, put(Some(5_000))));
        assert_eq!(clamp_time(1_000, 9_000, put(Some(9_500))), (1_000, put(Some(1_500))));
        assert_eq!(clamp_time(1_000, 9_000, put(None)), (1_000, put(None)));
        assert_eq!(clamp_time(1_000, 9_000, Event::Delete("a".into())), (1_000, Event::Delete("a".into())));
    }

    /// Writes a text to a file beside the log and imports it. It fits one segment, so that nothing is compacted.
    fn import_text(data: &Path, format: Format, text: &str) {
        let file = data.join("text");
        fs::write(&file, text).unwrap();
        let (segment_bytes, group_bytes, durability) = (4 << 20, 1 << 20, Durability::Os);
        let (data, retain, advertise, env) = (data.into(), Duration::ZERO, None, Env::real());
        let options = Options { data, segment_bytes, group_bytes, durability, retain, advertise, env };
        let log = FileLog::open(options).unwrap();
        import(&Source::Text(Text::open(&file, format).unwrap()), &log, Output::Text).unwrap();
    }

    /// Returns the store that a log builds: the newest put of each key, without its sequence.
    fn store(data: &Path) -> BTreeMap<String, String> {
        let mut store = BTreeMap::new();
        for line in printed(data, text::print).lines() {
            let [_, kind, key, put] = line.splitn(4, '\t').collect::<Vec<_>>()[..] else { panic!("{line:?}") };
            match kind {
                "1" => store.remove(key),
                _ => store.insert(key.to_owned(), put.to_owned()),
            };
        }
        store
    }

    #[test]
    fn malformed_line_prevents_the_import() {
        let directory = tempfile::tempdir().unwrap();
        let (file, data) = (directory.path().join("file"), directory.path().join("data"));
        let good = "1\t2\tkey-a\tHello%2C+world\n2\t1\tkey-a\t\n";
        for (bad, what) in [
            ("3\t2\tkey-b\n", "the value is missing"),
            ("2\t2\tkey-b\tv\n", "sequence 2 follows 2, but must be larger"),
            ("\n", "the sequence is \"\", not a number"),
        ] {
            fs::write(&file, [good, bad].concat()).unwrap();
            let error =
                format!("{:#}", run(&at(&data), Format::CloudNativeGo, None, Some(&file), Output::Text).unwrap_err());
            assert_eq!(error, format!("line 3 of {}: {what}", file.display()));
            assert!(!data.exists());
        }
        fs::write(&file, [good, "3\t2\tkey-b\t"].concat()).unwrap();
        run(&at(&data), Format::CloudNativeGo, None, Some(&file), Output::Text).unwrap();
        let text = printed(&data, cat::plain);
        assert!(text.lines().next().unwrap().ends_with("put \"key-a\" = \"Hello, world\""), "{text}");
        assert!(text.lines().nth(1).unwrap().ends_with("delete \"key-a\""), "{text}");
        assert!(text.lines().nth(2).unwrap().ends_with("put \"key-b\" = \"\""), "{text}");
    }

    #[test]
    fn import_appends_to_existing_entries() {
        let directory = directory_with(&events());
        let exported = printed(directory.path(), text::print);
        import_text(directory.path(), Format::Kvs, &exported);
        let text = printed(directory.path(), text::print);
        let sequences: Vec<_> = text.lines().map(|line| line.split('\t').next().unwrap()).collect();
        assert_eq!(sequences, ["1", "2", "3", "4", "5", "6"]);
        let without =
            |text: &str| text.lines().map(|line| line.split_once('\t').unwrap().1.to_owned()).collect::<Vec<_>>();
        assert_eq!(without(&text)[3..], without(&exported));
    }

    fn event() -> impl Strategy<Value = Event> {
        // Few keys, so that they repeat, of any characters.
        let key = prop_oneof!["[ab\t\n%+=é]{0,2}", any::<String>()];
        let put = (key.clone(), any::<Vec<u8>>(), any::<Vec<(String, String)>>(), any::<Option<u64>>());
        prop_oneof![
            put.prop_map(|(key, value, metadata, expires)| Event::Put(Put { key, value, metadata, expires })),
            key.prop_map(Event::Delete),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 16, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn import_restores_an_export(events in prop::collection::vec(event(), 0..40)) {
            let from = directory_with(&events);
            let exported = printed(from.path(), text::print);
            prop_assert_eq!(exported.lines().count(), events.len());
            let to = tempfile::tempdir().unwrap();
            import_text(to.path(), Format::Kvs, &exported);
            prop_assert_eq!(&printed(to.path(), text::print), &exported);
            // A second import does not change the store.
            let before = store(to.path());
            import_text(to.path(), Format::Kvs, &exported);
            prop_assert_eq!(store(to.path()), before);
        }

        #[test]
        fn import_reads_cloud_native_go(puts in prop::collection::vec(("[a-z +%=]{1,3}", "\\PC*"), 0..20)) {
            // Escaped like in Go, by other code than the one under test.
            let lines = puts.iter().enumerate().map(|(at, (key, value))| {
                let value = percent_encoding::utf8_percent_encode(value, percent_encoding::NON_ALPHANUMERIC);
                format!("{}\t2\t{key}\t{}\n", at + 1, value.to_string().replace("%20", "+"))
            });
            let book = tempfile::tempdir().unwrap();
            import_text(book.path(), Format::CloudNativeGo, &lines.collect::<String>());
            let imported: Vec<serde_json::Value> = printed(book.path(), entry_json::print)
                .lines().map(|line| serde_json::from_str(line).unwrap()).collect();
            let pairs = imported.iter().map(|put| (put["key"].as_str().unwrap(), put["value"].as_str().unwrap()));
            prop_assert!(pairs.eq(puts.iter().map(|(key, value)| (&key[..], &value[..]))));
        }
    }
}
