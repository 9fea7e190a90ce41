//! Runtimes that survive a shortage of threads.

use std::io;
use std::time::Duration;

use tokio::runtime::{Builder, Runtime};

/// Maximum number of threads for blocking work: they are kept, and others need threads too.
const MAX_BLOCKING_THREADS: usize = 64;

/// Builds a runtime that keeps its threads for blocking work, and starts the first of them.
///
/// When the system refuses another thread (the limit of a container is reached), blocking work waits for one that is there;
/// without any tokio panics, and by default it ends them when they are idle.
pub fn runtime(builder: &mut Builder) -> io::Result<Runtime> {
    let runtime =
        builder.enable_all().max_blocking_threads(MAX_BLOCKING_THREADS).thread_keep_alive(Duration::MAX).build()?;
    runtime.spawn_blocking(|| ());
    Ok(runtime)
}
