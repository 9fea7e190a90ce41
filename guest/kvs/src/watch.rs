//! `GET /v1?watch`: which changes a client may see, and after which position. The host parses positions and streams changes.

use std::borrow::Cow;

use kvs_kit::state::Logged;

use crate::answer::{header, line};
use crate::content_type;
use crate::grant;
use crate::key::GUEST_KEY;
use crate::kvs::store::http::{Grant, Header, Request, Response};
use crate::kvs::store::watch::Selector;
use crate::query::{self, BadQuery};
use crate::store::Store;

pub const LAST_EVENT_ID: &str = "last-event-id";

/// Whether a query requests changes in place of a list.
pub fn is_wanted(query: &str) -> bool {
    query::has(query, "watch")
}

pub fn get(store: &Logged<'_, Store>, query: &str, request: &Request) -> Response {
    let Asked { selectors, since, puts_only } = match asked(query) {
        Ok(asked) => asked,
        Err(bad) => return line(400, &bad.to_string()),
    };
    let within = |selector| within(&request.grant, selector);
    let selectors = match selectors.into_iter().map(within).collect::<Result<Vec<_>, _>>() {
        Ok(selectors) => selectors,
        Err(reason) => return line(403, &reason),
    };
    // A client that comes back asks as it did at first, and says with this how far it came.
    let last = match last_event(&request.headers) {
        Ok(last) => last,
        Err(refusal) => return refusal,
    };
    store.subscribe(&selectors, last.or(since).as_deref(), puts_only);
    let headers = vec![header(content_type::NAME, "text/event-stream"), header("cache-control", "no-store")];
    Response { status: 200, headers, body: Vec::new(), read_sequence: None }
}

/// Selection of a watch.
struct Asked<'q> {
    selectors: Vec<Selector>,
    since: Option<Cow<'q, str>>,
    puts_only: bool,
}

fn asked(query: &str) -> Result<Asked<'_>, BadQuery> {
    let ([watch, since, puts_only], [prefixes, keys]) =
        query::with_repeated(query, ["watch", "since", "puts-only"], ["prefix", "key"])?;
    if let Some(watch) = watch.filter(|watch| !matches!(&*watch.value, "" | "true")) {
        return Err(watch.unfit("true, or nothing"));
    }
    let is_everything = prefixes.is_empty() && keys.is_empty();
    let prefixes = prefixes.into_iter().map(|prefix| prefix.value.into_owned());
    // Keys of guests are not for clients.
    let prefixes = prefixes.filter(|prefix| !prefix.starts_with(GUEST_KEY)).map(Selector::Prefix);
    let mut selectors: Vec<_> = prefixes.chain(is_everything.then(|| Selector::Prefix(String::new()))).collect();
    for key in keys {
        selectors.push(Selector::Key(key.key()?.into_owned()));
    }
    let puts_only = puts_only.map_or(Ok(false), |puts_only| puts_only.flag())?;
    Ok(Asked { selectors, since: since.map(|since| since.value), puts_only })
}

/// Narrows a selector to the keys of a grant.
fn within(grant: &Grant, selector: Selector) -> Result<Selector, String> {
    Ok(match selector {
        Selector::Key(key) => grant::check(grant, &key).map(|()| Selector::Key(key))?,
        Selector::Prefix(prefix) => Selector::Prefix(grant::narrow(grant, prefix.into())?.into_owned()),
    })
}

/// The position of the event that the client got last.
fn last_event(headers: &[Header]) -> Result<Option<Cow<'_, str>>, Response> {
    let mut sent = headers.iter().filter(|header| header.name == LAST_EVENT_ID);
    let last = sent.next().map(|last| String::from_utf8_lossy(&last.value));
    if sent.next().is_some() {
        return Err(line(400, "last-event-id must be sent once"));
    }
    Ok(last)
}

#[cfg(test)]
mod tests {
    use kvs_kit::host::Host;

    use super::*;
    use crate::kvs::store::transaction_log::{AppendError, Event};
    use crate::testing::EVERYTHING;

    /// A host that keeps what it was asked for.
    #[derive(Default)]
    struct Asked(Option<Subscription>);

    type Subscription = (Vec<Selector>, Option<String>, bool);

    impl Host for Asked {
        fn append(&mut self, _events: &[Event]) -> Result<u64, AppendError> {
            panic!("appended")
        }

        fn subscribe(&mut self, selectors: &[Selector], after: Option<&str>, puts_only: bool) {
            self.0 = Some((selectors.to_vec(), after.map(str::to_owned), puts_only));
        }

        fn wait_for_change(&mut self, _key: &str, _timeout_ms: u64) {
            panic!("waited")
        }

        fn reuse(&mut self, _key: &str, _until_ms: Option<u64>) {
            panic!("declared")
        }
    }

    fn watch(query: &str, last: &[&str]) -> (Response, Option<Subscription>) {
        let headers = last.iter().map(|last| header(LAST_EVENT_ID, *last)).collect();
        let (method, target, body) = ("GET".to_owned(), String::new(), vec![]);
        let request = Request { method, target, headers, body, principal: None, grant: EVERYTHING, time_ms: 0 };
        let mut host = Asked::default();
        (get(&Logged::new(&mut Store::default(), &mut host), query, &request), host.0)
    }

    #[test]
    fn watch_subscribes_to_its_prefix_from_the_clients_position() {
        for (query, last, prefix, after) in [
            ("watch", &[][..], Some(""), None),
            ("watch=true&prefix=a%2F&since=7", &[], Some("a/"), Some("7")),
            ("watch&since=0", &[], Some(""), Some("0")),
            ("watch&since=3", &["5"], Some(""), Some("5")),
            // Positions are the host's to parse.
            ("watch&since=x%20y", &[], Some(""), Some("x y")),
            ("watch&since=", &[], Some(""), Some("")),
            ("watch", &["5:x"], Some(""), Some("5:x")),
            // Nobody watches keys of guests.
            ("watch&prefix=%01a", &[], None, None),
        ] {
            assert!(is_wanted(query), "{query}");
            let (response, subscribed) = watch(query, last);
            let selectors = prefix.into_iter().map(|prefix| Selector::Prefix(prefix.to_owned())).collect();
            assert_eq!(
                (response.status, subscribed),
                (200, Some((selectors, after.map(str::to_owned), false))),
                "{query}"
            );
            assert!(response.headers.contains(&header("content-type", "text/event-stream")));
        }
        assert!(!is_wanted("prefix=watch") && !is_wanted("watches"));
    }

    #[test]
    fn watch_takes_several_prefixes_and_keys() {
        let (_, subscribed) = watch("watch&prefix=a/&key=b%20c&prefix=d/&key=e&puts-only=true", &[]);
        let [a, d] = ["a/", "d/"].map(|prefix| Selector::Prefix(prefix.to_owned()));
        let [b, e] = ["b c", "e"].map(|key| Selector::Key(key.to_owned()));
        assert_eq!(subscribed, Some((vec![a, d, b, e], None, true)));
    }

    #[test]
    fn what_is_malformed_is_refused_by_name() {
        for (query, last, reason) in [
            ("watch=false", &[][..], "query parameter `watch` must be true, or nothing\n"),
            ("watch&watch", &[], "query parameter `watch` was given twice\n"),
            ("watch&limit=5", &[], "unknown query parameter `limit`\n"),
            ("watch&puts-only", &[], "query parameter `puts-only` must be true or false\n"),
            ("watch&key=a&key=", &[], "query parameter `key` is no key: key is empty\n"),
            ("watch&key=%01a", &[], "query parameter `key` is no key: key holds the control character U+0001\n"),
            ("watch", &["1", "1"], "last-event-id must be sent once\n"),
        ] {
            let (response, subscribed) = watch(query, last);
            assert_eq!((response.status, String::from_utf8_lossy(&response.body).as_ref()), (400, reason), "{query}");
            assert_eq!(subscribed, None);
        }
    }
}
