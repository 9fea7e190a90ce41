//! Memory available to this process: that of the machine, or the limit of its control group.

use std::fs;
use std::path::Path;

/// Mount point of control groups, and the file with the limit in each: version 2, and version 1.
const CGROUP_V2: (&str, &str) = ("/sys/fs/cgroup", "memory.max");
const CGROUP_V1: (&str, &str) = ("/sys/fs/cgroup/memory", "memory.limit_in_bytes");

/// Returns the size of the memory in bytes.
pub fn size() -> u64 {
    let machine = fs::read_to_string("/proc/meminfo").ok().and_then(|text| total(&text)).unwrap_or(u64::MAX);
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let limits = groups.lines().filter_map(|group| limit(group, |path| fs::read_to_string(path).ok()));
    limits.fold(machine, u64::min)
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
