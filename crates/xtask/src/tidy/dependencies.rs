//! Dependencies point down only, and parts meet on the bus alone.

use super::Finding;
use crate::tree::Tree;
use anyhow::{Context, Result};

/// What each crate of ours may build on. Its tests may also use `testkit` and, below the parts, each other.
const MAY_USE: &[(&str, &[&str])] = &[
    ("wire", &[]),
    ("journal", &[]),
    ("bus", &["wire", "journal"]),
    ("client", &["wire"]),
    ("gateway", &["wire", "bus"]),
    ("router", &["wire", "bus"]),
    ("worker", &["wire", "bus"]),
    ("cluster", &["wire", "bus", "journal"]),
    ("webapp", &["wire", "bus"]),
    ("checks", &["wire", "bus", "client"]),
    ("beamline", &["wire", "journal", "bus", "client", "gateway", "router", "worker", "cluster", "webapp", "checks"]),
    ("testkit", &["wire", "bus", "client"]),
    ("xtask", &[]),
];
const PARTS: &[&str] = &["gateway", "router", "worker", "cluster", "webapp"];
/// What knows time, sockets, threads or chance has no place in the messages.
const NOT_IN_WIRE: &[&str] = &[
    "tokio",
    "tokio-util",
    "futures-util",
    "async-trait",
    "axum",
    "hyper",
    "chrono",
    "time",
    "rand",
    "uuid",
    "tracing",
    "metrics",
];

pub fn check(tree: &Tree) -> Result<Vec<Finding>> {
    let mut findings = Vec::new();
    for file in tree.under("crates/", "toml").filter(|file| file.path.ends_with("/Cargo.toml")) {
        let manifest: toml::Table = file.text.parse().with_context(|| format!("{} is not TOML", file.path))?;
        let Some(name) = manifest.get("package").and_then(|package| package.get("name")?.as_str()) else { continue };
        let Some((_, allowed)) = MAY_USE.iter().find(|(of, _)| *of == name) else {
            let message =
                format!("crate {name} has no place in the order: add it to MAY_USE in xtask's dependencies.rs");
            findings.push(Finding::new(&file.path, 0, message));
            continue;
        };
        let line = |dependency: &str| {
            let found = file.text.lines().position(|line| line.split(['.', ' ', '=']).next() == Some(dependency));
            found.map_or(0, |index| index + 1)
        };
        for dependency in names(&manifest, "dependencies") {
            let ours = MAY_USE.iter().any(|(of, _)| *of == dependency);
            if ours && !allowed.contains(&dependency) {
                let message =
                    format!("{name} must not build on {dependency}: let them meet on the bus, through `wire`");
                findings.push(Finding::new(&file.path, line(dependency), message));
            }
            if name == "wire" && NOT_IN_WIRE.contains(&dependency) {
                let message = format!("wire is messages only: pass what {dependency} gives as an argument");
                findings.push(Finding::new(&file.path, line(dependency), message));
            }
        }
        for dependency in names(&manifest, "dev-dependencies") {
            if PARTS.contains(&name) && PARTS.contains(&dependency) {
                let message =
                    format!("tests of {name} must not use {dependency}: test them together in beamline/tests/it");
                findings.push(Finding::new(&file.path, line(dependency), message));
            }
        }
        if manifest.get("lints").and_then(|lints| lints.get("workspace")?.as_bool()) != Some(true) {
            let message = "the workspace's lints are not on: add `[lints] workspace = true`";
            findings.push(Finding::new(&file.path, 0, message));
        }
    }
    Ok(findings)
}

fn names<'a>(manifest: &'a toml::Table, table: &str) -> impl Iterator<Item = &'a str> {
    manifest.get(table).and_then(toml::Value::as_table).into_iter().flat_map(|table| table.keys().map(String::as_str))
}

#[cfg(test)]
mod tests {
    use super::super::tree_of;
    use super::*;

    fn lines(name: &str, rest: &str) -> Vec<String> {
        let text = format!("[package]\nname = \"{name}\"\n{rest}");
        let tree = tree_of(&[("crates/x/Cargo.toml", &text)]);
        check(&tree).unwrap().iter().map(ToString::to_string).collect()
    }

    const LINTS: &str = "[lints]\nworkspace = true\n";

    #[test]
    fn down_is_allowed_and_sideways_and_up_are_not() {
        for (name, rest, expected) in [
            ("gateway", "[dependencies]\nwire.workspace = true\nbus.workspace = true\n", None),
            ("gateway", "[dependencies]\nrouter.workspace = true\n", Some("crates/x/Cargo.toml:6: gateway must not")),
            ("bus", "[dependencies]\ngateway = { path = \"../gateway\" }\n", Some("bus must not build on gateway")),
            ("cluster", "[dev-dependencies]\nwebapp.workspace = true\n", Some("beamline/tests/it")),
            ("gateway", "[dev-dependencies]\nclient.workspace = true\ntestkit.workspace = true\n", None),
            ("gateway", "[dependencies]\ntestkit.workspace = true\n", Some("gateway must not build on testkit")),
            ("wire", "[dependencies]\ntokio.workspace = true\n", Some("wire is messages only")),
            ("newcomer", "", Some("add it to MAY_USE")),
        ] {
            let found = lines(name, &format!("{LINTS}{rest}"));
            match expected {
                None => assert!(found.is_empty(), "{found:?}"),
                Some(text) => assert!(found.len() == 1 && found[0].contains(text), "{text}: {found:?}"),
            }
        }
    }

    #[test]
    fn lints_are_on_everywhere() {
        assert_eq!(
            lines("wire", ""),
            ["crates/x/Cargo.toml: the workspace's lints are not on: add `[lints] workspace = true`"]
        );
    }
}
