//! Memory available to this process: that of the machine, or the limit of its control group.

use std::fs;
use std::path::Path;

/// Mount point of control groups, and the file with the limit in each: version 2, and version 1.
const CGROUP_V2: (&str, &str) = ("/sys/fs/cgroup", "memory.max");
const CGROUP_V1: (&str, &str) = ("/sys/fs/cgroup/memory", "memory.limit_in_bytes");

/// Share of the memory for guests by default, in quarters. Requests in flight have an eighth.
const GUEST_QUARTERS: u64 = 3;
/// Memory limit of an instance by default, at least and at most.
const INSTANCE_LIMITS: (u64, u64) = (64 << 20, MAX_INSTANCE_BYTES);

/// Maximum size of the memory of an instance, which has 32-bit addresses.
pub const MAX_INSTANCE_BYTES: u64 = 4 << 30;

/// Returns the memory limit of an instance by default, so that two fit for each shard: a swap builds the second beside the
/// first, and a spare is one.
pub fn instance_limit(memory: u64, shards: u8) -> u64 {
    (memory / 4 * GUEST_QUARTERS / (2 * u64::from(shards.max(1)))).clamp(INSTANCE_LIMITS.0, INSTANCE_LIMITS.1)
}

/// Source of the size of the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    Machine,
    ControlGroup,
}

/// Returns the size of the memory in bytes.
pub fn size() -> u64 {
    measured().0
}

/// Returns the size of the memory in bytes, and its source.
pub fn measured() -> (u64, Source) {
    let machine = fs::read_to_string("/proc/meminfo").ok().and_then(|text| total(&text)).unwrap_or(u64::MAX);
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let limits = groups.lines().filter_map(|group| limit(group, |path| fs::read_to_string(path).ok()));
    match limits.min() {
        Some(limit) if limit < machine => (limit, Source::ControlGroup),
        _ => (machine, Source::Machine),
    }
}

/// Parses the total in the first line of `/proc/meminfo`.
fn total(text: &str) -> Option<u64> {
    let kib: u64 = text.strip_prefix("MemTotal:")?.lines().next()?.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kib << 10)
}

/// Returns the smallest limit of a group, a line of `/proc/self/cgroup`, and of its ancestors. In a container the path may
/// exist only on the host; then the root visible in the container is its own group.
fn limit(group: &str, read: impl Fn(&Path) -> Option<String>) -> Option<u64> {
    let mut fields = group.splitn(3, ':').skip(1);
    let (controllers, path) = (fields.next()?, fields.next()?.trim_start_matches('/'));
    let (root, file) = match controllers {
        "" => CGROUP_V2,
        controllers if controllers.split(',').any(|one| one == "memory") => CGROUP_V1,
        _ => return None,
    };
    let groups = Path::new(path).ancestors().map(|path| Path::new(root).join(path).join(file));
    groups.filter_map(|path| read(&path)?.trim().parse().ok()).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instances_of_a_swap_fit_by_default() {
        const MIB: u64 = 1 << 20;
        for (memory, shards, limit) in [
            (260 * MIB, 1, 260 * MIB / 8 * 3),
            (1024 * MIB, 1, 384 * MIB),
            (8192 * MIB, 4, 768 * MIB),
            (64 << 30, 1, 4096 * MIB),
            (u64::MAX, 64, 4096 * MIB),
            (MIB, 64, 64 * MIB),
        ] {
            assert_eq!(instance_limit(memory, shards), limit, "{memory} bytes, {shards} shards");
        }
    }

    #[test]
    fn smallest_limit_of_all_groups_applies() {
        let read = |path: &Path| {
            let text = match path.to_str()? {
                "/sys/fs/cgroup/a/b/memory.max" => "max\n",
                "/sys/fs/cgroup/a/memory.max" => "1000\n",
                "/sys/fs/cgroup/memory.max" => "2000\n",
                "/sys/fs/cgroup/memory/memory.limit_in_bytes" => "3000\n",
                _ => return None,
            };
            Some(text.to_owned())
        };
        for (group, least) in [
            ("0::/a/b", Some(1000)),
            ("0::/", Some(2000)),
            ("0::/elsewhere", Some(2000)),
            ("4:cpu,memory:/x", Some(3000)),
            ("4:cpu:/a", None),
            ("", None),
        ] {
            assert_eq!(limit(group, read), least, "{group}");
        }
        assert_eq!(total("MemTotal:       16303428 kB\nMemFree: 1 kB\n"), Some(16_303_428 << 10));
        assert!((1 << 20..u64::MAX).contains(&size()));
    }
}
