//! Metrics of the process, and of the disk with its data.

use std::fmt;
use std::fs;
use std::path::PathBuf;

use kvs_metrics::{Measured, Page};
use rustix::fs::statvfs;
use rustix::process::{Resource, getrlimit};

/// Clock ticks of a second in `/proc`, the same on all machines.
const TICKS: u64 = 100;

/// The process. Where the system does not have a number, its metric is left out.
pub struct Process {
    /// `--data-dir`.
    pub data: PathBuf,
}

impl Measured for Process {
    fn measure(&self, page: &mut Page<'_>) -> fmt::Result {
        let read = |name| fs::read_to_string(name).ok();
        if let Some(seconds) = read("/proc/self/stat").as_deref().and_then(cpu_seconds) {
            page.counter("process_cpu_seconds", "CPU time, of user and system, in whole seconds", seconds)?;
        }
        if let Some(bytes) = read("/proc/self/status").as_deref().and_then(resident) {
            page.gauge("process_resident_memory_bytes", "Resident memory", bytes)?;
        }
        if let Ok(open) = fs::read_dir("/proc/self/fd") {
            // Without the one that lists them.
            let open = open.count().saturating_sub(1) as u64;
            page.gauge("process_open_fds", "Open file descriptors", open)?;
        }
        if let Some(limit) = getrlimit(Resource::Nofile).current {
            page.gauge("process_max_fds", "Limit of open file descriptors", limit)?;
        }
        if let Ok(disk) = statvfs(&self.data) {
            let help = "Free space of the file system of --data-dir, for this user";
            page.gauge("data_dir_free_bytes", help, disk.f_bavail.saturating_mul(disk.f_frsize))?;
            let help = "Size of the file system of --data-dir";
            page.gauge("data_dir_size_bytes", help, disk.f_blocks.saturating_mul(disk.f_frsize))?;
        }
        Ok(())
    }
}

/// Parses the fields 14 and 15 of `/proc/self/stat`. The second can contain spaces, in parentheses.
fn cpu_seconds(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace().skip(11);
    let mut ticks = || fields.next()?.parse::<u64>().ok();
    Some((ticks()? + ticks()?) / TICKS)
}

/// Parses the resident memory in `/proc/self/status`.
fn resident(status: &str) -> Option<u64> {
    let kib = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?.trim().strip_suffix(" kB")?;
    Some(kib.parse::<u64>().ok()? << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_the_system() {
        let stat = "7 (a ) b) S 1 7 7 0 -1 4194560 1 2 3 4 250 50 0 0 20 0 9 0 5 6 7";
        assert_eq!(cpu_seconds(stat), Some(3));
        assert_eq!(resident("Name:\tkvs\nVmRSS:\t    2048 kB\nVmData:\t 1 kB\n"), Some(2 << 20));
        assert_eq!((cpu_seconds("7 (kvs) S"), resident("Name:\tkvs\n")), (None, None));
    }
}
