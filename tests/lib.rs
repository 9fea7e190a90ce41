//! Paths that the suites share: the project, the binary under test, the guests.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::SystemTime;
use std::{env, fs};

/// The root of the project.
pub const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

/// The component of the built-in guest.
pub const DEFAULT_GUEST: &str = kvs::guest::BUILT_IN_FILE;

/// The binary under test, built beside this program. Fails when it is missing or older than one of the files that it was built
/// from: cargo builds a binary only together with tests of its own package.
pub fn binary() -> &'static str {
    static BINARY: OnceLock<String> = OnceLock::new();
    BINARY.get_or_init(|| {
        let program = env::current_exe().expect("this program has a path");
        let directory = program.ancestors().nth(2).expect("it is in deps of the target directory");
        let binary = directory.join("kvs");
        let advice = "build it with: cargo build --release --package kvs";
        let built = modified(&binary).unwrap_or_else(|| panic!("{} is missing; {advice}", binary.display()));
        for source in sources(&binary.with_extension("d")) {
            if is_newer(&source, built) {
                panic!("{} is older than {}; {advice}", binary.display(), source.display());
            }
        }
        binary.into_os_string().into_string().expect("the path is text")
    })
}

/// What guests are compiled for.
const TARGET: &str = "wasm32-wasip2";

/// Where the build script built the default guest, so that what guests share is not built twice.
pub fn target_dir() -> PathBuf {
    let built = Path::new(DEFAULT_GUEST);
    built.ancestors().nth(3).expect("TARGET/PROFILE/FILE lies in it").to_owned()
}

/// Builds the package `NAME-guest`. Gives the file, as an argument of `kvs serve`.
pub fn built(name: &str) -> String {
    let target_dir = target_dir();
    let mut cargo = Command::new(env!("CARGO"));
    cargo.current_dir(ROOT);
    cargo.args(["build", "--locked", "--package", &format!("{name}-guest"), "--profile", "guest", "--target", TARGET]);
    cargo.arg("--target-dir").arg(&target_dir);
    succeeds(cargo, name);
    let guest = target_dir.join(TARGET).join("guest").join(format!("{name}_guest.wasm"));
    guest.to_str().expect("the path is text").to_owned()
}

/// Runs a command that builds something.
pub fn succeeds(mut command: Command, what: &str) {
    // What is meant for the host's build (linters, flags, coverage) must not reach the guest's.
    for (name, _) in env::vars_os() {
        let meant_for_host = ["CARGO_ENCODED_RUSTFLAGS", "RUSTC_WORKSPACE_WRAPPER", "RUSTC_WRAPPER", "RUSTFLAGS"];
        if meant_for_host.iter().any(|host| name == *host) {
            command.env_remove(name);
        }
    }
    let output = command.output().unwrap_or_else(|error| panic!("{command:?} cannot be started: {error}"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{what} does not build, with {command:?}:\n{said}");
}

/// What cargo has written down beside a binary: `BINARY: FILE FILE …`, with a backslash before each space in a name.
fn sources(dependencies: &Path) -> Vec<PathBuf> {
    let line = fs::read_to_string(dependencies)
        .unwrap_or_else(|error| panic!("{} cannot be read: {error}", dependencies.display()));
    let (_, files) = line.trim().split_once(": ").expect("the binary is named first");
    files.replace("\\ ", "\0").split(' ').map(|file| file.replace('\0', " ").into()).collect()
}

/// Whether a file, or one in a directory, was changed or removed since.
fn is_newer(path: &Path, time: SystemTime) -> bool {
    if !path.is_dir() {
        return modified(path).is_none_or(|at| at > time);
    }
    let mut entries = fs::read_dir(path).expect("the sources can be listed");
    entries.any(|entry| is_newer(&entry.expect("it can be read").path(), time))
}

fn modified(path: &Path) -> Option<SystemTime> {
    fs::metadata(path).and_then(|metadata| metadata.modified()).ok()
}
