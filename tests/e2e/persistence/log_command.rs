//! `kvs txlog`: checks, prints, exports, imports and compacts a log, and rejects one that is in use, missing or corrupted
//! with a one-line error.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use tempfile::TempDir;

use crate::support::server::{Refused, Server, Stopped, kvs, refused, serve, through};
use crate::support::wire::{Connection, short};
use crate::support::zoo;

/// Small segments, so that a short test has several.
const SMALL: [&str; 4] = ["--segment-bytes", "192KiB", "--max-value-bytes", "64KiB"];

fn temporary() -> TempDir {
    TempDir::new().expect("a temporary directory can be made")
}

/// `kvs txlog COMMAND --data-dir DIR ...`.
fn log(command: &str, data: &Path, args: &[&str]) -> Command {
    let mut kvs = kvs();
    kvs.args(["txlog", command, "--data-dir"]).arg(data).args(args);
    kvs
}

/// Runs a command that must succeed, and returns its output and its messages.
#[track_caller]
fn done(mut command: Command) -> (String, String) {
    let output = command.stdout(Stdio::piped()).stderr(Stdio::piped()).output().expect("the binary can be started");
    let [printed, said] = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).expect("it is text"));
    assert!(output.status.success(), "{command:?}: {}, it said: {said}", output.status);
    (printed, said)
}

/// Content of a store: keys, and their values unless they were deleted.
type Model = Vec<(String, Option<Vec<u8>>)>;

/// A log of several segments, in which every key was written once.
fn store() -> (Server, Model) {
    let mut rng = zoo::dice();
    let server = Server::start(&SMALL);
    let mut client = Connection::open(server.address());
    let model = zoo::keys(&mut rng, 800).into_iter().map(|key| {
        let value: Vec<u8> = (0..rng.usize(0..2_000)).map(|_| rng.u8(..)).collect();
        assert_eq!(client.ask("PUT", &short(&key), &value).status, 201);
        (key, Some(value))
    });
    let model = model.collect();
    (server, model)
}

/// As [`store`], with a tenth of the keys overwritten, a tenth deleted, and one written with a Content-Type.
fn store_with_garbage() -> (Stopped, Model) {
    let (server, mut model) = store();
    let mut client = Connection::open(server.address());
    for (at, (key, value)) in model.iter_mut().enumerate() {
        match at % 10 {
            0 => {
                assert_eq!(client.ask("DELETE", &short(key), b"").status, 200);
                *value = None;
            }
            1 => {
                assert_eq!(client.ask("PUT", &short(key), b"overwritten").status, 201);
                *value = Some(b"overwritten".to_vec());
            }
            _ => {}
        }
    }
    client.send("PUT /v1/typed HTTP/1.1\r\nhost: kvs\r\ncontent-type: image/x;a=y%20+\r\ncontent-length: 1\r\n\r\nx");
    assert_eq!(client.read().etag(), Some(961));
    (server.terminate(), model)
}

/// Its lines without the sequence, which comes first and is assigned again.
fn without_sequences(exported: &str) -> Vec<&str> {
    exported.lines().map(|line| line.split_once('\t').expect("fields are separated by tabs").1).collect()
}

#[track_caller]
fn holds(server: &Server, model: &Model) {
    let mut client = Connection::open(server.address());
    for (key, value) in model {
        let got = client.ask("GET", &short(key), b"");
        match value {
            Some(value) => assert!(got.status == 200 && got.body == *value, "{key:?} got {}", got.status),
            None => assert_eq!(got.status, 404, "{key:?} was deleted"),
        }
    }
}

#[test]
fn log_is_verified_exported_and_compacted() {
    let (stopped, model) = store_with_garbage();
    let from = stopped.data();
    let (printed, said) = done(log("verify", from, &[]));
    assert!(printed.lines().count() > 3 && said.is_empty(), "several segments: {printed}");
    let last = printed.lines().last().and_then(|line| line.strip_prefix("the log is sound: ")).expect("it is");
    // Some garbage may be compacted already.
    let count: usize =
        last.strip_suffix(" entries, newest sequence 961").expect("it ends with 961").parse().expect(last);
    assert!((721..=961).contains(&count), "{printed}");

    let (exported, said) = done(log("export", from, &[]));
    assert_eq!((exported.lines().count(), said.as_str()), (count, ""));
    assert_eq!(done(log("cat", from, &[])).0.lines().count(), count);
    let (objects, _) = done(log("cat", from, &["--output", "json"]));
    let newest: serde_json::Value = serde_json::from_str(objects.lines().last().expect("there is one")).expect("JSON");
    assert_eq!((newest["sequence"].as_str(), newest["value"].as_str()), (Some("961"), Some("x")));

    // Through a file, and through a pipe.
    let elsewhere = temporary();
    let file = elsewhere.path().join("backup.txt");
    fs::write(&file, &exported).expect("the directory takes a file");
    let file = file.to_str().expect("a temporary path is text");
    let [by_file, by_pipe] = ["by-file", "by-pipe"].map(|name| elsewhere.path().join(name));
    let (_, said) = done(log("import", &by_file, &[file]));
    assert_eq!(said, format!("imported {count} entries; the newest sequence is {count}\n"));
    let mut export = log("export", from, &[]).stdout(Stdio::piped()).spawn().expect("the binary can be started");
    let mut import = log("import", &by_pipe, &["-"]);
    let (_, said) = done({
        import.stdin(export.stdout.take().expect("stdout is piped"));
        import
    });
    assert!(export.wait().expect("a child can be waited for").success());
    assert_eq!(said, format!("imported {count} entries; the newest sequence is {count}\n"));
    for to in [&by_file, &by_pipe] {
        let imported = done(log("export", to, &[])).0;
        assert!(without_sequences(&imported) == without_sequences(&exported), "{} is another log", to.display());
    }

    let (_, said) = done(log("compact", from, &[]));
    assert!(said.starts_with("compacted: the log takes ") && said.contains(", saved "), "{said}");
    let (printed, _) = done(log("verify", from, &[]));
    let live = 1 + model.iter().filter(|(_, value)| value.is_some()).count();
    let last = printed.lines().last().expect("it says something");
    assert_eq!(last, format!("the log is sound: {live} entries, newest sequence 961"));
    assert!(done(log("compact", from, &[])).1.ends_with(", saved 0 B\n"), "there is nothing left to do");

    let server = stopped.restart(&SMALL);
    holds(&server, &model);
    assert_eq!(Connection::open(server.address()).ask("PUT", "/v1/next", b"").etag(), Some(962));
    let imported = temporary();
    fs::rename(by_pipe.join("log"), imported.path().join("log")).expect("a directory can be moved");
    let server = Server::spawn(serve(imported.path()), imported);
    holds(&server, &model);
    let typed = Connection::open(server.address()).ask("GET", "/v1/typed", b"");
    assert_eq!((typed.text(), typed.header("content-type")), ("x", Some("image/x;a=y%20+")));
}

/// Errors of commands that must fail.
fn all_refuse(data: &Path, import: &str) -> [Refused; 6] {
    [
        refused(log("verify", data, &[])),
        refused(log("cat", data, &[])),
        refused(log("cat", data, &["--output", "json"])),
        refused(log("export", data, &[])),
        refused(log("compact", data, &[])),
        refused(log("import", data, &[import])),
    ]
}

#[test]
fn log_in_use_is_rejected_naming_holder() {
    let server = Server::start(&[]);
    let mut client = Connection::open(server.address());
    assert_eq!(client.ask("PUT", "/v1/a", b"value").status, 201);
    let text = server.data().join("text");
    fs::write(&text, "1\t2\ta\tother\n").expect("the directory takes a file");
    let (pid, data) = (format!("process {};", server.pid()), server.data().display().to_string());
    for refused in all_refuse(server.data(), text.to_str().expect("a temporary path is text")) {
        refused.with(1, &[&pid, &data, "in use"]);
    }
    assert_eq!(client.ask("GET", "/v1/a", b"").body, b"value", "it continues");
    assert_eq!(client.ask("PUT", "/v1/a", b"value").etag(), Some(2), "it continues");
}

#[test]
fn directory_without_log_is_rejected_unchanged() {
    let empty = temporary();
    let missing = empty.path().join("missing");
    for data in [empty.path(), &missing] {
        for refused in all_refuse(data, "/no/such/file") {
            let expected = if refused.line.contains("/no/such/file") { "cannot read" } else { "there is no log in" };
            refused.with(1, &[expected]);
        }
    }
    assert_eq!(fs::read_dir(empty.path()).expect("it is there").count(), 0);
}

#[test]
fn corruption_is_reported_with_place_and_exit_code_1() {
    let stopped = store().0.terminate();
    let data = stopped.data();
    let segment = data.join("log/0000000002.seg");
    let mut bytes = fs::read(&segment).expect("there are several segments");
    bytes[100_000] ^= 1;
    fs::write(&segment, &bytes).expect("it can be written");
    let place = format!("{} at byte ", segment.display());

    let verified = log("verify", data, &[]).stdout(Stdio::piped()).output().expect("the binary can be started");
    let printed = String::from_utf8(verified.stdout).expect("it is text");
    assert_eq!(verified.status.code(), Some(1));
    assert!(printed.contains(&format!("CORRUPT: {place}")), "{printed}");
    let sound = printed.lines().filter(|line| line.contains(" entries, sequences ")).count();
    assert!(sound > 1, "what is after the damage is looked at too: {printed}");
    refused(log("verify", data, &[])).with(1, &[&place, "restore a backup"]);

    // Entries before the corruption can be exported.
    let dumped = log("cat", data, &[]).stdout(Stdio::piped()).output().expect("the binary can be started");
    assert_eq!(dumped.status.code(), Some(1));
    let lines = String::from_utf8(dumped.stdout).expect("it is text").lines().count();
    assert!(0 < lines && lines < 800, "{lines} entries were printed");
    let expected = [&segment.display().to_string(), "damaged at byte ", "kvs txlog verify --data-dir "];
    for refused in [refused(log("export", data, &[])), refused(log("compact", data, &[]))] {
        refused.with(1, &expected);
    }
    let Err((status, stopped)) = Server::try_spawn(serve(data), temporary()) else { panic!("it serves") };
    let last = stopped.stderr().last().expect("it says why");
    assert!(status.code() == Some(1) && expected.iter().all(|text| last.contains(text)), "{status}: {last}");
    assert!(fs::read(&segment).expect("it is still there") == bytes, "damage is left as it is");
}

#[test]
fn malformed_import_is_rejected_by_line() {
    let directory = temporary();
    let (data, file) = (directory.path().join("data"), directory.path().join("text"));
    let text = "1\t2\tkey-a\tHello\n2\t2\tkey-b\t100%\n3\t1\tkey-a\t\n";
    fs::write(&file, text).expect("the directory takes a file");
    let path = file.to_str().expect("a temporary path is text");
    let what = "the value has a % that is not followed by two hexadecimal digits";
    for format in ["kvs", "cloud-native-go"] {
        let refused = refused(log("import", &data, &["--format", format, path]));
        refused.with(1, &[&format!("line 2 of {path}: {what}")]);
    }
    assert!(!data.exists(), "nothing is begun");

    // Input from a pipe is appended as it is read.
    let mut import =
        log("import", &data, &["-"]).stdin(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts");
    import.stdin.take().expect("stdin is piped").write_all(text.as_bytes()).expect("it is read");
    let output = import.wait_with_output().expect("a child can be waited for");
    let said = String::from_utf8(output.stderr).expect("it is text");
    assert_eq!(said, format!("kvs: line 2 of standard input: {what}; the 1 entries before it were imported\n"));
    assert_eq!(output.status.code(), Some(1));
    let (printed, _) = done(log("cat", &data, &[]));
    assert!(printed.lines().count() == 1 && printed.ends_with("put \"key-a\" = \"Hello\"\n"), "{printed}");

    // Standard input from a file is read like a file.
    let mut import = log("import", &data, &["-"]);
    import.stdin(File::open(&file).expect("it is there"));
    refused(import).with(1, &["line 2 of standard input: "]);
    assert_eq!(done(log("cat", &data, &[])).0, printed);

    refused(log("import", &data, &[])).with(2, &["<FILE>"]);
    refused(log("import", &data, &["--format", "other", path])).with(2, &["other", "cloud-native-go"]);
    refused(log("import", &data, &["/no/such/file"])).with(1, &["cannot read /no/such/file"]);
    refused(log("import", &data, &["/"])).with(1, &["cannot read /"]);
}

#[test]
fn closed_pipe_is_accepted_and_full_disk_is_error() {
    let stopped = store().0.terminate();
    let server = Server::start(&[]);
    assert_eq!(Connection::open(server.address()).ask("PUT", "/v1/a", b"value").status, 201);
    let small = server.terminate();
    for command in ["cat", "export"] {
        // More than a pipe holds, so that it still writes when the reader has closed it.
        let mut shell = through("bash", &kvs());
        shell.args(["-c", "set -o pipefail; \"$0\" txlog \"$1\" --data-dir \"$2\" | head -n 1"]);
        shell.args([kvs_tests::binary(), command]).arg(stopped.data());
        let (printed, said) = done(shell);
        assert_eq!((printed.lines().count(), said.as_str()), (1, ""), "{command}");

        // Much or little: buffered output must not be lost either.
        for data in [stopped.data(), small.data()] {
            let mut full = log(command, data, &[]);
            full.stdout(File::create("/dev/full").expect("every Linux has it"));
            refused(full).with(1, &["cannot write to standard output", "No space left"]);
        }
    }
}

#[test]
fn torn_write_is_reported_and_is_not_corruption() {
    let server = Server::start(&[]);
    let mut client = Connection::open(server.address());
    for n in 0..3 {
        assert_eq!(client.ask("PUT", &format!("/v1/{n}"), b"value").status, 201);
    }
    let stopped = server.kill();
    let segment = stopped.data().join("log/0000000001.seg");
    let mut bytes = fs::read(&segment).expect("the log has a segment");
    let end = bytes.iter().rposition(|byte| *byte != 0).expect("it holds something") + 1;
    bytes[end.next_multiple_of(8)..][..7].copy_from_slice(b"FRME\x09\0\0");
    fs::write(&segment, &bytes).expect("it can be written");
    let (printed, _) = done(log("verify", stopped.data(), &[]));
    assert!(printed.contains(&format!("{} at byte ", segment.display())), "{printed}");
    assert!(printed.contains("the next start truncates it\n"), "{printed}");
    assert!(printed.ends_with("the log is sound: 3 entries, newest sequence 3\n"), "{printed}");
    assert!(fs::read(&segment).expect("it is still there") == bytes, "verify changes nothing");
    let (printed, said) = done(log("cat", stopped.data(), &[]));
    assert_eq!(printed.lines().count(), 3);
    assert!(said.contains("torn write") && said.contains(".torn"), "{said}");
    stopped.restart(&[]).terminate();
}

#[test]
fn progress_is_shown_on_terminals_only() {
    let stopped = store().0.terminate();
    let elsewhere = temporary();
    let file = elsewhere.path().join("backup.txt");
    fs::write(&file, done(log("export", stopped.data(), &[])).0).expect("the directory takes a file");
    let (data, to) = (stopped.data().display(), elsewhere.path().join("data"));
    for (rest, shown) in [
        (format!("verify --data-dir {data}"), "bytes checked"),
        (format!("export --data-dir {data} >/dev/null"), "entries"),
        (format!("import --data-dir {} {}", to.display(), file.display()), "bytes imported"),
        (format!("compact --data-dir {data}"), "bytes read"),
    ] {
        // `script` runs the command in a terminal.
        let mut script = through("script", &kvs());
        let command = format!("{} txlog {rest}", kvs_tests::binary());
        script.args(["--quiet", "--return", "--command", &command, "/dev/null"]);
        let (seen, _) = done(script);
        assert!(seen.contains(shown), "{rest}: {seen}");
    }
}
