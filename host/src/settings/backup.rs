//! Settings of online backups.

use std::time::Duration;

use clap::Args;

use crate::parse::{duration, duration_or_zero};

#[derive(Args, Debug)]
#[command(next_help_heading = "Backup")]
pub struct Backup {
    /// Longest wait for the client of a backup to take the next mebibyte; a stalled one keeps compaction from dropping deletes
    #[arg(long, env = "KVS_BACKUP_TIMEOUT", value_name = "TIME", default_value = "1m", value_parser = duration)]
    pub backup_timeout: Duration,

    /// Time for which compaction keeps entries after they were superseded or deleted, so that each state since then can be
    /// restored; takes as much disk as is written in that time
    #[arg(long, env = "KVS_RETAIN", value_name = "TIME", default_value = "0s", value_parser = duration_or_zero)]
    pub retain: Duration,
}
