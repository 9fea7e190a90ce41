//! The host's own log lines on standard error: for people, or each a JSON object. Whatever is logged, no token is in it.
//!
//! They go through a queue to a thread of their own, so that nothing that logs depends on standard error: see `queue`.

mod queue;

use std::borrow::Cow;
use std::fmt::{self, Display};
use std::io::{self, IsTerminal, Write, stderr};
use std::panic;
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
use crate::edge::auth::MARK;

/// Digits that a word needs behind the mark of tokens to be taken for one, or for a part of one.
const DIGITS: usize = 16;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    Text,
    Json,
}

/// Lines on their way to standard error, of which a process has one.
static LINES: Queue = Queue::new();

/// Whether the thread that writes them runs.
static BEGUN: AtomicBool = AtomicBool::new(false);

/// The longest wait for standard error at the end of the process.
const LAST_LINES: Duration = Duration::from_secs(1);

/// Starts writing lines. From here on a panic is one, too.
pub fn begin(format: Format, filter: &str, env: &Env) -> Result<()> {
    let filter: Targets = filter.parse().with_context(|| format!("--log-filter {filter}"))?;
    let clock = env.clock.clone();
    let write = move || -> Result<()> {
        let lost = |lost| warn!(lost, "log lines were lost: standard error did not take them");
        LINES.write_all(&mut Stderr, &clock, lost)
    };
    env.tasks.restart_thread("log lines", &env.clock, write).context("no thread for log lines")?;
    BEGUN.store(true, Ordering::Release);
    // What the library itself would print, it prints by a macro that panics when standard error is gone.
    let lines = tracing_subscriber::fmt().with_max_level(LevelFilter::TRACE).log_internal_errors(false);
    let lines = lines.with_writer(|| Line);
    match format {
        Format::Text => lines.with_target(false).with_ansi(stderr().is_terminal()).finish().with(filter).init(),
        Format::Json => lines.event_format(Json).finish().with(filter).init(),
    }
    panic::set_hook(Box::new(|panic| {
        let (thread, at) = (thread::current(), panic.location().map(ToString::to_string));
        error!(thread = thread.name(), at, "a thread panicked: {}", panic.payload_as_str().unwrap_or_default());
        // Where nothing unwinds, this is the end.
        if cfg!(panic = "abort") {
            end();
        }
    }));
    Ok(())
}

/// Waits until the lines so far are written, but not for long.
pub fn end() {
    LINES.flush(LAST_LINES);
}

/// The last words of the program: why it failed, in one line.
pub fn failed(format: Format, reason: &str) {
    notice(match format {
        Format::Text => format!("kvs: {reason}"),
        Format::Json => format!("{{\"level\":\"ERROR\",\"message\":{}}}", Value::from(reason)),
    });
}

/// A line for the person who runs a command, as it is.
pub fn notice(line: impl Display) {
    let line = format!("{line}\n");
    if BEGUN.load(Ordering::Acquire) {
        LINES.push(line.as_bytes());
    } else {
        // Where it is gone there is nobody to tell.
        let _ = stderr().write_all(line.as_bytes());
    }
}

/// The reason why lines are lost now.
pub fn failure() -> Option<String> {
    LINES.failure()
}

/// Adds the number of lines that were lost.
pub fn measure(metrics: &Metrics) {
    metrics.add(Arc::new(Lost));
}

struct Lost;

impl Measured for Lost {
    fn measure(&self, page: &mut Page<'_>) -> fmt::Result {
        page.counter("log_lines_lost", "Log lines that standard error did not take", LINES.lost())
    }
}

/// Takes a line to the queue, whole.
struct Line;

impl Write for Line {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        match str::from_utf8(line) {
            Ok(text) => LINES.push(without_tokens(text).as_bytes()),
            Err(_) => LINES.push(line),
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Standard error, without its lock: a thread that holds it may never give it up.
struct Stderr;

impl Write for Stderr {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(rustix::io::write(stderr(), bytes)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
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
