//! A guest that misbehaves on demand, so that tests can see the host outlive it.
//!
//! What goes wrong is chosen by the path of a request, or for calls that are not requests by the setting `fault`
//! (`--guest-config fault=…`). It also keeps a small store, so that tests can see what survived.

mod asks;
mod candidate;
mod lies;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::hint::black_box;
use std::slice;
use std::time::{Duration, Instant};

use exports::kvs::store::lifecycle::{Batch, Description, Statistics};
use exports::kvs::store::sharding::Target;
use exports::kvs::store::{handler, lifecycle, sharding};
use kvs::store::connection;
use kvs::store::http::{Header, Request, Response};
use kvs::store::response_cache::reuse;
use kvs::store::timer;
use kvs::store::transaction_log::{Event, Put, append};
use kvs::store::watch::{Selector, subscribe, wait_for_change};
use wasi::config::store as config;

/// Whose instance is asked all that is not about a key; keys with this tag are its own.
const OWN: &str = "{own}";

wit_bindgen::generate!({
    path: "../../../wit",
    // Calls the sandbox by its own names too, where the standard library behaves.
    inline: "
        package kvs:unruly;
        world unruly {
            include kvs:store/sharded-store@0.2.0;
            import wasi:cli/stdout@0.2.12;
            import wasi:random/random@0.2.12;
            import wasi:random/insecure-seed@0.2.12;
            import wasi:clocks/monotonic-clock@0.2.12;
            import wasi:clocks/wall-clock@0.2.12;
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
    /// Clocks and randomness in `apply`.
    surroundings: Vec<String>,
    /// Rounds of `dawdle` in a millisecond.
    speed: u64,
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
        if fault() == "apply-dawdles" {
            // Measured here, since clocks stand in `apply`.
            STATE.with_borrow_mut(|state| state.speed = speed());
        }
        let name = if fault() == "name" { "two words" } else { "unruly" };
        let headers = if fault() == "headers" { 65 } else { 0 };
        let capabilities = config::get("capabilities").ok().flatten().unwrap_or_default();
        Description {
            name: name.to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            headers: (0..headers).map(|n| format!("x-{n}")).collect(),
            capabilities: capabilities.split_whitespace().map(str::to_owned).collect(),
        }
    }

    fn apply(batch: Batch) {
        let events: Vec<_> = events(batch).map(|(_, event)| event).collect();
        STATE.with_borrow_mut(|state| {
            match fault().as_str() {
                "apply-traps" => fall_over(),
                "apply-loops-aloud" => {
                    println!("going round in circles");
                    circle()
                }
                "apply-traps-on-poison" if events.iter().any(is_poison) => fall_over(),
                "apply-loops-on-many" if events.len() > 10 => circle(),
                "apply-dawdles" => dawdle(1_200 * state.speed),
                "apply-appends" => state.refusal = format!("{:?}", append(&[put("{own}from apply", Vec::new())])),
                "apply-asks" => state.refusal = asks::ask_for_everything(),
                "apply-looks-around" => state.surroundings.push(surroundings()),
                _ => {}
            }
            for event in events {
                state.applied += 1;
                change(state, event);
            }
        });
    }

    fn tick(now_ms: u64) -> Option<u64> {
        STATE.with_borrow_mut(|state| {
            state.ticks += 1;
            if fault() == "tick-appends" {
                state.refusal = format!("{:?}", append(&[put("{own}from tick", Vec::new())]));
            }
        });
        match fault().as_str() {
            "tick-traps" => fall_over(),
            // Is never done.
            "tick-again" => Some(now_ms),
            "tick-in-50-ms" => Some(now_ms + 50),
            "tick-never" => Some(u64::MAX),
            "tick-sets-timer-to-never" => {
                timer::set(None);
                Some(now_ms)
            }
            _ => None,
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
    fn route(_method: String, target: String) -> Target {
        match target[1..].split_once('/') {
            Some(("store" | "store-and-trap" | "store-early", key)) => Target::Key(key.to_owned()),
            _ if target == "/route-traps" => fall_over(),
            _ if target == "/candidate/route" && candidate::is_candidate() => Target::AnyShard,
            _ if target.starts_with("/all-shards") => Target::AllShards,
            _ => Target::Key(OWN.to_owned()),
        }
    }

    fn extract_keys(_body: Vec<u8>) -> Vec<String> {
        Vec::new()
    }

    fn merge_responses(request: Request, mut responses: Vec<Response>) -> Response {
        let mut merged = responses.remove(0);
        if request.target == "/all-shards/candidate" && candidate::is_candidate() {
            merged.status = 299;
        }
        merged
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
        ("PUT", "store-and-loop") => {
            store(state, rest, request.body);
            circle()
        }
        // Appends in its first call only.
        ("PUT", "store-and-wait") => {
            if !state.store.contains_key(rest) {
                store(state, rest, request.body);
            }
            wait_for_change(rest, 300_000);
            text(200, "")
        }
        // Claims that the answer depends on nothing.
        ("PUT", "store-early") => Response { read_sequence: Some(0), ..text(201, store(state, rest, request.body)) },
        ("GET", "store") => match state.store.get(rest) {
            Some(value) => text(200, String::from_utf8_lossy(value)),
            None => text(404, "nothing there"),
        },
        (_, "ask") => asks::ask(rest, &request),
        // State that is not in the log.
        (_, "hide") => {
            state.store.insert(rest.to_owned(), Vec::new());
            text(200, "")
        }
        // Whichever shard owns that key.
        (_, "append-to") => text(200, format!("{:?}", append(&[put(rest, Vec::new())]))),
        (_, "append-too-much") => text(200, format!("{:?}", append(&[put("{own}large", vec![0; 2 << 20])]))),
        (_, "append-often") => {
            let asked: usize = rest.parse().expect("a number");
            let taken = (0..asked).take_while(|_| append(&[put("{own}often", Vec::new())]).is_ok()).count();
            text(200, taken)
        }
        (_, "watch") => {
            // `SELECTORS[/AFTER[/puts-only]]`, of which a selector that ends in `*` is a prefix.
            let mut parts = rest.split('/');
            let mut part = || parts.next().unwrap_or_default();
            let (selectors, after, puts_only) = (part(), part(), part() == "puts-only");
            let selector = |text: &str| match text.strip_suffix('*') {
                Some(prefix) => Selector::Prefix(prefix.replace("%01", "\u{1}")),
                None => Selector::Key(text.replace("%01", "\u{1}")),
            };
            let selectors: Vec<_> = selectors.split(',').filter(|text| !text.is_empty()).map(selector).collect();
            subscribe(&selectors, Some(after).filter(|after| !after.is_empty()), puts_only);
            let headers = vec![Header { name: "content-type".to_owned(), value: b"text/event-stream".to_vec() }];
            Response { headers, ..text(200, "") }
        }
        (_, "wait") => {
            wait_for_change(rest, 300_000);
            text(200, state.handled)
        }
        // `DEED/KEYS[/UNTIL]`: declares that the response can be reused, and does something beside.
        (_, "reuse") => {
            let mut parts = rest.split('/');
            let (deed, keys) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
            let until = parts.next().map(|after| request.time_ms + after.parse::<u64>().expect("milliseconds"));
            besides(deed, &request);
            let keys: Vec<_> = keys.split(',').map(str::to_owned).collect();
            reuse(&keys, until);
            text(200, state.handled)
        }
        // Any key: the body.
        (method, "append-any") => {
            let key = String::from_utf8(request.body).expect("text");
            let event = if method == "DELETE" { Event::Delete(key) } else { put(&key, Vec::new()) };
            text(200, format!("{:?}", append(&[event])))
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
        (_, "grant") => text(200, format!("{:?}", request.grant)),
        (_, "surroundings") => text(200, format!("{}\n{}", state.surroundings.join("\n"), surroundings())),
        (_, "keys") => text(200, format!("{:?}", state.store.keys().collect::<Vec<_>>())),
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
        (_, "candidate") => candidate::differ(state, rest, &request),

        // Responses that are not HTTP, or not true.
        (_, "body") => Response { body: vec![b'x'; rest.parse().expect("a number")], ..text(200, "") },
        (_, "read-sequence") => Response { read_sequence: rest.parse().ok(), ..text(200, "so it says") },
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

/// Deeds by which a declaration of reuse is void, and others by which it is not.
fn besides(deed: &str, request: &Request) {
    match deed {
        "append" => drop(append(&[put("{own}beside", Vec::new())])),
        "append-nothing" => drop(append(&[])),
        "subscribe" => subscribe(&[], None, false),
        "wait" => wait_for_change("{own}waited-for", 1),
        "peer" => drop(connection::peer_address()),
        "tls" => drop(connection::tls_version()),
        "identity" => drop(connection::client_identity()),
        "wall-clock" => drop(wasi::clocks::wall_clock::now()),
        "monotonic-clock" => drop(wasi::clocks::monotonic_clock::now()),
        "random" => drop(wasi::random::random::get_random_u64()),
        "seed" => drop(wasi::random::insecure_seed::insecure_seed()),
        "config" => drop(config::get("fault")),
        "print" => println!("beside"),
        "request-id" => drop(asks::ask("request-id", request)),
        "log" => drop(asks::ask("log/info/beside", request)),
        "count" => drop(asks::ask("add/beside/1", request)),
        "timer" => drop(asks::ask("timer/1", request)),
        _ => {}
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
    Event::Put(Put { key: key.to_owned(), value, metadata: Vec::new(), expires_at_ms: None })
}

fn text(status: u16, text: impl ToString) -> Response {
    Response { status, headers: Vec::new(), body: text.to_string().into_bytes(), read_sequence: None }
}

fn with_header(name: &str, value: &str) -> Response {
    Response { headers: vec![Header { name: name.to_owned(), value: value.into() }], ..text(200, "") }
}

/// Traps without a word, unlike a panic.
#[inline(never)]
fn fall_over() -> ! {
    std::process::abort()
}

/// Clocks and randomness as the guest finds them.
fn surroundings() -> String {
    let wall = wasi::clocks::wall_clock::now();
    let monotonic = wasi::clocks::monotonic_clock::now();
    let random = wasi::random::random::get_random_u64();
    let bytes = wasi::random::random::get_random_bytes(3);
    let seed = wasi::random::insecure_seed::insecure_seed();
    format!("{}.{} {monotonic} {random} {bytes:?} {seed:?}", wall.seconds, wall.nanoseconds)
}

/// Rounds of `dawdle` in a millisecond: the most of several, since the machine has other things to do.
fn speed() -> u64 {
    let rounds_of = |_| {
        let begun = Instant::now();
        let mut rounds = 0;
        while begun.elapsed() < Duration::from_millis(5) {
            dawdle(1_000);
            rounds += 1_000;
        }
        rounds / 5
    };
    (0..10).map(rounds_of).max().unwrap_or_default()
}

/// Sequences and events of a batch.
fn events(batch: Batch) -> impl Iterator<Item = (u64, Event)> {
    let Batch { entries, bytes, metadata } = batch;
    let mut start = 0;
    entries.into_iter().map(move |entry| {
        let mut take = |length: u32| {
            let end = start + length as usize;
            let taken = bytes[start..end].to_vec();
            start = end;
            taken
        };
        let key = String::from_utf8(take(entry.key_bytes)).expect("keys are UTF-8");
        let event = match entry.put {
            None => Event::Delete(key),
            Some(put) => Event::Put(Put {
                key,
                value: take(put.value_bytes),
                metadata: put.metadata.map(|index| metadata[index as usize].clone()).unwrap_or_default(),
                expires_at_ms: put.expires_at_ms,
            }),
        };
        (entry.sequence, event)
    })
}

fn is_poison(event: &Event) -> bool {
    matches!(event, Event::Put(put) if put.key.contains("poison"))
}

/// Keeps busy for a while.
fn dawdle(rounds: u64) {
    for round in 0..rounds {
        black_box(round);
    }
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
