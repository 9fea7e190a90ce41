//! Faults in system calls, injected with strace.

use std::path::Path;
use std::process::Command;

use super::server::through;

/// Fault injected into a call.
#[derive(Clone, Copy, Debug)]
pub enum Fault {
    /// The call fails with this error.
    Error(&'static str),
    /// The call returns 0 bytes written.
    Nothing,
    /// The process is killed.
    Kill,
}

/// Returns a command under strace, which injects the fault into the `at`-th of these calls of each thread. strace detaches
/// itself, so that the command is the child, and records in `trace`, beside the data, what it did.
pub fn inject(command: Command, call: &str, fault: Fault, at: u64, data: &Path) -> Command {
    let fault = match fault {
        Fault::Error(name) => format!("error={name}"),
        Fault::Nothing => "retval=0".into(),
        Fault::Kill => "signal=KILL".into(),
    };
    let mut strace = through("strace", &command);
    strace.args(["-D", "-f", "--seccomp-bpf", "-qq", "-e", "signal=none", "-e", &format!("trace={call}")]);
    strace.args(["-e", &format!("inject={call}:{fault}:when={at}"), "-o"]).arg(data.join("trace"));
    strace.arg("--").arg(command.get_program()).args(command.get_args());
    strace
}
