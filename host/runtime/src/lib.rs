//! The environment of the application logic: clock, randomness, and the supervisor of threads and tasks.
//!
//! [`Env::real`] creates the single [`Env`] of a process at startup, and each component that needs it receives it; there is
//! no global one. A simulation or a model checker creates its own, from a [`Time`], an [`Entropy`] and a [`Spawn`], and runs
//! the same code. `clippy.toml` rejects calls that bypass this crate.
//!
//! Owns: the calls to the operating system and to tokio behind these. Must never know: what a task does.

#![cfg_attr(not(test), warn(clippy::disallowed_methods))]

mod clock;
mod random;
mod tasks;
mod threads;

use std::fmt;

pub use clock::{Clock, Time};
pub use random::{Entropy, Random};
pub use tasks::{BoxedTask, BoxedWork, Spawn, Task, Tasks, Thread};
pub use threads::runtime;

/// Clock, randomness, and threads and tasks of one process, or of one simulated process. Clones share them.
#[derive(Clone)]
pub struct Env {
    pub clock: Clock,
    pub random: Random,
    pub tasks: Tasks,
}

impl fmt::Debug for Env {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Env")
    }
}

impl Env {
    /// Creates the environment of the operating system. Tasks run in the tokio runtime that starts them.
    pub fn real() -> Self {
        Self { clock: Clock::system(), random: Random::system(), tasks: Tasks::system() }
    }
}
