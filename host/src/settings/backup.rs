//! Settings of online backups.

use std::time::Duration;

use clap::Args;

use crate::parse::duration;

#[derive(Args, Debug)]
#[command(next_help_heading = "Backup")]
pub struct Backup {
    /// Longest wait for the client of a backup to take the next mebibyte; a stalled one keeps compaction from dropping deletes
    #[arg(long, env = "KVS_BACKUP_TIMEOUT", value_name = "TIME", default_value = "1m", value_parser = duration)]
    pub backup_timeout: Duration,
}
