//! What an instance may use.

use std::time::Duration;

use bytesize::ByteSize;

use crate::memory::{MAX_INSTANCE_BYTES, Source};

/// A limit of CPU time, and the flag that sets it.
#[derive(Clone, Copy, Debug)]
pub struct CpuLimit {
    pub time: Duration,
    pub flag: &'static str,
}

/// Limits of one instance.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// CPU time of one call.
    pub call: Duration,
    /// CPU time of one batch of entries at replay.
    pub replay: Duration,
    /// Of all linear memories.
    pub memory_bytes: usize,
    /// Source of this limit. None if it was configured.
    pub memory_source: Option<Source>,
    /// Of all tables.
    pub table_elements: usize,
    /// Core instances a component may be made of; as many memories, and as many tables.
    pub instances: usize,
    /// The largest value that comes in.
    pub value_bytes: usize,
    /// The largest body of a response.
    pub response_bytes: usize,
    /// How often one call may append.
    pub appends: u32,
    /// Output that becomes lines of the log, in a second.
    pub log_bytes: usize,
    /// Lines of the log in a second.
    pub log_lines: u32,
    /// A longer line is cut into lines of this many bytes.
    pub log_line_bytes: usize,
    /// Metrics of its own: combinations of a name and labels.
    pub metrics: usize,
    /// Shortest time between two calls of `tick`.
    pub tick_interval: Duration,
}

impl Limits {
    /// Reason for a replay that failed at the limit of memory: where the limit comes from, and what raises it.
    pub fn out_of_memory(&self) -> String {
        let limit = self.memory_bytes as u64;
        let (name, advice) = match self.memory_source {
            _ if limit >= MAX_INSTANCE_BYTES => ("an instance of the guest can have", "start with more --shards"),
            None => ("--guest-max-memory-bytes", "raise it"),
            Some(Source::ControlGroup) => (
                "the guest's share of the memory limit of the control group",
                "raise that of the control group, or give --guest-max-memory-bytes",
            ),
            Some(Source::Machine) => {
                ("the guest's share of the memory of this machine", "add memory, or give --guest-max-memory-bytes")
            }
        };
        format!("the log needs more memory than {name}, which is {}; {advice}", ByteSize(limit))
    }

    /// What serves a request: others wait meanwhile.
    pub fn of_call(&self) -> CpuLimit {
        CpuLimit { time: self.call, flag: "--guest-cpu-limit" }
    }

    /// What brings an instance up to the log: nobody is served by it yet.
    pub fn of_replay(&self) -> CpuLimit {
        CpuLimit { time: self.replay, flag: "--guest-replay-cpu-limit" }
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// Limits of an instance with this memory.
    pub fn limits(memory_bytes: usize, memory_source: Option<Source>) -> Limits {
        Limits {
            call: Duration::from_secs(1),
            replay: Duration::from_secs(1),
            memory_bytes,
            memory_source,
            table_elements: 1,
            instances: 1,
            value_bytes: 1,
            response_bytes: 1,
            appends: 1,
            log_bytes: 1,
            log_lines: 1,
            log_line_bytes: 1,
            metrics: 1,
            tick_interval: Duration::from_millis(10),
        }
    }

    #[test]
    fn lack_of_memory_names_the_source_of_the_limit() {
        for (bytes, source, parts) in [
            (16 << 20, None, ["--guest-max-memory-bytes, which is 16.0 MiB", "raise it"]),
            (
                96 << 20,
                Some(Source::ControlGroup),
                ["control group, which is 96.0 MiB", "or give --guest-max-memory-bytes"],
            ),
            (96 << 20, Some(Source::Machine), ["machine, which is 96.0 MiB", "or give --guest-max-memory-bytes"]),
            (4 << 30, None, ["an instance of the guest can have, which is 4.0 GiB", "more --shards"]),
            (4 << 30, Some(Source::Machine), ["an instance of the guest can have", "more --shards"]),
        ] {
            let reason = limits(bytes, source).out_of_memory();
            assert!(parts.iter().all(|part| reason.contains(part)), "{reason}");
        }
    }
}
