//! Settings of the guest and its limits.

use std::path::PathBuf;
use std::time::Duration;

use bytesize::ByteSize;
use clap::Args;

use crate::guest::{self, Source};
use crate::memory::{self, instance_limit};
use crate::parse::{count, duration, memory_bytes, setting, tick_interval, value_bytes};

/// The guest and its limits.
#[derive(Debug, Args)]
#[command(next_help_heading = "Guest")]
pub struct Guest {
    /// Component file; without it, the built-in store, or to serve, the guest swapped in last
    #[arg(id = "guest", env = "KVS_GUEST", value_name = "GUEST.wasm", help_heading = "Arguments")]
    pub file: Option<PathBuf>,

    /// CPU time limit of one call of the guest
    #[arg(long, env = "KVS_GUEST_CPU_LIMIT", value_name = "TIME", default_value = "1s", value_parser = duration)]
    pub guest_cpu_limit: Duration,

    /// CPU time limit of one batch of entries at replay, up to 1,000 of them; after a timeout, batches are smaller
    #[arg(long, env = "KVS_GUEST_REPLAY_CPU_LIMIT", value_name = "TIME", default_value = "30s", value_parser = duration)]
    pub guest_replay_cpu_limit: Duration,

    /// Memory limit of an instance of the guest, which holds its keys and values; at most 4 GiB. Without it, as much as lets
    /// two instances of each shard fit in three quarters of the memory, from 64 MiB to 4 GiB
    #[arg(long, env = "KVS_GUEST_MAX_MEMORY_BYTES", value_name = "SIZE", value_parser = memory_bytes)]
    pub guest_max_memory_bytes: Option<ByteSize>,

    /// Most elements of all tables of the guest, which hold its functions
    #[arg(long, env = "KVS_GUEST_MAX_TABLE_ELEMENTS", value_name = "COUNT", default_value = "100000",
          value_parser = count)]
    pub guest_max_table_elements: usize,

    /// Most core instances in the guest's component; as many memories, and as many tables
    #[arg(long, env = "KVS_GUEST_MAX_INSTANCES", value_name = "COUNT", default_value = "100", value_parser = count)]
    pub guest_max_instances: usize,

    /// Largest response body of the guest (otherwise 500); never less than --max-value-bytes
    #[arg(long, env = "KVS_MAX_RESPONSE_BYTES", value_name = "SIZE", default_value = "64MiB", value_parser = value_bytes)]
    pub max_response_bytes: ByteSize,

    /// Most appends of the guest in one call; over the limit it gets `unavailable` (the built-in store responds 503)
    #[arg(long, env = "KVS_GUEST_MAX_APPENDS", value_name = "COUNT", default_value = "10000",
          value_parser = clap::value_parser!(u32).range(1..))]
    pub guest_max_appends: u32,

    /// Largest append of the guest, as the log counts; over the limit it gets `too-large` (the built-in store responds 413).
    /// Without it, the largest value and 64 KiB
    #[arg(long, env = "KVS_GUEST_MAX_APPEND_BYTES", value_name = "SIZE", value_parser = value_bytes)]
    pub guest_max_append_bytes: Option<ByteSize>,

    /// Output of the guest per second, in bytes; more is dropped
    #[arg(long, env = "KVS_GUEST_LOG_BYTES", value_name = "SIZE", default_value = "64KiB", value_parser = value_bytes)]
    pub guest_log_bytes: ByteSize,

    /// Output of the guest per second, in lines; more is dropped
    #[arg(long, env = "KVS_GUEST_LOG_LINES", value_name = "COUNT", default_value = "1000",
          value_parser = clap::value_parser!(u32).range(1..))]
    pub guest_log_lines: u32,

    /// Longest line of the guest's output; a longer one is cut into several
    #[arg(long, env = "KVS_GUEST_LOG_LINE_BYTES", value_name = "SIZE", default_value = "2KiB", value_parser = value_bytes)]
    pub guest_log_line_bytes: ByteSize,

    /// Most metrics that the guest defines: combinations of a name and labels; more are dropped
    #[arg(long, env = "KVS_GUEST_MAX_METRICS", value_name = "COUNT", default_value = "1000", value_parser = count)]
    pub guest_max_metrics: usize,

    /// Shortest time between two calls of the guest's `tick`, up to 1s; one that it wants earlier is postponed
    #[arg(long, env = "KVS_GUEST_MIN_TICK_INTERVAL", value_name = "TIME", default_value = "10ms",
          value_parser = tick_interval)]
    pub guest_min_tick_interval: Duration,

    /// Setting for the guest in wasi:config/store; can be repeated (in the variable, one per line)
    #[arg(long, env = "KVS_GUEST_CONFIG", value_name = "KEY=VALUE", value_delimiter = '\n', value_parser = setting)]
    pub guest_config: Vec<(String, String)>,
}

impl Guest {
    /// Where it is loaded from.
    pub fn source(&self) -> Source {
        self.file.clone().map_or(Source::BuiltIn, Source::File)
    }

    /// The largest group of events, where `value_bytes` is the largest value that is accepted.
    pub fn group_bytes(&self, value_bytes: ByteSize) -> u64 {
        self.guest_max_append_bytes.unwrap_or(value_bytes + ByteSize::kib(64)).as_u64()
    }

    /// The memory limit of an instance, in a memory of this size.
    pub fn memory_limit(&self, memory: u64, shards: u8) -> ByteSize {
        self.guest_max_memory_bytes.unwrap_or_else(|| ByteSize(instance_limit(memory, shards)))
    }

    /// `value_bytes` is the largest value that is accepted.
    pub fn limits(&self, value_bytes: ByteSize, shards: u8) -> anyhow::Result<guest::Limits> {
        let (memory, source) = memory::measured();
        Ok(guest::Limits {
            call: self.guest_cpu_limit,
            replay: self.guest_replay_cpu_limit,
            memory_bytes: usize::try_from(self.memory_limit(memory, shards).as_u64())?,
            memory_source: self.guest_max_memory_bytes.is_none().then_some(source),
            table_elements: self.guest_max_table_elements,
            instances: self.guest_max_instances,
            value_bytes: usize::try_from(value_bytes.as_u64())?,
            response_bytes: usize::try_from(self.max_response_bytes.max(value_bytes).as_u64())?,
            appends: self.guest_max_appends,
            log_bytes: usize::try_from(self.guest_log_bytes.as_u64())?,
            log_lines: self.guest_log_lines,
            log_line_bytes: usize::try_from(self.guest_log_line_bytes.as_u64())?,
            metrics: self.guest_max_metrics,
            tick_interval: self.guest_min_tick_interval,
        })
    }
}
