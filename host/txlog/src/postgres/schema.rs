//! The schema `kvs`, and its migrations.

use anyhow::{Context, Result, ensure};

use super::opening::Existing;
use super::session::Session;

/// Migrations, each to the next version. Existing ones never change.
const MIGRATIONS: &[&str] = &[
    include_str!("schema.sql"),
    // Compaction creates the index for each run.
    "DROP INDEX kvs.transactions_key",
    include_str!("incarnations.sql"),
    include_str!("lease.sql"),
    // Older versions noted only at the end of a compaction how far it came. What is missing beyond that was not lost.
    "UPDATE kvs.writer SET compacted = greatest(compacted, last)",
];

/// Why nothing is restored into a database.
pub const NOT_EMPTY: &str =
    "there is a log in it already: a backup is restored into an empty database; give another with --txlog";

/// Advisory lock of a migration, until the end of the transaction.
const LOCK: i64 = 0x6b76_7300;

/// Current version of the schema.
pub const VERSION: usize = MIGRATIONS.len();

/// Makes the schema, if one is to be begun, or brings it up to date. Returns the version that it had. Nothing is changed where
/// there must be no log, and is one.
pub async fn prepare(session: &Session, existing: Existing) -> Result<usize> {
    let there = session.one("SELECT to_regclass('kvs.migrations') IS NOT NULL", &[]).await?;
    let version = if there.try_get(0)? { version(session).await? } else { 0 };
    ensure!(version > 0 || existing != Existing::Required, "there is no log in it");
    if version > 0 && existing == Existing::Refused {
        let last: i64 = session.one("SELECT last FROM kvs.writer", &[]).await?.try_get(0)?;
        ensure!(last == 0, NOT_EMPTY);
    }
    ensure!(
        version <= VERSION,
        "its schema kvs is of version {version}, and this kvs knows versions up to {VERSION}: use the kvs that made it, or a \
         newer one"
    );
    if version < VERSION {
        migrate(session).await.context("the schema kvs cannot be made or brought up to date")?;
    }
    Ok(version)
}

async fn version(session: &Session) -> Result<usize> {
    let row = session.one("SELECT coalesce(max(version), 0)::bigint FROM kvs.migrations", &[]).await?;
    Ok(usize::try_from(row.try_get::<_, i64>(0)?)?)
}

async fn migrate(session: &Session) -> Result<()> {
    let begin = format!(
        "BEGIN; SELECT pg_advisory_xact_lock({LOCK}); CREATE SCHEMA IF NOT EXISTS kvs; CREATE TABLE IF NOT EXISTS \
         kvs.migrations (version int PRIMARY KEY, time timestamptz NOT NULL DEFAULT now())"
    );
    session.run(&begin).await?;
    // Another process may have migrated in the meantime.
    for (index, migration) in MIGRATIONS.iter().enumerate().skip(version(session).await?) {
        session.run(migration).await?;
        session.run(&format!("INSERT INTO kvs.migrations (version) VALUES ({})", index + 1)).await?;
    }
    session.run("COMMIT").await?;
    Ok(())
}
