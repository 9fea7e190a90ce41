//! Settings of the stream that are changed while a server uses it.

use super::{put, start};
use crate::support::nats::Nodes;
use crate::support::readiness::{WELL, becomes_ready};

const HOUR: i64 = 3_600_000_000_000;

#[test]
fn setting_that_loses_writes_is_reported_while_it_lasts() {
    let nodes = Nodes::start(3);
    let server = start(&nodes);
    becomes_ready(&server, 200, WELL);
    let settings = [
        ("num_replicas", 1, 3, "num_replicas of KVS-x-00 is 1: "),
        ("max_age", HOUR, 0, "max_age of KVS-x-00 is set: "),
    ];
    for (setting, unsafe_value, value, warning) in settings {
        nodes.edit("x", setting, unsafe_value);
        server.says(&format!("unsafe: {warning}"));
        becomes_ready(&server, 200, &format!("[+]log ok, but {warning}"));
        assert_eq!(put(&server, setting, "1"), 201);
        nodes.edit("x", setting, value);
        server.says(&format!("resolved: {warning}"));
        becomes_ready(&server, 200, WELL);
    }
}
