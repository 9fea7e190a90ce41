//! Guests, and what the host does for them and against them.
//!
//! `swap` replaces the guest under load, `shadow` compares it before it serves, `spare` takes over after a trap. `shards`: several
//! are one store. `guests`, `languages` and `locks` are about the guests of this project, `compiled` about guests compiled ahead,
//! `guest_test` about what finds the mistakes of one.
//! `components`, `traps`, `unruly` and `hostile`: what a bad guest can do.

mod compiled;
mod components;
mod guest_test;
mod guests;
mod hostile;
mod languages;
mod locks;
mod shadow;
mod shards;
mod spare;
mod swap;
mod traps;
mod unruly;
