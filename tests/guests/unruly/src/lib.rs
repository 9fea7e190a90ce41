//! A guest that misbehaves on demand, so that tests can see the host outlive it.
//!
//! What goes wrong is chosen by the path of a request, or for calls that are not requests by the setting `fault`
//! (`--guest-config fault=…`). It also keeps a small store, so that tests can see what survived.

mod lies;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::hint::black_box;
use std::slice;
use std::time::{Duration, Instant};

use exports::kvs::store::lifecycle::{Description, Statistics};
use exports::kvs::store::sharding::Placement;
use exports::kvs::store::{handler, lifecycle, sharding};
use kvs::store::http::{Header, Request, Response};
use kvs::store::transaction_log::{Entry, Event, Put, append};
use kvs::store::{changes, connection};
use wasi::config::store as config;

/// Whose instance is asked all that is not about a key; keys with this tag are its own.
const OWN: &str = "{own}";

wit_bindgen::generate!({
    path: "../../../wit",
    // Calls the sandbox by its own names too, where the standard library behaves.
    inline: "
        package kvs:unruly;
        world unruly {
            include kvs:store/store@0.1.0;
            import wasi:cli/stdout@0.2.12;
            import wasi:random/random@0.2.12;
        }
    ",
    world: "kvs:unruly/unruly",
    generate_all,
});

/// All of it dies with the instance.
#[derive(Default)]
struct State {
    store: BTreeMap<String, Vec<u8>>,
    /// Entries taken in by `apply`.
    applied: u64,
    /// Requests handled.
    handled: u64,
    ticks: u64,
    /// What `append` said to `apply`.
    refusal: String,
}

thread_local! {
    static STATE: RefCell<State> = RefCell::default();
}

/// What the host instantiates.
pub struct Component;

impl lifecycle::Guest for Component {
    fn describe() -> Description {
        match fault().as_str() {
            "describe-traps" => fall_over(),
            "describe-loops" => circle(),
            "describe-loops-aloud" => {
                println!("going round in circles");
                circle()
            }
            "describe-exits" => std::process::exit(0),
            _ => {}
        }
        let name = if fault() == "name" { "two words" } else { "unruly" };
        let headers = if fault() == "headers" { 65 } else { 0 };
        Description {
            name: name.to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            headers: (0..headers).map(|n| format!("x-{n}")).collect(),
        }
    }

    fn apply(entries: Vec<Entry>) {
        STATE.with_borrow_mut(|state| {
            match fault().as_str() {
                "apply-traps" => fall_over(),
                "apply-loops-aloud" => {
                    println!("going round in circles");
                    circle()
                }
                "apply-dawdles" => dawdle(Duration::from_millis(700)),
                "apply-appends" => state.refusal = format!("{:?}", append(&[put("{own}from apply", Vec::new())])),
                _ => {}
            }
            for entry in entries {
                state.applied += 1;
                change(state, entry.event);
            }
        });
    }

    fn tick(_now: u64) -> bool {
        STATE.with_borrow_mut(|state| state.ticks += 1);
        match fault().as_str() {
            "tick-traps" => fall_over(),
            // Is never done.
            fault => fault == "tick-again",
        }
    }

    fn stats() -> Statistics {
        STATE.with_borrow(|state| Statistics { keys: state.store.len() as u64, bytes: 0 })
    }
}

impl handler::Guest for Component {
    fn handle(request: Request) -> Response {
        STATE.with_borrow_mut(|state| {
            state.handled += 1;
            answer(state, request)
        })
    }
}

impl sharding::Guest for Component {
    fn place(_method: String, target: String) -> Placement {
        match target[1..].split_once('/') {
            Some(("store" | "store-and-trap" | "store-early", key)) => Placement::Key(key.to_owned()),
            _ if target == "/place-traps" => fall_over(),
            _ if target == "/everywhere" => Placement::Everywhere,
            _ => Placement::Key(OWN.to_owned()),
        }
    }

    fn keys(_body: Vec<u8>) -> Vec<String> {
        Vec::new()
    }

    fn merge(_request: Request, mut responses: Vec<Response>) -> Response {
        responses.remove(0)
    }
}

fn answer(state: &mut State, request: Request) -> Response {
    let (verb, rest) = request.target[1..].split_once('/').unwrap_or((&request.target[1..], ""));
    match (request.method.as_str(), verb) {
        // The store.
        ("PUT", "store") => text(201, store(state, rest, request.body)),
        ("PUT", "store-and-trap") => {
            store(state, rest, request.body);
            fall_over()
        }
        // Claims that the answer rests on nothing.
        ("PUT", "store-early") => Response { depends_on: Some(0), ..text(201, store(state, rest, request.body)) },
        ("GET", "store") => match state.store.get(rest) {
            Some(value) => text(200, String::from_utf8_lossy(value)),
            None => text(404, "nothing there"),
        },
        // Wherever that key belongs.
        (_, "append-to") => text(200, format!("{:?}", append(&[put(rest, Vec::new())]))),
        (_, "append-too-much") => text(200, format!("{:?}", append(&[put("{own}large", vec![0; 2 << 20])]))),
        (_, "append-often") => {
            let asked: usize = rest.parse().expect("a number");
            let taken = (0..asked).take_while(|_| append(&[put("{own}often", Vec::new())]).is_ok()).count();
            text(200, taken)
        }
        (_, "follow") => {
            changes::follow(rest, None);
            let headers = vec![Header { name: "content-type".to_owned(), value: b"text/event-stream".to_vec() }];
            Response { headers, ..text(200, "") }
        }
        (_, "append-nothing") => text(200, format!("{:?}", append(&[]))),

        // What it knows.
        (_, "applied") => text(200, state.applied),
        (_, "handled") => text(200, state.handled),
        (_, "ticks") => text(200, state.ticks),
        (_, "refusal") => text(200, &state.refusal),
        (_, "peer") => text(200, format!("{:?}", connection::peer_address())),
        (_, "tls") => text(200, format!("{:?} {:?}", connection::tls_version(), connection::client_identity())),
        (_, "principal") => text(200, format!("{:?}", request.principal)),
        (_, "config") => text(200, format!("{:?}", config::get(rest).expect("this host's settings are in memory"))),
        (_, "environment") => text(200, format!("{:?}", std::env::vars().collect::<Vec<_>>())),
        (_, "arguments") => text(200, format!("{:?}", std::env::args().collect::<Vec<_>>())),
        (_, "input") => {
            text(200, std::io::read_to_string(std::io::stdin()).expect("there is an input, if an empty one"))
        }

        // What it says.
        (_, "print") => {
            println!("{rest}");
            text(200, "printed")
        }
        (_, "print-for-ever") => loop {
            println!("a guest that does not stop talking");
        },
        (_, "print-at-once") => {
            wasi::cli::stdout::get_stdout().write(&vec![b'x'; 1 << 20]).expect("trapped before");
            text(200, "printed")
        }
        (_, "print-controls") => {
            println!("\x1b[2Jforged\rline");
            text(200, "printed")
        }
        (_, "chatter") => {
            for line in 0..1_000 {
                eprintln!("line {line} of a guest that does not stop talking");
            }
            text(200, "printed")
        }

        // Ways to fail.
        (_, "trap") => fall_over(),
        (_, "panic") => panic!("of all things"),
        (_, "exit") => std::process::exit(0),
        (_, "loop") => circle(),
        (_, "loop-aloud") => {
            eprintln!("going round in circles");
            circle()
        }
        (_, "grow") => grow(),
        (_, "recurse") => text(200, dig(0)),
        (_, "sleep") => {
            std::thread::sleep(Duration::from_secs(3_600));
            text(200, "slept")
        }

        (_, "hold-handles") => loop {
            std::mem::forget(wasi::cli::stdout::get_stdout());
        },
        (_, "ask-for-randomness") => {
            text(200, wasi::random::random::get_random_bytes(rest.parse().expect("a number")).len())
        }
        (_, "lie") => lies::tell(rest),

        // Responses that are not HTTP, or not true.
        (_, "body") => Response { body: vec![b'x'; rest.parse().expect("a number")], ..text(200, "") },
        (_, "rests-on") => Response { depends_on: rest.parse().ok(), ..text(200, "so it says") },
        (_, "status") => text(rest.parse().expect("a number"), ""),
        (_, "header") => with_header(rest, "x"),
        (_, "header-value") => with_header("x", "a\r\nset-cookie: b"),
        (_, "many-headers") => {
            let header = |n| Header { name: format!("x-{n}"), value: Vec::new() };
            let headers = (0..rest.parse::<u32>().expect("a number")).map(header).collect();
            Response { headers, ..text(200, "") }
        }
        _ => text(404, "no such trick"),
    }
}

fn fault() -> String {
    config::get("fault").ok().flatten().unwrap_or_default()
}

/// Appends, then changes. Gives the sequence.
fn store(state: &mut State, key: &str, value: Vec<u8>) -> u64 {
    let event = put(key, value);
    let sequence = append(slice::from_ref(&event)).expect("the log takes this");
    change(state, event);
    sequence
}

fn change(state: &mut State, event: Event) {
    match event {
        Event::Put(put) => state.store.insert(put.key, put.value),
        Event::Delete(key) => state.store.remove(&key),
    };
}

fn put(key: &str, value: Vec<u8>) -> Event {
    Event::Put(Put { key: key.to_owned(), value, metadata: Vec::new(), expires: None })
}

fn text(status: u16, text: impl ToString) -> Response {
    Response { status, headers: Vec::new(), body: text.to_string().into_bytes(), depends_on: None }
}

fn with_header(name: &str, value: &str) -> Response {
    Response { headers: vec![Header { name: name.to_owned(), value: value.into() }], ..text(200, "") }
}

/// Traps without a word, unlike a panic.
#[inline(never)]
fn fall_over() -> ! {
    std::process::abort()
}

/// Keeps busy for a while.
fn dawdle(time: Duration) {
    let begun = Instant::now();
    while begun.elapsed() < time {}
}

/// Runs when the component is instantiated, before anything is asked of it.
#[cfg(target_arch = "wasm32")]
#[unsafe(export_name = "_initialize")]
extern "C" fn start() {
    if fault() == "start-loops" {
        circle()
    }
}

#[inline(never)]
fn circle() -> ! {
    loop {
        black_box(());
    }
}

/// Takes memory until there is no more, which ends a Rust program.
#[inline(never)]
fn grow() -> ! {
    loop {
        // Written to, since what is only reserved costs nobody anything.
        black_box(vec![1_u8; 1 << 20].leak());
    }
}

/// Calls itself until there is no stack left.
#[inline(never)]
fn dig(depth: u64) -> u64 {
    if black_box(depth) == u64::MAX { depth } else { black_box(dig(depth + 1)) + 1 }
}

// The names under which a component exports its calls are none that a native linker takes.
#[cfg(target_arch = "wasm32")]
export!(Component);
