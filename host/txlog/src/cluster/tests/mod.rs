//! The simulation: histories of several processes over a fake engine, each decided by its seed.
//!
//! Start with `histories`. `executor` runs the tasks of all processes in one thread, by a clock of its own; `engine` is what
//! is true; `process` is what a server does with a log.

mod engine;
mod executor;
mod histories;
pub mod mutants;
mod process;
