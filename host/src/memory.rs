//! Memory that this process may use: what the machine has, or less where a control group says so.

use std::fs;
use std::path::Path;

/// Where control groups are, and the file of a limit in each: in version 2, and in version 1.
const UNIFIED: (&str, &str) = ("/sys/fs/cgroup", "memory.max");
const OWN: (&str, &str) = ("/sys/fs/cgroup/memory", "memory.limit_in_bytes");

/// Returns the size of the memory in bytes.
pub fn size() -> u64 {
    let machine = fs::read_to_string("/proc/meminfo").ok().and_then(|text| total(&text)).unwrap_or(u64::MAX);
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let limits = groups.lines().filter_map(|group| limit(group, |path| fs::read_to_string(path).ok()));
    limits.fold(machine, u64::min)
}

/// The first line of `/proc/meminfo`.
fn total(text: &str) -> Option<u64> {
    let kib: u64 = text.strip_prefix("MemTotal:")?.lines().next()?.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kib << 10)
}

/// The least limit of a group, a line of `/proc/self/cgroup`, and of those that it lies in. In a container the path can be one
/// that only the machine sees; then the root of what the container sees is its own.
fn limit(group: &str, read: impl Fn(&Path) -> Option<String>) -> Option<u64> {
    let mut fields = group.splitn(3, ':').skip(1);
    let (controllers, path) = (fields.next()?, fields.next()?.trim_start_matches('/'));
    let (root, file) = match controllers {
        "" => UNIFIED,
        controllers if controllers.split(',').any(|one| one == "memory") => OWN,
        _ => return None,
    };
    let groups = Path::new(path).ancestors().map(|path| Path::new(root).join(path).join(file));
    groups.filter_map(|path| read(&path)?.trim().parse().ok()).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn least_limit_of_all_groups_counts() {
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
