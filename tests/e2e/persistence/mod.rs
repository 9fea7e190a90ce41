//! Durability and linearizability.
//!
//! `durability`, and under load `crash`, `faults`, `full_disk` and `backup`: no acknowledged write is lost. `online_backup`:
//! backups of a running server. `shortage`: no file descriptors, and no directory. `log_command` tests commands on an offline
//! log, `bad_log` corrupted and foreign logs, `past` a log served as of the past, `stats` statistics. `linear` checks histories
//! of operations under kills, pauses and swaps; `everything` all of that at once.

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
mod shortage;
mod stats;
