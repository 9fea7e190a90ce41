//! Output of commands for programs: JSON, and completions for shells.

use std::process::{Command, Stdio};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::guests::DEFAULT_GUEST;
use crate::support::log::of_files;
use crate::support::server::{Server, kvs};
use crate::support::tokens::Tokens;
use crate::support::wire::Connection;

/// `kvs`, for a server.
fn of(server: &Server, args: &[&str]) -> Command {
    let mut command = kvs();
    command.args(args).env("KVS_URL", server.url("")).env("KVS_ADMIN", server.admin().to_string());
    command
}

#[track_caller]
fn printed(mut command: Command) -> String {
    let output = command.stdout(Stdio::piped()).output().expect("it can be started");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

#[track_caller]
fn objects(command: Command) -> Vec<Value> {
    printed(command).lines().map(|line| serde_json::from_str(line).expect("a line is JSON")).collect()
}

#[test]
fn operator_commands_print_json() {
    of_files!();
    let server = Server::start(&[]);
    let mut client = Connection::open(server.address());
    assert_eq!(client.ask("PUT", "/v1/a", b"value").status, 201);
    let json = ["--output", "json"];
    let of_server = |args: &[&str]| objects(of(&server, &[args, &json].concat()));
    assert_eq!(of_server(&["health"]), [json!({"ready": true})]);
    assert_eq!(of_server(&["health", "--live"]), [json!({"alive": true})]);
    assert_eq!(of_server(&["read-only", "on"]), [json!({"read_only": true})]);
    assert_eq!(of_server(&["read-only", "off"]), [json!({"read_only": false})]);

    let file = server.data().join("backup");
    let file = file.to_str().expect("a temporary path is text");
    let taken = objects(of(&server, &["backup", "-o", file, "--output", "json"])).remove(0);
    assert_eq!((&taken["entries"], &taken["since"], &taken["sequence"]), (&json!(1), &json!("0"), &json!("1")));
    let verified = objects(of(&server, &["backup", "--verify", file, "--output", "json"])).remove(0);
    assert!(verified["log"].is_string() && verified["incarnation"] == taken["incarnation"], "{verified}");

    let lines = server.data().join("lines");
    std::fs::write(&lines, "{\"key\": \"b\", \"value\": \"1\"}\n").expect("the directory takes a file");
    assert_eq!(of_server(&["import", lines.to_str().expect("text")]), [json!({"imported": 1})]);

    let swapped = of_server(&["swap", "--dry-run"]).remove(0);
    assert_eq!((&swapped["name"], &swapped["entries"]), (&json!("kvs"), &json!(2)), "{swapped}");

    let stopped = server.terminate();
    let data = stopped.data().to_str().expect("a temporary path is text");
    let txlog = |command: &str, data: &str, args: &[&str]| {
        let mut kvs = kvs();
        kvs.args(["txlog", command, "--data-dir", data]).args(json).args(args);
        objects(kvs)
    };
    let findings = txlog("verify", data, &[]);
    let first = findings.first().expect("there is a segment");
    assert_eq!((&first["entries"], &first["first"], &first["last"]), (&json!(2), &json!("1"), &json!("2")));
    assert_eq!(findings.last(), Some(&json!({"entries": 2, "sequence": "2"})));
    let entries = txlog("cat", data, &[]);
    assert_eq!((&entries[1]["key"], &entries[1]["sequence"]), (&json!("b"), &json!("2")));
    let compacted = txlog("compact", data, &[]).remove(0);
    assert!(compacted["bytes"].is_u64() && compacted["saved_bytes"].is_u64(), "{compacted}");
    let forked = txlog("fork", data, &[]).remove(0);
    assert!(forked["incarnation"].is_string() && forked["fork"] == "2" && forked["first"].is_string(), "{forked}");

    let other = TempDir::new().expect("a temporary directory can be made");
    let path = |name: &str| other.path().join(name).to_str().expect("a temporary path is text").to_owned();
    let mut restore = kvs();
    restore.args(["restore", file, "--data-dir", &path("restored")]).args(json);
    let restored = objects(restore).remove(0);
    assert!(restored["sequence"] == "1" && restored["incarnation"].is_string(), "{restored}");
    std::fs::write(path("text"), "1\t2\tc\tvalue\t0\t\n").expect("the directory takes a file");
    assert_eq!(txlog("import", &path("imported"), &[&path("text")]), [json!({"imported": 1, "sequence": "1"})]);
}

#[test]
fn inspect_and_token_commands_print_json() {
    let tokens = Tokens::new();
    let created: Value = serde_json::from_str(&tokens.add(&["carol", "--output", "json"])).expect("JSON");
    assert!(created["token"].as_str().is_some_and(|token| token.starts_with("kvs_")), "{created}");
    let mut revoke = kvs();
    revoke.args(["token", "revoke", "carol", "--output", "json", "--tokens", &tokens.file()]);
    let revoked = objects(revoke).remove(0);
    assert!(revoked["name"] == "carol" && revoked["revoked"].as_str().is_some_and(|id| id.len() == 12), "{revoked}");
    let quota = ["--max-keys", "7", "--max-bytes", "1KiB"];
    tokens.add(&[&["alice", "--key-prefix", "team a/", "--expires", "2227-01-31"][..], &quota].concat());
    tokens.add(&["bob", "--scope", "write", "--path-prefix", "/v1/b"]);
    let mut list = kvs();
    list.args(["token", "list", "--output", "json", "--tokens", &tokens.file()]);
    let mut listed = objects(list);
    for token in &mut listed {
        let id = token["id"].take();
        assert!(id.as_str().is_some_and(|id| id.len() == 12), "{id}");
    }
    let alice = json!({
        "id": null, "name": "alice", "scope": "read", "expires": "2227-01-31T00:00:00Z", "path_prefix": null,
        "key_prefix": "team a/", "max_keys": 7, "max_bytes": 1024,
    });
    let bob = json!({
        "id": null, "name": "bob", "scope": "write", "expires": null, "path_prefix": "/v1/b", "key_prefix": null,
        "max_keys": null, "max_bytes": null,
    });
    assert_eq!(listed, [alice, bob]);

    let mut inspect = kvs();
    inspect.args(["inspect", DEFAULT_GUEST, "--output", "json"]);
    let guest = objects(inspect).remove(0);
    assert_eq!((&guest["name"], &guest["sharded"], &guest["fits"]), (&json!("kvs"), &json!(true), &json!(true)));
    assert_eq!(guest["capabilities"], json!(["key-prefix"]));
    assert!(guest["imports"].is_array() && guest["memory_bytes"].is_u64(), "{guest}");
}

#[test]
fn health_prints_json_when_it_fails() {
    let server = Server::start(&[]);
    // Not ready: the address is not that of an admin listener.
    let mut command = kvs();
    command.args(["health", "--output", "json"]).env("KVS_ADMIN", server.address().to_string());
    let output = command.stdout(Stdio::piped()).stderr(Stdio::piped()).output().expect("it can be started");
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(String::from_utf8_lossy(&output.stdout), "{\"ready\":false}\n");
}

#[test]
fn export_has_values_too_large_for_list() {
    for shards in ["1", "4"] {
        let server = Server::start(&["--max-value-bytes", "16MiB", "--shards", shards]);
        let mut client = Connection::open(server.address());
        // Escaped in JSON, it is six times as large, and exceeds the limit of a response.
        let large = vec![1; 12 << 20];
        for (key, value) in [("a", &b"small"[..]), ("b", &large), ("c", &large), ("d", b"last")] {
            assert_eq!(client.ask("PUT", &format!("/v1/{key}"), value).status, 201);
        }
        let exported = objects(of(&server, &["export"]));
        let values: Vec<_> = exported.iter().map(|entry| entry["value"].as_str().expect("text").len()).collect();
        assert_eq!(values, [5, large.len(), large.len(), 4]);
        let listed = objects(of(&server, &["list", "--output", "json"]));
        assert_eq!(listed.len(), 4);
    }
}

/// Completions of the last word.
fn proposals(server: &Server, token: &str, shell: &str, words: &[&str]) -> String {
    let mut command = of(server, &[&["--", "kvs"], words].concat());
    command.env("COMPLETE", shell).env("_CLAP_COMPLETE_INDEX", words.len().to_string()).env("KVS_TOKEN", token);
    printed(command)
}

#[test]
fn shells_propose_keys_of_server() {
    let tokens = Tokens::new();
    let team = tokens.add(&["team", "--scope", "write", "--key-prefix", "cart"]);
    let server = Server::start(&["--tokens", &tokens.file()]);
    let mut client = Connection::open(server.address());
    let authorization = [("authorization", &*format!("Bearer {team}"))];
    for key in ["cart7", "cart8"] {
        assert_eq!(client.ask_with("PUT", &format!("/v1/{key}"), &authorization, b"").status, 201);
    }
    for shell in ["bash", "zsh", "fish"] {
        assert!(proposals(&server, &team, shell, &["ge"]).contains("get"), "{shell}");
        let proposed = proposals(&server, &team, shell, &["get", "cart"]);
        assert!(proposed.contains("cart7") && proposed.contains("cart8"), "{shell}: {proposed}");
        for words in [&["put", "cart7"][..], &["delete", "--prefix", "cart7"], &["watch", "cart8", "cart7"]] {
            let proposed = proposals(&server, &team, shell, words);
            assert!(proposed.contains("cart7") && !proposed.contains("cart8"), "{shell}: {proposed}");
        }
        // No error is printed into the command line.
        assert_eq!(proposals(&server, "kvs_unknown", shell, &["get", "ca"]).trim(), "", "{shell}");
    }
}

#[test]
fn bash_completes_with_printed_script() {
    let server = Server::start(&[]);
    let mut client = Connection::open(server.address());
    for key in ["cart7", "cart8", "photo"] {
        assert_eq!(client.ask("PUT", &format!("/v1/{key}"), b"").status, 201);
    }
    let script = r#"source <(COMPLETE=bash "$KVS")
        COMP_WORDS=("$KVS" get cart) COMP_CWORD=2 COMP_TYPE=9
        _clap_complete_kvs "$KVS" cart get 2>/dev/null
        printf '%s\n' "${COMPREPLY[@]}""#;
    let mut bash = Command::new("bash");
    bash.args(["-c", script]).env("KVS", kvs().get_program()).env("KVS_URL", server.url(""));
    assert_eq!(printed(bash).lines().collect::<Vec<_>>(), ["cart7", "cart8"]);
}
