//! How much memory this process may use.

/// The limit of the control group, or the memory of the machine where there is none; 0 where nobody says.
pub fn limit() -> u64 {
    let read = |path: &str| std::fs::read_to_string(path).ok();
    let group = read("/sys/fs/cgroup/memory.max").or_else(|| read("/sys/fs/cgroup/memory/memory.limit_in_bytes"));
    lower(group.as_deref().and_then(parse_group), read("/proc/meminfo").as_deref().and_then(parse_machine))
}

/// An unlimited group of the first version says so with a number larger than any machine.
fn lower(group: Option<u64>, machine: Option<u64>) -> u64 {
    match (group, machine) {
        (Some(group), Some(machine)) => group.min(machine),
        (group, machine) => group.or(machine).unwrap_or(0),
    }
}

/// A number of bytes, or `max`.
fn parse_group(text: &str) -> Option<u64> {
    text.trim().parse().ok()
}

/// `MemTotal:       24576000 kB`
fn parse_machine(text: &str) -> Option<u64> {
    let total = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    total.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lower_of_group_and_machine_counts() {
        let machine = parse_machine("MemFree: 1 kB\nMemTotal:       2048 kB\n");
        assert_eq!(machine, Some(2 << 20));
        assert_eq!(lower(parse_group("1048576\n"), machine), 1 << 20);
        assert_eq!(lower(parse_group("max\n"), machine), 2 << 20);
        assert_eq!(lower(parse_group("9223372036854771712\n"), machine), 2 << 20);
        assert_eq!(lower(None, None), 0);
    }
}
