//! Commands without the privileges of root.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::process::geteuid;

/// Runs the command as an unprivileged user; without root, as the current user.
pub fn by_nobody(mut command: Command) -> Command {
    if geteuid().is_root() {
        command.uid(65_534).gid(65_534);
    }
    command
}

/// A copy of the binary that all users can run. Another process writes it: a file that a child of another test has open for
/// writing, as between fork and exec, cannot be executed.
pub fn program_in(directory: &Path) -> PathBuf {
    let program = directory.join("kvs");
    let copied = Command::new("cp").arg(kvs_tests::binary()).arg(&program).status();
    assert!(copied.expect("cp is part of every system").success(), "it cannot be copied");
    program
}
