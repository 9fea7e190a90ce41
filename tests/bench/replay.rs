//! Replay: the cost of reading a log alone, and of reading it into the default guest.
//!
//! Both are the work of one thread, and what counts is its CPU time: the machine has other things to do.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Result, bail, ensure};
use kvs_runtime::Env;
use kvs_txlog::file::{DEFAULT_SEGMENT_BYTES, Durability, FileLog, Offline, Options};
use kvs_txlog::{AppendError, Event, Put, TransactionLog};

use crate::process::{Server, median, status_bytes, thread_seconds};
use crate::report::{Report, number};

/// The argument that makes the benchmark's binary read a log and nothing else.
pub const SCAN: &str = "scan";

const ROUNDS: usize = 3;
/// With more entries a round is long enough to be the only one.
const LONG: u64 = 1_000_000;
const ENTRIES: [u64; 4] = [10_000, 100_000, 1_000_000, 10_000_000];

/// One round: seconds of CPU, and bytes of memory; and of those the guest's.
struct Round {
    scan: (f64, f64),
    guest: (f64, f64, f64),
}

pub fn run(data: &Path, report: &mut Report) -> Result<()> {
    report.table(
        format!("Replay: 100-byte values, every key once, medians of {ROUNDS} rounds"),
        &[
            "entries",
            "log alone, entries/s of CPU",
            "memory, MB",
            "into the default guest, entries/s of CPU",
            "memory, MB",
            "of it the guest's, beside key and value, bytes an entry",
        ],
    );
    for entries in ENTRIES {
        let data = data.join(entries.to_string());
        let bytes = write(&data, entries, 100, scattered)?;
        let mut rounds = Vec::new();
        for _ in 0..if entries > LONG { 1 } else { ROUNDS } {
            rounds.push(Round { scan: scan_apart(&data, entries)?, guest: serve(&data)? });
        }
        fs::remove_dir_all(&data)?;
        let median = |of: fn(&Round) -> f64| median(rounds.iter().map(of));
        let beside = (median(|round| round.guest.2) - bytes) / entries as f64;
        report.row(vec![
            entries.into(),
            number(entries as f64 / median(|round| round.scan.0), 0),
            number(median(|round| round.scan.1) / 1e6, 0),
            number(entries as f64 / median(|round| round.guest.0), 0),
            number(median(|round| round.guest.1) / 1e6, 0),
            number(beside, 0),
        ]);
    }
    Ok(())
}

/// Keys in no order, as they come.
fn scattered(number: u64) -> String {
    format!("key-{:016x}", number.wrapping_mul(0x9e37_79b9_7f4a_7c15))
}

/// Writes a log of a number of keys with values of a number of bytes, and returns the bytes of both.
pub fn write(data: &Path, entries: u64, value: usize, key: impl Fn(u64) -> String) -> Result<f64> {
    let (segment_bytes, group_bytes) = (DEFAULT_SEGMENT_BYTES, 1 << 20);
    let (durability, advertise, env) = (Durability::Os, None, Env::real());
    let log = FileLog::open(Options {
        data: data.into(),
        segment_bytes,
        group_bytes,
        durability,
        retain: Duration::ZERO,
        advertise,
        env,
    })?;
    let time = SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis() as u64;
    let mut bytes = 0;
    for number in 0..entries {
        let key = key(number);
        bytes += key.len() + value;
        let put = Event::Put(Put { key, value: vec![b'x'; value], metadata: Vec::new(), expires: None });
        while let Err(error) = log.append(time, std::slice::from_ref(&put)) {
            ensure!(matches!(error, AppendError::Unavailable) && log.failure().is_none(), "cannot append: {error:?}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    log.close()?;
    Ok(bytes as f64)
}

/// Reads the log in a process of its own, whose memory is nothing else.
fn scan_apart(data: &Path, entries: u64) -> Result<(f64, f64)> {
    let output = Command::new(std::env::current_exe()?).arg(SCAN).arg(data).output()?;
    let text = String::from_utf8(output.stdout)?;
    let numbers = text.split_whitespace().map(str::parse).collect::<Result<Vec<f64>, _>>()?;
    let [read, seconds, bytes] = numbers[..] else { bail!("the scan said {text:?}") };
    ensure!(read == entries as f64, "{read} of {entries} entries are there");
    Ok((seconds, bytes))
}

/// That process: says how many entries there were, how long it took, and the most memory it had.
pub fn scan(data: &Path) -> Result<()> {
    let mut entries = 0;
    Offline::open(data)?.replay(0, &mut |batch| {
        entries += batch.len();
        Ok(())
    })?;
    println!("{entries} {} {}", thread_seconds("self", "")?, status_bytes("self", "VmHWM:")?);
    Ok(())
}

/// Serves from the log. Until it serves, its threads named tokio do nothing but replay.
fn serve(data: &Path) -> Result<(f64, f64, f64)> {
    let server = Server::kvs("kvs", data, &[])?;
    let guest = server.metric("kvs_guest_memory_bytes")?;
    Ok((thread_seconds(&server.id(), "tokio")?, status_bytes(&server.id(), "VmRSS:")?, guest))
}
