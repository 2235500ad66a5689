//! Resources that a process holds, as the kernel reports them in /proc.

use std::path::PathBuf;

#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct Holds {
    pub rss_bytes: u64,
    pub descriptors: u64,
    pub threads: u64,
}

/// Reads the resources of a process. Returns `None` if it has exited or belongs to another user.
pub fn look(pid: u32) -> Option<Holds> {
    let of = |name: &str| PathBuf::from(format!("/proc/{pid}/{name}"));
    let statm = std::fs::read_to_string(of("statm")).ok()?;
    let pages: u64 = statm.split(' ').nth(1)?.parse().ok()?;
    let count = |name: &str| Some(std::fs::read_dir(of(name)).ok()?.count() as u64);
    Some(Holds {
        rss_bytes: pages * 4096,
        descriptors: count("fd")?,
        threads: count("task")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_our_own_process_but_not_a_missing_one() {
        let ours = look(std::process::id()).unwrap();
        assert!(ours.rss_bytes > 100_000 && ours.descriptors >= 3 && ours.threads >= 1, "{ours:?}");
        assert_eq!(look(u32::MAX), None);
    }
}
