//! Memory of a server, as reported by Linux.

use std::process::Command;

use super::backup::done;
use super::server::{Server, through};

/// The most memory the server ever had, in KiB.
pub fn peak(server: &Server) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", server.pid())).expect("it runs");
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).expect("Linux reports the peak");
    line.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).expect("in KiB")
}

/// Forgets the peak: it counts from now on.
pub fn forget_peak(server: &Server) {
    std::fs::write(format!("/proc/{}/clear_refs", server.pid()), "5").expect("Linux resets it");
}

/// Runs a command that must succeed, and returns the most memory it ever had, in KiB.
pub fn peak_of(command: &Command) -> u64 {
    const SCRIPT: &str = "import resource, subprocess, sys\nsubprocess.run(sys.argv[1:], check=True)\n\
                          print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)";
    let mut python = through("python3", command);
    python.args(["-c", SCRIPT]).arg(command.get_program()).args(command.get_args());
    done(python).trim().parse().expect("a number")
}

/// Resident memory of the server, in KiB.
pub fn memory(server: &Server) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", server.pid())).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("Linux counts it");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}
