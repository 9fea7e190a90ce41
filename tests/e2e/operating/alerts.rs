//! The alert rules: they, the dashboard and the runbook use existing metrics, and a real Prometheus fires each alert when its
//! condition occurs in a real server.

use std::collections::BTreeSet;
use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::json;
use tempfile::TempDir;

use crate::support::backup::{large, take};
use crate::support::certificates::{Authority, Kind};
use crate::support::file_log::write_a_year_ahead;
use crate::support::guests::{DEFAULT_GUEST, copy_of, guest};
use crate::support::log::{kvs_at, of_files};
use crate::support::metrics::{counts, until};
use crate::support::mount::Mount;
use crate::support::nats::Nodes;
use crate::support::postgres::database::Database;
use crate::support::postgres::proxy::{Proxy, Way};
use crate::support::postgres::{self, has_lease};
use crate::support::prometheus::{ALERTS, Prometheus, alerts};
use crate::support::readiness::{STANDS_BY, becomes_ready};
use crate::support::requests::put;
use crate::support::sabotage::{start, starts_again};
use crate::support::server::{PATIENCE, Process, Server, serve, through};
use crate::support::wire::Connection;

const DASHBOARD: &str = include_str!("../../../deploy/grafana.json");
const RUNBOOK: &str = include_str!("../../../docs/runbook.md");

/// The names of all metrics in the source of the server, with the suffixes of Prometheus.
fn metrics() -> BTreeSet<String> {
    fn collect(path: &Path, names: &mut BTreeSet<String>) {
        if path.is_dir() {
            let entries = fs::read_dir(path).expect("the sources can be listed");
            return entries.for_each(|entry| collect(&entry.expect("it can be read").path(), names));
        }
        let text = fs::read_to_string(path).unwrap_or_default();
        for call in text.split("page.").skip(1) {
            let Some((kind, arguments)) = call.split_once('(') else { continue };
            let endings: &[&str] = match kind {
                "gauge" | "gauges" => &[""],
                "counter" | "counters" => &["_total"],
                "histogram" | "histograms" => &["_bucket", "_sum", "_count"],
                "info" => &["_info"],
                _ => continue,
            };
            let name = arguments.trim_start().strip_prefix('"').and_then(|name| name.split('"').next());
            names.extend(name.into_iter().flat_map(|name| endings.iter().map(move |end| format!("kvs_{name}{end}"))));
        }
    }
    let mut names = BTreeSet::new();
    ["host/src", "host/txlog/src", "host/runtime/src"]
        .iter()
        .for_each(|folder| collect(&Path::new(kvs_tests::ROOT).join(folder), &mut names));
    names
}

/// The words in a text that begin with `kvs_`.
fn named(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    words.filter(|word| word.starts_with("kvs_")).map(str::to_owned).collect()
}

#[test]
fn alerts_dashboard_and_runbook_name_existing_metrics() {
    let there = metrics();
    assert!(there.len() > 60, "{there:?}");
    // Documentation names a histogram without a suffix.
    let families = there.iter().filter_map(|name| name.strip_suffix("_bucket")).map(str::to_owned);
    let families = families.chain(there.iter().cloned()).collect();
    for (name, text, there) in
        [("alerts.yaml", ALERTS, &there), ("grafana.json", DASHBOARD, &there), ("runbook.md", RUNBOOK, &families)]
    {
        let missing: Vec<_> = named(text).difference(there).cloned().collect();
        assert!(missing.is_empty(), "{name} names what is not there: {missing:?}");
    }
}

#[test]
fn each_alert_has_runbook_section() {
    let sections: Vec<_> = RUNBOOK.lines().filter_map(|line| line.strip_prefix("## ")).collect();
    assert_eq!(alerts(), sections);
    for alert in alerts() {
        let link = format!("runbook: docs/runbook.md#{}\n", alert.to_lowercase());
        assert!(ALERTS.contains(&link), "{alert} has no link to its section");
    }
}

#[test]
fn each_alert_has_a_test_that_provokes_it() {
    for alert in alerts() {
        assert!(include_str!("alerts.rs").contains(&format!("\"{alert}\"")), "no test provokes {alert}");
    }
}

#[test]
fn prometheus_accepts_rules() {
    promtool(&["check", "rules"], &Path::new(kvs_tests::ROOT).join("deploy/alerts.yaml"));
}

#[track_caller]
fn promtool(args: &[&str], file: &Path) {
    let output = Command::new("promtool").args(args).arg(file).output();
    let output = output.expect("`just test` installs promtool");
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// An address where nobody listens now.
fn free() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("there is a free port");
    listener.local_addr().expect("a listener has an address")
}

#[test]
fn alerts_fire_for_failing_guest() {
    let poison = "fault=apply-traps-on-poison";
    let fails = Server::start(&[guest(), "--shards", "1", "--spare", "--guest-config", poison]);
    let traps = Server::start(&[guest()]);
    let swapped = Server::start(&["--probation", "1h"]);
    counts(&fails, "kvs_guest_spares", 1.0);
    let prometheus = Prometheus::of(&[fails.admin(), traps.admin(), swapped.admin()]);
    prometheus.is_quiet(fails.admin());
    prometheus.is_quiet(traps.admin());

    let mut client = Connection::open(fails.address());
    assert_eq!(client.ask("PUT", "/store/{own}poison", b"value").status, 201);
    prometheus.fires("KvsSpareFails", fails.admin());
    assert_eq!(client.ask("GET", "/trap", b"").status, 500);
    for alert in ["KvsShardDown", "KvsRebuildFails", "KvsNotReady", "KvsPartNotReady"] {
        prometheus.fires(alert, fails.admin());
    }
    // A rate takes two samples.
    let asks = |client: &mut Connection| assert_eq!(client.ask("GET", "/store/{own}poison", b"").status, 503);
    asks(&mut client);
    prometheus.until("kvs_http_requests_total%7Bstatus=%22503%22%7D", |found| found.contains("\"metric\""));
    asks(&mut client);
    prometheus.fires("KvsErrors", fails.admin());

    let mut client = Connection::open(traps.address());
    // State that is not in the log.
    assert_eq!(client.ask("GET", "/hide/{own}a", b"").status, 200);
    counts(&traps, "kvs_store_keys", 1.0);
    // Some get 503, while the guest is being rebuilt.
    let (begun, mut trapped) = (Instant::now(), 0);
    while trapped < 10 {
        assert!(begun.elapsed() < PATIENCE, "it trapped {trapped} times");
        trapped += u32::from(client.ask("GET", "/trap", b"").status == 500);
        thread::sleep(Duration::from_millis(10));
    }
    prometheus.fires("KvsGuestTraps", traps.admin());
    prometheus.fires("KvsRebuildDiffers", traps.admin());
    prometheus.fires("KvsPromotions", traps.admin());

    thread::scope(|scope| {
        let swap = || Connection::open(swapped.admin()).ask("PUT", "/guest", &copy_of(DEFAULT_GUEST)).status;
        let swap = scope.spawn(swap);
        swapped.says("another guest serves, on probation");
        assert_eq!(Connection::open(swapped.admin()).ask("DELETE", "/guest?rollback", b"").status, 202);
        assert_eq!(swap.join().expect("it is answered"), 422);
    });
    prometheus.fires("KvsSwapRolledBack", swapped.admin());
}

#[test]
fn alerts_fire_for_lack_of_memory_and_certificate() {
    let full =
        Server::start(&["--guest-max-memory-bytes", "32MiB", "--max-value-bytes", "64KiB", "--durability", "os"]);
    let authority = Authority::new();
    let pair = authority.issue("server", Kind::ShortServer(86_400), 1);
    let expires = Server::start(&["--tls-cert", &pair.certificate, "--tls-key", &pair.key]);
    let prometheus = Prometheus::of(&[full.admin(), expires.admin()]);
    prometheus.fires("KvsCertificateExpires", expires.admin());
    prometheus.is_quiet(full.admin());
    let mut client = Connection::open(full.address());
    let is_full = |n: usize| client.ask("PUT", &format!("/v1/{n}"), &[b'x'; 60_000]).status == 507;
    assert!((0..1_000).any(is_full), "32 MiB hold 60 MB");
    prometheus.fires("KvsNoSpace", full.admin());
    prometheus.fires("KvsMemoryNearLimit", full.admin());
}

#[test]
fn alerts_fire_for_clock_and_tasks() {
    of_files!();
    let data = TempDir::new().expect("a temporary directory can be made");
    write_a_year_ahead(data.path());
    let behind = Server::spawn(serve(data.path()), data);
    let panics = start(&["log lines", "guest queue"], &[guest()]);
    starts_again(&panics, "log lines");
    let prometheus = Prometheus::of(&[behind.admin(), panics.admin()]);
    prometheus.fires("KvsClockBehind", behind.admin());
    prometheus.fires("KvsTaskRestarts", panics.admin());
    let mut client = Connection::open(panics.address());
    assert_eq!(client.ask("GET", "/trap", b"").status, 500);
    until(&panics, "the queue panics", |now| now.find("kvs_task_panics_total{task=\"guest queue\"}") == Some(1.0));
    prometheus.fires("KvsTaskPanics", panics.admin());
}

#[test]
fn alert_fires_for_disk() {
    of_files!();
    let mount = Mount::tmpfs();
    let server = mount.serve();
    let prometheus = Prometheus::of(&[server.admin()]);
    let _brim = mount.brim();
    prometheus.fires("KvsDiskNearlyFull", server.admin());
}

#[test]
fn alerts_fire_for_backups() {
    let server = large();
    let prometheus = Prometheus::of(&[server.admin()]);
    prometheus.is_quiet(server.admin());
    let mut leaves = Connection::open(server.admin());
    leaves.send("GET /backup HTTP/1.1\r\nhost: kvs\r\n\r\n");
    assert_eq!(leaves.try_read(true).expect("it begins").status, 200);
    drop(leaves);
    server.says("the backup failed: the client ");
    prometheus.fires("KvsBackupFails", server.admin());
    let files = TempDir::new().expect("a temporary directory can be made");
    // There is none.
    Prometheus::of_backups(&[server.admin()]).fires_for_all("KvsBackupTooOld");
    take(&server, &files.path().join("full"), &[]);
    let taken = Prometheus::of_backups(&[server.admin()]);
    taken.until("kvs_backup_last_success_timestamp_seconds%3E0", |found| found.contains("\"metric\""));
    taken.fires_for_all("KvsBackupTooOld");
}

#[test]
fn alert_for_backups_counts_days_over_restarts() {
    let mut pair = String::from("0");
    // Each night, at one o'clock.
    (0..12).for_each(|day| pair.push_str(&format!(" {}x23", 3_600 + day * 86_400)));
    let series = [
        ("never", "a", "0x300"),
        // Restarted a day after its only backup.
        ("stopped", "a", "0 3600x23 0x300"),
        ("pair", "a", "0x300"),
        ("pair", "b", pair.as_str()),
    ];
    let series = series.map(|(job, instance, values)| {
        let name = "kvs_backup_last_success_timestamp_seconds";
        json!({ "series": format!("{name}{{job=\"{job}\",instance=\"{instance}\"}}"), "values": values })
    });
    let fired = |job: &str| {
        let summary = format!("No server of the job {job} has given a backup for two days");
        let runbook = "docs/runbook.md#kvsbackuptooold";
        json!({
            "exp_labels": { "severity": "warning", "job": job },
            "exp_annotations": { "summary": summary, "runbook": runbook },
        })
    };
    let days = [
        (47, json!([])),
        (50, json!([fired("never"), fired("stopped")])),
        (280, json!([fired("never"), fired("stopped")])),
    ];
    let expected = days.map(|(hour, alerts)| {
        json!({ "eval_time": format!("{hour}h"), "alertname": "KvsBackupTooOld", "exp_alerts": alerts })
    });
    let test = json!({
        "rule_files": [Path::new(kvs_tests::ROOT).join("deploy/alerts.yaml")],
        "evaluation_interval": "1h",
        "tests": [{ "interval": "1h", "input_series": series, "alert_rule_test": expected }],
    });
    let files = TempDir::new().expect("a temporary directory can be made");
    let file = files.path().join("test.yaml");
    fs::write(&file, test.to_string()).expect("the directory takes a file");
    promtool(&["test", "rules"], &file);
}

#[test]
fn alerts_fire_for_unavailable_database() {
    let database = Database::start();
    let server = postgres::start(&database.url());
    let prometheus = Prometheus::of(&[server.admin()]);
    assert_eq!(put(&server, "a", "1"), 201);
    prometheus.is_quiet(server.admin());
    database.signal(Signal::STOP);
    assert_eq!(put(&server, "a", "2"), 504);
    prometheus.fires("KvsOutcomeUnknown", server.admin());
    prometheus.fires("KvsDatabaseAway", server.admin());
    database.signal(Signal::CONT);
}

#[test]
fn alert_fires_for_maintenance() {
    let server = Server::start(&[]);
    let prometheus = Prometheus::of(&[server.admin()]);
    assert_eq!(Connection::open(server.admin()).ask("PUT", "/read-only", b"").status, 200);
    prometheus.fires("KvsReadOnly", server.admin());
}

#[test]
fn alerts_fire_for_restarts_and_absence() {
    let admin = free();
    let start = |data: TempDir| {
        let mut command = kvs_at(data.path());
        command.args(["serve", "--listen", "127.0.0.1:0", "--admin", &admin.to_string()]);
        Server::spawn(command, data)
    };
    let mut server = start(TempDir::new().expect("a temporary directory can be made"));
    let prometheus = Prometheus::of(&[admin]);
    for restarts in 1..=3 {
        // Start times have a resolution of a second, and two starts must differ.
        thread::sleep(Duration::from_secs(1));
        server = start(server.terminate().into_data());
        let query = format!("changes(kvs_start_time_seconds[15m])=={restarts}");
        prometheus.until(&query, |found| found.contains("\"metric\""));
    }
    prometheus.fires("KvsRestarts", admin);
    drop(server.kill());
    prometheus.fires("KvsDown", admin);
}

#[test]
fn alert_fires_for_requests_in_flight() {
    let server = Server::start(&["--max-inflight-bytes", "32MiB", "--max-value-bytes", "16MiB"]);
    let mut client = Connection::open(server.address());
    assert_eq!(client.ask("PUT", "/v1/a", &vec![b'x'; 14 << 20]).status, 201);
    let prometheus = Prometheus::of(&[server.admin()]);
    prometheus.is_quiet(server.admin());
    let _slow = [(); 2].map(|()| {
        let mut slow = Connection::open(server.address());
        slow.send("GET /v1/a HTTP/1.1\r\nhost: kvs\r\n\r\n");
        slow
    });
    prometheus.fires("KvsInflightNearLimit", server.admin());
}

#[test]
fn alert_fires_for_lost_log_lines() {
    let (admin, data) = (free(), TempDir::new().expect("a temporary directory can be made"));
    let mut served = serve(data.path());
    served.args(["--admin", &admin.to_string()]);
    let mut silent = through("sh", &served);
    silent.args(["-c", "exec \"$0\" \"$@\" 2>/dev/full"]).arg(served.get_program()).args(served.get_args());
    let _server = Process::spawn(silent);
    let prometheus = Prometheus::of(&[admin]);
    prometheus.fires("KvsLogLinesLost", admin);
}

#[test]
fn alert_fires_for_a_lost_read_lease() {
    let database = Database::start();
    let proxy = Proxy::to(database.port());
    let server = postgres::start(&database.url_at(proxy.port));
    let _standby = postgres::stand_by(&database.url(), &[]);
    has_lease(&database);
    let prometheus = Prometheus::of(&[server.admin()]);
    prometheus.is_quiet(server.admin());
    proxy.set(Way::Reset);
    prometheus.fires("KvsReadLeaseLost", server.admin());
}

#[test]
fn alert_fires_for_a_standby_that_lags() {
    of_files!();
    let data = TempDir::new().expect("a temporary directory can be made");
    let serve_in = |args: &[&str]| {
        let mut command = serve(data.path());
        command.args(args);
        Server::spawn(command, TempDir::new().expect("a temporary directory can be made"))
    };
    let primary = serve_in(&[guest()]);
    let standby = serve_in(&[guest(), "--guest-config", "fault=apply-dawdles", "--standby"]);
    becomes_ready(&standby, 200, STANDS_BY);
    let prometheus = Prometheus::of(&[standby.admin()]);
    prometheus.is_quiet(standby.admin());
    let mut client = Connection::open(primary.address());
    // It takes more than a second for each thousand.
    for _ in 0..2 {
        assert_eq!(client.ask("GET", "/append-often/10000", b"").text(), "10000");
    }
    prometheus.fires("KvsReplicationLag", standby.admin());
}

#[test]
fn alert_fires_for_a_damaged_log() {
    let mut nodes = Nodes::start(1);
    let url = nodes.url("x");
    let args = ["--txlog", &url, "--allow-unsafe-txlog"];
    let primary = Server::start(&args);
    let standby = Server::start(&[&args[..], &["--standby"]].concat());
    becomes_ready(&standby, 200, "; standby of process ");
    let prometheus = Prometheus::of(&[standby.admin()]);
    prometheus.is_quiet(standby.admin());
    standby.signal(Signal::STOP);
    assert_eq!((put(&primary, "a", "needle"), put(&primary, "b", "1")), (201, 201));
    nodes.stop(0);
    let stored = nodes.store(0).join("jetstream/$G/streams/KVS-x-00/msgs/1.blk");
    let mut bytes = fs::read(&stored).expect("the stream is stored");
    let at = bytes.windows(6).position(|bytes| bytes == b"needle").expect("the value is stored");
    bytes[at] ^= 1;
    fs::write(&stored, bytes).expect("it can be written");
    nodes.restart(0);
    standby.signal(Signal::CONT);
    prometheus.fires("KvsLogDamaged", standby.admin());
}
