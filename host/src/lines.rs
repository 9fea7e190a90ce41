//! The host's own log lines on standard error: for people, or each a JSON object. Whatever is logged, no token is in it.

use std::borrow::Cow;
use std::fmt;
use std::io::{self, IsTerminal, Write, stderr};
use std::mem::ManuallyDrop;

use anyhow::{Context, Result};
use clap::ValueEnum;
use serde_json::Value;
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;

use crate::edge::auth::MARK;

/// Digits that a word needs behind the mark of tokens to be taken for one, or for a part of one.
const DIGITS: usize = 16;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    Text,
    Json,
}

/// From here on lines are written.
pub fn begin(format: Format, filter: &str) -> Result<()> {
    let filter: Targets = filter.parse().with_context(|| format!("--log-filter {filter}"))?;
    let lines = tracing_subscriber::fmt().with_max_level(LevelFilter::TRACE).with_writer(|| Stderr);
    match format {
        Format::Text => lines.with_target(false).with_ansi(stderr().is_terminal()).finish().with(filter).init(),
        Format::Json => lines.event_format(Json).finish().with(filter).init(),
    }
    Ok(())
}

/// The last words of the program: why it failed, in one line.
pub fn failed(format: Format, reason: &str) {
    // Never given back: threads that nobody waits for have nothing to say any more.
    let mut stderr = ManuallyDrop::new(stderr().lock());
    // Where it is gone there is nobody to tell.
    let _ = match format {
        Format::Text => writeln!(stderr, "kvs: {reason}"),
        Format::Json => writeln!(stderr, "{{\"level\":\"ERROR\",\"message\":{}}}", Value::from(reason)),
    };
}

/// Where whole lines go.
struct Stderr;

impl Write for Stderr {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        match str::from_utf8(line) {
            Ok(text) => stderr().write_all(without_tokens(text).as_bytes())?,
            Err(_) => stderr().write_all(line)?,
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        stderr().flush()
    }
}

/// The text, without tokens that somebody may have put where none belongs: into a path, or what a guest prints.
fn without_tokens(text: &str) -> Cow<'_, str> {
    let mut shown = Cow::Borrowed(text);
    let mut from = 0;
    while let Some(at) = shown[from..].find(MARK) {
        from += at + MARK.len();
        let digits = shown[from..].bytes().take_while(u8::is_ascii_hexdigit).count();
        if digits >= DIGITS {
            shown.to_mut().replace_range(from..from + digits, "…");
        }
    }
    shown
}

struct Json;

impl<S, N> FormatEvent<S, N> for Json
where
    S: Subscriber + for<'s> LookupSpan<'s>,
    N: for<'w> FormatFields<'w> + 'static,
{
    fn format_event(&self, _: &FmtContext<'_, S, N>, mut line: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let mut time = String::new();
        SystemTime.format_time(&mut Writer::new(&mut time))?;
        write!(line, "{{\"time\":\"{time}\",\"level\":\"{}\"", event.metadata().level())?;
        let mut fields = Fields { line: line.by_ref(), result: Ok(()) };
        event.record(&mut fields);
        fields.result?;
        line.write_str("}\n")
    }
}

/// Writes each field behind the ones before it.
struct Fields<'l> {
    line: Writer<'l>,
    result: fmt::Result,
}

impl Fields<'_> {
    fn write(&mut self, field: &Field, value: Value) {
        self.result = self.result.and_then(|()| write!(self.line, ",\"{}\":{value}", field.name()));
    }
}

impl Visit for Fields<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.write(field, format!("{value:?}").into());
    }
    fn record_str(&mut self, field: &Field, value: &str) {
        self.write(field, value.into());
    }
    fn record_u64(&mut self, field: &Field, value: u64) {
        self.write(field, value.into());
    }
    fn record_i64(&mut self, field: &Field, value: i64) {
        self.write(field, value.into());
    }
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.write(field, value.into());
    }
    fn record_bool(&mut self, field: &Field, value: bool) {
        self.write(field, value.into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_not_shown() {
        let token = format!("kvs_{}", "0123456789abcdef".repeat(4));
        for (text, shown) in [
            ("nothing".to_owned(), "nothing"),
            (token.clone(), "kvs_…"),
            (format!("GET /v1/{token}?x={token} again kvs_"), "GET /v1/kvs_…?x=kvs_… again kvs_"),
            ("kvs_kvs_metrics_total kvs_0123".to_owned(), "kvs_kvs_metrics_total kvs_0123"),
            (format!("kvs_{token}é"), "kvs_kvs_…é"),
        ] {
            assert_eq!(without_tokens(&text), shown);
        }
    }
}
