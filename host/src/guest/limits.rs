//! What an instance may use.

use std::time::Duration;

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
    /// A longer line is cut into lines of this many bytes.
    pub log_line_bytes: usize,
}

impl Limits {
    /// What serves a request: others wait meanwhile.
    pub fn of_call(&self) -> CpuLimit {
        CpuLimit { time: self.call, flag: "--guest-cpu-limit" }
    }

    /// What brings an instance up to the log: nobody is served by it yet.
    pub fn of_replay(&self) -> CpuLimit {
        CpuLimit { time: self.replay, flag: "--guest-replay-cpu-limit" }
    }
}
