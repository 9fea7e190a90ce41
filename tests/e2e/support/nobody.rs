//! Commands that are run without the privileges of root.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::process::geteuid;

/// The command, run by a user without privileges; a user other than root is one already.
pub fn by_nobody(mut command: Command) -> Command {
    if geteuid().is_root() {
        command.uid(65_534).gid(65_534);
    }
    command
}

/// The binary where everybody can run it. Written by a process of its own: a file that another test's child has open for
/// writing, as it is between fork and exec, cannot be run.
pub fn program_in(directory: &Path) -> PathBuf {
    let program = directory.join("kvs");
    let copied = Command::new("cp").arg(kvs_tests::binary()).arg(&program).status();
    assert!(copied.expect("cp is part of every system").success(), "it cannot be copied");
    program
}
