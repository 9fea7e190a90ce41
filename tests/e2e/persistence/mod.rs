//! What was acknowledged is kept, and every client sees one store.
//!
//! `durability`, and under load `crash`, `faults`, `full_disk` and `backup`: nothing is lost. `online_backup`: a backup of a
//! running server has what was acknowledged. `log_command` has what can be done with a log at rest, `bad_log` what is done with
//! one that is not right, `past` a log served as it was, `stats` what is counted in it. `linear` checks histories of operations
//! under kills, pauses and swaps; `everything` all of that at once.

mod backup;
mod bad_log;
mod crash;
mod durability;
mod everything;
mod faults;
mod full_disk;
mod linear;
mod log_command;
mod online_backup;
mod past;
mod stats;
