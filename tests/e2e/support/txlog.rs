//! `kvs txlog` commands.

use std::process::{Command, Stdio};

use super::server::kvs;

pub fn log(args: &[&str]) -> Command {
    let mut command = kvs();
    command.arg("txlog").args(args);
    command
}

/// Output and messages of a command, which must succeed.
#[track_caller]
pub fn done(args: &[&str]) -> (String, String) {
    let output = log(args).stdout(Stdio::piped()).stderr(Stdio::piped()).output().expect("the binary can be started");
    let [printed, said] = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).expect("it is text"));
    assert!(output.status.success(), "{args:?}: {}, it said: {said}", output.status);
    (printed, said)
}
