//! Token files, and requests with tokens.

use serde_json::Value;
use tempfile::TempDir;

use super::server::{Server, kvs};
use super::wire::{Connection, Response};

/// A token file, and its tokens.
pub struct Tokens {
    directory: TempDir,
}

impl Tokens {
    pub fn new() -> Self {
        Self { directory: TempDir::new().expect("a temporary directory can be made") }
    }

    pub fn file(&self) -> String {
        self.directory.path().join("tokens").to_str().expect("a temporary path is text").to_owned()
    }

    /// Creates a token with `kvs token create`.
    pub fn add(&self, args: &[&str]) -> String {
        let mut command = kvs();
        command.args(["token", "create", "--tokens", &self.file()]).args(args);
        let output = command.stdout(std::process::Stdio::piped()).output().expect("the binary can be started");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("a token is text").trim().to_owned()
    }
}

/// Sends a request with these `Authorization` lines, and reads the response.
pub fn ask(server: &Server, method: &str, path: &str, authorization: &str) -> Response {
    let mut client = Connection::open(server.address());
    client.send(format!("{method} {path} HTTP/1.1\r\nhost: kvs\r\ncontent-length: 0\r\n{authorization}\r\n"));
    client.try_read(method == "HEAD").expect("it is answered")
}

/// The `Authorization` line of a token.
pub fn with(token: &str) -> String {
    format!("authorization: Bearer {token}\r\n")
}

/// A client that has a token.
pub struct Client {
    pub connection: Connection,
    pub bearer: String,
}

impl Client {
    pub fn new(server: &Server, token: &str) -> Self {
        Self { connection: Connection::open(server.address()), bearer: format!("Bearer {token}") }
    }

    pub fn ask(&mut self, method: &str, path: &str, body: &str) -> Response {
        self.connection.ask_with(method, path, &[("authorization", &self.bearer)], body.as_bytes())
    }

    pub fn status(&mut self, method: &str, path: &str, body: &str) -> u16 {
        self.ask(method, path, body).status
    }

    pub fn json(&mut self, method: &str, path: &str, body: &str) -> Value {
        let response = self.ask(method, path, body);
        assert_eq!(response.status, 200, "{method} {path}: {}", response.text());
        serde_json::from_slice(&response.body).expect("JSON")
    }

    /// The keys of a list.
    pub fn keys(&mut self, query: &str) -> Vec<String> {
        let page = self.json("GET", &format!("/v1?{query}"), "");
        let keys = page["keys"].as_array().expect("a list").iter();
        keys.map(|entry| entry["key"].as_str().expect("text").to_owned()).collect()
    }
}
