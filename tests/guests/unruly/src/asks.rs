//! What the guest asks of the host beside the log: the identifier of the request, log lines with a level, the timer, metrics;
//! and too much of each.

use crate::kvs::store::http::{Request, Response};
use crate::kvs::store::logging::{Level, log};
use crate::kvs::store::{metrics, request_context, timer};
use crate::text;

/// Responds to a request for `WHAT/ARGUMENT/…`.
pub fn ask(what: &str, request: &Request) -> Response {
    match what.split('/').collect::<Vec<_>>()[..] {
        ["request-id"] => return text(200, format!("{:?}", request_context::request_id())),
        ["log", level, message] => log(level_of(level), &message.replace("%0A", "\n")),
        ["log-often", count] => (0..number(count)).for_each(|n| log(Level::Info, &format!("does not stop: {n}"))),
        ["timer", "never"] => timer::set(None),
        ["timer", after] => timer::set(Some(request.time_ms + number(after))),
        ["add", name, by] => metrics::add(name, &[], number(by)),
        ["add-labelled", name, label, value] => metrics::add(name, &[(label.to_owned(), value.to_owned())], 1),
        ["set", name, value] => metrics::set(name, &[], value.parse().expect("a number")),
        ["add-many", count] => {
            (0..number(count)).for_each(|n| metrics::add("many", &[("n".to_owned(), n.to_string())], 1));
        }
        _ => return text(404, "nothing of that name can be asked for"),
    }
    text(200, "")
}

/// All of it at once, with what it returned: in `apply` it has no effect.
pub fn ask_for_everything() -> String {
    timer::set(None);
    metrics::add("everywhere", &[], 1);
    metrics::set("anywhere", &[], 1.0);
    log(Level::Warn, "asked for everything");
    format!("{:?}", request_context::request_id())
}

fn number(text: &str) -> u64 {
    text.parse().expect("a number")
}

fn level_of(name: &str) -> Level {
    match name {
        "trace" => Level::Trace,
        "debug" => Level::Debug,
        "info" => Level::Info,
        "warn" => Level::Warn,
        _ => Level::Error,
    }
}
