//! Guests, and the limits that the host enforces.
//!
//! `swap` replaces the guest under load, `shadow` compares it before it serves, `spare` takes over after a trap. `shards`: several
//! are one store. `guests`, `languages` and `locks` test the guests of this project, `compiled` guests compiled ahead of time,
//! `guest_test` the command that finds the mistakes of one.
//! `components`, `traps`, `unruly` and `hostile` test faulty guests. `imports` tests what a guest can ask of the host beside the log,
//! `rebuilt` what a rebuild shows of a guest. `huge_pages`: what the kernel keeps the memory of a guest in.

mod compiled;
mod components;
mod guest_test;
mod guests;
mod hostile;
mod huge_pages;
mod imports;
mod languages;
mod locks;
mod rebuilt;
mod shadow;
mod shards;
mod spare;
mod swap;
mod traps;
mod unruly;
