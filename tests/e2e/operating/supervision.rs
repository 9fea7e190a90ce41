//! Background tasks and threads that panic in a server: each is restarted and works again, or the server ends with an error.
//! Those of a log in a database are in `logs::postgres::supervision`, and those that need nothing from outside are among the
//! unit tests of `kvs serve`.

use std::fs;
use std::os::unix::process::ExitStatusExt;

use rustix::process::Signal;
use tempfile::TempDir;

use crate::support::certificates::{Authority, Kind};
use crate::support::guests::{DEFAULT_GUEST, component, copy_of, guest};
use crate::support::load::{Clients, SMALL_SEGMENTS, under_load};
use crate::support::metrics::counts;
use crate::support::sabotage::{Sabotage, sabotaged, sabotaged_by, says, start, starts_again};
use crate::support::server::{Process, Server, serve};
use crate::support::swap::{swap, swaps};
use crate::support::txlog::done;
use crate::support::wire::Connection;
use crate::support::zoo;

#[test]
fn log_lines_continue_after_panic() {
    // Serving is one of them.
    let server = start(&["log lines"], &[]);
    starts_again(&server, "log lines");
    server.terminate();
}

#[test]
fn files_are_reloaded_after_panic() {
    let authority = Authority::new();
    let pair = authority.issue("server", Kind::Server, 1);
    let file = authority.path("guest.wasm");
    fs::copy(DEFAULT_GUEST, &file).expect("the guest can be copied");
    let args = ["--tls-cert", &pair.certificate, "--tls-key", &pair.key, "--watch-guest", &file];
    let server = start(&["TLS reload", "guest reload"], &args);
    starts_again(&server, "TLS reload");
    starts_again(&server, "guest reload");
    authority.issue("server", Kind::Server, 2);
    fs::write(&file, component(guest())).expect("it can be written");
    server.says("reloaded the TLS certificate");
    server.says("the guest was swapped guest=\"unruly\"");
}

#[test]
fn guest_is_rebuilt_after_panic() {
    let server = start(&["guest rebuild", "guest queue"], &[guest()]);
    let mut client = Connection::open(server.address());
    assert_eq!(client.ask("PUT", "/store/a", b"value").status, 201);
    client.ask("GET", "/trap", b"").says(500, "the store failed on this request");
    assert_eq!(client.ask("GET", "/store/a", b"").text(), "value");
    starts_again(&server, "guest rebuild");
    counts(&server, "kvs_task_panics_total{task=\"guest queue\"}", 1.0);
    counts(&server, "kvs_guest_shards_down", 0.0);
    let ready = Connection::open(server.admin()).ask("GET", "/readyz", b"");
    assert!(ready.status == 200 && ready.text().contains("[+]guest ok\n"), "{}", ready.text());
}

#[test]
fn spare_is_built_after_panic() {
    let server = start(&["guest spare"], &["--spare"]);
    starts_again(&server, "guest spare");
    counts(&server, "kvs_guest_spares", 1.0);
}

#[test]
fn panicking_swap_is_answered_and_blocks_no_other() {
    let server = start(&["guest swap"], &["--probation", "1ms"]);
    let failed = swap(&server, &copy_of(DEFAULT_GUEST));
    assert_eq!(failed.status, 500, "{}", failed.text());
    counts(&server, "kvs_task_panics_total{task=\"guest swap\"}", 1.0);
    swaps(&server, &copy_of(DEFAULT_GUEST));
}

#[test]
fn standby_ends_after_panic_of_its_log() {
    let primary = Server::start(&[]);
    let mut command = serve(primary.data());
    command.arg("--standby");
    let mut standby = Process::spawn(sabotaged(&["log standby"], &command));
    says(&standby, &["kvs: the transaction log failed", "sabotage of log standby", "start again to recover"]);
    assert_eq!(standby.wait().code(), Some(1));
    assert_eq!(Connection::open(primary.address()).ask("PUT", "/v1/a", b"value").status, 201);
}

#[test]
fn stuck_worker_is_reported() {
    let data = TempDir::new().expect("a temporary directory can be made");
    let mut command = sabotaged_by(Sabotage::Stick, &["housekeeping"], &serve(data.path()));
    command.env("TOKIO_WORKER_THREADS", "2");
    let server = Server::spawn(command, data);
    server.says("worker threads are stuck, restart the server: ");
    let ready = Connection::open(server.admin()).ask("GET", "/readyz", b"");
    let reported = |of: &str| {
        ready.text().contains(&format!("[-]workers worker thread {of} of 2 has not finished a task since 20"))
    };
    assert!(ready.status == 503 && (reported("1") || reported("2")), "{}", ready.text());
    counts(&server, "kvs_part_ready{part=\"workers\"}", 0.0);
}

#[test]
fn panic_of_worker_aborts_server() {
    let data = TempDir::new().expect("a temporary directory can be made");
    let command = sabotaged_by(Sabotage::PanicOfWorker, &["housekeeping"], &serve(data.path()));
    let mut process = Process::spawn(command);
    assert_eq!(process.wait().signal(), Some(Signal::ABORT.as_raw()));
    says(&process, &["thread panicked", "sabotage of housekeeping"]);
}

#[test]
fn aborted_server_leaves_intact_log() {
    let data = TempDir::new().expect("a temporary directory can be made");
    let mut command = serve(data.path());
    command.args(SMALL_SEGMENTS);
    let server = Server::spawn(sabotaged_by(Sabotage::Abort, &["guest swap"], &command), data);
    let mut clients = Clients::new(&mut zoo::dice());
    under_load(&server, &mut clients, 1_000, || {
        let answer = Connection::open(server.admin()).try_ask("DELETE", "/guest", b"");
        assert!(answer.is_err(), "it swapped the guest");
    });
    assert!(clients.unknown() > 0, "no write was in flight");
    let (status, stopped) = server.ends();
    assert_eq!(status.signal(), Some(Signal::ABORT.as_raw()), "{status}");
    let last = stopped.stderr().iter().find(|line| line.contains("thread panicked"));
    assert!(last.is_some_and(|line| line.contains("sabotage of guest swap")), "{:?}", stopped.stderr());
    let path = stopped.data().to_str().expect("a temporary path is text").to_owned();
    let (printed, _) = done(&["verify", "--data-dir", &path]);
    assert!(printed.contains("the log is sound"), "{printed}");
    let server = stopped.restart(&SMALL_SEGMENTS);
    clients.settle(server.address());
}
