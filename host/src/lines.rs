//! Diagnostics: log lines on standard error, as text or as JSON objects, with tokens redacted.
//!
//! Lines go through a queue to their own thread, so that logging never blocks on standard error: see `queue`.

mod queue;

use std::borrow::Cow;
use std::fmt::{self, Display};
use std::io::{self, IsTerminal, Write, stderr};
use std::panic;
use std::process::abort;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::ValueEnum;
use kvs_metrics::{Measured, Metrics, Page};
use kvs_runtime::Env;
use serde_json::Value;
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber, error, warn};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;

use self::queue::Queue;
use crate::audit;
use crate::edge::auth::TOKEN_PREFIX;
use crate::workers;

/// Number of digits after the prefix of tokens from which a word is redacted as a token, or a part of one.
const REDACTED_DIGITS: usize = 16;

/// Format of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    Text,
    Json,
}

/// Queue of lines to standard error, one per process.
static LINES: Queue = Queue::new();

/// Whether the thread that writes lines is running.
static BEGUN: AtomicBool = AtomicBool::new(false);

/// Timeout of standard error at the end of the process.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

/// Starts the logger. From here on panics are logged too.
pub fn begin(format: Format, filter: &str, env: &Env) -> Result<()> {
    // The client of NATS returns its errors, and logs them as well: a failed start would say it twice.
    let filter: Targets =
        format!("async_nats=off,{filter}").parse().with_context(|| format!("--log-filter {filter}"))?;
    let clock = env.clock.clone();
    let write = move || -> Result<()> {
        let lost = |lost| warn!(lost, "log lines were lost: standard error did not take them");
        LINES.write_all(&mut Stderr, &clock, lost)
    };
    env.tasks.restart_thread("log lines", &env.clock, write).context("cannot start a thread for log lines")?;
    BEGUN.store(true, Ordering::Release);
    // The library prints its internal errors by a macro that panics when standard error is closed.
    let lines = tracing_subscriber::fmt().with_max_level(LevelFilter::TRACE).log_internal_errors(false);
    let lines = lines.with_writer(|| Line);
    match format {
        Format::Text => lines.with_target(false).with_ansi(stderr().is_terminal()).finish().with(filter).init(),
        Format::Json => lines.event_format(Json).finish().with(filter).init(),
    }
    panic::set_hook(Box::new(|panic| {
        let (thread, at) = (thread::current(), panic.location().map(ToString::to_string));
        error!(thread = thread.name(), at, "thread panicked: {}", panic.payload_as_str().unwrap_or_default());
        // The process aborts next.
        if cfg!(panic = "abort") {
            end();
        }
        if workers::is_between_tasks() {
            end();
            abort();
        }
    }));
    Ok(())
}

/// Flushes the lines, with a timeout.
pub fn end() {
    LINES.flush(FLUSH_TIMEOUT);
}

/// Prints the fatal error of the program, as its last line.
pub fn failed(format: Format, reason: &str) {
    notice(match format {
        Format::Text => format!("kvs: {reason}"),
        Format::Json => format!("{{\"level\":\"ERROR\",\"message\":{}}}", Value::from(reason)),
    });
}

/// Prints a line for the user of a command, without formatting.
pub fn notice(line: impl Display) {
    let line = format!("{line}\n");
    if BEGUN.load(Ordering::Acquire) {
        LINES.push(line.as_bytes());
    } else {
        // An error of standard error cannot be reported.
        let _ = stderr().write_all(line.as_bytes());
    }
}

/// Returns the reason why lines are being lost.
pub fn failure() -> Option<String> {
    LINES.failure()
}

/// Registers the metric of lost lines.
pub fn measure(metrics: &Metrics) {
    metrics.add(Arc::new(Lost));
}

struct Lost;

impl Measured for Lost {
    fn measure(&self, page: &mut Page<'_>) -> fmt::Result {
        page.counter("log_lines_lost", "Log lines lost because standard error could not be written", LINES.lost())
    }
}

/// Writer that puts complete lines into the queue.
struct Line;

impl Write for Line {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        match str::from_utf8(line) {
            Ok(text) => LINES.push(redact_tokens(text).as_bytes()),
            Err(_) => LINES.push(line),
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Standard error without its lock, which a blocked thread may hold forever.
struct Stderr;

impl Write for Stderr {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(rustix::io::write(stderr(), bytes)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Redacts tokens in a text, which can be in a path or in the output of a guest.
pub fn redact_tokens(text: &str) -> Cow<'_, str> {
    let mut shown = Cow::Borrowed(text);
    let mut from = 0;
    while let Some(at) = shown[from..].find(TOKEN_PREFIX) {
        from += at + TOKEN_PREFIX.len();
        let digits = shown[from..].bytes().take_while(u8::is_ascii_hexdigit).count();
        if digits >= REDACTED_DIGITS {
            shown.to_mut().replace_range(from..from + digits, "…");
        }
    }
    shown
}

/// JSON format of log lines.
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
        if event.metadata().target() == audit::TARGET {
            write!(line, ",\"target\":\"{}\"", audit::TARGET)?;
        }
        let mut fields = Fields { line: line.by_ref(), result: Ok(()) };
        event.record(&mut fields);
        fields.result?;
        line.write_str("}\n")
    }
}

/// Visitor that appends each field to the line.
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
    fn tokens_are_redacted() {
        let token = format!("kvs_{}", "0123456789abcdef".repeat(4));
        for (text, shown) in [
            ("nothing".to_owned(), "nothing"),
            (token.clone(), "kvs_…"),
            (format!("GET /v1/{token}?x={token} again kvs_"), "GET /v1/kvs_…?x=kvs_… again kvs_"),
            ("kvs_kvs_metrics_total kvs_0123".to_owned(), "kvs_kvs_metrics_total kvs_0123"),
            (format!("kvs_{token}é"), "kvs_kvs_…é"),
        ] {
            assert_eq!(redact_tokens(&text), shown);
        }
    }
}
