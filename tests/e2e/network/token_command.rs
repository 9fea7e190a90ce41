//! `kvs token`: what it prints, and what it writes to the file.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};
use std::time::Instant;

use rustix::process::Signal;

use crate::support::server::{PATIENCE, Server, kvs, refused};
use crate::support::tokens::{Tokens, ask, with};

#[test]
fn token_is_printed_once_and_stored_as_hash() {
    let tokens = Tokens::new();
    let token = tokens.add(&["alice"]);
    assert!(token.starts_with("kvs_") && token.len() == 68, "{token}");
    let text = fs::read_to_string(tokens.file()).expect("the file is there");
    assert!(text.starts_with("alice read ") && !text.contains(&token[4..]), "{text}");
    let mode = fs::metadata(tokens.file()).expect("the file is there").permissions().mode();
    assert_eq!(mode & 0o077, 0, "others may read it");
    assert_ne!(tokens.add(&["bob"]), token);

    let refuses = |args: &[&str]| {
        let mut command = kvs();
        command.args(["token", "create", "--tokens", &tokens.file()]).args(args);
        refused(command)
    };
    refuses(&["a b"]).with(1, &["the name must be 1 to 64 letters"]);
    refuses(&["carol", "--path-prefix", "v1"]).with(1, &["slash"]);
    refuses(&["carol", "--scope", "all"]).with(2, &["--scope", "metrics", "read", "write", "admin"]);
    refuses(&["carol", "--expires", "2020-01-01"]).with(2, &["--expires", "is in the past"]);
    refuses(&["carol", "--expires", "soon"]).with(2, &["--expires", "90days", "2027-01-31"]);
    assert_eq!(fs::read_to_string(tokens.file()).expect("the file is there").lines().count(), 2);
}

/// A `kvs token` of this file.
fn token_command(tokens: &Tokens, args: &[&str]) -> Command {
    let mut command = kvs();
    command.arg("token").args(args).args(["--tokens", &tokens.file()]).stdout(Stdio::piped());
    command
}

fn list(tokens: &Tokens) -> Vec<String> {
    let output = token_command(tokens, &["list"]).output().expect("the binary can be started");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text").lines().map(str::to_owned).collect()
}

#[test]
fn token_is_rotated_by_second_token_of_same_name() {
    let tokens = Tokens::new();
    let [old, new] = [(); 2].map(|()| tokens.add(&["alice", "--scope", "write"]));
    let bob = tokens.add(&["bob", "--path-prefix", "/v1/b", "--expires", "2227-01-31"]);
    let server = Server::start(&["--tokens", &tokens.file()]);
    for token in [&old, &new] {
        ask(&server, "GET", "/v1/a", &with(token)).says(404, "no such key");
    }
    let lines = list(&tokens);
    assert_eq!(lines.len(), 3, "{lines:?}");
    assert!(lines[2].contains("bob") && lines[2].contains("2227-01-31T00:00:00Z") && lines[2].ends_with("/v1/b"));
    let id = lines[0].split(' ').next().expect("an id");
    // Comments are kept, and the file is replaced at once.
    let before = fs::read_to_string(tokens.file()).expect("the file is there");
    fs::write(tokens.file(), format!("# people\n{before}")).expect("the file can be written");
    let revoke = |what: &str| {
        let output = token_command(&tokens, &["revoke", what]).output().expect("the binary can be started");
        let lines = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success() && lines.contains("audit action=\"token-revoke\""), "{lines}");
        server.signal(Signal::HUP);
    };
    revoke(id);
    server.says("reloaded the token file");
    await_status(&server, &old, 401);
    ask(&server, "GET", "/v1/a", &with(&new)).says(404, "no such key");
    ask(&server, "GET", "/v1/b", &with(&bob)).says(404, "no such key");
    revoke("alice");
    await_status(&server, &new, 401);
    let text = fs::read_to_string(tokens.file()).expect("the file is there");
    assert!(text.starts_with("# people\nbob ") && text.lines().count() == 2, "{text}");
    let mode = fs::metadata(tokens.file()).expect("the file is there").permissions().mode();
    assert_eq!(mode & 0o077, 0, "others may read it");
    refused(token_command(&tokens, &["revoke", "alice"])).with(1, &["has no token alice", "kvs token list"]);
    assert!(lines.iter().chain([&text]).all(|line| !line.contains("kvs_")), "a token is shown");
}

/// Waits until a request with this token has this status.
fn await_status(server: &Server, token: &str, status: u16) {
    let begun = Instant::now();
    while ask(server, "GET", "/v1/a", &with(token)).status != status {
        assert!(begun.elapsed() < PATIENCE, "it never was {status}");
    }
}

#[test]
fn commands_at_the_same_time_lose_no_change() {
    let tokens = Tokens::new();
    let old: Vec<_> = (0..16).map(|n| format!("old{n}")).collect();
    old.iter().for_each(|name| drop(tokens.add(&[name])));
    let mut commands: Vec<_> = old
        .iter()
        .flat_map(|name| [["revoke".to_owned(), name.clone()], ["create".to_owned(), format!("new-{name}")]])
        .map(|args| token_command(&tokens, &args.each_ref().map(String::as_str)))
        .map(|mut command| command.stderr(Stdio::null()).spawn().expect("the binary can be started"))
        .collect();
    for command in &mut commands {
        assert!(command.wait().expect("it ends").success());
    }
    let mut left: Vec<_> =
        list(&tokens).iter().filter_map(|line| Some(line.split_whitespace().nth(1)?.to_owned())).collect();
    let mut expected: Vec<_> = old.iter().map(|name| format!("new-{name}")).collect();
    left.sort();
    expected.sort();
    assert_eq!(left, expected);
}

#[test]
fn token_that_cannot_be_printed_is_not_created() {
    let tokens = Tokens::new();
    tokens.add(&["alice"]);
    let mut command = kvs();
    let full = fs::File::options().write(true).open("/dev/full").expect("Linux has it");
    command.args(["token", "create", "bob", "--tokens", &tokens.file()]).stdout(full);
    refused(command).with(1, &["cannot print the token, none was created"]);
    let (reader, closed) = std::io::pipe().expect("a pipe can be made");
    drop(reader);
    let mut command = kvs();
    command.args(["token", "create", "bob", "--tokens", &tokens.file()]).stdout(closed);
    refused(command).with(1, &["cannot print the token, none was created"]);
    let mut command = kvs();
    command.args(["token", "create", "bob", "--tokens", &tokens.file()]).stdout(Stdio::null());
    refused(command).with(1, &["/dev/null, none was created"]);
    // A closed output is opened as /dev/null.
    let create = kvs();
    let mut command = Command::new("/bin/sh");
    command
        .args(["-c", "exec \"$0\" token create bob --tokens \"$1\" >&-"])
        .arg(create.get_program())
        .arg(tokens.file());
    refused(command).with(1, &["/dev/null, none was created"]);
    let text = fs::read_to_string(tokens.file()).expect("the file is there");
    assert!(text.starts_with("alice ") && text.lines().count() == 1, "{text}");
}
