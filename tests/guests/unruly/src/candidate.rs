//! Differences between two versions of this guest, for shadow traffic: a test makes the second one by changing [`MARK`] in the
//! component.

use std::hint::black_box;

use crate::kvs::store::http::{Request, Response};
use crate::kvs::store::transaction_log::append;
use crate::kvs::store::watch::wait_for_change;
use crate::{State, dawdle, fall_over, put, surroundings, text, with_header};

/// Ends in `candidate` in the second version.
static MARK: [u8; 28] = *b"version of unruly: serving  ";

pub fn is_candidate() -> bool {
    black_box(&MARK).ends_with(b"candidate")
}

/// Number of events that `effect` and its kind append.
const EVENTS: usize = 100;

/// Responds to a request in the way that its name says, and differently in the second version.
pub fn differ(state: &mut State, how: &str, request: &Request) -> Response {
    let (how, query) = how.split_once('?').unwrap_or((how, ""));
    let is_other = is_candidate();
    let word = if is_other { "other" } else { "usual" };
    match how {
        "header" => with_header("x-word", word),
        "cookie" => with_header("set-cookie", word),
        "tag" => with_header("etag", word),
        "status" => text(if is_other { 204 } else { 200 }, ""),
        "body" => text(200, format!("{}{word} end", "x".repeat(1_000))),
        "principal" if request.principal.as_deref() == Some("eve") => text(200, word),
        "flag" if state.store.contains_key("{own}flag") => text(200, word),
        "trap" if is_other => fall_over(),
        "slow" if is_other => {
            dawdle(100_000_000);
            text(200, "the same")
        }
        "wait" => {
            wait_for_change(if is_other { "{own}b" } else { "{own}a" }, 1);
            text(200, "")
        }
        // One value of many, one event more, one less, and a group in two parts.
        "effect" | "more" | "less" | "parts" | "rarely" => {
            let is_different = how == "effect" || how == "rarely" && query == "odd";
            let value = |n| if is_different && n == 57 { word } else { "value" };
            let mut events: Vec<_> = (0..EVENTS).map(|n| put(&format!("{{own}}many-{n}"), value(n).into())).collect();
            match how {
                "more" if is_other => events.push(put("{own}one-more", Vec::new())),
                "less" if is_other => drop(events.pop()),
                "parts" if is_other => {
                    let rest = events.split_off(EVENTS / 2);
                    append(&rest).expect("the log takes this");
                    // Fails in shadow traffic: the serving guest appends once.
                    let _ = append(&events);
                    return text(200, "appended");
                }
                _ => {}
            }
            append(&events).expect("the log takes this");
            text(200, "appended")
        }
        // An effect that is in no log and no response.
        "memory" => {
            if is_other {
                state.store.insert("{own}memory".to_owned(), Vec::new());
            }
            text(200, "the same")
        }
        // All that is random or a time, in the response and in the effect.
        "surroundings" => {
            let surroundings = surroundings();
            append(&[put("{own}surroundings", surroundings.clone().into())]).expect("the log takes this");
            text(200, surroundings)
        }
        // An append that fails.
        "append-wrongly" => text(200, format!("{:?}", append(&[put("..", Vec::new())]))),
        _ => text(200, "the same"),
    }
}
