//! Memory that is free for this process: what the machine has, as far as its control group lets it.

use std::path::{Path, PathBuf};

use crate::model::{Place, card, settle};

/// Bytes that are free on each of these devices, once nothing is kept there that nobody holds; `None` where nobody tells.
pub(super) fn free_on(places: &[Place]) -> Option<u64> {
    if !places.iter().any(|place| matches!(place, Place::Cuda(_))) {
        return free_memory();
    }
    if let Err(error) = settle(places) {
        tracing::warn!(%error, "freed memory may count as taken");
    }
    places.iter().map(|place| card(*place).map(|card| card.free_bytes)).min().flatten()
}

/// Bytes that are taken of this device: of a card by anybody, of the machine by this process. `None` where nobody tells.
pub(super) fn used_on(place: Place) -> Option<u64> {
    match place {
        Place::Cpu | Place::Metal(_) => resident(&std::fs::read_to_string("/proc/self/status").ok()?),
        Place::Cuda(_) => card(place).map(|card| card.total_bytes.saturating_sub(card.free_bytes)),
    }
}

/// `VmRSS` of `/proc/self/status`, in bytes.
fn resident(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// Bytes that this process may still take; `None` where the system does not tell.
fn free_memory() -> Option<u64> {
    let read = |path: &Path| std::fs::read_to_string(path).ok();
    let machine = read(Path::new("/proc/meminfo")).and_then(|text| available(&text));
    let groups = read(Path::new("/proc/self/cgroup")).map(|text| groups(&text)).unwrap_or_default();
    let group = groups.iter().filter_map(|folder| {
        let max = read(&folder.join("memory.max")).or_else(|| read(&folder.join("memory.limit_in_bytes")))?;
        let used = read(&folder.join("memory.current")).or_else(|| read(&folder.join("memory.usage_in_bytes")))?;
        group_free(&max, &used, &read(&folder.join("memory.stat")).unwrap_or_default())
    });
    machine.into_iter().chain(group).min()
}

/// `MemAvailable` of `/proc/meminfo`, in bytes.
fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// The folders of this process's control group and of those above it, version 2 and version 1. Inside a container the
/// group's own path may not be mounted; the root of the mount is then the container's.
fn groups(cgroup: &str) -> Vec<PathBuf> {
    let mut folders = Vec::new();
    for line in cgroup.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else { continue };
        let root = match controllers {
            "" => Path::new("/sys/fs/cgroup"),
            controllers if controllers.split(',').any(|name| name == "memory") => Path::new("/sys/fs/cgroup/memory"),
            _ => continue,
        };
        let path = Path::new(path.trim_start_matches('/'));
        folders.extend(path.ancestors().map(|ancestor| root.join(ancestor)));
    }
    folders
}

/// What a group may still take: its limit less its use, where the cache of files that it has not touched lately does not
/// count as used. `None` without a limit.
fn group_free(max: &str, used: &str, stat: &str) -> Option<u64> {
    let max: u64 = max.trim().parse().ok()?;
    let used: u64 = used.trim().parse().ok()?;
    let cache = stat.lines().find_map(|line| line.strip_prefix("inactive_file ")?.trim().parse().ok()).unwrap_or(0);
    Some(max.saturating_sub(used.saturating_sub(cache)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_says_what_is_available() {
        assert_eq!(available("MemTotal:       100 kB\nMemFree: 1 kB\nMemAvailable:   20 kB\n"), Some(20 * 1024));
        assert_eq!(available("MemTotal: 100 kB\n"), None);
        assert_eq!(available("MemAvailable: many kB\n"), None);
    }

    #[test]
    fn the_system_says_what_this_process_has() {
        assert_eq!(resident("VmPeak:\t  9 kB\nVmRSS:\t     7 kB\n"), Some(7 * 1024));
        assert_eq!(resident("VmPeak:\t  9 kB\n"), None);
    }

    #[test]
    fn a_group_and_all_above_it_are_asked() {
        let folders = groups("0::/pods/this\n");
        let expected = ["/sys/fs/cgroup/pods/this", "/sys/fs/cgroup/pods", "/sys/fs/cgroup/"].map(PathBuf::from);
        assert_eq!(folders, expected);
        assert_eq!(
            groups("5:cpu,memory:/x\n4:cpuset:/x\nnonsense\n"),
            ["/sys/fs/cgroup/memory/x", "/sys/fs/cgroup/memory/"].map(PathBuf::from)
        );
    }

    #[test]
    fn a_limit_less_what_is_used_for_good() {
        assert_eq!(group_free("1000\n", "700\n", "anon 5\ninactive_file 200\n"), Some(500));
        assert_eq!(group_free("1000", "1200", ""), Some(0));
        assert_eq!(group_free("max\n", "700\n", ""), None);
    }
}
