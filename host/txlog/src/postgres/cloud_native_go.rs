//! The table of the service in *Cloud Native Go*: `transactions(sequence, event_type, key, value)`, to be read only.

use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use tokio::runtime::Builder;
use tokio_postgres::Row;

use super::Url;
use super::batch::{DELETE, PUT};
use super::session::Session;
use super::target::Target;
use crate::{Event, Put};

const TIMEOUT: Duration = Duration::from_secs(30);
/// Casts, since the book leaves the column types open.
const ROWS: &str =
    "SELECT sequence::bigint, event_type::smallint, key::text, value::text FROM transactions ORDER BY sequence";

/// Calls `each` with every event of the table, in order. An error names the row.
pub fn each(url: &Url, each: &mut dyn FnMut(Event) -> Result<()>) -> Result<()> {
    let target = Target::new(url, TIMEOUT).context("the URL of --from cannot be used")?;
    let runtime =
        Builder::new_multi_thread().worker_threads(1).enable_all().build().context("cannot start a thread")?;
    let reading = async {
        let session = Session::connect(&target, TIMEOUT, "SET default_transaction_read_only = on").await?;
        let mut rows = session.rows(ROWS, &[]).await?;
        let mut previous = None;
        while let Some(row) = rows.next().await? {
            let sequence: i64 = row.try_get(0)?;
            let place = || format!("the row with sequence {sequence}");
            if previous == Some(sequence) {
                return Err(anyhow!("the sequence is duplicated")).with_context(place);
            }
            previous = Some(sequence);
            each(event(&row).with_context(place)?).with_context(place)?;
        }
        Ok(())
    };
    runtime.block_on(reading).with_context(|| format!("cannot read the table transactions of the {}", target.name()))
}

fn event(row: &Row) -> Result<Event> {
    let key = row.try_get::<_, Option<String>>(2)?.context("it has no key")?;
    Ok(match row.try_get::<_, Option<i16>>(1)? {
        Some(DELETE) => Event::Delete(key),
        Some(PUT) => {
            let value = row.try_get::<_, Option<String>>(3)?.context("it puts no value")?;
            Event::Put(Put { key, value: value.into_bytes(), metadata: Vec::new(), expires: None })
        }
        kind => bail!("its event_type is {kind:?}, but must be 1 or 2"),
    })
}
