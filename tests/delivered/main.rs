//! What is delivered: the image is built from the Dockerfile and run as it says. `just image-test` does so.
//!
//! No registry of images is asked. The base of the build is this machine's own toolchain, in an image that is made here, and
//! buildah builds without a daemon. The image is run without one too: with its environment, user and command, its file
//! system read-only, in a mount namespace of its own. All of it takes root.

#[allow(dead_code, reason = "the tests of every day use the rest")]
#[path = "../e2e/support/compiled.rs"]
mod compiled;

#[allow(dead_code, unused_imports, unused_macros, reason = "the tests of every day use the rest")]
#[path = "../e2e/support/log.rs"]
mod log;

#[allow(dead_code, reason = "the tests of every day use the rest")]
#[path = "../e2e/support/server.rs"]
mod server;

mod image;

use std::fs;
use std::os::unix::fs::{MetadataExt, chown};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use rustix::process::Signal;
use tempfile::TempDir;

use crate::image::Image;
use crate::server::{Server, refused};

/// The user of the image.
const USER: u32 = 65532;

/// The largest that all files of an image may be together.
const FULL_BYTES: u64 = 16 << 20;
const SMALL_BYTES: u64 = 6656 << 10;

#[test]
fn the_full_flavour() {
    let image = Image::build("full");
    is_small(&image, FULL_BYTES);
    says_what_it_is(&image);
    holds_nothing_else(&image);
    serves_a_session_and_keeps_it(&image, &[]);
    has_a_console(&image, true);
    outlives_a_trap(&image);
    ends_at_a_panic(&image);
    refuses_what_is_wrong(&image);
}

#[test]
fn the_small_flavour() {
    let image = Image::build("small");
    is_small(&image, SMALL_BYTES);
    says_what_it_is(&image);
    holds_nothing_else(&image);
    serves_a_session_and_keeps_it(&image, &[]);
    has_a_console(&image, false);
    outlives_a_trap(&image);
    ends_at_a_panic(&image);
    refuses_what_is_wrong(&image);
    runs_compiled_guests_alone(&image);
    // The longest of all.
    is_the_same_when_built_again(&image, "small");
}

/// An empty volume, as a new one in the image's place for data.
fn volume() -> TempDir {
    let volume = TempDir::new().expect("a temporary directory can be made");
    chown(volume.path(), Some(USER), Some(USER)).expect("this test is run by root");
    volume
}

fn is_small(image: &Image, limit: u64) {
    let files = image.files().into_iter().filter(|(_, metadata)| metadata.is_file());
    let sizes: Vec<_> = files.map(|(name, metadata)| (name, metadata.len())).collect();
    println!("{}: {sizes:?}", image.flavour());
    assert!(sizes.iter().map(|(_, bytes)| bytes).sum::<u64>() <= limit, "more than {limit} bytes: {sizes:?}");
}

fn says_what_it_is(image: &Image) {
    let config = image.config();
    assert_eq!(config["User"], "65532:65532");
    assert_eq!(config["Entrypoint"][0], "/kvs");
    assert_eq!(config["Cmd"][0], "serve");
    assert!(config["ExposedPorts"]["8080/tcp"].is_object(), "{config}");
    assert!(config["Volumes"]["/data"].is_object(), "{config}");
    assert_eq!(config["Healthcheck"]["Test"], serde_json::json!(["CMD", "/kvs", "health"]));
    for label in ["title", "description", "licenses", "version", "revision"] {
        assert!(config["Labels"][format!("org.opencontainers.image.{label}")].is_string(), "{label}: {config}");
    }
}

/// No shell, no library, nothing that somebody else could write.
fn holds_nothing_else(image: &Image) {
    let mut found: Vec<_> = image.files().into_iter().map(|(name, _)| name).collect();
    found.sort();
    assert_eq!(found, ["data", "etc", "etc/ssl", "etc/ssl/certs", "etc/ssl/certs/ca-certificates.crt", "kvs"]);
    for (name, metadata) in image.files() {
        assert_eq!(metadata.uid(), if name == "data" { USER } else { 0 }, "whose is {name}?");
    }
    let ldd = Command::new("ldd").arg(image.binary()).output().expect("ldd is part of every system");
    let said = String::from_utf8_lossy(&[ldd.stdout, ldd.stderr].concat()).into_owned();
    assert!(said.contains("statically linked") || said.contains("not a dynamic"), "{said}");
    // Nor where it was built.
    let binary = fs::read(image.binary()).expect("the image has a binary");
    let home = image::home("CARGO_HOME", ".cargo").into_os_string().into_encoded_bytes();
    assert!(!binary.windows(home.len()).any(|bytes| bytes == home), "it names files of this machine");
}

fn is_the_same_when_built_again(image: &Image, flavour: &'static str) {
    // Asked for now: the new image takes over the name.
    let layers = image.layers();
    assert!(layers[0].is_string(), "{layers}");
    assert_eq!(Image::rebuild(flavour).layers(), layers, "the same files produced another image");
}

/// With curl, as anybody would.
fn serves_a_session_and_keeps_it(image: &Image, args: &[&str]) {
    let volume = volume();
    let command = |volume: &TempDir| {
        let mut command = image.run(volume.path(), args);
        command.envs([("KVS_LISTEN", "127.0.0.1:0"), ("KVS_ADMIN", "127.0.0.1:0")]);
        command
    };
    let started = Instant::now();
    let first = command(&volume);
    let server = Server::spawn(first, volume);
    println!("{}: it serves after {:?}, with {} KiB of memory", image.flavour(), started.elapsed(), resident(&server));
    assert_eq!(curl(&server, &["-X", "PUT", "-d", "Hello, key-value store!"]), "201");
    assert_eq!(curl(&server, &[]), "Hello, key-value store!200");
    let health = |server: &Server| {
        let mut health = image.exec(server.data(), &["health"]);
        health.env("KVS_ADMIN", server.admin().to_string());
        health.status().expect("it can be started").code()
    };
    assert_eq!(health(&server), Some(0));

    let stopped = server.terminate();
    let volume = stopped.into_data();
    let again = command(&volume);
    let server = Server::spawn(again, volume);
    assert_eq!(curl(&server, &[]), "Hello, key-value store!200");
    assert_eq!(curl(&server, &["-X", "DELETE"]), "200");
    assert_eq!(curl(&server, &[]), "no such key\n404");
    server.terminate();
}

fn has_a_console(image: &Image, has_one: bool) {
    let volume = volume();
    let mut command = image.run(volume.path(), &[]);
    command.envs([("KVS_LISTEN", "127.0.0.1:0"), ("KVS_ADMIN", "127.0.0.1:0")]);
    let server = Server::spawn(command, volume);
    let status = |path: &str| {
        let url = format!("http://{}{path}", server.admin());
        ask(&["-w", "%{http_code}", "-o", "/dev/null", &url])
    };
    for path in ["/console", "/console/app.js", "/console/style.css"] {
        assert_eq!(status(path), if has_one { "200" } else { "404" }, "{path}");
    }
    // What the console would use is there without it.
    for path in ["/livez", "/guest", "/v1"] {
        assert_eq!(status(path), "200", "{path}");
    }
    server.terminate();
}

/// Without tables to unwind by, neither in the binary nor in the guest.
fn outlives_a_trap(image: &Image) {
    let mut build = Command::new(env!("CARGO"));
    build.args(["build", "--locked", "--package", "unruly-guest", "--profile", "guest", "--target", "wasm32-wasip2"]);
    assert!(build.status().expect("cargo can be started").success(), "the guest does not build");
    let component = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/wasm32-wasip2/guest/unruly_guest.wasm");
    let volume = volume();
    compile(component, &volume.path().join("guest.cwasm"));
    let mut command = image.run(volume.path(), &["/data/guest.cwasm"]);
    command.env("KVS_LISTEN", "127.0.0.1:0").env("KVS_ADMIN", "127.0.0.1:0");
    let server = Server::spawn(command, volume);
    let status = |path: &str, args: &[&str]| {
        ask(&[&["-w", "%{http_code}", "-o", "/dev/null", &server.url(path)], args].concat())
    };
    assert_eq!(status("/store/a", &["-X", "PUT", "-d", "x"]), "201");
    assert_eq!(status("/panic", &[]), "500");
    let trap = server.says("the guest trapped");
    assert!(trap.contains("rust_panic"), "it does not say where: {trap}");
    assert_eq!(status("/store/a", &[]), "200");
    server.terminate();
}

/// By a signal, after a line that says where, and with all that was acknowledged. Nothing that can be sent to it makes it panic: a
/// system call fails, without which its runtime cannot work.
fn ends_at_a_panic(image: &Image) {
    let volume = volume();
    let command = |volume: &TempDir| {
        let mut command = image.run(volume.path(), &[]);
        command.envs([("KVS_LISTEN", "127.0.0.1:0"), ("KVS_ADMIN", "127.0.0.1:0")]);
        command
    };
    let first = command(&volume);
    let server = Server::spawn(first, volume);
    assert_eq!(curl(&server, &["-X", "PUT", "-d", "Hello, key-value store!"]), "201");
    let mut strace = Command::new("strace");
    strace.args(["-f", "-qq", "-o", "/dev/null", "-e", "inject=epoll_wait,epoll_pwait:error=EBADF"]);
    let mut strace = strace.args(["-p", &server.pid().to_string()]).spawn().expect("strace is installed");
    let (status, stopped) = server.ends();
    // It ends with the process that it traces.
    let _ = strace.wait();
    assert_eq!(status.signal(), Some(Signal::ABORT.as_raw()), "{status}");
    let last = stopped.stderr().last().map_or("", String::as_str);
    assert!(last.contains("thread panicked: unexpected error when polling the I/O driver"), "{last}");
    assert!(last.contains("at=") && last.contains(".rs:"), "it does not say where: {last}");

    let volume = stopped.into_data();
    let again = command(&volume);
    let server = Server::spawn(again, volume);
    assert_eq!(curl(&server, &[]), "Hello, key-value store!200");
    server.terminate();
}

fn compile(guest: &str, output: &Path) {
    let status = server::kvs().args(["compile", guest, "-o"]).arg(output).status();
    assert!(status.expect("the binary under test can be started").success());
}

fn refuses_what_is_wrong(image: &Image) {
    // It is not open to a network by oversight.
    let volume = volume();
    refused(image.run(volume.path(), &[])).with(1, &["--listen 0.0.0.0:8080", "--insecure"]);

    let strangers = TempDir::new().expect("a temporary directory can be made");
    let mut command = image.run(strangers.path(), &[]);
    command.env("KVS_LISTEN", "127.0.0.1:0").env("KVS_ADMIN", "127.0.0.1:0");
    refused(command).with(1, &["data directory /data is not writable", "change its owner or mode"]);

    let mut command = image.run(volume.path(), &["--data-dir", "/elsewhere"]);
    command.env("KVS_LISTEN", "127.0.0.1:0").env("KVS_ADMIN", "127.0.0.1:0");
    refused(command).with(1, &["data directory /elsewhere is on a read-only file system"]);

    let mut command = image.run(volume.path(), &[]);
    command.env("KVS_DTAA", "/data");
    refused(command).with(2, &["KVS_DTAA", "KVS_DATA_DIR"]);
}

/// In the small flavour: a guest that another binary compiled, and no component.
fn runs_compiled_guests_alone(image: &Image) {
    let volume = volume();
    let component = volume.path().join("guest.wasm.component");
    fs::copy(kvs_tests::DEFAULT_GUEST, &component).expect("the default guest was built with the binary");
    let mut command = image.run(volume.path(), &["/data/guest.wasm.component"]);
    command.env("KVS_LISTEN", "127.0.0.1:0").env("KVS_ADMIN", "127.0.0.1:0");
    refused(command).with(1, &["/data/guest.wasm.component cannot be run", "has no compiler", "kvs compile"]);
    refused(image.exec(volume.path(), &["compile", "-o", "/data/x"])).with(1, &["cannot compile built in", "already"]);

    let compiled = volume.path().join("guest.cwasm");
    compile(kvs_tests::DEFAULT_GUEST, &compiled);
    serves_a_session_and_keeps_it_with(image, &compiled);
}

fn serves_a_session_and_keeps_it_with(image: &Image, guest: &Path) {
    let volume = volume();
    fs::copy(guest, volume.path().join("guest.cwasm")).expect("the volume takes a file");
    let mut command = image.run(volume.path(), &["/data/guest.cwasm"]);
    command.env("KVS_LISTEN", "127.0.0.1:0").env("KVS_ADMIN", "127.0.0.1:0");
    let server = Server::spawn(command, volume);
    assert_eq!(curl(&server, &["-X", "PUT", "-d", "x"]), "201");
    // A component that is sent is refused, and so is a compiled one; back to the one in the binary is possible.
    let admin = format!("http://{}/guest", server.admin());
    let put = |file: &str| ask(&["-T", file, &admin]);
    assert!(put(kvs_tests::DEFAULT_GUEST).contains("has no compiler"));
    assert!(put(guest.to_str().expect("a temporary path is text")).contains("taken only from disk"));
    assert!(ask(&["-X", "DELETE", &format!("{admin}?dry-run")]).contains("\"name\": \"kvs\""));
    server.terminate();
}

/// Asks for one key: the body, and the status behind it.
fn curl(server: &Server, args: &[&str]) -> String {
    ask(&[&["-w", "%{http_code}", &server.url("/v1/key-a")], args].concat())
}

fn ask(args: &[&str]) -> String {
    let output = Command::new("curl").args(["-s", "--max-time", "60"]).args(args).output().expect("curl is installed");
    assert!(output.status.success(), "curl {args:?}: {}", output.status);
    String::from_utf8(output.stdout).expect("text")
}

/// Memory that it has, in KiB.
fn resident(server: &Server) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", server.pid())).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("it has memory");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}
