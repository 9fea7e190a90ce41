//! `DELETE /v1?prefix=…`: deletes keys that begin so, a page at a time.
//!
//! Owns: what a page deletes, in one group of the log, and where the next one begins. With several instances each deletes a
//! page of its own keys. Must never know: how items are kept.

use kvs_kit::state::Logged;
use serde::{Deserialize, Serialize};

use crate::answer::{json, line};
use crate::kvs::store::http::{Request, Response};
use crate::kvs::store::transaction_log::{AppendError, Event};
use crate::list::{self, Asked, Page, disagreement, parsed, position};
use crate::query::{self, BadQuery};
use crate::store::Store;

/// Keys that a page deletes in an instance, at most.
const MAX_LIMIT: u64 = 1_000;

#[derive(Serialize, Deserialize)]
struct Deleted {
    deleted: usize,
    /// Whether no such key is left.
    complete: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    cursor: Option<String>,
}

pub fn delete(store: &mut Logged<'_, Store>, query: &str, request: &Request) -> Response {
    let asked = match asked(query) {
        Ok(asked) => asked,
        Err(bad) => return line(400, &bad.to_string()),
    };
    let asked = match asked.within(&request.grant) {
        Ok(asked) => asked,
        Err(reason) => return line(403, &reason),
    };
    let Page { keys, cursor, .. } = list::page(&store.in_order(), &asked, request.time_ms);
    let mut events: Vec<_> = keys.into_iter().map(|entry| Event::Delete(entry.key)).collect();
    let all = events.len();
    while !events.is_empty() {
        match store.append(&events) {
            Ok(_) => break,
            // A page is one group, so it ends where the log accepts no more.
            Err(AppendError::TooLarge(_)) if events.len() > 1 => events.truncate(events.len() / 2),
            Err(error) => return error.into(),
        }
    }
    let cursor = match events.last() {
        Some(Event::Delete(last)) if events.len() < all => Some(asked.cursor(&asked.past(last.as_bytes()))),
        _ => cursor,
    };
    json(&Deleted { deleted: events.len(), complete: cursor.is_none(), cursor })
}

/// The response of those of all instances. Where some deleted and others could not, the next page begins where this one did:
/// an error would hide that something was deleted.
pub fn merge(query: &str, mut responses: Vec<Response>) -> Response {
    let error = responses.iter().position(|response| response.status != 200).map(|at| responses.swap_remove(at));
    responses.retain(|response| response.status == 200);
    let Some(all) = parsed::<Deleted>(&responses) else { return disagreement() };
    let deleted = all.iter().map(|page| page.deleted).sum();
    // What lies after it and is deleted is not found once more.
    let ends = all.into_iter().filter_map(|page| page.cursor);
    let cursor = match (error, asked(query)) {
        (None, _) => ends.min_by_key(|cursor| position(cursor, false)),
        (Some(_), Ok(asked)) if deleted > 0 => Some(asked.cursor(&asked.least)),
        (Some(error), _) => return error,
    };
    json(&Deleted { deleted, complete: cursor.is_none(), cursor })
}

fn asked(query: &str) -> Result<Asked<'_>, BadQuery> {
    let [prefix, limit, cursor] = query::parameters(query, ["prefix", "limit", "cursor"])?;
    let prefix = prefix.ok_or(BadQuery::Missing("prefix", "it names the keys to delete; `prefix=` is all of them"))?;
    let limit = limit.map_or(Ok(MAX_LIMIT), |limit| limit.number(1..=MAX_LIMIT))?;
    let asked = list::between(prefix.value, (None, None), false, cursor)?;
    Ok(Asked { limit: limit as usize, ..asked })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvs::store::transaction_log::{AppendError, Put};
    use crate::rest::{handle, merge as merge_any};
    use crate::testing::{NOW, request, text_of, unasked};

    fn store_of(keys: &[&str]) -> Store {
        let mut store = Store::default();
        for (sequence, key) in (1..).zip(keys) {
            let expires_at_ms = key.starts_with("a/old").then_some(NOW);
            let put = Put { key: (*key).to_owned(), value: b"value".into(), metadata: vec![], expires_at_ms };
            store.replace(sequence, &Event::Put(put));
        }
        store
    }

    fn ask(query: &str) -> Request {
        Request { target: format!("/v1?{query}"), ..request("DELETE") }
    }

    fn read(response: &Response) -> Deleted {
        assert_eq!(response.status, 200, "{}", text_of(response));
        serde_json::from_slice(&response.body).expect("JSON")
    }

    #[test]
    fn pages_delete_what_begins_so_and_nothing_else() {
        let mut store = store_of(&["\u{1}g", "a", "a/1", "a/2", "a/3", "a/old", "b"]);
        let (mut deleted, mut sequence, mut query) = (Vec::new(), 100, "prefix=a/&limit=2".to_owned());
        let mut pages = Vec::new();
        loop {
            let page = read(&handle(&mut store, ask(&query), |events: &[Event]| {
                deleted.extend_from_slice(events);
                sequence += events.len() as u64;
                Ok(sequence)
            }));
            assert_eq!(page.complete, page.cursor.is_none());
            pages.push(page.deleted);
            let Some(cursor) = page.cursor else { break };
            query = format!("prefix=a/&limit=2&cursor={cursor}");
        }
        assert_eq!(deleted, ["a/1", "a/2", "a/3"].map(|key| Event::Delete(key.to_owned())));
        assert_eq!(pages, [2, 1]);
        let page = read(&handle(&mut store, ask("prefix="), |_: &[Event]| Ok(200)));
        assert_eq!((page.deleted, store.keys()), (2, 2), "keys of guests and expired ones stay");
        assert_eq!(read(&handle(&mut store, ask("prefix="), unasked)).deleted, 0);
    }

    #[test]
    fn page_is_as_long_as_the_log_accepts() {
        let mut store = store_of(&["a1", "a2", "a3", "a4", "a5", "b"]);
        let mut append = |events: &[Event]| if events.len() > 2 { Err(AppendError::TooLarge(9)) } else { Ok(10) };
        let (mut pages, mut query) = (Vec::new(), "prefix=a".to_owned());
        loop {
            let page = read(&handle(&mut store, ask(&query), &mut append));
            pages.push(page.deleted);
            let Some(cursor) = page.cursor else { break };
            query = format!("prefix=a&cursor={cursor}");
        }
        assert_eq!((pages, store.keys()), (vec![2, 1, 2], 1));
        let response = handle(&mut store, ask("prefix="), |_: &[Event]| Err(AppendError::TooLarge(9)));
        assert_eq!(response.status, 413, "of one key");
    }

    #[test]
    fn merged_pages_go_on_where_the_first_ended() {
        let mut stores = [store_of(&["a1", "a4", "a5"]), store_of(&["a2", "a3"])];
        let asked = ask("prefix=a&limit=2");
        let responses = stores.iter_mut().map(|store| handle(store, asked.clone(), |_: &[Event]| Ok(9))).collect();
        let merged = read(&merge_any(&asked, responses));
        assert_eq!((merged.deleted, merged.complete), (4, false));
        let asked = ask(&format!("prefix=a&cursor={}", merged.cursor.expect("there is more")));
        let responses = stores.iter_mut().map(|store| handle(store, asked.clone(), |_: &[Event]| Ok(9))).collect();
        let merged = read(&merge_any(&asked, responses));
        assert_eq!((merged.deleted, merged.complete), (1, true));
    }

    #[test]
    fn page_that_some_instances_deleted_is_no_error() {
        let mut stores = [store_of(&["a1", "a4"]), store_of(&["a2", "a3"])];
        let mut cursor = None;
        for (deleted, is_full) in [(2, true), (0, true), (2, false)] {
            let asked = ask(&format!("prefix=a{}", cursor.iter().map(|c| format!("&cursor={c}")).collect::<String>()));
            let append = |number, is_full| {
                move |_: &[Event]| {
                    if number == 0 && is_full { Err(AppendError::InsufficientStorage) } else { Ok(9) }
                }
            };
            let stores = stores.iter_mut().enumerate();
            let responses = stores.map(|(number, store)| handle(store, asked.clone(), append(number, is_full)));
            let response = merge_any(&asked, responses.collect());
            if deleted == 0 {
                assert_eq!(response.status, 507, "nothing was deleted");
                continue;
            }
            let page = read(&response);
            assert_eq!((page.deleted, page.complete), (deleted, !is_full));
            cursor = page.cursor;
        }
        assert!(stores.iter().all(|store| store.keys() == 0));
    }

    #[test]
    fn malformed_request_is_rejected_by_name() {
        for (query, reason) in [
            ("", "query parameter `prefix` is missing: it names the keys to delete; `prefix=` is all of them\n"),
            ("prefix=a&limit=1001", "query parameter `limit` must be a whole number from 1 to 1000\n"),
            ("prefix=a&cursor=x", "query parameter `cursor` must be one that such a list has given\n"),
            ("prefix=a&reverse=true", "unknown query parameter `reverse`\n"),
        ] {
            let response = handle(&mut store_of(&["a"]), ask(query), unasked);
            assert_eq!((response.status, text_of(&response)), (400, reason), "{query}");
        }
        let mut store = store_of(&["a"]);
        assert_eq!(handle(&mut store, ask("prefix="), |_: &[Event]| Err(AppendError::Unavailable)).status, 503);
        assert_eq!(store, store_of(&["a"]));
    }
}
