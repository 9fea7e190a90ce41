//! The surroundings of the logic: a clock, a source of randomness, and the place where threads and tasks are started.
//!
//! The one [`Env`] of a process is made by [`Env::real`] where everything is put together, and handed to each part that
//! needs it; there is no global one. A simulation or a model checker makes another, out of its own [`Time`], [`Entropy`] and
//! [`Spawn`], and runs the same code. `clippy.toml` refuses calls that go around this crate.
//!
//! Owns: the calls to the operating system and to tokio behind these. Must never know: what a task does.

#![cfg_attr(not(test), warn(clippy::disallowed_methods))]

mod clock;
mod random;
mod tasks;

use std::fmt;

pub use clock::{Clock, Time};
pub use random::{Entropy, Random};
pub use tasks::{BoxedTask, BoxedWork, Spawn, Task, Tasks, Thread};

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
    /// The operating system's, and tasks of the tokio runtime in which they are started.
    pub fn real() -> Self {
        Self { clock: Clock::system(), random: Random::system(), tasks: Tasks::system() }
    }
}
