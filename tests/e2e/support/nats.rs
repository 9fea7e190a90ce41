//! NATS cluster of one test, on free ports.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

use super::server::{PATIENCE, Process};
use super::wire::Connection;

/// Variations of the configuration of a node.
pub const SAFE: &str = "max_payload: 8MB\njetstream { store_dir: STORE, sync_interval: always }\n";

pub struct Nodes {
    home: TempDir,
    ports: Vec<Ports>,
    processes: Vec<Option<Process>>,
}

#[derive(Clone, Copy)]
struct Ports {
    client: u16,
    routes: u16,
    monitor: u16,
}

impl Nodes {
    pub fn start(count: usize) -> Self {
        Self::start_with(count, SAFE)
    }

    pub fn start_with(count: usize, settings: &str) -> Self {
        // All at once, so that they differ.
        let free: Vec<_> = (0..3 * count).map(|_| TcpListener::bind("127.0.0.1:0").expect("a port is free")).collect();
        let port = |index: usize| free[index].local_addr().expect("it is bound").port();
        let ports: Vec<_> = (0..count)
            .map(|node| Ports { client: port(3 * node), routes: port(3 * node + 1), monitor: port(3 * node + 2) })
            .collect();
        drop(free);
        let home = TempDir::new().expect("a temporary directory can be made");
        let routes: Vec<_> = ports.iter().map(|ports| format!("nats://127.0.0.1:{}", ports.routes)).collect();
        for (node, Ports { client, routes: own, monitor }) in ports.iter().enumerate() {
            let store = home.path().join(format!("store{node}"));
            let settings = settings.replace("STORE", &format!("{store:?}"));
            let cluster =
                format!("cluster {{ name: kvs, listen: \"127.0.0.1:{own}\", routes: [{}] }}\n", routes.join(", "));
            let text = format!(
                "server_name: n{node}\nlisten: \"127.0.0.1:{client}\"\nhttp: \"127.0.0.1:{monitor}\"\n{settings}{}",
                if count > 1 { &cluster } else { "" }
            );
            fs::write(home.path().join(format!("{node}.conf")), text).expect("a file can be written");
        }
        let mut nodes = Self { home, ports, processes: (0..count).map(|_| None).collect() };
        (0..count).for_each(|node| nodes.spawn(node));
        (0..count).for_each(|node| nodes.is_ready(node));
        nodes
    }

    fn spawn(&mut self, node: usize) {
        let mut command = Command::new("nats-server");
        command.arg("-c").arg(self.home.path().join(format!("{node}.conf")));
        self.processes[node] = Some(Process::spawn(command));
    }

    fn is_ready(&self, node: usize) {
        let process = self.processes[node].as_ref().expect("it was started");
        let ready = process.stderr.find(|line| line.contains("Server is ready").then_some(()));
        ready.unwrap_or_else(|said| panic!("node {node} is not ready, but said:\n{said}"));
    }

    pub fn restart(&mut self, node: usize) {
        self.spawn(node);
        self.is_ready(node);
    }

    /// SIGKILL.
    pub fn kill(&mut self, node: usize) {
        let mut process = self.processes[node].take().expect("it runs");
        process.signal(Signal::KILL);
        process.wait();
    }

    /// SIGTERM: what it stored it finds again without reading all of it.
    pub fn stop(&mut self, node: usize) {
        let mut process = self.processes[node].take().expect("it runs");
        process.signal(Signal::TERM);
        process.wait();
    }

    /// The URL of a log.
    pub fn url(&self, log: &str) -> String {
        let servers: Vec<_> = self.ports.iter().map(|ports| format!("127.0.0.1:{}", ports.client)).collect();
        format!("nats://{}/{log}", servers.join(","))
    }

    /// The monitoring ports of all nodes.
    pub fn monitors(&self) -> String {
        let urls: Vec<_> = self.ports.iter().map(|ports| format!("http://127.0.0.1:{}", ports.monitor)).collect();
        urls.join(",")
    }

    /// The node that leads the stream of a log.
    pub fn leader(&self, log: &str) -> usize {
        let deadline = Instant::now() + PATIENCE;
        loop {
            for node in 0..self.ports.len() {
                if self.processes[node].is_some() && self.leads(node, log) {
                    return node;
                }
            }
            assert!(Instant::now() < deadline, "no node leads the stream");
            thread::sleep(Duration::from_millis(50));
        }
    }

    fn leads(&self, node: usize, log: &str) -> bool {
        let address = SocketAddr::from(([127, 0, 0, 1], self.ports[node].monitor));
        let mut connection = Connection::open(address);
        connection.ask_for_head("GET", "/jsz?streams=true", &[]);
        let answer: Vec<u8> = std::iter::from_fn(|| connection.chunk()).flatten().collect();
        let answer: Value = serde_json::from_slice(&answer).expect("it is JSON");
        let streams = answer["account_details"].as_array().into_iter().flatten();
        let mut streams = streams.flat_map(|account| account["stream_detail"].as_array().into_iter().flatten());
        let stream = streams.find(|stream| stream["name"] == format!("KVS-{log}-00"));
        stream.is_some_and(|stream| stream["cluster"]["leader"] == format!("n{node}"))
    }

    /// Directory in which a node stores everything.
    pub fn store(&self, node: usize) -> PathBuf {
        self.home.path().join(format!("store{node}"))
    }

    /// Replaces a setting of a node, effective after its next start.
    pub fn set(&self, node: usize, before: &str, after: &str) {
        let file = self.home.path().join(format!("{node}.conf"));
        let text = fs::read_to_string(&file).expect("it was written");
        assert!(text.contains(before), "{text}");
        fs::write(file, text.replace(before, after)).expect("a file can be written");
    }

    /// Sets the `max_bytes` of the stream of a log to this many more than it has; without a number, to no limit.
    pub fn limit(&self, log: &str, more: Option<i64>) {
        let bytes = self.info(log)["state"]["bytes"].as_i64().expect("it has a size");
        self.edit(log, "max_bytes", more.map_or(-1, |more| bytes + more));
    }

    /// Changes a setting of the stream of a log.
    pub fn edit(&self, log: &str, setting: &str, value: i64) {
        let mut config = self.info(log)["config"].clone();
        config[setting] = value.into();
        let answer = self.api(&format!("STREAM.UPDATE.KVS-{log}-00"), &config.to_string());
        assert!(!answer.contains("\"error\""), "{answer}");
    }

    /// The sequence of the first message of the stream of a log.
    pub fn first(&self, log: &str) -> u64 {
        self.info(log)["state"]["first_seq"].as_u64().expect("it has one")
    }

    fn info(&self, log: &str) -> Value {
        serde_json::from_str(&self.api(&format!("STREAM.INFO.KVS-{log}-00"), "")).expect("it is JSON")
    }

    /// Makes a request of the API of JetStream, as an operator does by hand, and waits for the answer.
    pub fn api(&self, call: &str, body: &str) -> String {
        let node = self.processes.iter().position(Option::is_some).expect("one runs");
        let mut stream = TcpStream::connect(("127.0.0.1", self.ports[node].client)).expect("it listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout can be set");
        let size = body.len();
        let request =
            format!("CONNECT {{\"verbose\":false}}\r\nSUB answer 1\r\nPUB $JS.API.{call} answer {size}\r\n{body}\r\n");
        stream.write_all(request.as_bytes()).expect("it can be sent");
        let lines = BufReader::new(stream).lines().map_while(Result::ok);
        lines.skip_while(|line| !line.starts_with("MSG answer")).nth(1).expect("it answers")
    }
}
