//! Settings of a transaction log in NATS JetStream.

/// Conditions under which the log is opened.
#[derive(Debug, clap::Args)]
pub struct Nats {
    /// URLs of the monitoring ports of all NATS nodes, http://HOST:8222, which say whether they sync what they acknowledge
    #[arg(long, env = "KVS_TXLOG_MONITOR", value_name = "URL", value_delimiter = ',')]
    pub txlog_monitor: Vec<String>,

    /// Serve although NATS can lose acknowledged writes: fewer than three replicas, or nodes that do not sync them
    #[arg(long, env = "KVS_ALLOW_UNSAFE_TXLOG")]
    pub allow_unsafe_txlog: bool,
}
