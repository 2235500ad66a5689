//! Tests of the systemd units in deploy/.

use crate::root;

/// When the kernel kills the program of one provider for lack of memory, systemd's default policy would stop the whole
/// service.
#[test]
fn provider_out_of_memory_does_not_stop_the_service() {
    let services: Vec<_> = std::fs::read_dir(root().join("deploy"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "service"))
        .collect();
    assert!(!services.is_empty());
    for service in services {
        let text = std::fs::read_to_string(&service).unwrap();
        let section = text.split("[Service]").nth(1).unwrap().split("\n[").next().unwrap();
        assert!(section.lines().any(|line| line == "OOMPolicy=continue"), "{}", service.display());
    }
}
