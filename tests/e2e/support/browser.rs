//! Headless Chromium, controlled with the Chrome DevTools Protocol over a pair of pipes.
//!
//! Owns: the browser process, its profile, one page. Must never know: the content of the page.

use std::cell::{Cell, RefCell};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

use super::server::PATIENCE;

/// Flags of each start.
const FLAGS: [&str; 5] =
    ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-proxy-server"];
/// Interval of polls of a page.
const PAUSE: Duration = Duration::from_millis(50);

/// Adds flags to `command`, which runs Chromium: headless, with all files in `home`.
pub fn headless(command: &mut Command, home: &Path) {
    command.args(FLAGS).envs([("HOME", home), ("TMPDIR", home)]).stderr(Stdio::null());
}

/// A page in a browser of its own.
pub struct Page {
    browser: Child,
    commands: RefCell<ChildStdin>,
    messages: Receiver<Value>,
    session: String,
    last: Cell<u64>,
    /// Errors of the page's scripts that nobody caught, and violations of its policy.
    errors: RefCell<Vec<String>>,
    _home: TempDir,
}

impl Page {
    pub fn open(url: &str) -> Self {
        let home = TempDir::new().expect("a temporary directory can be made");
        // The protocol has the descriptors 3 and 4.
        let mut command = Command::new("sh");
        command.args(["-c", "exec chromium \"$@\" 3<&0 4>&1 </dev/null >/dev/null", "chromium"]);
        headless(&mut command, home.path());
        command.arg("--remote-debugging-pipe").stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut browser = command.spawn().expect("sh can be started");
        let output = BufReader::new(browser.stdout.take().expect("it is piped"));
        let (sender, messages) = mpsc::channel();
        thread::spawn(move || {
            for message in output.split(0).map_while(Result::ok) {
                if sender.send(serde_json::from_slice(&message).expect("a message is JSON")).is_err() {
                    return;
                }
            }
        });
        let commands = RefCell::new(browser.stdin.take().expect("it is piped"));
        let (last, errors) = (Cell::new(0), RefCell::default());
        let mut page = Self { browser, commands, messages, session: String::new(), last, errors, _home: home };
        let target = page.call("Target.createTarget", json!({ "url": "about:blank" }));
        let attached = page.call("Target.attachToTarget", json!({ "targetId": target["targetId"], "flatten": true }));
        page.session = attached["sessionId"].as_str().expect("a session has an id").to_owned();
        for domain in ["Page.enable", "Runtime.enable", "Log.enable"] {
            page.call(domain, json!({}));
        }
        page.call("Page.navigate", json!({ "url": url }));
        page.until("location.href !== 'about:blank' && document.readyState === 'complete'");
        page
    }

    /// Calls a method of the protocol.
    #[track_caller]
    pub fn call(&self, method: &str, params: Value) -> Value {
        let id = self.last.get() + 1;
        self.last.set(id);
        let mut command = json!({ "id": id, "method": method, "params": params });
        if !self.session.is_empty() {
            command["sessionId"] = self.session.as_str().into();
        }
        let text = format!("{command}\0");
        self.commands.borrow_mut().write_all(text.as_bytes()).expect("`just test` installs chromium");
        loop {
            let message = self.messages.recv_timeout(PATIENCE).unwrap_or_else(|_| panic!("no answer to {method}"));
            self.note(&message);
            if message["id"] == id {
                assert!(message.get("error").is_none(), "{method}: {message}");
                return message["result"].clone();
            }
        }
    }

    fn note(&self, message: &Value) {
        let params = &message["params"];
        let error = match message["method"].as_str() {
            Some("Runtime.exceptionThrown") => &params["exceptionDetails"],
            // Responses with an error status are expected.
            Some("Log.entryAdded") if params["entry"]["source"] == "security" => &params["entry"]["text"],
            _ => return,
        };
        self.errors.borrow_mut().push(error.to_string());
    }

    /// The value of an expression, a promise awaited.
    #[track_caller]
    pub fn value(&self, expression: &str) -> Value {
        let params =
            json!({ "expression": expression, "awaitPromise": true, "returnByValue": true, "userGesture": true });
        let result = self.call("Runtime.evaluate", params);
        assert!(result.get("exceptionDetails").is_none(), "{expression}: {result}");
        result["result"]["value"].clone()
    }

    /// Waits until an expression is true.
    #[track_caller]
    pub fn until(&self, expression: &str) {
        let begun = Instant::now();
        while self.value(&format!("Boolean({expression})")) != true {
            let text = || self.value("document.body.innerText");
            assert!(begun.elapsed() < PATIENCE, "never so: {expression}; the page has:\n{}", text());
            thread::sleep(PAUSE);
        }
    }

    /// Waits until the text of an element contains this.
    #[track_caller]
    pub fn says(&self, selector: &str, text: &str) {
        self.until(&format!("document.querySelector({})?.innerText.includes({})", json!(selector), json!(text)));
    }

    #[track_caller]
    pub fn click(&self, selector: &str) {
        let selector = json!(selector);
        self.until(&format!("(e => e && !e.disabled && e.checkVisibility())(document.querySelector({selector}))"));
        self.value(&format!("document.querySelector({selector}).click()"));
    }

    /// Clicks the button with this text.
    #[track_caller]
    pub fn press(&self, text: &str) {
        let find = format!(
            "[...document.querySelectorAll('button')].find(e => e.checkVisibility() && e.textContent === {})",
            json!(text)
        );
        self.until(&format!("(e => e && !e.disabled)({find})"));
        self.value(&format!("{find}.click()"));
    }

    /// Puts a text into a field.
    #[track_caller]
    pub fn fill(&self, selector: &str, text: &str) {
        self.value(&format!("document.querySelector({}).value = {}", json!(selector), json!(text)));
    }

    #[track_caller]
    pub fn text(&self, selector: &str) -> String {
        let text = self.value(&format!("document.querySelector({}).innerText", json!(selector)));
        text.as_str().unwrap_or_else(|| panic!("no text in {selector}: {text}")).to_owned()
    }

    /// Chooses a file in a field for files.
    #[track_caller]
    pub fn choose(&self, selector: &str, file: &Path) {
        let document = self.call("DOM.getDocument", json!({}));
        let query = json!({ "nodeId": document["root"]["nodeId"], "selector": selector });
        let node = self.call("DOM.querySelector", query);
        self.call("DOM.setFileInputFiles", json!({ "nodeId": node["nodeId"], "files": [file] }));
    }

    /// Presses and releases a key.
    #[track_caller]
    pub fn key(&self, key: &str, code: u32) {
        let text = if key == "Enter" { "\r" } else { "" };
        for kind in ["keyDown", "keyUp"] {
            let params = json!({ "type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code, "text": text });
            self.call("Input.dispatchKeyEvent", params);
        }
    }

    /// Checks that no script failed and nothing was blocked by the policy of the page.
    #[track_caller]
    pub fn is_clean(&self) {
        self.value("1");
        assert_eq!(*self.errors.borrow(), Vec::<String>::new());
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // Closes all processes of the browser; killed alone, the first one would leave others.
        let _ = self.commands.borrow_mut().write_all(b"{\"id\":0,\"method\":\"Browser.close\"}\0");
        let _ = self.browser.wait();
    }
}
