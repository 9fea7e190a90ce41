//! Watch: prints changes of keys, one line each. It reconnects after a lost connection, and resumes after the last line.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value};

use super::output::Output;
use super::server::{ApiRequest, ClientError, Server, add, prefix_shown};

/// Maximum length of a line: more than the largest event with every byte escaped.
const LINE_BYTES: u64 = 8 << 30;
/// Backoff before a reconnect, at first and at most.
const MIN_BACKOFF: Duration = Duration::from_millis(100);
const MAX_BACKOFF: Duration = Duration::from_secs(5);

/// A server-sent event.
#[derive(Default)]
struct Event {
    id: Option<u64>,
    kind: String,
    data: String,
}

/// Prints changes until an error. `report` is called with a message when it reconnects.
pub fn watch(
    server: &Server,
    prefixes: &[String],
    since: Option<u64>,
    output: Output,
    out: &mut dyn Write,
    report: fn(&str),
) -> Result<()> {
    let (mut last, mut wait, mut watched) = (since, MIN_BACKOFF, false);
    loop {
        let mut target = "/v1?watch".to_owned();
        prefixes.iter().for_each(|prefix| add(&mut target, "prefix", prefix));
        if let Some(last) = last {
            add(&mut target, "since", &last.to_string());
        }
        match server.send(&ApiRequest { method: "GET", target: &target, headers: &[], body: None }) {
            Ok(response) => {
                (wait, watched) = (MIN_BACKOFF, true);
                let mut events = BufReader::new(response.into_body().into_reader());
                let lost = loop {
                    match next(&mut events, &mut last) {
                        Ok(event) => print(&event, output, out)?,
                        Err(lost) => break lost,
                    }
                };
                report(&format!("connection lost, reconnecting: {lost}"));
            }
            Err(failure) if watched && is_transient(&failure) => {}
            Err(failure) => {
                return Err(failure).with_context(|| format!("watch {}", prefix_shown(&prefixes.join(" "))));
            }
        }
        thread::sleep(wait);
        wait = MAX_BACKOFF.min(wait * 2);
    }
}

/// Returns whether a retry can succeed: a restarting server does not respond, or is not ready.
fn is_transient(failure: &ClientError) -> bool {
    match failure {
        ClientError::Transport { .. } => true,
        ClientError::Status { status, .. } => *status == 429 || *status >= 500,
    }
}

/// Reads the next event. `last` is set to the position to resume after.
fn next(events: &mut impl BufRead, last: &mut Option<u64>) -> io::Result<Event> {
    let mut event = Event::default();
    let mut line = String::new();
    loop {
        line.clear();
        events.by_ref().take(LINE_BYTES).read_line(&mut line)?;
        let Some(text) = line.strip_suffix('\n') else { return Err(io::Error::other("the server ended the stream")) };
        let (field, value) = text.split_once(": ").unwrap_or((text, ""));
        match field {
            "id" => event.id = value.parse().ok(),
            "event" => value.clone_into(&mut event.kind),
            "data" => value.clone_into(&mut event.data),
            // End of an event. One without data only has a position.
            "" if text.is_empty() => {
                *last = event.id.or(*last);
                if !event.data.is_empty() {
                    return Ok(event);
                }
                event = Event::default();
            }
            // A comment, or a field of a later version.
            _ => {}
        }
    }
}

fn print(event: &Event, output: Output, out: &mut dyn Write) -> Result<()> {
    let mut data: Map<String, Value> =
        serde_json::from_str(&event.data).context("the server sent a malformed event")?;
    let id = event.id.unwrap_or_default();
    if output == Output::Json {
        data.insert("sequence".to_owned(), id.to_string().into());
        data.insert("type".to_owned(), event.kind.as_str().into());
        writeln!(out, "{}", Value::Object(data))?;
        return Ok(());
    }
    let text = |name: &str| data.get(name).and_then(Value::as_str);
    write!(out, "{id} {} {:?}", event.kind, text("key").unwrap_or_default())?;
    if let Some(value) = text("value") {
        write!(out, " = {value:?}")?;
    } else if let Some(bytes) = text("value_base64").and_then(|base64| STANDARD.decode(base64).ok()) {
        write!(out, " = b\"{}\"", bytes.escape_ascii())?;
    }
    writeln!(out)?;
    out.flush()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stream_ends_after_last_complete_event() {
        let text = "id: 4\n\n:\n\nid: 7\nevent: put\ndata: {\"key\":\"a: b\",\"value\":\"x\\n\"}\n\n\
                    id: 8\nevent: put\ndata: {\"key\":\"c\",\"value_base64\":\"/w==\"}\n\n\
                    id: 9\nevent: delete\ndata: {\"key\":\"c\"}\n\nid: 10\nevent: put\nda";
        let mut stream = text.as_bytes();
        let (mut last, mut plain, mut json) = (None, Vec::new(), Vec::new());
        while let Ok(event) = next(&mut stream, &mut last) {
            assert_eq!(event.id, last);
            print(&event, Output::Text, &mut plain).expect("writing to a vector cannot fail");
            print(&event, Output::Json, &mut json).expect("writing to a vector cannot fail");
        }
        // The truncated event is not printed; the server sends it again after a resume.
        assert_eq!(last, Some(9));
        let plain = String::from_utf8(plain).expect("text");
        assert_eq!(plain, "7 put \"a: b\" = \"x\\n\"\n8 put \"c\" = b\"\\xff\"\n9 delete \"c\"\n");
        let json = String::from_utf8(json).expect("text");
        let first = r#"{"key":"a: b","sequence":"7","type":"put","value":"x\n"}"#;
        assert_eq!(json.lines().next(), Some(first));
        // The first position comes before any event.
        let mut last = None;
        assert!(next(&mut "id: 4\n\n".as_bytes(), &mut last).is_err());
        assert_eq!(last, Some(4));
    }
}
