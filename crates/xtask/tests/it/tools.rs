//! Tests scripts/check-tools.sh: it names missing tools, with how to install them, before anything is built.

use crate::{Machine, Output, root};

const RUST: &str = "echo \"$(basename $0) 1.95.0 (59807616e 2026-04-14)\"";

fn machine() -> Machine {
    Machine::new()
        .with("cargo", "echo 'cargo 1.95.0 (f2d3ce0bd 2026-03-21)'")
        .with("rustc", "echo 'rustc 1.96.0-nightly (59807616e 2026-04-14)'")
        .with("node", "echo v20.19.0")
        .with("npm", "echo 10.8.2")
        .with("cc", "exit 0")
}

fn without(names: &[&str]) -> Machine {
    let machine = machine();
    for name in names {
        std::fs::remove_file(machine.dir.path().join("bin").join(name)).unwrap();
    }
    machine
}

fn check(machine: &Machine, arguments: &[&str]) -> Output {
    let script = root().join("scripts/check-tools.sh");
    machine.run(script.to_str().unwrap(), arguments, &[])
}

#[track_caller]
fn refused(machine: &Machine, expected: &[&str]) {
    let output = check(machine, &[]);
    assert_eq!(output.code, Some(1), "{}", output.text);
    // Each problem has two lines: what is wrong, and what to do.
    assert_eq!(output.text.lines().count(), 1 + 2 * expected.len(), "{}", output.text);
    for expected in expected {
        assert!(output.text.contains(expected), "{expected:?} is missing from:\n{}", output.text);
    }
}

#[test]
fn tools_that_are_new_enough_produce_no_output() {
    let output = check(&machine(), &[]);
    assert_eq!((output.code, output.text.as_str()), (Some(0), ""));
    for newer in ["echo v22.0.0", "echo v20.20", "echo v100.1.2-rc.1"] {
        assert_eq!(check(&machine().with("node", newer), &[]).code, Some(0), "{newer}");
    }
}

#[test]
fn every_missing_tool_is_named_with_its_installation() {
    refused(&Machine::new(), &["https://rustup.rs", "node is not installed", "apt-get install build-essential"]);
    refused(&without(&["cargo"]), &["cargo is not installed; the build needs Rust 1.95 or newer"]);
    refused(&without(&["node", "npm"]), &["node is not installed; the front end needs Node 20.19 or newer"]);
    refused(&without(&["npm"]), &["npm is not installed"]);
    refused(&without(&["cc"]), &["there is no C compiler (cc)"]);
}

#[test]
fn old_tools_are_named_with_their_versions() {
    let old = |version: &str| format!("echo 'x {version} (whatever 2020-01-01)'");
    refused(&machine().with("cargo", &old("1.94.1")), &["cargo is 1.94.1; the build needs Rust 1.95 or newer"]);
    refused(&machine().with("rustc", &old("1.63.0")), &["rustc is 1.63.0; the build needs Rust 1.95 or newer"]);
    refused(&machine().with("cargo", &old("0.99.0")), &["cargo is 0.99.0"]);
    refused(
        &machine().with("node", "echo v18.20.4"),
        &["node is 18.20.4; the front end needs Node 20.19 or newer"],
    );
    refused(&machine().with("node", "echo v20.9.0"), &["node is 20.9.0"]);
}

#[test]
fn failing_tools_are_reported_with_their_error() {
    let none = "echo 'rustup could not choose a version of cargo to run' >&2; exit 1";
    refused(&machine().with("cargo", none), &["rustup could not choose a version of cargo to run"]);
    refused(&machine().with("node", "echo 'no loader' >&2; exit 127"), &["node does not run: no loader"]);
    refused(&machine().with("cc", "exit 1"), &["the headers of the C library are missing"]);
}

#[test]
fn cargo_outside_of_path_is_found() {
    let machine = without(&["cargo"]);
    machine.put(".cargo/bin/cargo", RUST);
    let bin = machine.dir.path().join(".cargo/bin").display().to_string();
    refused(&machine, &[&format!("cargo is installed in {bin}, which is not in PATH")]);
    assert!(
        check(&machine, &[])
            .text
            .contains(&format!("export PATH=\"{bin}:$PATH\""))
    );
}

#[test]
fn only_the_named_tools_are_checked() {
    assert_eq!(check(&without(&["cc", "node", "npm"]), &["rust"]).code, Some(0));
    assert_eq!(check(&without(&["cc"]), &["rust", "node"]).code, Some(0));
    assert_eq!(check(&machine(), &["rusty"]).code, Some(2));
}

/// Covers the targets that users run first: the check must fail before anything is downloaded or built.
#[test]
fn make_stops_before_it_builds_the_pages() {
    for target in ["run", "test", "build", "bench"] {
        let touch = "echo \"$@\" >>$HOME/built; exit 1";
        let machine = without(&["cargo"]).with("npm", touch).with("node", "echo v20.19.0");
        let machine = machine.with_real(&["bash", "dirname", "find", "id"]);
        let output = machine.run("/usr/bin/make", &[target], &[]);
        assert_eq!(output.code, Some(2), "{target}: {}", output.text);
        assert!(output.text.contains("cargo is not installed"), "{target}: {}", output.text);
        assert!(!machine.exists("built"), "{target}: make ran the front end's tools");
    }
}
