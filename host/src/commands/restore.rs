//! `kvs restore`: makes a log out of backups.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use kvs_runtime::Env;
use kvs_txlog::Incarnation;
use kvs_txlog::backup::{Until, check};
#[cfg(feature = "nats")]
use kvs_txlog::cluster::nats;
use kvs_txlog::file;
use kvs_txlog::postgres::PostgresLog;
use serde_json::json;

use super::client::OutputArgs;
use super::txlog::StorageArgs;
use crate::audit::{self, Actor};
use crate::lines::notice;
use crate::parse::until;
use crate::settings::TxlogStorage;
use crate::terminal::bar;

#[derive(Debug, clap::Args)]
pub struct Restore {
    /// A full backup, and then the incremental ones after it, in order
    #[arg(value_name = "FILE", required = true)]
    files: Vec<PathBuf>,

    /// Restore up to a sequence, or up to the first entry that is newer than a time: RFC 3339, or milliseconds since 1970 with
    /// `ms`
    #[arg(long, value_name = "SEQUENCE|TIME", value_parser = until)]
    until: Option<Until>,

    #[command(flatten)]
    to: StorageArgs,

    #[command(flatten)]
    output: OutputArgs,
}

pub fn run(args: &Restore) -> Result<()> {
    let object = match &args.to.txlog {
        TxlogStorage::File => args.to.data_dir.display().to_string(),
        // The URL may have a password.
        TxlogStorage::Postgres(url) => format!("{url:?}"),
        #[cfg(feature = "nats")]
        TxlogStorage::Nats(url) => format!("{url:?}"),
    };
    let restored = restore(args);
    let outcome = match &restored {
        Ok(Restored { last, .. }) => format!("success, up to sequence {last}"),
        Err(error) => format!("{error:#}"),
    };
    audit::log(&Actor::user(), "restore", object, outcome);
    let Restored { last, incarnation } = restored?;
    let object = || {
        json!({
            "sequence": last.to_string(), "incarnation": incarnation.id.to_string(), "first": incarnation.first.to_string(),
        })
    };
    args.output.output().print(None, object, &mut io::stdout())?;
    Ok(())
}

/// A log made out of backups.
struct Restored {
    /// The last restored sequence.
    last: u64,
    /// The incarnation that the log continues as.
    incarnation: Incarnation,
}

fn restore(args: &Restore) -> Result<Restored> {
    let Restore { files, until, to, output: _ } = args;
    if let TxlogStorage::File = &to.txlog {
        file::check_empty(&to.data_dir)?;
    }
    let size = |file: &PathBuf| file.metadata().map_or(0, |metadata| metadata.len());
    let bytes: u64 = files.iter().map(size).sum();
    // All is checked before anything is written.
    let chain = pass(bytes, "bytes checked", |open| check(files, *until, open))?;
    // What is missing comes first in NATS, and is known only after the entries.
    #[cfg(feature = "nats")]
    let bytes = if matches!(to.txlog, TxlogStorage::Nats(_)) { 2 * bytes } else { bytes };
    pass(bytes, "bytes restored", |open| {
        let replay = |receive: &mut kvs_txlog::Receive<'_>| chain.replay(open, receive);
        let restoration = chain.restoration(&Env::real().random, &replay)?;
        match &to.txlog {
            TxlogStorage::File => file::restore(&to.data_dir, &restoration)?,
            TxlogStorage::Postgres(url) => PostgresLog::restore(url, &restoration)?,
            #[cfg(feature = "nats")]
            TxlogStorage::Nats(url) => nats::restore(url, &restoration)?,
        }
        let (last, incarnation) = (restoration.last, restoration.incarnation);
        notice(format_args!(
            "restored up to sequence {last}; the log continues as incarnation {} with {}",
            incarnation.id, incarnation.first
        ));
        Ok(Restored { last, incarnation })
    })
}

/// Reads all backups once, with a progress bar.
fn pass<T>(
    bytes: u64,
    what: &'static str,
    work: impl FnOnce(&dyn Fn(&Path) -> Result<Box<dyn Read>>) -> Result<T>,
) -> Result<T> {
    let bar = bar(bytes, what);
    let done = work(&|path| {
        let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
        Ok(Box::new(bar.wrap_read(BufReader::with_capacity(1 << 16, file))))
    });
    bar.finish_and_clear();
    done
}
