//! Builds the default guest, `guest/default`, as a component, so that the host can embed it; or has it embed one
//! that is compiled already, as it must be where the host has no compiler.
//!
//! It has a target directory of its own: the build that runs this script holds the lock on the other one.

use std::env;
use std::path::PathBuf;
use std::process::Command;

const TARGET: &str = "wasm32-wasip2";
/// The variable that names the compiled guest.
const COMPILED: &str = "COMPILED_GUEST";

// Cargo reads what this prints.
#[allow(clippy::print_stdout)]
fn main() {
    for path in [
        "guest/default",
        "guest/kvs/Cargo.toml",
        "guest/kvs/openapi.json",
        "guest/kvs/src",
        "wit",
        "Cargo.toml",
        "Cargo.lock",
    ] {
        println!("cargo::rerun-if-changed=../{path}");
    }
    println!("cargo::rerun-if-env-changed={COMPILED}");
    if let Ok(guest) = env::var(COMPILED) {
        println!("cargo::rerun-if-changed={guest}");
        println!("cargo::rustc-env=DEFAULT_GUEST={guest}");
        return;
    }
    if env::var_os("CARGO_FEATURE_COMPILER").is_none() {
        println!(
            "cargo::error=without its compiler kvs embeds a guest that another one compiled: kvs compile --output FILE, \
             then {COMPILED}=FILE with its whole path; deploy/build.sh does both"
        );
        return;
    }
    let target_dir = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("guest");
    let mut cargo = Command::new(env::var_os("CARGO").expect("cargo sets CARGO"));
    cargo.args(["build", "--package", "default-guest", "--profile", "guest", "--target", TARGET, "--target-dir"]);
    cargo.arg(&target_dir);
    // What is meant for the host's build (linters, flags, coverage) must not reach the guest's.
    for (name, _) in env::vars_os() {
        let meant_for_host = ["CARGO_ENCODED_RUSTFLAGS", "RUSTC_WORKSPACE_WRAPPER", "RUSTC_WRAPPER", "RUSTFLAGS"];
        if meant_for_host.iter().any(|host| name == *host) {
            cargo.env_remove(name);
        }
    }
    let status = cargo.status().expect("cargo can be started, since it started this");
    if !status.success() {
        println!("cargo::error=the default guest does not build; if its target is missing: rustup target add {TARGET}");
        return;
    }
    let guest = target_dir.join(TARGET).join("guest").join("default_guest.wasm");
    println!("cargo::rustc-env=DEFAULT_GUEST={}", guest.display());
}
