//! Signals for tasks that are started again when they fail.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// Makes the listener of a task each time that the task begins.
pub type Listen = Box<dyn FnMut() -> io::Result<Signal> + Send>;

/// Listens from now on, so that nothing is missed before the task begins.
pub fn listen(kind: SignalKind) -> io::Result<Listen> {
    let mut first = Some(signal(kind)?);
    Ok(Box::new(move || first.take().map_or_else(|| signal(kind), Ok)))
}
