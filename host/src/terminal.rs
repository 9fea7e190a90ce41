//! Terminal output shared by commands: progress bars, and the handling of broken pipes.

use std::io::{self, ErrorKind, IsTerminal};

use indicatif::{ProgressBar, ProgressStyle};

/// Creates a progress bar on standard error, hidden unless that is a terminal.
pub fn bar(length: u64, what: &'static str) -> ProgressBar {
    let bar = ProgressBar::new(length).with_message(what);
    let style = ProgressStyle::with_template("{bar:40} {human_pos} of {human_len} {msg}, {eta} left");
    bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

/// Creates a [`bar`] for a command with output, hidden if both would be on the same terminal.
pub fn bar_beside_output(length: u64, what: &'static str) -> ProgressBar {
    if io::stdout().is_terminal() { ProgressBar::hidden() } else { bar(length, what) }
}

/// Turns a broken pipe of standard output into a success, as in `kvs txlog cat | head`.
pub fn ignore_broken_pipe(done: anyhow::Result<()>) -> anyhow::Result<()> {
    match done {
        Err(error) if error.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == ErrorKind::BrokenPipe) => Ok(()),
        done => done,
    }
}
