//! Third-party HTTP clients: ureq and curl.

use std::process::{Command, Stdio};

use ureq::Agent;

/// A client as in applications. No status is an error.
pub fn agent() -> Agent {
    // A proxy in the environment is not for a server on this machine.
    Agent::config_builder().http_status_as_error(false).proxy(None).build().into()
}

/// Runs curl. Returns the status and the body.
pub fn curl(args: &[&str]) -> (u16, Vec<u8>) {
    let mut curl = Command::new("curl");
    curl.args(["--disable", "--noproxy", "*", "--silent", "--show-error", "--max-time", "60"]);
    curl.args(["--write-out", "%{stderr}%{http_code}"]).args(args);
    let output = curl.stdin(Stdio::null()).output().expect("curl is installed");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "curl {args:?}: {}, {said}", output.status);
    let status = said.get(said.len().saturating_sub(3)..).and_then(|code| code.parse().ok());
    (status.unwrap_or_else(|| panic!("curl {args:?} saw no status: {said}")), output.stdout)
}
