//! The console in a browser: every action, every error, and keys and values with HTML and scripts.

mod files;

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use serde_json::json;
use tempfile::TempDir;

use crate::support::browser::Page;
use crate::support::guests::{DEFAULT_GUEST, copy_of, guest};
use crate::support::load::count;
use crate::support::log::kvs_at;
use crate::support::metrics::counts;
use crate::support::server::{Server, serve};
use crate::support::swap::serving;
use crate::support::tokens::Tokens;
use crate::support::wire::{Connection, short};

fn console(server: &Server) -> Page {
    Page::open(&format!("http://{}/console", server.admin()))
}

fn put(server: &Server, key: &str, value: impl AsRef<[u8]>) {
    let answer = Connection::open(server.address()).ask("PUT", &short(key), value.as_ref());
    assert_eq!(answer.status, 201, "{}", answer.text());
}

fn get(server: &Server, key: &str) -> Option<Vec<u8>> {
    let answer = Connection::open(server.address()).ask("GET", &short(key), b"");
    (answer.status == 200).then_some(answer.body)
}

/// Waits for the list to have entries.
#[track_caller]
fn lists(page: &Page, entries: &[&str]) {
    let shown = "[...document.querySelectorAll('#list button')].map(e => e.innerText)";
    page.until(&format!("JSON.stringify({shown}) === JSON.stringify({})", json!(entries)));
}

#[track_caller]
fn open(page: &Page, key: &str) {
    page.fill("#key", key);
    page.click("#open button");
    page.until(&format!("document.querySelector('#editor-key').textContent === {}", json!(key)));
    loaded(page);
}

/// Waits until the value in the editor is that of its key.
#[track_caller]
fn loaded(page: &Page) {
    page.until(
        "document.activeElement.id === 'editor-key' && document.querySelector('#value-state').innerText !== 'Loading'",
    );
}

#[test]
fn page_shows_health_charts_guest_and_backup() {
    let server = Server::start(&[]);
    put(&server, "a", "value");
    let page = console(&server);
    page.says("#state", "Ready");
    page.says("#parts", "log ok");
    page.says("#guest-facts", "kvs");
    page.says("#guest-facts", env!("CARGO_PKG_VERSION"));
    for chart in ["Requests by status", "Transaction log", "Memory of the guest", "Watches and connections"] {
        page.says("#figures", chart);
    }
    put(&server, "b", "value");
    for chart in ["Latency of requests", "fsync", "Commit of a batch", "Entries of a batch"] {
        page.says("#figures", chart);
    }
    page.says("#figures", "2xx: ");
    assert_eq!(page.value("document.querySelector('#backup').checkVisibility()"), true);
    for file in ["/console", "/console/app.js"] {
        let answer = Connection::open(server.admin()).ask("GET", file, b"");
        let policy = answer.header("content-security-policy").expect("it has a policy");
        for part in ["default-src 'none';", "script-src 'self';", "frame-ancestors 'none';", "trusted-types 'none'"] {
            assert!(policy.contains(part) && !policy.contains("unsafe"), "{file}: {policy}");
        }
    }
    page.is_clean();
}

#[test]
fn value_is_created_changed_and_deleted() {
    let server = Server::start(&[]);
    let page = console(&server);
    page.says("#list-state", "No keys here");
    open(&page, "cart/7");
    page.says("#value-state", "There is no value yet");
    page.fill("#value", "3 apples");
    page.fill("#content-type", "text/plain");
    page.fill("#ttl", "3600");
    page.click("#save");
    page.says("#value-state", "Saved");
    lists(&page, &["Folder cart/"]);
    page.says("#value-facts", "\"1\"");
    page.says("#value-facts", "Expires");
    let stored = Connection::open(server.address()).ask("GET", &short("cart/7"), b"");
    assert_eq!((stored.text(), stored.header("content-type")), ("3 apples", Some("text/plain")));
    assert!(stored.header("expires").is_some());

    page.press("Folder cart/");
    lists(&page, &["cart/7"]);
    page.click("#parent");
    lists(&page, &["Folder cart/"]);
    page.click("#folders");
    lists(&page, &["cart/7"]);

    // Another client was faster.
    put(&server, "cart/7", "4 apples");
    page.fill("#value", "5 apples");
    page.click("#save");
    page.says("#value-state", "The key was changed meanwhile");
    assert_eq!(page.value("document.querySelector('#value').value"), "5 apples");
    assert_eq!(get(&server, "cart/7").as_deref(), Some(&b"4 apples"[..]));
    page.click("#reload");
    page.until("document.querySelector('#value').value === '4 apples'");
    page.fill("#value", "5 apples");
    page.click("#save");
    page.says("#value-state", "Saved");

    page.click("#delete");
    page.press("Cancel");
    page.click("#delete");
    page.says("#question-text", "cart/7");
    page.click("#question-yes");
    page.says("#value-state", "Deleted");
    assert_eq!(get(&server, "cart/7"), None);
    lists(&page, &[]);

    page.fill("#key", "a\u{1}b");
    page.click("#open button");
    page.says("#editor-key", "a\\u{1}b");
    page.says("#value-state", "(400)");
    page.is_clean();
}

#[test]
fn binary_value_is_kept_unchanged() {
    let server = Server::start(&[]);
    let large = "x".repeat(300 << 10);
    for (key, value) in
        [("bytes", &b"\xff\x00\xfe"[..]), ("lines", b"a\r\nb"), ("large", large.as_bytes()), ("empty", b"")]
    {
        put(&server, key, value);
    }
    let page = console(&server);
    for (key, says, shows) in [
        ("bytes", "not text", "ff 00 fe"),
        ("lines", "line ends", "a\\u{d}"),
        ("large", "too large to edit here", "xxx"),
    ] {
        open(&page, key);
        page.says("#value-state", says);
        page.says("#bytes", shows);
        assert_eq!(page.value("document.querySelector('#save').disabled"), true);
    }
    let files = TempDir::new().expect("a temporary directory can be made");
    let file = files.path().join("value");
    fs::write(&file, b"\xfe\x00").expect("the directory takes a file");
    page.choose("#replacement", &file);
    page.says("#value-state", "Saved");
    assert_eq!(get(&server, "large").as_deref(), Some(&b"\xfe\x00"[..]));
    open(&page, "empty");
    page.fill("#value", "no more");
    page.click("#save");
    page.says("#value-state", "Saved");
    assert_eq!(get(&server, "empty").as_deref(), Some(&b"no more"[..]));
    page.is_clean();
}

/// Keys and values that a page would run, or display in another order, if it parsed them.
const HOSTILE: [&str; 8] = [
    "<script>window.ran=1</script>",
    "<img src=x onerror=window.ran=1>",
    "\"><svg onload=window.ran=1>",
    "javascript:window.ran=1",
    "${window.ran=1}{{constructor.constructor('window.ran=1')()}}",
    "a\u{202e}gnp.exe\u{2066}",
    "__proto__",
    "%00%2F../..%5c?#&+ \u{feff}\u{1f469}\u{200d}\u{1f4bb}",
];

#[test]
fn no_key_or_value_runs_as_script() {
    let server = Server::start(&[]);
    let long = format!("long/{}", "\u{202e}<b>".repeat(160));
    for (number, key) in HOSTILE.into_iter().chain([long.as_str()]).enumerate() {
        put(&server, key, format!("{}\u{1}\u{0}{number}", HOSTILE[number % HOSTILE.len()]));
    }
    let page = console(&server);
    page.click("#folders");
    page.until(&format!("document.querySelectorAll('#list button').length === {}", HOSTILE.len() + 1));
    page.says("#list", "<script>window.ran=1</script>");
    page.says("#list", "a\\u{202e}gnp.exe\\u{2066}");
    page.fill("#watch-prefix", "");
    page.click("#watch-start");
    page.says("#watch-state", "Watching");
    for number in 0..=HOSTILE.len() {
        page.value(&format!("document.querySelectorAll('#list button')[{number}].click()"));
        loaded(&page);
        let value = page.value("document.querySelector('#value').value");
        assert!(
            HOSTILE.iter().any(|hostile| value.as_str().is_some_and(|value| value.starts_with(hostile))),
            "{value}"
        );
        page.click("#save");
        page.says("#value-state", "Saved");
        page.until(&format!("document.querySelectorAll('#events li').length === {}", number + 1));
    }
    page.says("#events", "<img src=x onerror=window.ran=1>");
    assert_eq!(page.value("window.ran ?? 'nothing'"), "nothing");
    assert_eq!(page.value("document.querySelectorAll('main img, main script, main b').length"), 0);
    assert_eq!(page.value("document.documentElement.scrollWidth <= innerWidth"), true);
    page.is_clean();
}

#[test]
fn many_keys_come_a_page_at_a_time() {
    let keys = count("KVS_TEST_CONSOLE_KEYS", 100_000);
    let data = TempDir::new().expect("a temporary directory can be made");
    let server = Server::spawn(serve(data.path()), data);
    let mut client = Connection::open(server.address());
    for thousand in 0..keys / 1_000 {
        let mut operations = String::from("[");
        for number in 0..1_000 {
            let comma = if number == 0 { "" } else { "," };
            let _ = write!(operations, r#"{comma}{{"op":"put","key":"{thousand:03}/{number:03}","value":"x"}}"#);
        }
        operations.push(']');
        assert_eq!(client.ask("POST", "/v1", operations.as_bytes()).status, 200);
    }
    let page = console(&server);
    page.says("#list-state", "100 entries");
    page.press("Folder 042/");
    page.says("#list-state", "100 entries, more on the next page");
    page.until("document.querySelector('#list button').innerText === '042/000'");
    page.click("#next-page");
    page.until("document.querySelector('#list button').innerText === '042/100'");
    assert_eq!(page.value("document.querySelectorAll('#list li').length"), 100);
    page.click("#first-page");
    page.until("document.querySelector('#list button').innerText === '042/000'");
    page.is_clean();
}

#[test]
fn watch_continues_over_restart_of_server() {
    let data = TempDir::new().expect("a temporary directory can be made");
    let [listen, admin] = [free_address(), free_address()];
    let start = |data: TempDir| {
        let mut command = kvs_at(data.path());
        command.args(["serve", "--listen", &listen, "--admin", &admin]);
        Server::spawn(command, data)
    };
    let server = start(data);
    let page = console(&server);
    page.fill("#watch-prefix", "cart");
    page.click("#watch-start");
    page.says("#watch-state", "Watching");
    put(&server, "cart7", "3 apples");
    put(&server, "other", "not seen");
    page.says("#events", "1 put cart7 = 3 apples");

    let data = server.terminate().into_data();
    page.says("#state", "no connection to the server; trying again");
    page.says("#watch-state", "connecting again");
    let server = start(data);
    page.says("#state", "Ready");
    page.says("#watch-state", "Watching");
    put(&server, "cart8", "4 apples");
    page.says("#events", "put cart8 = 4 apples");
    assert_eq!(page.value("document.querySelectorAll('#events li').length"), 2);
    page.click("#watch-stop");
    counts(&server, "kvs_watches", 0.0);
    page.click("#watch-start");
    counts(&server, "kvs_watches", 1.0);
    page.is_clean();
    // The page is closed.
    drop(page);
    counts(&server, "kvs_watches", 0.0);
}

fn free_address() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("there is a free port");
    listener.local_addr().expect("a listener has an address").to_string()
}

#[test]
fn guest_is_swapped_and_rolled_back() {
    let server = Server::start(&["--probation", "1h"]);
    put(&server, "a", "value");
    let files = TempDir::new().expect("a temporary directory can be made");
    let (bad, copy) = (files.path().join("bad.wasm"), files.path().join("copy.wasm"));
    fs::write(&bad, "no component").expect("the directory takes a file");
    fs::write(&copy, copy_of(DEFAULT_GUEST)).expect("the directory takes a file");
    let page = console(&server);
    page.says("#guest-facts", "kvs");
    page.choose("#component", &bad);
    page.says("#swap-result", "Dry run of bad.wasm failed");
    page.says("#swap-result", "(422)");
    assert_eq!(page.value("document.querySelector('#swap').disabled"), true);

    page.choose("#component", &copy);
    page.says("#swap-result", "fits; 1 entries replayed");
    let before = page.text("#guest-facts");
    page.click("#swap");
    page.says("#swap-phase", "Probation: kvs");
    page.says("#swap-left", "s left");
    page.until(&format!("document.querySelector('#guest-facts').innerText !== {}", json!(before)));
    page.click("#roll-back");
    page.says("#swap-result", "rolled back on request");
    page.until("!document.querySelector('#swap-progress').checkVisibility()");
    page.says("#guest-facts", "rolled back on probation");
    assert_eq!(get(&server, "a").as_deref(), Some(&b"value"[..]));
    let rollback = Connection::open(server.admin()).ask("DELETE", "/guest?rollback", b"");
    rollback.says(409, "no guest is on probation, and there is no shadow traffic");
    page.is_clean();
}

#[test]
fn shadow_traffic_is_shown_and_ended() {
    let server = Server::start(&["--probation", "1ms"]);
    put(&server, "a", "value");
    let files = TempDir::new().expect("a temporary directory can be made");
    let copy = files.path().join("copy.wasm");
    fs::write(&copy, copy_of(DEFAULT_GUEST)).expect("the directory takes a file");
    let page = console(&server);
    page.choose("#component", &copy);
    page.says("#swap-result", "fits; 1 entries replayed");
    page.value("document.querySelector('#shadow').value = '600'");
    page.value("document.querySelector('#sample').value = '100%'");
    page.click("#swap");
    page.says("#swap-phase", "Swap: shadow");
    page.says("#roll-back", "End shadow traffic");
    page.until(&format!(
        "fetch('{}') && !/Compared\\s0\\s/.test(document.querySelector('#shadow-facts').innerText)",
        "/v1/a"
    ));
    page.says("#shadow-facts", "Different\n0");
    page.click("#roll-back");
    page.says("#swap-result", "shadow traffic was ended on request");
    page.says("#shadow-facts", "Candidate");
    page.is_clean();
}

#[test]
fn guest_with_other_interface_is_reported() {
    let server = Server::start(&["--probation", "1ms"]);
    let page = console(&server);
    page.says("#list-state", "No keys here");
    // Dropped on the page.
    page.choose("#component", Path::new(guest()));
    page.says("#swap-result", "unruly");
    page.value(
        "const files = new DataTransfer(); files.items.add(document.querySelector('#component').files[0]); \
         document.querySelector('#swap-result').textContent = ''; \
         document.querySelector('#drop').dispatchEvent(new DragEvent('drop', { dataTransfer: files, cancelable: true }))",
    );
    page.says("#swap-result", "fits");
    page.click("#swap");
    page.says("#swap-result", "serves; requests were held for");
    page.says("#foreign", "does not speak the default interface");
    page.says("#foreign", "unruly");
    assert_eq!(page.value("document.querySelector('#store').checkVisibility()"), false);
    assert_eq!(serving(&server), "unruly");
    page.click("#built-in");
    page.click("#question-yes");
    page.until("document.querySelector('#swap-result').innerText.startsWith('kvs')");
    page.until("document.querySelector('#store').checkVisibility()");
    assert_eq!(serving(&server), "kvs");
    page.is_clean();
}

#[test]
fn operator_signs_in_with_token() {
    let tokens = Tokens::new();
    let token = tokens.add(&["boss", "--scope", "admin"]);
    let server = Server::start(&["--tokens", &tokens.file(), "--admin", "0.0.0.0:0"]);
    let page = Page::open(&format!("http://127.0.0.1:{}/console", server.admin().port()));
    page.says("#state", "Sign in to continue");
    // Health needs no token.
    page.says("#parts", "log ok");
    page.fill("#token", "kvs_wrong");
    page.click("#sign-in button");
    page.says("#sign-in-reason", "(401)");
    page.fill("#token", &token);
    page.click("#sign-in button");
    page.says("#state", "Ready");
    page.says("#guest-facts", "kvs");
    page.says("#list-state", "No keys here");
    page.until("!document.querySelector('#sign-in').checkVisibility()");
    open(&page, "a");
    page.fill("#value", "value");
    page.click("#save");
    page.says("#value-state", "Saved");
    page.click("#watch-start");
    page.says("#watch-state", "Watching");
    page.click("#take-backup");
    page.says("#backup-state", "Done");
    server.says("backup: 1 entries after sequence 0 up to 1");
    // In memory only.
    let kept = page.value("JSON.stringify([localStorage, sessionStorage, document.cookie, location.href, document.documentElement.outerHTML])");
    assert!(!kept.as_str().expect("text").contains(&token));
    page.call("Page.reload", json!({}));
    page.says("#state", "Sign in to continue");
    page.is_clean();
}

#[test]
fn page_is_used_with_keyboard_and_on_phone() {
    let server = Server::start(&[]);
    put(&server, "folder/a", "value");
    let page = console(&server);
    lists(&page, &["Folder folder/"]);
    page.call(
        "Emulation.setDeviceMetricsOverride",
        json!({ "width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": true }),
    );
    page.until("innerWidth === 360");
    assert_eq!(page.value("document.documentElement.scrollWidth"), 360);
    // Every control has a name, and Tab reaches each visible one.
    let controls = "[...document.querySelectorAll('input, button, textarea, a[href], [tabindex=\"0\"]')].filter(e => e.checkVisibility() && !e.disabled)";
    let unnamed = format!(
        "{controls}.filter(e => !(e.labels?.length || e.textContent.trim() || e.ariaLabel)).map(e => e.outerHTML).join()"
    );
    assert_eq!(page.value(&unnamed), "");
    let count = page.value(&format!("{controls}.length")).as_u64().expect("a number");
    page.value("window.focused = new Set(); document.addEventListener('focusin', (event) => window.focused.add(event.target)); document.activeElement.blur()");
    for _ in 0..=count + 1 {
        page.key("Tab", 9);
    }
    assert_eq!(page.value(&format!("{controls}.filter(e => !window.focused.has(e)).map(e => e.outerHTML).join()")), "");
    page.value("document.querySelector('#list button').focus()");
    page.key("Enter", 13);
    lists(&page, &["folder/a"]);
    page.value("document.querySelector('#list button').focus()");
    page.key("Enter", 13);
    page.until("document.activeElement.id === 'editor-key'");
    for scheme in ["light", "dark"] {
        page.call(
            "Emulation.setEmulatedMedia",
            json!({ "features": [{ "name": "prefers-color-scheme", "value": scheme }] }),
        );
        let colors = page.value("(s => [s.backgroundColor, s.color].map(c => c.match(/\\d+/g).map(Number).reduce((a, b) => a + b)))(getComputedStyle(document.body))");
        let (back, text) = (colors[0].as_u64(), colors[1].as_u64());
        assert_eq!(back > text, scheme == "light", "{colors}");
    }
    page.is_clean();
}
