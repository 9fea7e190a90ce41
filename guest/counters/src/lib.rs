//! The default store, with counters: `PATCH /v1/{key}` with `+1` or `-5` adds to a value that is a decimal number, and
//! responds with the sum.
//!
//! A counter is an ordinary value, its number written out, and what is appended is an ordinary put. So any other guest
//! can take over at any time, and reads the numbers as they are.

use kvs_guest::item::Item;
use kvs_guest::{Kvs, Store, grant, number, respond};
use kvs_kit::answer::{self, CONTENT_TYPE, etag, header, line};
use kvs_kit::guest::Guest;
use kvs_kit::state::Logged;
use kvs_kit::{Event, Put, Request, Response, key, path, query};

pub struct Counters;

kvs_kit::export!(Counters, sharding = Kvs);

impl Guest for Counters {
    type State = Store;

    const NAME: &'static str = "counters";
    const HEADERS: &'static [&'static str] = Kvs::HEADERS;
    const CAPABILITIES: &'static [&'static str] = Kvs::CAPABILITIES;

    fn handle(store: &mut Logged<'_, Store>, request: Request) -> answer::Result {
        let (path, query) = path::split(&request.target);
        let Ok(key) = key::in_path(path) else { return Ok(respond(store, request)) };
        if request.method == "PATCH" {
            query::nothing(query)?;
            return add(store, &key, &request);
        }
        let mut response = respond(store, request);
        let allow = response.headers.iter_mut().find(|header| header.name == "allow");
        allow.into_iter().for_each(|allow| allow.value.extend(b", PATCH"));
        Ok(response)
    }
}

fn add(store: &mut Logged<'_, Store>, key: &str, request: &Request) -> answer::Result {
    grant::check(&request.grant, key).map_err(|reason| line(403, &reason))?;
    // With its sign, so that nobody who means to set a value adds to it.
    let change = str::from_utf8(&request.body).ok().map(str::trim).filter(|text| text.starts_with(['+', '-']));
    let change = change.and_then(|text| text.parse().ok());
    let change = change.ok_or_else(|| line(422, "the body is no number with a sign: +1, -5"))?;
    let item = store.get(key, request.time_ms).ok();
    let sum = number::add(item.map(Item::value), change)?;
    let text = || vec![(CONTENT_TYPE.to_owned(), "text/plain".to_owned())];
    let put = Put {
        key: key.to_owned(),
        value: sum.clone().into_bytes(),
        metadata: item.map_or_else(text, Item::owned_metadata),
        expires_at_ms: item.and_then(Item::expires),
    };
    let sequence = store.append(&[Event::Put(put)])?;
    let headers = vec![header(CONTENT_TYPE, "text/plain"), etag(sequence)];
    Ok(Response { status: 200, headers, body: sum.into_bytes(), read_sequence: Some(sequence) })
}

#[cfg(test)]
mod tests {
    use kvs_kit::AppendError;
    use kvs_kit::testing::{Served, header_of, request};

    use super::*;

    type Asked = Served<Counters>;

    #[test]
    fn counter_is_a_value_like_any_other() {
        let mut guest = Asked::default();
        for (method, body, expected) in [
            ("PATCH", "+1", (200, "1")),
            ("PATCH", "-5\n", (200, "-4")),
            ("GET", "", (200, "-4")),
            ("PUT", "40", (201, "")),
            ("PATCH", "+2", (200, "42")),
        ] {
            assert_eq!(guest.ask(method, "/v1/n", body), (expected.0, expected.1.to_owned()), "{method} {body}");
        }
        assert_eq!(guest.rebuilt().ask("GET", "/v1/n", ""), (200, "42".to_owned()));
    }

    #[test]
    fn change_that_cannot_be_made_is_rejected() {
        let mut guest = Asked::default();
        guest.ask("PUT", "/v1/many", "many");
        guest.ask("PUT", "/v1/most", "9223372036854775807");
        for (target, body, status) in [
            ("/v1/n", "1", 422),
            ("/v1/n", "++1", 422),
            ("/v1/n", "+1.5", 422),
            ("/v1/n?ttl=5", "+1", 400),
            ("/v1/many", "+1", 409),
            ("/v1/most", "+1", 409),
        ] {
            assert_eq!(guest.ask("PATCH", target, body).0, status, "{target} {body}");
        }
        guest.log.error = Some(AppendError::InsufficientStorage);
        assert_eq!(guest.ask("PATCH", "/v1/n", "+1").0, 507);
        assert_eq!(guest.state.keys(), 2);
    }

    #[test]
    fn metadata_and_expiry_stay_with_the_value() {
        let mut guest = Asked::default();
        let metadata = vec![("content-type".to_owned(), "text/csv".to_owned())];
        let put = Put { key: "n".to_owned(), value: b"1".into(), metadata: metadata.clone(), expires_at_ms: Some(20) };
        guest.append(&[Event::Put(put)]);
        assert_eq!(guest.ask("PATCH", "/v1/n", "+1").0, 200);
        let item = guest.state.get("n", 10).expect("it is there");
        assert_eq!((item.owned_metadata(), item.expires()), (metadata, Some(20)));
    }

    #[test]
    fn rejected_method_names_those_that_there_are() {
        let response = Asked::default().handle(request("BREW", "/v1/n", ""));
        assert_eq!(header_of(&response, "allow"), Some("GET, HEAD, PUT, POST, DELETE, PATCH"));
    }
}
