//! Imports: puts the keys and values of JSON lines, several at a time, in their order where they name the same key.
//!
//! Progress is kept in a checkpoint file beside the one that is read, so that an import that was interrupted in any way can
//! resume: all lines up to a checkpoint were acknowledged. What is put again after it is what was put before.

use std::collections::VecDeque;
use std::fs::File;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, BufRead, BufReader, Read, Seek};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result, anyhow, bail};
use indicatif::ProgressBar;

use super::checkpoint::{Checkpoint, CheckpointFile};
use super::record::{Life, Record};
use super::server::{Ask, Failure, Server, add, path_of};

/// Requests at a time.
const CONNECTIONS: usize = 16;
/// What is read and not yet answered.
const AHEAD_LINES: usize = 1_024;
const AHEAD_BYTES: u64 = 64 << 20;
/// Longer than any line can be, every byte of a value escaped. It bounds what is held of a text without lines.
const LINE_BYTES: u64 = 8 << 30;
/// How often it is written down how far the import came.
const KEEP: Duration = Duration::from_secs(1);

/// Makes a progress bar of a length, with a unit.
pub type NewProgressBar = fn(u64, &'static str) -> ProgressBar;

/// Puts the lines of a file, and returns how many. `-` is standard input.
pub fn import(server: &Server, file: &Path, resume: bool, bar: NewProgressBar) -> Result<u64> {
    let mut source = Source::open(file)?;
    let marks = source.size.map(|_| CheckpointFile::beside(file, server.base()));
    let mut begin = Checkpoint::default();
    if resume {
        let Some(marks) = &marks else {
            bail!("only the import of a file can resume; of a pipe, skip lines with tail -n +LINE");
        };
        begin = marks.read()?.unwrap_or_default();
    }
    if let Some(size) = source.size {
        source.check(&bar(size, "bytes checked"), &begin)?;
    }
    let progress = source.size.map_or_else(ProgressBar::no_length, |size| bar(size, "bytes imported"));
    let (ahead, kept) = (VecDeque::new(), Instant::now());
    let mut import = Import { server, marks: marks.as_ref(), progress, mark: begin, ahead, kept };
    import.keep()?;
    let (mark, failed) = import.run(&mut source)?;
    match failed {
        None => {
            marks.map_or(Ok(()), |marks| marks.remove())?;
            Ok(mark.line - begin.line)
        }
        Some(failed) if source.size.is_some() => {
            let file = file.display();
            Err(anyhow!("{failed:#}; the first {} lines are stored, resume with kvs import --resume {file}", mark.line))
        }
        Some(failed) => Err(anyhow!("{failed:#}; the first {} lines are stored", mark.line)),
    }
}

/// Lines to read.
struct Source {
    reader: BufReader<File>,
    name: String,
    /// A pipe has none, and can be read once only.
    size: Option<u64>,
    /// All that was read.
    mark: Checkpoint,
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
        let (file, size) = opened().with_context(|| format!("{name} cannot be read"))?;
        Ok(Self { reader: BufReader::with_capacity(1 << 16, file), name, size, mark: Checkpoint::default() })
    }

    /// Reads it once before anything is put: every line must be good, and what was imported before must be the same. Then it
    /// is ready to be read from there.
    fn check(&mut self, bar: &ProgressBar, begin: &Checkpoint) -> Result<()> {
        let mut same = *begin == Checkpoint::default();
        while let Some(line) = self.next()? {
            put_of(&line).map_err(Error::msg).with_context(|| self.place(self.mark.line))?;
            same |= self.mark == *begin;
            bar.set_position(self.mark.bytes);
        }
        bar.finish_and_clear();
        if !same {
            bail!("the imported part of {} has changed; import it without --resume", self.name);
        }
        self.reader.seek(io::SeekFrom::Start(begin.bytes)).with_context(|| format!("{} cannot be read", self.name))?;
        self.mark = *begin;
        Ok(())
    }

    fn next(&mut self) -> Result<Option<Vec<u8>>> {
        let mut line = Vec::new();
        let read = self.reader.by_ref().take(LINE_BYTES).read_until(b'\n', &mut line);
        let read = read.with_context(|| format!("{} cannot be read", self.name))? as u64;
        if read == 0 {
            return Ok(None);
        }
        self.mark.pass(&line);
        if line.pop_if(|last| *last == b'\n').is_none() && read == LINE_BYTES {
            return Err(anyhow!("it is longer than any line can be")).with_context(|| self.place(self.mark.line));
        }
        Ok(Some(line))
    }

    fn place(&self, line: u64) -> String {
        format!("line {line} of {}", self.name)
    }
}

/// What is asked for a line.
struct Put {
    key: String,
    target: String,
    content_type: Option<String>,
    value: Vec<u8>,
}

/// None for what has expired.
fn put_of(line: &[u8]) -> Result<Option<Put>, String> {
    let record = Record::parse(line)?;
    let mut target = path_of(&record.key);
    match record.life() {
        Life::Forever => {}
        Life::Seconds(seconds) => add(&mut target, "ttl", &seconds.to_string()),
        Life::Over => return Ok(None),
    }
    let (key, content_type) = (record.key.clone(), record.content_type.clone());
    Ok(Some(Put { key, target, content_type, value: record.into_value()? }))
}

/// A line on its way: its number, which tells it from others, and what to put.
struct Job {
    line: u64,
    put: Put,
}

/// What became of a line.
type Answer = (u64, Result<()>);

struct Import<'l> {
    server: &'l Server,
    marks: Option<&'l CheckpointFile>,
    progress: ProgressBar,
    /// Everything up to here was answered.
    mark: Checkpoint,
    /// The lines after it that were read, and whether they were answered.
    ahead: VecDeque<(Checkpoint, bool)>,
    kept: Instant,
}

impl Import<'_> {
    /// Gives how far it came, and what stopped it before the end.
    fn run(mut self, source: &mut Source) -> Result<(Checkpoint, Option<Error>)> {
        let stopped = AtomicBool::new(false);
        let failed = thread::scope(|scope| {
            let (done, answers) = channel();
            let workers = (0..CONNECTIONS).map(|_| {
                let (jobs, work) = channel();
                let (server, done, stopped) = (self.server, done.clone(), &stopped);
                scope.spawn(move || put_all(server, &work, &done, stopped));
                jobs
            });
            let workers: Vec<Sender<Job>> = workers.collect();
            drop(done);
            let mut failed = self.feed(source, &workers, &answers).err();
            // They end when they have put all that they were handed, or one of them failed.
            drop(workers);
            for answer in answers {
                failed = failed.or(self.answered(answer, source).err());
            }
            failed
        });
        self.progress.finish_and_clear();
        self.keep()?;
        Ok((self.mark, failed))
    }

    /// Hands all lines to the workers, and never too many at once.
    fn feed(&mut self, source: &mut Source, workers: &[Sender<Job>], answers: &Receiver<Answer>) -> Result<()> {
        while let Some(line) = source.next()? {
            let put = put_of(&line).map_err(Error::msg).with_context(|| source.place(source.mark.line))?;
            self.ahead.push_back((source.mark, put.is_none()));
            self.settle()?;
            if let Some(put) = put {
                // The same key goes to the same worker, which keeps its order.
                let mut hash = DefaultHasher::new();
                put.key.hash(&mut hash);
                let worker = &workers[hash.finish() as usize % workers.len()];
                if worker.send(Job { line: source.mark.line, put }).is_err() {
                    // It stopped because of another one, whose answer tells why.
                    return Ok(());
                }
            }
            while let Some(answer) = if self.is_far_ahead() { answers.recv().ok() } else { answers.try_recv().ok() } {
                self.answered(answer, source)?;
            }
        }
        Ok(())
    }

    fn is_far_ahead(&self) -> bool {
        let bytes = self.ahead.back().map_or(0, |(last, _)| last.bytes - self.mark.bytes);
        self.ahead.len() >= AHEAD_LINES || bytes >= AHEAD_BYTES
    }

    fn answered(&mut self, (line, answer): Answer, source: &Source) -> Result<()> {
        answer.with_context(|| source.place(line))?;
        let at = (line - self.mark.line - 1) as usize;
        if let Some((_, answered)) = self.ahead.get_mut(at) {
            *answered = true;
        }
        self.settle()
    }

    /// Moves the mark. The first line ahead of it is one that was not answered.
    fn settle(&mut self) -> Result<()> {
        while let Some((mark, _)) = self.ahead.pop_front_if(|(_, answered)| *answered) {
            self.mark = mark;
        }
        self.progress.set_position(self.mark.bytes);
        if self.kept.elapsed() >= KEEP {
            self.keep()?;
        }
        Ok(())
    }

    fn keep(&mut self) -> Result<()> {
        self.kept = Instant::now();
        self.marks.map_or(Ok(()), |marks| marks.keep(&self.mark))
    }
}

/// The work of one connection.
fn put_all(server: &Server, work: &Receiver<Job>, done: &Sender<Answer>, stopped: &AtomicBool) {
    for Job { line, put } in work {
        let headers: Vec<_> = put.content_type.iter().map(|kind| ("content-type", kind.as_str())).collect();
        let ask = Ask { method: "PUT", target: &put.target, headers: &headers, body: Some(&put.value) };
        let answer = loop {
            if stopped.load(Ordering::Relaxed) {
                return;
            }
            match server.ask(&ask) {
                // It asks too often, or the server is not ready: nothing happened.
                Err(Failure::Refused { status: 429 | 503, again_after: Some(time), .. }) => thread::sleep(time),
                answer => break answer.map(drop),
            }
        };
        if answer.is_err() {
            stopped.store(true, Ordering::Relaxed);
        }
        let answer = answer.with_context(|| format!("put {}", put.key));
        if done.send((line, answer)).is_err() {
            return;
        }
    }
}
