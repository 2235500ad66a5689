//! Describes the machine that a measurement ran on.

use serde::Serialize;
use std::fs::read_to_string;

#[derive(Debug, Clone, Serialize)]
pub struct Machine {
    pub cores: usize,
    pub model: String,
    pub memory_bytes: u64,
    pub kernel: String,
    /// Load averages over the last one, five and fifteen minutes, separated by spaces.
    pub load: String,
}

impl Machine {
    /// Reads /proc. A value that cannot be read is 0 or empty.
    pub fn now() -> Self {
        let field = |file: &str, name: &str| {
            let text = read_to_string(file).unwrap_or_default();
            let value = text.lines().find_map(|line| line.strip_prefix(name)?.split_once(':'));
            value.map(|(_, value)| value.trim().to_string()).unwrap_or_default()
        };

        let kib: u64 = field("/proc/meminfo", "MemTotal")
            .trim_end_matches(" kB")
            .parse()
            .unwrap_or(0);

        Self {
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            model: field("/proc/cpuinfo", "model name"),
            memory_bytes: kib * 1024,
            kernel: read_to_string("/proc/sys/kernel/osrelease")
                .unwrap_or_default()
                .trim()
                .into(),
            load: read_to_string("/proc/loadavg")
                .unwrap_or_default()
                .split(' ')
                .take(3)
                .collect::<Vec<_>>()
                .join(" "),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_cores_memory_kernel_and_load_of_this_machine() {
        let machine = Machine::now();
        assert!(machine.cores > 0 && machine.memory_bytes > 1 << 20 && !machine.kernel.is_empty(), "{machine:?}");
        assert_eq!(machine.load.split(' ').count(), 3, "{machine:?}");
    }
}
