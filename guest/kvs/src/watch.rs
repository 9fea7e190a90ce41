//! `GET /v1?watch`: which changes a client may see, and from when on. The host streams them.

use crate::answer::{Host, header, line};
use crate::content_type;
use crate::kvs::store::http::{Header, Request, Response};
use crate::query;

pub const LAST_EVENT_ID: &str = "last-event-id";

/// Whether a query asks for changes in place of a list.
pub fn is_wanted(query: &str) -> bool {
    query.split('&').any(|parameter| parameter.split('=').next() == Some("watch"))
}

pub fn get(query: &str, request: &Request, host: &mut impl Host) -> Response {
    let [watch, prefix, since] = match query::parameters(query, ["watch", "prefix", "since"]) {
        Ok(parameters) => parameters,
        Err(bad) => return line(400, &bad.to_string()),
    };
    if let Some(watch) = watch.filter(|watch| !matches!(&*watch.value, "" | "true")) {
        return line(400, &watch.unfit("true, or nothing").to_string());
    }
    let since = match since.map(|since| since.number(0..=u64::MAX)).transpose() {
        Ok(since) => since,
        Err(bad) => return line(400, &bad.to_string()),
    };
    // A client that comes back asks as it did at first, and says with this how far it came.
    let since = match last_event(&request.headers) {
        Ok(last) => last.or(since),
        Err(refusal) => return refusal,
    };
    // Appending nothing tells the sequence that comes next.
    if let (Some(since), Ok(next)) = (since, host.append(&[]))
        && since >= next
    {
        return line(400, &format!("there is nothing since {since} yet, the newest sequence is {}", next - 1));
    }
    let headers = vec![header(content_type::NAME, "text/event-stream"), header("cache-control", "no-store")];
    // The head alone is the answer to HEAD.
    if request.method == "GET" {
        host.follow(prefix.as_ref().map_or("", |prefix| &prefix.value), since);
    }
    Response { status: 200, headers, body: Vec::new(), depends_on: None }
}

fn last_event(headers: &[Header]) -> Result<Option<u64>, Response> {
    let mut sent = headers.iter().filter(|header| header.name == LAST_EVENT_ID);
    let Some(last) = sent.next() else { return Ok(None) };
    let number = str::from_utf8(&last.value).ok().filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()));
    match number.and_then(|number| number.parse().ok()) {
        Some(last) if sent.next().is_none() => Ok(Some(last)),
        _ => Err(line(400, "last-event-id must be the id of an event of this stream, and sent once")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvs::store::transaction_log::{AppendError, Event};

    /// A host whose newest sequence is 7.
    #[derive(Default)]
    struct Seven(Option<(String, Option<u64>)>);

    impl Host for Seven {
        fn append(&mut self, events: &[Event]) -> Result<u64, AppendError> {
            assert_eq!(events, []);
            Ok(8)
        }

        fn follow(&mut self, prefix: &str, after: Option<u64>) {
            self.0 = Some((prefix.to_owned(), after));
        }

        fn hold(&mut self, _key: &str, _milliseconds: u64) {
            panic!("held")
        }
    }

    fn watch(method: &str, query: &str, last: &[&str]) -> (Response, Option<(String, Option<u64>)>) {
        let headers = last.iter().map(|last| header(LAST_EVENT_ID, *last)).collect();
        let (method, target, body) = (method.to_owned(), String::new(), vec![]);
        let request = Request { method, target, headers, body, principal: None, time: 0 };
        let mut host = Seven::default();
        (get(query, &request, &mut host), host.0)
    }

    #[test]
    fn a_watch_follows_its_prefix_from_where_the_client_was() {
        for (query, last, prefix, after) in [
            ("watch", &[][..], "", None),
            ("watch=true&prefix=a%2F&since=7", &[], "a/", Some(7)),
            ("watch&since=0", &[], "", Some(0)),
            ("watch&since=3", &["5"], "", Some(5)),
        ] {
            assert!(is_wanted(query), "{query}");
            let (response, followed) = watch("GET", query, last);
            assert_eq!((response.status, followed), (200, Some((prefix.to_owned(), after))), "{query}");
            assert!(response.headers.contains(&header("content-type", "text/event-stream")));
            assert_eq!(watch("HEAD", query, last), (response, None));
        }
        assert!(!is_wanted("prefix=watch") && !is_wanted("watches"));
    }

    #[test]
    fn what_is_malformed_is_refused_by_name() {
        const LAST: &str = "last-event-id must be the id of an event of this stream, and sent once\n";
        for (query, last, told) in [
            ("watch=false", &[][..], "query parameter `watch` must be true, or nothing\n"),
            ("watch&watch", &[], "query parameter `watch` was given twice\n"),
            ("watch&limit=5", &[], "unknown query parameter `limit`\n"),
            ("watch&since=-1", &[], "query parameter `since` must be a whole number from 0 to 18446744073709551615\n"),
            ("watch&since=8", &[], "there is nothing since 8 yet, the newest sequence is 7\n"),
            ("watch", &["8"], "there is nothing since 8 yet, the newest sequence is 7\n"),
            ("watch", &["x"], LAST),
            ("watch", &[""], LAST),
            ("watch", &["1", "1"], LAST),
        ] {
            let (response, followed) = watch("GET", query, last);
            assert_eq!((response.status, String::from_utf8_lossy(&response.body).as_ref()), (400, told), "{query}");
            assert_eq!(followed, None);
        }
    }
}
