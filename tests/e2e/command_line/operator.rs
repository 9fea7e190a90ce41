//! One-line errors for an operator, with place and remedy; and environment variables.

use std::collections::BTreeSet;
use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use tempfile::TempDir;

use crate::support::guests::guest;
use crate::support::log::of_files;
use crate::support::server::{Refused, Server, kvs, refused, serve, serve_refused, through};
use crate::support::wire::Connection;

fn temporary() -> TempDir {
    TempDir::new().expect("a temporary directory can be made")
}

fn refuses_data(data: &Path) -> Refused {
    let refused = refused(serve(data));
    refused.with(1, &[data.to_str().expect("a temporary path is text")]);
    refused
}

#[test]
fn file_in_place_of_data_directory_is_rejected() {
    let parent = temporary();
    let file = parent.path().join("data");
    fs::write(&file, "something else").expect("the directory takes a file");
    refuses_data(&file);
    assert_eq!(fs::read(&file).expect("it is still there"), b"something else");
}

#[test]
fn data_directory_that_cannot_be_created_is_named() {
    // Even root cannot create a directory below a file, or in /proc; permissions would not stop root.
    let parent = temporary();
    let file = parent.path().join("file");
    fs::write(&file, "").expect("the directory takes a file");
    refuses_data(&file.join("data"));
    refuses_data(Path::new("/proc/kvs-data"));
}

#[test]
fn unwritable_data_directory_is_named() {
    of_files!();
    // It exists, but not even root can create files in it.
    refuses_data(Path::new("/proc/self/fdinfo"));
}

#[test]
fn file_in_place_of_log_is_rejected() {
    of_files!();
    let data = temporary();
    fs::write(data.path().join("log"), "").expect("the directory takes a file");
    refuses_data(data.path());
}

#[test]
fn lock_of_other_file_type_is_rejected() {
    of_files!();
    let data = temporary();
    fs::create_dir(data.path().join("LOCK")).expect("the directory takes another");
    refuses_data(data.path());
}

#[test]
fn port_in_use_is_named() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("there is a free port");
    let address = taken.local_addr().expect("a listener has an address").to_string();
    let data = temporary();
    let mut command = kvs();
    command.args(["serve", "--listen", &address, "--data-dir"]).arg(data.path());
    refused(command).with(1, &[&address, "--listen", "in use"]);
}

#[test]
fn port_of_another_server_is_named() {
    let other = Server::start(&[]);
    let address = other.address().to_string();
    let data = temporary();
    let mut command = kvs();
    command.args(["serve", "--listen", &address, "--data-dir"]).arg(data.path());
    refused(command).with(1, &[&address, "--listen", "in use"]);
}

#[test]
fn address_of_another_machine_is_rejected() {
    let data = temporary();
    let mut command = kvs();
    // Reserved for documentation: no machine has it.
    command.args(["serve", "--insecure", "--listen", "192.0.2.1:8080", "--data-dir"]).arg(data.path());
    refused(command).with(1, &["192.0.2.1:8080", "--listen"]);
}

#[test]
fn invalid_flag_is_usage_error() {
    for (args, expected) in [
        (&["--no-such-flag"][..], &["--no-such-flag"][..]),
        (&["a.wasm", "b.wasm"], &["b.wasm"]),
        (&["--max-value-bytes", "lots"], &["--max-value-bytes", "lots", "64KiB"]),
        (&["--max-value-bytes", "0"], &["--max-value-bytes", "1 B"]),
        (&["--max-value-bytes", "1TiB"], &["--max-value-bytes", "1TiB", "1.0 GiB"]),
        (&["--max-header-bytes", "1"], &["--max-header-bytes", "8.0 KiB"]),
        (&["--guest-max-memory-bytes", "5GiB"], &["--guest-max-memory-bytes", "5GiB", "4.0 GiB"]),
        (&["--segment-bytes", "some"], &["--segment-bytes", "some"]),
        (&["--request-timeout", "soon"], &["--request-timeout", "soon", "500ms"]),
        (&["--request-timeout", "0s"], &["--request-timeout", "0s"]),
        (&["--header-timeout", "5x"], &["--header-timeout", "5s"]),
        (&["--header-timeout", "0"], &["--header-timeout", "greater than zero"]),
        (&["--drain-timeout", "-1s"], &["-1"]),
        (&["--guest-cpu-limit", "1 fortnight"], &["--guest-cpu-limit", "fortnight"]),
        (&["--max-connections", "0"], &["--max-connections", "a count from 1"]),
        (&["--max-connections", "many"], &["--max-connections", "many"]),
        (&["--durability", "perhaps"], &["--durability", "perhaps", "sync", "os"]),
        (&["--guest-config", "novalue"], &["--guest-config", "novalue", "KEY=VALUE"]),
        (&["--request-timeout"], &["--request-timeout", "<TIME>"]),
    ] {
        serve_refused(args).with(2, expected);
    }
}

#[test]
fn invalid_address_is_usage_error() {
    for address in ["8080", "127.0.0.1", "127.0.0.1:99999", "no.such.host.invalid:8080", ""] {
        let mut command = kvs();
        command.args(["serve", "--listen", address]);
        refused(command).with(2, &["--listen", address]);
    }
}

#[test]
fn unknown_command_is_usage_error() {
    let mut command = kvs();
    command.arg("sevre");
    refused(command).with(2, &["sevre", "serve"]);
}

#[test]
fn invalid_log_filter_is_rejected() {
    let refused = serve_refused(&["--log-filter", "info,=what=?"]);
    assert!(refused.line.contains("--log-filter"), "{refused}");
}

#[test]
fn segments_smaller_than_largest_value_are_rejected() {
    of_files!();
    let refused = serve_refused(&["--segment-bytes", "1MiB", "--max-value-bytes", "8MiB"]);
    refused.with(1, &["--segment-bytes", "1048576"]);
}

#[test]
fn variables_replace_flags() {
    let data = temporary();
    let mut command = kvs();
    command.arg("serve").envs([
        ("KVS_LISTEN", "127.0.0.2:0"),
        ("KVS_MAX_VALUE_BYTES", "10"),
        ("KVS_REQUEST_TIMEOUT", "300ms"),
        ("KVS_GUEST", guest()),
        ("KVS_GUEST_CONFIG", "color=blue\nshape=round"),
    ]);
    command.env("KVS_DATA_DIR", data.path());
    let server = Server::spawn(command, data);
    assert_eq!(server.address().ip().to_string(), "127.0.0.2");
    assert!(server.data().join("LOCK").exists(), "the log is elsewhere");

    let mut client = Connection::open(server.address());
    assert_eq!(client.ask("GET", "/config/color", b"").text(), "Some(\"blue\")");
    assert_eq!(client.ask("GET", "/config/shape", b"").text(), "Some(\"round\")");
    client.ask("PUT", "/store/a", b"eleven byte").says(413, "the body is 11 bytes, at most 10 are allowed");
    let mut slow = Connection::open(server.address());
    slow.send("PUT /store/a HTTP/1.1\r\nhost: kvs\r\ncontent-length: 10\r\n\r\n");
    slow.read().says(408, "the body did not arrive in time");
}

#[test]
fn flag_overrides_its_variable() {
    let data = temporary();
    let mut command = serve(data.path());
    command.args(["--max-value-bytes", "10", "--data-dir"]).arg(data.path());
    command.env("KVS_MAX_VALUE_BYTES", "1").env("KVS_DATA_DIR", "/proc/kvs-data");
    let server = Server::spawn(command, data);
    assert_eq!(Connection::open(server.address()).ask("PUT", "/v1/a", b"ten bytes.").status, 201);
}

#[test]
fn invalid_variable_is_usage_error() {
    let data = temporary();
    let mut command = serve(data.path());
    command.env("KVS_DRAIN_TIMEOUT", "eventually");
    refused(command).with(2, &["eventually", "--drain-timeout"]);
}

#[test]
fn unknown_variable_is_usage_error() {
    for (variable, expected) in [
        ("KVS_LISTN", "is KVS_LISTEN meant?"),
        ("KVS_MAX_VALUE", "is KVS_MAX_VALUE_BYTES meant?"),
        ("KVS_", "see kvs serve --help"),
    ] {
        let data = temporary();
        let mut command = serve(data.path());
        command.env(variable, "1");
        refused(command).with(2, &[&format!("the variable {variable} is not a setting of kvs"), expected]);
        assert!(!data.path().join("LOCK").exists(), "it began nevertheless");
    }
    let mut command = kvs();
    command.args(["get", "a"]).env("KVS_ULR", "http://127.0.0.1:1");
    refused(command).with(2, &["KVS_ULR", "KVS_URL"]);
}

/// A unit with a former name must not start, for instance on an empty log.
#[test]
fn former_names_are_rejected_with_new_names() {
    for (old, new) in [
        ("access-log", "access-log-rate"),
        ("data", "data-dir"),
        ("drain", "drain-timeout"),
        ("guest-append-bytes", "guest-max-append-bytes"),
        ("guest-appends", "guest-max-appends"),
        ("guest-call-timeout", "guest-cpu-limit"),
        ("guest-instances", "guest-max-instances"),
        ("guest-memory-bytes", "guest-max-memory-bytes"),
        ("guest-table-elements", "guest-max-table-elements"),
        ("log", "txlog"),
        ("log-timeout", "txlog-timeout"),
        ("max-hold", "max-wait"),
        ("max-resets", "http2-max-resets"),
        ("max-streams", "http2-max-streams"),
        ("stream-heartbeat", "watch-keep-alive"),
        ("stream-lag-bytes", "watch-buffer-bytes"),
        ("watch", "watch-guest"),
    ] {
        serve_refused(&[&format!("--{old}"), "1"]).with(2, &[&format!("--{old} was renamed: use --{new};")]);
        let variable = |name: &str| format!("KVS_{}", name.to_uppercase().replace('-', "_"));
        let data = temporary();
        let mut command = serve(data.path());
        command.env(variable(old), "1");
        let advice = match old {
            "log" => "KVS_TXLOG is the storage of the transaction log, KVS_LOG_FILTER filters diagnostics".to_owned(),
            _ => format!("use {}", variable(new)),
        };
        refused(command).with(2, &[&format!("the variable {} was renamed: {advice}", variable(old))]);
        assert!(!data.path().join("LOCK").exists(), "it began nevertheless");
    }
    for (old, new) in [
        ("dump", "export"),
        ("load", "import"),
        ("log", "txlog"),
        ("token new", "token create"),
        ("txlog dump", "txlog cat"),
    ] {
        let mut command = kvs();
        command.args(old.split(' '));
        refused(command).with(2, &[&format!("`kvs {old}` was renamed: use `kvs {new}`")]);
    }
}

#[test]
fn kubernetes_variables_are_rejected_by_serve_only() {
    let links = [
        ("KVS_SERVICE_HOST", "10.0.0.1"),
        ("KVS_SERVICE_PORT", "8080"),
        ("KVS_SERVICE_PORT_HTTP", "8080"),
        ("KVS_PORT", "tcp://10.0.0.1:8080"),
        ("KVS_PORT_8080_TCP", "tcp://10.0.0.1:8080"),
        ("KVS_PORT_8080_TCP_ADDR", "10.0.0.1"),
        ("KVS_READER_SERVICE_HOST", "10.0.0.3"),
        ("KUBERNETES_SERVICE_HOST", "10.0.0.2"),
    ];
    let with = |args: &[&str], others: &[(&str, &str)]| {
        let mut command = kvs();
        command.args(args).envs(links).envs(others.iter().copied());
        command
    };
    refused(with(&["serve"], &[])).with(2, &["KVS_PORT", "enableServiceLinks: false"]);
    let server = Server::start(&[]);
    let url = server.url("");
    let done = with(&["list", "--url", &url], &[]).status().expect("the binary under test can be started");
    assert!(done.success(), "{done}");
    refused(with(&["list", "--url", &url], &[("KVS_ULR", "")])).with(2, &["KVS_ULR", "is KVS_URL meant?"]);
    // For other commands they are not from Kubernetes.
    let mut command = with(&["list", "--url", &url], &[]);
    command.env_remove("KUBERNETES_SERVICE_HOST");
    refused(command).with(2, &["KVS_PORT"]);
}

#[test]
fn data_is_readable_by_owner_only() {
    of_files!();
    let parent = temporary();
    let data = parent.path().join("data");
    let command = serve(&data);
    let server = Server::spawn(command, temporary());
    let mut client = Connection::open(server.address());
    (0..50).for_each(|_| assert_eq!(client.ask("PUT", "/v1/a", &[b'x'; 1000]).status, 201));
    let mut swap = kvs();
    swap.arg("swap").arg(guest()).env("KVS_ADMIN", server.admin().to_string());
    assert!(swap.status().expect("the binary under test can be started").success());
    server.terminate();
    let mut seen = BTreeSet::new();
    let mut directories = vec![data.clone()];
    while let Some(directory) = directories.pop() {
        assert_eq!(mode(&directory), 0o700, "{}", directory.display());
        for entry in fs::read_dir(&directory).expect("it is a directory") {
            let path = entry.expect("it can be read").path();
            if path.is_dir() {
                directories.push(path);
            } else {
                assert_eq!(mode(&path), 0o600, "{}", path.display());
                seen.insert(path.strip_prefix(&data).expect("it is inside").display().to_string());
            }
        }
    }
    for part in ["guest.wasm", ".seg", "cache/"] {
        assert!(seen.iter().any(|file| file.contains(part)), "{part} is not among {seen:?}");
    }
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).expect("it is there").permissions().mode() & 0o777
}

#[test]
fn variable_of_another_command_is_ignored() {
    let data = temporary();
    let mut command = serve(data.path());
    command.envs([("KVS_URL", "http://127.0.0.1:1"), ("KVS_TOKEN", "x"), ("KVSX", "x"), ("kvs_x", "x")]);
    Server::spawn(command, data).terminate();
}

#[test]
fn check_flag_validates_without_start() {
    let data = temporary();
    let taken = TcpListener::bind("127.0.0.1:0").expect("there is a free port");
    let address = taken.local_addr().expect("a listener has an address").to_string();
    let check = |args: &[&str]| {
        let mut command = serve(&data.path().join("data"));
        command.args(["--check", "--admin", &address]).args(args);
        command
    };
    // A running server has the addresses.
    let output = check(&[guest()]).output().expect("the binary under test can be started");
    let lines = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && lines.contains("the settings are valid"), "{lines}");
    for (args, parts) in [
        (&["--tokens", "/nowhere"][..], &["--tokens /nowhere"][..]),
        (&["--tls-cert", "/nowhere", "--tls-key", "/nowhere"], &["--tls-cert /nowhere"]),
        (&["--listen-when-primary", "0.0.0.0:8080"], &["--listen-when-primary 0.0.0.0:8080", "--insecure"]),
        (&["--segment-bytes", "4KiB"], &["--segment-bytes"]),
        (&["--txlog", "mysql://x"], &["--txlog"]),
        (&["/dev/null"], &["/dev/null", "WebAssembly"]),
        (&["--max-inflight-bytes", "1MiB"], &["--max-inflight-bytes"]),
    ] {
        refused(check(args)).with(1, parts);
    }
    assert!(!data.path().join("data").exists(), "it wrote something");
}

#[test]
fn memory_limit_too_small_for_log_is_reported() {
    of_files!();
    let server = Server::start(&["--shards", "1"]);
    let mut client = Connection::open(server.address());
    for n in 0..40 {
        assert_eq!(client.ask("PUT", &format!("/v1/{n}"), &vec![b'x'; 1 << 20]).status, 201);
    }
    let refused = server.terminate().refuses(&["--shards", "1", "--guest-max-memory-bytes", "16MiB"]);
    refused.with(1, &["the log needs more memory than --guest-max-memory-bytes, which is 16.0 MiB; raise it"]);
}

#[test]
fn address_space_too_small_for_guest_is_reported() {
    let data = temporary();
    let mut command = through("sh", &serve(data.path()));
    // In KiB: enough for the server, but not for the memory of a guest.
    command.args(["-c", "ulimit -v 4000000; exec \"$@\"", "sh", kvs_tests::binary()]);
    command.args(["serve", "--listen", "127.0.0.1:0"]);
    refused(command).with(1, &["the guest does not start", "ulimit -v"]);
}
