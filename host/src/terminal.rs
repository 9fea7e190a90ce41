//! What commands share that people run at a terminal, or in a pipe.

use std::io::{self, ErrorKind, IsTerminal};

use indicatif::{ProgressBar, ProgressStyle};

/// On standard error, and only where that is a terminal.
pub fn bar(length: u64, what: &'static str) -> ProgressBar {
    let bar = ProgressBar::new(length).with_message(what);
    let style = ProgressStyle::with_template("{bar:40} {human_pos} of {human_len} {msg}, {eta} left");
    bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

/// As [`bar`], beside what is printed: none where both would come to the same terminal.
pub fn bar_beside_output(length: u64, what: &'static str) -> ProgressBar {
    if io::stdout().is_terminal() { ProgressBar::hidden() } else { bar(length, what) }
}

/// How a command ended that prints. Nothing is wrong when nobody wants the rest: `kvs txlog cat | head`.
pub fn ignore_broken_pipe(done: anyhow::Result<()>) -> anyhow::Result<()> {
    match done {
        Err(error) if error.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == ErrorKind::BrokenPipe) => Ok(()),
        done => done,
    }
}
