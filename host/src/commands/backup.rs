//! `kvs backup`: takes a backup of the log of a running server, or checks one.

use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::process;

use anyhow::{Context, Result, anyhow};
use indicatif::ProgressBar;
use kvs_client::{ApiRequest, Output};
use kvs_txlog::backup::{Reader, Trailer};
use kvs_txlog::file::disk::sync_directory;
use serde_json::{Value, json};

use super::client::{AdminArgs, OutputArgs, READ_TIMEOUT};
use crate::admin::ENTRIES_HEADER;
use crate::lines::notice;
use crate::terminal::{bar, bar_beside_output};

#[derive(Debug, clap::Args)]
pub struct Backup {
    /// File to write; - is standard output. It appears when the backup is complete, in place of an older one
    #[arg(short = 'o', long, value_name = "FILE", required_unless_present = "verify")]
    to: Option<PathBuf>,

    /// Only the entries after this sequence, with which the backup before ended
    #[arg(long, value_name = "SEQUENCE", default_value_t = 0)]
    since: u64,

    /// Check every byte of this backup, and print what is in it; exit code 1 if it is corrupted
    #[arg(long, value_name = "FILE", conflicts_with_all = ["to", "since"])]
    verify: Option<PathBuf>,

    #[command(flatten)]
    output: OutputArgs,

    #[command(flatten)]
    admin: AdminArgs,
}

pub fn run(args: &Backup) -> Result<()> {
    if let Some(file) = &args.verify {
        return verify(file, args.output.output());
    }
    let file = args.to.as_deref().unwrap_or(Path::new("-"));
    if file.as_os_str() == "-" {
        let mut out = io::stdout().lock();
        let trailer = receive(args, &mut out, bar_beside_output).context("no backup on standard output")?;
        // Also where nobody reads any more.
        out.flush().map_err(|error| anyhow!("no backup on standard output: {error}"))?;
        notice(summary(&trailer, args.since));
        return Ok(());
    }
    let trailer = receive_file(args, file)?;
    notice(summary(&trailer, args.since));
    // For scripts: the next incremental backup begins here.
    let next = trailer.sequence.to_string();
    args.output.output().print(Some(&next), || object(&trailer, args.since), &mut io::stdout())?;
    Ok(())
}

/// Writes a backup to a file that gets its name when it is complete and durable. A device or a pipe is written directly.
fn receive_file(args: &Backup, file: &Path) -> Result<Trailer> {
    let cannot_write = || format!("cannot write {}", file.display());
    // A link stays a link.
    let file = &fs::canonicalize(file).unwrap_or_else(|_| file.into());
    if fs::metadata(file).is_ok_and(|there| !there.is_file()) {
        let mut out = File::options().write(true).open(file).with_context(cannot_write)?;
        return receive(args, &mut out, bar).with_context(|| format!("no backup in {}", file.display()));
    }
    let mut temporary = file.as_os_str().to_owned();
    // Another command can write the same backup.
    temporary.push(format!(".{}.incomplete", process::id()));
    let temporary = PathBuf::from(temporary);
    let written = File::create(&temporary).with_context(cannot_write).and_then(|created| {
        let mut out = BufWriter::with_capacity(1 << 16, &created);
        let trailer = receive(args, &mut out, bar).with_context(|| format!("no backup in {}", file.display()))?;
        out.flush().with_context(cannot_write)?;
        drop(out);
        created.sync_all().with_context(cannot_write)?;
        fs::rename(&temporary, file).with_context(cannot_write)?;
        Ok(trailer)
    });
    // What is there under the name stays; a file that cannot be removed is no backup.
    let trailer = written.inspect_err(|_| drop(fs::remove_file(&temporary)))?;
    let parent = file.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    sync_directory(parent)?;
    Ok(trailer)
}

/// Requests a backup, and checks it on the way to the output.
fn receive(args: &Backup, out: &mut dyn Write, bar: fn(u64, &'static str) -> ProgressBar) -> Result<Trailer> {
    let server = args.admin.server(Some(READ_TIMEOUT))?;
    let target = format!("/backup?since={}", args.since);
    let request = ApiRequest { method: "GET", target: &target, headers: &[], body: None };
    let response = server.send(&request)?;
    let entries = response.headers().get(ENTRIES_HEADER).and_then(|entries| entries.to_str().ok()?.parse().ok());
    let entries = entries.with_context(|| format!("{} is not an admin listener of kvs", server.base()))?;
    let bar = bar(entries, "entries");
    let input = response.into_body().into_reader();
    let mut reader = Reader::new(Tee { input, out })?;
    let trailer = reader.read(&mut |entries| {
        bar.inc(entries.len() as u64);
        Ok(())
    })?;
    bar.finish_and_clear();
    Ok(trailer)
}

/// Writes all that is read.
struct Tee<'o, R> {
    input: R,
    out: &'o mut dyn Write,
}

impl<R: Read> Read for Tee<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.input.read(buffer)?;
        // Also where nobody reads any more: what was written is no backup.
        self.out.write_all(&buffer[..read]).map_err(|error| io::Error::other(format!("cannot write it: {error}")))?;
        Ok(read)
    }
}

fn verify(file: &Path, output: Output) -> Result<()> {
    let context = || format!("cannot use {}", file.display());
    let opened = File::open(file).with_context(context)?;
    let bar = bar(opened.metadata().map_or(0, |metadata| metadata.len()), "bytes checked");
    let mut reader = Reader::new(bar.wrap_read(BufReader::with_capacity(1 << 16, opened))).with_context(context)?;
    let trailer = reader.read(&mut |_| Ok(())).with_context(context)?;
    bar.finish_and_clear();
    let mut out = io::stdout().lock();
    let header = reader.header();
    if output == Output::Json {
        let mut object = object(&trailer, header.since);
        object["log"] = header.log.to_string().into();
        writeln!(out, "{object}")?;
        return Ok(());
    }
    writeln!(out, "log {}, incarnation {}", header.log, trailer.incarnation)?;
    writeln!(out, "the backup is sound: {}", summary(&trailer, header.since))?;
    Ok(())
}

/// The contents of a backup as JSON, with sequences as text.
fn object(trailer: &Trailer, since: u64) -> Value {
    let Trailer { count, sequence, incarnation, .. } = trailer;
    json!({
        "entries": count, "since": since.to_string(), "sequence": sequence.to_string(),
        "incarnation": incarnation.to_string(),
    })
}

fn summary(trailer: &Trailer, since: u64) -> String {
    let Trailer { count, sequence, .. } = trailer;
    format!("{count} entries after sequence {since} up to {sequence}")
}
