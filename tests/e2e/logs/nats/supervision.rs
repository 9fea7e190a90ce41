//! Tasks and threads of a log in NATS JetStream that panic.

use super::LEASE;
use crate::support::nats::Nodes;
use crate::support::readiness::{UP_TO_DATE, WELL, becomes_ready};
use crate::support::requests::{put, shows};
use crate::support::sabotage::{self, says, spawn, starts_again};
use crate::support::server::Server;

fn args<'a>(url: &'a str, monitors: &'a str) -> Vec<&'a str> {
    [&["--txlog", url, "--txlog-monitor", monitors], &LEASE[..]].concat()
}

#[test]
fn panic_in_log_task_ends_server() {
    let nodes = Nodes::start(3);
    let (url, monitors) = (nodes.url("x"), nodes.monitors());
    let args = args(&url, &monitors);
    sabotage::ends_servers(&args);
    // A standby restarts itself.
    let primary = Server::start(&args);
    let (process, _data) = spawn(&["log standby"], &[&args[..], &["--standby"]].concat());
    says(&process, &["sabotage of log standby", "restarting as a standby"]);
    assert_eq!(put(&primary, "a", "1"), 201);
}

#[test]
fn notes_follow_and_integrity_restart_after_panic() {
    let nodes = Nodes::start(3);
    let (url, monitors) = (nodes.url("x"), nodes.monitors());
    let args = args(&url, &monitors);
    let restarting = ["log notes", "log integrity"];
    let primary = sabotage::start(&restarting, &args);
    let following = [&restarting[..], &["follow"]].concat();
    let standby = sabotage::start(&following, &[&args[..], &["--standby"]].concat());
    restarting.iter().for_each(|task| starts_again(&primary, task));
    following.iter().for_each(|task| starts_again(&standby, task));
    becomes_ready(&primary, 200, WELL);
    assert_eq!(put(&primary, "a", "1"), 201);
    shows(&standby, "a", 200, "1");
    becomes_ready(&standby, 200, UP_TO_DATE);
    // The second run of it works.
    assert!(nodes.api("STREAM.PURGE.KVS-x-00", "").contains("\"success\":true"));
    let (status, stopped) = primary.ends();
    let last = stopped.stderr().last().expect("it says why");
    assert!(status.code() == Some(1) && last.contains("it was purged by hand"), "{status}: {last}");
}
