//! The report of a trap: complete for operators, and not visible to clients.

use std::thread;

use serde_json::Value;

use crate::support::guests::{component, guest};
use crate::support::server::Server;
use crate::support::swap::{status, swap};
use crate::support::wire::Connection;

/// Panic message of the guest.
const MESSAGE: &str = "of all things";

#[test]
fn panic_is_reported_with_its_message_and_function() {
    // The output limit drops almost all output of the guest.
    let server = Server::start(&["--guest-log-bytes", "1", guest()]);
    let mut client = Connection::open(server.address());
    let response = client.ask_with("GET", "/panic", &[("x-request-id", "trace-1")], b"");
    response.says(500, "the store failed on this request");
    let line = server.says("the guest trapped");
    for part in ["trace-1", MESSAGE, "panicked at"] {
        assert!(line.contains(part), "{part} is missing in: {line}");
    }
    // The guest's own functions; its name is elsewhere in the line, too.
    let functions = line.split_once(", in ").and_then(|(_, rest)| Some(rest.split_once("; it printed: ")?.0));
    assert!(functions.is_some_and(|functions| functions.contains("unruly_guest::")), "{line}");
    for machinery in ["std::panicking", "rust_panic", "core::panicking", "RUST_BACKTRACE"] {
        assert!(!line.contains(machinery), "{line}");
    }
    assert_eq!(client.ask("GET", "/handled", b"").status, 200);
    let trap = status(&server)["last_trap"].clone();
    assert!(trap["at"].is_u64() && trap["reason"].as_str().is_some_and(|reason| reason.contains(MESSAGE)), "{trap}");
}

#[test]
fn panic_is_printed_in_readable_lines() {
    let server = Server::start(&["--log-format", "json", guest()]);
    let mut client = Connection::open(server.address());
    client.ask("GET", "/panic", b"").says(500, "the store failed on this request");
    server.says("the guest trapped");
    let lines = server.terminate().stderr().to_vec();
    let lines = lines.iter().map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
    let printed =
        lines.filter(|line| line["guest"] == "unruly" && line["level"] == "INFO" && line["request_id"].is_string());
    let printed: Vec<_> = printed.map(|line| line["message"].as_str().expect("it has one").to_owned()).collect();
    // Its place with the thread in quotes, and its message.
    let [place, message] = &printed[..] else { panic!("{printed:?}") };
    assert!(place.contains("panicked at") && place.contains('\'') && !place.contains('\\'), "{place}");
    assert_eq!(message, MESSAGE);
}

#[test]
fn swap_response_has_panic_message() {
    let server = Server::start(&["--probation", "1h"]);
    let answer = thread::scope(|scope| {
        let swapping = scope.spawn(|| swap(&server, &component(guest())));
        server.says("another guest serves, on probation");
        assert_eq!(Connection::open(server.address()).ask("GET", "/panic", b"").status, 500);
        swapping.join().expect("the swap is answered")
    });
    assert!(answer.status == 422 && answer.text().contains(MESSAGE), "{}", answer.text());
    let last = status(&server)["last_swap"].clone();
    assert!(last["reason"].as_str().is_some_and(|reason| reason.contains(MESSAGE)), "{last}");
}

#[test]
fn guest_output_has_request_id() {
    let server = Server::start(&[guest()]);
    let mut client = Connection::open(server.address());
    for id in ["trace-1", "trace-2"] {
        client.ask_with("GET", &format!("/print/by-{id}"), &[("x-request-id", id)], b"");
        let line = server.says(&format!("by-{id}"));
        assert!(line.contains(&format!("request_id=\"{id}\"")), "{line}");
    }
}
