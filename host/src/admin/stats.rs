//! `/stats` on the admin listener: what is stored, counted in the log.

use std::io::Write;
use std::sync::Arc;

use http_body_util::Either;
use hyper::body::Incoming;
use hyper::{Method, Request, Response, StatusCode};
use kvs_runtime::{Clock, Env};
use kvs_txlog::TransactionLog;
use kvs_txlog::stats::{Query, measure};

use super::history::{TIMEOUT, decoded};
use super::scan::{Out, Scans};
use super::{AdminBody, not_allowed, text};
use crate::stats_report;

/// Size of the table of live keys, in the memory of the server. More keys take more passes over the log.
const TABLE_BYTES: usize = 64 << 20;
/// Default and maximum number of largest keys and prefixes.
const TOP: usize = 20;
pub const MAX_TOP: u16 = 1_000;

/// Responds to requests for `/stats`.
pub struct Statistics {
    log: Arc<dyn TransactionLog>,
    scans: Scans,
    clock: Clock,
}

impl Statistics {
    pub fn new(log: Arc<dyn TransactionLog>, env: &Env) -> Self {
        Self { log, scans: Scans::new("scan for statistics", TIMEOUT, env), clock: env.clock.clone() }
    }

    pub async fn respond(&self, request: Request<Incoming>) -> Response<AdminBody> {
        if request.method() != Method::GET {
            return not_allowed("GET").map(Either::Left);
        }
        let Some(query) = parse(request.uri().query().unwrap_or_default(), self.clock.steady_ms()) else {
            let reason = "malformed query; there are prefix=PREFIX, delimiter=TEXT, which is not empty, and top=COUNT, 1 to 1000\n";
            return text(StatusCode::BAD_REQUEST, reason).map(Either::Left);
        };
        let log = Arc::clone(&self.log);
        let work = move |out: &mut Out| {
            let stats = measure(&*log, &query, TABLE_BYTES, &mut |_, _| Ok(out.pace()?))?;
            Ok(writeln!(out, "{}", stats_report::json(&stats, &query))?)
        };
        self.scans.respond("application/json", work).await
    }
}

/// Parses the query of a request at this time.
fn parse(query: &str, now: u64) -> Option<Query> {
    let (mut prefix, mut delimiter, mut top) = (None, None, None);
    for pair in query.split('&').filter(|_| !query.is_empty()) {
        match pair.split_once('=')? {
            ("prefix", encoded) if prefix.is_none() => prefix = Some(decoded(encoded)?),
            ("delimiter", encoded) if delimiter.is_none() => {
                delimiter = Some(decoded(encoded).filter(|delimiter| !delimiter.is_empty())?);
            }
            ("top", count) if top.is_none() => {
                let count = count.parse().ok().filter(|count| (1..=MAX_TOP).contains(count))?;
                top = Some(usize::from(count));
            }
            _ => return None,
        }
    }
    let delimiter = delimiter.unwrap_or_else(|| "/".to_owned());
    Some(Query { prefix: prefix.unwrap_or_default(), delimiter, top: top.unwrap_or(TOP), now })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn query_names_prefix_delimiter_and_top() {
        let parsed = |prefix: &str, delimiter: &str, top| {
            Some(Query { prefix: prefix.to_owned(), delimiter: delimiter.to_owned(), top, now: 5 })
        };
        assert_eq!(parse("", 5), parsed("", "/", 20));
        assert_eq!(parse("top=1000&delimiter=%3A%3a&prefix=a+%C3%A9", 5), parsed("a é", "::", 1_000));
        assert_eq!(parse("prefix=&top=1", 5), parsed("", "/", 1));
        for malformed in [
            "top",
            "top=",
            "top=0",
            "top=1001",
            "top=-1",
            "top=1&top=2",
            "delimiter=",
            "prefix=%ff",
            "key=a",
            "&",
            "prefix=a&",
        ] {
            assert_eq!(parse(malformed, 5), None, "{malformed}");
        }
    }
}
