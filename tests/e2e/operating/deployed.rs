//! The files in `deploy/`: a server with their settings accepts the requests of the clients that they configure.

use std::fs;
use std::path::Path;

use tempfile::TempDir;

use crate::support::backup::{backup, done, temporary, text};
use crate::support::server::{Server, kvs, serve, through};
use crate::support::tokens::Tokens;
use crate::support::wire::Connection;

/// The text of a file.
fn deployed(file: &str) -> String {
    let file = Path::new(kvs_tests::ROOT).join("deploy").join(file);
    fs::read_to_string(file).expect("it is there")
}

/// The settings of kvs in a file of Compose or Kubernetes.
fn settings(file: &str) -> impl Iterator<Item = (&str, &str)> {
    let setting = |line| match str::strip_prefix(line, "- { name: ") {
        Some(item) => item.strip_suffix(" }")?.split_once(", value: "),
        None => line.split_once(": "),
    };
    let settings = file.lines().filter_map(move |line| setting(line.trim()));
    settings.filter(|(name, _)| name.starts_with("KVS_")).map(|(name, value)| (name, value.trim_matches('"')))
}

/// A server with the settings of a file, a token file of its own, free ports, and the log of all tests.
fn server(file: &str, tokens: &Tokens) -> Server {
    let data = TempDir::new().expect("a temporary directory can be made");
    let mut command = serve(data.path());
    command.env_remove("KVS_ADMIN_HOST");
    for (name, value) in settings(file) {
        match name {
            "KVS_TOKENS" => command.env(name, tokens.file()),
            "KVS_ADMIN" => command.env(name, value.replace(":9090", ":0")),
            "KVS_TXLOG" | "KVS_TXLOG_MONITOR" => continue,
            _ => command.env(name, value),
        };
    }
    Server::spawn(command, data)
}

/// Returns the status of a request to the admin listener by this name.
fn status(server: &Server, path: &str, host: &str, token: &str) -> u16 {
    let mut client = Connection::open(server.admin());
    client.send(format!("GET {path} HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer {token}\r\n\r\n"));
    client.try_read(true).expect("it is answered").status
}

#[test]
fn prometheus_of_demo_may_scrape_the_pair() {
    let tokens = Tokens::new();
    let token = tokens.add(&["prometheus", "--scope", "metrics"]);
    let server = server(&deployed("pair/compose.yaml"), &tokens);
    let prometheus = deployed("demo/prometheus.yml");
    let targets = prometheus.lines().find_map(|line| line.trim().strip_prefix("- targets: "));
    let targets: Vec<_> = targets.expect("it has targets").split('"').skip(1).step_by(2).collect();
    assert_eq!(targets.len(), 2);
    for target in targets {
        assert_eq!(status(&server, "/metrics", target, &token), 200, "{target}");
    }
}

#[test]
fn backup_service_takes_one_and_keeps_seven() {
    let unit = deployed("kvs-backup.service");
    // As systemd reads a line.
    let script = |name: &str| {
        let script = |line| str::strip_prefix(line, name)?.strip_prefix("=/bin/sh -c '")?.strip_suffix('\'');
        let script = unit.lines().find_map(script).expect("the service has it");
        script.replace("%%", "%").replace("/usr/local/bin/kvs", kvs_tests::binary())
    };
    let server = Server::start(&[]);
    let files = temporary();
    for night in 1..=8 {
        fs::write(files.path().join(format!("2001-01-0{night}T020000Z.backup")), "").expect("it can be written");
    }
    for name in ["ExecStart", "ExecStartPost"] {
        let mut command = through("sh", &kvs());
        command.args(["-c", &script(name)]).env("STATE_DIRECTORY", files.path());
        command.env("KVS_ADMIN", server.admin().to_string());
        done(command);
    }
    let names = fs::read_dir(files.path()).expect("it can be listed").map(|file| file.expect("it is there").path());
    let mut names: Vec<_> = names.collect();
    names.sort();
    assert_eq!(names.len(), 7);
    assert!(names[0].ends_with("2001-01-03T020000Z.backup"), "{names:?}");
    assert!(done(backup(server.admin(), &["--verify", text(&names[6])])).contains("sound: 0 entries"));
}

#[test]
fn backup_job_may_take_backups_on_kubernetes() {
    let tokens = Tokens::new();
    let token = tokens.add(&["backup", "--scope", "admin"]);
    let job = deployed("kubernetes/backup.yaml");
    let url = settings(&job).find(|(name, _)| *name == "KVS_ADMIN").expect("it has a server").1;
    let host = url.strip_prefix("http://").expect("it is a URL");
    for file in ["kubernetes/kvs.yaml", "kubernetes/nats.yaml"] {
        assert_eq!(status(&server(&deployed(file), &tokens), "/backup", host, &token), 200, "{file}, {host}");
    }
}
