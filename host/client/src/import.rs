//! Import: puts the keys and values of JSON lines, concurrently but in order for lines with the same key.
//!
//! Progress is saved in a checkpoint file beside the imported one, so that an interrupted import can resume: all lines up to
//! a checkpoint were acknowledged, and lines after it are put again with the same values.

use std::collections::VecDeque;
use std::fs::File;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, BufRead, BufReader, Read, Seek};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result, anyhow, bail};
use indicatif::ProgressBar;

use super::checkpoint::{Checkpoint, CheckpointFile};
use super::origin::{LeftOut, Lines, Origin};
use super::record::{Expiry, Record};
use super::server::{ApiRequest, ClientError, Server, add, path_of, shown};

/// Number of concurrent requests.
const CONNECTIONS: usize = 16;
/// Maximum lines, and bytes of them, that are read and not acknowledged yet.
const MAX_IN_FLIGHT_LINES: usize = 1_024;
const MAX_IN_FLIGHT_BYTES: u64 = 64 << 20;
/// Maximum length of a line: more than a value of the maximum size with every byte escaped. It bounds memory.
const LINE_BYTES: u64 = 8 << 30;
/// Interval of checkpoints.
const CHECKPOINT_INTERVAL: Duration = Duration::from_secs(1);

/// Byte order mark, which some editors put at the beginning of a file.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// Creates a progress bar of a length, with a unit.
pub type NewProgressBar = fn(u64, &'static str) -> ProgressBar;

/// Returns why no server accepts a key.
pub type CheckKey = fn(&str) -> Result<(), String>;

/// What the caller knows of keys, and how it reports.
#[derive(Clone, Copy)]
pub struct ImportHooks {
    pub bar: NewProgressBar,
    pub check_key: CheckKey,
    /// Called with a message when the import has to wait for the server.
    pub report: fn(&str),
}

/// Imports the lines of a file, and returns their number. `-` is standard input.
pub fn import(server: &Server, file: &Path, resume: bool, hooks: ImportHooks) -> Result<u64> {
    let bar = hooks.bar;
    let mut source = Source::open(file)?;
    let checkpoint_file = source.size.map(|_| CheckpointFile::beside(file, server.base()));
    let mut begin = Checkpoint::default();
    if resume {
        let Some(checkpoint_file) = &checkpoint_file else {
            bail!("--resume requires a file; for a pipe, skip lines with tail -n +LINE");
        };
        begin = checkpoint_file.read()?.unwrap_or_default();
    }
    if let Some(size) = source.size {
        source.check(&bar(size, "bytes checked"), &begin, hooks.check_key)?;
    }
    let progress = source.size.map_or_else(ProgressBar::no_length, |size| bar(size, "bytes imported"));
    let mut import = Import::new(server, hooks, progress);
    (import.file, import.checkpoint) = (checkpoint_file.as_ref(), begin);
    import.save()?;
    let Ended { checkpoint, failed, .. } = import.run(&mut source)?;
    match failed {
        None => {
            checkpoint_file.map_or(Ok(()), |file| file.remove())?;
            Ok(checkpoint.line - begin.line)
        }
        Some(failed) if source.size.is_some() => {
            let file = file.display();
            Err(anyhow!(
                "{failed:#}; the first {} lines are stored, resume with kvs import --resume {file}",
                checkpoint.line
            ))
        }
        Some(failed) => Err(anyhow!("{failed:#}; the first {} lines are stored", checkpoint.line)),
    }
}

/// Result of a copy from another store.
pub struct Copied {
    pub imported: u64,
    /// Keys that do not fit; some were reported by name.
    pub left_out: u64,
}

/// Imports all keys of another store, as they are read. `authorities` are trusted there.
pub fn import_from(server: &Server, origin: &Origin, authorities: Option<&Path>, hooks: ImportHooks) -> Result<Copied> {
    let (reader, writer) = io::pipe().context("no pipe")?;
    let file = OwnedFd::from(reader).into();
    let mut source = Source::new(file, origin.to_string(), None);
    let left_out = Arc::new(LeftOut::new(hooks));
    let mut import = Import::new(server, hooks, ProgressBar::hidden());
    import.left_out = Some(Arc::clone(&left_out));
    let mut lines = Lines::new(writer, hooks, Arc::clone(&left_out));
    thread::scope(|scope| {
        let copying = scope.spawn(move || {
            let copied = origin.copy(authorities, &mut lines);
            lines.finish();
            copied
        });
        let Ended { imported, failed, .. } = import.run(&mut source)?;
        // Ends the copy, if the import failed.
        drop(source);
        let copied = copying.join().map_err(|_| anyhow!("the copy panicked"))?;
        let stored = || format!("{imported} keys are stored; import again to store all");
        match (failed, copied) {
            (Some(error), _) | (None, Err(error)) => Err(error.context(stored())),
            (None, Ok(())) => Ok(Copied { imported, left_out: left_out.count() }),
        }
    })
}

/// The imported file.
struct Source {
    reader: BufReader<File>,
    name: String,
    /// Size of a file. A pipe has none, and can be read only once.
    size: Option<u64>,
    /// Position up to which it was read.
    position: Checkpoint,
}

impl Source {
    fn open(path: &Path) -> Result<Self> {
        let standard = path == Path::new("-");
        let name = if standard { "standard input".to_owned() } else { path.display().to_string() };
        let opened = || {
            if standard {
                return Ok::<_, io::Error>((io::stdin().as_fd().try_clone_to_owned()?.into(), None));
            }
            let file = File::open(path)?;
            let metadata = file.metadata()?;
            Ok((file, metadata.is_file().then_some(metadata.len())))
        };
        let (file, size) = opened().with_context(|| format!("cannot read {name}"))?;
        Ok(Self::new(file, name, size))
    }

    fn new(file: File, name: String, size: Option<u64>) -> Self {
        Self { reader: BufReader::with_capacity(1 << 16, file), name, size, position: Checkpoint::default() }
    }

    /// Validates all lines before the first put, and that the part before the checkpoint `begin` is unchanged. Then seeks to
    /// the checkpoint.
    fn check(&mut self, bar: &ProgressBar, begin: &Checkpoint, check_key: CheckKey) -> Result<()> {
        let mut is_unchanged = *begin == Checkpoint::default();
        while let Some(line) = self.next()? {
            put_of(&line, check_key).map_err(Error::msg).with_context(|| self.place(self.position.line))?;
            is_unchanged |= self.position == *begin;
            bar.set_position(self.position.bytes);
        }
        bar.finish_and_clear();
        if !is_unchanged {
            bail!("the imported part of {} has changed; import it without --resume", self.name);
        }
        self.reader.seek(io::SeekFrom::Start(begin.bytes)).with_context(|| format!("cannot read {}", self.name))?;
        self.position = *begin;
        Ok(())
    }

    /// Returns the next line that is not blank. A file may end with a blank line, and begin with a byte order mark.
    fn next(&mut self) -> Result<Option<Vec<u8>>> {
        loop {
            let is_first = self.position.line == 0;
            let Some(mut line) = self.next_line()? else { return Ok(None) };
            if is_first && line.starts_with(BYTE_ORDER_MARK) {
                line.drain(..BYTE_ORDER_MARK.len());
            }
            if !line.trim_ascii().is_empty() {
                return Ok(Some(line));
            }
        }
    }

    fn next_line(&mut self) -> Result<Option<Vec<u8>>> {
        let mut line = Vec::new();
        let read = self.reader.by_ref().take(LINE_BYTES).read_until(b'\n', &mut line);
        let read = read.with_context(|| format!("cannot read {}", self.name))? as u64;
        if read == 0 {
            return Ok(None);
        }
        self.position.advance(&line);
        if line.pop_if(|last| *last == b'\n').is_none() && read == LINE_BYTES {
            return Err(anyhow!("the line exceeds the maximum length")).with_context(|| self.place(self.position.line));
        }
        Ok(Some(line))
    }

    fn place(&self, line: u64) -> String {
        format!("line {line} of {}", self.name)
    }
}

/// The request of a line.
struct Put {
    key: String,
    target: String,
    content_type: Option<String>,
    value: Vec<u8>,
}

/// Parses a line; None if the value has expired.
fn put_of(line: &[u8], check_key: CheckKey) -> Result<Option<Put>, String> {
    let record = Record::parse(line)?;
    check_key(&record.key).map_err(|reason| format!("no server accepts the key {:?}: {reason}", shown(&record.key)))?;
    let mut target = path_of(&record.key);
    match record.expiry() {
        Expiry::Never => {}
        Expiry::In(left) => add(&mut target, "ttl", &format!("{}ms", left.as_millis())),
        Expiry::Expired => return Ok(None),
    }
    let (key, content_type) = (record.key.clone(), record.content_type.clone());
    Ok(Some(Put { key, target, content_type, value: record.into_value()? }))
}

/// A line in flight: its number and its request.
struct Job {
    line: u64,
    put: Put,
}

/// Result of a line: whether its value was stored.
type LineResult = (u64, Result<bool>);

/// An import that has ended.
struct Ended {
    checkpoint: Checkpoint,
    /// Number of values that were stored.
    imported: u64,
    /// The error that stopped it before the end.
    failed: Option<Error>,
}

struct Import<'l> {
    server: &'l Server,
    check_key: CheckKey,
    waits: Arc<Waits>,
    /// Set where a value that is too large is left out, in place of an error.
    left_out: Option<Arc<LeftOut>>,
    file: Option<&'l CheckpointFile>,
    progress: ProgressBar,
    /// Position up to which every line was acknowledged.
    checkpoint: Checkpoint,
    /// Later lines that were read, and whether they were acknowledged.
    in_flight: VecDeque<(Checkpoint, bool)>,
    imported: u64,
    /// Time of the last saved checkpoint.
    saved: Instant,
}

impl<'l> Import<'l> {
    fn new(server: &'l Server, hooks: ImportHooks, progress: ProgressBar) -> Self {
        Self {
            server,
            check_key: hooks.check_key,
            waits: Arc::new(Waits { report: hooks.report, has_reported: AtomicBool::default() }),
            left_out: None,
            file: None,
            progress,
            checkpoint: Checkpoint::default(),
            in_flight: VecDeque::new(),
            imported: 0,
            saved: Instant::now(),
        }
    }

    /// Runs the import.
    fn run(mut self, source: &mut Source) -> Result<Ended> {
        let stopped = AtomicBool::new(false);
        let failed = thread::scope(|scope| {
            let (done, results) = channel();
            let workers = (0..CONNECTIONS).map(|_| {
                let (jobs, work) = channel();
                let (waits, left_out) = (Arc::clone(&self.waits), self.left_out.clone());
                let worker = Worker { server: self.server, stopped: &stopped, waits, left_out };
                let done = done.clone();
                scope.spawn(move || worker.put_all(&work, &done));
                jobs
            });
            let workers: Vec<Sender<Job>> = workers.collect();
            drop(done);
            let mut failed = self.feed(source, &workers, &results).err();
            // The workers end when they have put all their lines, or one of them failed.
            drop(workers);
            for result in results {
                failed = failed.or(self.acknowledge(result, source).err());
            }
            failed
        });
        self.progress.finish_and_clear();
        self.save()?;
        Ok(Ended { checkpoint: self.checkpoint, imported: self.imported, failed })
    }

    /// Hands all lines to the workers, with a limit of those in flight.
    fn feed(&mut self, source: &mut Source, workers: &[Sender<Job>], results: &Receiver<LineResult>) -> Result<()> {
        while let Some(line) = source.next()? {
            let put = put_of(&line, self.check_key)
                .map_err(Error::msg)
                .with_context(|| source.place(source.position.line))?;
            self.in_flight.push_back((source.position, put.is_none()));
            self.advance()?;
            if let Some(put) = put {
                // All lines of a key go to the same worker, which preserves their order.
                let mut hash = DefaultHasher::new();
                put.key.hash(&mut hash);
                let worker = &workers[hash.finish() as usize % workers.len()];
                if worker.send(Job { line: source.position.line, put }).is_err() {
                    // The worker stopped because another one failed, whose result has the reason.
                    return Ok(());
                }
            }
            while let Some(result) = self.next_result(results) {
                self.acknowledge(result, source)?;
            }
        }
        Ok(())
    }

    /// Returns a result that is there; at the limit of lines in flight it waits for one.
    fn next_result(&self, results: &Receiver<LineResult>) -> Option<LineResult> {
        let bytes = self.in_flight.back().map_or(0, |(last, _)| last.bytes - self.checkpoint.bytes);
        if self.in_flight.len() >= MAX_IN_FLIGHT_LINES || bytes >= MAX_IN_FLIGHT_BYTES {
            results.recv().ok()
        } else {
            results.try_recv().ok()
        }
    }

    fn acknowledge(&mut self, (line, result): LineResult, source: &Source) -> Result<()> {
        self.imported += u64::from(result.with_context(|| source.place(line))?);
        // Blank lines are not in flight.
        let at = self.in_flight.partition_point(|(position, _)| position.line < line);
        if let Some((_, acknowledged)) = self.in_flight.get_mut(at) {
            *acknowledged = true;
        }
        self.advance()
    }

    /// Advances the checkpoint to the first line that is not acknowledged.
    fn advance(&mut self) -> Result<()> {
        while let Some((position, _)) = self.in_flight.pop_front_if(|(_, acknowledged)| *acknowledged) {
            self.checkpoint = position;
        }
        self.progress.set_position(self.checkpoint.bytes);
        if self.saved.elapsed() >= CHECKPOINT_INTERVAL {
            self.save()?;
        }
        Ok(())
    }

    fn save(&mut self) -> Result<()> {
        self.saved = Instant::now();
        self.file.map_or(Ok(()), |file| file.save(&self.checkpoint))
    }
}

/// Report of the first time that the server asks to wait: it may be a standby, and stay one.
struct Waits {
    report: fn(&str),
    has_reported: AtomicBool,
}

impl Waits {
    fn begin(&self, reason: &ClientError) {
        if !self.has_reported.swap(true, Ordering::Relaxed) {
            (self.report)(&format!("waiting for the server, which responded: {reason}"));
        }
    }
}

/// Puts lines over one connection.
struct Worker<'i> {
    server: &'i Server,
    /// Set by the first worker that fails.
    stopped: &'i AtomicBool,
    waits: Arc<Waits>,
    left_out: Option<Arc<LeftOut>>,
}

impl Worker<'_> {
    fn put_all(&self, work: &Receiver<Job>, done: &Sender<LineResult>) {
        for Job { line, put } in work {
            let Some(result) = self.put(&put) else { return };
            if result.is_err() {
                self.stopped.store(true, Ordering::Relaxed);
            }
            let result = result.with_context(|| format!("put {}", shown(&put.key)));
            if done.send((line, result)).is_err() {
                return;
            }
        }
    }

    /// Returns whether the value was stored. None when the import was stopped before.
    fn put(&self, put: &Put) -> Option<Result<bool, ClientError>> {
        let headers: Vec<_> = put.content_type.iter().map(|kind| ("content-type", kind.as_str())).collect();
        let request = ApiRequest { method: "PUT", target: &put.target, headers: &headers, body: Some(&put.value) };
        while !self.stopped.load(Ordering::Relaxed) {
            match (self.server.send(&request), &self.left_out) {
                // Rate limit exceeded, or the server is not ready: nothing was stored.
                (Err(reason @ ClientError::Status { status: 429 | 503, retry_after: Some(time), .. }), _) => {
                    // At 429 the import is too fast, which is no reason to worry.
                    if matches!(reason, ClientError::Status { status: 503, .. }) {
                        self.waits.begin(&reason);
                    }
                    thread::sleep(time);
                }
                (Err(reason @ ClientError::Status { status: 413, .. }), Some(left_out)) => {
                    left_out.add(&put.key, &reason.to_string());
                    return Some(Ok(false));
                }
                (result, _) => return Some(result.map(|_| true)),
            }
        }
        None
    }
}
