//! The log in Postgres: durable PUTs beside what the same database gives a program that makes one INSERT of each, as the
//! service in the book does, one after the other, and from as many connections as there are clients.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use futures_util::future::try_join_all;
use tokio::runtime::Builder;
use tokio::task;
use tokio_postgres::NoTls;

use crate::load::load;
use crate::peers;
use crate::process::{Server, median};
use crate::report::{Report, number};

const ROUNDS: usize = 5;
const TIME: Duration = Duration::from_secs(3);
const CONNECTIONS: u32 = 64;

const TABLE: &str =
    "CREATE TABLE transactions (sequence BIGSERIAL PRIMARY KEY, event_type SMALLINT, key TEXT, value TEXT)";
const INSERT: &str = "INSERT INTO transactions (event_type, key, value) VALUES (2, $1, $2)";

pub fn run(data: &Path, report: &mut Report) -> Result<()> {
    let postgres = peers::postgres(data)?;
    report.uses("psql", &["--version"]);
    let url = format!("postgres://postgres@{}/postgres?sslmode=disable", postgres.address);
    let kvs = Server::kvs("kvs", &data.join("kvs"), &["--txlog", &url])?;
    let threads = Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    threads.block_on(async {
        let (client, connection) = tokio_postgres::connect(&url, NoTls).await?;
        task::spawn(connection);
        client.batch_execute(TABLE).await
    })?;
    report.table(
        format!(
            "Log in Postgres: {CONNECTIONS} connections, 100-byte values, medians of {ROUNDS} rounds of {} s each",
            TIME.as_secs()
        ),
        &["PUT/s", "of one INSERT each, one after the other", "of one INSERT each, on as many connections"],
    );
    let mut rounds = Vec::new();
    for _ in 0..ROUNDS {
        let one = threads.block_on(inserts(&url, 1))?;
        let put = load("PUT", 10_000, CONNECTIONS, TIME).wrk(&kvs)?.per_second;
        let many = threads.block_on(inserts(&url, CONNECTIONS))?;
        rounds.push((put, put / one, put / many));
    }
    let median = |of: fn(&(f64, f64, f64)) -> f64| median(rounds.iter().map(of));
    report.row(vec![
        number(median(|round| round.0), 0),
        number(median(|round| round.1), 1),
        number(median(|round| round.2), 1),
    ]);
    Ok(())
}

/// INSERTs a second, from this many connections.
async fn inserts(url: &str, connections: u32) -> Result<f64> {
    let value = "x".repeat(100);
    let inserting = (0..connections).map(|number| {
        let (url, value) = (url.to_owned(), value.clone());
        async move {
            let (client, connection) = tokio_postgres::connect(&url, NoTls).await?;
            task::spawn(connection);
            let insert = client.prepare(INSERT).await?;
            let (begun, mut count) = (Instant::now(), 0_u32);
            while begun.elapsed() < TIME {
                client.execute(&insert, &[&format!("key-{number}-{}", count % 10_000), &value]).await?;
                count += 1;
            }
            Ok::<_, tokio_postgres::Error>(f64::from(count) / begun.elapsed().as_secs_f64())
        }
    });
    Ok(try_join_all(inserting).await.context("an INSERT failed")?.iter().sum())
}
