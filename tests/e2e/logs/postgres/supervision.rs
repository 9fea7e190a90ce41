//! Tasks and threads of a log in a database that panic.

use crate::support::postgres::database::Database;
use crate::support::postgres::start;
use crate::support::readiness::{UP_TO_DATE, becomes_ready};
use crate::support::requests::{put, shows};
use crate::support::sabotage::{self, says, spawn};

#[test]
fn panic_in_log_task_ends_server() {
    let database = Database::start();
    sabotage::ends_servers(&["--txlog", &database.url()]);
    // A standby restarts itself.
    let primary = start(&database.url());
    let (process, _data) = spawn(&["log standby"], &["--txlog", &database.url(), "--standby"]);
    says(&process, &["sabotage of log standby", "restarting as a standby"]);
    assert_eq!(put(&primary, "a", "1"), 201);
}

#[test]
fn follow_and_compactor_restart_after_panic() {
    let database = Database::start();
    let primary = sabotage::start(&["log compactor"], &["--txlog", &database.url()]);
    let standby = sabotage::start(&["follow"], &["--txlog", &database.url(), "--standby"]);
    sabotage::starts_again(&primary, "log compactor");
    sabotage::starts_again(&standby, "follow");
    assert_eq!(put(&primary, "a", "1"), 201);
    shows(&standby, "a", 200, "1");
    becomes_ready(&standby, 200, UP_TO_DATE);
}
