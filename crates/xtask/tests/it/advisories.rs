//! Tests scripts/check-advisories.sh: it checks advisories where that is possible, and reports a skipped check.

use crate::{Machine, Output, root};

const TOOLS: &[&str] = &["dirname", "ls", "tail"];

fn check(cargo: &str, arguments: &[&str], change: impl FnOnce(&Machine)) -> Output {
    let machine = Machine::new().with("cargo", cargo).with_real(TOOLS);
    change(&machine);
    let script = root().join("scripts/check-advisories.sh");
    machine.run(script.to_str().unwrap(), arguments, &[])
}

fn database(machine: &Machine) {
    machine.put(".cargo/advisory-dbs/advisory-db/lock", "");
}

#[test]
fn missing_cargo_deny_skips_or_fails_the_check() {
    let none = "echo 'error: no such command: deny' >&2; exit 101";
    let skipped = check(none, &["--if-possible"], |_| {});
    assert_eq!(skipped.code, Some(0));
    assert!(skipped.text.contains("SKIPPED") && skipped.text.contains("cargo-deny is not installed"));

    let refused = check(none, &[], |_| {});
    assert_eq!(refused.code, Some(1));
    assert!(refused.text.contains("cargo install --locked cargo-deny"), "{}", refused.text);
}

#[test]
fn missing_database_skips_the_check_with_a_reason() {
    let offline =
        "case $2 in --version) ;; fetch) echo 'could not resolve host' >&2; exit 1 ;; *) echo checked ;; esac";
    let skipped = check(offline, &["--if-possible"], |_| {});
    assert_eq!(skipped.code, Some(0));
    assert!(
        skipped.text.contains("SKIPPED") && skipped.text.contains("could not resolve host"),
        "{}",
        skipped.text
    );
    assert!(!skipped.text.contains("checked\n"));
    assert_eq!(check(offline, &[], |_| {}).code, Some(1));

    let old = check(offline, &[], database);
    assert_eq!(old.code, Some(0), "{}", old.text);
    assert!(old.text.contains("may be old") && old.text.contains("checked\n"), "{}", old.text);
}

#[test]
fn advisory_fails_the_check() {
    let found = "case $2 in check) echo 'error[vulnerability]: RUSTSEC-2020-0001'; exit 1 ;; esac";
    for arguments in [&[][..], &["--if-possible"]] {
        let output = check(found, arguments, |_| {});
        assert_eq!(output.code, Some(1), "{}", output.text);
        assert!(output.text.contains("RUSTSEC-2020-0001"));
    }
}
